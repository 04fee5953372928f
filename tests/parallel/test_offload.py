"""Offload: the same gradients, the device's memory free between forward and backward pass, and back one layer ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from parallel import offload
from parallel.offload import HostMemory, OffloadedLayer
from parallel.recompute import Rematerializer, unpack
from tests.alive import AliveMemory
from tests.parallel.building import randn

LAYERS, ROWS, WIDTH = 4, 32, 64
ACTIVATION = ROWS * WIDTH * 4  # bytes
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is copied where, in order: ("out" or "back", bytes)."""
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(offload, "MIN_BYTES", ACTIVATION)
    fetch, put = offload._Storage.fetch, offload._Storage.__init__

    def noted_put(self, memory: HostMemory, on_device: Tensor) -> None:
        made.append(("out", on_device.nbytes))
        put(self, memory, on_device)

    def noted_fetch(self) -> None:
        if self._on_device is None:
            made.append(("back", self._on_host.nbytes))
        fetch(self)

    monkeypatch.setattr(offload._Storage, "__init__", noted_put)
    monkeypatch.setattr(offload._Storage, "fetch", noted_fetch)
    return made


def weights() -> list[Tensor]:
    return [randn(WIDTH, WIDTH, seed=layer).requires_grad_() for layer in range(LAYERS)]


def layer_of(x: Tensor, weight: Tensor) -> Tensor:
    return x + torch.sin(x @ weight)  # keeps x, the product and the weight


def forward(x: Tensor, parameters: list[Tensor], offloaded: int) -> Tensor:
    """The layers in turn, the first of them offloaded."""
    memory, layer = HostMemory(CPU), None
    for index, weight in enumerate(parameters):
        before, layer = layer, None
        if index <= offloaded:
            layer = memory.layer(before, [weight], last=index == offloaded)
            with saved_tensors_hooks(layer.put, unpack):
                x = layer_of(x, weight)
        else:
            x = layer_of(x, weight)
        if before is not None:
            before.release()
    if layer is not None:
        layer.release()
    return x


def gradients(offloaded: int) -> list[Tensor]:
    x, parameters = randn(ROWS, WIDTH, seed=9).requires_grad_(), weights()
    forward(x, parameters, offloaded).sum().backward()
    return [x.grad, *(weight.grad for weight in parameters)]


@pytest.mark.parametrize("offloaded", range(1, LAYERS + 1))
def test_offload_changes_no_bit(offloaded: int, copies: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(gradients(offloaded), gradients(0), strict=True))
    assert copies.count(("out", ACTIVATION)) == len(copies) / 2 == 2 * offloaded  # x and the product; never the weight


def test_what_is_offloaded_is_not_on_the_device(copies: list) -> None:
    def on_device(offloaded: int) -> int:
        copies.clear()
        parameters = weights()
        with AliveMemory(apart=parameters) as memory:
            y = forward(randn(ROWS, WIDTH).requires_grad_(), parameters, offloaded)
        assert y.requires_grad
        return memory.bytes() - sum(size for _, size in copies)

    everything = on_device(0)
    assert [everything - on_device(n) for n in (1, 2, 3, 4)] == [ACTIVATION, 3 * ACTIVATION, 5 * ACTIVATION, 7 * ACTIVATION]


def watch(layer: OffloadedLayer, name: str, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = layer._fetch

    def noted() -> None:
        if layer._storages:
            events.append(f"fetch {name}")
        fetch()

    monkeypatch.setattr(layer, "_fetch", noted)


def test_layers_come_back_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    layer_method = HostMemory.layer

    def noted(self, previous, stay, last=False):
        layer = layer_method(self, previous, stay, last)
        watch(layer, str(next(numbers)), events, monkeypatch)
        return layer

    monkeypatch.setattr(HostMemory, "layer", noted)
    numbers, parameters = iter(range(LAYERS)), weights()
    for index, weight in enumerate(parameters):
        weight.register_hook(lambda gradient, index=index: events.append(f"backward {index}"))
    forward(randn(ROWS, WIDTH).requires_grad_(), parameters, 3).sum().backward()
    assert events == [
        "fetch 2",  # by layer 3, which stays, at its beginning
        "backward 3",
        "fetch 1",
        "backward 2",
        "fetch 0",
        "backward 1",
        "backward 0",
    ]


class LateCopies:
    """A stream whose copies are made when somebody waits for them; until then there is something else."""

    def __init__(self, device: torch.device) -> None:
        pass

    def copy(self, source: Tensor, target: Tensor) -> LateCopies:
        late = LateCopies(CPU)
        late.source, late.target = source, target.fill_(7)
        return late

    def wait(self) -> None:
        if self.source is not None:
            self.target.copy_(self.source)
            self.source = None


@pytest.mark.parametrize("offloaded", [1, LAYERS])
def test_nothing_is_read_before_its_copy_is_over(offloaded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(0)
    monkeypatch.setattr(offload, "_CopyStream", LateCopies)
    assert all(torch.equal(a, b) for a, b in zip(gradients(offloaded), expected, strict=True))


def test_memory_that_tensors_share_goes_once_and_small_tensors_stay(copies: list) -> None:
    x = randn(2 * ROWS, WIDTH)
    layer = HostMemory(CPU).layer(None, [])
    views = [x, x[:ROWS], x.t(), x.view(torch.int32)]
    packed = [layer.put(view) for view in views]
    small = randn(ROWS - 1, WIDTH)
    assert layer.put(small) is small
    layer.release()
    again = [unpack(one) for one in packed]
    assert copies == [("out", 2 * ACTIVATION), ("back", 2 * ACTIVATION)]
    for view, back in zip(views, again, strict=True):
        assert torch.equal(view, back) and (view.stride(), view.dtype) == (back.stride(), back.dtype)
        assert back.untyped_storage().data_ptr() == again[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_layer_whose_memory_is_still_there_is_not_copied_back(copies: list) -> None:
    layer = HostMemory(CPU).layer(None, [])
    x = randn(ROWS, WIDTH)
    packed = layer.put(x)
    assert torch.equal(unpack(packed), x) and copies == [("out", ACTIVATION)]


def test_what_a_recipe_needs_is_offloaded_with_the_rest(copies: list) -> None:
    """The sine is made again from x, which is on the host: one tensor in all."""
    rematerializer, layer = Rematerializer(), HostMemory(CPU).layer(None, [])
    sine, x, weight = rematerializer.cheap(torch.sin), randn(ROWS, WIDTH).requires_grad_(), randn(WIDTH, WIDTH)
    with rematerializer.saving(layer.put):
        y = sine(x) @ weight.requires_grad_()
    layer.release()
    y.sum().backward()
    assert ("out", ACTIVATION) in copies
    right = (torch.sin(x.detach()).t() @ torch.ones(ROWS, WIDTH)).detach()
    assert torch.equal(weight.grad, right)
