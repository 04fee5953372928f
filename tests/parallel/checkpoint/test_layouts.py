"""A checkpoint saved in any layout loads into any other, bit for bit, and stock safetensors reads its files."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file

from parallel.checkpoint import SingleProcess, load_tensors, read_extra_file, read_manifest, save_checkpoint, verify_checkpoint
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox

LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 3, 1), (1, 1, 5), (3, 1, 2), (2, 2, 1), (2, 2, 3)]  # tp, pp, dp


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_other_saved(tmp_path, model, layout):
    directory = model.save_layout(tmp_path, 3, layout)
    manifest = verify_checkpoint(directory)
    assert max(len(info.crc32) for info in manifest.files.values()) > 4, "boxes must cross blocks here"
    for other in LAYOUTS:
        for rank in range(math.prod(other)):
            loaded = model.RankState(other, rank, filled=False)
            assert not loaded.equals(model.RankState(other, rank, filled=True))
            load_tensors(directory, loaded.targets(), manifest)
            assert loaded.equals(model.RankState(other, rank, filled=True)), f"{layout} -> {other}, rank {rank}"


@pytest.mark.usefixtures("small_blocks")
def test_gloo_ranks_save_and_load(tmp_path, model):
    def body(voter):
        directory = save_checkpoint(
            tmp_path, 7, model.RankState((2, 2, 1), voter.rank, True).groups(), {"step": 7}, world=voter
        )
        loaded = model.RankState((1, 2, 2), voter.rank, filled=False)
        load_tensors(directory, loaded.targets())
        assert loaded.equals(model.RankState((1, 2, 2), voter.rank, filled=True))
        assert voter.broadcast_int(2**50 + voter.rank) == 2**50
        assert voter.all_ok(True) and not voter.all_ok(voter.rank != 3)

    assert [code for code, _ in model.run_ranks(4, body, tmp_path)] == [0] * 4


def test_stock_safetensors_reads_the_files(tmp_path, model):
    directory = model.save_layout(tmp_path, 1, (2, 1, 2))
    manifest = read_manifest(directory)
    seen = 0
    for info in manifest.files.values():
        for key, tensor in load_file(directory / info.name).items():
            name, _, offset = key.partition("@")
            offset = tuple(int(o) for o in offset.split(",") if o)
            whole = model.full_value(name, manifest.tensors[name].shape, tensor.dtype)
            assert torch.equal(tensor, whole[Box(offset, tuple(tensor.shape)).slices()])
            seen += 1
        with open(directory / info.name, "rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0
    assert seen == len(manifest.boxes)
    assert {name.split("-")[0] for name in manifest.files} == {"weights", "optimizer"}


def test_weights_alone_can_be_read_without_the_optimizer_files(tmp_path, model):
    directory = model.save_layout(tmp_path, 1, (2, 1, 1))
    for path in directory.glob("optimizer-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="optimizer-00000.safetensors"):
        read_manifest(directory)
    loaded, expected = (model.RankState((1, 1, 1), 0, filled) for filled in (False, True))
    load_tensors(directory, list(loaded.weight_boxes()), read_manifest(directory, groups={"weights"}))
    for name in expected.weights:
        padding = expected.weights[name].isnan()
        assert torch.equal(loaded.weights[name][~padding], expected.weights[name][~padding])
    with pytest.raises(CheckpointError, match="optimizer-00000.safetensors"):
        load_tensors(directory, loaded.targets(), read_manifest(directory, groups={"weights"}))


def boxed(name, tensor):
    shape = tuple(tensor.shape)
    return TensorBox(name, shape, Box.whole(shape), tensor)


@pytest.mark.usefixtures("small_blocks")
def test_strided_tensors_on_both_sides(tmp_path):
    """Saved from a transposed view, loaded into every other column of a larger tensor, and into overlapping targets."""
    source = torch.randn(70, 90)
    directory = save_checkpoint(tmp_path, 1, {"weights": [boxed("w", source.t())]}, {}, world=SingleProcess())
    wide = torch.full((90, 140), math.nan)
    rows = torch.full((20, 70), math.nan)
    twins = torch.full((90, 70), math.nan), torch.full((90, 70), math.nan)
    targets = [boxed("w", wide[:, ::2]), TensorBox("w", (90, 70), Box((35, 0), (20, 70)), rows)]
    load_tensors(directory, targets)
    load_tensors(directory, [boxed("w", twin) for twin in twins])
    assert all(torch.equal(twin, source.t()) for twin in twins)
    assert torch.equal(wide[:, ::2], source.t()) and wide[:, 1::2].isnan().all()
    assert torch.equal(rows, source.t()[35:55])


@pytest.mark.usefixtures("small_blocks")
def test_every_dtype_and_rank_of_tensor(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {}
    for number, dtype in enumerate(reversed(dtypes)):  # small elements first: the writer must order them for alignment
        raw = torch.randint(0, 2, (3, 5, 7 + number), generator=torch.Generator().manual_seed(number))
        tensors[f"t.{str(dtype).removeprefix('torch.')}"] = raw.to(dtype)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["needs_grad"] = torch.nn.Parameter(torch.randn(3000))
    groups = {"weights": [boxed(name, tensor) for name, tensor in tensors.items()]}
    directory = save_checkpoint(tmp_path, 1, groups, {}, world=SingleProcess())
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors(directory, [boxed(name, tensor) for name, tensor in loaded.items()])
    for name, tensor in tensors.items():
        assert torch.equal(tensor.detach().reshape(-1).view(torch.uint8), loaded[name].reshape(-1).view(torch.uint8)), name
    stock = load_file(directory / "weights-00000.safetensors")
    assert torch.equal(stock["scalar@"], tensors["scalar"]) and "empty@0,0" not in stock


def test_state_and_extra_files_come_back(tmp_path):
    state = {"seed": 2**53 + 1, "learning_rate": 0.1 + 0.2, "config": "tp = 2\n", "data": {"position": [1, 2]}, "text": "é"}
    extra = {"tokenizer.model": bytes(range(256)), "config.toml": b""}
    directory = save_checkpoint(
        tmp_path / "a" / "b", 12, {"weights": [boxed("w", torch.ones(3))]}, state, world=SingleProcess(), extra_files=extra
    )
    assert directory.name == "step_00000012"
    manifest = verify_checkpoint(directory)
    assert manifest.state == state and manifest.step == 12
    assert {name: read_extra_file(directory, name) for name in extra} == extra
    with pytest.raises(CheckpointError, match="'vocab.txt'.*stored: config.toml, tokenizer.model"):
        read_extra_file(directory, "vocab.txt")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_are_widened_only_where_that_is_asked_for(tmp_path, stored):
    source = torch.randn(90, 70).to(stored)
    directory = save_checkpoint(tmp_path, 1, {"weights": [boxed("w", source)]}, {}, world=SingleProcess())
    wider = torch.float64 if stored == torch.float32 else torch.float32
    whole, columns = torch.full((90, 70), math.nan, dtype=wider), torch.full((90, 33), math.nan, dtype=wider)
    targets = [boxed("w", whole), TensorBox("w", (90, 70), Box((0, 30), (90, 33)), columns)]
    with pytest.raises(CheckpointError, match="use the dtype with which it was saved"):
        load_tensors(directory, targets)
    load_tensors(directory, targets, widen=True)
    assert torch.equal(whole, source.to(wider)) and torch.equal(columns, source[:, 30:63].to(wider))
    for narrow in (torch.bfloat16, torch.float16):
        if narrow != stored:
            with pytest.raises(CheckpointError, match="use the dtype with which it was saved"):
                load_tensors(directory, [boxed("w", torch.zeros(90, 70, dtype=narrow))], widen=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("small_blocks")
def test_device_tensors(tmp_path):
    source = torch.randn(300, 70, device="cuda")
    groups = {"weights": [boxed("a", source), boxed("b", source.t())]}
    directory = save_checkpoint(tmp_path, 1, groups, {}, world=SingleProcess())
    a, b = torch.zeros_like(source), torch.zeros(70, 150, device="cuda")
    load_tensors(directory, [boxed("a", a), TensorBox("b", (70, 300), Box((0, 100), (70, 150)), b)])
    assert torch.equal(a, source) and torch.equal(b, source.t()[:, 100:250])


def peak_extra_bytes(action):
    """Growth of this process's resident memory at its peak during `action`."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM

    def status(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

    before = status("VmRSS")
    action()
    return status("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("strided", [False, True])
def test_extra_memory_is_bounded(tmp_path, strided):
    """96 MiB of tensors: at most 24 MiB more while saving, and while loading whole and by columns."""
    tensors = [torch.ones(2048, 4096) for _ in range(3)]
    sources = [tensor.t() if strided else tensor for tensor in tensors]
    rows, columns = sources[0].shape
    groups = {"weights": [boxed(f"w{i}", source) for i, source in enumerate(sources)]}
    limit = 24 << 20
    directory = tmp_path / "step_00000001"
    assert peak_extra_bytes(lambda: save_checkpoint(tmp_path, 1, groups, {}, world=SingleProcess())) < limit
    whole = [torch.zeros(rows, columns) + 1 for _ in sources]  # + 1: its pages are there before the measurement
    targets = [boxed(f"w{i}", tensor) for i, tensor in enumerate(whole)]
    assert peak_extra_bytes(lambda: load_tensors(directory, targets)) < limit
    box = Box((0, 5), (rows, columns - 9))
    part = [TensorBox(f"w{i}", (rows, columns), box, tensor[:, : columns - 9]) for i, tensor in enumerate(whole)]
    assert peak_extra_bytes(lambda: load_tensors(directory, part)) < limit
