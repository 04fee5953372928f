"""Each planted bug must break the parity criteria: a matrix that a wrong factor can slip through proves nothing.

Bugs are planted in this process; the ranks are forked from it and inherit them. The reference on one process is made first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import megatron_llama.model.block
import megatron_llama.model.stage
import megatron_llama.state
import parallel.collectives
import parallel.zero.buckets
import parallel.zero.grad_norm
import parallel.zero.native
from megatron_llama.data import loader
from parallel.kernels import torch_attention, torch_kernels
from parallel.pipeline.executor import Executor
from parallel.zero.buckets import Bucket
from parallel.zero.native import NativeZero
from tests.parity import test_counts, test_hugging_face
from tests.parity.comparison import differences, inexact, reference
from tests.parity.test_parity import GQA, SGD, SMALL_BATCH, TIED, layout
from tests.parity.test_resume import check_pair
from tests.parity.training import Case, train
from tests.ranks import run_ranks

SP = Case("sp", layout(tp=2, sequence_parallel=True), optimizer=SGD)
KV = Case("kv", layout(tp=4, sequence_parallel=True), GQA, SMALL_BATCH, SGD)
TIED_PIPELINE = Case("tied", layout(pp=2), TIED, optimizer=SGD)
DATA = Case("dp", layout(dp=2), optimizer=SGD)
PIPELINE = Case("pp", layout(pp=2), optimizer=SGD)


def halve_norm_gradients(monkeypatch) -> None:
    sum_replicas = parallel.zero.grad_norm.sum_replicas

    def halved(bucket, groups):
        sum_replicas(bucket, groups)
        if "tp" in bucket.bucket_class.replica_axes:
            bucket.main_grad.mul_(0.5)

    monkeypatch.setattr(parallel.zero.native, "sum_replicas", halved)


def skip_replica_sums(monkeypatch) -> None:
    monkeypatch.setattr(parallel.zero.native, "sum_replicas", lambda bucket, groups: None)


def count_replicas_twice(monkeypatch) -> None:
    """The gradient norm counts every copy whole."""

    def counted(buckets, data_copies, l2_norm):
        return sum(bucket.master_grad.double().square().sum() for bucket in buckets) / data_copies

    monkeypatch.setattr(parallel.zero.native, "local_squared_norm", counted)


def double_gradients(monkeypatch) -> None:
    reduce_gradients = NativeZero.reduce_gradients

    def doubled(self):
        reduce_gradients(self)
        for bucket in self.buckets:
            bucket.master_grad.mul_(2.0)

    monkeypatch.setattr(NativeZero, "reduce_gradients", doubled)


def reduce_before_the_last_backward(monkeypatch) -> None:
    """The first micro-batch's gradients are reduced by themselves, and then once more with the others."""
    backward = Executor._backward

    def early(self, action, dy):
        dx = backward(self, action, dy)
        if action.micro_batch == 0:
            for bucket in self.listener_under_test.buckets:
                bucket.start_reduction()
                bucket.wait_reduction()
                bucket.has_left = False
        return dx

    run = Executor.run

    def remember(self, actions, micro_batches, listener=None, start=None):
        self.listener_under_test = listener
        return run(self, actions, micro_batches, listener, start)

    monkeypatch.setattr(Executor, "_backward", early)
    monkeypatch.setattr(Executor, "run", remember)


def forget_a_gather(monkeypatch) -> None:
    start_gather = Bucket.start_gather
    monkeypatch.setattr(Bucket, "start_gather", lambda self: None if self.start else start_gather(self))


def swap_micro_batches(monkeypatch) -> None:
    """The executor hands the wrong micro-batch's gradient back."""
    backward = torch.autograd.backward
    monkeypatch.setattr(torch.autograd, "backward", lambda edge, dy=None: backward(edge, None if dy is None else dy.flip(0)))


