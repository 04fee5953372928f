"""The forms in which a shard's fp32 numbers are kept: whole, rounded to bf16, or as what bf16 weights lack of them.

The arithmetic of an update is fp32 in each of them: `read` gives fp32 numbers, which the update changes, and `write` keeps
them. All tensors are flat; a place is a slice of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

ODD = (-1640531527, -2048144789, -1028477387)  # factors that spread bits
# Elements that are in fp32 at a time where they are not kept so: 32 MiB, and on CPUs what stays in the cache (5 times as fast).
SLICES = {"cuda": 1 << 23, "cpu": 1 << 18, "meta": 1 << 23}


class Storage(Protocol):
    """Some fp32 numbers in the form in which they are kept."""

    def tensors(self) -> Iterator[Tensor]:
        """All that `write` changes and that cannot be made again from the rest: a copy of it takes an update back."""

    @property
    def state_bytes(self) -> int:
        """Bytes beside the model's weights."""

    @property
    def whole(self) -> Tensor | None:
        """All numbers, where they are kept in fp32: then `read` gives parts of it."""

    def read(self, place: slice) -> Tensor:
        """The fp32 numbers at `place`: a view of what is kept, or a copy."""

    def write(self, place: slice, numbers: Tensor, step: Tensor) -> None:
        """Keep the numbers at `place`, which `read` gave and the update with number `step` changed."""


class Whole:
    """fp32, and nothing else."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def tensors(self) -> Iterator[Tensor]:
        yield self.numbers

    @property
    def state_bytes(self) -> int:
        return self.numbers.nbytes

    @property
    def whole(self) -> Tensor:
        return self.numbers

    def read(self, place: slice) -> Tensor:
        return self.numbers[place]

    def write(self, place: slice, numbers: Tensor, step: Tensor) -> None:
        """`numbers` are what is kept."""


class Master(Whole):
    """fp32 master weights, of which the model's weights are the nearest numbers: themselves where they are fp32 too."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__(weights.float())
        self.weights = weights

    @property
    def state_bytes(self) -> int:
        return 0 if self.numbers is self.weights else self.numbers.nbytes

    def write(self, place: slice, numbers: Tensor, step: Tensor) -> None:
        if self.numbers is not self.weights:
            self.weights[place] = numbers


class Remainder:
    """fp32 master weights as the model's bf16 weights and the 16 bits that those lack: 2 bytes more, not 4.

    A bf16 number is the upper half of an fp32 number, so master = weight + remainder in the integers of their bits. The weight
    is the nearest to the master, ties to even, so the model is the one that a whole master gives. The remainder lies in
    [-2^15, 2^15]; of these numbers 16 bits lack the last, which belongs to ties that were rounded towards zero. There the
    master moves by one unit in its last place: once in 2^17 updates of a weight, and by less than the update was rounded.
    Source of the split: NVIDIA Apex's DistributedFusedAdam (`store_param_remainders`), which rounds ties away from zero.
    """

    whole = None

    def __init__(self, weights: Tensor) -> None:
        assert weights.dtype == torch.bfloat16, f"{weights.dtype} weights are not the upper half of fp32 numbers"
        self.weights, self.remainder = weights, torch.zeros_like(weights, dtype=torch.int16)

    def tensors(self) -> Iterator[Tensor]:
        yield self.weights
        yield self.remainder

    @property
    def state_bytes(self) -> int:
        return self.remainder.nbytes

    def _upper(self, place: slice) -> Tensor:
        return self.weights[place].view(torch.int16).int() << 16

    def read(self, place: slice) -> Tensor:
        return (self._upper(place) + self.remainder[place]).view(torch.float32)

    def write(self, place: slice, numbers: Tensor, step: Tensor) -> None:
        self.weights[place] = numbers
        remainder = numbers.view(torch.int32) - self._upper(place)
        self.remainder[place] = remainder.clamp_(max=(1 << 15) - 1).to(torch.int16)


class Rounded:
    """bf16, rounded up or down at random so that the expected number is the right one.

    To the nearest, a moving average would stand still once its steps are below half a unit in the last place (2^-9 to 2^-8 of
    it): with beta2 = 0.999 a second moment would never fall again. The randomness is a hash of the number and the step: it
    needs no generator, a resumed run goes on with it, and copies of a parameter on other ranks are rounded alike. Numbers that
    bf16 has stay as they are.
    """

    whole = None

    def __init__(self, like: Tensor) -> None:
        self.numbers = torch.zeros_like(like, dtype=torch.bfloat16)

    def tensors(self) -> Iterator[Tensor]:
        yield self.numbers

    @property
    def state_bytes(self) -> int:
        return self.numbers.nbytes

    def read(self, place: slice) -> Tensor:
        return self.numbers[place].float()

    def write(self, place: slice, numbers: Tensor, step: Tensor) -> None:
        self.numbers[place].view(torch.int16).copy_(_rounded_at_random(numbers.view(torch.int32), step))


def _rounded_at_random(bits: Tensor, step: Tensor) -> Tensor:  # int32, scalar -> int32 in [-2^15, 2^15)
    """The upper halves of fp32 numbers, one larger in magnitude with the probability that the lower halves are of it."""
    rounded = _random_16_bits(bits, step)
    rounded += bits
    rounded >>= 16
    return rounded


def _random_16_bits(bits: Tensor, step: Tensor) -> Tensor:  # int32, scalar -> int32 in [0, 2^16)
    """A hash by multiplication, whose upper bits depend on all bits; integers wrap around."""
    mixed = bits + step.int() * ODD[0]
    mixed *= ODD[1]
    mixed ^= mixed >> 16
    mixed *= ODD[2]
    mixed >>= 16
    mixed &= 0xFFFF
    return mixed


def slices(size: int, device: torch.device) -> Iterator[slice]:
    """[0, size) in parts that may be in fp32 at a time."""
    step = SLICES[device.type]
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
