"""ZeRO checkpoints of a transformers + DeepSpeed run without model parallelism, read as `engine.save_checkpoint` leaves them.

    latest                                      names the folder of the step
    config.json, tokenizer's files              as Trainer puts them there
    global_step100/
        mp_rank_00_model_states.pt              names and shapes of the parameters; in stage 3 zero_pp_rank_0_mp_rank_00_...
        zero_pp_rank_D_mp_rank_00_optim_states.pt      rank D's part of the fp32 masters and of AdamW's moments
                                                (in bf16 runs bf16_zero_pp_rank_...)

In stages 1 and 2 the parameters of a group lie one behind the other in a flat tensor, of which each rank has a run; its file
says which piece of which parameter lies where. In stage 3 each parameter is cut into equal parts, the last ones padded, and
a rank's parts lie one behind the other in the order of `param_shapes`.

Source: state_dict in deepspeed/runtime/zero/stage_1_and_2.py and stage3.py, runtime/bf16_optimizer.py, version 0.19.8.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_llama.interop.deepspeed_files import (
    at,
    by_our_names,
    known_beside,
    load_deepspeed_file,
    step_count,
    tagged_folder,
)
from megatron_llama.interop.stored_model import MOMENTS, Options, StoredModel, StoredTensor
from parallel.errors import CheckpointError

TRACKER = "latest"
RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MASTER = "fp32"
UNIVERSAL = "convert it with DeepSpeed's ds_to_universal and read that with --from deepspeed-universal"

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """What a rank holds of a parameter: `count` elements from `start` of its flat tensors of a group (stage 3: sub-group)."""

    group: int
    name: str
    start: int
    count: int


@dataclass(frozen=True)
class RankState:
    """One rank's file: its tensors are mapped, and stay so while the model is in use."""

    file: Path
    content: Mapping[str, Any]

    def flat(self, kind: str, group: int) -> Tensor | None:
        """The flat tensor of masters or moments of a parameter group (in stage 3: sub-group), if there is one."""
        if kind == MASTER:
            found = at(self.content, "fp32_flat_groups" if self.is_stage_3 else "single_partition_of_fp32_groups", group)
        else:
            found = at(self._moments, group, kind)
        return found.detach() if isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 1 else None

    @property
    def is_stage_3(self) -> bool:
        return "fp32_flat_groups" in self.content

    @property
    def steps(self) -> int:
        kept = at(self._moments, 0, "step")
        return step_count(at(self.content, "base_optimizer_state_step") if kept is None else kept, self.file)

    @property
    def partitions(self) -> Any:
        """How many ranks the run had; stages 1 and 2 say so for each group."""
        counts = self.content.get("partition_count")
        return counts[0] if isinstance(counts, list) and counts else counts

    @property
    def _moments(self) -> Any:
        """By group; `elastic_checkpoint` keeps them as a list."""
        kept = at(self.content, "optimizer_state_dict" if self.is_stage_3 else "base_optimizer_state")
        return kept if isinstance(kept, list) else at(kept, "state")


def read(path: Path, options: Options) -> StoredModel:
    """The model in `path`, the folder of a step or the one above. Raises CheckpointError and ConfigError."""
    folder = tagged_folder(path, TRACKER, "*_model_states.pt")
    ranks = _ranks(folder)
    known = known_beside(folder, options)
    groups = _parameter_shapes(folder, ranks[0].is_stage_3)
    found = _joined(ranks, groups)
    names = by_our_names((name for group in groups for name in group), known.model, folder)
    weights = {ours: found[MASTER, theirs] for ours, theirs in names.items() if (MASTER, theirs) in found}
    optimizer = {
        f"{kind}/{ours}": found[kind, theirs] for kind in MOMENTS for ours, theirs in names.items() if (kind, theirs) in found
    }
    steps = {rank.steps for rank in ranks} if optimizer else {0}
    if len(steps) > 1:
        raise CheckpointError(f"{folder}: its files are of steps {', '.join(map(str, sorted(steps)))}: not of one checkpoint")
    return StoredModel(
        origin=str(folder),
        model=known.model,
        weights=weights,
        optimizer=optimizer,
        optimizer_steps=steps.pop(),
        sequence_length=known.sequence_length,
        files=known.files,
    )


def _ranks(folder: Path) -> list[RankState]:
    """The states of all data-parallel ranks, in order. Raises CheckpointError where there are others, or not all."""
    if any(folder.glob("layer_*model_states.pt")):
        raise CheckpointError(f"{folder} is of a pipeline-parallel run: {UNIVERSAL}")
    files: dict[int, Path] = {}
    for file in sorted(folder.glob("*_optim_states.pt")):
        matched = RANK_FILE.fullmatch(file.name)
        if matched is None or int(matched[2]):
            raise CheckpointError(f"{file} is of a run with more than data parallelism: {UNIVERSAL}")
        rank = int(matched[1])
        if rank in files:
            raise CheckpointError(f"{file} and {files[rank].name} are both of rank {rank}: remove the one of another run")
        files[rank] = file
    if not files:
        raise CheckpointError(f"{folder} holds no *_optim_states.pt of a ZeRO stage: read the weights with --from hf")
    ranks = [RankState(files[rank], _optimizer_state(files[rank])) for rank in sorted(files)]
    wanted = ranks[0].partitions
    if wanted != len(files) or set(files) != set(range(len(files))):
        raise CheckpointError(f"{folder} holds {len(files)} *_optim_states.pt of {wanted} ranks: was it saved completely?")
    return ranks


