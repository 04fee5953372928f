"""Megatron-LM's files per rank: against megatron-core's own GPTModel, and there and back."""

from __future__ import annotations

import io
import random
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop import megatron_legacy
from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.megatron_layout import core_tensors
from megatron_llama.interop.stored_model import Options, StoredModel
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.interop.core_models import build_core_model, core_args, core_logits
from tests.megatron_llama.interop.models import GROUPED, ODD, PLAIN, SCALED, TIED, assert_same, loaded, random_model
from tests.ranks import run_ranks

FILE = "model_optim_rng.pt"
LOCAL = Options(transformer_impl="local")
CASES = {
    "tp1": (PLAIN, 1),
    "odd": (ODD, 1),
    "gqa, tp2": (GROUPED, 2),
    "scaled, tp2": (SCALED, 2),
    "odd, tp2": (ODD, 2),
    "tied, tp2": (TIED, 2),
    "tp above the key heads": (SCALED, 4),
}


@pytest.fixture(scope="module")
def references() -> None:
    """megatron-core and transformers, imported here so that forked ranks have them."""
    pytest.importorskip("transformers")
    pytest.importorskip("megatron.core.models.gpt.gpt_model")


def tokens_for(model: ModelConfig) -> Tensor:
    return torch.randint(model.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))


def transformers_logits(model: ModelConfig, weights: dict[str, Tensor]) -> Tensor:
    from tests.parity.hugging_face import build

    return build(model, weights)(tokens_for(model)).logits.detach()


