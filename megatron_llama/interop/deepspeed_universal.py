"""DeepSpeed's universal checkpoint of a transformers Llama, to and from: a folder for each parameter, whole and in fp32.

    latest_universal                                    names the folder of the step
    config.json, tokenizer's files                      as transformers keeps them
    global_step100_universal/
        zero/model.norm.weight/fp32.pt                  {"param": tensor, "cat_dim": 0}, or the flat tensor alone (ZeRO-3's)
        zero/model.norm.weight/exp_avg.pt, exp_avg_sq.pt      the same of AdamW's moments
        zero/model.norm.weight/step.pt                  number of updates (not ZeRO-3's)
        zero/optimizer_state.pt                         parameter groups; ZeRO-3's number of updates
        mp_rank_00_model_states.pt                      counters of the run; zero_pp_rank_0_mp_rank_00_... under ZeRO-3

`"vocab_tensor": True` marks tables whose rows are padded to what the loading run wants. Source: deepspeed/checkpoint
(ds_to_universal.py, universal_checkpoint.py), runtime/zero/stage3.py and runtime/engine.py of version 0.19.8.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llama.interop.deepspeed_files import (
    STAND_INS,
    at,
    by_our_names,
    known_beside,
    load_deepspeed_file,
    step_count,
    tagged_folder,
)
from megatron_llama.interop.hugging_face import hugging_face_name
from megatron_llama.interop.hugging_face_config import written_config
from megatron_llama.interop.hugging_face_tokenizer import generation_ids, tokenizer_files
from megatron_llama.interop.stored_model import MOMENTS, Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.interop.torch_files import load_torch_file
from parallel.errors import CheckpointError
from parallel.zero.deepspeed_setup import VERSION

TRACKER = "latest_universal"
UNIVERSAL_VERSION = 0.4
VOCABULARY = ("tok_embeddings", "output")
ROW_PARALLEL = ("attention.wo", "feed_forward.w2")  # tensor-parallel runs that load them cut their columns

Shape = tuple[int, ...]


def read(path: Path, options: Options) -> StoredModel:
    """The model in `path`, the folder of a step or the one above. Raises CheckpointError and ConfigError."""
    folder = tagged_folder(path, TRACKER, "zero/*/fp32.pt")
    known = known_beside(folder, options)
    names = by_our_names((file.parent.name for file in sorted(folder.glob("zero/*/fp32.pt"))), known.model, folder)
    places = {ours: folder / "zero" / theirs for ours, theirs in names.items()}
    shapes = logical_shapes(known.model)
    weights = {name: _stored(place / "fp32.pt", shapes.get(name)) for name, place in places.items()}
    moments = {(kind, name): places[name] / f"{kind}.pt" for kind in MOMENTS for name in places}
    optimizer = {
        f"{kind}/{name}": _stored(file, shapes.get(name), torch.float32)
        for (kind, name), file in moments.items()
        if file.is_file()
    }
    return StoredModel(
        origin=str(folder),
        model=known.model,
        weights=weights,
        optimizer=optimizer,
        optimizer_steps=_steps(folder) if optimizer else 0,
        sequence_length=known.sequence_length,
        files=known.files,
    )


def _stored(file: Path, shape: Shape | None, dtype: torch.dtype | None = None) -> StoredTensor:
    """The tensor in a file, which is opened for its shape now and for its values when they are wanted."""
    found = _mapped(file, shape)
    return StoredTensor(tuple(found.shape), dtype or found.dtype, lambda: _mapped(file, shape).to(dtype or found.dtype))


def _mapped(file: Path, shape: Shape | None) -> Tensor:
    """Flat tensors take the parameter's shape; of a table that is marked as padded, the rows above the vocabulary go."""
    content = load_torch_file(file)
    tensor = at(content, "param") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise CheckpointError(f"{file} holds no tensor of numbers: it is not a parameter of a universal checkpoint")
    if shape and tensor.dim() == 1 and tensor.numel() == math.prod(shape):
        return tensor.view(shape)
    if shape and isinstance(content, dict) and at(content, "vocab_tensor") is True and tensor.dim() == 2:
        return tensor[: shape[0]]
    return tensor


def _steps(folder: Path) -> int:
    file = next(iter(sorted(folder.glob("zero/*/step.pt"))), None)
    if file is not None:
        return step_count(load_torch_file(file, STAND_INS), file)
    file = folder / "zero" / "optimizer_state.pt"
    content = load_deepspeed_file(file)
    zero_3 = at(content, "optimizer_state_dict", "state", 0, "step")
    return step_count(at(content, "param_groups", 0, "step") if zero_3 is None else zero_3, file)


def write(stored: StoredModel, directory: Path, options: Options) -> None:
    """Fill `directory` with what a transformers run loads with {"checkpoint": {"load_universal": true}}, at any ZeRO stage.

    Weights become fp32 masters; where there are no moments they are those of an AdamW that has made no update.
    """
    steps = stored.optimizer_steps if stored.optimizer else 0
    folder = directory / f"global_step{steps}_universal"
    for name, shape in logical_shapes(stored.model).items():
        place = folder / "zero" / hugging_face_name(name)
        place.mkdir(parents=True)
        marks: dict[str, Any] = {"cat_dim": int(name.endswith(ROW_PARALLEL))}
        if name in VOCABULARY:
            marks["vocab_tensor"] = True
        torch.save({"param": _own(stored.weights[name].load(torch.float32))} | marks, place / "fp32.pt")
        for kind in MOMENTS:
            moment = stored.optimizer.get(f"{kind}/{name}")
            values = torch.zeros(()).expand(shape) if moment is None else _own(moment.load())  # (one number in the file)
            torch.save({"param": values} | marks, place / f"{kind}.pt")
        torch.save(torch.tensor(float(steps)), place / "step.pt")
    torch.save(_optimizer_state(len(stored.weights), steps), folder / "zero" / "optimizer_state.pt")
    for prefix in ("", "zero_pp_rank_0_"):  # stages 1 and 2, stage 3
        torch.save(_model_state(steps), folder / f"{prefix}mp_rank_00_model_states.pt")
    (directory / TRACKER).write_text(folder.name, encoding="utf-8")
    files = tokenizer_files(stored.files)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    config = written_config(stored.model, stored.sequence_length, torch.float32, generation_ids(files))
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _own(tensor: Tensor) -> Tensor:
    """The tensor with no more storage than its elements: torch.save writes whole storages."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _optimizer_state(weights: int, steps: int) -> dict[str, Any]:
    """Groups without settings, so that the loading run keeps its own; one for each weight, for it may have as many."""
    groups = [{"params": []} for _ in range(weights)]
    zero_3 = {"state": {0: {"step": torch.tensor(float(steps))}}, "param_groups": groups}
    return {"ds_version": VERSION, "param_groups": groups, "optimizer_state_dict": zero_3}


def _model_state(steps: int) -> dict[str, Any]:
    """The run's counters. Weights come from zero/, so there are none here."""
    return {
        "module": {},
        "optimizer": None,
        # What DeepSpeed's schedulers and torch's look for: the position; the run's own shape of the curve stays.
        "lr_scheduler": {"last_batch_iteration": steps, "last_epoch": steps, "_step_count": steps + 1, "lr_lambdas": []},
        "global_steps": steps,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
        "ds_version": VERSION,
    }
