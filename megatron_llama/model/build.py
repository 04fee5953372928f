"""What every layer is built from: sizes, axes, kernels, dtype and device, and how its parameters get their first values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_llama.config import ModelConfig
from parallel.groups import ProcessGroups
from parallel.kernels.table import Kernels
from parallel.shards import Shard
from parallel.tensor.deferred import WeightGradientQueue
from parallel.tensor.parameter import ShardedParameter, initialize_normal


@dataclass(frozen=True)
class ModelContext:
    """The surroundings of a layer. `seed` None leaves weights at zero (they are about to be loaded).

    `block_kernels`, where given, are the kernels of the blocks; embedding, last norm and head have `kernels`. `queue` is that
    of the stage that the layer belongs to.
    """

    model: ModelConfig
    groups: ProcessGroups
    kernels: Kernels
    block_kernels: Kernels | None = None
    sequence_parallel: bool = False
    recompute: str = "none"
    recompute_layers: int = 0
    offload_layers: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    seed: int | None = 0
    tp_overlap: str = "backward"
    queue: WeightGradientQueue | None = None

    def parameter(self, shard: Shard, ones: bool = False) -> ShardedParameter:
        """A parameter at its place, with its initial values: ones, or N(0, init_std^2).

        Projections that end in the residual stream (wo, w2) have 1/sqrt(2 * num_layers) of that deviation
        (Radford et al. 2019, section 2.3).
        """
        parameter = ShardedParameter(shard, self.dtype, self.device)
        if ones:
            torch.nn.init.ones_(parameter)
        elif self.seed is not None:
            std = self.model.init_std
            scaled = std / (2 * self.model.num_layers) ** 0.5
            names = {segment.name for segment in shard.segments}
            initialize_normal(parameter, self.seed, {n: scaled if n.endswith((".wo", ".w2")) else std for n in names})
        return parameter
