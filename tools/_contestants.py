"""What benchmark_step.py compares: our step, and its products alone. The peers are in _peers.py and _megatron_peer.py."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.nn.functional as F
from _teams import Clock, Measured
from torch import Tensor

from megatron_llama.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    load_config,
    micro_batches_per_step,
    tokens_per_step,
    validate_layout,
    validate_model,
)
from megatron_llama.config.presets import preset_layer, preset_names
from megatron_llama.data.loader import MicroBatch
from megatron_llama.runtime import DTYPES, Runtime, build_runtime
from megatron_llama.step import TrainStep, make_engine
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
COMPUTE, UPDATE = "forward and backward", "norm and update"  # parts of a step; reductions begin in the first
SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
TOLERANCES = {"fp32": (2e-6, 1e-5), "bf16": (2e-3, 1e-2)}  # relative, of the first loss and norm: sums in another order
LINEARS, ATTENTION = "linears and head", "attention"


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common: a run's model, layout (with dp), batch and dtype, of which a step is measured.

    `planted`: one token is another one, so that the comparison of the first losses must fail.
    """

    config: RunConfig
    device: str = "cpu"
    planted: bool = False

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def world_size(self) -> int:
        parallel = self.config.parallel
        return parallel.tp * parallel.pp * parallel.dp

    @property
    def micro_batches(self) -> int:
        """Of one data rank in a step."""
        return micro_batches_per_step(self.config, self.world_size)

    @property
    def targets(self) -> int:
        """Tokens of a step."""
        return tokens_per_step(self.config)

    def runtime(self, rank: int) -> Runtime:
        return build_runtime(self.config, rank, self.world_size, torch.device(self.device), timedelta(minutes=10))

    def tokens(self, step: int, data_rank: int) -> Tensor:  # [micro-batches, b, s + 1]
        """What a data rank reads in a step: random tokens."""
        generator = torch.Generator().manual_seed(step)
        batch = self.config.parallel.dp, self.micro_batches, self.train.micro_batch_size
        tokens = torch.randint(0, self.model.vocab_size, (*batch, self.train.sequence_length + 1), generator=generator)
        if self.planted:
            tokens[0, 0, 0, 0] = (tokens[0, 0, 0, 0] + 1) % self.model.vocab_size
        return tokens[data_rank]


