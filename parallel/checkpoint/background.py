"""Save while training goes on: the state is copied to host memory, and threads write it from there.

    all:    copy the boxes; a thread writes this rank's part from the copy
    all:    every step's sums over the ranks carry their `Progress`; once these say that all parts are there,
    rank 0: a thread commits
    all:    once the sums say that it has, the step is saved

The threads communicate with nobody, and the messages of a step are as many as ever. All ranks hear the same sums, so they agree
on where the save is, and on whether it has failed: then it is given up, as in `save`. `wait` ends it by votes instead.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.checkpoint.save import Draft, Groups, new_nonce
from parallel.checkpoint.voting import Voter
from parallel.errors import CheckpointError
from parallel.shards import TensorBox

ALIGNMENT = 64  # bytes; of each box in the copy
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device's context


class Progress(NamedTuple):
    """What a rank says of the save under way, and what the sums over the ranks say of it."""

    parts: float = 0.0  # ranks that have ended their part, well or not
    commits: float = 0.0  # 1 once rank 0 has ended the commit, well or not
    failures: float = 0.0  # ranks that did not end it well


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `error` is what this rank is to report, or None where the step is saved."""

    step: int
    directory: Path
    seconds: float  # since the state was copied
    error: Exception | None


class BackgroundSaver:
    """Saves one step at a time. All ranks of `world` make it together, and call `start`, `hear` and `wait` in one order."""

    def __init__(self, world: Voter, device: torch.device) -> None:
        self._world, self._device = world, device
        self._nonce = world.broadcast_int(new_nonce())
        self._memory = HostMemory(device)
        self._save: _Save | None = None

    @property
    def step(self) -> int | None:
        """The step that is being saved."""
        return None if self._save is None else self._save.draft.step

    @property
    def commits(self) -> bool:
        """Whether the ranks have agreed that all parts of it are there."""
        return self._save is not None and self._save.commits

    def start(
        self,
        root: Path,
        step: int,
        groups: Callable[[], Groups],
        state: dict,
        *,
        extra_files: Mapping[str, bytes] | None = None,
        keep: int = 0,
        keep_every: int = 0,
    ) -> torch.cuda.Event | None:
        """Copy the boxes that `groups()` makes, and go on saving them in the background; arguments as of `save_checkpoint`.

        Returns what the next change of the state is to wait for on the device; None where the copy is made already. What
        goes wrong, here too, is told by `hear` and `wait`. All sums of steps launched so far must have been heard.
        """
        assert self._save is None, f"step {self._save.draft.step} is still being saved"
        draft = Draft(Path(root), step, self._world.rank, self._world.size, self._nonce)
        copies: dict[str, list[TensorBox]] = {}
        error = draft.attempt(lambda: copies.update(self._memory.copy(groups)))
        copied = self._memory.copied

        def write() -> None:
            self._wait_for(copied)
            draft.write(copies)

        task = _Task(lambda: error or draft.attempt(write))
        self._save = _Save(draft, time.perf_counter(), task, lambda: draft.commit(state, extra_files or {}, keep, keep_every))
        return copied

    def progress(self) -> Progress:
        """What this rank adds to the sums of the next step."""
        save = self._save
        if save is None:
            return Progress()
        ended = save.task.ended
        failures = float(ended and save.task.error is not None)
        if not save.commits:
            return Progress(parts=float(ended), failures=failures)
        return Progress(commits=float(ended and self._world.rank == 0), failures=failures)

    def hear(self, sums: Progress) -> Outcome | None:
        """Take in the ranks' progress as a step has added it up. Returns how the save ended, if it has."""
        if self._save is None:
            return None
        ended = sums.commits > 0 if self._save.commits else sums.parts == self._world.size
        return self._go_on(failed=sums.failures > 0) if ended else None

    def wait(self) -> Outcome | None:
        """End the save under way, if there is one; all ranks wait for it together."""
        outcome = None
        while self._save is not None:
            self._save.task.join()
            outcome = self._go_on(failed=not self._world.all_ok(self._save.task.error is None))
        return outcome

    def _go_on(self, failed: bool) -> Outcome | None:
        """All ranks have ended what they were at."""
        save, draft = self._save, self._save.draft
        if not failed and not save.commits:
            self._save = replace(save, task=_Task(lambda: draft.attempt(save.commit)), commits=True)
            return None
        self._save = None
        error = draft.give_up(save.task.error) if failed else None
        return Outcome(draft.step, draft.final, time.perf_counter() - save.started, error)

    def _wait_for(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            with torch.cuda.device(self._device):  # a thread begins on device 0, and would make a context there
                copied.synchronize()


class _Task:
    """An action in a thread of its own, which ends with the program. `error` is what the action returned."""

    def __init__(self, action: Callable[[], Exception | None]) -> None:
        self.error: Exception | None = RuntimeError("a thread that saves has died")  # until it has ended
        self._thread = Thread(target=self._run, args=(action,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Exception | None]) -> None:
        self.error = action()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()


@dataclass(frozen=True)
class _Save:
    """A save under way: first every rank writes, then (`commits`) rank 0 commits."""

    draft: Draft
    started: float
    task: _Task
    commit: Callable[[], None]
    commits: bool = False


class HostMemory:
    """Host memory for a copy of what a rank writes: made for the first copy, kept for the next ones.

    It is pinned where the rank has a GPU, which then copies in a stream of its own, beside what is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[str, list[TensorBox]] | None = None
        self.copied: torch.cuda.Event | None = None  # when the device has made the last copy

    @torch.no_grad()
    def copy(self, groups: Callable[[], Groups]) -> dict[str, list[TensorBox]]:
        """The boxes that `groups()` makes (the same ones each time), their tensors here: from a GPU, valid once `copied`."""
        if self._places is None:
            self._places = self._make_places(groups())
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):  # (None changes nothing)
            for group, items in groups().items():
                for item, place in zip(items, self._places[group], strict=True):
                    assert (item.name, item.box) == (place.name, place.box), "a rank writes the same boxes each time"
                    place.tensor.copy_(item.tensor, non_blocking=True)
                    if item.tensor.is_cuda:
                        item.tensor.record_stream(self._stream)
            if self._stream is not None:
                self.copied = self._stream.record_event()
        return self._places

    def _make_places(self, groups: Groups) -> dict[str, list[TensorBox]]:
        """The same boxes, their tensors one after the other in memory of their own. Raises CheckpointError."""
        plan = {
            group: [replace(item, tensor=torch.empty_like(item.tensor, device="meta")) for item in items]
            for group, items in groups.items()
        }
        memory = self._allocate(sum(_room(item.tensor) for items in plan.values() for item in items))
        places, used = {}, 0
        for group, items in plan.items():
            places[group] = []
            for item in items:
                bytes_ = memory[used : used + item.tensor.nbytes]
                places[group].append(replace(item, tensor=bytes_.view(item.tensor.dtype).view(item.tensor.shape)))
                used += _room(item.tensor)
        return places

    def _allocate(self, size: int) -> Tensor:
        """`size` bytes, pinned where there is a GPU: by hand, as torch's pinned memory comes in powers of two."""
        try:
            memory = torch.empty(size, dtype=torch.uint8)
            if self._stream is not None and size:
                self._pin(memory)
            return memory
        except RuntimeError as error:
            raise CheckpointError(
                f"no {size / 2**30:.1f} GiB of host memory for the copy that a save in the background is made from ({error}); "
                "--checkpoint.asynchronous false needs none"
            ) from error

    def _pin(self, memory: Tensor) -> None:
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
        if code:
            raise RuntimeError(f"cudaHostRegister has failed with code {code}")
        weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False


def _room(tensor: Tensor) -> int:
    """The bytes that a tensor takes up in the copy."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
