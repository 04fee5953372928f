"""tools/profile_throughput.py: phases of steps, sweeps, and hardware profiles. Counted and compared, never timed."""

import csv
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_llama.config import load_config, tokens_per_step
from megatron_llama.plan.calibration import calibrate
from megatron_llama.plan.configured import predict
from megatron_llama.plan.hardware import Efficiency, find
from megatron_llama.plan.kernels import product_seconds
from megatron_llama.supervision.supervisors import free_port
from parallel.errors import ConfigError, UserError
from parallel.launch import Launch
from parallel.topology import Topology
from tests.ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import profile_throughput
from _hardware_profile import Line, fit_line, fit_products, product_errors
from _hardware_rank import Message, Product
from _local_ranks import RanksFailedError, run_local_ranks, starts_ranks
from _phases import EXPOSED, PHASES, Idle, Interval, idle_ranks, seconds_by_phase
from _sweep import combinations
from _throughput_rank import memory_said, told_apart

TINY = (
    *("--model.num_layers", 2, "--model.hidden_size", 32, "--model.num_heads", 4, "--model.ffn_hidden_size", 48),
    *("--model.vocab_size", 128, "--train.sequence_length", 16, "--train.global_batch_size", 4, "--train.dtype", "fp32"),
    *("--train.device", "cpu"),
)
CPU = ("--device", "cpu")
STEPS = ("--steps", 3, "--warmup", 2, "--threads", 1)


@pytest.fixture
def profile(monkeypatch, capsys):
    """The tool in this process: what it prints, or says of a mistake."""

    def call(*arguments, fails=False):
        monkeypatch.setattr("sys.argv", ["profile_throughput.py", *map(str, arguments)])
        if not fails:
            profile_throughput.main()
            return capsys.readouterr().out
        with pytest.raises((UserError, SystemExit)) as caught:
            profile_throughput.main()
        return str(caught.value) + capsys.readouterr().err

    return call


# ---- phases -------------------------------------------------------------------------------------------------------------


def test_every_wait_belongs_to_what_it_interrupts():
    spans = [Interval("forward", 1, 4), Interval("received", 4, 6), Interval("backward", 6, 10), Interval("forward", 21, 25)]
    regions = [Interval("data", 0, 1), Interval("run", 1, 12), Interval("update", 12, 16), Interval("run", 21, 26)]
    waits = [
        Interval("wait", 2, 3),  # a tensor-parallel sum in F
        Interval("wait", 4.5, 6),  # the message that "received" waits for
        Interval("wait", 10, 11.5),  # for what was sent
        Interval("wait", 13, 15),  # the norm's sum
        Interval("wait", 20, 20.5),  # before the executor runs
    ]
    lengths, (first, second) = seconds_by_phase([0, 20, 30], spans, regions, waits)
    assert lengths == [20, 10]
    assert first == Counter(
        forward=2, received=2, backward=4, messages=1.5, update=2, update_collectives=2, collectives=1, data=1, other=4.5
    )
    assert second == Counter(forward=4, collectives=0.5, other=5.5)


