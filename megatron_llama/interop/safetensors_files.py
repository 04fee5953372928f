"""Safetensors files, tensor by tensor: no more than one tensor of a file is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_llama.interop.stored_model import StoredTensor
from parallel.checkpoint.manifest import SAFETENSORS_CODES
from parallel.errors import CheckpointError

DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors that the header of a file lists, by name. Raises CheckpointError, also where one is read later."""
    try:
        with safe_open(path, framework="pt") as file:  # checks that the tensors fill the file, without gaps or overlaps
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
    for name, (_, code) in found.items():
        if code not in DTYPES:
            raise CheckpointError(f"{path}: {name} has the dtype {code}, which is none of {', '.join(DTYPES)}")
    return {name: StoredTensor(shape, DTYPES[code], _reader(path, name)) for name, (shape, code) in found.items()}


def _reader(path: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error

    return read


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> None:
    """Write `tensors` in `dtype` (None: each in its own) with the metadata that transformers wants. Raises OSError."""
    sizes = {name: (dtype or tensor.dtype).itemsize for name, tensor in tensors.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: -sizes[item[0]]))  # wide ones first: all are aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + stored_bytes(tensor, dtype)
        code = SAFETENSORS_CODES[dtype or tensor.dtype]
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(tensor.load(dtype).contiguous().view(torch.uint8).flatten().numpy())


def stored_bytes(tensor: StoredTensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a tensor, in `dtype` where given."""
    return torch.Size(tensor.shape).numel() * (dtype or tensor.dtype).itemsize
