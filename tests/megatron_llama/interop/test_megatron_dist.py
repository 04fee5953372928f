"""Megatron-Core's torch_dist checkpoints against megatron-core itself, both ways."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.dcp_files import Chunk, DcpFolder, DcpTensor, write_dcp
from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.megatron_args import read_args, written_args
from megatron_llama.interop.stored_model import Options
from megatron_llama.interop.verify import our_logits, prompts
from parallel.errors import CheckpointError, ConfigError
from parallel.shards import Box
from tests.megatron_llama.interop.core_models import build_core_model, core_args, core_logits, draw_weights
from tests.megatron_llama.interop.models import GROUPED, ODD, SCALED, TIED, assert_same, random_model
from tests.ranks import run_ranks

dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")

PER_LAYER = {"non_homogeneous_layers": True, "singleton_local_shards": False}
SINGLETONS = {"non_homogeneous_layers": True, "singleton_local_shards": True}


def pass_through(
    rank: int, tp: int, model: ModelConfig, source: Path | None, result: Path | None, content: dict | None = None
) -> Tensor:
    """megatron-core loads `source` (else draws weights), computes logits and saves to `result`, all on tp ranks."""
    torch.manual_seed(0)
    core = build_core_model(model, tp)
    if source is None:
        draw_weights(core)
    else:
        content_found = dist_checkpointing.load_content_metadata(str(source))
        state = dist_checkpointing.load({"model": core.sharded_state_dict(metadata=content_found)}, str(source))
        core.load_state_dict(state["model"])
    if result is not None:
        state = {"model": core.sharded_state_dict(metadata=content), "args": core_args(model, tp), "iteration": 7}
        dist_checkpointing.save(state, str(result), content_metadata=content)
    return core_logits(core, prompts(model), model.vocab_size)


def saved_by_core(folder: Path, model: ModelConfig, content: dict | None = None) -> tuple[Path, Tensor]:
    """A run's folder with one iteration, and the logits of its model."""
    iteration = folder / "iter_0000007"
    iteration.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder, run_ranks(1, pass_through, model, None, iteration, content)[0]


@pytest.mark.parametrize(
    ("model", "content"),
    [(GROUPED, None), (SCALED, PER_LAYER), (TIED, None), (ODD, SINGLETONS)],
    ids=["stacked layers", "layer by layer", "tied", "gate and up apart"],
)
def test_import(tmp_path: Path, model: ModelConfig, content: dict | None) -> None:
    folder, logits = saved_by_core(tmp_path / "run", model, content)
    stored = open_stored("megatron", folder, Options(model=model))
    assert stored.sequence_length == 64 and stored.model == model and not stored.optimizer
    torch.testing.assert_close(our_logits(stored, prompts(model)), logits, rtol=0, atol=2e-5)
    assert_same(open_stored("megatron", folder / "iter_0000007", Options(model=model)), stored)


@pytest.mark.parametrize("model", [GROUPED, SCALED, TIED, ODD], ids=["gqa", "scaled", "tied", "odd"])
def test_export(tmp_path: Path, model: ModelConfig) -> None:
    stored = random_model(model, torch.float32)
    convert(stored, "megatron", tmp_path / "core", Options())
    assert (tmp_path / "core" / "latest_checkpointed_iteration.txt").read_text() == "release"
    logits = run_ranks(1, pass_through, model, tmp_path / "core" / "release", None)[0]
    torch.testing.assert_close(our_logits(stored, prompts(model)), logits, rtol=0, atol=2e-5)
    back = open_stored("megatron", tmp_path / "core", Options())  # our arguments tell the vocabulary
    assert_same(back, stored)
    assert back.files == stored.files and back.sequence_length == stored.sequence_length


def test_export_through_two_tensor_parallel_ranks_of_core_and_back(tmp_path: Path) -> None:
    """Written with the padding of tp 1; core loads it on 2 ranks, where the padding is more, and saves it again."""
    stored = random_model(GROUPED, torch.float32)
    convert(stored, "megatron", tmp_path / "core", Options())
    (tmp_path / "again").mkdir()
    logits = run_ranks(2, pass_through, GROUPED, tmp_path / "core" / "release", tmp_path / "again")
    torch.testing.assert_close(our_logits(stored, prompts(GROUPED)), logits[0], rtol=0, atol=2e-5)
    assert_same(open_stored("megatron", tmp_path / "again", Options(model=GROUPED)), stored)


