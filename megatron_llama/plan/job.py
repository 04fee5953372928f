"""What the planner's models are given: a model's shape, its layout on a cluster, and what the software does.

Published runs (`rows`) and configurations of this program (`configured`) are both brought into this form.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llama.plan.hardware import Cluster

ELEMENTWISE = ("fused", "compiled", "partial", "eager")
ATTENTIONS = ("unfused", "flash1", "flash2", "flash3", "cudnn")


@dataclass(frozen=True)
class Shape:
    """A dense decoder. `gated`: three feed-forward matrices (SwiGLU), else two. `tied`: one table for embedding and head."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    sequence_length: int
    tied: bool = False
    gated: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Layout:
    """How the work is split, with the field names of a configuration where it has them.

    `rank_layers`: the layers of each pipeline rank. `shard_size`: ranks that share one copy of what ZeRO shards.
    `micro_batch_size` may be a mean. `tp_exposed`: shares of the tensor-parallel communication that no computation hides, in
    the forward and the backward pass. `split_sends`: a tensor rank sends its part of the activations on (Narayanan et al.
    2021, section 4.1).
    `gradient_bytes`, `gathered_bytes`: of one parameter on the wire, the latter of one activation too.
    """

    tp: int
    pp: int
    dp: int
    cp: int
    chunks: int
    schedule: str
    rank_layers: tuple[int, ...]
    sequence_parallel: bool
    zero_stage: int
    shard_size: int
    micro_batch_size: float
    micro_batches: int
    recompute: str
    recomputed_layers: float = 1.0
    tp_exposed: tuple[float, float] = (1.0, 1.0)
    split_sends: bool = True
    dp_overlap: bool = True
    float8: bool = False
    gradient_bytes: int = 4
    gathered_bytes: int = 2

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def samples(self) -> float:
        """Sequences of one step."""
        return self.micro_batch_size * self.micro_batches * self.dp


@dataclass(frozen=True)
class Software:
    """Three traits of a software stack, each a physical property of its kernels.

    `elementwise`: norms, rotation, activation function and loss as fused kernels, as a compiler's, partly fused, or one kernel
    per operation. `hides_pipeline`: sends of activations run beside the computation. `attention`: the attention kernel.
    """

    elementwise: str = "fused"
    hides_pipeline: bool = True
    attention: str = "flash2"


@dataclass(frozen=True)
class Job:
    """All that decides a step's time."""

    shape: Shape
    layout: Layout
    cluster: Cluster
    software: Software
