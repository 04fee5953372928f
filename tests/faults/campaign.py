"""Runs trainings that faults strike, under the supervisor, and compares each with the one that nothing happens to."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from shutil import copytree, rmtree
from typing import NamedTuple

from megatron_llama import supervise
from megatron_llama.program import run_program
from parallel.checkpoint.steps import committed_steps, step_directories
from tests.faults import disk
from tests.faults.strikes import FAULTS, Strike, Struck, plant, struck
from tests.megatron_llama.programs import CONFIG, TRAIN_TOKENS, VALID_TOKENS, write_dataset

SETTINGS = ("--data.tokenizer", "", "--data.valid", "[]", "--checkpoint.save_every", "2", "--checkpoint.keep", "0")
EVALUATED = ("--data.valid", '["valid"]', "--train.evaluate_every", "3")
FOUR_LAYERS = ("--model.num_layers", "4")
INTERLEAVED = ("--parallel.pp", "2", "--parallel.schedule", "interleaved", "--parallel.chunks", "2")
FIRST_TIMEOUT, LEAST_TIMEOUT = 8.0, 2.0  # seconds
OPTIONS = ("--first-timeout", str(FIRST_TIMEOUT), "--least-timeout", str(LEAST_TIMEOUT), "--grace", "0.2")
DEADLINE_SECONDS = 120.0  # of one start of the supervisor
TOLERANCE = 1e-6  # relative, of losses in another layout


@dataclass(frozen=True)
class Layout:
    """Ranks, and the settings that lay the model out over them; unless it is `possible`, nothing of a run may be touched."""

    name: str
    ranks: int
    settings: tuple[str, ...] = ()
    possible: bool = True


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("one rank", 1),
        Layout("dp2 tp2", 4, ("--parallel.tp", "2")),
        Layout("dp4 zero0", 4, ("--zero.stage", "0")),
        Layout("dp2 zero2", 2, ("--zero.stage", "2")),
        Layout("tp2 pp2", 4, ("--parallel.tp", "2", "--parallel.pp", "2")),
        Layout("pp4", 4, ("--parallel.pp", "4", *FOUR_LAYERS)),
        Layout("pp2 dp2", 4, ("--parallel.pp", "2")),
        Layout("pp2 interleaved", 2, (*INTERLEAVED, *FOUR_LAYERS)),
        Layout("pp2 zb-h1", 2, ("--parallel.pp", "2", "--parallel.schedule", "zb-h1", "--parallel.post_validation", "true")),
        Layout("pp2 zb-v", 2, ("--parallel.pp", "2", "--parallel.schedule", "zb-v", "--parallel.chunks", "2", *FOUR_LAYERS)),
        Layout("dp3", 3, possible=False),
        Layout("tp3", 3, ("--parallel.tp", "3"), possible=False),
        Layout("pp3", 3, ("--parallel.pp", "3"), possible=False),
        Layout("tp2 on 3 ranks", 3, ("--parallel.tp", "2"), possible=False),
    )
}


@dataclass(frozen=True)
class Injection:
    """Strikes that a run in a layout meets with, and how it is to end: the exit code of each start of the supervisor.

    `row` is that of the matrix. `then` are the layouts of the starts after the first; the first one's where there are fewer.
    `aside`: checkpoints that are to be put aside as damaged. `unsaved`: steps whose save is to fail. `says`: what a user reads.
    `small_disk`: checkpoints go to a disk of its own.
    """

    row: str
    layout: str
    strikes: tuple[Strike, ...]
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    then: tuple[str, ...] = ()
    aside: int = 0
    unsaved: tuple[int, ...] = ()
    says: str = ""
    small_disk: bool = False

    def __str__(self) -> str:
        further = f" ({' '.join(self.settings)})" if self.settings else ""
        events = [*map(str, self.strikes), *(f"a start in {layout}" for layout in self.then)]
        return f"{self.row} [{self.layout}{further}] {', then '.join(events)}"


class Outcome(NamedTuple):
    """What a run leaves: each step's loss and gradient norm, exactly; the last checkpoint's files; the steps that are saved."""

    curve: dict[int, tuple[str, str]]
    files: dict[str, int]
    saved: list[int]


@dataclass
class Result:
    """What came of an injection. `wrong` is empty where all is as it has to be.

    A death is detected when the supervisor has written its report. A hang has to stand still for its phase's limit first: its
    seconds are those beyond. A restart ends with the first new step.
    """

    name: str
    row: str
    faults: int
    wrong: list[str] = field(default_factory=list)
    redone_steps: list[int] = field(default_factory=list)
    death_seconds: list[float] = field(default_factory=list)
    hang_seconds: list[float] = field(default_factory=list)
    restart_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    log: str = ""  # of the supervisor and rank 0, where something is wrong


class Campaign:
    """A folder in which one run after the other meets with its faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unbroken: dict[tuple[str, tuple[str, ...]], Outcome] = {}
        self._data = folder / "data"
        self._data.mkdir(parents=True)
        (self._data / "config.toml").write_text(CONFIG)
        write_dataset(self._data / "train", TRAIN_TOKENS, seed=1)
        write_dataset(self._data / "valid", VALID_TOKENS, seed=2)

    def unbroken(self, layout: str, settings: tuple[str, ...] = ()) -> Outcome:
        """The outcome that nothing happens to."""
        key = layout, settings
        if key not in self._unbroken:
            workplace = self.new_workplace()
            code = await_end(self.launch(workplace, LAYOUTS[layout], settings))
            assert code == 0, f"{layout}: the run that nothing happens to has ended with code {code}:\n{log_of(workplace)}"
            self._unbroken[key] = outcome(workplace)
        return self._unbroken[key]

    def inject(self, injection: Injection) -> Result:
        """Let the strikes happen, start again as a batch job would, and compare."""
        expected = self.unbroken(injection.layout, injection.settings)
        result = Result(str(injection), injection.row, len(injection.strikes))
        began, workplace = time.monotonic(), self.new_workplace()
        layouts = [injection.layout, *injection.then]
        codes = []
        for number in range(len(injection.codes)):
            layout = LAYOUTS[layouts[min(number, len(layouts) - 1)]]
            before = _files_of_run(workplace)
            codes.append(self._start(workplace, layout, injection))
            if not layout.possible and _files_of_run(workplace) != before:
                result.wrong.append(f"{layout.name} has touched files")
        result.seconds = time.monotonic() - began
        if tuple(codes) != injection.codes:
            result.wrong.append(f"exit codes {codes}, not {list(injection.codes)}")
        if injection.says not in log_of(workplace):
            result.wrong.append(f"nobody says {injection.says!r}")
        check_incidents(workplace, injection.strikes, result)
        if codes[-1] == 0:
            exactly = layouts[-1] == injection.layout
            result.wrong += differences(workplace, expected, exactly, injection.aside, injection.unsaved)
        if result.wrong:
            result.log = log_of(workplace)
        return result

    def launch(
        self,
        workplace: Path,
        layout: Layout,
        settings: Sequence[str] = (),
        options: Sequence[str] = (),
        strikes: Sequence[Strike] = (),
        small_disk: bool = False,
    ) -> BaseProcess:
        """A supervisor, forked from this process."""
        words = ["--ranks", str(layout.ranks), *OPTIONS, *options, "--", "train", "--config", "config.toml"]
        argv = [*words, *SETTINGS, *layout.settings, *settings]
        arguments = (workplace, argv, tuple(strikes), small_disk)
        process = multiprocessing.get_context("fork").Process(target=_supervise, args=arguments)
        process.start()
        return process

    def _start(self, workplace: Path, layout: Layout, injection: Injection) -> int:
        """The exit code of one start of the supervisor."""
        how = injection.settings, injection.options, injection.strikes, injection.small_disk
        return await_end(self.launch(workplace, layout, *how))

    def new_workplace(self) -> Path:
        """A folder with the data, and nothing of a run yet."""
        workplace = self.folder / "workplace"
        rmtree(workplace, ignore_errors=True)
        return Path(copytree(self._data, workplace))


