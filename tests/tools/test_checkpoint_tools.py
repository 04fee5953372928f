"""reshard_checkpoint.py and inspect_checkpoint.py."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_llama import checkpoint_report
from megatron_llama.checkpoint_report import largest_difference, listing
from megatron_llama.config import ModelConfig, ParallelConfig
from megatron_llama.interop import native
from megatron_llama.interop.stored_model import Options, StoredModel
from megatron_llama.reshard import Resharding
from megatron_llama.state import stored_config
from parallel.checkpoint.load import verify_checkpoint
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.offline import StepReader
from parallel.checkpoint.retention import TRASH_MARK, verified_time
from parallel.checkpoint.steps import TEMPORARY_MARK, committed_steps, step_directory
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.interop.models import ODD, TIED, random_model
from tests.megatron_llama.interop.test_native import with_moments
from tests.parallel.checkpoint.test_layouts import peak_extra_bytes
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
GENERIC = ("--world-size", 4, "--parallel.tp", 2, "--zero.bucket_size", 3000)


def run(tool: str, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a tool, in a process forked from this one, which has imported torch."""
    return run_ranks(1, tool_main, f"{ROOT}/tools/{tool}_checkpoint.py", [str(word) for word in arguments])[0]


def tool_main(rank: int, world_size: int, path: str, words: list[str]) -> tuple[int, str, str]:
    sys.argv, code = [path, *words], 0
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            code = int(left.code or 0)
    return code, output.getvalue(), errors.getvalue()


def save(root: Path, step: int = 7, model: ModelConfig = ODD, seed: int = 0) -> StoredModel:
    """A checkpoint with moments under `root`."""
    stored = with_moments(random_model(model, torch.float32, seed))
    native.write(stored, root, Options(step=step, max_shard_bytes=100_000))
    return stored


def whole_tensors(directory: Path) -> dict[str, Tensor]:
    reader = StepReader(directory)
    return {name: reader.read(name) for name in reader.manifest.tensors}


