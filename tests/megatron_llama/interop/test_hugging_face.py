"""Hugging Face folders, beside transformers: what it writes we read, what we write it reads, and both compute the same."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_llama.config import ParallelConfig, RunConfig, TrainConfig, load_config
from megatron_llama.data.loader import MicroBatch
from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.hugging_face import hugging_face_name, our_name
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.interop.verify import Side, compare, load_weights, our_logits, prompts
from megatron_llama.runtime import build_runtime
from parallel.collectives import all_gather
from parallel.errors import CheckpointError
from parallel.pipeline.schedules import forward_only
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # logits of about 10
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama-1": {"rms_norm_eps": 1e-6},
    "gqa": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "llama-3.1": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA_3_ROPE},
    "llama-3.2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA_3_ROPE},
}


def build(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **MODELS[name]))
    for parameter in module.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return module.to(dtype).eval()


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def in_style_of_version_4(path: Path) -> None:
    """Rewrite a config.json with the keys of transformers 4."""
    fields = json.loads(path.read_text())
    rope = fields.pop("rope_parameters")
    fields["torch_dtype"] = fields.pop("dtype")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    fields["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of each model as transformers 5 writes it; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    for name in MODELS:
        build(name).save_pretrained(root / name)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of one of them."""
    return Path(shutil.copytree(saved / "gqa", tmp_path / "gqa"))


