"""Our model against transformers' LlamaForCausalLM: same weights, same logits, losses and gradients, on 1 to 4 ranks."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_llama.config import ModelConfig, ParallelConfig
from megatron_llama.interop.hugging_face import hugging_face_name
from megatron_llama.runtime import build_runtime
from parallel.collectives import all_gather
from parallel.pipeline.schedules import forward_only
from tests.parity.hugging_face import build
from tests.parity.training import MODEL, TRAIN, Case, assemble, document_starts, packed_documents, sample, train
from tests.ranks import run_ranks

pytest.importorskip("transformers")

SCALED = replace(MODEL, rope_theta=100.0, rope_scaling_factor=8.0, rope_original_context=8)
MODELS = {
    "llama-1": MODEL,
    "gqa": replace(MODEL, num_kv_heads=2),
    "tied": replace(MODEL, tie_embeddings=True, num_kv_heads=1),
    "llama-3-rope": replace(SCALED, num_kv_heads=2, vocab_size=101),
}
LAYOUTS = {
    "alone": ParallelConfig(dp=1),
    "tp2": ParallelConfig(tp=2, dp=1),
    "tp2-pp2": ParallelConfig(tp=2, pp=2, dp=1),
}


def _initial_weights(case: Case) -> dict[str, torch.Tensor]:
    return assemble(run_ranks(1, train, case.alone, 0), "weights")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_step_0_gradients_and_loss(model: ModelConfig, layout: ParallelConfig) -> None:
    case = Case("hf", layout, model, ragged=True)
    outcomes = run_ranks(case.world_size, train, case, 1)
    module = build(model, _initial_weights(case))
    drawn = [sample(i, case) for i in range(TRAIN.global_batch_size)]
    tokens = torch.stack([tokens for tokens, _ in drawn])  # [b, s + 1]
    mask = torch.stack([mask for _, mask in drawn])
    losses = F.cross_entropy(module(tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    assert outcomes[0].losses[0] == pytest.approx(loss.item(), rel=5e-7)  # fp32 sums in another order
    theirs = dict(module.named_parameters())
    for name, gradient in assemble(outcomes, "gradients").items():
        reference = theirs[hugging_face_name(name)].grad
        difference = ((gradient - reference).norm() / reference.norm()).item()
        assert difference < 1e-5, f"{name}: {difference}"  # noise is about 1e-6
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm().item()
    assert outcomes[0].norms[0] == pytest.approx(norm, rel=1e-6)


def documents_alone(case: Case) -> list[torch.Tensor]:
    """The documents of the first global batch, each with the targets that count in it: [n + 1] tokens for n inputs."""
    samples = range(TRAIN.global_batch_size)
    if case.packed:
        blend = packed_documents(case)
        pieces = [piece for pieces in blend.pieces(np.arange(len(samples))) for piece in pieces]
        return [torch.from_numpy(blend.sources[0].dataset.read_raw(*piece[1:])) for piece in pieces]
    found = []
    for index in samples:
        tokens, _ = sample(index, case)
        edges = [0, *document_starts(index, case).tolist(), TRAIN.sequence_length]
        found += [tokens[start : end + 1] for start, end in zip(edges, edges[1:], strict=False)]
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_document_masks_are_each_document_alone(micro_batch_size: int, packed: bool) -> None:
    """With masks, the loss is that of transformers run on every document by itself, its positions from 0."""
    train_config = replace(TRAIN, micro_batch_size=micro_batch_size)
    case = Case("documents", ParallelConfig(dp=1), MODELS["llama-3-rope"], train_config, documents=not packed, packed=packed)
    module = build(case.model, _initial_weights(case))
    documents = documents_alone(case)
    losses = [F.cross_entropy(module(text[None, :-1]).logits[0], text[1:], reduction="none") for text in documents]
    assert len(losses) > TRAIN.global_batch_size  # some samples hold several documents
    expected = torch.cat(losses).mean()
    expected.backward()
    outcome = run_ranks(1, train, case, 1)[0]
    assert outcome.losses[0] == pytest.approx(expected.item(), rel=5e-7)
    theirs = dict(module.named_parameters())
    for name, gradient in assemble([outcome], "gradients").items():
        right = theirs[hugging_face_name(name)].grad
        assert ((gradient - right).norm() / right.norm()).item() < 1e-5, name


def logits_of(rank: int, world_size: int, case: Case) -> torch.Tensor | None:
    """Full logits [s, v] of sample 0 on the last stage."""
    from megatron_llama.data.loader import MicroBatch

    runtime = build_runtime(case.config, rank, world_size, torch.device("cpu"), timedelta(seconds=60))
    tokens, _ = sample(0, case)
    length = case.train.sequence_length
    batch = MicroBatch(tokens[:-1, None], None, None, torch.arange(length)[:, None])
    outputs = runtime.executor(length, 1).run(forward_only(runtime.placement, 1)[runtime.groups.place.pp], [batch])
    if not runtime.has_loss:
        return None
    local = outputs[0][:, 0].t().contiguous()  # [v/tp, s]
    return all_gather(local, runtime.groups.tp)[: case.model.vocab_size].t()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits(model: ModelConfig, layout: ParallelConfig) -> None:
    case = Case("hf", layout, model)
    module = build(model, _initial_weights(case))
    tokens, _ = sample(0, case)
    expected = module(tokens[None, :-1]).logits[0].detach()
    found = [logits for logits in run_ranks(case.world_size, logits_of, case) if logits is not None]
    for logits in found:
        assert (logits - expected).abs().max().item() < 2e-6  # logits are below 1; fp32 sums in another order