def flip_bit(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def in_layout(root: Path, world_size: int, **options: object) -> Resharding:
    config = stored_config(root, read_manifest(step_directory(root, 7)))
    return Resharding(root, replace(config, parallel=ParallelConfig(tp=2)), world_size, **options)


def test_reshard(tmp_path: Path) -> None:
    """Tensor by tensor the same bytes, cut as the ranks would cut them; the state goes along."""
    source, target = tmp_path / "run" / "checkpoints", tmp_path / "new"
    save(source)
    code, output, errors = run("reshard", *GENERIC, tmp_path / "run", target)  # flags may come first
    assert (code, errors) == (0, "")
    directory = step_directory(target, 7)
    assert f"{directory}: " in output and "for 4 ranks" in output
    manifest, before = verify_checkpoint(directory), read_manifest(step_directory(source, 7))
    assert {name.split("-")[1] for name in manifest.files} == {f"{rank:05d}.safetensors" for rank in range(4)}
    ours, theirs = (whole_tensors(step_directory(root, 7)) for root in (target, source))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = manifest.state
    assert (state["config"]["parallel"]["tp"], state["config"]["zero"]["bucket_size"], state["world_size"]) == (2, 3000, 4)
    unchanged = ("position", "optimizer_steps", "dataset", "loss_scale")
    assert [state[key] for key in unchanged] == [before.state[key] for key in unchanged]
    assert manifest.step == 7 and manifest.extra_files == before.extra_files


def test_reshard_weights_in_another_dtype(tmp_path: Path) -> None:
    stored = save(tmp_path / "old")
    in_layout(tmp_path / "old", 2, weights_only=True, dtype=torch.bfloat16).write(tmp_path / "new")
    weights = whole_tensors(step_directory(tmp_path / "new", 7))
    assert weights.keys() == stored.weights.keys()
    assert all(torch.equal(weights[name], tensor.load(torch.bfloat16)) for name, tensor in stored.weights.items())


def test_reshard_weights_of_several_dtypes(tmp_path: Path) -> None:
    """A converted checkpoint may have its norms in fp32 and the rest in bf16; each stays what it is."""
    stored = random_model(ODD, torch.bfloat16)
    wide = {name: tensor for name, tensor in random_model(ODD, torch.float32).weights.items() if "norm" in name}
    native.write(replace(stored, weights={**stored.weights, **wide}), tmp_path / "old", Options(step=7))
    in_layout(tmp_path / "old", 4, weights_only=True).write(tmp_path / "new")
    ours, theirs = (whole_tensors(step_directory(tmp_path / name, 7)) for name in ("new", "old"))
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_reshard_refuses_in_one_line(tmp_path: Path) -> None:
    save(tmp_path / "old")
    for words, message in {
        ("--parallel.tp", 3): "parallel.tp must divide .* set --parallel.tp to 2",
        ("--parallel.tp", 2, "--world-size", 3): "the world size must be a multiple of tp 2 .* and is 3",
        ("--model.num_layers", 4): "is a checkpoint of another model: model.num_layers = 2 .* leave out the --model flags",
        ("--dtype", "bf16"): "--dtype .* needs --weights-only",
        ("--paralel.tp", 2): "unknown setting paralel.tp; the closest known one is parallel.tp",
    }.items():
        code, output, errors = run("reshard", tmp_path / "old", tmp_path / "new", *words)
        assert (code, output) == (2, "") and errors.count("\n") == 1 and re.search(message, errors), errors
    assert not (tmp_path / "new").exists()
    in_layout(tmp_path / "old", 2).write(tmp_path / "new")
    with pytest.raises(CheckpointError, match="step_00000007 is already committed; it is left as it is"):
        in_layout(tmp_path / "old", 2).write(tmp_path / "new")
    with pytest.raises(ConfigError, match="needs --weights-only"):
        in_layout(tmp_path / "old", 2, dtype=torch.bfloat16)


def test_damage_in_the_source_stops_a_resharding(tmp_path: Path) -> None:
    save(tmp_path / "old")
    flip_bit(step_directory(tmp_path / "old", 7) / "weights-00001.safetensors", 50_000)
    with pytest.raises(CheckpointError, match=r"weights-00001.safetensors, block 0 .* damaged"):
        in_layout(tmp_path / "old", 2).write(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_visible_of_an_interrupted_resharding(tmp_path: Path) -> None:
    """Killed in the middle, it leaves what nobody reads; the next attempt succeeds and sweeps."""
    save(tmp_path / "old")
    resharding, done = in_layout(tmp_path / "old", 2), 0

    def kill(count: int) -> None:
        nonlocal done
        done += count
        if done > resharding.total_bytes // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        resharding.write(tmp_path / "new", kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert committed_steps(tmp_path / "new") == []
    left = list((tmp_path / "new").iterdir())
    assert len(left) == 1 and TEMPORARY_MARK in left[0].name
    told: list[int] = []
    resharding.write(tmp_path / "new", told.append)
    assert sum(told) == resharding.total_bytes
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step_00000007"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """Of a table of 115 MB no more than some pieces are in memory: cut into rows of two ranks, and compared."""
    save(tmp_path / "small")
    in_layout(tmp_path / "small", 2).write(tmp_path / "warm")  # what programs need is in memory then
    model = replace(ODD, num_layers=1, vocab_size=450_000, num_heads=4, num_kv_heads=4, tie_embeddings=True)
    native.write(random_model(model, torch.float32), tmp_path / "old", Options(step=7))
    resharding = in_layout(tmp_path / "old", 2, weights_only=True)
    assert resharding.total_bytes > 115_000_000
    assert peak_extra_bytes(lambda: resharding.write(tmp_path / "new")) < 80 << 20
    readers = [StepReader(step_directory(tmp_path / name, 7)) for name in ("old", "new")]
    assert peak_extra_bytes(lambda: largest_difference(*readers, "tok_embeddings")) < 80 << 20
    shutil.rmtree(tmp_path / "old")


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Steps 5, 10, 15 and 20, and what saves and recovery leave beside them."""
    for step in (5, 10, 15, 20):
        save(tmp_path / "checkpoints", step, TIED, seed=step)
    for name in (f"step_00000025{TEMPORARY_MARK}00", f"step_00000004{TRASH_MARK}00", "step_00000012.bad-00"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step_00000012.bad-00" / "DAMAGED").write_text("block 3 of something")
    yield tmp_path / "checkpoints"


def test_ls(root: Path) -> None:
    flip_bit(step_directory(root, 10) / "manifest.json", 300)
    (step_directory(root, 15) / "weights-00000.safetensors").unlink()
    code, output, errors = run("inspect", "ls", root.parent)
    assert (code, errors) == (0, "")
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert re.search(r"MiB|KiB", lines["step_00000005"]) and "tp 1 x pp 1 x dp 1" in lines["step_00000005"]
    assert lines["step_00000005"].endswith("optimizer, weights  complete (not verified)")
    assert "damaged: manifest.json and COMMIT do not belong together" in lines["step_00000010"]
    assert "damaged: the manifest lists weights-00000.safetensors, which cannot be read" in lines["step_00000015"]
    assert lines[f"step_00000025{TEMPORARY_MARK}00"].endswith("never read")
    assert lines[f"step_00000004{TRASH_MARK}00"].endswith("the next save removes it")
    assert lines["step_00000012.bad-00"].endswith("put aside as damaged, never read: block 3 of something")


def test_verify(root: Path) -> None:
    """Every byte of one step, or of all; what is damaged is named, and what is good is noted beside it."""
    code, output, errors = run("inspect", "verify", root)
    assert (code, errors) == (0, "") and output.startswith(f"good     {step_directory(root, 20)}: ")
    damaged = step_directory(root, 10)
    for name in ("weights-00000.safetensors", "optimizer-00006.safetensors"):
        flip_bit(damaged / name, 40_000)
    code, output, errors = run("inspect", "verify", root, "--all")
    assert (code, errors) == (1, "")
    assert [line.split()[0] for line in output.splitlines()] == ["good", "damaged", "damaged", "good", "good"]
    assert re.search(r"damaged  .*step_00000010: weights-00000.safetensors, block 0 .*CRC32", output)
    assert verified_time(step_directory(root, 20)) and not verified_time(damaged)
    (step_directory(root, 20) / "COMMIT").unlink()
    assert run("inspect", "verify", root)[0] == 1, "the newest is not passed over"
    assert any("verified 20" in line for line in listing(root))


def test_diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across layouts and dtypes, piece by piece; the exit code says whether anything differs."""
    monkeypatch.setattr(checkpoint_report, "PIECE_ELEMENTS", 1000)
    stored = save(tmp_path / "a")
    in_layout(tmp_path / "a", 4).write(tmp_path / "b")
    code, output, errors = run("inspect", "diff", tmp_path / "a", tmp_path / "b")
    assert (code, output, errors) == (0, "0 of 63 tensors differ\n", "")

    changed = {name: tensor.load().clone() for name, tensor in stored.weights.items()}
    changed["norm"][3] += 0.5
    changed["layers.1.feed_forward.w2"][2, 5] -= 2.0
    weights = {name: replace(stored.weights[name], read=lambda name=name: changed[name]) for name in changed}
    native.write(replace(stored, weights=weights, optimizer={}), tmp_path / "c", Options(step=7))
    code, output, _ = run("inspect", "diff", tmp_path / "b", tmp_path / "c", "--weights-only")
    assert code == 1
    assert output.splitlines() == [
        "layers.1.feed_forward.w2: differs by up to 2",
        "norm: differs by up to 0.5",
        "2 of 21 tensors differ; the largest difference is 2, in layers.1.feed_forward.w2",
    ]
    code, output, _ = run("inspect", "diff", tmp_path / "a", tmp_path / "c")
    assert code == 1 and "step_00000007: 42 tensors, such as exp_avg/layers.0.attention.wk" in output

    native.write(replace(stored, optimizer={}), tmp_path / "half", Options(step=7, dtype=torch.bfloat16))
    first, second = (StepReader(step_directory(tmp_path / name, 7)) for name in ("a", "half"))
    whole = stored.weights["output"].load()
    assert largest_difference(first, second, "output") == (whole - whole.bfloat16().float()).abs().max().item() > 0


def test_not_a_number_differs_from_numbers_only(tmp_path: Path) -> None:
    stored = random_model(ODD, torch.float32)
    broken = stored.weights["norm"].load().clone()
    broken[1] = torch.nan
    weights = {**stored.weights, "norm": replace(stored.weights["norm"], read=lambda: broken)}
    for name, model in (("good", stored), ("bad", replace(stored, weights=weights))):
        native.write(model, tmp_path / name, Options())
    good, bad = (StepReader(step_directory(tmp_path / name, 0)) for name in ("good", "bad"))
    assert largest_difference(bad, bad, "norm") == 0.0
    assert largest_difference(good, bad, "norm") != largest_difference(good, bad, "norm"), "NaN"


def test_prune(root: Path) -> None:
    """Nothing goes in a dry run; then all but the newest, every n-th, and the newest that was verified."""
    assert run("inspect", "verify", step_directory(root, 5))[0] == 0
    wanted = ["--keep", 1, "--keep-every", 15]
    code, output, errors = run("inspect", "prune", root, *wanted, "--dry-run")
    assert (code, output, errors) == (0, f"would remove {step_directory(root, 10)}\n", "")
    assert committed_steps(root) == [5, 10, 15, 20]
    code, output, errors = run("inspect", "prune", root, *wanted)
    assert (code, output, errors) == (0, f"removed {step_directory(root, 10)}\n", "")
    assert committed_steps(root) == [5, 15, 20]
    code, _, errors = run("inspect", "prune", root, "--keep", 0)
    assert code == 2 and "at least one step must stay" in errors