def save_as_megatron(rank: int, tp: int, model: ModelConfig, root: Path) -> Tensor:
    """Save a GPTModel of random weights as Megatron-LM does, and return its logits."""
    core_model = build_core_model(model, tp)
    with torch.no_grad():
        for parameter in core_model.parameters():
            draws = torch.Generator().manual_seed(rank if parameter.dim() > 1 else 0)
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=draws)
    folder = root / "iter_0000100" / f"mp_rank_{rank:02d}"
    folder.mkdir(parents=True)
    random_states = {"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}
    content = {
        "args": core_args(model, tp),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": core_model.state_dict() | {"decoder.layers.0.self_attention.linear_qkv._extra_state": io.BytesIO(b"fp8")},
        "optimizer": {"optimizer": {"param_groups": [{"lr": 1e-4}], "state": {0: torch.ones(3)}}},
        "rng_state": [random_states | {"torch_rng_state": torch.get_rng_state()}],
    }
    torch.save(content, folder / FILE)
    if rank == 0:
        (root / "latest_checkpointed_iteration.txt").write_text("100")
    return core_logits(core_model, tokens_for(model), model.vocab_size)


def load_as_megatron(rank: int, world_size: int, model: ModelConfig, tp: int, root: Path) -> Tensor | None:
    """Load our files strictly into megatron-core's models; the logits, where a rank has the whole pipeline."""
    pp = world_size // tp
    core_model = build_core_model(model, tp, pp)
    place = f"mp_rank_{rank % tp:02d}" + (f"_{rank // tp:03d}" if pp > 1 else "")
    content = torch.load(root / "release" / place / FILE, weights_only=False)
    assert content["args"].num_layers == model.num_layers and content["checkpoint_version"] == 3.0
    core_model.load_state_dict(content["model"], strict=True)
    return core_logits(core_model, tokens_for(model), model.vocab_size) if pp == 1 else None


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize(("model", "tp"), CASES.values(), ids=CASES)
def test_what_megatron_core_saved_computes_the_same(model: ModelConfig, tp: int, tmp_path: Path) -> None:
    logits = run_ranks(tp, save_as_megatron, model, tmp_path)
    found = open_stored("megatron-legacy", tmp_path, Options(model=model))
    assert found.sequence_length == 64
    expected = transformers_logits(model, loaded(found))
    assert expected.std() > 0.05
    for theirs in logits:
        assert (theirs - expected).abs().max() < 1e-5


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize(("model", "tp"), CASES.values(), ids=CASES)
def test_megatron_core_computes_the_same_with_our_files(model: ModelConfig, tp: int, tmp_path: Path) -> None:
    stored = random_model(model, torch.float32)
    convert(stored, "megatron-legacy", tmp_path / "megatron", replace(LOCAL, tp=tp))
    expected = transformers_logits(model, loaded(stored))
    for logits in run_ranks(tp, load_as_megatron, model, tp, tmp_path / "megatron"):
        assert (logits - expected).abs().max() < 1e-5


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("model", [GROUPED, TIED], ids=["untied", "tied"])
def test_megatron_core_takes_our_pipeline_stages(model: ModelConfig, tmp_path: Path) -> None:
    convert(random_model(model), "megatron-legacy", tmp_path / "megatron", replace(LOCAL, tp=2, pp=2))
    run_ranks(4, load_as_megatron, model, 2, tmp_path / "megatron")


def written(stored: StoredModel, directory: Path, **options: Any) -> Path:
    directory.mkdir()
    megatron_legacy.write(stored, directory, Options(**options))
    return directory


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("model", [ODD, GROUPED, TIED], ids=["odd", "gqa", "tied"])
def test_there_and_back(model: ModelConfig, tp: int, pp: int, impl: str, tmp_path: Path) -> None:
    model = replace(model, ffn_hidden_size=96)
    stored = random_model(model)
    root = written(stored, tmp_path / "megatron", tp=tp, pp=pp, transformer_impl=impl)
    found = open_stored("megatron-legacy", root, Options())
    assert_same(found, stored)
    assert found.sequence_length == 32 and found.files == stored.files
    assert_same(open_stored("megatron-legacy", root / "release", Options()), stored)


def test_names_of_transformer_engine(tmp_path: Path) -> None:
    content = torch.load(written(random_model(PLAIN), tmp_path / "m") / "release/mp_rank_00" / FILE, weights_only=False)
    names = {name for name in content["model"] if ".layers.1." in name}
    assert names == {
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "decoder.layers.1.self_attention.linear_proj.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
    }
    assert content["args"].transformer_impl == "transformer_engine"


def old_name(name: str) -> tuple[str, str]:
    """Megatron-Core's name -> the table inside `language_model` and the name in it, of Megatron-LM in 2023."""
    if name.startswith("decoder.layers."):
        for new, old in (
            ("self_attention.linear_qkv", "self_attention.query_key_value"),
            ("self_attention.linear_proj", "self_attention.dense"),
            ("pre_mlp_layernorm", "post_attention_norm"),
            ("input_layernorm", "input_norm"),
            ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
            ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
        ):
            name = name.replace(new, old)
        return "encoder", name.removeprefix("decoder.")
    if name == "decoder.final_layernorm.weight":
        return "encoder", "final_norm.weight"
    return {"embedding.word_embeddings.weight": ("embedding", "word_embeddings.weight")}.get(name, ("output_layer", "weight"))


def to_old_names(content: dict[str, Any]) -> None:
    tables: dict[str, Any] = {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}
    for name, tensor in content["model"].items():
        table, rest = old_name(name)
        tables[table][rest] = tensor
    if "word_embeddings.weight" in tables["embedding"]:
        tables["embedding"]["word_embeddings"]["weight"] = tables["embedding"].pop("word_embeddings.weight")
    tables["encoder"]["layers.0.self_attention.rotary_emb.inv_freq"] = torch.ones(4)
    content["model"] = {"language_model": {name: table for name, table in tables.items() if table}}


@pytest.mark.parametrize("version", [2, 3.0])
def test_names_of_2023(version: float, tmp_path: Path) -> None:
    stored = random_model(GROUPED)
    root = written(stored, tmp_path / "megatron", tp=2, pp=2, transformer_impl="local")
    for stage in (0, 1):
        for rank in (0, 1):
            edit(root, lambda c: (to_old_names(c), c.update(checkpoint_version=version)), f"mp_rank_{rank:02d}_{stage:03d}")
    assert_same(open_stored("megatron-legacy", root, Options()), stored)


def test_tied_copy_under_its_old_name(tmp_path: Path) -> None:
    stored = random_model(TIED)
    root = written(stored, tmp_path / "megatron", pp=2)

    def rename(content: dict[str, Any]) -> None:
        content["model"]["word_embeddings_for_head"] = {"weight": content["model"].pop("output_layer.weight")}

    edit(root, rename, "mp_rank_00_001")
    assert_same(open_stored("megatron-legacy", root, Options()), stored)


def test_interleaved_stages(tmp_path: Path) -> None:
    """Two ranks with two chunks each hold the layers 0 and 2, 1 and 3."""
    stored = random_model(replace(GROUPED, num_layers=4))
    root = written(stored, tmp_path / "megatron", pp=4)
    held = [torch.load(root / f"release/mp_rank_00_{stage:03d}" / FILE, weights_only=False) for stage in range(4)]
    shutil.rmtree(root / "release")
    for stage in (0, 1):
        content = held[stage] | {"model0": held[stage]["model"], "model1": held[stage + 2]["model"]}
        del content["model"]
        folder = root / f"release/mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        torch.save(content, folder / FILE)
    assert_same(open_stored("megatron-legacy", root, Options()), stored)


def test_vocabulary_comes_from_the_user_where_only_the_padded_size_is_told(tmp_path: Path) -> None:
    stored = random_model(ODD)
    root = written(stored, tmp_path / "megatron")
    (root / "megatron_llama.json").unlink()
    edit(root, lambda content: setattr(content["args"], "vocab_size", None))
    with pytest.raises(ConfigError, match="the vocabulary.* 256: give --model PRESET"):
        open_stored("megatron-legacy", root, Options())
    assert_same(open_stored("megatron-legacy", root, Options(model=ODD)), stored)


def edit(root: Path, change: Callable[[dict[str, Any]], object], place: str = "mp_rank_00") -> None:
    path = root / "release" / place / FILE
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def with_model(change: Callable[[dict[str, Tensor]], object], place: str = "mp_rank_01_000") -> Callable[[Path], None]:
    return lambda root: edit(root, lambda content: change(content["model"]), place)


def with_args(**values: object) -> Callable[[Path], None]:
    return lambda root: edit(root, lambda content: vars(content["args"]).update(values), "mp_rank_00_000")


def tracker(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "latest_checkpointed_iteration.txt").write_text(text)


FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.layers.0.pre_mlp_layernorm.weight"
TABLE = "embedding.word_embeddings.weight"
DAMAGE = {
    "no tracker": (lambda r: (r / "latest_checkpointed_iteration.txt").unlink(), "it is no checkpoint of Megatron-LM"),
    "tracker": (tracker("../../elsewhere"), "says '../../elsewhere', neither an iteration nor `release`"),
    "another iteration": (tracker("7"), "iter_0000007 has no folders mp_rank_XX: it is incomplete"),
    "missing rank": (lambda r: shutil.rmtree(r / "release/mp_rank_01_000"), "lacks the folder of tensor rank 1,"),
    "missing file": (lambda r: (r / "release/mp_rank_01_001" / FILE).unlink(), "mp_rank_01_001/model_optim_rng.pt does not"),
    "cut short": (lambda r: (r / "release/mp_rank_01_001" / FILE).write_bytes(b"PK\3\4"), "mp_rank_01_001.* cannot be read"),
    "experts": (lambda r: (r / "release/mp_rank_00_000_000").mkdir(), "experts have a third number"),
    "version": (lambda r: edit(r, lambda c: c.update(checkpoint_version=1.0), "mp_rank_00_000"), "checkpoint_version 1.0"),
    "no model": (lambda r: edit(r, lambda c: c.pop("model"), "mp_rank_00_000"), "holds no table 'model' of weights"),
    "another normalization": (with_args(normalization="LayerNorm"), "normalization is 'LayerNorm'"),
    "padding": (with_args(padded_vocab_size=128_256), "vocabulary with padding has 128256 rows, and model.vocab_size is 136"),
    "experts in args": (with_args(num_experts=8), "num_experts is 8"),
    "absurd": (with_args(num_layers=10**12), "no model has|num_layers"),
    "missing tensor": (with_model(lambda m: m.pop(FC2)), f"tensor rank 1 lacks 1 tensors: {FC2}"),
    "unknown tensor": (with_model(lambda m: m.update(bias=m[FC2])), "tensor rank 1 has, .* 1 tensors: bias"),
    "shape": (with_model(lambda m: m.update({FC2: m[FC2][:3]})), rf"{FC2} is \[3, 48\] torch.bfloat16 on tensor rank 1"),
    "dtype": (with_model(lambda m: m.update({FC2: m[FC2].float()})), "torch.float32 on tensor rank 1"),
    "short table": (with_model(lambda m: m.update({TABLE: m[TABLE][:3]}), "mp_rank_00_000"), rf"{TABLE} is \[3, 64\]"),
    "not a tensor": (with_model(lambda m: m.update({FC2: 3})), f"{FC2} is int, not a tensor of weights"),
    "norms differ": (with_model(lambda m: m[NORM].add_(1)), "pre_mlp_layernorm.weight is not the same on all ranks"),
    "tied tables differ": (
        with_model(lambda m: m["output_layer.weight"].add_(1), "mp_rank_01_001"),
        f"{TABLE} is not the same on all ranks",
    ),
}


@pytest.fixture(scope="module")
def four_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TIED for tp 2, pp 2; not to be changed."""
    folder = tmp_path_factory.mktemp("four") / "megatron"
    return written(random_model(TIED), folder, tp=2, pp=2, transformer_impl="local")


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(spoil: Callable[[Path], object], message: str, four_files: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(four_files, tmp_path / "megatron"))
    spoil(root)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        loaded(open_stored("megatron-legacy", root, Options()))


def test_torch_dist_is_told(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "iter_0000005/.metadata").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    with pytest.raises(CheckpointError, match="use --from megatron"):
        open_stored("megatron-legacy", tmp_path, Options())


class Hostile:
    """Pickles as a call that writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("inside", ["args", "model"])
def test_hostile_file_runs_nothing(inside: str, tmp_path: Path) -> None:
    root = written(random_model(PLAIN), tmp_path / "megatron")
    edit(root, lambda content: content.update({inside: Namespace(x=Hostile(tmp_path / "marker"))}))
    with pytest.raises(CheckpointError, match=re.escape(FILE)):
        open_stored("megatron-legacy", root, Options())
    assert not (tmp_path / "marker").exists()


REFUSED = {
    "layers": (PLAIN, Options(pp=3), "--pp 3: Megatron's stages have equal parts, and model.num_layers is 2"),
    "heads": (PLAIN, Options(tp=3), "model.num_heads is 8"),
    "feed-forward": (ODD, Options(tp=4), "model.ffn_hidden_size is 90"),
    "groups": (replace(PLAIN, num_heads=6, num_kv_heads=3, hidden_size=96), Options(tp=2), "take --tp 3"),
    "scaling": (replace(SCALED, rope_original_context=4096), Options(), "rope_original_context is 4096"),
}


@pytest.mark.parametrize(("model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_megatron_cannot_split(model: ModelConfig, options: Options, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(random_model(model), "megatron-legacy", tmp_path / "megatron", options)
    assert not list(tmp_path.iterdir())


def test_every_tensor_has_one_name() -> None:
    parts = [part for tensor in core_tensors(TIED) for part in tensor.parts]
    assert sorted(parts) == sorted(random_model(TIED).weights)
