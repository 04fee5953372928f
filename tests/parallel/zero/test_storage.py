"""The forms in which fp32 numbers are kept: which bits survive, and what rounding does to moving averages."""

import pytest
import torch

from parallel.zero.storage import SLICES, Master, Remainder, Rounded, Whole, slices
from tests.parallel.building import randn

ALL = slice(None)
STEP = torch.ones(())
TIE = 0x8000  # the lower half of an fp32 number that lies in the middle of two bf16 numbers


def floats(bits):
    return bits.to(torch.int32).view(torch.float32)


def all_kinds_of_numbers():
    """Upper halves at random, subnormal ones too; each with lower halves at the ends, in the middle and anywhere."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.randint(-(1 << 15), 1 << 15, (4000,), generator=generator)
    lower = torch.tensor([0, 1, TIE - 1, TIE, TIE + 1, 0xFFFF, *torch.randint(0, 1 << 16, (6,), generator=generator).tolist()])
    numbers = floats(((upper[:, None] << 16) + lower).reshape(-1))
    return numbers[torch.isfinite(numbers)]


def test_a_remainder_restores_the_master_bit_for_bit_but_in_ties():
    master = all_kinds_of_numbers()
    storage = Remainder(torch.zeros(len(master), dtype=torch.bfloat16))
    storage.write(ALL, master, STEP)
    assert torch.equal(storage.weights, master.bfloat16())  # to the nearest, as a whole master's
    restored, bits = storage.read(ALL), master.view(torch.int32)
    rounded_down = (bits & 0xFFFF == TIE) & (bits & 0x1FFFF == TIE)  # ties whose even neighbour is towards zero
    assert torch.equal(restored[~rounded_down], master[~rounded_down])
    assert torch.equal(restored.view(torch.int32)[rounded_down], bits[rounded_down] - 1)
    storage.write(ALL, restored, STEP)
    assert torch.equal(storage.read(ALL), restored)  # once, not again and again


def test_a_remainder_begins_with_the_weights_and_takes_two_bytes():
    weights = randn(100).bfloat16()
    storage = Remainder(weights)
    assert torch.equal(storage.read(ALL), weights.float())
    assert storage.state_bytes == 200
    assert [tensor.data_ptr() for tensor in storage.tensors()] == [weights.data_ptr(), storage.remainder.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_master_is_an_fp32_copy_of_16_bit_weights_and_fp32_weights_themselves(dtype):
    weights = randn(100).to(dtype)
    storage = Master(weights)
    part = slice(20, 60)
    numbers = storage.read(part)
    assert numbers.dtype == torch.float32 and torch.equal(numbers, weights[part].float())
    assert (numbers.data_ptr() == weights[part].data_ptr()) == (dtype == torch.float32)
    assert storage.state_bytes == (0 if dtype == torch.float32 else 400)
    numbers *= 1.001
    storage.write(part, numbers, STEP)
    assert torch.equal(weights[part], numbers.to(dtype))


def test_what_bf16_has_is_kept_as_it_is():
    """So a masked update changes nothing, and a checkpoint loads what it saved."""
    numbers = all_kinds_of_numbers().bfloat16().float()
    numbers = numbers[torch.isfinite(numbers)]
    storage = Rounded(numbers)
    for step in range(5):
        storage.write(ALL, numbers, torch.tensor(float(step)))
        assert torch.equal(storage.read(ALL), numbers)


def test_other_numbers_go_to_a_neighbour_and_to_the_right_one_on_average():
    share = 0.3  # of the way from 1.0 to its neighbour in bf16
    numbers = torch.full((1000,), 1.0 + share * 2**-7)
    numbers = torch.cat([numbers, -numbers]) + randn(2000) * 1e-5
    storage, total = Rounded(numbers), torch.zeros(2000)
    for step in range(100):
        storage.write(ALL, numbers, torch.tensor(float(step)))
        kept = storage.read(ALL)
        assert set(kept.abs().tolist()) == {1.0, 1.0 + 2**-7}
        total += kept
    up = (total.abs() / 100 - 1.0) * 2**7
    assert up.mean().item() == pytest.approx(share, abs=0.005)  # 200,000 throws: a standard deviation of 0.001
    assert up.std().item() == pytest.approx((share * (1 - share) / 100) ** 0.5, rel=0.1)  # independent from step to step


@pytest.mark.parametrize("noisy", [True, False])
def test_a_second_moment_follows_its_gradients_down(noisy):
    """Ten times smaller gradients after the first half; rounded to the nearest, it would never get there."""
    beta2, steps = 0.998, 1500
    storage, right = Rounded(torch.empty(2000)), torch.zeros(2000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 2 * steps + 1):
        gradient = torch.randn(2000, generator=generator) if noisy else torch.linspace(1, 2, 2000)
        gradient = gradient if step <= steps else gradient / 10
        storage.write(ALL, beta2 * storage.read(ALL) + (1 - beta2) * gradient**2, torch.tensor(float(step)))
        right = beta2 * right + (1 - beta2) * gradient.double() ** 2
    ratio = storage.read(ALL) / right
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.02)
    assert ratio.std().item() < 0.15


def test_slices_cover_everything_once(monkeypatch):
    monkeypatch.setitem(SLICES, "cpu", 4)
    assert [list(range(11))[part] for part in slices(11, torch.device("cpu"))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.equal(Whole(torch.arange(11.0)).read(slice(4, 8)), torch.arange(4.0, 8.0))
