"""docs/checkpoint-format.md is true: its example reads checkpoints with numpy alone, and its bounds are the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.checkpoint import manifest as format
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.save import save_checkpoint
from parallel.checkpoint.voting import SingleProcess
from parallel.shards import Box, TensorBox

PAGE = (Path(__file__).parents[3] / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")


def example() -> str:
    return re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def step(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Tensors cut by rows and by columns, of several blocks and dtypes."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a.rows": torch.randn(3000, 1000, generator=generator),
        "a.columns": torch.randn(700, 3000, generator=generator).double(),
        "a.vector": torch.arange(5),
        "a.scalar": torch.tensor(2.5),
    }

    def boxes(name: str, *cuts: Box) -> list[TensorBox]:
        whole = tensors[name]
        return [TensorBox(name, tuple(whole.shape), box, whole[box.slices()]) for box in cuts]

    items = boxes("a.rows", Box((0, 0), (1700, 1000)), Box((1700, 0), (1300, 1000)))
    items += boxes("a.columns", Box((0, 0), (700, 1001)), Box((0, 1001), (700, 1999)))
    items += boxes("a.vector", Box.whole((5,))) + boxes("a.scalar", Box.whole(()))
    return save_checkpoint(tmp_path, 1, {"weights": items}, {}, world=SingleProcess()), tensors


def test_the_example_reads_every_tensor(step) -> None:
    directory, tensors = step
    assert max(len(info.crc32) for info in read_manifest(directory).files.values()) > 5
    assert len(example().splitlines()) <= 30 and not re.search("torch|safetensors|megatron", example())
    found = {"sys": sys}
    exec(example().split("print(")[0], found)
    for name, tensor in tensors.items():
        read = found["read_tensor"](directory, name)
        assert read.dtype == tensor.numpy().dtype and np.array_equal(read, tensor.numpy()), name


def test_the_example_runs_as_a_program_and_finds_damage(step, tmp_path: Path) -> None:
    directory, tensors = step
    program = tmp_path / "read_tensor.py"
    program.write_text(example())
    command = [sys.executable, str(program), str(directory), "a.columns"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tensors['a.columns'].numpy()}\n")
    path = directory / "weights-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[10 << 20] ^= 1
    path.write_bytes(data)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "weights-00000.safetensors, block 2 is damaged" in done.stderr


def test_the_page_has_the_codes_names_and_bounds() -> None:
    page = " ".join(PAGE.split())
    patterns = (format.TENSOR_NAME, format.GROUP_NAME, format.EXTRA_FILE_NAME)
    for text in [*(pattern.pattern for pattern in patterns), f'"{format.FORMAT}"', format.MANIFEST_NAME, format.VERIFIED_NAME]:
        assert f"`{text}`" in page, text
    assert f"`version` | integer | {format.VERSION} |" in page
    assert f"{format.MAX_MANIFEST_BYTES >> 20} MiB in UTF-8" in page and f"up to {format.MAX_DIMS} dims" in page
    assert f"`block_size` is {format.BLOCK_BYTES >> 20} MiB" in page and f"to {format.MAX_BLOCK_BYTES >> 20} MiB" in page
    assert set(re.search(r"`dtype` is one of (.*?)\. ", page)[1].split(", ")) == set(format.DTYPES)
