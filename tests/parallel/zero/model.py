"""The model of the engine's tests: a tied embedding, a norm, two linears and a parameter that nothing uses.

Its parts know how to be split, but here they are whole: what the tests split is the optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.groups import Axis
from parallel.kernels.table import resolve_kernels
from parallel.tensor.cross_entropy import vocabulary_parallel_cross_entropy
from parallel.tensor.embedding import VocabularyParallelEmbedding
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear
from parallel.zero.engine import StepInfo
from parallel.zero.native import NativeZero
from tests.parallel.building import parameter, randn, whole

VOCABULARY, HIDDEN, FFN, TOKENS = 24, 6, 10, 5
SHARDS = {
    "table": whole("table", (VOCABULARY, HIDDEN), uses=2),
    "norm": whole("norm", (HIDDEN,), decay=False),
    "up": whole("up", (FFN, HIDDEN)),
    "down": whole("down", (HIDDEN, FFN)),
    "unused": whole("unused", (7,)),
}
MICRO_BATCHES = 3


class Scale(nn.Module):
    """rms_norm, whose gradient arrives in `.grad`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return resolve_kernels().rms_norm(x, self.weight, 1e-5)


class Net(nn.Module):
    """tokens, targets [s, b] -> loss; the head is the embedding's table."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        tp, kernels = Axis.single("tp"), resolve_kernels()
        full = {name: (randn(*shard.shape, seed=i) * 0.5).to(dtype) for i, (name, shard) in enumerate(SHARDS.items())}
        made = {name: parameter(shard, full) for name, shard in SHARDS.items()}
        self.embedding = VocabularyParallelEmbedding(made["table"], tp, False)
        self.norm = Scale(made["norm"])
        self.up = ColumnParallelLinear(made["up"], tp, False, kernels)
        self.down = RowParallelLinear(made["down"], tp, False, kernels)
        self.unused = made["unused"]
        self.head = ColumnParallelLinear(made["table"], tp, False, kernels)
        self.tp = tp

    def forward(self, tokens: Tensor, targets: Tensor, feed_forward: bool = True) -> Tensor:
        x = self.embedding(tokens)
        if feed_forward:
            x = x + self.down(self.up(self.norm(x)).relu())
        return vocabulary_parallel_cross_entropy(self.head(x), targets, VOCABULARY, self.tp).sum()

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by logical name."""
        return {p.shard.segments[0].name: p for p in self.parameters()}


def micro_batches(step: int, data_rank: int) -> list[tuple[Tensor, Tensor]]:
    """This data rank's micro-batches of a step."""
    generator = torch.Generator().manual_seed(1000 * step + data_rank)
    drawn = torch.randint(0, VOCABULARY, (MICRO_BATCHES, 2, TOKENS, 1), generator=generator)
    return [(tokens, targets) for tokens, targets in drawn]


def backward_passes(net: Net, engine: NativeZero, batches: list[tuple[Tensor, Tensor]]) -> None:
    """What the executor does on a single stage."""
    engine.begin_step()
    engine.expect_passes(len(batches))
    for tokens, targets in batches:
        net(tokens, targets).backward()


def train_step(net: Net, engine: NativeZero, step: int, data_rank: int, learning_rate: float) -> StepInfo:
    backward_passes(net, engine, micro_batches(step, data_rank))
    return engine.step(learning_rate, torch.zeros(1, dtype=torch.float64))
