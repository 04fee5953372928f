"""When and how a run saves its state: at once or in the background, and what it does where a save fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_llama.config import checkpoint_directory, saves_in_background
from megatron_llama.program import LOGGER, say
from megatron_llama.runtime import Runtime
from megatron_llama.state import Position, save_state, start_save, voter
from megatron_llama.watching.watch import Watch
from parallel.checkpoint.background import BackgroundSaver, Outcome, Progress
from parallel.checkpoint.save import FailedElsewhere, remove_unfinished
from parallel.checkpoint.steps import step_directory
from parallel.errors import CheckpointError
from parallel.zero.engine import Engine


class Saver:
    """Saves the state of a run that starts at step `saved_step`. All ranks make it, and call its methods in the same order.

    A save that fails on one rank has failed on all of them. Training goes on then, unless more than
    `checkpoint.failures_allowed` saves have failed in a row, or the last one of the run: that raises CheckpointError on every
    rank. `dataset(samples)` is the state of the training data after so many samples.
    """

    def __init__(
        self,
        runtime: Runtime,
        engine: Engine,
        dataset: Callable[[int], dict[str, Any]],
        tokenizer: bytes | None,
        saved_step: int,
        watch: Watch,
    ) -> None:
        self.runtime, self.engine, self.dataset, self.tokenizer, self.watch = runtime, engine, dataset, tokenizer, watch
        self.saved_step = saved_step  # the newest that is safe
        self.state_copied: torch.cuda.Event | None = None  # what updates wait for on the device: the last copy of the state
        self.settings = runtime.config.checkpoint
        self.root = checkpoint_directory(runtime.config)
        self.rank = runtime.groups.world.rank
        self.log = logging.getLogger(LOGGER)
        self.background = BackgroundSaver(voter(runtime), runtime.device) if saves_in_background(runtime.config) else None
        self._failures = 0  # in a row
        if self.rank == 0:
            try:
                remove_unfinished(self.root)
            except OSError as error:
                self.log.warning(f"what an unfinished save has left could not be removed: {error}")

    def progress(self) -> Progress:
        """What this rank adds to the sums of the next step."""
        return Progress() if self.background is None else self.background.progress()

    def hear(self, sums: Progress) -> None:
        """Take in what the ranks have said in a step. Every step's sums are to be heard before the next save."""
        outcome = None if self.background is None else self.background.hear(sums)
        if outcome is not None:
            self._conclude(outcome)

    def save(self, position: Position) -> bool:
        """Save the state, or begin to. Returns False where that is skipped, as the last save is still under way."""
        if self.background is None:
            self._conclude(self._save_now(position))
            return True
        if self.background.step is not None and self.settings.when_busy == "skip":
            self.log.info(f"step {position.step}: not saved, as step {self.background.step} is still being written")
            return False
        self._wait(position)
        self.state_copied = start_save(self.background, self.runtime, self.engine, *self._contents(position))
        return True

    def finish(self, position: Position) -> None:
        """Return when this state, the run's last, is safe: wait for the save under way, and save unless that was this state."""
        self._wait(position)
        if self.saved_step != position.step:
            self._conclude(self._save_now(position), is_last=True)

    def go_back(self, position: Position, load: Callable[[], Position | None]) -> Position | None:
        """Put the run back where `load` says, which loads the newest checkpoint, once the save under way has ended."""
        self._wait(position)
        found = load()
        if found is not None:
            self.saved_step = found.step
        return found

    def _wait(self, position: Position) -> None:
        started = time.perf_counter()
        outcome = None if self.background is None else self.background.wait()
        if outcome is not None:
            seconds = time.perf_counter() - started
            self.log.info(f"step {position.step}: waited {seconds:.2f} s for step {outcome.step} to be written")
            self._conclude(outcome)

    def _save_now(self, position: Position) -> Outcome:
        started, error = time.perf_counter(), None
        try:
            save_state(self.runtime, self.engine, *self._contents(position))
        except CheckpointError as found:
            error = found
        return Outcome(position.step, step_directory(self.root, position.step), time.perf_counter() - started, error)

    def _contents(self, position: Position) -> tuple[Position, dict[str, Any], bytes | None, Watch]:
        return position, self.dataset(position.samples), self.tokenizer, self.watch

    def _conclude(self, outcome: Outcome, is_last: bool = False) -> None:
        """Say how a save has ended. Raises its error where the run cannot go on: after too many, or where it `is_last`."""
        error = outcome.error
        if error is None:
            self.saved_step, self._failures = outcome.step, 0
            self.log.info(f"step {outcome.step}: saved {outcome.directory} in {outcome.seconds:.2f} s")
            return
        if not isinstance(error, CheckpointError):
            raise error  # a defect of ours
        self._failures += 1
        allowed = self.settings.failures_allowed
        count = f"failure {self._failures} in a row, checkpoint.failures_allowed = {allowed}"
        is_here = not isinstance(error, FailedElsewhere)
        if self.rank == 0 or is_here:
            self.log.error(f"step {outcome.step}: not saved: {error} ({count})")
        if is_last or self._failures > allowed:
            raise type(error)(f"{error} ({'the last save of the run' if is_last else count})") from error
        if is_here:
            say(error, self.rank)