def _supervise(workplace: Path, argv: list[str], strikes: tuple[Strike, ...], small_disk: bool) -> None:
    os.chdir(workplace)
    sys.stdout = sys.stderr = log = open("log", "a", buffering=1)  # until this process ends
    os.dup2(log.fileno(), 1)  # for what is not Python
    os.dup2(log.fileno(), 2)
    supervise.SHARED_MEMORY = workplace  # so that one that is killed leaves nothing
    if strikes:
        plant(strikes)
    if small_disk:
        disk.mount()
        argv += ["--checkpoint.directory", str(disk.DISK)]
    code = run_program(lambda launch: supervise.main(launch, argv))
    if small_disk:
        copytree(disk.DISK, "run/checkpoints")
    sys.exit(code)


def await_end(process: BaseProcess) -> int:
    """The exit code of a supervisor; past the deadline it is killed, and its ranks with it."""
    process.join(DEADLINE_SECONDS)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def _files_of_run(workplace: Path) -> dict[Path, int]:
    """When each was changed, but for the supervisor's own log."""
    paths = (workplace / "run").rglob("*")
    return {path: path.stat().st_mtime_ns for path in paths if path.name != "supervisor.jsonl" and path.is_file()}


def outcome(workplace: Path) -> Outcome:
    """What a run has left."""
    checkpoints = workplace / "run/checkpoints"
    last = step_directories(checkpoints)[-1][1]
    files = {path.name: zlib.crc32(path.read_bytes()) for path in sorted(last.glob("*.safetensors"))}
    curve = {line["step"]: _exact(line) for line in lines_of(workplace / "run/metrics.jsonl") if "loss" in line}
    return Outcome(curve, files, committed_steps(checkpoints))