def test_dtype_and_padding(tmp_path: Path) -> None:
    stored = random_model(ODD, torch.float32)
    convert(stored, "megatron", tmp_path / "core", Options(dtype=torch.bfloat16, tp=2))
    found = open_stored("megatron", tmp_path / "core", Options())
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.bfloat16}
    name = "feed_forward.w3"
    assert torch.equal(found.weights[f"layers.1.{name}"].load(), stored.weights[f"layers.1.{name}"].load(torch.bfloat16))
    args = torch.load(tmp_path / "core/release/common.pt", weights_only=False)["args"]
    assert args.padded_vocab_size == 256 and args.vocab_size == 131 and args.no_save_optim


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GROUPED; not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "core"
    convert(random_model(GROUPED), "megatron", folder, Options())
    return folder


def test_common_state_among_the_tensors(exported: Path, tmp_path: Path) -> None:
    """As Megatron-Core saves since 2026: no common.pt."""
    stored = open_stored("megatron", exported, Options())
    folder = tmp_path / "core"
    shutil.copytree(exported, folder)
    common = torch.load(folder / "release/common.pt", weights_only=False)
    torch.save([common], tmp_path / "common")
    (folder / "release/common.pt").unlink()
    with pytest.raises(ConfigError, match="holds no arguments of Megatron: give --model PRESET or --config FILE"):
        open_stored("megatron", folder, Options())
    assert_same(open_stored("megatron", folder, Options(model=GROUPED)), stored)
    shutil.rmtree(folder / "release")
    (folder / "release").mkdir()
    source = DcpFolder(exported / "release")
    chunks = [chunk_of(source.tensor(key)) for key in source.tensors]
    write_dcp(folder / "release", chunks, {"common_state/shard_0_1": (tmp_path / "common").read_bytes()})
    assert_same(open_stored("megatron", folder, Options()), stored)


def chunk_of(tensor: DcpTensor) -> Chunk:
    return Chunk(tensor.key, tensor.shape, Box.whole(tensor.shape), tensor.dtype, tensor.read)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_hostile_arguments_do_not_run(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "core")
    common = tmp_path / "core/release/common.pt"
    torch.save({"args": Namespace(num_layers=Hostile(tmp_path / "marker"))}, common)
    with pytest.raises(CheckpointError, match=r"common.pt cannot be read .*(posix|os|nt)"):
        open_stored("megatron", tmp_path / "core", Options())
    assert not (tmp_path / "marker").exists()
    common.write_bytes(b"not a file of torch")
    with pytest.raises(CheckpointError, match="common.pt cannot be read"):
        open_stored("megatron", tmp_path / "core", Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm': a LLaMA has 'RMSNorm'"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"num_layers": -2}, "the architecture in it can't be"),
        ({"hidden_size": "64"}, "the architecture in it can't be"),
        ({"num_layers": 1 << 40}, "no model has 1,099,511,627,776 layers"),
        ({"kv_channels": 16}, "kv_channels is 16: a LLaMA of this width has 8"),
        ({"vocab_size": None}, "with its padding only, 256: give --model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_another_model(changes: dict, message: str) -> None:
    args = written_args(random_model(GROUPED))
    vars(args).update(changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_args(args, "common.pt", None)


def test_arguments_disagree_with_the_model_given() -> None:
    args = written_args(random_model(GROUPED))
    with pytest.raises(ConfigError, match="common.pt is of another model .*: norm_eps is 1e-05, not 1e-06"):
        read_args(args, "common.pt", replace(GROUPED, norm_eps=1e-6))


def test_what_megatron_cannot_say(tmp_path: Path) -> None:
    model = replace(SCALED, rope_original_context=4096)
    with pytest.raises(ConfigError, match="rope_original_context is 4096: Megatron knows only 8192"):
        convert(random_model(model), "megatron", tmp_path / "core", Options())
    assert not (tmp_path / "core").exists()


def test_another_architecture_is_refused(exported: Path) -> None:
    with pytest.raises(ConfigError, match="is of another model"):
        open_stored("megatron", exported, Options(model=replace(GROUPED, num_layers=3)))


def test_missing_and_unknown_tensors(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "core"
    shutil.copytree(exported, folder)
    (folder / "release/common.pt").unlink()
    for model, message in (
        (replace(GROUPED, num_layers=3), "has no decoder.layers.2.input_layernorm.weight"),
        (replace(GROUPED, num_layers=1), "which the architecture does not have"),
        (replace(GROUPED, tie_embeddings=True), "has output_layer.weight, which the architecture does not have"),
        (replace(GROUPED, vocab_size=300), r"embedding.word_embeddings.weight is \[256, 64\], .* at least \[300, 64\]"),
        (replace(GROUPED, num_kv_heads=2), r"linear_qkv.weight is \[128, 64\], the architecture says \[96, 64\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_stored("megatron", folder, Options(model=model))


def test_a_tracker_that_names_nothing(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "core")
    (tmp_path / "core/latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match="says '../../etc', which is no iteration"):
        open_stored("megatron", tmp_path / "core", Options())
