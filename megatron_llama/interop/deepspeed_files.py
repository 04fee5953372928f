"""What DeepSpeed's checkpoint formats have in common: where things lie, parameters' names, and the classes in its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_llama.config import ModelConfig
from megatron_llama.interop.hugging_face import our_name, read_files
from megatron_llama.interop.hugging_face_config import read_model, read_sequence_length
from megatron_llama.interop.sidecar import read_json
from megatron_llama.interop.stored_model import Options
from megatron_llama.interop.torch_files import load_torch_file
from parallel.errors import CheckpointError, ConfigError


class Fragment:
    """Where a piece of a parameter lies in a rank's flat tensor: `start` and `numel`, in elements."""

    start: int
    numel: int


class Unread:
    """An object of DeepSpeed's that means nothing to us."""


# DeepSpeed's classes, by what stands for each of them: its files are read where it is not installed, and none of it runs.
STAND_INS = (
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Unread, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Unread, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


def load_deepspeed_file(path: Path) -> Mapping[str, Any]:
    """What DeepSpeed saved as a dictionary; its tensors are mapped. Raises CheckpointError naming the file."""
    content = load_torch_file(path, STAND_INS)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dictionary: it is not a file of DeepSpeed's")
    return content


@dataclass(frozen=True)
class Known:
    """What lies beside a checkpoint."""

    model: ModelConfig
    sequence_length: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)


def tagged_folder(path: Path, tracker: str, pattern: str) -> Path:
    """The folder of one step, which holds `pattern`: `path` itself, or the folder in it that the file `tracker` names."""
    if any(path.glob(pattern)):
        return path
    if not (path / tracker).is_file():
        raise CheckpointError(f"{path} holds neither {pattern} nor a file {tracker} that names the folder of a step")
    with open(path / tracker, encoding="utf-8", errors="replace") as file:
        tag = file.read(4096).strip()
    if Path(tag).name != tag or tag in ("", ".."):
        raise CheckpointError(f"{path / tracker} holds {tag[:300]!r}, which is not the name of a folder beside it")
    if not any((path / tag).glob(pattern)):
        raise CheckpointError(f"{path / tag}, which {tracker} names, holds no {pattern}: was it saved completely?")
    return path / tag


def known_beside(folder: Path, options: Options) -> Known:
    """From config.json in the folder of a step or the one above, where Trainer puts it, else `options.model`."""
    for place in (folder, folder.parent):
        origin = place / "config.json"
        if origin.is_file():
            fields = read_json(origin)
            files = read_files(place, fields)
            return Known(read_model(fields, str(origin)), read_sequence_length(fields, str(origin)), files)
    if options.model is None:
        raise ConfigError(
            f"{folder}: no config.json here or above tells the architecture: give --model PRESET or --config FILE"
        )
    return Known(options.model)


def by_our_names(names: Iterable[str], model: ModelConfig, origin: Path) -> dict[str, str]:
    """Our name of each parameter -> DeepSpeed's, which is transformers', perhaps with wrappers' prefixes.

    A tied head and tables of older rotary embeddings, which are no weights, are left out.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", ""))
        ours = our_name(plain)
        if plain.endswith("rotary_emb.inv_freq") or (ours == "output" and model.tie_embeddings):
            continue
        if ours in found:
            raise CheckpointError(f"{origin}: {name} and {found[ours]} are the same parameter")
        found[ours] = name
    return found


def at(content: Any, *keys: str | int) -> Any:
    """`content[key][key]...`, or None where there is no such thing."""
    for key in keys:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def step_count(value: Any, origin: Path) -> int:
    """AdamW's number of updates, which is kept as a number or a tensor of one. Raises CheckpointError."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, int | float) or number < 0 or not float(number).is_integer():
        raise CheckpointError(f"{origin}: AdamW's step is {str(value)[:100]}, not a number of updates")
    return int(number)
