"""tools/goodput.py: where a run's time went, the best interval between checkpoints, and what the tool says of both."""

import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from megatron_llama.checkpoint_interval import daly_interval, mean_time_between_failures, productive_share, young_interval
from megatron_llama.goodput import PARTS, account, read_events, read_records
from parallel.errors import DataError
from tests.megatron_llama.programs import CONFIG, succeed, write_dataset
from tests.tools.test_data_tools import run

BEGIN = 1_767_225_600.0


class Run:
    """Writes the files of a run on a clock of its own: steps of 10 s, checkpoints of 2 s, evaluations of 5 s."""

    def __init__(self, directory, gpus=8):
        self.directory, self.now, self.step = directory, BEGIN, 0
        self.kept, self.discarded, self.events = [], [], []
        (directory / "logs").mkdir(parents=True)
        log = directory / "logs/rank-00000.log"
        log.write_text(f"2026-01-01 00:00:00,000 Megatron-LLaMA 0.1.0, torch 2.13.0, {gpus} x cuda (srun)\nmodel     7b\n")

    def write(self, **values):
        self.kept.append({"step": self.step, **values, "time": self.now})

    def supervisor(self, event, **fields):
        self.events.append({"time": self.now, "event": event, **fields})

    def start(self, resume=0):
        self.discarded += [line for line in self.kept if line["step"] > resume]
        self.kept = [line for line in self.kept if line["step"] <= resume]
        self.step = resume
        self.write(event="start")

    def steps(self, count, **extra):
        for _ in range(count):
            self.step, self.now = self.step + 1, self.now + 10
            self.write(loss=1.0, step_seconds=10.0, **extra)

    def checkpoint(self):
        self.now += 2
        self.write(checkpoint_seconds=2.0)

    def evaluate(self):
        self.now += 5
        self.write(valid_loss=1.0, valid={})

    def end(self):
        self.write(event="end")

    def pass_time(self, seconds):
        self.now += seconds

    def save(self):
        names = {"metrics.jsonl": self.kept, "discarded.jsonl": self.discarded, "supervisor.jsonl": self.events}
        for name, lines in names.items():
            if lines:
                (self.directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.directory


@pytest.fixture
def eventful(tmp_path):
    """A start of 30 s, 10 steps, a death 4 s into a step, 60 s until the next start, a clean stop, an hour of waiting."""
    made = Run(tmp_path / "run")
    made.supervisor("start", ranks=8)
    made.pass_time(30)
    made.start()
    made.steps(4)
    made.evaluate()
    made.checkpoint()
    made.steps(6)  # the checkpoint of step 4 is the newest: these are lost
    made.pass_time(4)
    made.supervisor("death", rank=3)
    made.pass_time(1)
    made.supervisor("death", rank=5)
    made.supervisor("restart", step=4)
    made.pass_time(59)
    made.start(resume=4)
    made.steps(4)
    made.steps(1, skipped=True)
    made.checkpoint()
    made.end()
    made.pass_time(1)
    made.supervisor("end", code=75)
    made.pass_time(3600)
    made.supervisor("start", ranks=8)
    made.pass_time(20)
    made.start(resume=9)
    made.pass_time(3)  # until the first batch was there
    made.steps(2)
    made.checkpoint()
    made.end()
    made.supervisor("end", code=0)
    return made.save()


def seconds_of(found):
    assert list(found.seconds) == list(PARTS)
    return {part: pytest.approx(value) for part, value in found.seconds.items() if value}


def test_without_a_supervisor_the_step_under_way_is_part_of_the_restart(eventful):
    found = account(read_records(eventful))
    assert seconds_of(found) == {
        **{"steps": 100, "redone": 60, "skipped": 10, "checkpoints": 6, "evaluation": 5},
        **{"starting": 64, "idle": 3621, "other": 3},
    }
    assert (found.failures, found.steps, found.steps_redone, found.save_every) == (1, 10, 6, 4)
    assert (found.step_seconds, found.checkpoint_seconds, found.restart_seconds) == (10, 2, 64)
    assert found.effective_share == pytest.approx(100 / 3869)
    assert found.running_seconds == pytest.approx(3869 - 3621)


def test_a_supervisor_knows_when_processes_started_and_died(eventful):
    found = account(read_records(eventful), read_events(eventful / "supervisor.jsonl"))
    assert seconds_of(found) == {
        **{"steps": 100, "redone": 64, "skipped": 10, "checkpoints": 6, "evaluation": 5},
        **{"starting": 30 + 60 + 20, "idle": 3601, "other": 3},
    }
    assert (found.failures, found.restart_seconds, found.begin) == (1, 60, BEGIN)  # two dead ranks are one failure


def test_a_hang_is_time_until_it_is_noticed_and_failed_starts_count(tmp_path):
    made = Run(tmp_path / "run")
    made.start()
    made.steps(2)
    made.checkpoint()
    made.pass_time(300)
    made.supervisor("hang", rank=1)
    made.supervisor("restart")
    made.pass_time(20)
    made.supervisor("death", rank=0)  # before it has begun: no record of it
    made.supervisor("restart")
    made.pass_time(40)
    made.start(resume=2)
    made.steps(1)
    made.supervisor("death", rank=1)
    made.supervisor("end", code=69)
    records, events = read_records(made.save()), read_events(made.directory / "supervisor.jsonl")
    found = account(records, events)
    assert seconds_of(found) == {"steps": 30, "checkpoints": 2, "starting": 360}
    assert (found.failures, found.restart_seconds) == (3, 180)


def test_another_ranks_death_before_the_last_record(tmp_path):
    """Rank 0 may still write what it has read of the step before."""
    made = Run(tmp_path / "run")
    made.start()
    made.steps(2)
    made.supervisor("death", rank=1)
    made.pass_time(0.5)
    made.write(valid_loss=1.0, valid={})
    made.pass_time(50)
    made.start(resume=2)
    made.steps(1)
    found = account(read_records(made.save()), read_events(made.directory / "supervisor.jsonl"))
    assert found.failures == 1 and found.seconds["starting"] == pytest.approx(50) and found.seconds["redone"] == 0


def test_a_run_under_way_has_no_failure_and_its_last_line_may_be_torn(tmp_path):
    made = Run(tmp_path / "run")
    made.start()
    made.steps(3)
    directory = made.save()
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    found = account(read_records(directory))
    assert (found.steps, found.failures, found.restart_seconds, found.save_every) == (3, 0, None, None)
    assert found.effective_share == 1.0


def test_lines_in_both_files_are_lost_once(eventful):
    """As a crash between the two writes of a resume leaves them, and the resume after it."""
    expected = account(read_records(eventful))
    discarded = (eventful / "discarded.jsonl").read_text()
    (eventful / "discarded.jsonl").write_text(discarded * 2)
    with open(eventful / "metrics.jsonl", "a") as file:
        file.write(discarded)
    assert account(read_records(eventful)) == expected


# the model


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_dalys_own_examples(hours, minutes):
    """The captions of his figures 3 to 5: checkpoints of 5 minutes."""
    assert daly_interval(300, hours * 3600) / 60 == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


@pytest.mark.parametrize("checkpoint", [0.1, 1.0, 30.0, 300.0, 1500.0])
@pytest.mark.parametrize("mean", [900.0, 9900.0, 1e6])
def test_the_interval_is_the_minimum_of_the_expected_time(checkpoint, mean):
    """By brute force, with and without restarts: they move the time, and not the minimum."""
    intervals = np.geomspace(1, 10 * mean, 20_000)
    for restart in (0.0, 600.0):
        shares = [productive_share(interval, checkpoint, restart, mean) for interval in intervals]
        best = intervals[int(np.argmax(shares))]
        found = daly_interval(checkpoint, mean)
        assert productive_share(found, checkpoint, restart, mean) > 0.998 * max(shares)
        assert found == pytest.approx(best, rel=0.02 if checkpoint < mean / 2 else 0.1)
    if checkpoint < mean / 1e4:
        assert found == pytest.approx(young_interval(checkpoint, mean), rel=0.01)


def simulated_share(interval, checkpoint, restart, mean, work):
    """Train for `work` seconds that count, with failures at exponential times; the share of the time that this is."""
    chance = random.Random(7)
    now, done, failure = 0.0, 0.0, chance.expovariate(1 / mean)
    while done < work:
        if now + interval + checkpoint <= failure:
            now, done = now + interval + checkpoint, done + interval
            continue
        now = failure
        failure = now + chance.expovariate(1 / mean)
        while now + restart > failure:  # a failure while it restarts
            now = failure
            failure = now + chance.expovariate(1 / mean)
        now += restart
    return done / now


@pytest.mark.parametrize(
    ("times", "tolerance"), [((141, 1, 180, 9900), 3e-3), ((600, 60, 300, 1800), 7e-3), ((3000, 100, 1000, 2000), 1.2e-2)]
)
def test_the_model_against_a_simulation(times, tolerance):
    """40,000 intervals; the tolerance is three standard deviations over seeds."""
    assert simulated_share(*times, work=40_000 * times[0]) == pytest.approx(productive_share(*times), rel=tolerance)


def test_known_figures():
    """16,384 GPUs that fail as Llama 3's did: every 3 hours; and a job on which nothing is ever done."""
    mean = mean_time_between_failures(419 / (54 * 16384), 16384)
    assert mean == pytest.approx(54 * 86400 / 419)
    interval, cost, restart = daly_interval(1, mean), 1, 180
    first_order = 1 - cost / interval - interval / (2 * mean) - restart / mean
    assert productive_share(interval, cost, restart, mean) == pytest.approx(first_order, abs=1e-3)
    assert productive_share(1e6, 1, 1, 10) == 0.0 and daly_interval(25, 10) == 10


# the tool


def goodput(*arguments):
    return run("goodput", *arguments)


def test_table(eventful):
    code, output, errors = goodput(eventful, "--project-gpus", 1024)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    rows = [line.split() for line in lines]
    assert ["steps", "that", "count", "100", "s", "2.6%"] in rows and ["not", "running", "60", "min", "92.4%"] in rows
    assert "effective training time 2.6% (33.6% of the time it was running): 10 steps, 6 lost" in lines
    assert "failures 1, 60 s each until training had started again" in lines
    assert [row[0] for row in rows[-3:]] == ["8", "1,024", "at"]


def test_json_and_what_is_given_in_place_of_what_is_measured(eventful):
    given = ["--failures-per-gpu-day", 0.001, "--checkpoint-seconds", 3, "--restart-seconds", 90, "--gpus", 512]
    code, output, errors = goodput(eventful, *given, "--project-gpus", 4096, 1024, "--json")
    assert (code, errors) == (0, "")
    said = json.loads(output)
    assert said["effective_share"] == pytest.approx(100 / 3899) and said["seconds"]["redone"] == 64
    assert said["rates"] == {
        **{"gpus": 512, "failures_per_gpu_day": 0.001, "source": "given"},
        **{"checkpoint_seconds": 3, "restart_seconds": 90},
    }
    assert [one["gpus"] for one in said["projections"]] == [512, 1024, 4096]
    for one in said["projections"]:
        mean = 86400 / (0.001 * one["gpus"])
        assert one["interval"] == pytest.approx(daly_interval(3, mean))
        assert one["share"] == pytest.approx(productive_share(one["interval"], 3, 90, mean))
        assert one["present_share"] == pytest.approx(productive_share(4 * 10, 3, 90, mean))


def test_measured_rates(eventful):
    said = json.loads(goodput(eventful, "--json")[1])
    gpu_days = 8 * (3899 - 3601) / 86400
    assert said["rates"]["failures_per_gpu_day"] == pytest.approx(1 / gpu_days)
    assert said["rates"]["source"].startswith("measured: 1 in 0.0276 GPU-days")


def test_a_run_without_failures_takes_llama_3s_rate(tmp_path):
    made = Run(tmp_path / "run", gpus=64)
    made.start()
    for _ in range(3):
        made.steps(5)
        made.checkpoint()
    code, output, errors = goodput(made.save())
    assert (code, errors) == (0, "") and "failures per GPU and day 0.000474 (Llama 3's, as nothing has failed yet)" in output
    assert "restarts are not counted, as none was seen" in output


def test_picture(eventful, tmp_path):
    path = tmp_path / "goodput.png"
    code, output, errors = goodput(eventful, "--output", path)
    assert (code, errors) == (0, "") and output.endswith(f"picture {path}\n")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for colour in ("#24517f", "#cf6a37", "#eda03f", "#d9d9d9"):  # steps, lost steps, starting, not running
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=2) < 4).sum() > 500