def event(rank, kind, micro_batch, stage, start, end):
    arguments = {"micro_batch": micro_batch, "stage": stage, "chunk": 0}
    return {"ph": "X", "cat": kind, "tid": rank, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": arguments}


def test_the_bubble_is_told_from_the_messages():
    """One micro-batch on two stages: what a rank waits for until the other has made it is bubble, then it is the message."""
    spans = [
        event(0, "F", 0, 0, 0, 4),
        event(1, "wait", 0, 1, 0, 5),
        event(1, "F", 0, 1, 5, 9),
        event(1, "B", 0, 1, 9, 17),
        event(0, "wait", 0, 0, 4, 20),
        event(0, "B", 0, 0, 20, 28),
    ]
    found = idle_ranks({"traceEvents": spans}, Topology(pp=2, dp=1, cp=1, tp=1))
    assert found == {0: Idle(16, 13, 0), 1: Idle(5, 4, 11)}
    means = {"forward": 4.0, "received": 10.0, "update": 2.0, "update_collectives": 22.0, "collectives": 1.0}
    phases = told_apart(means, 22.0, found[1])
    assert phases["bubble"] == pytest.approx(10 * 4 / 5 + 11)
    assert phases["messages"] == pytest.approx(10 / 5)
    assert phases["collectives"] == pytest.approx(1 + 11)
    assert sum(phases.values()) == pytest.approx(sum(means.values()))


# ---- run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    """A hardware profile, made by two ranks."""
    path = tmp_path_factory.mktemp("profiles") / "cpu.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["_", "hardware", "--ranks", "2", "--grid", "tiny", "--output", str(path), *CPU])
        profile_throughput.main()
    return path


def test_a_run_on_two_ranks(profile, cpu, tmp_path):
    figures, trace, output = tmp_path / "figures.json", tmp_path / "step.json", tmp_path / "out"
    layout = ("--parallel.pp", 2, "--parallel.schedule", "zb-h1", "--log.directory", tmp_path / "run")
    files = ("--json", figures, "--trace", trace, "--output", output, "--gpu", cpu)
    text = profile("run", "--ranks", 2, *STEPS, *files, *TINY, *layout)
    for expected in ("tokens/s", "where a step goes", "bubble", "busy", "measured over predicted", "--calibrate"):
        assert expected in text
    found = json.loads(figures.read_text())
    assert found["steps"] == len(found["step_seconds"]["each"]) == 3
    assert len(found["losses"]) == 5 and found["world_size"] == 2
    assert found["step_seconds"]["min"] <= found["step_seconds"]["median"] <= found["step_seconds"]["max"]
    assert found["tokens_per_second"] == pytest.approx(4 * 16 / found["step_seconds"]["mean"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["exposed_communication"] == pytest.approx(sum(found["shares"][name] for name in EXPOSED))
    for rank in found["ranks"]:
        assert set(rank["phases"]) == set(PHASES)
        assert sum(rank["phases"].values()) == pytest.approx(found["step_seconds"]["mean"], rel=0.2)  # two clocks
        for name in ("forward", "backward", "weight_gradients", "update", "bubble"):
            assert rank["phases"][name] > 0
        assert 0 < rank["busy_seconds"] < sum(rank["phases"].values())
    assert not (tmp_path / "run").exists()
    actions = Counter((e["tid"], e["cat"]) for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X")
    for rank in (0, 1):  # one step: four micro-batches
        assert [actions[rank, kind] for kind in ("F", "I", "W")] == [4, 4, 4]
    check_calibration(output, find(str(cpu)), found)


def check_calibration(output, hardware, found):
    """plan.py reads what the run has written as any run's, its warm-up left out."""
    config = load_config(["--config", str(output / "config.toml")])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in steps] == found["losses"]
    assert steps[-1]["tokens"] == 5 * tokens_per_step(config)
    measured = sum(found["step_seconds"]["each"][1:]) / 2  # calibration leaves out three steps, of which two were our warm-up
    expected = measured / predict(config, 2, hardware).step_seconds
    assert calibrate(output / "metrics.jsonl", hardware) == pytest.approx(expected)


def test_the_steps_are_those_of_a_training(profile, tmp_path):
    """One process makes the same losses as two: the model is trained, and each rank on its part."""
    losses = []
    for ranks, layout in ((1, ()), (2, ("--parallel.tp", 2))):
        profile("run", "--ranks", ranks, *STEPS, "--json", tmp_path / "figures.json", *TINY, *layout)
        losses.append(json.loads((tmp_path / "figures.json").read_text())["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 5


def launched(rank, world_size, nodes, words, folder):
    """A rank as torchrun starts it."""
    local_size = world_size // nodes
    facts = {"RANK": rank, "LOCAL_RANK": rank % local_size, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": local_size}
    os.environ |= {name: str(value) for name, value in facts.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": words[0]}
    sys.argv = ["profile_throughput.py", *map(str, words[1:])]
    with open(folder / f"err-{rank}", "w") as errors:
        sys.stderr = errors
        return profile_throughput.run_program(profile_throughput.rank_main)


def test_under_a_launcher(tmp_path):
    words = [str(free_port()), "run", *STEPS[:4], "--json", tmp_path / "figures.json", *TINY]
    assert run_ranks(2, launched, 1, words, tmp_path, joined=False) == [0, 0]
    assert json.loads((tmp_path / "figures.json").read_text())["launcher"] == "torchrun"
    assert run_ranks(2, launched, 1, [*words, "--sweep", "parallel.tp=1,2"], tmp_path, joined=False) == [78, 78]
    assert "leave torchrun out" in (tmp_path / "err-0").read_text()
    assert not starts_ranks(Launch(0, 0, 1, 1, "torchrun"))
    assert starts_ranks(Launch(launcher="one process in SLURM job 7, not started by srun"))


def test_links_between_nodes(tmp_path):
    """Two nodes of one rank: nobody to send to inside, the network is measured."""
    path = tmp_path / "nodes.toml"
    words = [str(free_port()), "hardware", "--grid", "tiny", *CPU, "--output", path]
    assert run_ranks(2, launched, 2, words, tmp_path, joined=False) == [0, 0]
    text, found = path.read_text(), find(str(path))
    assert "not measured, one rank: memory's" in text and "not measured, one node" not in text
    assert found.gpus_per_node == 1 and found.network_bytes_per_second != found.link_bytes_per_second


# ---- sweeps -------------------------------------------------------------------------------------------------------------


def test_combinations():
    assert combinations(["a.b=1,2", "c.d=[1,2],auto"]) == [
        {"a.b": "1", "c.d": "[1,2]"},
        {"a.b": "1", "c.d": "auto"},
        {"a.b": "2", "c.d": "[1,2]"},
        {"a.b": "2", "c.d": "auto"},
    ]


def test_a_sweep_goes_on_after_what_fails(profile, cpu, tmp_path):
    """apex is not there, which ranks find out; three samples do not divide the batch, which no rank has to be started for."""
    table, picture = tmp_path / "sweep.csv", tmp_path / "sweep.png"
    sweeps = ("--sweep", "train.micro_batch_size=3,1", "--sweep", "kernels.rms_norm=apex,auto")
    text = profile("run", "--ranks", 2, *STEPS, *sweeps, "--gpu", cpu, "--csv", table, "--plot", picture, *TINY)
    rows = list(csv.DictReader(table.open()))
    assert [(row["train.micro_batch_size"], row["kernels.rms_norm"]) for row in rows][0] == ("1", "auto")
    assert float(rows[0]["tokens_per_second"]) > 0 and float(rows[0]["predicted_tokens_per_second"]) > 0
    assert not rows[0]["error"]
    reasons = {(row["train.micro_batch_size"], row["kernels.rms_norm"]): row["error"] for row in rows[1:]}
    assert reasons["1", "apex"].startswith("failed: kernels.rms_norm = 'apex' cannot run here")
    for kernel in ("apex", "auto"):
        assert reasons["3", kernel].startswith("not possible: train.global_batch_size must be a multiple")
    assert text.count("not possible") == 2 and text.count("failed") == 1
    with Image.open(picture) as image:
        assert image.width > 1000


def fail(launch, how):
    """Rank 1 fails; rank 0 would wait for it for long."""
    if launch.rank == 0:
        time.sleep(60)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "memory":
        with memory_said():
            torch.empty(2**60, dtype=torch.uint8)
    raise ConfigError("the reason") if how == "mistake" else ZeroDivisionError("a defect")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("mistake", r"^the reason \(rank 1\)$"),
        ("memory", r"^out of memory: .*DefaultCPUAllocator.*tools/plan.py says what fits \(rank 1\)$"),
        ("defect", "ZeroDivisionError: a defect\nTraceback"),
        ("killed", "^rank 1 was killed by signal 9"),
    ],
)
def test_the_rank_that_failed_says_why(how, said):
    with pytest.raises(RanksFailedError, match=said):
        run_local_ranks(lambda launch: fail(launch, how), 2)


# ---- hardware -----------------------------------------------------------------------------------------------------------


def test_a_profile_of_this_machine(cpu):
    text, found = cpu.read_text(), find(str(cpu))
    assert (found.gpus_per_node, found.multiprocessors, found.float8_flops, found.watts) == (2, 1, 0, 0)
    assert found.bf16_flops > 0 and found.link_bytes_per_second > 0
    assert "measured: all-gather and reduce-scatter" in text and "not measured, one node" in text and "in fp32" in text
    config = load_config([*map(str, TINY), "--parallel.pp", "2"])
    assert predict(config, 2, found).step_seconds > 0


def test_a_profile_on_a_data_sheet(profile, tmp_path):
    """What is measured is a share of the data sheet; the rest is the base's."""
    path = tmp_path / "own.toml"
    out = profile("hardware", "--ranks", 1, "--threads", 1, "--grid", "tiny", "--based-on", "h100", *CPU, "--output", path)
    own, h100 = find(str(path)), find("h100")
    assert (own.bf16_flops, own.link_bytes_per_second, own.watts) == (h100.bf16_flops, h100.link_bytes_per_second, h100.watts)
    assert own.efficiency.product != h100.efficiency.product and own.efficiency.link == h100.efficiency.link
    assert own.gpus_per_node == 1 and own.attention["flash3"] == h100.attention["flash3"]
    assert own.attention["flash2"] != h100.attention["flash2"]
    assert "off in the median" in out and str(path) in out


def test_the_fit_finds_what_the_products_were_made_with():
    true = find("h100")
    sizes = [(4096, n, k) for n in (1024, 4096) for k in (64, 256, 1024, 8192)]
    products = [Product(m, n, k, 2, product_seconds(true, m, n, k)) for m, n, k in sizes]
    found = fit_products(products, true)
    assert found.product == pytest.approx(true.efficiency.product, rel=0.02)
    assert found.product_depth == pytest.approx(true.efficiency.product_depth, rel=0.06)  # the nearest of those tried
    assert found.memory == true.efficiency.memory and isinstance(found, Efficiency)
    assert max(map(abs, product_errors(products, true))) < 1e-9


def test_the_line_through_messages():
    messages = [Message("send", size, 2e-5 + size / 5e9) for size in (1e4, 1e6, 1e8)]
    found = fit_line(messages)
    assert (found.bytes_per_second, found.latency_seconds) == pytest.approx((5e9, 2e-5))
    assert fit_line([Message("send", 1e6, 1e-3), Message("send", 2e6, 1e-3)]) == Line(2e9, 1e-3)


# ---- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", *TINY, "--sweep", "parallel.tp"), "write the setting and its values"),
        (("run", *TINY, "--sweep", "parallel.tq=1,2"), "the closest known one is parallel.tp"),
        (("run", *TINY, "--csv", "x.csv"), "--csv is for a sweep"),
        (("run", *TINY, "--gpu", "h1000"), "the nearest known one is h100"),
        (("run", *TINY, "--parallel.tp", "3", "--ranks", "1"), "parallel.tp must divide model.num_heads"),
        (("run", "--ranks", "1"), "model.num_layers is not given"),
        (("run", *TINY, "--trace", "/proc/no/where.json"), "/proc/no/where.json: cannot write: "),
        (("hardware", "--output", "/proc/no/where.toml"), "/proc/no/where.toml: cannot write: "),
        (("run", *TINY, "--steps", "0"), "0 is not above 0"),
        (("hardware", "--output", "x.toml", "--based-on", "v100"), "unknown GPU 'v100'"),
        (("hardware", "--output", "x.toml", "--parallel.tp", "2"), "unrecognized arguments"),
    ],
)
def test_mistakes(profile, arguments, expected):
    assert expected in profile(*arguments, fails=True)


def test_another_run_is_not_written_over(profile, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "give --output a new folder" in profile("run", *TINY, "--output", tmp_path, fails=True)


# ---- on a GPU: none of these has run yet --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_and_a_profile_on_a_gpu(tmp_path):
    """In a process of its own: this one may have used the GPU, and could not be forked."""
    import subprocess

    tool = Path(profile_throughput.__file__)
    words = ["hardware", "--ranks", 1, "--grid", "tiny", "--output", tmp_path / "gpu.toml"]
    subprocess.run([sys.executable, tool, *map(str, words)], check=True, timeout=250)
    own = find(str(tmp_path / "gpu.toml"))
    assert own.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    model = [word if word not in ("cpu", "fp32") else {"cpu": "cuda", "fp32": "bf16"}[word] for word in TINY]
    words = ["run", "--ranks", 1, *STEPS, "--gpu", tmp_path / "gpu.toml", "--json", tmp_path / "figures.json", *model]
    subprocess.run([sys.executable, tool, *map(str, words)], check=True, timeout=250)
    (rank,) = json.loads((tmp_path / "figures.json").read_text())["ranks"]
    assert rank["phases"]["forward"] > 0 and rank["memory_bytes"] > 0