def add_arguments(parser: argparse.ArgumentParser, preset: str, sequence_length: int, dtype: str) -> None:
    """The flags of a setting: model, batch and dtype, with these defaults."""
    parser.add_argument("--preset", default=preset, choices=preset_names(), metavar="NAME", help="(%(default)s)")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--sequence-length", type=int, default=sequence_length, metavar="N", help="(%(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N", help="of each data rank (%(default)s)")
    parser.add_argument("--dtype", default=dtype, choices=("fp32", "bf16"), help="(%(default)s)")


def make_setting(arguments: argparse.Namespace, flags: list[str], parallel: ParallelConfig, device: str) -> Setting:
    """What the arguments ask for; `flags` are further ones of the form --section.field. Raises ConfigError."""
    given = {name: value for name in SIZES if (value := getattr(arguments, name)) is not None}
    train = TrainConfig(
        steps=1,
        global_batch_size=parallel.dp * arguments.micro_batches * arguments.micro_batch_size,
        micro_batch_size=arguments.micro_batch_size,
        sequence_length=arguments.sequence_length,
        dtype=arguments.dtype,
    )
    model = ModelConfig(**preset_layer(arguments.preset, "--preset")["model"] | given)
    setting = Setting(load_config(flags, RunConfig(model=model, parallel=parallel, train=train, optimizer=OPTIMIZER)), device)
    validate_model(setting.config)
    validate_layout(setting.config, setting.world_size)
    return setting


def logical_weights(setting: Setting) -> dict[str, Tensor]:
    """The initial weights, whole, by their logical names: fp32, with the values that they have in the run's dtype."""
    config = RunConfig(model=setting.model, train=TrainConfig(dtype=setting.train.dtype))
    runtime = build_runtime(config, 0, 1, CPU, timedelta(minutes=1))
    return {
        segment.name: parameter.detach()[segment.local.slices()].float()
        for parameter in runtime.chunks[0].parameters()
        for segment in parameter.shard.segments
    }


def check_first(ours: Measured, theirs: Measured, peer: str, dtype: str) -> None:
    """End the program where ours and the peer have not made the same first step."""
    for what, tolerance in zip(("loss", "norm"), TOLERANCES[dtype], strict=True):
        a, b = getattr(ours, what), getattr(theirs, what)
        difference = abs(a - b) / abs(b)
        print(f"first {what:5s}  ours {a:.7f}  {peer} {b:.7f}  relative difference {difference:.1e}", flush=True)
        if not difference <= tolerance:
            sys.exit(f"error: the first {what} of ours and {peer} differ by more than {tolerance:.0e}: not the same training")


class Ours:
    """One rank of our step, and the wait for what it has sent: weights are not gathered behind another one's step."""

    def __init__(self, setting: Setting, rank: int, clock: Clock) -> None:
        runtime = setting.runtime(rank)
        self.setting, self.data_rank, self.clock = setting, runtime.groups.place.dp, clock
        self.engine = make_engine(runtime)
        self.step = TrainStep(runtime, self.engine, setting.micro_batches)
        clock.wrap(self.step.executor, "run", COMPUTE)
        clock.wrap(self.engine, "step", UPDATE)

    def run(self, number: int) -> tuple[float, float]:
        tokens = self.setting.tokens(number, self.data_rank)
        positions = torch.arange(self.setting.train.sequence_length)[:, None]
        parts = [part.t().contiguous() for part in tokens]
        batches = [MicroBatch(t[:-1], t[1:], torch.ones(t[1:].shape), positions) for t in parts]
        info = self.step.run(self.step.prepare(batches), OPTIMIZER.learning_rate)
        with self.clock.part("wait for the weights"):
            self.engine.finish()
        return info.sums[0].item(), info.norm.item()


class Products:
    """The matrix products of one rank's step and nothing else, with weights and gradients of their own for each layer.

    Of each linear and the head, for every micro-batch: y = x W^T, dx = dy W, dW += dy^T x. Of attention: torch's
    scaled_dot_product_attention, causal, forward and backward.
    """

    def __init__(self, setting: Setting, rank: int, clock: Clock) -> None:
        runtime = setting.runtime(rank)
        self.clock, self.micro_batches, dtype = clock, setting.micro_batches, DTYPES[setting.train.dtype]
        modules = [module for chunk in runtime.chunks for module in chunk.modules()]
        self.weights = [m.weight.detach() for m in modules if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        batch, sequence = setting.train.micro_batch_size, setting.train.sequence_length
        widths = {width for weight in self.weights for width in weight.shape}
        self.activations = {width: torch.randn(batch * sequence, width, dtype=dtype) for width in widths}
        attentions = [block.attention for chunk in runtime.chunks for block in chunk.blocks.values()]
        self.layers, one = len(attentions), attentions[0]
        self.qkv = [
            torch.randn(batch, heads, sequence, one.head_dim, dtype=dtype, requires_grad=True)
            for heads in (one.local_heads, one.local_kv_heads, one.local_kv_heads)
        ]

    def run(self, number: int) -> tuple[float, float]:
        for _ in range(self.micro_batches):
            with self.clock.part(LINEARS):
                for weight in self.weights:
                    self.activations[weight.shape[1]] @ weight.t()
                for weight, gradient in zip(reversed(self.weights), reversed(self.gradients), strict=True):
                    dy, x = (self.activations[width] for width in weight.shape)
                    dy @ weight
                    gradient.addmm_(dy.t(), x)
            with self.clock.part(ATTENTION):
                for _ in range(self.layers):
                    y = F.scaled_dot_product_attention(*self.qkv, is_causal=True, enable_gqa=True)
                    torch.autograd.grad(y, self.qkv, y)
        return 0.0, 0.0