def _optimizer_state(file: Path) -> Mapping[str, Any]:
    content = load_deepspeed_file(file).get("optimizer_state_dict")
    if not isinstance(content, dict) or not content.keys() & {"fp32_flat_groups", "single_partition_of_fp32_groups"}:
        raise CheckpointError(f"{file} holds no partition of fp32 weights: it is not of a ZeRO stage from 1 to 3")
    return content


def _parameter_shapes(folder: Path, is_stage_3: bool) -> list[dict[str, Shape]]:
    """Names and shapes of the parameters of each group (in stage 3: sub-group), in the order of the flat tensors."""
    file = folder / f"{'zero_pp_rank_0_' if is_stage_3 else ''}mp_rank_00_model_states.pt"
    content = load_deepspeed_file(file)
    frozen = content.get("frozen_param_shapes")
    if frozen:
        raise CheckpointError(f"{file}: {len(frozen)} parameters were not trained ({next(iter(frozen))}, ...): not supported")
    groups = content.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{file} has no param_shapes: it is not of a ZeRO stage from 1 to 3")
    for name, shape in (item for group in groups for item in group.items()):
        if not isinstance(name, str) or not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
            raise CheckpointError(f"{file}: {str(shape)[:100]} is not the shape of a parameter {str(name)[:100]}")
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _joined(ranks: Sequence[RankState], groups: Sequence[Mapping[str, Shape]]) -> dict[tuple[str, str], StoredTensor]:
    """Masters and moments of each parameter, as (kind, name), from the pieces of all ranks."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    parts: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for number, rank in enumerate(ranks):
        for piece in _equal_parts(rank, number, len(ranks), groups) if rank.is_stage_3 else _listed_pieces(rank):
            if piece.name not in shapes:
                raise CheckpointError(f"{rank.file} has a parameter {piece.name} that the model states don't know")
            for kind in (MASTER, *MOMENTS):
                flat = rank.flat(kind, piece.group)
                if flat is not None:
                    parts[kind, piece.name].append(_cut(flat, piece, rank.file))
    return {(kind, name): _tensor(parts[kind, name], shapes[name], kind, f"{kind} of {name}", ranks) for kind, name in parts}


def _cut(flat: Tensor, piece: Piece, file: Path) -> Tensor:
    end = piece.start + piece.count
    if not 0 <= piece.start <= end <= flat.numel():
        text = f"{piece.name} at {piece.start} to {end} of group {piece.group}, which has {flat.numel()} elements"
        raise CheckpointError(f"{file}: {text}")
    return flat[piece.start : end]


def _tensor(parts: list[Tensor], shape: Shape, kind: str, what: str, ranks: Sequence[RankState]) -> StoredTensor:
    held, wanted = sum(part.numel() for part in parts), math.prod(shape)
    if held != wanted:
        folder = ranks[0].file.parent
        raise CheckpointError(f"{folder}: the files hold {held} elements for {what}, which has {wanted}: are they of one save?")
    dtype = parts[0].dtype if kind == MASTER else torch.float32
    return StoredTensor(shape, dtype, lambda: torch.cat(parts).to(dtype).view(shape))


def _listed_pieces(rank: RankState) -> Iterator[Piece]:
    """Stages 1 and 2: as the rank's file says."""
    groups = rank.content.get("param_slice_mappings")
    if not isinstance(groups, list) or not all(isinstance(listed, dict) for listed in groups):
        raise CheckpointError(f"{rank.file} has no param_slice_mappings to tell where parameters lie: its DeepSpeed is too old")
    for group, listed in enumerate(groups):
        for name, place in listed.items():
            start, count = getattr(place, "start", None), getattr(place, "numel", None)
            if type(start) is not int or type(count) is not int:
                raise CheckpointError(f"{rank.file}: param_slice_mappings does not tell where {name} lies")
            yield Piece(group, name, start, count)


def _equal_parts(rank: RankState, number: int, count: int, groups: Sequence[Mapping[str, Shape]]) -> Iterator[Piece]:
    """Stage 3: parts of parameters in their order, without the padding of the last ones."""
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            whole = math.prod(shape)
            part = -(-whole // count)
            yield Piece(group, name, start, min(max(whole - number * part, 0), part))
            start += part
        flat = rank.flat(MASTER, group)
        if flat is None or flat.numel() != start:
            held = 0 if flat is None else flat.numel()
            text = f"holds {held} elements of sub-group {group}, where {start} belong"
            raise CheckpointError(f"{rank.file} {text}: are they offloaded to other files?")
