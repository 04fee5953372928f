"""The loss scale, against torch's own (the kernel behind torch.amp.GradScaler)."""

import pytest
import torch

from parallel.zero.loss_scale import SMALLEST, LossScale

CPU = torch.device("cpu")


def after(steps, scale):
    values = []
    for finite in steps:
        scale.update(torch.tensor(1.0 if finite else torch.inf), torch.tensor(0.0 if finite else 1.0))
        values.append(scale.value.item())
    return values


def test_it_grows_and_falls_as_torchs():
    generator = torch.Generator().manual_seed(0)
    steps = (torch.rand(200, generator=generator) < 0.8).tolist()
    value, tracker, right = torch.tensor(1024.0), torch.tensor(0, dtype=torch.int32), []
    for finite in steps:
        torch._amp_update_scale_(value, tracker, torch.tensor(0.0 if finite else 1.0), 2.0, 0.5, 3)
        right.append(value.item())
    assert after(steps, LossScale(1024.0, 3, CPU)) == [max(v, SMALLEST) for v in right]
    assert max(right) > 4096.0 and min(right) < 1024.0


def test_it_does_not_fall_for_ever():
    assert after([False] * 4, LossScale(4.0, 10, CPU)) == [2.0, 1.0, SMALLEST, SMALLEST]


def test_what_is_void_for_another_reason_changes_nothing():
    """Nor does what is not finite at the smallest scale, which is no matter of the scale: the step may be run again."""
    scale = LossScale(1.0, 2, CPU)
    assert after([True], scale) == [1.0]
    state = scale.state
    scale.update(torch.tensor(1.0), torch.tensor(1.0))
    scale.update(torch.tensor(torch.nan), torch.tensor(1.0))
    assert scale.state == state
    assert after([True], scale) == [2.0]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_one_goes_on_with_its_count(cut):
    steps = [True, True, True, False, True, True]
    whole, first, second = (LossScale(8.0, 2, CPU) for _ in range(3))
    values = after(steps[:cut], first)
    second.state = first.state
    assert values + after(steps[cut:], second) == after(steps, whole)


def test_the_value_of_a_step_is_not_changed_by_the_next():
    """A step's numbers are read while the next one runs."""
    scale = LossScale(8.0, 1, CPU)
    before = scale.value
    scale.update(torch.tensor(1.0), torch.tensor(0.0))
    assert before.item() == 8.0 and scale.value.item() == 16.0
