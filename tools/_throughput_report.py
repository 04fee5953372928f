"""What profile_throughput.py says of a configuration that it has measured: figures, lines, and a run's files for plan.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import torch
from _phases import EXPOSED, PHASES
from _throughput_rank import Measured, RankMeasured

from megatron_llama.config import to_dict, to_toml, tokens_per_step
from megatron_llama.flops import dense_peak_flops, flops_per_token, model_flops_utilization
from megatron_llama.json_values import finite
from megatron_llama.metrics import MetricsWriter, StepRecord
from megatron_llama.plan.configured import Prediction, predict
from megatron_llama.plan.hardware import Hardware
from megatron_llama.progress import GIB, format_flops
from megatron_llama.watching.stragglers import Slow, slow_ranks
from parallel.errors import DataError

SLOWEST_LISTED = 4  # ranks
BAR = 40  # characters of the longest


@dataclass(frozen=True)
class Figures:
    """What is known of a measured configuration. `hardware`, where given, supplies the peak and a prediction."""

    measured: Measured
    hardware: Hardware | None = None

    @property
    def step_seconds(self) -> list[float]:
        """Of the measured steps, on rank 0; all ranks take equally long."""
        return self.measured.ranks[0].step_seconds

    @property
    def mean(self) -> float:
        return fmean(self.step_seconds)

    @property
    def deviation(self) -> float:
        return pstdev(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        return tokens_per_step(self.measured.config) / self.mean

    @property
    def devices(self) -> int:
        return self.measured.topology.world_size

    @property
    def peak(self) -> float | None:
        """FLOP/s of one device: by its data sheet, or by the hardware profile."""
        known = dense_peak_flops(self.measured.device, self.measured.config.train.dtype)
        return known or (self.hardware.bf16_flops if self.hardware else None)

    def flops_per_token(self, attention: str) -> int:
        return flops_per_token(self.measured.config.model, self.measured.config.train.sequence_length, attention)

    def mfu(self, attention: str) -> float | None:
        """Model FLOPs over the dense peak; None where that is not known."""
        return model_flops_utilization(self.tokens_per_second, self.flops_per_token(attention), self.devices, self.peak)

    @property
    def shares(self) -> dict[str, float]:
        """Of the step in each phase, means over the ranks."""
        whole = fmean(sum(rank.phases.values()) for rank in self.measured.ranks)
        return {name: fmean(rank.phases[name] for rank in self.measured.ranks) / whole for name in PHASES}

    @property
    def exposed_communication(self) -> float:
        """Share of the step in which ranks wait for messages that are made, or in collectives."""
        return sum(self.shares[name] for name in EXPOSED)

    @property
    def slow(self) -> list[Slow]:
        """Ranks that are busy for longer than the peers at their stage, as the run itself would name them."""
        busy = [rank.busy_seconds for rank in self.measured.ranks]
        return slow_ranks(busy, self.measured.topology, self.measured.config.watch.straggler_factor)

    @property
    def prediction(self) -> Prediction | None:
        return predict(self.measured.config, self.devices, self.hardware) if self.hardware else None

    @property
    def fullest(self) -> RankMeasured:
        return max(self.measured.ranks, key=lambda rank: rank.peak_bytes)

    def as_json(self) -> dict[str, Any]:
        """All figures; seconds, bytes and shares; null for a loss that is not finite."""
        measured, prediction = self.measured, self.prediction
        return {
            "config": to_dict(measured.config),
            "device": measured.device,
            "world_size": self.devices,
            "launcher": measured.launcher,
            "steps": len(self.step_seconds),
            "step_seconds": {
                "mean": self.mean,
                "deviation": self.deviation,
                "median": median(self.step_seconds),
                "min": min(self.step_seconds),
                "max": max(self.step_seconds),
                "each": self.step_seconds,
            },
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.devices,
            "mfu_causal": self.mfu("causal"),
            "mfu_full": self.mfu("full"),
            "shares": self.shares,
            "bubble": self.shares["bubble"],
            "exposed_communication": self.exposed_communication,
            "ranks": [_rank_json(rank) for rank in measured.ranks],
            "slow_ranks": [{"rank": one.rank, "busy_seconds": one.seconds, "peers": one.median} for one in self.slow],
            "memory_bytes": self.fullest.peak_bytes,
            "losses": [finite(loss) for loss in measured.losses],
            "predicted": None if prediction is None else _prediction_json(prediction),
        }


def _rank_json(rank: RankMeasured) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "busy_seconds": rank.busy_seconds,
        "phases": rank.phases,
        "cpu_seconds": rank.cpu_seconds,
        "memory_bytes": rank.peak_bytes,
    }


def _prediction_json(prediction: Prediction) -> dict[str, Any]:
    return {
        "hardware": prediction.job.cluster.hardware.name,
        "step_seconds": prediction.step_seconds,
        "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
        "bubble": prediction.bubble,
        "exposed_communication": prediction.exposed_communication,
    }


def lines(figures: Figures) -> list[str]:
    """The report, for a terminal."""
    measured, config = figures.measured, figures.measured.config
    seconds, train = figures.step_seconds, config.train
    text = [
        f"grid      {measured.topology} on {measured.device}; {train.dtype}; {train.global_batch_size} samples of "
        f"{train.sequence_length} tokens, micro-batches of {train.micro_batch_size}; schedule {config.parallel.schedule}",
        f"step      {figures.mean:.4f} s +- {figures.deviation:.4f} (median {median(seconds):.4f}, {min(seconds):.4f} to "
        f"{max(seconds):.4f}; {len(seconds)} steps after {len(measured.warmup_seconds)})",
        f"speed     {figures.tokens_per_second:,.0f} tokens/s, {figures.tokens_per_second / figures.devices:,.0f} per device, "
        f"{_utilisation(figures)}",
    ]
    if figures.prediction is not None:
        text.append(f"predicted {_predicted(figures.prediction, figures)}")
    text.append("where a step goes, mean over the ranks:")
    whole, longest = figures.mean, max(figures.shares.values())
    for name, share in figures.shares.items():
        if share > 0.0005:
            bar = "#" * round(BAR * share / longest)
            text.append(f"  {PHASES[name]:46s}{share * whole:9.4f} s {share:6.1%}  {bar}")
    text.append(
        f"exposed communication {figures.exposed_communication:.1%}, bubble {figures.shares['bubble']:.1%} of the step"
    )
    return [*text, *_rank_lines(figures)]


def _utilisation(figures: Figures) -> str:
    causal, full = figures.mfu("causal"), figures.mfu("full")
    rate = figures.tokens_per_second * figures.flops_per_token("causal") / figures.devices
    if causal is None or full is None:
        return f"{format_flops(rate)} each (the device's peak is not known)"
    return f"MFU {causal:.1%} causal, {full:.1%} full"


def _predicted(prediction: Prediction, figures: Figures) -> str:
    factor = figures.mean / prediction.step_seconds
    name = prediction.job.cluster.hardware.name
    return (
        f"step {prediction.step_seconds:.4f} s by {name}: measured over predicted {factor:.2f}; bubble "
        f"{prediction.bubble:.1%}, exposed communication {prediction.exposed_communication:.1%}"
    )


def _rank_lines(figures: Figures) -> list[str]:
    """The ranks that work longest, those that are too slow, and the fullest."""
    ranks = sorted(figures.measured.ranks, key=lambda rank: -rank.busy_seconds)
    shown = ", ".join(f"rank {rank.rank} {rank.busy_seconds:.4f} s" for rank in ranks[:SLOWEST_LISTED])
    text = [f"busy      {shown}{' ...' if len(ranks) > SLOWEST_LISTED else ''}"]
    hosts = {rank.rank: rank.host for rank in ranks}
    for slow in figures.slow[:SLOWEST_LISTED]:
        text.append(
            f"SLOW RANK {slow.rank} ({hosts[slow.rank]}): busy for {slow.seconds:.4f} s of a step, its peers for "
            f"{slow.median:.4f} s"
        )
    if figures.measured.device == "cpu":
        text.append(f"cpu       {max(rank.cpu_seconds for rank in ranks):.4f} s of a step on the rank with the most")
    kind = "resident" if figures.measured.device == "cpu" else "allocated"
    fullest = figures.fullest
    text.append(f"memory    at most {fullest.peak_bytes / GIB:.2f} GiB {kind} (rank {fullest.rank})")
    return text


def write_run(folder: Path, figures: Figures) -> None:
    """A run's `metrics.jsonl`, `config.toml` and log, as plan.py --calibrate reads them. Raises DataError."""
    measured = figures.measured
    config = replace(measured.config, log=replace(measured.config.log, directory=str(folder)))
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        ranks = f"{figures.devices} x {measured.device} ({measured.launcher})"  # which goodput.world_size reads
        line = f"profile_throughput.py, torch {torch.__version__}, {ranks}\n"
        (folder / "logs" / "rank-00000.log").write_text(line, encoding="utf-8")
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
        _write_steps(MetricsWriter(folder), figures)
    except OSError as error:
        raise DataError(f"{folder}: cannot write: {error.strerror}") from error


def _write_steps(writer: MetricsWriter, figures: Figures) -> None:
    measured = figures.measured
    all_seconds = [*measured.warmup_seconds, *figures.step_seconds]
    tokens = tokens_per_step(measured.config)
    for step, (seconds, loss, norm) in enumerate(_zip(all_seconds, measured.losses, measured.norms), 1):
        speed = tokens / seconds
        mfu = model_flops_utilization(speed, figures.flops_per_token("causal"), figures.devices, figures.peak)
        writer.write_step(StepRecord(step, loss, norm, 0.0, step * tokens, seconds, speed, 0.0, mfu))
    writer.close()


def _zip(*lists: Sequence[float]) -> zip:
    """As long as the shortest: a profiled step has a loss and no time."""
    return zip(*lists, strict=False)
