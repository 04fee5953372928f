"""Meta's files: against a forward pass of its layout written down here, and there and back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.config.presets import PRESETS
from megatron_llama.interop import meta
from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.meta_params import feed_forward_size, read_params, write_params
from megatron_llama.interop.stored_model import Options, StoredModel
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.interop.models import GROUPED, ODD, PLAIN, SCALED, TIED, assert_same, loaded, random_model

CASES = {
    "llama-1, 1 file": (PLAIN, 1),
    "llama-1, 2 files": (PLAIN, 2),
    "llama-1, 8 files": (PLAIN, 8),
    "gqa, 4 files": (GROUPED, 4),
    "gqa, more files than key heads": (GROUPED, 8),
    "scaled, 4 files": (SCALED, 4),
    "odd": (ODD, 1),
    "tied": (TIED, 2),
}


def written(stored: StoredModel, directory: Path, mp: int) -> Path:
    directory.mkdir()
    meta.write(stored, directory, Options(tp=mp))
    return directory


@pytest.fixture(scope="module")
def eight_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GROUPED in 8 files; not to be changed."""
    return written(random_model(GROUPED), tmp_path_factory.mktemp("eight") / "meta", 8)


def shards_of(directory: Path) -> list[dict[str, Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(directory.glob("consolidated.*.pth"))]


def meta_logits(shards: list[dict[str, Tensor]], params: dict, factor: float, tokens: Tensor) -> Tensor:
    """Logits [s, v] of Meta's model, computed as its model-parallel ranks do: each with its shard, summed or joined."""
    mp, d = len(shards), params["dim"] // params["n_heads"]
    heads, key_heads = params["n_heads"] // mp, max(params.get("n_kv_heads", params["n_heads"]) // mp, 1)
    turns = rotations(params, factor, d, len(tokens))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * shards[0][f"{name}.weight"]

    def turned(x: Tensor, n: int) -> Tensor:
        pairs = torch.view_as_complex(x.view(len(tokens), n, d // 2, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    def attention(x: Tensor, shard: dict[str, Tensor], layer: str) -> Tensor:
        q, k, v = (x @ shard[f"{layer}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        q, k, v = turned(q, heads), turned(k, key_heads), v.view(len(tokens), key_heads, d)
        k, v = (y.repeat_interleave(heads // key_heads, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(*(y.transpose(0, 1) for y in (q, k, v)), is_causal=True)
        return y.transpose(0, 1).flatten(1) @ shard[f"{layer}.attention.wo.weight"].T

    def feed_forward(x: Tensor, shard: dict[str, Tensor], layer: str) -> Tensor:
        w1, w2, w3 = (shard[f"{layer}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    tables = [shard["tok_embeddings.weight"] for shard in shards]
    by_rows = tables[0].shape[1] == params["dim"]
    x = torch.cat(tables)[tokens] if by_rows else torch.cat([table[tokens] for table in tables], -1)
    for layer in (f"layers.{number}" for number in range(params["n_layers"])):
        y = norm(x, f"{layer}.attention_norm")
        x = x + sum(attention(y, shard, layer) for shard in shards)
        y = norm(x, f"{layer}.ffn_norm")
        x = x + sum(feed_forward(y, shard, layer) for shard in shards)
    return torch.cat([norm(x, "norm") @ shard["output.weight"].T for shard in shards], -1)


def rotations(params: dict, factor: float, d: int, length: int) -> Tensor:
    """Unit complex numbers [s, d/2]."""
    frequencies = params.get("rope_theta", 10_000.0) ** -(torch.arange(0, d, 2) / d)
    if params.get("use_scaled_rope"):
        waves = 2 * math.pi / frequencies
        smooth = (8192 / waves - 1) / (4 - 1)
        middle = (1 - smooth) * frequencies / factor + smooth * frequencies
        frequencies = torch.where(waves > 8192, frequencies / factor, torch.where(waves < 2048, frequencies, middle))
    angles = torch.outer(torch.arange(length), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


@pytest.mark.parametrize(("model", "mp"), CASES.values(), ids=CASES)
def test_the_files_compute_what_transformers_computes(model: ModelConfig, mp: int, tmp_path: Path) -> None:
    build = pytest.importorskip("tests.parity.hugging_face").build
    stored = random_model(model, torch.float32)
    directory = written(stored, tmp_path / "meta", mp)
    params = json.loads((directory / "params.json").read_text())
    tokens = torch.randint(model.vocab_size, (64,), generator=torch.Generator().manual_seed(1))
    found = meta_logits(shards_of(directory), params, model.rope_scaling_factor, tokens)
    expected = build(model, loaded(stored))(tokens[None]).logits[0].detach()
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("model", "mp"), CASES.values(), ids=CASES)
def test_there_and_back(model: ModelConfig, mp: int, tmp_path: Path) -> None:
    stored = random_model(model)
    found = open_stored("meta", written(stored, tmp_path / "meta", mp), Options())
    assert_same(found, stored)
    assert found.sequence_length == 32 and found.files == stored.files
    assert sorted(path.name for path in (tmp_path / "meta").iterdir()) == sorted(
        ["megatron_llama.json", "params.json", "tokenizer.model", *(f"consolidated.{rank:02d}.pth" for rank in range(mp))]
    )


@pytest.mark.parametrize("model", [PLAIN, GROUPED, SCALED], ids=["llama-1", "llama-3", "llama-3.1"])
@pytest.mark.parametrize("mp", [1, 4])
def test_what_meta_released_needs_no_sidecar(model: ModelConfig, mp: int, tmp_path: Path) -> None:
    stored = random_model(model)
    directory = written(stored, tmp_path / "7B", mp)
    (directory / "megatron_llama.json").unlink()
    (directory / "tokenizer.model").rename(tmp_path / "tokenizer.model")  # LLaMA 1 has it above the sizes
    edit_params(directory, vocab_size=-1)
    shards = shards_of(directory)
    for shard in shards:
        shard["rope.freqs"] = torch.ones(4)
    save(directory, shards)
    found = open_stored("meta", directory, Options())
    assert_same(found, stored)
    assert found.files == stored.files and found.sequence_length == 0


def test_embedding_is_split_as_the_generation_has_it(tmp_path: Path) -> None:
    first, third = (written(random_model(model), tmp_path / name, 4) for model, name in ((PLAIN, "1"), (GROUPED, "3")))
    assert shards_of(first)[0]["tok_embeddings.weight"].shape == (136, 16)
    assert shards_of(third)[0]["tok_embeddings.weight"].shape == (34, 64)


def test_dtype_of_the_result(tmp_path: Path) -> None:
    convert(random_model(PLAIN), "meta", tmp_path / "meta", Options(dtype=torch.float16))
    assert {tensor.dtype for tensor in shards_of(tmp_path / "meta")[0].values()} == {torch.float16}


def test_tied_model_needs_its_factor(tmp_path: Path) -> None:
    stored = random_model(TIED)
    directory = written(stored, tmp_path / "meta", 1)
    (directory / "megatron_llama.json").unlink()
    with pytest.raises(ConfigError, match="give --model llama-3.2-1b"):
        open_stored("meta", directory, Options())
    assert_same(open_stored("meta", directory, Options(model=TIED)), stored)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.hidden_size >= 2048], ids=lambda preset: preset.name)
def test_params_of_every_published_size(preset) -> None:
    family = preset.family
    model = ModelConfig(
        num_layers=preset.num_layers,
        hidden_size=preset.hidden_size,
        num_heads=preset.num_heads,
        num_kv_heads=preset.num_kv_heads,
        ffn_hidden_size=preset.ffn_hidden_size,
        vocab_size=family.vocab_size,
        rope_theta=family.rope_theta,
        rope_scaling_factor=min(family.rope_scaling_factor, 8.0),
        norm_eps=family.norm_eps,
    )
    assert ModelConfig(**read_params(write_params(model), Path("params.json"))) == model


def test_feed_forward_formula() -> None:
    released = {(4096, 256, None): 11008, (8192, 4096, 1.3): 28672, (4096, 1024, 1.3): 14336, (2048, 256, 1.5): 8192}
    assert {terms: feed_forward_size(*terms) for terms in released} == released


def edit_params(directory: Path, **values: object) -> None:
    path = directory / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save(directory: Path, shards: list[dict[str, Tensor]]) -> None:
    for rank, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")


def with_shard(change: Callable[[dict[str, Tensor]], object], rank: int = 1) -> Callable[[Path], None]:
    """A spoiler that changes one shard."""

    def spoil(directory: Path) -> None:
        shards = shards_of(directory)
        change(shards[rank])
        save(directory, shards)

    return spoil


def narrow_embeddings(directory: Path) -> None:
    shards = shards_of(directory)
    save(directory, [shard | {"tok_embeddings.weight": torch.ones(136, 5)} for shard in shards])


def with_params(**values: object) -> Callable[[Path], None]:
    return lambda directory: edit_params(directory, **values)


WQ, WK, NORM = "layers.1.attention.wq.weight", "layers.1.attention.wk.weight", "layers.1.ffn_norm.weight"
DAMAGE = {
    "no params.json": (lambda d: (d / "params.json").unlink(), "params.json cannot be read: No such file"),
    "params.json cut short": (lambda d: (d / "params.json").write_text("{"), "is not JSON"),
    "params.json is a list": (lambda d: (d / "params.json").write_text("[]"), "holds no object"),
    "no dim": (with_params(dim=None), "lacks dim"),
    "text": (with_params(n_heads="8"), "n_heads = '8' is not an integer"),
    "absurd": (with_params(n_layers=10**30), "is not an integer that a model can have"),
    "many layers": (with_params(n_layers=10**9), "num_layers is 1000000000, not 2"),
    "mistral": (with_params(sliding_window=4096), "sliding_window: not of a text model"),
    "another model": (with_params(n_layers=3), "num_layers is 3, not 2"),
    "no files": (lambda d: [file.unlink() for file in d.glob("*.pth")], "has no consolidated.00.pth"),
    "hole": (lambda d: (d / "consolidated.01.pth").unlink(), "has 7 files of weights, but not consolidated.01.pth"),
    "last file missing": (lambda d: (d / "consolidated.07.pth").unlink(), "7 files need"),
    "file cut short": (lambda d: (d / "consolidated.01.pth").write_bytes(b"PK"), "consolidated.01.pth cannot be read"),
    "missing tensor": (with_shard(lambda s: s.pop(WQ)), "consolidated.01.pth lacks 1 tensors: layers.1.attention.wq"),
    "unknown tensor": (with_shard(lambda s: s.update(bias=s[WQ])), "architecture has not, 1 tensors: bias"),
    "shape": (with_shard(lambda s: s.update({WQ: s[WQ][:4]})), r"wq.weight is \[4, 64\]"),
    "dtype": (with_shard(lambda s: s.update({WQ: s[WQ].float()})), "wq.weight is .* torch.float32"),
    "integers": (with_shard(lambda s: s.update({WQ: s[WQ].int()})), "is torch.int32, not weights in 16 or 32 bits"),
    "not a tensor": (with_shard(lambda s: s.update({WQ: 3})), "is int, not weights"),
    "norms differ": (with_shard(lambda s: s[NORM].add_(1)), "layers.1.ffn_norm.weight is not the same in files 0 and 1"),
    "key heads differ": (with_shard(lambda s: s[WK].add_(1)), "layers.1.attention.wk.weight is not the same in files 0 and 1"),
    "embedding": (with_shard(lambda s: s.update({"tok_embeddings.weight": torch.ones(3, 5)})), r"is \[3, 5\], in the first"),
    "other embeddings": (lambda d: narrow_embeddings(d), "is a file missing"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(spoil: Callable[[Path], object], message: str, eight_files: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(eight_files, tmp_path / "meta"))
    spoil(directory)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        loaded(open_stored("meta", directory, Options()))


class Hostile:
    """Pickles as a call that writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_hostile_file_runs_nothing(tmp_path: Path) -> None:
    directory = written(random_model(PLAIN), tmp_path / "meta", 1)
    torch.save({"tok_embeddings.weight": Hostile(tmp_path / "marker")}, directory / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="consolidated.00.pth cannot be read as tensors and plain values"):
        open_stored("meta", directory, Options())
    assert not (tmp_path / "marker").exists()


REFUSED = {
    "pp": (PLAIN, Options(pp=2), "--pp 2: Meta's files are split by --tp alone"),
    "heads": (PLAIN, Options(tp=3), "model.num_heads is 8"),
    "vocabulary": (ODD, Options(tp=2), "model.vocab_size is 131"),
    "key heads": (replace(PLAIN, num_heads=6, num_kv_heads=3, hidden_size=96, vocab_size=128), Options(tp=2), "take --tp 3"),
    "scaling": (replace(SCALED, rope_scaling_factor=4.0), Options(), "model.rope_scaling_factor = 4.0"),
    "context": (replace(SCALED, rope_original_context=4096), Options(), "model.rope_original_context = 4096"),
}


@pytest.mark.parametrize(("model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_meta_cannot_hold(model: ModelConfig, options: Options, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(random_model(model), "meta", tmp_path / "meta", options)
    assert not list(tmp_path.iterdir())


def test_weights_are_read_one_by_one(tmp_path: Path) -> None:
    stored = random_model(GROUPED)
    found = meta.read(written(stored, tmp_path / "meta", 2), Options())
    one = found.weights["layers.1.attention.wk"]
    assert torch.equal(one.load(torch.float32), stored.weights["layers.1.attention.wk"].load().float())
