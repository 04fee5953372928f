"""Activations of some layers in host memory, from their forward pass until shortly before their backward pass.

Autograd hands over what it would keep of a layer; the device's memory is free again when the next layer's forward pass is over,
so the copy has one layer's time. In the backward pass the first tensor of a layer that is asked for brings back the layer's and
starts the copies of the layer before: one layer ahead.

On CUDA the copies run on streams of their own, from and to pinned memory, ordered by events; the host never waits. On a CPU the
same code copies at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.collectives import Done, Handle
from parallel.recompute import Packed, storage_key

MIN_BYTES = 2**20  # below, a copy costs more (its launch, its latency) than the memory is worth


class HostMemory:
    """Where a stage's offloaded layers go. Tensors of less than `MIN_BYTES` stay on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.leaving, self.returning = (_CopyStream(device) for _ in range(2))

    def layer(self, previous: OffloadedLayer | None, stay: Iterable[Tensor], last: bool = False) -> OffloadedLayer:
        """The next layer of a forward pass, after `previous`. Memory of the tensors `stay` (weights, tables) is not offloaded.

        `last`: the first layer that keeps all it has on the device; it is told so that it brings back the one before.
        """
        return OffloadedLayer(self, previous, {storage_key(tensor) for tensor in stay}, last)


class _CopyStream:
    """Copies on a stream of their own; without CUDA, at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, source: Tensor, target: Tensor) -> Handle:
        """Start it after all that the current stream has been told so far. To wait makes the then current stream wait."""
        if source.is_meta or target.is_meta:  # (without numbers)
            return Done()
        if self._stream is None:
            target.copy_(source)
            return Done()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return _Copied(self._stream.record_event(), self._stream.device)


@dataclass(frozen=True)
class _Copied:
    """The end of a copy on a stream of its own."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class _Storage:
    """The memory of one or more tensors: on the device until `release`, on the host, and from `fetch` on the device again.

    Memory of the device is allocated and freed in the order of the computing stream, which waits for the copies' events, so the
    allocator needs to know of no other stream.
    """

    def __init__(self, memory: HostMemory, on_device: Tensor) -> None:
        self._memory, self._on_device = memory, on_device  # uint8 [bytes]
        self._on_host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=memory.device.type == "cuda")
        self._copied = memory.leaving.copy(on_device, self._on_host)

    def release(self) -> None:
        """Free the device's memory: what is computed from here on waits for the copy."""
        self._copied.wait()
        self._on_device = None

    def fetch(self) -> None:
        """Start the copy back, if the device's memory has been released."""
        if self._on_device is None:
            self._on_device = torch.empty(self._on_host.shape, dtype=torch.uint8, device=self._memory.device)
            self._copied = self._memory.returning.copy(self._on_host, self._on_device)
            self._on_host = None  # (pinned memory is not used again before its copy is over)

    def get(self) -> torch.UntypedStorage:
        self.fetch()
        self._copied.wait()
        return self._on_device.untyped_storage()


@dataclass(frozen=True)
class _Away(Packed):
    """A tensor of a layer: a view of a storage that may be on the host."""

    layer: OffloadedLayer
    storage: _Storage
    dtype: torch.dtype
    view: tuple[int, torch.Size, tuple[int, ...]]  # offset, shape, stride

    def tensor(self) -> Tensor:
        self.layer.begin_backward()
        return torch.empty(0, dtype=self.dtype, device=self.layer.memory.device).set_(self.storage.get(), *self.view)


@dataclass(frozen=True)
class _Here(Packed):
    """A tensor that stays, of a layer whose backward pass brings back the one before."""

    layer: OffloadedLayer
    value: Tensor

    def tensor(self) -> Tensor:
        self.layer.begin_backward()
        return self.value


class OffloadedLayer:
    """One layer in one forward pass: `put` what autograd would keep, and `release` when the next layer's pass is over."""

    def __init__(self, memory: HostMemory, previous: OffloadedLayer | None, stay: set[int], last: bool) -> None:
        self.memory, self._previous, self._stay, self._last = memory, previous, stay, last
        self._storages: dict[int, _Storage] = {}  # by `storage_key`; a storage that two tensors share goes once

    def put(self, tensor: Tensor) -> Tensor | _Away | _Here:
        """What to hold of a tensor (see `parallel.recompute.unpack`)."""
        source, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self._stay or tensor.device.type != self.memory.device.type:
            return tensor
        if self._last:
            return _Here(self, tensor)
        if source.nbytes() < MIN_BYTES:
            return tensor
        if key not in self._storages:
            on_device = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(source)
            self._storages[key] = _Storage(self.memory, on_device)
        view = (tensor.storage_offset(), tensor.shape, tensor.stride())
        return _Away(self, self._storages[key], tensor.dtype, view)

    def release(self) -> None:
        """Free what has gone to the host on the device."""
        for storage in self._storages.values():
            storage.release()

    def begin_backward(self) -> None:
        """Bring back this layer, if it is not on its way already, and then the one before it."""
        self._fetch()
        if self._previous is not None:
            self._previous._fetch()
            self._previous = None

    def _fetch(self) -> None:
        """Start the copies in the order in which the backward pass needs them. From then on only what needs them holds them."""
        for storage in reversed(self._storages.values()):
            storage.fetch()
        self._storages.clear()
