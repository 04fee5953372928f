"""Which step a run goes on from: the newest that is good. Damaged ones are put aside by name, loudly, and never deleted."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from parallel.checkpoint.files import fsync_directory
from parallel.checkpoint.load import read_extra_file, verify_block
from parallel.checkpoint.manifest import DamagedError, read_manifest
from parallel.checkpoint.steps import STEP_NAME, step_directories
from parallel.errors import CheckpointError

BAD_MARK = ".bad-"  # step_00001000.bad-<nonce>: found damaged; no program takes it for a checkpoint any more
REASON_NAME = "DAMAGED"  # in it: what was found


def newest_good_step(root: Path) -> tuple[Path | None, list[tuple[Path, DamagedError]]]:
    """The newest step under `root` whose manifest and sizes are right, and the newer ones, each with what is wrong.

    (None, []) where `root` holds no step at all. Raises CheckpointError, which lists what was found, where it holds damaged
    steps only: a run must not begin anew because of damage. Errors that say nothing about a step, such as missing rights or
    the format of a newer version, are raised, too.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for _, path in reversed(step_directories(root)):
        try:
            read_manifest(path)
            return path, damaged
        except DamagedError as error:
            damaged.append((path, error))
    found = [str(error) for _, error in damaged]
    found += [f"{path.name}, put aside: {reason}" for path, reason in quarantined_steps(root).items()]
    if found:
        raise CheckpointError(
            f"no good checkpoint is left in {root}: {'; '.join(found)}. Copy a good one there, or move these away to start anew"
        )
    return None, []


def quarantine(directory: Path, error: DamagedError) -> Path:
    """Rename a damaged step directory, so that nothing takes it for a checkpoint and its step can be saved again.

    Returns its new path. Raises CheckpointError where that cannot be done.
    """
    aside = directory.with_name(f"{directory.name}{BAD_MARK}{secrets.randbits(48):012x}")
    try:
        (directory / REASON_NAME).write_text(str(error), encoding="utf-8")
        os.rename(directory, aside)
        fsync_directory(directory.parent)
    except OSError as failure:
        raise CheckpointError(f"{error}; it cannot be put aside: {failure}; move it away") from failure
    return aside


def quarantined_steps(root: Path) -> dict[Path, str]:
    """The damaged step directories that have been put aside, in the order of their names, and what was found in each."""
    paths = sorted(Path(root).glob(f"step_*{BAD_MARK}*"))
    return {path: _reason(path) for path in paths if STEP_NAME.fullmatch(path.name.partition(BAD_MARK)[0])}


def _reason(path: Path) -> str:
    try:
        return (path / REASON_NAME).read_text(encoding="utf-8")[:1000]
    except (OSError, UnicodeDecodeError):
        return "nobody knows why"


def confirm_damage(directory: Path, error: DamagedError) -> None:
    """Read again here what some rank found damaged. Raises CheckpointError where it is good.

    A node with bad memory or a bad disk cache must not condemn one checkpoint after the other.
    """
    try:
        manifest = read_manifest(directory)
        if error.block is not None:
            verify_block(directory, manifest.files[error.file], error.block)
        elif error.file in manifest.extra_files:
            read_extra_file(directory, error.file, manifest)
    except DamagedError:
        return
    raise CheckpointError(
        f"{error}; rank 0 reads {error.file} without a fault, so look at that rank's node: memory, disk, file system. "
        "The checkpoint was left where it is"
    )
