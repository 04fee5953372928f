"""Our own checkpoints as one end of a conversion: everything comes back, and every program opens what is written."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_llama.interop import formats, native
from megatron_llama.interop.stored_model import MOMENTS, Options, StoredModel, StoredTensor
from parallel.checkpoint.load import verify_checkpoint
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.steps import resolve_checkpoint
from parallel.errors import CheckpointError
from tests.megatron_llama.interop.models import GROUPED, ODD, SCALED, TIED, assert_same, loaded, random_model
from tests.megatron_llama.programs import CONFIG, VOCAB_SIZE, full_weights, model_config, records, start, succeed, write_dataset


def with_moments(stored: StoredModel) -> StoredModel:
    """The same model, with moments that follow from its weights."""

    def moment(tensor: StoredTensor, factor: float) -> Tensor:
        return tensor.load(torch.float32).abs() * factor

    moments = {
        f"{kind}/{name}": StoredTensor(tensor.shape, torch.float32, partial(moment, tensor, 0.01 * (number + 1)))
        for number, kind in enumerate(MOMENTS)
        for name, tensor in stored.weights.items()
    }
    return replace(stored, optimizer=moments, optimizer_steps=11)


@pytest.mark.parametrize("model", [ODD, TIED, SCALED], ids=["odd", "tied", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(model, dtype, tmp_path: Path) -> None:
    stored = with_moments(random_model(model, dtype))
    formats.convert(stored, "native", tmp_path / "native", Options(step=40, max_shard_bytes=50_000))
    directory = tmp_path / "native" / "step_00000040"
    assert resolve_checkpoint(tmp_path / "native") == directory
    manifest = verify_checkpoint(directory)
    assert len(manifest.files) > 5, "several files"
    for path in (tmp_path / "native", directory):
        found = formats.open_stored("native", path, Options())
        assert_same(found, stored)
        assert (found.optimizer_steps, found.sequence_length, found.files) == (11, 32, {"tokenizer.model": b"not a real one"})
        assert all(torch.equal(found.optimizer[name].load(), tensor.load()) for name, tensor in stored.optimizer.items())


def test_weights_in_another_dtype(tmp_path: Path) -> None:
    """Moments stay in fp32 whatever the weights are written in."""
    stored = with_moments(random_model(ODD, torch.float32))
    formats.convert(stored, "native", tmp_path / "native", Options(dtype=torch.bfloat16))
    found = formats.open_stored("native", tmp_path / "native", Options())
    for name, tensor in loaded(found).items():
        assert torch.equal(tensor, stored.weights[name].load(torch.bfloat16))
    assert {tensor.dtype for tensor in found.optimizer.values()} == {torch.float32}


def test_a_copy_without_the_optimizers_files_will_do(tmp_path: Path) -> None:
    stored = with_moments(random_model(ODD))
    formats.convert(stored, "native", tmp_path / "native", Options())
    for path in tmp_path.glob("native/step_*/optimizer-*"):
        path.unlink()
    found = formats.open_stored("native", tmp_path / "native", Options())
    assert_same(found, stored)
    assert not found.optimizer


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def counted(tensor: StoredTensor) -> Tensor:
        nonlocal most
        read = tensor.read()
        alive.append(weakref.ref(read))
        most = max(most, sum(reference() is not None for reference in alive))
        return read

    stored = random_model(GROUPED, torch.float32)
    watched = {name: replace(tensor, read=partial(counted, tensor)) for name, tensor in stored.weights.items()}
    native.write(replace(stored, weights=watched), tmp_path, Options())
    assert len(alive) == len(stored.weights), "each is read once"
    assert most <= 2, "and given up for the next"


def test_damage_is_found_when_the_tensor_is_read(tmp_path: Path) -> None:
    formats.convert(random_model(ODD), "native", tmp_path / "native", Options())
    path = next(tmp_path.glob("native/step_*/weights-00000.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    stored = formats.open_stored("native", tmp_path / "native", Options())
    with pytest.raises(CheckpointError, match=r"weights-00000.safetensors, block 0 .* damaged: CRC32"):
        loaded(stored)


def test_what_is_no_checkpoint_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in .*found it empty"):
        formats.open_stored("native", tmp_path / "empty", Options())
    formats.convert(random_model(ODD), "native", tmp_path / "native", Options())
    with pytest.raises(CheckpointError, match="exists already"):
        formats.convert(random_model(ODD), "native", tmp_path / "native", Options())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's configuration and data, and a converted checkpoint of its model with moments."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.toml").write_text(CONFIG.replace('tokenizer = "tokenizer.model"\n', ""))
    for name, seed in (("train", 0), ("valid", 1)):
        write_dataset(folder / name, 900, seed)
    model = model_config()
    assert model.vocab_size == VOCAB_SIZE
    formats.convert(with_moments(random_model(model, torch.float32)), "native", folder / "native", Options(step=2))
    return folder


def test_evaluate_opens_it_in_any_layout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    alone = succeed("evaluate", "--checkpoint", "native", "--data", "valid")
    split = succeed("evaluate", "--checkpoint", "native", "--data", "valid", "--parallel.tp", 2, ranks=2)
    assert "held-out loss" in alone and alone == split


def test_training_goes_on_from_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With moments and the count of steps; what it saves then is a checkpoint as any."""
    monkeypatch.chdir(folder)
    arguments = ("--config", "run.toml", "--log.directory", tmp_path / "run", "--train.exit_step", 4)
    succeed("train", *arguments, "--checkpoint.load", "native", "--parallel.tp", 2, ranks=2)
    assert list(records(tmp_path / "run")) == [3, 4]
    state = read_manifest(resolve_checkpoint(tmp_path / "run")).state
    assert state["optimizer_steps"] == 11 + 2 and state["position"]["step"] == 4


def test_weights_in_bf16_are_evaluated_and_trained_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a published model is: no optimizer, 16 bits. A new run starts from it at step 0, with fp32 masters."""
    monkeypatch.chdir(folder)
    formats.convert(random_model(model_config(), torch.bfloat16), "native", tmp_path / "half", Options())
    assert "held-out loss" in succeed("evaluate", "--checkpoint", tmp_path / "half", "--data", "valid")
    arguments = ("--config", "run.toml", "--log.directory", tmp_path / "run", "--train.exit_step", 1)
    succeed("train", *arguments, "--checkpoint.weights_from", tmp_path / "half", "--parallel.tp", 2, ranks=2)
    state = read_manifest(resolve_checkpoint(tmp_path / "run")).state
    assert state["optimizer_steps"] == state["position"]["step"] == 1
    drift = full_weights(resolve_checkpoint(tmp_path / "run"))["norm"] - random_model(model_config()).weights["norm"].load()
    assert 0 < drift.abs().max() < 0.01, "one step away from where it started"


def test_training_refuses_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ended = start(
        "train", "--config", "run.toml", "--log.directory", tmp_path / "run", "--checkpoint.load", "native",
        "--model.num_layers", 3,
    )  # fmt: skip
    assert ended[0].code == 78 and "num_layers = 2 (this run has 3)" in ended[0].err
