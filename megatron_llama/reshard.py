"""Rewriting a checkpoint as the ranks of another layout would have written it, in one process and bounded memory.

Any layout loads any checkpoint, so nothing needs this. It is for what is to be loaded often: afterwards every rank of the new
layout finds what it needs in one file, in one run of bytes per tensor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_llama.checkpoint_plan import CheckpointPlan
from megatron_llama.config import RunConfig, to_dict
from megatron_llama.state import check_model
from parallel.checkpoint.load import read_extra_file
from parallel.checkpoint.manifest import TensorInfo
from parallel.checkpoint.offline import PIECE_ELEMENTS, StepReader, pieces_of, write_offline
from parallel.checkpoint.save import Groups
from parallel.checkpoint.steps import resolve_checkpoint
from parallel.errors import ConfigError
from parallel.shards import Box, TensorBox


class Resharding:
    """A checkpoint on its way into the layout that `config` has on `world_size` ranks. Building it reads no tensors.

    `weights_only` leaves the optimizer's state behind; `dtype` is that of the weights then (None: as stored). Raises
    CheckpointError and ConfigError.
    """

    def __init__(
        self, source: Path, config: RunConfig, world_size: int, weights_only: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        if dtype not in (None, torch.float32) and not weights_only:
            raise ConfigError(f"a run goes on from fp32 weights: --dtype {dtype} needs --weights-only")
        groups = ("weights",) if weights_only else None
        self._reader = StepReader(resolve_checkpoint(source, groups), groups)
        self._config, self._dtype = config, dtype
        # planned with moments in any case: those that the source lacks are passed over
        self._plan = CheckpointPlan(replace(config, optimizer=replace(config.optimizer, name="adamw")), world_size)
        check_model(self.directory, self._reader.manifest, config.model, "leave out the --model flags")
        self._wanted = self._tensors_of("weights") | ({} if weights_only else self._tensors_of("optimizer"))

    @property
    def directory(self) -> Path:
        """The step directory that is read."""
        return self._reader.directory

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in self._wanted.values())

    def write(self, root: Path, progress: Callable[[int], object] = lambda count: None) -> Path:
        """Write the step under the checkpoints root `root`, telling `progress` bytes as they are read; returns its directory.

        Position, schedule and dataset are the source's, the configuration in it that of the new layout. Extra memory: some
        pieces of 12 MiB and a block. Raises CheckpointError.
        """
        manifest, ahead = self._reader.manifest, _ReadAhead(self._reader)

        def bytes_of(item: TensorBox) -> Iterator[memoryview]:
            for piece in ahead.pieces(item):
                data = piece.to(item.tensor.dtype)
                yield memoryview(data.view(-1).view(torch.uint8).numpy())
                progress(data.nbytes)

        state = manifest.state | {"config": to_dict(self._config), "world_size": self._plan.world_size}
        extra_files = {name: read_extra_file(self.directory, name, manifest) for name in manifest.extra_files}
        parts = (ahead.expect(_stored(self._plan.boxes(rank), self._wanted)) for rank in range(self._plan.world_size))
        return write_offline(root, manifest.step, parts, bytes_of, state, extra_files)

    def _tensors_of(self, group: str) -> dict[str, TensorInfo]:
        tensors = {name: info for name, info in self._reader.manifest.tensors.items() if info.group == group}
        if group == "weights" and self._dtype is not None:
            tensors = {name: replace(info, dtype=self._dtype) for name, info in tensors.items()}
        return tensors


class _ReadAhead:
    """Reads the boxes of a rank in the order in which they are written: small ones together, as many may lie in one block."""

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader
        self._expected: deque[TensorBox] = deque()
        self._read: dict[tuple[str, Box], Tensor] = {}

    def expect(self, groups: dict[str, list[TensorBox]]) -> Groups:
        """`groups`, whose boxes are asked for next, those of larger elements first."""
        for items in groups.values():
            self._expected.extend(sorted(items, key=lambda item: -item.tensor.dtype.itemsize))
        return groups

    def pieces(self, item: TensorBox) -> Iterator[Tensor]:
        """The elements of the box that is next, in parts."""
        if item.box.numel > PIECE_ELEMENTS:
            assert self._expected.popleft() is item
            yield from (self._reader.read(item.name, box) for box in pieces_of(item.box, PIECE_ELEMENTS))
            return
        if not self._read:
            places, count = [], 0
            while self._expected and (count := count + self._expected[0].box.numel) <= PIECE_ELEMENTS:
                following = self._expected.popleft()
                places.append((following.name, following.box))
            self._read = dict(zip(places, self._reader.read_together(places), strict=True))
        yield self._read.pop((item.name, item.box))


def _stored(groups: Mapping[str, list[TensorBox]], wanted: Mapping[str, TensorInfo]) -> dict[str, list[TensorBox]]:
    """Of a plan's boxes those of tensors that are wanted, in their dtypes."""
    return {
        group: [replace(item, tensor=item.tensor.to(wanted[item.name].dtype)) for item in items if item.name in wanted]
        for group, items in groups.items()
    }
