"""The program's messages on streams: ranks as threads that share one device, with messages and what they read coming late.

On CPUs this shows that the ranks agree whatever carries their messages; on a GPU, that nobody reads a tensor before it is
there. The GPU part has not run on a device yet.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_llama.config import ZeroConfig
from tests.local_backend import LocalBackend, Member, Work, run_threads
from tests.parity.comparison import differences, inexact, reference
from tests.parity.test_parity import SMALL_BATCH, STAGE_0, TIED, layout
from tests.parity.training import MODEL, OPTIMIZER, Case, Outcome, Session, train

DELAY_CYCLES = 2_000_000  # about a millisecond: many times what a kernel of the tiny model takes
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

UNCLIPPED = replace(OPTIMIZER, clip_norm=0.0)
PIPELINES = [
    Case("pp4-1f1b", layout(pp=4), optimizer=UNCLIPPED),
    Case("pp2-zb-h1", layout(pp=2, schedule="zb-h1"), optimizer=UNCLIPPED),
    Case("pp2-zb-v", layout(pp=2, chunks=2, schedule="zb-v"), optimizer=UNCLIPPED),
]
DATA = [
    Case("dp2-zero0", layout(dp=2), MODEL, SMALL_BATCH, zero=STAGE_0),
    Case("dp2-zero1", layout(dp=2), MODEL, SMALL_BATCH),
    Case("dp2-zero2", layout(dp=2), MODEL, SMALL_BATCH, zero=ZeroConfig(stage=2)),
    Case("pp2-dp2-tied", layout(pp=2, dp=2), TIED, SMALL_BATCH),
]


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: case.name)
def test_pipelines_of_threads_have_the_bits_of_one_process(case: Case) -> None:
    outcomes = run_threads(LocalBackend(), case.world_size, train, case)
    assert inexact(outcomes, [reference(case)]) == []


@pytest.mark.parametrize("case", DATA, ids=lambda case: case.name)
def test_data_ranks_of_threads_meet_the_parity_criteria(case: Case) -> None:
    assert differences(case, run_threads(LocalBackend(), case.world_size, train, case)) == []


class Careless(LocalBackend):
    """Reads of messages do not wait for them: what has not come is 0."""

    def irecv(self, tensor: torch.Tensor, src: int, group: Member, tag: int) -> Work:
        tensor.zero_()
        super().irecv(torch.empty_like(tensor), src, group, tag)  # it arrives elsewhere
        work = Work(self)
        work.met.set()
        return work


def test_a_message_that_is_read_too_early_is_seen() -> None:
    case = PIPELINES[1]
    assert inexact(run_threads(Careless(), case.world_size, train, case), [reference(case)]) != []


def train_on_gpu(rank: int, world_size: int, case: Case) -> Outcome:
    session = Session(rank, world_size, case, device="cuda")
    for step in range(4):
        session.step(step)
    return session.finish()


@pytest.mark.parametrize("delayed", ["messages", "producers"])
@pytest.mark.parametrize("case", [*PIPELINES, *DATA], ids=lambda case: case.name)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_late_messages_change_no_bit(case: Case, delayed: str, device: str) -> None:
    on_time = run_threads(LocalBackend(), case.world_size, train_on_gpu, case)
    late = run_threads(LocalBackend(DELAY_CYCLES, delayed), case.world_size, train_on_gpu, case)
    assert inexact(late, on_time) == []
