"""Counted, not timed: bytes on the wire per kind and axis equal the layout's formula; activations in flight the checker's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_llama.config import ParallelConfig, ZeroConfig
from megatron_llama.verdict import HostSums
from tests.parity.test_parity import SHALLOW, SMALL_BATCH, STAGE_0, layout
from tests.parity.training import MODEL, TRAIN, Case, train
from tests.ranks import run_ranks

FP32_BYTES, FP64_BYTES, INT64_BYTES = 4, 8, 8
TOTALS = 2 + len(HostSums._fields)  # of a step, over the world: squared norm, loss, and what the hosts add

CASES = [
    Case("tp2", layout(tp=2), MODEL, SMALL_BATCH),
    Case("tp2-sp", layout(tp=2, sequence_parallel=True), MODEL, SMALL_BATCH),
    Case("tp4-sp-full-recompute", layout(tp=4, sequence_parallel=True, recompute="full"), MODEL, SMALL_BATCH),
    Case("pp4", layout(pp=4), MODEL, SMALL_BATCH),
    Case("pp2-gpipe", layout(pp=2, schedule="gpipe"), MODEL, SMALL_BATCH),
    Case("dp4-zero0", layout(dp=4), MODEL, SMALL_BATCH, zero=STAGE_0),
    Case("dp4-zero1", layout(dp=4), MODEL, SMALL_BATCH),
    Case("tp2-pp2-dp2", layout(tp=2, pp=2, dp=2, sequence_parallel=True), MODEL, SMALL_BATCH),
]


def expected_bytes(case: Case, rank: int, bucket_elements: int, norm_elements: int) -> dict[tuple[str, str], int]:
    """What one rank sends in one step, by the ring formulas. b = 1, no activation recomputation but full."""
    parallel, model = case.parallel, case.model
    tp, pp, dp = parallel.tp, parallel.pp, parallel.dp
    stage, tp_sp = rank // (dp * tp), parallel.sequence_parallel and tp > 1
    tokens = case.train.sequence_length * case.train.micro_batch_size
    activation = tokens * model.hidden_size * FP32_BYTES  # [s, b, h]
    micro_batches = case.train.global_batch_size // (case.train.micro_batch_size * dp)
    layers = model.num_layers // pp
    forwards = 2 if parallel.recompute == "full" else 1
    first, last = stage == 0, stage == pp - 1

    def ring(size: int, ranks: int) -> int:  # all-gather, reduce-scatter of a whole of `size` bytes
        return size * (ranks - 1) // ranks

    sent: dict[tuple[str, str], int] = {}

    def add(kind: str, axis: str, size: int) -> None:
        if size:
            sent[kind, axis] = sent.get((kind, axis), 0) + size

    # tensor axis: 2 column and 2 row linears a layer; the head is a column linear; the embedding ends in a reduction
    if tp_sp:
        # column: gather x forward, gather x and scatter dx backward; row: scatter y forward, gather dy backward
        # recomputation ends before a block's last scatter: nothing behind it was kept
        gathers = layers * (2 * forwards + 2 + 2) + (2 if last else 0) + (1 if first else 0)
        scatters = layers * (1 + forwards + 2) + (1 if last else 0) + (1 if first else 0)
        add("all_gather", "tp", micro_batches * gathers * ring(activation, tp))
        add("reduce_scatter", "tp", micro_batches * scatters * ring(activation, tp))
        add("all_reduce", "tp", 2 * ring(norm_elements * FP32_BYTES, tp))  # norm weights, once a step
    elif tp > 1:
        reductions = layers * (1 + forwards + 2) + (1 if last else 0) + (1 if first else 0)
        add("all_reduce", "tp", micro_batches * reductions * 2 * ring(activation, tp))
    if tp > 1 and last:  # cross entropy: each rank's statistics [3, s, b]
        add("all_gather", "tp", micro_batches * ring(tp * 3 * tokens * FP32_BYTES, tp))
    # pipeline axis: an activation to the next stage, a gradient to the previous one
    messages = (not last) + (not first)
    add("send", "pp", micro_batches * messages * activation // (tp if tp_sp else 1))
    # data axis: the numbers of targets and of squared document lengths, and the gradients and weights of this rank's buckets
    if dp > 1:
        add("all_reduce", "data", 2 * ring(2 * INT64_BYTES, dp))
        if case.zero.stage == 0:
            add("all_reduce", "data", 2 * ring(bucket_elements * FP32_BYTES, dp))
        else:
            add("reduce_scatter", "data", ring(bucket_elements * FP32_BYTES, dp))
            add("all_gather", "data", ring(bucket_elements * FP32_BYTES, dp))
    add("all_reduce", "world", 2 * ring(TOTALS * FP64_BYTES, tp * pp * dp))
    return sent


def train_and_measure(rank: int, world_size: int, case: Case):
    """The outcome, and the sizes of this rank's buckets and norm weights in elements."""
    from tests.parity.training import Session

    session = Session(rank, world_size, case)
    for step in range(2):
        session.step(step)
    norms = sum(p.numel() for chunk in session.runtime.chunks for p in chunk.parameters() if not p.shard.decay)
    return session.finish(), sum(bucket.size for bucket in session.engine.buckets), norms


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_sent_in_a_step(case: Case) -> None:
    for rank, (outcome, elements, norms) in enumerate(run_ranks(case.world_size, train_and_measure, case)):
        assert outcome.sent_bytes == expected_bytes(case, rank, elements, norms), f"rank {rank}"


