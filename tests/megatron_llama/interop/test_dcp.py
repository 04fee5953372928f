"""Folders of PyTorch's DCP, with torchtitan's names: against DCP's own loader, and hostile or damaged ones."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.dcp import our_name, torchtitan_name
from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.rope_order import to_interleaved
from megatron_llama.interop.stored_model import MOMENTS, Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.interop.unpickle import read_metadata
from megatron_llama.interop.verify import our_logits, prompts
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.interop.models import GROUPED, ODD, PLAIN, SCALED, TIED, assert_same, loaded, random_model
from tests.megatron_llama.interop.test_meta import meta_logits
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODELS = {"mha": PLAIN, "gqa": GROUPED, "scaled": SCALED, "tied": TIED, "odd": ODD}
NORM = MetadataIndex("norm.weight", [0])
PARAMS = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "n_layers": 2, "norm_eps": 1e-5, "rope_theta": 500_000.0}


def with_moments(stored: StoredModel, steps: int = 17) -> StoredModel:
    moments = {}
    for number, kind in enumerate(MOMENTS, start=1):
        drawn = random_model(stored.model, torch.float32, seed=number).weights
        moments |= {f"{kind}/{name}": tensor for name, tensor in drawn.items()}
    return replace(stored, optimizer=moments, optimizer_steps=steps).check()


def written(stored: StoredModel, folder: Path, options: Options | None = None) -> Path:
    convert(stored, "dcp", folder, options or Options())
    return folder


def opened(folder: Path, model: ModelConfig | None = None) -> StoredModel:
    return open_stored("dcp", folder, Options(model=model))


def torchtitan_state(stored: StoredModel) -> dict[str, Tensor]:
    """What torchtitan would hold."""
    state = {}
    for name, tensor in loaded(stored).items():
        heads = {"wq": stored.model.num_heads, "wk": stored.model.num_kv_heads}.get(name.split(".")[-1])
        state[torchtitan_name(name)] = to_interleaved(tensor, heads) if heads else tensor
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GROUPED in fp32, without a sidecar; not to be changed."""
    folder = written(random_model(GROUPED, torch.float32), tmp_path_factory.mktemp("dcp") / "step-7")
    (folder / "megatron_llama.json").unlink()
    return folder


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trip(tmp_path: Path, model: ModelConfig) -> None:
    stored = with_moments(random_model(model))
    found = opened(written(stored, tmp_path / "dcp"))
    assert_same(found, stored)
    assert found.optimizer_steps == 17 and found.sequence_length == 32 and found.files == stored.files
    for name, tensor in stored.optimizer.items():
        assert torch.equal(found.optimizer[name].load(), tensor.load()), name


def test_names_are_torchtitans() -> None:
    assert torchtitan_name("layers.3.attention.wk") == "layers.3.attention.qkv_linear.wk.weight"
    assert torchtitan_name("layers.3.attention.wo") == "layers.3.attention.wo.weight"
    assert torchtitan_name("output") == "lm_head.weight"
    for name in logical_shapes(GROUPED):
        assert our_name(torchtitan_name(name)) == our_name(f"model.{name}.weight") == name


def test_dcp_itself_loads_it(tmp_path: Path) -> None:
    """Into empty tensors by name, and as one file; the values give our logits in a model with interleaved RoPE."""
    stored = with_moments(random_model(GROUPED, torch.float32))
    folder = written(stored, tmp_path / "dcp")
    names = {torchtitan_name(name): tensor for name, tensor in stored.weights.items()}
    state = {name: torch.full(tensor.shape, torch.nan) for name, tensor in names.items()}
    state["optimizer"] = {"state.norm.weight.exp_avg": torch.empty(64), "state.norm.weight.step": torch.empty(())}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    optimizer = state.pop("optimizer")
    assert torch.equal(optimizer["state.norm.weight.exp_avg"], stored.optimizer["exp_avg/norm"].load())
    assert optimizer["state.norm.weight.step"] == 17
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in state.items())
    assert {name for name in whole if not name.startswith("optimizer.")} == set(state)
    metas = {name.replace("qkv_linear.", "").replace("lm_head", "output"): tensor for name, tensor in state.items()}
    tokens = prompts(GROUPED)
    logits = meta_logits([metas], PARAMS, 1.0, tokens[0])
    torch.testing.assert_close(our_logits(stored, tokens)[0], logits, rtol=0, atol=2e-5)


