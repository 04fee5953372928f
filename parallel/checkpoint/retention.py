"""Which steps of a checkpoints root stay, and removing the others.

A step stays where it is one of the newest `keep`, where `keep_every` divides it, or where it is the newest one whose every
byte has been read back and found good: that one is what recovery can count on. Whoever has read a whole checkpoint says so by
the file VERIFIED beside COMMIT. It is no part of the checkpoint: nothing lists it, and copies do without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from datetime import UTC, datetime
from pathlib import Path

from parallel.checkpoint.manifest import COMMIT_NAME, MANIFEST_NAME, VERIFIED_NAME
from parallel.checkpoint.steps import TEMPORARY_MARK, committed_steps, step_directory

TRASH_MARK = f"{TEMPORARY_MARK}removed-"  # step_00001000.tmp-removed-<nonce>: on its way out


def removable_steps(root: Path, keep: int, keep_every: int = 0, newest: int | None = None) -> list[int]:
    """The steps under `root` that may go, in ascending order. `keep` 0 keeps all; `keep_every` 0 keeps no further ones.

    `newest`: a step that counts as the newest whatever its number.
    """
    if keep <= 0:
        return []
    steps = sorted(committed_steps(root), key=lambda step: (step == newest, step))
    verified = newest_verified_step(root)
    return [step for step in steps[:-keep] if step != verified and not (keep_every and step % keep_every == 0)]


def remove_old_steps(root: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Remove what need not stay after `step` was saved. It is safe already, so a failure here is only a warning."""
    try:
        for old in removable_steps(root, keep, keep_every, newest=step):
            path = step_directory(root, old)
            os.rename(path, path.with_name(f"{path.name}{TRASH_MARK}{secrets.randbits(48):012x}"))
        for trash in Path(root).glob(f"*{TRASH_MARK}*"):  # those of a removal that was interrupted, too
            shutil.rmtree(trash)
    except OSError as error:
        warnings.warn(f"old checkpoints in {root} could not be removed: {error}", RuntimeWarning, stacklevel=2)


def mark_verified(directory: Path) -> None:
    """Note that every byte of the step directory has been read and is good, by the hash of its manifest and the time.

    Does nothing where the directory cannot be written: the note is a help, not a promise.
    """
    try:
        digest = hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()
        note = {"manifest_sha256": digest, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        (directory / VERIFIED_NAME).write_text(json.dumps(note), encoding="utf-8")
    except OSError:
        return


def verified_time(directory: Path) -> str | None:
    """When the step directory was last found good (ISO 8601, UTC); None where it was not, or has changed since."""
    try:
        note = json.loads((directory / VERIFIED_NAME).read_bytes())
        commit = (directory / COMMIT_NAME).read_text(encoding="ascii")
    except (OSError, ValueError, RecursionError):
        return None
    fits = isinstance(note, dict) and note.get("manifest_sha256") == commit and isinstance(note.get("time"), str)
    return note["time"] if fits else None


def newest_verified_step(root: Path) -> int | None:
    """The newest step under `root` that was found good."""
    return next((s for s in reversed(committed_steps(root)) if verified_time(step_directory(root, s))), None)
