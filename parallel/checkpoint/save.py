"""Write a checkpoint: every rank its boxes, one rename at the end, and every rank knows what came of it.

    all:    make step_00001000.tmp-<nonce>; write {group}-{rank}.safetensors, fsync; part-{rank}.json         agree
    rank 0: merge and check the parts; extra files, manifest.json, COMMIT; fsync each, fsync the directory,
            rename it to step_00001000, fsync its parent                                                      agree
    rank 0: remove old steps

A rank that fails says so, and leaves its reason in the temporary directory for rank 0 to read; then nothing is published, and
rank 0 removes the directory. `save_checkpoint` agrees by votes, all ranks waiting; `background` does the same with threads.
A rank that dies makes the vote itself fail on the others; the temporary directory stays, is never read, and is removed by the
next save of the same step, or by `remove_unfinished`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from parallel.checkpoint.files import BytesOf, data_file_name, fsync_directory, write_durably, write_safetensors
from parallel.checkpoint.manifest import (
    COMMIT_NAME,
    GROUP_NAME,
    MANIFEST_NAME,
    SAFETENSORS_CODES,
    ExtraFile,
    Manifest,
    TensorInfo,
    dtype_name,
    is_extra_file_name,
)
from parallel.checkpoint.retention import remove_old_steps
from parallel.checkpoint.steps import STEP_NAME, TEMPORARY_MARK, step_directory
from parallel.checkpoint.voting import Voter
from parallel.errors import CheckpointError
from parallel.shards import TensorBox

Groups = Mapping[str, Iterable[TensorBox]]


class FailedElsewhere(CheckpointError):
    """The save failed on another rank, which has the reason. Rank 0's text repeats it."""


def save_checkpoint(
    root: Path,
    step: int,
    groups: Groups,
    state: dict,
    *,
    world: Voter,
    extra_files: Mapping[str, bytes] | None = None,
    keep: int = 0,
    keep_every: int = 0,
) -> Path:
    """Write step `step` under `root` (which all ranks share) and return its directory. All ranks of `world` call it together.

    groups: per group of files ("weights", "optimizer") the boxes that this rank is to write. No two ranks' boxes overlap;
    together they cover each tensor. Tensors may lie on a device or be strided; CPU contiguous ones are not copied.
    state, extra_files: rank 0's are stored; `state` must be JSON values (tuples come back as lists).
    keep, keep_every: which steps are left (see `retention`), this one always among them; `keep` 0 leaves all.

    Raises CheckpointError on every rank where any rank fails: with the reason on the rank that failed, and nothing is
    published. An existing directory of the step is never touched. Extra memory: at most 8 MiB a rank.
    """
    draft = Draft(Path(root), step, world.rank, world.size, world.broadcast_int(new_nonce()))
    for action in (lambda: draft.write(groups), lambda: draft.commit(state, extra_files or {}, keep, keep_every)):
        error = draft.attempt(action)
        if not world.all_ok(error is None):
            raise draft.give_up(error)
    return draft.final


def new_nonce() -> int:
    """What tells one attempt to save a step from another."""
    return secrets.randbits(48)


class Draft:
    """A step on its way to disk, as one of `size` ranks sees it. Nothing in here waits for another rank.

    `write` on every rank; once all ranks have, `commit`. The others must learn of what goes wrong before anything else is done,
    so `attempt` returns it rather than raise it; once all know, and nobody writes any more, every rank calls `give_up`.
    """

    def __init__(self, root: Path, step: int, rank: int, size: int, nonce: int) -> None:
        assert sys.byteorder == "little", "safetensors files are little-endian"
        self.root, self.step, self.rank, self.size = root, step, rank, size
        self.final = step_directory(root, step)
        self.temporary = root / f"{self.final.name}{TEMPORARY_MARK}{nonce:012x}"

    def write(self, groups: Groups) -> None:
        """Write this rank's part. Rank 0 makes the directory, or finds it made by a rank that was faster."""
        if self.rank == 0:
            prepare(self.root, self.final, self.temporary)
        self.temporary.mkdir(parents=True, exist_ok=True)
        write_part(self.temporary, self.rank, groups)

    def commit(self, state: dict, extra_files: Mapping[str, bytes], keep: int, keep_every: int) -> None:
        """Publish what all ranks have written, and remove old steps. It is rank 0's work; the others do nothing."""
        if self.rank == 0:
            commit(self.temporary, self.final, self.step, self.size, state, extra_files)
            remove_old_steps(self.root, self.step, keep, keep_every)

    def attempt(self, action: Callable[[], object]) -> Exception | None:
        """Do `action`; return what went wrong, worded for a user and left where rank 0 finds it, or None."""
        try:
            action()
            return None
        except CheckpointError as found:
            error = CheckpointError(f"{found}; nothing was published")
        except OSError as found:
            error = CheckpointError(f"checkpoint {self.final}, rank {self.rank}: {found}; nothing was published")
            error.__cause__ = found
        except Exception as found:  # a defect of ours or of the caller: the other ranks must learn of it all the same
            error = found
        self._leave_reason(error)
        return error

    def give_up(self, error: Exception | None) -> Exception:
        """Remove what was written (rank 0). Returns what this rank is to raise: its `error`, or that another one has failed."""
        reasons = "its message says why"
        if self.rank == 0:
            reasons = self._reasons()
            shutil.rmtree(self.temporary, ignore_errors=True)
        return error or FailedElsewhere(f"checkpoint {self.final} failed on another rank ({reasons}); nothing was published")

    def _leave_reason(self, error: Exception) -> None:
        """Best effort, with the room that this rank's own files have taken: a disk may be full."""
        with contextlib.suppress(OSError):
            self.temporary.mkdir(parents=True, exist_ok=True)
            for path in self.temporary.glob(f"*-{self.rank:05d}.safetensors"):
                path.unlink()
            (self.temporary / f"failed-{self.rank:05d}.txt").write_text(str(error), encoding="utf-8")

    def _reasons(self) -> str:
        with contextlib.suppress(OSError):
            texts = [path.read_text(encoding="utf-8") for path in sorted(self.temporary.glob("failed-*.txt"))]
            missing = [str(rank) for rank in range(self.size) if not (self.temporary / part_name(rank)).exists()]
            if texts or missing:
                return "; ".join(texts) or f"rank {', '.join(missing)}: see its log"
        return "see its log"


