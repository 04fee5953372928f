"""Whether a conversion has kept the model: the logits of source and result on fixed prompts, in fp32 on the CPU.

A Hugging Face folder is read by transformers where it is installed and the model fits into half of the memory, which checks
our reading and writing independently. Everything else is run by our own model, one layer in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_llama.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_llama.data.loader import MicroBatch
from megatron_llama.interop.stored_model import StoredModel
from megatron_llama.model.build import ModelContext
from megatron_llama.model.stage import Stage
from megatron_llama.runtime import model_kernels
from parallel.errors import CheckpointError
from parallel.groups import build_groups
from parallel.topology import Topology

PROMPTS, PROMPT_TOKENS, SEED = 4, 48, 1234
TOLERANCE = 1e-3  # of logits up to 10; larger ones may differ in proportion, as fp32 sums in another order do
OUR_READER = "our own model"


@dataclass(frozen=True)
class Side:
    """A checkpoint, by its format's name."""

    format: str
    path: Path
    stored: StoredModel


@dataclass(frozen=True)
class Comparison:
    """How far two models' logits are apart. `conversion` leaves out what rounding to another dtype explains."""

    difference: float
    conversion: float
    largest_logit: float
    readers: tuple[str, str]

    @property
    def same(self) -> bool:
        """Whether they are the same model up to rounding; never where a logit is not finite."""
        return self.conversion <= TOLERANCE * max(1.0, self.largest_logit / 10.0)

    def __str__(self) -> str:
        rounding = f" ({self.conversion:.1e} apart from rounding)" if self.difference != self.conversion else ""
        return (
            f"largest difference of logits {self.difference:.1e}{rounding} over {PROMPTS} prompts of {PROMPT_TOKENS} tokens, "
            f"largest logit {self.largest_logit:.1f}; source run by {self.readers[0]}, result by {self.readers[1]}"
        )


def compare(source: Side, result: Side, dtype: torch.dtype | None = None) -> Comparison:
    """The logits of both. `dtype`: that into which the conversion rounded the weights, None where it kept theirs.

    Raises CheckpointError where one cannot be read.
    """
    tokens = prompts(source.stored.model)
    (expected, expected_by), (found, found_by) = logits(source, tokens), logits(result, tokens)
    changed = any(dtype not in (None, tensor.dtype) for tensor in source.stored.weights.values())
    rounded = logits(source, tokens, dtype)[0] if changed else expected
    return Comparison(
        difference=(found - expected).abs().max().item(),
        conversion=(found - rounded).abs().max().item(),
        largest_logit=expected.abs().max().item(),
        readers=(expected_by, found_by),
    )


def prompts(model: ModelConfig) -> Tensor:  # [b, s]
    """Token ids, the same ones for each size of vocabulary."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(model.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator)


def logits(side: Side, tokens: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, str]:  # [b, s] -> [b, s, v]
    """The logits of a checkpoint, its weights rounded to `dtype` where given, and by what they were made."""
    if side.format == "hf" and _fits(side.stored):
        try:
            import transformers
        except ImportError:
            pass
        else:
            return _transformers_logits(side.path, tokens, dtype), f"transformers {transformers.__version__}"
    return our_logits(side.stored, tokens, dtype), OUR_READER


def _fits(stored: StoredModel) -> bool:
    """Whether the weights in fp32 take at most half of the machine's memory."""
    needed = sum(4 * torch.Size(tensor.shape).numel() for tensor in stored.weights.values())
    return 2 * needed <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def _transformers_logits(path: Path, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        module, found = transformers.LlamaForCausalLM.from_pretrained(
            path, dtype=dtype or torch.float32, attn_implementation="eager", output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded by transformers {transformers.__version__}: {error}") from error
    wrong = {kind: sorted(found[kind]) for kind in ("missing_keys", "mismatched_keys") if found[kind]}
    if wrong:
        raise CheckpointError(f"{path}: transformers {transformers.__version__} finds {wrong}")
    return module.float().eval()(tokens).logits


@torch.no_grad()
def our_logits(stored: StoredModel, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:  # [b, s] -> [b, s, v]
    """The logits by our own model as a pipeline whose stages exist one after the other."""
    positions = torch.arange(tokens.shape[1])[:, None]
    batch = MicroBatch(tokens.t(), None, None, positions)
    x = None
    for stage in _stages(stored.model):
        load_weights(stage, stored, dtype)
        x = stage(x, batch)
    return x[..., : stored.model.vocab_size].transpose(0, 1)


def _stages(model: ModelConfig) -> Iterator[Stage]:
    """The embedding, each layer, and the head, as stages of their own on one rank."""
    config = RunConfig(model=model, parallel=ParallelConfig(dp=1), train=TrainConfig(dtype="fp32", device="cpu"))
    device = torch.device("cpu")
    groups = build_groups(Topology(pp=1, dp=1, cp=1, tp=1), rank=0)
    context = ModelContext(model, groups, model_kernels(config, device)[0], seed=None)
    yield Stage(context, range(0), is_first=True, is_last=False)
    for layer in range(model.num_layers):
        yield Stage(context, range(layer, layer + 1), is_first=False, is_last=False)
    yield Stage(context, range(0), is_first=False, is_last=True)


@torch.no_grad()
def load_weights(module: nn.Module, stored: StoredModel, dtype: torch.dtype | None = None) -> None:
    """Fill the parameters of a stage, split in any way, from a stored model, rounded to `dtype` first where given."""
    for parameter in module.parameters():
        for segment in parameter.shard.segments:
            parameter[segment.local.slices()] = stored.weights[segment.name].load(dtype)[segment.box.slices()]
