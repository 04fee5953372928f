"""Activation recomputation: what autograd does not keep is made again in the backward pass.

`recompute` drops all that a function makes inside. `Rematerializer` drops the outputs of cheap functions (norms, rotary
embedding, SwiGLU) wherever a dearer one that follows would keep them as its input; the dear ones (linears, attention) never run
twice. Sources: Chen et al. 2016; Korthikanti et al. 2022, section 5; Touvron et al. 2023 (LLaMA), section 2.4.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)` whose intermediate activations are dropped and made again in the backward pass.

    Nothing random is recomputed (there is no dropout), so no generator state is kept.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Packed(ABC):
    """What autograd holds in place of a tensor that it was to keep."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The tensor again, bit for bit."""


def unpack(kept: Any) -> Any:
    """What was kept, as it was before it was packed."""
    return kept.tensor() if isinstance(kept, Packed) else kept


def storage_key(tensor: Tensor) -> int:
    """What tensors have in common that lie in the same memory, while one of them lives. (On meta all addresses are 0.)"""
    return tensor.untyped_storage()._cdata


def itself(tensor: Tensor) -> Tensor:
    """Keeps a tensor as it is."""
    return tensor


@dataclass(frozen=True)
class _Recipe:
    """How a tensor was made, and its version: it may be written in place. `alive` forgets the recipe with the tensor."""

    function: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    version: int
    alive: weakref.ref


@dataclass(frozen=True)
class _MadeAgain(Packed):
    """A view, as `as_strided` has it, of what `function` makes of the kept `inputs`."""

    function: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    view: tuple[torch.Size, tuple[int, ...], int]

    @torch.no_grad()
    def tensor(self) -> Tensor:
        return self.function(*map(unpack, self.inputs)).as_strided(*self.view)


class Rematerializer:
    """Knows how the outputs of cheap functions were made, so that autograd keeps the recipe and not the tensor.

        norm = rematerializer.cheap(norm)
        with rematerializer.saving():
            y = linear(norm(x))  # the linear's input is not kept; x, from which the norm makes it again, is

    Recipes are found by the tensor's memory, so views count too. They give the same bits for the same inputs.
    """

    def __init__(self) -> None:
        self._recipes: dict[int, _Recipe] | None = None  # by `storage_key`; None while nobody saves

    def cheap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same function, whose outputs are made again rather than kept."""

        def noted(*inputs: Any) -> Tensor:
            made = function(*inputs)
            self.note(made, function, *inputs)
            return made

        return noted

    def note(self, made: Tensor, function: Callable[..., Tensor], *inputs: Any) -> None:
        """`made`, a new tensor, is what `function` makes of `inputs`."""
        recipes, storage = self._recipes, made.untyped_storage()
        if recipes is None or storage.nbytes() != made.nbytes:  # (a view of something larger is kept as it is)
            return
        key = storage_key(made)
        alive = weakref.ref(made, lambda _: recipes.pop(key, None))  # what has this key next is another tensor
        recipes[key] = _Recipe(function, tuple(map(_without_graph, inputs)), made._version, alive)

    @contextmanager
    def saving(self, keep: Callable[[Tensor], Any] = itself) -> Iterator[None]:
        """Inside, outputs of cheap functions are not kept. `keep` says what to hold of all other tensors: see `unpack`."""

        recipes: dict[int, _Recipe] = {}

        def pack(tensor: Tensor) -> Any:
            recipe = recipes.get(storage_key(tensor))
            if recipe is None or recipe.version != tensor._version:
                return keep(tensor)
            inputs = tuple(pack(one) if isinstance(one, Tensor) else one for one in recipe.inputs)
            return _MadeAgain(recipe.function, inputs, (tensor.shape, tensor.stride(), tensor.storage_offset()))

        self._recipes = recipes
        try:
            with saved_tensors_hooks(pack, unpack):
                yield
        finally:
            self._recipes = None


def _without_graph(value: Any) -> Any:
    """A tensor without the graph that made it, which a recipe is not to keep alive."""
    return value.detach() if isinstance(value, Tensor) else value