def test_bad_input_is_one_line(eventful, tmp_path):
    def broken(name, text):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "metrics.jsonl").write_text(text)
        return directory

    made = Run(tmp_path / "unsaved")
    made.start()
    made.steps(1)
    made.save()
    (eventful / "logs/rank-00000.log").unlink()
    for arguments, message in [
        (["absent"], "error: absent/metrics.jsonl: cannot be read: No such file or directory"),
        ([broken("empty", "")], "metrics.jsonl: has no step yet"),
        ([broken("old", '{"step": 1, "loss": 1.0, "step_seconds": 1.0}\n')], "metrics.jsonl: has lines without a time: "),
        ([broken("new", '{"step": 0, "event": "start", "time": 1.0}\n')], "metrics.jsonl: has no step yet"),
        ([broken("torn", "[1]\n")], "metrics.jsonl: line 1 is not a JSON object"),
        ([eventful, "--supervisor-log", "absent"], "error: absent: cannot be read"),
        ([eventful, "--supervisor-log", eventful / "metrics.jsonl"], 'metrics.jsonl: line 2 is no event: it has no "time"'),
        ([eventful, "--project-gpus", 64], "--project-gpus needs: give --gpus, as rank 0's log does not say"),
        ([made.directory, "--project-gpus", 64], "--project-gpus needs: give --checkpoint-seconds, as it has not saved yet"),
        ([eventful, "--gpus", 8, "--output", "x.txt"], "error: x.txt: cannot write the picture: Format 'txt' is not supported"),
    ]:
        code, _, errors = goodput(*arguments)
        assert (code, errors.count("\n")) == (2, 1) and errors.startswith("error: ") and message in errors, errors


