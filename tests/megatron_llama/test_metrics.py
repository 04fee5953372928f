"""metrics.jsonl: fields, precision, and what a resume leaves of it; the progress line."""

import json
import math
import struct
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_llama.metrics import MetricsWriter, StepRecord, cut_back
from megatron_llama.progress import Interval, Progress, format_duration, format_interval


def record(step: int, loss: float = 2.5, mfu: float | None = None) -> StepRecord:
    return StepRecord(step, loss, 1.0 / 3.0, 3e-4, step * 512, 0.1, 5120.0, 0.01, mfu)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fields_and_full_precision(tmp_path):
    loss = struct.unpack("d", struct.pack("Q", 0x4004_5BF0_A8B1_4577))[0]  # 17 digits are needed
    writer = MetricsWriter(tmp_path)
    writer.write_step(record(1, loss))
    writer.write_step(record(2, mfu=0.41), skipped=True)
    writer.write_evaluation(2, 2.75, {"web": {"loss": 2.75, "perplexity": math.inf}})
    writer.close()
    start, first, second, evaluation, end = lines(tmp_path / "metrics.jsonl")
    speeds = ["step_seconds", "tokens_per_second", "data_wait_seconds"]
    assert list(first) == ["step", "loss", "grad_norm", "learning_rate", "tokens", *speeds, "time"]
    assert first["loss"] == loss and first["grad_norm"] == 1.0 / 3.0
    assert second["mfu"] == 0.41 and second["skipped"] is True
    assert start == {"step": 0, "event": "start", "time": start["time"]}
    assert end == {"step": 2, "event": "end", "time": end["time"]}
    valid = {"web": {"loss": 2.75, "perplexity": None}}
    assert evaluation == {"step": 2, "valid_loss": 2.75, "valid": valid, "time": evaluation["time"]}
    times = [line["time"] for line in (start, first, second, evaluation, end)]
    assert times == sorted(times) and abs(times[0] - time.time()) < 60


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write_step(record(1, math.nan))
    writer.close()
    assert lines(tmp_path / "metrics.jsonl")[1]["loss"] is None


def test_lines_are_there_before_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write_step(record(1))
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    writer.close()


def test_resume_leaves_the_steps_of_a_run_that_never_stopped(tmp_path):
    for name, stops in (("whole", [6]), ("killed", [5, 6])):
        done = 0
        for index, stop in enumerate(stops):
            writer = MetricsWriter(tmp_path / name, resume_step=done)
            for step in range(done + 1, stop + 1):
                writer.write_step(record(step))
                if step % 2 == 0:
                    writer.write_evaluation(step, 1.0 / step, {})
            writer.close()
            done = 3 if index == 0 else stop  # the newest checkpoint
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = [[{**line, "time": 0} for line in lines(run / "metrics.jsonl") if "event" not in line] for run in (whole, killed)]
    assert steps[0] == steps[1]
    events = [(line["step"], line["event"]) for line in lines(killed / "metrics.jsonl") if "event" in line]
    assert events == [(0, "start"), (3, "start"), (6, "end")]
    discarded = lines(killed / "discarded.jsonl")
    assert [(line["step"], "valid_loss" in line) for line in discarded] == [(4, False), (4, True), (5, False), (5, False)]
    assert not (whole / "discarded.jsonl").exists() and not list(killed.glob("*.tmp"))


def test_every_resume_adds_to_what_is_discarded(tmp_path):
    for resume, stop in ((0, 3), (2, 4), (2, 3)):
        writer = MetricsWriter(tmp_path, resume_step=resume)
        for step in range(resume + 1, stop + 1):
            writer.write_step(record(step))
        writer.close()
    discarded = [line["step"] for line in lines(tmp_path / "discarded.jsonl") if "event" not in line]
    assert discarded == [3, 3, 4]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step": 2, "loss": 1.0}', b"\x00\x00\x00\n", b"\xff\xfe\n", b"[1]\n", b"3\n"]
)
def test_torn_and_unreadable_lines_go(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n'
    path.write_bytes(good + torn)
    cut_back(path, 2)
    assert path.read_bytes() == good and not (tmp_path / "discarded.jsonl").exists()


def test_nothing_is_rewritten_where_nothing_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    before = path.stat().st_ino
    cut_back(path, 1)
    assert path.stat().st_ino == before
    cut_back(tmp_path / "absent.jsonl", 1)


def test_tensorboard_drops_what_was_after_the_resumed_step(tmp_path, monkeypatch):
    started = time.time()
    for resume, steps, loss in ((0, range(1, 6), 9.0), (3, range(4, 5), 1.0)):
        monkeypatch.setattr(time, "time", lambda now=started + resume: now)  # event files are read in the order of seconds
        writer = MetricsWriter(tmp_path, resume_step=resume)
        for step in steps:
            writer.write_step(record(step, loss))
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0)]


def test_progress_line():
    interval = Interval(50, 1000, 2.34567, 3e-4, 0.5, 12345.6, 4.2e14, 3725.0, mfu=0.4213, memory_bytes=3 * 2**30)
    assert format_interval(interval) == (
        "step   50/1000 | loss 2.3457 | lr 3.00e-04 | norm 0.500 | 12,346 tokens/s | MFU 42.1% | 1h02m left | memory 3.00 GiB"
    )


def test_progress_computes_speed_and_names_what_it_knows(capsys):
    progress = Progress(total_steps=100, device_count=2)
    for step in range(10):
        progress.add(1000, 10**12, seconds=0.5, data_wait_seconds=0.015, skipped=step == 3)
    progress.report(10, 1.0, 1e-3, 2.0)
    line = capsys.readouterr().out
    assert "2,000 tokens/s" in line and "1 TFLOP/s per device" in line and "45s left" in line
    assert "waits for data 3%" in line and "SKIPPED 1" in line
    progress.add(1000, 10**12, seconds=1.0, data_wait_seconds=0.01)
    progress.report(11, 1.0, 1e-3, 2.0)
    line = capsys.readouterr().out
    assert "1,000 tokens/s" in line and "waits" not in line and "SKIPPED" not in line  # the interval before is over
    progress = Progress(100, 2, peak=4e12)
    progress.add(1000, 10**12, seconds=0.5)
    progress.add(1000, 3 * 10**12, seconds=0.5)  # longer documents
    progress.report(2, 1.0, 1e-3, 2.0)
    assert "MFU 50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (59.4, "59s"), (185, "3m05s"), (7380, "2h03m"), (1_828_800, "21d04h"), (math.inf, "unknown time")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