def _exact(line: dict) -> tuple[str, str]:
    return float(line["loss"]).hex(), float(line["grad_norm"]).hex()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def differences(
    workplace: Path, expected: Outcome, exactly: bool = True, aside: int = 0, unsaved: Sequence[int] = ()
) -> list[str]:
    """In what a finished run differs from the unbroken one: in any bit, or unless `exactly`, beyond the tolerance."""
    found, wrong = outcome(workplace), []
    if not exactly:
        wrong += _beyond_tolerance(found, expected)
    else:
        if found.curve != expected.curve:
            wrong.append(f"losses and norms {found.curve}, not {expected.curve}")
        if found.files != expected.files:
            wrong.append(f"the last checkpoint's files {found.files}, not {expected.files}")
        redone = [line for line in lines_of(workplace / "run/discarded.jsonl") if "loss" in line]
        wrong += [f"step {r['step']} had another loss at first" for r in redone if _exact(r) != expected.curve[r["step"]]]
    saved = [step for step in expected.saved if step not in unsaved]
    if found.saved != saved:
        wrong.append(f"steps {found.saved} are saved, not {saved}")
    names = [path.name for path in (workplace / "run/checkpoints").iterdir()]
    if any(".tmp-" in name for name in names):
        wrong.append(f"left over: {names}")
    if sum(".bad-" in name for name in names) != aside:
        wrong.append(f"{aside} damaged checkpoints were to be put aside: {names}")
    return wrong


def _beyond_tolerance(found: Outcome, expected: Outcome) -> list[str]:
    if found.curve.keys() != expected.curve.keys():
        return [f"steps {list(found.curve)}"]
    pairs = {step: (float.fromhex(found.curve[step][0]), float.fromhex(expected.curve[step][0])) for step in expected.curve}
    return [f"loss of step {s}: {a}, not {b}" for s, (a, b) in pairs.items() if abs(a - b) > TOLERANCE * abs(b)]


def check_incidents(workplace: Path, strikes: Sequence[Strike], result: Result) -> None:
    """Whether every strike happened, and the supervisor found what it had to, with the right rank; and the times of it."""
    happened = [struck(workplace, number) for number in range(len(strikes))]
    result.wrong += [f"never happened: {strike}" for strike, note in zip(strikes, happened, strict=True) if note is None]
    events = lines_of(workplace / "run/supervisor.jsonl")
    incidents = [event for event in events if event["event"] in ("death", "hang", "elsewhere")]
    expected = [(s, note) for s, note in zip(strikes, happened, strict=True) if note and FAULTS[s.fault].incident]
    expected.sort(key=lambda pair: pair[1].time)
    wanted = [(FAULTS[strike.fault].incident, strike.place.rank) for strike, _ in expected]
    found = [(event["event"], event["rank"]) for event in incidents]
    if found != wanted:
        result.wrong.append(f"incidents {found}, not {wanted}")
        return
    for event, (strike, note) in zip(incidents, expected, strict=True):
        report = (workplace / event["report"]).read_text()
        if not report.startswith(f"rank {event['rank']} "):
            result.wrong.append(f"the report {event['report']} begins with: {report.splitlines()[0]}")
        detected = event["time"] - note.time
        limit = re.search(r"^limit +([0-9.]+) s", report, re.MULTILINE)
        if event["event"] == "death" and FAULTS[strike.fault].at_once:
            result.death_seconds.append(detected)
        elif limit:  # the others may have given the rank up before the supervisor did
            result.hang_seconds.append(detected - float(limit[1]))
        _time_restart(workplace, events[events.index(event) + 1 :], note, result)


def _time_restart(workplace: Path, later: list[dict], note: Struck, result: Result) -> None:
    """How many steps a restart has cost, and how long it took until there was a new one."""
    restart = next((event for event in later if event["event"] == "restart"), None)
    if restart is None:
        return
    result.redone_steps.append(max(note.complete_steps - restart["step"], 0))
    times = [
        line["time"]
        for name in ("metrics.jsonl", "discarded.jsonl")
        for line in lines_of(workplace / "run" / name)
        if "loss" in line and line["time"] >= restart["time"]
    ]
    if times:
        result.restart_seconds.append(min(times) - restart["time"])


def log_of(workplace: Path) -> str:
    return (workplace / "log").read_text(errors="replace")
