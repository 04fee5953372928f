"""The learning-rate curve at its corners, and against torch's schedulers."""

import pytest
import torch

from megatron_llama.config import OptimizerConfig
from megatron_llama.lr_schedule import learning_rate

OPTIMIZER = OptimizerConfig(learning_rate=3e-4, min_learning_rate_ratio=0.1, warmup_steps=10)


def test_corners():
    assert learning_rate(0, OPTIMIZER, 100) == pytest.approx(3e-5)  # the first update is not wasted
    assert learning_rate(9, OPTIMIZER, 100) == 3e-4  # the last warm-up update has the peak
    assert learning_rate(54, OPTIMIZER, 100) == pytest.approx((3e-4 + 3e-5) / 2)  # half of the cosine
    assert learning_rate(99, OPTIMIZER, 100) == pytest.approx(3e-5)
    assert learning_rate(1000, OPTIMIZER, 100) == pytest.approx(3e-5)


def test_never_rises_after_warm_up_and_never_falls_in_it():
    rates = [learning_rate(step, OPTIMIZER, 100) for step in range(120)]
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("warmup, total", [(10, 100), (1, 7), (0, 50), (2000, 2400)])
def test_equals_torch_linear_then_cosine(warmup, total):
    optimizer = OptimizerConfig(learning_rate=3e-4, min_learning_rate_ratio=0.1, warmup_steps=warmup)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=total - warmup, eta_min=3e-5)
    # torch counts finished updates, and its cosine starts at the peak, which is our last warm-up update
    for step in range(warmup, total):
        reference.step()
        cosine.step()
        assert learning_rate(step, optimizer, total) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
    for step in range(warmup):
        assert learning_rate(step, optimizer, total) == pytest.approx(3e-4 * (step + 1) / warmup, rel=1e-12)


def test_warm_up_as_long_as_the_run():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_steps=5)
    assert [learning_rate(step, optimizer, 5) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 0.1]
