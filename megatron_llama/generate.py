"""Sampling text from a checkpoint, in any layout: a check of what a model has learned, not a server.

    python -m megatron_llama.generate --checkpoint DIR --prompt TEXT [--max-tokens N] [--greedy] [--section.field value ...]

Every new token runs the whole context through the pipeline again (there is no key-value cache).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_llama.data.loader import MicroBatch
from megatron_llama.inference import open_checkpoint
from megatron_llama.program import Parser, agree, asks_for_help, command_line, run_program
from megatron_llama.runtime import Runtime
from megatron_llama.state import TOKENIZER_FILE
from megatron_llama.tokenizer import Tokenizer
from parallel.checkpoint.load import read_extra_file, read_manifest
from parallel.collectives import all_gather, broadcast
from parallel.errors import CheckpointError, ConfigError
from parallel.launch import Launch
from parallel.pipeline.schedules import forward_only


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. `temperature` 0 is greedy; `top_p` keeps the likeliest tokens that sum to it."""

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:  # [v] fp32 -> []
    """One token id. Top-p is nucleus sampling (Holtzman et al. 2020)."""
    if sampling.temperature == 0.0:
        return logits.argmax()
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the first one always stays
    probabilities = probabilities.masked_fill(outside, 0.0)
    return order[torch.multinomial(probabilities, 1, generator=generator)[0]]


class Generator:
    """Continues a list of tokens; all ranks call it together and get the same result.

    Only ids below `vocab_size` are chosen: a model may have more rows than its tokenizer has pieces.
    """

    def __init__(self, runtime: Runtime, sampling: Sampling, vocab_size: int) -> None:
        self.runtime, self.sampling, self.vocab_size = runtime, sampling, vocab_size
        self.random = torch.Generator().manual_seed(sampling.seed)
        for chunk in runtime.chunks:
            chunk.eval()

    def generate(self, tokens: list[int], max_tokens: int, stop: int | None = None) -> list[int]:
        """Up to `max_tokens` new ids; ends before `stop`."""
        new: list[int] = []
        while len(new) < max_tokens:
            token = self._next(tokens + new)
            if token == stop:
                break
            new.append(token)
        return new

    def _next(self, tokens: list[int]) -> int:
        runtime = self.runtime
        tp, pp = runtime.groups.tp, runtime.groups.pp_forward
        length = -(-len(tokens) // tp.size) * tp.size  # sequence parallelism splits it; what follows is not attended to
        padded = torch.tensor(tokens + [0] * (length - len(tokens)), device=runtime.device)[:, None]  # [s, 1]
        batch = MicroBatch(padded, None, None, torch.arange(length, device=runtime.device)[:, None])
        actions = forward_only(runtime.placement, 1)[runtime.groups.place.pp]
        outputs = runtime.executor(length, 1).run(actions, [batch])
        chosen = torch.zeros(1, dtype=torch.int64, device=runtime.device)
        if runtime.has_loss:
            local = outputs[0][len(tokens) - 1, 0].float()  # [v/tp]
            logits = all_gather(local, tp)[: self.vocab_size].cpu()
            chosen.fill_(choose(logits, self.sampling, self.random))
        broadcast(chosen, pp, runtime.placement.embedding_ranks[1])
        return int(chosen.item())


def _open_tokenizer(directory: Path, given: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that was given, or the checkpoint's own. Raises CheckpointError, ConfigError and DataError."""
    if not given:
        manifest = read_manifest(directory, groups=("weights",))
        if TOKENIZER_FILE not in manifest.extra_files:
            raise CheckpointError(f"{directory} holds no {TOKENIZER_FILE}: give one with --tokenizer FILE.model")
        read_extra_file(directory, TOKENIZER_FILE, manifest)  # verifies it
    tokenizer = Tokenizer(given or directory / TOKENIZER_FILE)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, and the model a vocabulary of {vocab_size}: "
            "give the one with which it was trained"
        )
    return tokenizer


def main(launch: Launch, argv: list[str]) -> int:
    """Continue a prompt; rank 0 prints it with its continuation."""
    if launch.rank and asks_for_help(argv):
        return 0
    parser = Parser("generate", "Continue a prompt.")
    parser.add_argument("--checkpoint", required=True, help="a step directory, a checkpoints folder or a run directory")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling, above 0 up to 1 (default 0.95)")
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument("--tokenizer", default="", help="a .model file (default: the one in the checkpoint)")
    arguments, overrides = parser.split(argv)
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens} must be at least 1")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--temperature {arguments.temperature} must be at least 0 and --top-p {arguments.top_p} in (0, 1]")
    runtime, directory = open_checkpoint(arguments.checkpoint, overrides, launch)
    vocab_size = runtime.config.model.vocab_size
    open_tokenizer = partial(_open_tokenizer, directory, arguments.tokenizer, vocab_size)
    tokenizer = agree(open_tokenizer, runtime.groups.world, runtime.device)
    sampling = Sampling(0.0 if arguments.greedy else arguments.temperature, arguments.top_p, arguments.seed)
    prompt = [tokenizer.bos_id, *tokenizer.encode(arguments.prompt)]
    new = Generator(runtime, sampling, tokenizer.vocab_size).generate(prompt, arguments.max_tokens, stop=tokenizer.eos_id)
    if launch.rank == 0:
        print(arguments.prompt + tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :])
    return 0


if __name__ == "__main__":
    sys.exit(run_program(lambda launch: main(launch, command_line(launch))))
