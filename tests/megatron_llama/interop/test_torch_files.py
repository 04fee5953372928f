"""Files of torch.save: no flipped bit and no truncation is read, nothing foreign runs, and tensors are mapped."""

import random
from pathlib import Path

import pytest
import torch

from megatron_llama.interop.torch_files import load_torch_file
from parallel.errors import CheckpointError


def saved(path: Path, **options) -> Path:
    torch.save({"w": torch.arange(20_000.0).view(100, 200), "n": 3, "names": ["a", "b"]}, path, **options)
    return path


def test_tensors_and_plain_values(tmp_path: Path) -> None:
    content = load_torch_file(saved(tmp_path / "file.pt"))
    assert (
        torch.equal(content["w"], torch.arange(20_000.0).view(100, 200))
        and content["n"] == 3
        and content["names"] == ["a", "b"]
    )


def test_no_damage_is_read(tmp_path: Path) -> None:
    whole = saved(tmp_path / "file.pt").read_bytes()
    expected = load_torch_file(tmp_path / "file.pt")["w"]
    generator, path = random.Random(1), tmp_path / "damaged.pt"
    refused = 0
    for number in range(150):
        position = generator.randrange(len(whole) * 8)
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path = tmp_path / f"damaged-{number}.pt"
        path.write_bytes(damaged if number % 10 else whole[: position // 8])
        try:
            content = load_torch_file(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        assert torch.equal(content["w"], expected) and content["n"] == 3  # a byte that means nothing, such as padding
    assert refused > 140


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt")
    load_torch_file(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="the checksum of .* does not match: copy it again"):
        load_torch_file(path)


def test_files_of_before_torch_1_6(tmp_path: Path) -> None:
    """They have no checksums and cannot be mapped; torch says what to do."""
    with pytest.raises(CheckpointError, match="file.pt cannot be read"):
        load_torch_file(saved(tmp_path / "file.pt", _use_new_zipfile_serialization=False))