@pytest.mark.parametrize(
    ("plant", "case"),
    [
        (halve_norm_gradients, SP),
        (skip_replica_sums, SP),
        (count_replicas_twice, SP),
        (skip_replica_sums, KV),
        (count_replicas_twice, KV),
        (skip_replica_sums, TIED_PIPELINE),
        (count_replicas_twice, TIED_PIPELINE),
        (double_gradients, DATA),
        (reduce_before_the_last_backward, DATA),
        (swap_micro_batches, PIPELINE),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else value.__name__,
)
def test_planted_bug_is_caught(plant, case: Case, monkeypatch) -> None:
    reference(case)
    plant(monkeypatch)
    assert differences(case, run_ranks(case.world_size, train, case)) != []


def test_doubled_gradients_are_caught_under_adam_too(monkeypatch) -> None:
    """Adam hides a scale; the step-0 gradients and norm do not."""
    case = Case("adam", layout(dp=2))
    reference(case)
    double_gradients(monkeypatch)
    assert differences(case, run_ranks(2, train, case)) != []


def test_one_flipped_bit_is_caught_by_the_exact_criteria(monkeypatch) -> None:
    case = Case("exact", layout(pp=2), optimizer=replace(SGD, clip_norm=0.0))
    reference(case)
    rms_norm = torch.rsqrt
    monkeypatch.setattr(torch, "rsqrt", lambda x: rms_norm(x) * (1.0 + 2.0**-23))
    assert inexact(run_ranks(2, train, case), [reference(case)]) != []


def forget_the_count_of_steps(monkeypatch) -> None:
    steps = NativeZero.optimizer_steps
    monkeypatch.setattr(NativeZero, "optimizer_steps", property(steps.fget, lambda self, value: None))


def forget_the_second_moments(monkeypatch) -> None:
    load = megatron_llama.state.load_tensors

    def partial(directory, targets, *options):
        kept = [target for target in targets if not target.name.startswith("exp_avg_sq/")]
        return load(directory, kept, *options)

    monkeypatch.setattr(megatron_llama.state, "load_tensors", partial)


def forget_to_publish(monkeypatch) -> None:
    monkeypatch.setattr(NativeZero, "publish_weights", lambda self: None)


@pytest.mark.parametrize("plant", [forget_the_count_of_steps, forget_the_second_moments, forget_to_publish])
def test_planted_bug_in_resuming_is_caught(plant, monkeypatch, tmp_path) -> None:
    case = Case("resume", layout(dp=2))
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_pair(case, case, tmp_path, exact=True)


def turn_the_other_way(monkeypatch) -> None:
    """RoPE by negative angles."""
    tables = megatron_llama.model.stage.rope_tables
    monkeypatch.setattr(megatron_llama.model.stage, "rope_tables", lambda f, positions: tables(-f, positions))


def shift_kv_heads(monkeypatch) -> None:
    """Query heads attend to the wrong group's keys and values."""
    sdpa = torch_attention.sdpa

    def shifted(q, k, v, documents):
        return sdpa(q, k.roll(1, dims=2), v.roll(1, dims=2), documents)

    monkeypatch.setattr(torch_attention, "sdpa", shifted)


def larger_eps(monkeypatch) -> None:
    rms_norm = torch_kernels.rms_norm
    monkeypatch.setattr(torch_kernels, "rms_norm", lambda x, weight, eps: rms_norm(x, weight, 10 * eps))


@pytest.mark.parametrize("plant", [turn_the_other_way, shift_kv_heads, larger_eps])
def test_planted_bug_in_the_model_is_caught_by_transformers(plant, monkeypatch) -> None:
    """Parity of layouts cannot see it, since all layouts have it."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_hugging_face.test_step_0_gradients_and_loss(GQA, layout())


def count_every_target(monkeypatch) -> None:
    """Also those across the border of two documents, and padding."""
    monkeypatch.setattr(loader, "counted_targets", lambda blend, samples: np.ones((len(samples), blend.sequence_length), "f4"))


def let_documents_meet(monkeypatch) -> None:
    monkeypatch.setattr(loader, "document_starts", lambda blend, samples: [np.empty(0, np.int64)] * len(samples))


@pytest.mark.parametrize("plant", [count_every_target, let_documents_meet])
def test_planted_bug_in_packing_is_caught_by_transformers(plant, monkeypatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_hugging_face.test_document_masks_are_each_document_alone(1, packed=True)


def test_one_more_collective_is_caught_by_the_ledger(monkeypatch) -> None:
    forward = megatron_llama.model.block.Block.forward

    def chatty(self, x, places):
        parallel.collectives.all_reduce(torch.zeros(1), self.attention.wqkv.tp)
        return forward(self, x, places)

    monkeypatch.setattr(megatron_llama.model.block.Block, "forward", chatty)
    with pytest.raises(AssertionError):
        test_counts.test_bytes_sent_in_a_step(test_counts.CASES[0])
