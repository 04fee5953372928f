"""What each rank of a layout writes into a checkpoint, told by one process that holds none of it.

The model's stages and the optimizer are built as on the ranks, but on torch's `meta` device, where tensors have no memory. So
there is one answer to what a rank holds, and no second one here. Data ranks of one stage and tensor rank differ only by which
shard they have, so stages are built once for all of them: 70B on 512 ranks takes seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from megatron_llama.config import RunConfig
from megatron_llama.model.build import ModelContext
from megatron_llama.model.stage import build_chunks
from megatron_llama.pipeline_plan import stage_layers
from megatron_llama.runtime import placement_of, replica_groups, topology_of
from megatron_llama.step import optimizer_settings
from parallel.checkpoint.files import data_file_name, lay_out
from parallel.checkpoint.manifest import BLOCK_BYTES, FileInfo, Manifest, TensorInfo
from parallel.checkpoint.offline import META
from parallel.groups import build_groups
from parallel.kernels.table import resolve_kernels
from parallel.pipeline.layout import split_layers
from parallel.shards import Piece, TensorBox
from parallel.topology import Coordinates
from parallel.zero.boxes import state_boxes
from parallel.zero.buckets import Bucket
from parallel.zero.native import NativeZero


class CheckpointPlan:
    """The boxes that each of `world_size` ranks of a layout writes.

    The cut over data ranks is that of the native engine; DeepSpeed's own is another one, and reads what is cut so as well.
    """

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self.config, self.world_size = _as_planned(config), world_size
        self._topology, self._kernels = topology_of(config, world_size), resolve_kernels()
        self._engines: dict[tuple[int, int], NativeZero] = {}

    def boxes(self, rank: int, write: bool = True) -> dict[str, list[TensorBox]]:
        """What `rank` is to write by group ("weights", "optimizer"), or else all it holds. The fp32 tensors have no memory."""
        place = self._topology.coordinates(rank)
        engine = self._engine(place.pp, place.tp)
        shard_size = engine.buckets[0].sharding.shard_axis.size
        copy, shard_rank = divmod(place.dp * self._topology.cp + place.cp, shard_size)
        shards = [_Shard(bucket, shard_rank) for bucket in engine.buckets]
        flats = [torch.empty(bucket.stop - bucket.start, device=META) for bucket in engine.buckets]
        weights = list(state_boxes(shards, flats, data_copy=(copy, engine.copies_axis.size) if write else None))
        moments = [replace(box, name=f"{kind}/{box.name}") for kind in engine.update.moment_names for box in weights]
        return {"weights": weights, "optimizer": moments}

    def manifest(self) -> Manifest:
        """The manifest of a checkpoint in this layout, all checksums 0. It is checked: each tensor is covered exactly once."""
        with _no_garbage_collection():
            manifest = self._manifest()
            manifest.check(f"the plan for {self._topology}")
        return manifest

    def _manifest(self) -> Manifest:
        manifest = Manifest(0, {}, {}, [])
        for rank in range(self.world_size):
            for group, items in self.boxes(rank).items():
                if not items:
                    continue
                for item in items:
                    manifest.tensors[item.name] = TensorInfo(item.global_shape, item.tensor.dtype, group)
                name = data_file_name(group, rank)
                _, boxes, size = lay_out(name, items)
                manifest.files[name] = FileInfo(name, size, BLOCK_BYTES, (0,) * -(-size // BLOCK_BYTES))
                manifest.boxes.extend(boxes)
        return manifest

    def _engine(self, pp: int, tp: int) -> NativeZero:
        if (pp, tp) not in self._engines:
            self._engines[pp, tp] = self._build(replace(self._topology.coordinates(0), pp=pp, tp=tp))
        return self._engines[pp, tp]

    def _build(self, place: Coordinates) -> NativeZero:
        """The engine of the first data rank of a stage and tensor rank."""
        config, topology, placement = self.config, self._topology, placement_of(self.config)
        rank, replicas = topology.rank(place), replica_groups(config, topology, placement)
        groups = build_groups(topology, rank, replicas, shard_group_size=config.zero.shard_group_size, connected=False)
        context = ModelContext(
            model=config.model,
            groups=groups,
            kernels=self._kernels,
            sequence_parallel=config.parallel.sequence_parallel and topology.tp > 1,
            device=META,
            seed=None,
        )
        layers = split_layers(config.model.num_layers, placement.num_stages, stage_layers(config, placement))
        return NativeZero(build_chunks(context, placement, layers), groups, optimizer_settings(config), self._kernels)


@dataclass(frozen=True)
class _Shard:
    """What one rank of the shard axis has of a bucket."""

    bucket: Bucket
    rank: int

    def pieces(self) -> Iterator[tuple[Piece, slice]]:
        return self.bucket.pieces_of(self.rank)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Where very many small objects are made and kept, looking through them for circles is a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _as_planned(config: RunConfig) -> RunConfig:
    """The configuration without what needs memory or a device to be set up, and has no part in who holds what."""
    return replace(
        config,
        train=replace(config.train, dtype="fp32"),
        optimizer=replace(config.optimizer, moment_dtype="fp32", master_weights="fp32"),
        zero=replace(config.zero, stage=min(config.zero.stage, 1), gradient_dtype="fp32", reduce_dtype="fp32"),
    )