def in_memory(stored: StoredModel) -> StoredModel:
    """As any other format would give it."""
    tensors = {name: tensor.load() for name, tensor in stored.weights.items()}
    weights = {name: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    return replace(stored, weights=weights)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def settings(config) -> dict:
    fields = config.to_dict()
    return {name: fields[name] for name in fields.keys() - {"transformers_version", "_name_or_path"}}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, dtype, version, tmp_path):
    build(name, dtype).save_pretrained(tmp_path / "source")
    theirs = load(tmp_path / "source")
    if version == 4:
        in_style_of_version_4(tmp_path / "source" / "config.json")
    stored = open_stored("hf", tmp_path / "source", Options())
    convert(in_memory(stored), "hf", tmp_path / "result", Options())
    names = sorted(path.name for path in (tmp_path / "result").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    again = load(tmp_path / "result")
    assert settings(again.config) == settings(theirs.config)
    weights = again.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert weights[key].dtype == dtype and torch.equal(weights[key], tensor), key
    tokens = prompts(stored.model)
    same = torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert same


def test_written_config_is_of_version_4(saved, tmp_path):
    """Its keys are read by every version; those of version 5 are not."""
    convert(open_stored("hf", saved / "llama-3.1", Options()), "hf", tmp_path / "result", Options(dtype=torch.float16))
    fields = json.loads((tmp_path / "result" / "config.json").read_text())
    assert fields["torch_dtype"] == "float16" and fields["rope_theta"] == 5000.0
    assert fields["rope_scaling"] == {key: value for key, value in LLAMA_3_ROPE.items() if key != "rope_theta"}
    assert not {"dtype", "rope_parameters"} & fields.keys()
    with open(tmp_path / "result" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt"} and {entry["dtype"] for entry in header.values()} == {"F16"}


def test_names():
    assert our_name("model.layers.11.mlp.up_proj.weight") == "layers.11.feed_forward.w3"
    assert our_name("model.layers.01.mlp.up_proj.weight") == "model.layers.01.mlp.up_proj.weight"
    assert our_name("model.layers.1.mlp.up_proj.bias") == "model.layers.1.mlp.up_proj.bias"
    for name in logical_shapes(load_config(["--model.preset", "llama-7b"]).model):
        assert our_name(hugging_face_name(name)) == name


# The same logits


def logits_of(rank: int, world_size: int, folder: Path) -> torch.Tensor:
    """Of the prompts, [b, s, v], by tensor-parallel ranks."""
    stored = open_stored("hf", folder, Options())
    parallel, train = ParallelConfig(tp=world_size, dp=1), TrainConfig(dtype="fp32", device="cpu")
    config = RunConfig(model=stored.model, parallel=parallel, train=train)
    runtime = build_runtime(config, rank, world_size, torch.device("cpu"), timedelta(seconds=60), fresh=False)
    load_weights(runtime.chunks[0], stored)
    tokens = prompts(stored.model).t().contiguous()
    length, batch = tokens.shape
    micro_batch = MicroBatch(tokens, None, None, torch.arange(length)[:, None])
    logits = runtime.executor(length, batch).run(forward_only(runtime.placement, 1)[0], [micro_batch])[0]
    whole = all_gather(logits.permute(2, 1, 0).contiguous(), runtime.groups.tp)  # [v, b, s]
    return whole[: stored.model.vocab_size].permute(1, 2, 0).detach()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tp, saved):
    stored = open_stored("hf", saved / name, Options())
    expected = build(name)(prompts(stored.model)).logits
    assert expected.abs().max() > 3
    for found in run_ranks(tp, logits_of, saved / name):
        assert (found - expected).abs().max().item() < 1e-5
    if tp == 1:
        assert (our_logits(stored, prompts(stored.model)) - expected).abs().max().item() < 1e-5


def test_compare_sees_a_wrong_model(saved, tmp_path):
    stored = open_stored("hf", saved / "gqa", Options())
    source = Side("hf", saved / "gqa", stored)
    good = compare(source, Side("memory", tmp_path, in_memory(stored)))
    assert good.same and 0 < good.difference < 1e-5 and good.readers[0].startswith("transformers")
    swapped = {"layers.1.attention.wk": stored.weights["layers.1.attention.wv"]}
    wrong = {
        "weights": replace(stored, weights={**stored.weights, **swapped}),
        "norm_eps": replace(stored, model=replace(stored.model, norm_eps=1e-3)),
        "theta": replace(stored, model=replace(stored.model, rope_theta=10_500.0)),
    }
    for what, model in wrong.items():
        comparison = compare(source, Side("memory", tmp_path, model))
        assert not comparison.same and comparison.difference > 1e-3, what
    nan = StoredTensor((64,), torch.float32, lambda: torch.full((64,), torch.nan))
    assert not compare(source, Side("memory", tmp_path, replace(stored, weights={**stored.weights, "norm": nan}))).same


def test_compare_leaves_out_rounding(saved, tmp_path):
    stored = open_stored("hf", saved / "gqa", Options())
    convert(stored, "hf", tmp_path / "result", Options(dtype=torch.bfloat16))
    result = Side("hf", tmp_path / "result", open_stored("hf", tmp_path / "result", Options()))
    for source in (Side("hf", saved / "gqa", stored), Side("memory", tmp_path, stored)):
        comparison = compare(source, result, torch.bfloat16)
        assert comparison.same and comparison.difference > 1e-2 and comparison.conversion < 1e-5


# Files


def test_shards(saved, tmp_path):
    stored = open_stored("hf", saved / "llama-1", Options())
    alive: list[weakref.ref] = []

    def watched(tensor: StoredTensor) -> StoredTensor:
        def read() -> torch.Tensor:
            assert all(earlier() is None for earlier in alive), "two tensors are in memory"
            found = tensor.read().clone()
            alive.append(weakref.ref(found))
            return found

        return replace(tensor, read=read)

    lazy = replace(stored, weights={name: watched(tensor) for name, tensor in stored.weights.items()})
    convert(lazy, "hf", tmp_path / "result", Options(max_shard_bytes=60_000))
    assert len(alive) == len(stored.weights)
    index = json.loads((tmp_path / "result" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)] and len(shards) > 3
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "result" / shard).values()) for shard in shards]
    assert max(sizes) <= 60_000 and index["metadata"]["total_size"] == sum(sizes)
    again = load(tmp_path / "result")
    for key, tensor in build("llama-1").state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
    back = open_stored("hf", tmp_path / "result", Options())
    assert all(torch.equal(back.weights[name].load(), stored.weights[name].load()) for name in stored.weights)


def test_tensors_of_several_dtypes(saved, tmp_path):
    stored = open_stored("hf", saved / "gqa", Options())
    half = StoredTensor((64,), torch.bfloat16, lambda: torch.ones(64, dtype=torch.bfloat16))
    mixed = replace(stored, weights={"norm": half, **{name: t for name, t in stored.weights.items() if name != "norm"}})
    convert(mixed, "hf", tmp_path / "result", Options())
    back = open_stored("hf", tmp_path / "result", Options())
    assert back.weights["norm"].dtype == torch.bfloat16 and torch.equal(back.weights["norm"].load(), half.load())
    assert json.loads((tmp_path / "result" / "config.json").read_text())["torch_dtype"] == "float32"


def test_fp16_that_overflows(saved, tmp_path):
    stored = open_stored("hf", saved / "gqa", Options())
    large = StoredTensor((64,), torch.float32, lambda: torch.full((64,), -7e4))
    with pytest.raises(CheckpointError, match="a weight of 7e.04 is too large for fp16: convert to bf16 or fp32"):
        convert(replace(stored, weights={**stored.weights, "norm": large}), "hf", tmp_path / "result", Options(torch.float16))
    assert list(tmp_path.iterdir()) == []  # nothing is left of it


