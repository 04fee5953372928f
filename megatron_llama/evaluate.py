"""Held-out loss, in any layout: during training, or of a checkpoint.

    python -m megatron_llama.evaluate --checkpoint DIR --data PREFIX [--tokens N] [--section.field value ...]
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial

import torch

from megatron_llama.data.blend import Blend, build_blend
from megatron_llama.data.loader import evaluation_micro_batches
from megatron_llama.inference import open_checkpoint
from megatron_llama.program import Parser, agree, asks_for_help, run_program
from megatron_llama.runtime import Runtime
from parallel.collectives import all_reduce
from parallel.errors import ConfigError
from parallel.launch import Launch
from parallel.pipeline.schedules import forward_only


class Evaluator:
    """Measures the token-mean loss of the first `num_samples` windows of a held-out blend, always the same ones."""

    def __init__(
        self, runtime: Runtime, blend: Blend, tokens: int, micro_batch_size: int, document_mask: bool = False
    ) -> None:
        self.runtime = runtime
        data = runtime.groups.data
        num_samples = min(blend.num_windows, max(1, tokens // blend.sequence_length))
        self.tokens = num_samples * blend.sequence_length
        self.micro_batches = evaluation_micro_batches(
            blend, num_samples, micro_batch_size, data.rank, data.size, document_mask=document_mask
        )
        schedule = forward_only(runtime.placement, len(self.micro_batches))
        self.actions = schedule[runtime.groups.place.pp]
        self.executor = runtime.executor(blend.sequence_length, micro_batch_size)

    def loss(self) -> float:
        """Nats per token, the same on every rank. All ranks call it together; it waits for the device."""
        runtime = self.runtime
        batches = [mb.to(runtime.device) for mb in self.micro_batches]
        batches = [replace(mb, loss_mask=mb.loss_mask / self.tokens) for mb in batches]
        for chunk in runtime.chunks:
            chunk.eval()
        losses = self.executor.run(self.actions, batches)
        for chunk in runtime.chunks:
            chunk.train()
        total = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        if runtime.has_loss and runtime.groups.tp.rank == 0:
            total += torch.stack(losses).double().sum()
        return all_reduce(total, runtime.groups.world).item()


def main(launch: Launch, argv: list[str]) -> int:
    """Evaluate a checkpoint; rank 0 prints loss, perplexity and tokens."""
    if launch.rank and asks_for_help(argv):
        return 0
    parser = Parser("evaluate", "Held-out loss of a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="a step directory, a checkpoints folder or a run directory")
    parser.add_argument("--data", required=True, nargs="+", metavar="PREFIX", help="indexed datasets (PREFIX.bin, PREFIX.idx)")
    parser.add_argument("--tokens", type=int, default=0, help="evaluate this many tokens (default: all)")
    arguments, overrides = parser.split(argv)
    if arguments.tokens < 0:
        raise ConfigError(f"--tokens {arguments.tokens} must be at least 1, or 0 for all")
    runtime, directory = open_checkpoint(arguments.checkpoint, overrides, launch)
    config = runtime.config

    def open_data() -> Blend:
        entries = [(prefix, None) for prefix in arguments.data]
        return build_blend(entries, config.train.sequence_length, config.data.seed, config.model.vocab_size, shuffle=False)

    blend = agree(open_data, runtime.groups.world, runtime.device)
    tokens = arguments.tokens or blend.num_windows * blend.sequence_length
    make = partial(Evaluator, runtime, blend, tokens, config.train.micro_batch_size, config.data.document_mask)
    evaluator = agree(make, runtime.groups.world, runtime.device)
    loss = evaluator.loss()
    if launch.rank == 0:
        print(f"{directory}: loss {loss!r} nats/token, perplexity {math.exp(loss):.4f}, {evaluator.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, sys.argv[1:])))
