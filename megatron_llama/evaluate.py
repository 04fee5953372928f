"""Held-out loss, in any layout: during training, or of a checkpoint.

    python -m megatron_llama.evaluate --checkpoint DIR --data PREFIX ... [--tokens N] [--json] [--section.field value ...]

The loss is the mean over the targets that count, in nats. Bits per byte make tokenizers comparable:

    bits per byte = loss / ln 2 x tokens / bytes of text

with the tokens and bytes of the whole dataset, as its sidecar gives them: what is evaluated is taken to have as many bytes a
token. The tokens bos and eos are targets too; their bits count, and they have no bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_llama.config import masks_documents
from megatron_llama.data.held_out import HeldOutSource, open_held_out
from megatron_llama.data.loader import evaluation_micro_batches, target_count
from megatron_llama.inference import open_checkpoint
from megatron_llama.json_values import finite
from megatron_llama.program import Parser, agree, asks_for_help, command_line, run_program
from megatron_llama.runtime import Runtime
from parallel.collectives import all_reduce
from parallel.errors import ConfigError
from parallel.launch import Launch
from parallel.pipeline.schedules import forward_only

ALL = sys.maxsize  # tokens


@dataclass(frozen=True)
class SourceLoss:
    """The loss of one source, or of all, in nats per token over `tokens` targets."""

    name: str
    loss: float
    tokens: int
    bytes_per_token: float | None  # None where it is not known

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def values(self) -> dict[str, float]:
        """What metrics.jsonl says of it; what is not known is left out."""
        values = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation has found."""

    sources: Sequence[SourceLoss]

    @property
    def total(self) -> SourceLoss:
        """All sources together: each target counts the same."""
        tokens = sum(source.tokens for source in self.sources)
        loss = sum(source.loss * source.tokens for source in self.sources) / tokens
        known = all(source.bytes_per_token for source in self.sources)
        text_bytes = sum(source.bytes_per_token * source.tokens for source in self.sources) if known else None
        return SourceLoss("all", loss, tokens, text_bytes / tokens if text_bytes else None)

    def record(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        return {"valid_loss": self.total.loss, "valid": {source.name: source.values() for source in self.sources}}

    def table_lines(self) -> list[str]:
        """A row for each source, and one for all where they are several."""
        rows = [*self.sources, self.total] if len(self.sources) > 1 else self.sources
        width = max(map(len, ["source", *(row.name for row in rows)]))
        lines = [f"{'source':<{width}}      loss  perplexity  bits/byte        tokens"]
        for row in rows:
            bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
            lines.append(f"{row.name:<{width}}  {row.loss:8.4f}  {row.perplexity:10,.2f}  {bits:>9}  {row.tokens:12,}")
        return lines


class Evaluator:
    """Measures the held-out loss of each source over its first windows, always the same ones."""

    def __init__(
        self, runtime: Runtime, sources: Sequence[HeldOutSource], micro_batch_size: int, document_mask: bool = False
    ) -> None:
        self.runtime, self.sources = runtime, sources
        data = runtime.groups.data
        parts = [  # a micro-batch is of one source
            evaluation_micro_batches(
                source.blend, source.num_windows, micro_batch_size, data.rank, data.size, document_mask=document_mask
            )
            for source in sources
        ]
        self.micro_batches = [micro_batch for part in parts for micro_batch in part]
        self.num_micro_batches = [len(part) for part in parts]
        self.target_counts = [target_count(part) for part in parts]  # on this data rank
        schedule = forward_only(runtime.placement, len(self.micro_batches))
        self.actions = schedule[runtime.groups.place.pp]
        self.executor = runtime.executor(sources[0].blend.sequence_length, micro_batch_size)

    def evaluate(self) -> Evaluation:
        """The same on every rank. All ranks call it together; it waits for the device."""
        runtime = self.runtime
        batches = [micro_batch.to(runtime.device) for micro_batch in self.micro_batches]
        for chunk in runtime.chunks:
            chunk.eval()
        losses = self.executor.run(self.actions, batches)
        for chunk in runtime.chunks:
            chunk.train()
        sums = torch.zeros((2, len(self.sources)), dtype=torch.float64, device=runtime.device)  # losses, targets
        if runtime.has_loss and runtime.groups.tp.rank == 0:
            parts = torch.stack(losses).double().split(self.num_micro_batches)
            sums[0] = torch.stack([part.sum() for part in parts])
            sums[1] = torch.tensor(self.target_counts)
        all_reduce(sums, runtime.groups.world)
        return Evaluation(
            [
                SourceLoss(source.name, loss / count, int(count), source.bytes_per_token)
                for source, loss, count in zip(self.sources, *sums.tolist(), strict=True)
            ]
        )


def main(launch: Launch, argv: list[str]) -> int:
    """Evaluate a checkpoint; rank 0 prints loss, perplexity and bits per byte of each dataset and of all."""
    if launch.rank and asks_for_help(argv):
        return 0
    parser = Parser("evaluate", "Held-out loss of a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="a step directory, a checkpoints folder or a run directory")
    parser.add_argument("--data", required=True, nargs="+", metavar="PREFIX", help="indexed datasets (PREFIX.bin, PREFIX.idx)")
    parser.add_argument("--tokens", type=int, default=0, help="evaluate so many tokens of all datasets together (default: all)")
    parser.add_argument("--json", action="store_true", help="print a JSON object with all digits instead of a table")
    arguments, overrides = parser.split(argv)
    if arguments.tokens < 0:
        raise ConfigError(f"--tokens {arguments.tokens} must be at least 1, or 0 for all")
    runtime, directory = open_checkpoint(arguments.checkpoint, overrides, launch)
    config = runtime.config

    def prepare() -> Evaluator:
        entries = [(prefix, None) for prefix in arguments.data]
        length, vocab_size = config.train.sequence_length, config.model.vocab_size
        sources = open_held_out(entries, length, vocab_size, arguments.tokens or ALL, "--data")
        return Evaluator(runtime, sources, config.train.micro_batch_size, masks_documents(config.data))

    evaluation = agree(prepare, runtime.groups.world, runtime.device).evaluate()
    total = evaluation.total
    if launch.rank == 0 and arguments.json:
        found = {"checkpoint": str(directory), **evaluation.record(), "all": total.values()}
        print(json.dumps(finite(found), indent=2, allow_nan=False))
    elif launch.rank == 0:
        print(f"{directory}: held-out loss {total.loss:.4f} nats/token over {total.tokens:,} tokens")
        print("\n".join(evaluation.table_lines()))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, command_line(launch))))
