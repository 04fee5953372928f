"""Step directories: their names, which of them are committed, and finding one from what a user typed."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from parallel.checkpoint.manifest import COMMIT_NAME, MANIFEST_NAME, read_manifest
from parallel.errors import CheckpointError

STEP_NAME = re.compile(r"step_([0-9]{8,18})")
TEMPORARY_MARK = ".tmp-"  # step_00001000.tmp-<nonce>: being written, or left by a save that died


def step_directory(root: Path, step: int) -> Path:
    """The directory of step `step` under the checkpoints root `root`."""
    assert step >= 0
    return Path(root) / f"step_{step:08d}"


def committed_steps(root: Path) -> list[int]:
    """The steps under `root` that have a COMMIT file, in ascending order; empty where `root` does not exist."""
    return [step for step, path in step_directories(root) if (path / COMMIT_NAME).is_file()]


def newest_checkpoint(root: Path, groups: Collection[str] | None = None) -> Path | None:
    """The newest step directory under `root`, its manifest verified (see `read_manifest`); None where there is none.

    Raises CheckpointError naming the newest where it is damaged or incomplete: nothing older is taken here (recovery.py does).
    """
    found = step_directories(root)
    if not found:
        return None
    newest = found[-1][1]
    try:
        read_manifest(newest, groups)
    except CheckpointError as error:
        older = [step for step in committed_steps(root) if step < found[-1][0]]
        help_text = f"move it away to resume from step {older[-1]}" if older else "there is no older step"
        raise CheckpointError(f"{error} (the newest checkpoint is damaged; {help_text})") from error
    return newest


def resolve_checkpoint(path: Path, groups: Collection[str] | None = None) -> Path:
    """The step directory that `path` means: itself, the newest under a checkpoints root, or that of a run directory.

    A run directory has its root in `checkpoints/`. Raises CheckpointError saying what was looked for and what was found.
    """
    path = Path(path)
    looked_for = f"looked for a step directory (with {MANIFEST_NAME}), or step_* or checkpoints/step_* in it"
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {found}: {looked_for}")
    if TEMPORARY_MARK in path.resolve().name:
        raise CheckpointError(f"{path} was left by a save that did not finish: take a step_* directory beside it")
    if (path / MANIFEST_NAME).exists() or (path / COMMIT_NAME).exists() or STEP_NAME.fullmatch(path.resolve().name):
        read_manifest(path, groups)
        return path
    for root in (path, path / "checkpoints"):
        newest = newest_checkpoint(root, groups)
        if newest is not None:
            return newest
    names = sorted(entry.name for entry in path.iterdir())
    found = f"found {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "found it empty"
    raise CheckpointError(f"no checkpoint in {path}: {looked_for}; {found}")


def step_directories(root: Path) -> list[tuple[int, Path]]:
    """The directories under `root` that bear the name of a step, in ascending order; empty where `root` does not exist."""
    root = Path(root)
    if not root.is_dir():
        return []
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)
