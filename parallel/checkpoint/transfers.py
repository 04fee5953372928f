"""Which bytes of which files fill which parts of the targets of a load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.manifest import Manifest, StoredBox, dtype_name
from parallel.errors import CheckpointError
from parallel.shards import Box, TensorBox, flat_span, range_boxes

# what holds every value of the dtype exactly
WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


@dataclass(frozen=True)
class Transfer:
    """`common` (global coordinates) goes from a stored box, of `dtype`, to a target; file bytes [start, stop) contain it.

    `flat`: where `common` is contiguous both in the file and in the target, the 1-D view of the target that bytes
    [start, stop) fill in order; else None.
    """

    stored: StoredBox
    dtype: torch.dtype
    target: TensorBox
    common: Box
    start: int
    stop: int
    flat: Tensor | None

    def destination(self, start: int, stop: int) -> Tensor | None:
        """The CPU memory, as bytes, that file bytes [start, stop) may be read straight into, if they all belong there."""
        if self.flat is None or self.flat.device.type != "cpu" or self.flat.dtype != self.dtype:
            return None
        if start < self.start or stop > self.stop:
            return None
        return self.flat.view(torch.uint8)[start - self.start : stop - self.start]

    def copy_from(self, block: Tensor, first: int) -> None:
        """Take what this transfer wants of `block`: the bytes from byte `first` of the file on."""
        start, stop = max(first, self.start), min(first + block.numel(), self.stop)
        size = self.dtype.itemsize
        if self.flat is not None:
            destination = self.flat[(start - self.start) // size : (stop - self.start) // size]
            destination.copy_(block[start - first : stop - first].view(self.dtype))
            return
        for box, wanted, at in self._pieces(start, stop):
            source = block[at - first : at - first + box.numel * size].view(self.dtype).view(box.shape)
            destination = self.target.tensor[wanted.shifted(self.target.box.offset, self._zeros).slices()]
            destination.copy_(source[wanted.shifted(box.offset, self._zeros).slices()])

    def wants(self, start: int, stop: int) -> bool:
        """Whether some of the file bytes [start, stop) belong to `common`."""
        start, stop = max(start, self.start), min(stop, self.stop)
        return start < stop and (self.flat is not None or any(True for _ in self._pieces(start, stop)))

    @property
    def _zeros(self) -> tuple[int, ...]:
        return (0,) * len(self.common.offset)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Box, Box, int]]:
        """File bytes [start, stop) as boxes that are contiguous in the file: the box, its part of `common`, its first byte."""
        box, position, size = self.stored.box, self.stored.position, self.dtype.itemsize
        for local, flat in range_boxes(box.shape, (start - position) // size, (stop - position) // size):
            found = local.shifted(self._zeros, box.offset)
            wanted = found.intersect(self.common)
            if wanted is not None:
                yield found, wanted, position + flat * size


def plan(directory: Path, targets: list[TensorBox], manifest: Manifest, widen: bool) -> Iterator[Transfer]:
    """What fills the targets; raises CheckpointError where one does not fit the checkpoint. `widen` as in `load_tensors`."""
    wanted = {target.name for target in targets}
    missing = sorted(wanted - manifest.tensors.keys())
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(wanted)} tensors are not in the checkpoint ({names}): "
            "is it a checkpoint of another model, or one saved without them?"
        )
    by_tensor: dict[str, list[StoredBox]] = {name: [] for name in wanted}
    for stored in manifest.boxes:
        if stored.tensor in by_tensor:
            by_tensor[stored.tensor].append(stored)
    for boxes in by_tensor.values():
        boxes.sort(key=lambda stored: stored.box.offset)
    for target in targets:
        _check_target(directory, target, manifest, widen)
        dtype = manifest.tensors[target.name].dtype
        end = target.box.end[0] if target.box.shape else 1
        filled = 0
        for stored in by_tensor[target.name]:
            if stored.box.offset and stored.box.offset[0] >= end:
                break
            common = stored.box.intersect(target.box)
            if common is not None:
                filled += common.numel
                yield _transfer(stored, dtype, target, common)
        if filled != target.box.numel:
            raise CheckpointError(
                f"{directory}: only {filled} of {target.box.numel} elements of {target.name} at {target.box.offset} are stored"
            )


def _check_target(directory: Path, target: TensorBox, manifest: Manifest, widen: bool) -> None:
    info = manifest.tensors[target.name]
    if info.shape != tuple(target.global_shape):
        raise CheckpointError(
            f"{directory}: the checkpoint's {target.name} is {list(info.shape)}, this model's is {list(target.global_shape)}: "
            "is it a checkpoint of another model?"
        )
    if info.dtype != target.tensor.dtype and not (widen and target.tensor.dtype in WIDER.get(info.dtype, ())):
        raise CheckpointError(
            f"{directory}: the checkpoint's {target.name} is {dtype_name(info.dtype)}, this run's is "
            f"{dtype_name(target.tensor.dtype)}: use the dtype with which it was saved"
        )
    assert Box.whole(info.shape).contains(target.box), f"{target.name}: {target.box} leaves {info.shape}"


def _transfer(stored: StoredBox, dtype: torch.dtype, target: TensorBox, common: Box) -> Transfer:
    zeros = (0,) * len(common.offset)
    first, last = flat_span(stored.box.shape, common.shifted(stored.box.offset, zeros))
    to_first, to_last = flat_span(target.box.shape, common.shifted(target.box.offset, zeros))
    flat = None
    if last - first == to_last - to_first == common.numel and target.tensor.is_contiguous():
        flat = target.tensor.detach().view(-1)[to_first:to_last]
    start, stop = (stored.position + element * dtype.itemsize for element in (first, last))
    return Transfer(stored, dtype, target, common, start, stop, flat)