MICRO_BATCHES = 2
BF16_BYTES = [  # the messages of a step over D data ranks: bytes per parameter, of which each rank sends (D-1)/D
    ("fp32 gradients", 2, ZeroConfig(), {("reduce_scatter", "data"): 4, ("all_gather", "data"): 2}),
    ("bf16 wire", 2, ZeroConfig(reduce_dtype="bf16"), {("reduce_scatter", "data"): 2, ("all_gather", "data"): 2}),
    ("bf16 gradients", 2, ZeroConfig(gradient_dtype="bf16"), {("reduce_scatter", "data"): 2, ("all_gather", "data"): 2}),
    ("stage 2", 2, ZeroConfig(stage=2), {("reduce_scatter", "data"): 4 * MICRO_BATCHES, ("all_gather", "data"): 2}),
    ("stage 0", 2, ZeroConfig(stage=0), {("all_reduce", "data"): 2 * 4}),
    (
        "stage 0 with bf16 wire",
        2,
        ZeroConfig(stage=0, reduce_dtype="bf16"),
        {("reduce_scatter", "data"): 2, ("all_gather", "data"): 2},
    ),
    (
        "groups of 2",
        4,
        ZeroConfig(shard_group_size=2),
        {("reduce_scatter", "shard"): 4, ("all_reduce", "copies"): 2 * 4 / 2, ("all_gather", "shard"): 2},
    ),
    (
        "stage 2 in groups of 2",
        4,
        ZeroConfig(stage=2, shard_group_size=2),
        {("reduce_scatter", "shard"): 4 * MICRO_BATCHES, ("all_reduce", "copies"): 2 * 4 / 2, ("all_gather", "shard"): 2},
    ),
]


@pytest.mark.parametrize(
    ("ranks", "zero", "bytes_per_parameter"), [row[1:] for row in BF16_BYTES], ids=[row[0] for row in BF16_BYTES]
)
def test_bytes_of_gradients_and_weights_in_bf16(ranks: int, zero: ZeroConfig, bytes_per_parameter: dict) -> None:
    """With fp32 gradients stage 1 sends 4 + 2 bytes per parameter; in stage 2 gradients leave in each backward pass, but cross
    from one group of ranks to the next once a step all the same."""
    batch = replace(TRAIN, dtype="bf16", global_batch_size=MICRO_BATCHES * ranks)
    for outcome, elements, _ in run_ranks(ranks, train_and_measure, Case("bf16", layout(dp=ranks), SHALLOW, batch, zero=zero)):
        sent = outcome.sent_bytes
        sent["all_reduce", "data"] -= 2 * 2 * INT64_BYTES * (ranks - 1) // ranks  # the counts of targets and of squared lengths
        for message, size in bytes_per_parameter.items():
            members = 2 if message[1] in ("shard", "copies") else ranks
            assert sent.pop(message) == size * elements * (members - 1) / members
        assert {message: size for message, size in sent.items() if size} == {
            ("all_reduce", "world"): 2 * TOTALS * FP64_BYTES * (ranks - 1) // ranks
        }


@pytest.mark.parametrize(
    ("parallel", "peaks"),
    [(layout(pp=4), [4, 3, 2, 1]), (layout(pp=2), [2, 1]), (layout(pp=2, schedule="gpipe"), [8, 8]), (layout(), [1])],
    ids=["pp4", "pp2", "gpipe", "alone"],
)
def test_activations_in_flight_are_the_checkers(parallel: ParallelConfig, peaks: list[int]) -> None:
    case = Case("peak", parallel)
    outcomes = run_ranks(case.world_size, train, case, 1)
    assert [outcome.peak_in_flight for outcome in outcomes] == [outcome.predicted_peak for outcome in outcomes] == peaks
