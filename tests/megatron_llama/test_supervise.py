"""The supervisor: what it does when real ranks die, hang, stop or fail."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from megatron_llama import supervise
from megatron_llama.program import STOPPED, USER_ERROR, run_program
from parallel.errors import ConfigError
from parallel.heartbeat import Heartbeat
from tests.megatron_llama.programs import STEPS, succeed, values
from tests.ranks import run_ranks

SAVES = ("--checkpoint.save_every", 2, "--checkpoint.asynchronous", "false")
QUICK = ("--first-timeout", 8, "--least-timeout", 2, "--grace", 0.2)
Fault = Callable[[int, int], None]  # (rank, step): what happens to a rank when it begins a step


def supervised(*argv: object, ranks: int = 2, options: tuple = (), fault: Fault | None = None) -> int:
    """The exit code of a supervisor, forked from this process, whose ranks meet with the `fault`."""
    words = ["--ranks", ranks, *options, "--", "train", "--config", "config.toml", *SAVES, *argv]
    return run_ranks(1, _supervise, list(map(str, words)), fault)[0]


def _supervise(rank: int, world_size: int, argv: list[str], fault: Fault | None) -> int:
    if fault is not None:
        enter = Heartbeat.enter

        def enter_and_fail(self: Heartbeat, phase: str, step: int = 0) -> None:
            enter(self, phase, step)
            if phase in ("first step", "step"):
                fault(int(os.environ["RANK"]), step)

        Heartbeat.enter = enter_and_fail
    sys.stderr = open("err", "a")  # until this process ends
    supervise.SHARED_MEMORY = Path.cwd()  # so that one that is killed leaves nothing
    return run_program(lambda launch: supervise.main(launch, argv))


def once(rank: int, step: int, action: Callable[[], None]) -> Fault:
    """The action happens to one rank at one step, the first time that it gets there."""
    marker = Path("happened").resolve()

    def fault(at_rank: int, at_step: int) -> None:
        if (at_rank, at_step) == (rank, step) and not marker.exists():
            marker.touch()
            action()

    return fault


def events(run_directory: Path) -> list[dict]:
    return [json.loads(line) for line in (run_directory / "supervisor.jsonl").read_text().splitlines()]


def report(run_directory: Path) -> str:
    """The only one."""
    (path,) = (run_directory / "reports").glob("*.txt")
    return path.read_text()


@pytest.fixture(scope="session")
def unbroken(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Losses and gradient norms of two ranks that nothing happens to."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("unbroken") / "run"
    os.chdir(project)
    try:
        succeed("train", "--config", "config.toml", "--log.directory", folder, ranks=2)
    finally:
        os.chdir(before)
    return curve(folder)


def curve(run_directory: Path) -> list[tuple[float, float]]:
    return list(zip(values(run_directory), values(run_directory, "grad_norm"), strict=True))


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_a_killed_rank_is_named_and_the_run_ends_as_if_nothing_had_happened(unbroken: list, workplace: Path) -> None:
    assert supervised(fault=once(1, 4, kill(signal.SIGKILL))) == 0
    assert curve(workplace / "run") == unbroken and len(unbroken) == STEPS
    told = events(workplace / "run")
    assert [event["event"] for event in told] == ["start", "death", "restart", "start", "end"]
    death = told[1]
    assert (death["rank"], death["step"], death["code"]) == (1, 4, -signal.SIGKILL)
    assert Path("happened").stat().st_mtime < death["noticed"] < death["time"]
    text = report(workplace / "run")
    assert text.startswith("rank 1 killed by SIGKILL, in step 4")
    assert "checkpoint   step 2 is the newest" in text
    assert told[3]["step"] == 2 and told[4]["code"] == 0
    assert "2 x cpu (supervisor)" in (workplace / "run/logs/rank-00000.log").read_text()
    (flight,) = (workplace / "run/reports").glob("*-flight.jsonl")
    of_dead = [event for event in map(json.loads, flight.read_text().splitlines()) if event["rank"] == 1]
    assert of_dead[-1].items() >= {"phase": "step", "step": 4}.items() and "F0" in [event.get("action") for event in of_dead]


def test_a_stopped_rank_is_found_and_named(unbroken: list, workplace: Path) -> None:
    assert supervised(options=QUICK, fault=once(1, 4, kill(signal.SIGSTOP))) == 0
    assert curve(workplace / "run") == unbroken
    hang = events(workplace / "run")[1]
    assert (hang["event"], hang["rank"], hang["step"]) == ("hang", 1, 4)
    page, stacks = report(workplace / "run").split("stacks of rank 1\n")
    assert page.startswith("rank 1 hangs in step 4")
    assert "rank 1 does not answer signals" in page and stacks.startswith("(no answer)")
    assert re.search(r"    rank 0: \w+ over \w+ \(ranks 0, 1\), call \d+; rank 1 has not come", page), page
    assert "in _be_rank" in stacks and "pytest" not in stacks  # what the supervisor did before its fork is not shown


def test_a_stage_that_sleeps_is_named_and_not_the_one_that_waits_for_it(workplace: Path) -> None:
    pipeline = ("--parallel.pp", 2)
    assert supervised(*pipeline, options=QUICK, fault=once(0, 4, lambda: time.sleep(300))) == 0
    hang = events(workplace / "run")[1]
    assert (hang["event"], hang["rank"], hang["step"]) == ("hang", 0, 4)
    text = report(workplace / "run")
    assert "rank 1: waits for F0" in text and "in fault" in text.split("stacks of rank 0")[1]


def test_files_that_cannot_be_written_do_not_end_the_supervision(unbroken: list, workplace: Path) -> None:
    (workplace / "run/supervisor.jsonl").mkdir(parents=True)
    (workplace / "run/reports").write_text("in the way")
    assert supervised(fault=once(0, 4, kill(signal.SIGKILL))) == 0
    assert curve(workplace / "run") == unbroken
    assert "rank 0 killed by SIGKILL" in (workplace / "err").read_text()


def test_a_clock_that_jumps_by_a_day_changes_nothing(unbroken: list, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, jumps = time.time, cycle([0, -86_400, 86_400])
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    assert supervised(options=QUICK, fault=once(1, 4, kill(signal.SIGKILL))) == 0
    assert curve(workplace / "run") == unbroken
    told = events(workplace / "run")
    assert [event["event"] for event in told] == ["start", "death", "restart", "start", "end"]
    assert max(event["time"] for event in told) - min(event["time"] for event in told) > 80_000  # so it was asked


@pytest.mark.parametrize("code", [USER_ERROR, 2])
def test_what_no_restart_mends_is_not_started_again(code: int, workplace: Path) -> None:
    assert supervised(fault=lambda rank, step: rank == 1 and os._exit(code)) == code
    assert [event["event"] for event in events(workplace / "run")] == ["start", "end"]
    assert not (workplace / "run/reports").exists()


def test_a_mistake_in_the_settings_is_said_by_the_supervisor_alone(workplace: Path) -> None:
    assert supervised("--train.stepps", 3) == USER_ERROR
    assert (workplace / "err").read_text().count("stepps") == 1
    assert not (workplace / "run").exists()


def test_restarts_without_progress_come_to_an_end(workplace: Path) -> None:
    def crash(rank: int, step: int) -> None:
        if (rank, step) == (1, 3):
            raise RuntimeError("planted")

    assert supervised(options=("--max-restarts", 1), fault=crash) == 1
    told = events(workplace / "run")
    assert [event["event"] for event in told] == ["start", "death", "restart", "start", "death", "end"]
    assert [event["rank"] for event in told if event["event"] == "death"] == [1, 1]
    assert told[-1]["code"] == 1 and "2 failures in a row without a new checkpoint" in told[-1]["text"]
    assert len(list((workplace / "run/reports").glob("*.txt"))) == 2


def test_a_new_checkpoint_renews_the_budget(unbroken: list, workplace: Path) -> None:
    def crash(rank: int, step: int) -> None:
        marker = Path(f"crashed-{step}")
        if rank == 1 and step in (3, 5) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert supervised(options=("--max-restarts", 1), fault=crash) == 0
    assert curve(workplace / "run") == unbroken
    assert [event["step"] for event in events(workplace / "run") if event["event"] == "restart"] == [2, 4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_ranks_with_their_state_saved(number: int, workplace: Path) -> None:
    def ask_to_stop() -> None:
        os.kill(os.getppid(), number)
        time.sleep(0.5)  # (two steps would be done before the supervisor looks)

    assert supervised(fault=once(1, 3, ask_to_stop)) == STOPPED
    told = events(workplace / "run")
    assert [event["event"] for event in told] == ["start", "end"]
    assert told[-1]["step"] == 4  # the wish rides on the sums of the step after


def test_ranks_die_with_their_supervisor(workplace: Path) -> None:
    def fault(rank: int, step: int) -> None:
        Path(f"pid-{rank}").write_text(str(os.getpid()))
        if (rank, step) == (1, 3):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)

    with pytest.raises(AssertionError, match="exit code -9"):
        supervised(fault=fault)
    for rank in range(2):
        wait_for_end_of(int(Path(f"pid-{rank}").read_text()))


def wait_for_end_of(pid: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} lives")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "what to supervise is to follow `--`"),
        (["--", "evaluate"], "what to supervise is to follow `--`"),
        (["--ranks", "2", "train", "--config", "run.toml"], "what to supervise is to follow `--`"),
        (["--ranks", "0", "--", "train"], "--ranks 0 is below 1"),
        (["--rank", "2", "--", "train"], "unrecognized arguments: --rank 2"),
        (["--spares", "-1", "--", "train"], "--spares -1 is below 0"),
        (["--node-timeout", "5", "--", "train"], "a supervisor that ends its ranks (--grace 5) is silent for up to 7 s"),
        (["--ranks", "two", "--", "train"], "invalid int value: 'two'"),
    ],
    ids=str,
)
def test_wrong_usage(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        supervise.parse(argv)


def test_two_supervisors_restart_together(unbroken: list, workplace: Path) -> None:
    """As on two nodes, a rank each; the one that survives would not notice anything by itself."""

    def fault(rank: int, step: int) -> None:
        marker = Path(f"happened-{rank}")
        if step == 4 and not marker.exists():
            marker.touch()
            time.sleep(300) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)

    assert run_ranks(2, _supervise_node, free_port(), (), fault, joined=False) == [0, 0]
    assert curve(workplace / "run") == unbroken
    told = [event["event"] for event in events(workplace / "run")]
    assert sorted(told) == ["death", "elsewhere", "end", "restart", "start", "start"]


SPARE_NODE = ("--nodes", 2, "--node-timeout", 2.2)


def test_a_spare_node_takes_the_place_of_a_lost_one(unbroken: list, workplace: Path) -> None:
    fault = once(1, 4, lambda: os.kill(os.getppid(), signal.SIGKILL))
    assert run_ranks(3, _node_that_may_die, free_port(), SPARE_NODE, fault, joined=False) == [0, -signal.SIGKILL, 0]
    assert curve(workplace / "run") == unbroken
    told = events(workplace / "run")
    assert [event["shares"] for event in told if event["event"] == "start"] == [[[0, [0]], [1, [0]]], [[0, [0]], [2, [0]]]]
    assert [event["lost"] for event in told if event["event"] == "lost"] == [1]
    assert "now on node 0 (slot 0), node 2 (slot 0)" in (workplace / "err").read_text()


def test_a_node_that_comes_back_finds_itself_given_up(unbroken: list, workplace: Path) -> None:
    """A supervisor that was cut off or asleep must not let its ranks work beside those that have replaced them."""

    def fault(rank: int, step: int) -> None:
        pid = Path("pid")
        if (rank, step) == (1, 4) and not pid.exists():
            pid.write_text(str(os.getppid()))
            os.kill(os.getppid(), signal.SIGSTOP)
            time.sleep(300)
        elif (rank, step) == (1, 6):
            os.kill(int(pid.read_text()), signal.SIGCONT)

    assert run_ranks(3, _node_that_may_die, free_port(), SPARE_NODE, fault, joined=False) == [0, 69, 0]
    assert curve(workplace / "run") == unbroken
    assert "has given up this one, of node 1" in (workplace / "err").read_text()


def test_without_a_spare_node_a_lost_one_ends_the_run(workplace: Path) -> None:
    fault = once(1, 4, lambda: os.kill(os.getppid(), signal.SIGKILL))
    options = ("--node-timeout", 2.2)
    assert run_ranks(2, _node_that_may_die, free_port(), options, fault, joined=False) == [69, -signal.SIGKILL]
    assert "of 2 nodes that the ranks need, 1 are left" in events(workplace / "run")[-1]["text"]


@pytest.mark.parametrize(
    ("number", "text"), [(signal.SIGKILL, "has lost the first one"), (signal.SIGSTOP, "has been silent for 2 s")]
)
def test_where_the_first_supervisor_is_lost_all_end(number: int, text: str, workplace: Path) -> None:
    def strike() -> None:
        supervisor = os.getppid()
        os.kill(supervisor, number)
        time.sleep(6)
        os.kill(supervisor, signal.SIGKILL)

    assert run_ranks(3, _node_that_may_die, free_port(), SPARE_NODE, once(0, 4, strike), joined=False) == [-9, 69, 69]
    assert (workplace / "err").read_text().count(text) == 2


def test_a_device_whose_ranks_die_repeatedly_gives_way_to_a_spare_one(unbroken: list, workplace: Path) -> None:
    def fault(rank: int, step: int) -> None:
        if os.environ["CUDA_VISIBLE_DEVICES"].split(",")[int(os.environ["LOCAL_RANK"])] == "1" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    assert supervised(options=("--spares", 1), fault=fault) == 0
    assert curve(workplace / "run") == unbroken
    shares = [event["shares"] for event in events(workplace / "run") if event["event"] == "start"]
    assert shares == [[[0, [0, 1]]], [[0, [0, 1]]], [[0, [0, 2]]]]


def _node_that_may_die(node: int, nodes: int, port: int, options: tuple, fault: Fault) -> int:
    """As `_supervise_node`, in a process of its own."""
    pid = os.fork()
    if not pid:
        os._exit(_supervise_node(node, nodes, port, options, fault))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _supervise_node(node: int, nodes: int, port: int, options: tuple, fault: Fault) -> int:
    facts = {"RANK": node, "WORLD_SIZE": nodes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in {**facts, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()}
    words = ("--grace", 0.2, *options, "--", "train", "--config", "config.toml", *SAVES)
    return _supervise(node, nodes, list(map(str, words)), fault)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