def test_a_real_run_that_is_resumed(tmp_path, monkeypatch):
    """Stopped by a step limit, then killed: as its last checkpoint is gone, two steps are done again."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "train", 3000, seed=1)
    settings = CONFIG.replace('valid = ["valid"]\n', "").replace('tokenizer = "tokenizer.model"\n', "")
    (tmp_path / "config.toml").write_text(settings)
    flags = ["--config", "config.toml", "--checkpoint.save_every", 2]
    succeed("train", *flags, "--train.exit_step", 4)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"event": "end"' in lines[-1]
    (tmp_path / "run/metrics.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "run/checkpoints/step_00000004").rename(tmp_path / "gone")
    succeed("train", *flags)
    found = account(read_records(tmp_path / "run"))
    assert (found.steps, found.steps_redone, found.failures, found.save_every) == (6, 2, 1, 2)
    assert found.wall_seconds > found.seconds["steps"] > 0 and found.seconds["idle"] == 0
    assert found.seconds["starting"] == found.restart_seconds > 0
    records = read_records(tmp_path / "run")
    assert math.isclose(found.wall_seconds, records[-1].time - records[0].time, abs_tol=0.1)


def test_a_line_that_is_no_event(tmp_path):
    (tmp_path / "log").write_text('{"time": 1.0, "event": "start"}\n{"time": "late", "event": "end"}\n')
    with pytest.raises(DataError, match="line 2 is no event"):
        read_events(tmp_path / "log")