def test_dtype(tmp_path: Path) -> None:
    stored = with_moments(random_model(ODD, torch.float32))
    found = opened(written(stored, tmp_path / "dcp", Options(dtype=torch.bfloat16)))
    assert all(torch.equal(found.weights[name].load(), tensor.load(torch.bfloat16)) for name, tensor in stored.weights.items())
    assert torch.equal(found.optimizer["exp_avg/norm"].load(), stored.optimizer["exp_avg/norm"].load())


def test_a_tied_head_is_stored_as_torchtitan_does(tmp_path: Path) -> None:
    folder = written(random_model(TIED, torch.float32), tmp_path / "dcp")
    state = {name: torch.empty(TIED.vocab_size, 64) for name in ("tok_embeddings.weight", "lm_head.weight")}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert torch.equal(*state.values())
    state = torchtitan_state(random_model(TIED, torch.float32))
    state["lm_head.weight"] = state["tok_embeddings.weight"] + 1
    dcp.save(state, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(CheckpointError, match="the head is not the embedding"):
        opened(tmp_path / "other", TIED)


def save_sharded(rank: int, world_size: int, folder: Path) -> None:
    """As torchtitan's FSDP and tensor parallelism do: DTensors, here of uneven shards, and a state that is no tensor."""
    mesh = init_device_mesh("cpu", (world_size,))
    stored = with_moments(random_model(ODD, torch.float32))
    state: dict = {}
    for number, (name, tensor) in enumerate(torchtitan_state(stored).items()):
        placement = Replicate() if tensor.ndim == 1 else Shard(number % 2)
        state[name] = distribute_tensor(tensor, mesh, [placement])
    moments = {f"state.{name}.exp_avg": tensor for name, tensor in state.items()}
    moments |= {f"state.{name}.exp_avg_sq": tensor for name, tensor in state.items()}
    moments |= {f"state.{name}.step": torch.tensor(3.0) for name in state}
    moments |= {f"param_groups.{name}.lr": 0.1 for name in state}
    state |= {"optimizer": moments, "lr_scheduler": {"last_epoch": 3}, "train_state": {"step": torch.tensor(3)}}
    dcp.save(state, checkpoint_id=folder)


def test_import_of_a_sharded_run(tmp_path: Path) -> None:
    run_ranks(3, save_sharded, tmp_path / "step-3")
    found = opened(tmp_path / "step-3", ODD)
    assert_same(found, random_model(ODD, torch.float32))
    assert found.optimizer_steps == 3
    for name, tensor in found.weights.items():
        assert torch.equal(found.optimizer[f"exp_avg_sq/{name}"].load(), tensor.load()), name


@pytest.mark.parametrize("prefix", ["", "model."])
def test_import_under_the_names_of_2025(tmp_path: Path, prefix: str) -> None:
    stored = random_model(GROUPED)
    state = {
        prefix + name.replace("qkv_linear.", "").replace("lm_head", "output"): tensor
        for name, tensor in torchtitan_state(stored).items()
    }
    dcp.save(state | {"freqs_cis": torch.ones(4)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = opened(tmp_path / "dcp", GROUPED)
    assert_same(found, stored)
    assert not found.optimizer


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    stored = with_moments(random_model(GROUPED, torch.float32))
    alive: list[weakref.ref] = []  # to arrays, which live as long as any tensor that shares their memory
    most = 0

    def watched(tensor: StoredTensor) -> StoredTensor:
        def read() -> Tensor:
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            array = tensor.read().numpy().copy()
            alive.append(weakref.ref(array))
            return torch.from_numpy(array)

        return replace(tensor, read=read)

    weights = {name: watched(tensor) for name, tensor in stored.weights.items()}
    optimizer = {name: watched(tensor) for name, tensor in stored.optimizer.items()}
    written(replace(stored, weights=weights, optimizer=optimizer), tmp_path / "dcp")
    assert len(alive) == 3 * len(weights) and most <= 1


def test_no_more_is_written_than_the_tensors(tmp_path: Path) -> None:
    """A view has all of its storage behind it."""
    stored = random_model(GROUPED)

    def view(tensor: StoredTensor) -> Tensor:
        whole = tensor.load()
        return torch.cat([whole] * 9)[: len(whole)]

    views = {name: replace(tensor, read=partial(view, tensor)) for name, tensor in stored.weights.items()}
    folder = written(replace(stored, weights=views), tmp_path / "dcp")
    assert_same(opened(folder), stored)
    size = sum(2 * torch.Size(tensor.shape).numel() for tensor in stored.weights.values())
    assert (folder / "__0_0.distcp").stat().st_size < size + 2000 * len(views)


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    stored = random_model(GROUPED)

    def fail() -> Tensor:
        raise CheckpointError("the source is damaged")

    broken = stored.weights | {"norm": replace(stored.weights["norm"], read=fail)}
    with pytest.raises(CheckpointError, match="the source is damaged"):
        written(replace(stored, weights=broken), tmp_path / "dcp")
    assert not list(tmp_path.iterdir())


def test_the_architecture_is_asked_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not tell the architecture: give --model PRESET or --config FILE"):
        opened(folder)
    with pytest.raises(CheckpointError, match="of 12 weights: 9 unknown"):
        opened(folder, replace(GROUPED, num_layers=1))
    with pytest.raises(CheckpointError, match="the head is not the embedding"):
        opened(folder, replace(GROUPED, tie_embeddings=True))
    named = written(random_model(GROUPED), tmp_path / "dcp")
    with pytest.raises(ConfigError, match="norm_eps"):
        opened(named, replace(GROUPED, norm_eps=1e-6))


def test_moments_are_all_there_or_left_out(tmp_path: Path) -> None:
    state = torchtitan_state(random_model(GROUPED, torch.float32))
    moments = {f"state.{name}.{kind}": tensor for name, tensor in state.items() for kind in MOMENTS}
    steps = {f"state.{name}.step": torch.tensor(3.0) for name in state}
    dcp.save(state | {"optimizer": moments}, checkpoint_id=tmp_path / "no steps", no_dist=True)
    assert not opened(tmp_path / "no steps", GROUPED).optimizer
    steps["state.norm.weight.step"] = torch.tensor(4.0)
    dcp.save(state | {"optimizer": moments | steps}, checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(CheckpointError, match="3 steps on some weights, 4 on others"):
        opened(tmp_path / "two", GROUPED)


# --- hostile and damaged folders


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def put(folder: Path, content: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (partial(Call, os.mkdir), "posix.mkdir"),
        (partial(Call, eval), "builtins.eval"),
        (lambda marker: Call(getattr, Call(__import__, "os"), "mkdir"), "builtins.getattr"),
        (lambda marker: Call(torch.load, marker), "torch.serialization.load"),
    ],
    ids=["mkdir", "eval", "getattr", "torch.load"],
)
def test_hostile_metadata_is_not_run(folder: Path, tmp_path: Path, call: Callable, name: str) -> None:
    shutil.copytree(folder, tmp_path / "dcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for content in (call(str(tmp_path / "marker")), replace(metadata, planner_data={"a": call(str(tmp_path / "marker"))})):
        put(tmp_path / "dcp", content)
        with pytest.raises(CheckpointError, match=rf"\.metadata cannot be read: it names {name}, .* was not called"):
            opened(tmp_path / "dcp", GROUPED)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_cannot_change_our_classes(folder: Path, tmp_path: Path) -> None:
    """BUILD with slots sets attributes, also of a class."""
    shutil.copytree(folder, tmp_path / "dcp")
    data = b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x09attributeK\x01s\x86b."
    (tmp_path / "dcp/.metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read|does not hold DCP's Metadata"):
        opened(tmp_path / "dcp", GROUPED)
    assert read_metadata(folder / ".metadata").attribute("version")


def test_hostile_tensor_is_not_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dcp")
    hostile = io.BytesIO()
    torch.save(Call(os.mkdir, str(tmp_path / "marker")), hostile)
    change(tmp_path / "dcp", lambda metadata, place: append(tmp_path / "dcp", place, hostile.getvalue() + bytes(256)))
    stored = opened(tmp_path / "dcp", GROUPED)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp, bytes .* cannot be read as tensors"):
        stored.weights["norm"].load()
    assert not (tmp_path / "marker").exists()


def append(folder: Path, place: object, content: bytes) -> None:
    path = folder / "__0_0.distcp"
    vars(place).update(offset=path.stat().st_size, length=len(content))
    path.write_bytes(path.read_bytes() + content)


def change(folder: Path, edit: Callable[[Metadata, object], None]) -> None:
    """Edit the metadata of a folder; `edit` gets it and the place of norm.weight."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata, metadata.storage_data[NORM])
    put(folder, metadata)


def entry(metadata: Metadata, name: str = "norm.weight"):
    return metadata.state_dict_metadata[name]


def add_piece(metadata: Metadata, place: object) -> None:
    entry(metadata).chunks.append(ChunkStorageMetadata(torch.Size([8]), torch.Size([8])))
    metadata.storage_data[MetadataIndex("norm.weight", [8])] = place


def add_name(metadata: Metadata, place: object) -> None:
    metadata.state_dict_metadata["model.norm.weight"] = entry(metadata)
    metadata.storage_data[MetadataIndex("model.norm.weight", [0])] = place


CHANGES: dict[str, tuple[Callable[[Metadata, object], object], str]] = {
    "no pieces": (lambda m, p: entry(m).chunks.clear(), r"lists 0 of the 64 elements of norm.weight, \[64\]: a part of it"),
    "piece outside": (lambda m, p: vars(entry(m)).update(size=torch.Size([63])), r"a piece \[0\] \+ \[64\] outside of norm"),
    "overlap": (add_piece, r"has pieces of norm.weight at \[0\] and \[8\] that overlap"),
    "no place": (lambda m, p: m.storage_data.pop(NORM), r"does not tell where norm.weight at \[0\] lies"),
    "no places": (lambda m, p: vars(m).update(storage_data=None), "lists no tensors"),
    "beyond the file": (lambda m, p: vars(p).update(offset=1 << 40), "__0_0.distcp has .* bytes: norm.weight should end at"),
    "negative": (lambda m, p: vars(p).update(offset=-1), r"has \(-1, .* as the place of norm.weight"),
    "too short": (lambda m, p: vars(p).update(length=255), r"says that \[64\] of norm.weight are in the 255 bytes"),
    "absurd": (lambda m, p: vars(entry(m)).update(size=torch.Size([1 << 60])), "elements of norm.weight"),
    "text as size": (lambda m, p: vars(entry(m)).update(size=("a",)), "as the shape of norm.weight"),
    "traversal": (lambda m, p: vars(p).update(relative_path="../../etc/passwd"), "which is not a file of this folder"),
    "absolute": (lambda m, p: vars(p).update(relative_path="/etc/passwd"), "which is not a file of this folder"),
    "parent": (lambda m, p: vars(p).update(relative_path=".."), "is missing: is the copy complete"),
    "missing file": (lambda m, p: vars(p).update(relative_path="__9_0.distcp"), "__9_0.distcp is missing"),
    "compressed": (lambda m, p: vars(p).update(transform_descriptors=["zstd"]), "was written through .*zstd"),
    "complex": (lambda m, p: vars(entry(m).properties).update(dtype=torch.complex64), "no dtype and pieces of norm.weight"),
    "twice": (add_name, "has norm twice, as norm.weight and model.norm.weight"),
}


@pytest.mark.parametrize(("edit", "message"), CHANGES.values(), ids=CHANGES)
def test_metadata_that_cannot_be(folder: Path, tmp_path: Path, edit: Callable, message: str) -> None:
    shutil.copytree(folder, tmp_path / "dcp")
    change(tmp_path / "dcp", edit)
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path / "dcp", GROUPED)


def test_another_tensor_than_the_metadata_says(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dcp")
    other = io.BytesIO()
    torch.save(torch.zeros(1).expand(64).to(torch.float64), other)
    change(tmp_path / "dcp", lambda metadata, place: append(tmp_path / "dcp", place, other.getvalue()))
    stored = opened(tmp_path / "dcp", GROUPED)
    with pytest.raises(CheckpointError, match=r"are not float32 \[64\] of norm.weight, as .metadata says"):
        stored.weights["norm"].load()


def test_flipped_bits_are_seen(folder: Path, tmp_path: Path) -> None:
    """Anywhere in the data of a tensor, where neither DCP nor torch.load sees them."""
    shutil.copytree(folder, tmp_path / "dcp")
    file = tmp_path / "dcp/__0_0.distcp"
    data = file.read_bytes()
    stored = opened(tmp_path / "dcp", GROUPED)
    expected = loaded(stored)
    generator = torch.Generator().manual_seed(1)
    for bit in torch.randint(8 * len(data), (100,), generator=generator).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found = loaded(stored)
        except CheckpointError as error:
            assert "__0_0.distcp, bytes " in str(error)
        else:  # in what is padding, or read nowhere
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), bit


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: .*is it a folder of PyTorch DCP"):
        opened(tmp_path, GROUPED)
    shutil.copytree(folder, tmp_path / "dcp")
    data = (folder / ".metadata").read_bytes()
    for damaged in (b"", b"nonsense", data[:-40], pickle.dumps({"a": 1}), pickle.dumps(None)):
        (tmp_path / "dcp/.metadata").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            opened(tmp_path / "dcp", GROUPED)
    (tmp_path / "dcp/.metadata").write_bytes(data)
    file = tmp_path / "dcp/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has \d+ bytes: .* should end at"):
        opened(tmp_path / "dcp", GROUPED)