def test_links_of_a_download(saved, tmp_path):
    """The cache of the hub holds links to files in another folder."""
    (tmp_path / "snapshot").mkdir()
    for path in (saved / "gqa").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    open_stored("hf", tmp_path / "snapshot", Options())


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files(shards, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = list(weights)
        places = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(names)}
        for place in set(places.values()):
            torch.save({name: weights[name] for name in names if places[name] == place}, folder / place)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    stored = open_stored("hf", folder, Options())
    assert all(torch.equal(stored.weights[our_name(name)].load(), weights[name]) for name in weights)


def test_tied_heads(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "llama-3.2", tmp_path / "tied"))
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights and open_stored("hf", folder, Options()).model.tie_embeddings
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "output" not in open_stored("hf", folder, Options()).weights
    weights["lm_head.weight"][130, 63] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, and lm_head.weight is not"):
        open_stored("hf", folder, Options())


def test_frequencies_of_old_files_are_ignored(folder):
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    open_stored("hf", folder, Options())


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM.*only LlamaForCausalLM"),
        ({"model_type": "mistral"}, "'mistral'; only LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True is not supported: it would have to be False"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: it would have to be 'silu'"),
        ({"head_dim": 16}, "head_dim = 16 .* hidden_size 64 / num_attention_heads 8 = 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_parameters": {**LLAMA_3_ROPE, "rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_parameters": {**LLAMA_3_ROPE, "factor": None}}, "factor = None must be a number"),
        ({"rope_parameters": "default"}, "the rotary parameters 'default' are not an object"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000 must be an integer from 1 to 10000"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be an integer"),
        ({"vocab_size": None}, "vocab_size = None must be an integer"),
        ({"num_key_value_heads": 3}, "num_kv_heads must divide model.num_heads: 3 over 8"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small' must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' must be true or false"),
        ({"num_hidden_layers": 3}, "9 missing .layers.2.attention.wk"),
        ({"num_hidden_layers": 1}, "9 unknown .layers.1.attention.wk"),
        ({"intermediate_size": 95}, r"feed_forward.w1 is \[96, 64\], the architecture says \[95, 64\]"),
    ],
)
def test_refused_configs(fields, message, folder):
    change(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_stored("hf", folder, Options())
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json(name, text, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=name):
        open_stored("hf", folder, Options())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../model.safetensors", "'../model.safetensors' is not the name of a .safetensors file in the same folder"),
        ("/etc/passwd", "'/etc/passwd' is not the name"),
        ("more/model.safetensors", "'more/model.safetensors' is not the name"),
        ("..", "'..' is not the name"),
        ("pytorch_model.bin", "'pytorch_model.bin' is not the name of a .safetensors file"),
        ("absent.safetensors", "the file absent.safetensors is missing: is the download complete"),
        (3, "weight_map is not an object of file names"),
    ],
)
def test_hostile_index(place, message, folder):
    (folder.parent / "model.safetensors").write_bytes(b"x")
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    with pytest.raises(CheckpointError, match=message):
        open_stored("hf", folder, Options())


def test_index_that_names_what_is_not_there(folder):
    os.rename(folder / "model.safetensors", folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.bias": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match="lm_head.bias is not in part.safetensors"):
        open_stored("hf", folder, Options())


def test_damaged_tensor_files(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content + b"x", b"\xff" * 8 + content[8:], content[:20]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="model.safetensors cannot be read as a safetensors file"):
            open_stored("hf", folder, Options())
    path.write_bytes(content)
    save_file({**load_file(path), "model.norm.weight": torch.ones(64, dtype=torch.int8)}, path)
    with pytest.raises(CheckpointError, match="norm is in int8; only float32, bfloat16, float16 can be read"):
        open_stored("hf", folder, Options())
    path.unlink()
    with pytest.raises(CheckpointError, match="holds none of model.safetensors, model.safetensors.index.json, pytorch_model"):
        open_stored("hf", folder, Options())


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.norm.weight": Harmful()}, "cannot be read as tensors"),
        ([1, 2], "holds no state dict"),
        ({"model.norm.weight": "text"}, "model.norm.weight is not a whole, dense tensor"),
        ({"model.norm.weight": torch.zeros(1).expand(1 << 50)}, "model.norm.weight is not a whole, dense tensor"),
        ({"model.norm.weight": torch.zeros(4).to_sparse()}, "cannot be read|not a whole, dense tensor"),
    ],
)
def test_refused_torch_files(content, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_stored("hf", folder, Options())
    assert not (folder / "harmed").exists()
