"""What a run does about a step whose loss or gradient is not finite, or a spike.

    not finite:  the device holds the state as it was before the step; the step runs again. Finite now: a transient fault, and
                 the run goes on as if nothing had happened. Otherwise its batch is skipped
    spike:       reported, or its batch is skipped (the device has masked the update), or the run goes back
    too often:   the run goes back to its newest checkpoint and leaves out the samples from there to the end of the step
    again:       it stops, naming the ranks to look at

All ranks hear the same numbers, so they do the same, and a run that is started again does the same once more. What was left out
is part of the position in the data, and so of every checkpoint.
Source: Chowdhery et al. 2022 (PaLM), section 5.1, for going back and leaving out the data around a spike.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from megatron_llama.data.loader import Loader
from megatron_llama.metrics import MetricsWriter
from megatron_llama.program import LOGGER, agree
from megatron_llama.resume import go_back
from megatron_llama.saving import Saver
from megatron_llama.state import GO_BACK, SKIP, Position, SkippedSamples
from megatron_llama.step import TrainStep
from megatron_llama.verdict import NO_SUMS, StepNumbers, Verdict
from megatron_llama.watching.attribution import Cause, GradientLook, bad_state, find_cause, own_finding
from parallel.collectives import gather_objects
from parallel.errors import NumbersError
from parallel.zero.loss_scale import SMALLEST

NOT_FINITE, SPIKE, BAD_STATE = "not finite", "spike", "state not finite"  # why


@dataclass(frozen=True)
class Outcome:
    """What has become of a step, and where the run is now. `numbers` are those to record, None where it was taken back."""

    verdict: Verdict
    numbers: StepNumbers | None
    position: Position


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step: for the records, for people, and what else is known of it. May its batch be skipped?"""

    reason: str
    said: str
    about: dict[str, Any]
    may_skip: bool


def what_is_wrong(numbers: StepNumbers) -> str:
    """What is wrong with a step, empty if nothing. That a loss scale is too large is not."""
    if not (math.isfinite(numbers.loss) and math.isfinite(numbers.grad_norm)):
        return NOT_FINITE if numbers.loss_scale is None or numbers.loss_scale <= SMALLEST else ""
    return SPIKE if numbers.loss > numbers.loss_limit or numbers.grad_norm > numbers.norm_limit else ""