def prepare(root: Path, final: Path, temporary: Path) -> None:
    """Make `temporary`, in which the checkpoint `final` is to be written, and remove what other attempts at it have left."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # (then it was not made just now)
        fsync_directory(root.parent)
    if final.exists():
        kind = "is already committed" if (final / COMMIT_NAME).exists() else f"exists without {COMMIT_NAME}: it is damaged"
        raise CheckpointError(f"{final} {kind}; it is left as it is. Move it away, or save under another root")
    for stale in root.glob(f"{final.name}{TEMPORARY_MARK}*"):
        if stale != temporary:
            shutil.rmtree(stale)
    temporary.mkdir(exist_ok=True)


def remove_unfinished(root: Path) -> None:
    """Remove what saves of any step that never finished have left under `root`. Nobody else may be saving there."""
    for path in root.glob(f"*{TEMPORARY_MARK}*"):
        if STEP_NAME.fullmatch(path.name.split(TEMPORARY_MARK)[0]):
            shutil.rmtree(path)


def write_part(
    temporary: Path, rank: int, groups: Mapping[str, Iterable[TensorBox]], bytes_of: BytesOf | None = None
) -> None:
    """Write this rank's files, and what it has written as part-{rank}.json, for rank 0 to merge.

    `bytes_of`: where the bytes of a box come from that is not in memory; its tensor says the dtype then.
    """
    tensors: dict[str, TensorInfo] = {}
    files, boxes = [], []
    for group, given in groups.items():
        if not GROUP_NAME.fullmatch(group):
            raise CheckpointError(f"checkpoint {temporary}: {group!r} is not allowed as the name of a group")
        given = list(given)
        for item in given:
            info = TensorInfo(tuple(item.global_shape), item.tensor.dtype, group)
            if info.dtype not in SAFETENSORS_CODES:
                raise CheckpointError(f"checkpoint {temporary}: {item.name}: {dtype_name(info.dtype)} has no stored form")
            _agree(tensors, item.name, info, f"checkpoint {temporary}, rank {rank}")
        # larger elements first: every tensor starts at a multiple of its element size
        stored = sorted((item for item in given if item.box.numel), key=lambda item: -item.tensor.dtype.itemsize)
        if stored:
            path = temporary / data_file_name(group, rank)
            info, written = write_safetensors(path, stored, bytes_of)
            files.append(info)
            boxes += written
    part = Manifest(0, tensors, {info.name: info for info in files}, boxes)
    (temporary / part_name(rank)).write_bytes(part.to_json())


def commit(temporary: Path, final: Path, step: int, ranks: int, state: dict, extra_files: Mapping[str, bytes]) -> None:
    """Merge the parts into a checked manifest and make the directory appear."""
    manifest = _merge_parts(temporary, step, ranks, state, extra_files)
    for name, data in extra_files.items():
        write_durably(temporary / name, data)
    data = manifest.to_json()
    write_durably(temporary / MANIFEST_NAME, data)
    for rank in range(ranks):
        (temporary / part_name(rank)).unlink()
    write_durably(temporary / COMMIT_NAME, hashlib.sha256(data).hexdigest().encode())
    fsync_directory(temporary)
    if final.exists():
        raise CheckpointError(f"{final} appeared during the save: is another job writing to the same root?")
    os.rename(temporary, final)
    try:
        fsync_directory(final.parent)
    except OSError:
        os.rename(final, temporary)  # this save is about to be reported as failed
        raise


def _merge_parts(temporary: Path, step: int, ranks: int, state: dict, extra_files: Mapping[str, bytes]) -> Manifest:
    manifest = Manifest(step, {}, {}, [], state)
    for rank in range(ranks):
        where = f"checkpoint {temporary}, part of rank {rank}"
        try:
            data = (temporary / part_name(rank)).read_bytes()
        except FileNotFoundError as error:
            raise CheckpointError(f"{where}: rank 0 does not see it: do all ranks share this file system?") from error
        part = Manifest.from_json(data, where, check=False)
        for name, info in part.tensors.items():
            _agree(manifest.tensors, name, info, where)
        manifest.files.update(part.files)
        manifest.boxes.extend(part.boxes)
    for name, data in extra_files.items():
        if not is_extra_file_name(name):
            raise CheckpointError(f"checkpoint {temporary}: {name!r} is not allowed as the name of an extra file")
        manifest.extra_files[name] = ExtraFile(len(data), zlib.crc32(data))
    manifest.check(f"checkpoint {temporary}")
    return manifest


def _agree(tensors: dict[str, TensorInfo], name: str, info: TensorInfo, where: str) -> None:
    known = tensors.setdefault(name, info)
    if known != info:
        texts = (f"{list(i.shape)} {dtype_name(i.dtype)} in group {i.group}" for i in (info, known))
        raise CheckpointError(f"{where}: {name} is {next(texts)}, elsewhere {next(texts)}: ranks must agree on each tensor")


def part_name(rank: int) -> str:
    """The file in which a rank tells rank 0 what it has written."""
    return f"part-{rank:05d}.json"
