"""The record of a run: `metrics.jsonl`, one JSON object per step, and the same values for TensorBoard.

`step` counts finished updates: the first step is 1, and a checkpoint of step k holds what lines up to k describe. Each
line has the `time` at which it was written, in seconds since the epoch. A start and an orderly end of the program have lines
of their own (`event`: start, end); where the end is missing, the program died. Other events are what a start predicts of step
time and memory (prediction: `forecast`) and what they then turn out to be (measured: `comparison`), what was done about numbers
that were wrong (`remedies`), copies that differ (`integrity`) and ranks that are slow (`stragglers`).
Resuming from step k cuts the file back to k, so a killed and resumed run leaves the steps of one that never stopped; what is
cut goes to `discarded.jsonl`, for those who count what a failure has cost (tools/goodput.py).
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_llama.json_values import finite


@dataclass(frozen=True)
class StepRecord:
    """What one training step reports.

    `loss` is the token mean over the global batch, `tokens` the tokens trained on since the run began, this step's
    included. `data_wait_seconds` is the part of `step_seconds` in which the loop stood still because the next batch had not
    been read, the mean over ranks: as all wait for the slowest, one slow rank of n shows as 1/n of its wait; on a GPU it is an
    upper bound, since the device may still have work. The very first batch counts in neither. `mfu` is a share of the devices'
    dense peak (None, and not written, where that is not known); attention counts inside documents where it stays inside them.
    `loss_scale` is what fp16 training multiplied the loss by (None, and not written, in other numbers).
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    data_wait_seconds: float
    mfu: float | None = None
    loss_scale: float | None = None


class MetricsWriter:
    """Writes a run's records; only rank 0 makes one.

    `resume_step` is the step that the run continues from, 0 for a fresh start: records after it leave the file (rewritten
    beside it, then renamed) and TensorBoard's view.
    """

    def __init__(self, run_directory: str | Path, resume_step: int = 0) -> None:
        self._directory = Path(run_directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self.path = self._directory / "metrics.jsonl"
        self._open(resume_step)
        self.write_event(resume_step, "start")

    def _open(self, step: int) -> None:
        """Go on after `step`."""
        cut_back(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self._directory / "tensorboard"), purge_step=step + 1 if step else 0)
        self._step = step  # of the newest record

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: later records leave the file, as after a resume."""
        self._file.close()
        self._tensorboard.close()
        self._open(step)

    def write_event(self, step: int, event: str, **values: Any) -> None:
        """Writes what has happened in a step beside training."""
        self._write({"step": step, "event": event, **values})

    def write_step(self, record: StepRecord, **extra: Any) -> None:
        """Writes one training step; `extra` fields (such as `skipped=True`) go to the file alone."""
        values = {name: value for name, value in asdict(record).items() if value is not None}
        self._write({**values, **extra})
        for name, value in values.items():
            if name != "step":
                self._tensorboard.add_scalar(f"train/{name}", value, record.step)

    def write_evaluation(self, step: int, valid_loss: float, valid: dict[str, dict[str, float]]) -> None:
        """Writes the held-out loss of the model after `step` updates, and by source what is known of its loss."""
        self._write({"step": step, "valid_loss": valid_loss, "valid": valid})
        self._tensorboard.add_scalar("valid/loss", valid_loss, step)
        for source, values in valid.items():
            for name, value in values.items():
                if name != "tokens":  # always the same
                    self._tensorboard.add_scalar(f"valid/{source}/{name}", value, step)

    def write_checkpoint(self, step: int, seconds: float) -> None:
        """Writes for how long the state of `step` kept training from going on: while it was saved, or only copied."""
        self._write({"step": step, "checkpoint_seconds": seconds})
        self._tensorboard.add_scalar("checkpoint/seconds", seconds, step)

    def flush(self) -> None:
        """Puts all records on disk; called before a checkpoint commits, so that none is behind it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Ends the record of a program that has come to an orderly end: done, or stopped with its state saved."""
        self._write({"step": self._step, "event": "end"})
        self.flush()
        self._file.close()
        self._tensorboard.close()

    def _write(self, values: dict[str, Any]) -> None:
        """One line; floats as Python's shortest exact form, and null for a loss or norm that is not finite."""
        self._step = values["step"]
        self._file.write(json.dumps({**finite(values), "time": round(time.time(), 3)}, allow_nan=False) + "\n")
        self._file.flush()


def cut_back(path: Path, step: int) -> None:
    """Keeps of a metrics file the records up to `step`, byte for byte, and moves later ones to `discarded.jsonl` beside it.

    Unreadable lines, a torn last one too, go. Atomic: the new file replaces the old by one rename, and nothing is rewritten
    where nothing has to go. A crash just before the rename leaves discarded lines in both files.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    records = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n") and _step_of(line) < math.inf]
    kept = b"".join(line for line in records if _step_of(line) <= step)
    if kept == content:
        return
    discarded = b"".join(line for line in records if _step_of(line) > step)
    if discarded:
        _write_durably(path.with_name("discarded.jsonl"), "ab", discarded)
    temporary = path.with_name(path.name + ".tmp")
    _write_durably(temporary, "wb", kept)
    os.replace(temporary, path)


def _write_durably(path: Path, mode: str, content: bytes) -> None:
    with open(path, mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _step_of(line: bytes) -> float:
    """The step of a record, infinity where the line is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else math.inf