class Remedies:
    """What is done about the steps of a run. All ranks make it, and call `mend` together."""

    def __init__(self, step: TrainStep, loader: Loader, saver: Saver, metrics: MetricsWriter | None) -> None:
        self.step, self.loader, self.saver, self.metrics = step, loader, saver, metrics
        self.runtime, self.engine, self.watch = step.runtime, step.engine, step.watch
        self.settings = self.runtime.config.watch
        self.log = logging.getLogger(LOGGER)

    def mend(self, verdict: Verdict, numbers: StepNumbers, position: Position) -> Outcome:
        """Look at a step's numbers and do what they ask for. `position` is where the run is: maybe one step further.

        Raises NumbersError where the run must not go on, and CheckpointError where it cannot go back.
        """
        found = what_is_wrong(numbers)
        if found == NOT_FINITE:
            return self._not_finite(verdict, numbers, position)
        if found == SPIKE:
            return self._spike(verdict, numbers, position)
        return Outcome(verdict, numbers, position)

    def _spike(self, verdict: Verdict, numbers: StepNumbers, position: Position) -> Outcome:
        about = {"loss": numbers.loss, "grad_norm": numbers.grad_norm}
        about |= {"loss_limit": numbers.loss_limit, "grad_norm_limit": numbers.norm_limit}
        said = f"loss {numbers.loss:.4f} (spikes begin at {numbers.loss_limit:.4f}), gradient norm {numbers.grad_norm:.4g} "
        said += f"({numbers.norm_limit:.4g}): a spike"
        self._say(verdict.step, "spike", said, **about)
        if self.settings.spikes == "report":
            return Outcome(verdict, numbers, position)
        trouble = Trouble(SPIKE, said, about, may_skip=self.settings.spikes == "skip")
        return self._leave_out(verdict, numbers, position, trouble)

    def _not_finite(self, verdict: Verdict, numbers: StepNumbers, position: Position) -> Outcome:
        cause = self._cause(verdict)
        said = f"loss {numbers.loss}, gradient norm {numbers.grad_norm}: {cause}"
        if self.settings.non_finite == "rerun":
            position = self._behind(verdict, position)
            verdict, numbers, cause_again = self._run_again(verdict)
            if what_is_wrong(numbers) != NOT_FINITE:
                said += "; finite when it was run again: a transient fault, going on as if nothing had happened"
                self._say(verdict.step, "transient", said, **_record(cause))
                return self.mend(verdict, numbers, position)
            cause = cause_again
            said = f"loss {numbers.loss}, gradient norm {numbers.grad_norm}, and again when it was run again: {cause}"
        said += self._samples(verdict, cause)
        self._say(verdict.step, "not finite", said, **_record(cause))
        if self.settings.non_finite == "stop":
            raise self._stop(verdict, said, "watch.non_finite = stop")
        is_state = cause.first is not None and bool(cause.first.state)
        found = Trouble(BAD_STATE if is_state else NOT_FINITE, said, _record(cause), may_skip=not is_state)
        return self._leave_out(verdict, numbers, position, found)

    def _behind(self, verdict: Verdict, position: Position) -> Position:
        """The position after a step, whatever was launched since."""
        return replace(verdict.before.after(self.runtime.config), skipped_samples=position.skipped_samples)

    def _run_again(self, verdict: Verdict) -> tuple[Verdict, StepNumbers, Cause]:
        """Run a step that was void once more, looking for who is to blame. What was launched since is void and forgotten."""
        state = bad_state(self.engine)
        self.watch.set_back(verdict.criteria)
        self.runtime.groups.ledger.heartbeat.enter("step", verdict.step)
        batch = self.step.prepare(self.loader.micro_batches(verdict.before.samples))
        with GradientLook(self.engine) as look:
            info = self.step.run(batch, verdict.rate, NO_SUMS, verdict.step)
        self.engine.finish()
        again = Verdict(verdict.before, verdict.rate, info, batch.counts[1], verdict.criteria)
        numbers = again.read()
        if what_is_wrong(numbers) == NOT_FINITE:
            self.watch.set_back(verdict.criteria)  # the next step is not held
        return again, numbers, self._cause(again, state, look.first)

    def _cause(self, verdict: Verdict, *looks: Any) -> Cause:
        groups = self.runtime.groups
        finding = own_finding(groups.world.rank, verdict.info, *looks)
        return find_cause(gather_objects(finding, groups.world), groups.topology)

    def _samples(self, verdict: Verdict, cause: Cause) -> str:
        """Which samples the first bad gradient came from, where that is known."""
        if cause.first is None or cause.first.micro_batch < 0:
            return ""
        size, per_rank = self.loader.micro_batch_size, self.loader.micro_batch_size * self.loader.num_micro_batches
        place = self.runtime.groups.topology.coordinates(cause.first.rank)
        data_rank = place.dp * self.runtime.groups.topology.cp + place.cp
        first = verdict.before.samples + data_rank * per_rank + cause.first.micro_batch * size
        return f" (sample {first})" if size == 1 else f" (samples {first} to {first + size - 1})"

    def _leave_out(self, verdict: Verdict, numbers: StepNumbers, position: Position, found: Trouble) -> Outcome:
        """Skip the batch of a step whose update was masked, or go back, or stop, as is allowed."""
        settings = self.settings
        recent = [skipped.reason for skipped in position.skipped_samples if skipped.step > verdict.step - settings.window]
        skips, returns = (sum(reason.startswith(done) for reason in recent) for done in (SKIP, GO_BACK))
        end = self._behind(verdict, position).samples
        if found.may_skip and skips < settings.skips_allowed:
            skipped = SkippedSamples(verdict.before.samples, end, verdict.step, f"{SKIP}: {found.reason}")
            left_out = {"first": skipped.first, "stop": end, "reason": found.reason}
            self._say(verdict.step, "skipped", f"samples {skipped.first} to {end - 1} are skipped", **left_out)
            return Outcome(verdict, numbers, replace(position, skipped_samples=(*position.skipped_samples, skipped)))
        counted = (
            f"in {settings.window} steps it has skipped {skips} (watch.skips_allowed = {settings.skips_allowed}) and gone back "
            f"{returns} (watch.rollbacks_allowed = {settings.rollbacks_allowed})"
        )
        if returns >= settings.rollbacks_allowed:
            raise self._stop(verdict, found.said, counted)
        if self.runtime.config.data.order == "megatron" and found.reason != BAD_STATE:
            raise self._stop(verdict, found.said, "nothing can be left out of data.order = megatron")
        reached = self._go_back(verdict, position, found)
        if reached is None:
            raise self._stop(verdict, found.said, "there is no checkpoint to go back to")
        return Outcome(verdict, None, reached)

    def _go_back(self, verdict: Verdict, position: Position, trouble: Trouble) -> Position | None:
        """Load the newest checkpoint. The samples from there to the end of the step are left out, unless the state was bad."""
        groups, end = self.runtime.groups, self._behind(verdict, position).samples
        groups.ledger.heartbeat.enter("load", verdict.step)
        groups.set_timeout(timedelta(seconds=self.runtime.config.train.start_timeout))
        self.engine.finish()

        def load() -> Position | None:
            return agree(lambda: go_back(self.runtime, self.engine, self.watch), groups.world, self.runtime.device)

        found = self.saver.go_back(position, load)
        if found is None:
            return None
        # that the run went back to this step before is not in the checkpoint
        before = [s for s in position.skipped_samples if s.went_back and s not in found.skipped_samples]
        first = max([found.samples, *(s.stop for s in before)])
        end = first if trouble.reason == BAD_STATE else end
        left_out = SkippedSamples(first, end, verdict.step, f"{GO_BACK}: {trouble.reason}")
        if self.metrics is not None:
            self.metrics.go_back(found.step)
            about = {"at": verdict.step, "first": first, "stop": end, "reason": trouble.reason, "about": trouble.about}
            self.metrics.write_event(found.step, "went_back", **about)
        data = f"without samples {first} to {end - 1}" if end > first else "with the same data"
        self.log.warning(f"step {verdict.step}: back to step {found.step}, {data}")
        return replace(found, samples=end, skipped_samples=(*found.skipped_samples, *before, left_out))

    def _stop(self, verdict: Verdict, said: str, why: str) -> NumbersError:
        return NumbersError(
            f"step {verdict.step}: {said}. The run stops here: {why}. Look at the ranks and samples that are named, or allow "
            'more; docs/failures.md, "The numbers", says what may help. The same command goes on from the newest checkpoint'
        )

    def _say(self, step: int, event: str, text: str, **values: Any) -> None:
        """One line in the logs, and one in the metrics."""
        self.log.warning(f"step {step}: {text}")
        if self.metrics is not None:
            self.metrics.write_event(step, event.replace(" ", "_"), **values)


def _record(cause: Cause) -> dict[str, Any]:
    """For the metrics: the ranks, and what is known of the first one."""
    return {"ranks": cause.ranks, **({} if cause.first is None else {"first": asdict(cause.first)})}
