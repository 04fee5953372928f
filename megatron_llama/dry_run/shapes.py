"""Operators on meta tensors, fast: what came out of an operator for some shapes comes out again for the same shapes.

Torch finds the shape of a result in Python, which takes up to a millisecond. A training step repeats a few hundred operators
thousands of times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]  # shape, stride
_IN_PLACE_PRODUCTS = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # which torch's formulas leave out


class _Kind(Enum):
    """What an operator does to memory."""

    NEW = auto()  # all of its results are new tensors
    IN_PLACE = auto()  # it returns what it has changed
    VIEW = auto()  # its results are parts of its arguments
    OTHER = auto()  # messages, whatever else


@dataclass(frozen=True)
class _Known:
    """What an operator makes of some shapes: the layouts of its results (None: what it has changed), and its FLOPs."""

    layouts: list[_Layout] | None
    is_tuple: bool
    flops: int


class Shapes:
    """Runs operators, and adds up the `flops` of those on meta tensors, by operator, in torch's own formulas.

    Source of the formulas: torch.utils.flop_counter; a product of [m, k] and [k, n] has 2 m k n.
    """

    def __init__(self) -> None:
        self.flops: Counter[str] = Counter()
        # By the id of the operator, which lives as long as torch: to hash it takes longer.
        self._kinds: dict[int, _Kind] = {}
        self._changed: dict[int, int | str | None] = {}  # which argument it changes and returns
        self._known: dict[Hashable, _Known] = {}

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The operator's result, and whether there may be new memory in it."""
        kind = self._kinds.get(id(func)) or self._kind(func)
        if kind is _Kind.VIEW:
            return func(*args, **kwargs), False
        parts = [id(func), *kwargs]
        if kind is _Kind.OTHER or not (_describe(args, parts) and _describe(kwargs.values(), parts)):
            return func(*args, **kwargs), True
        key = tuple(parts)
        known = self._known.get(key)
        if known is None:
            return self._run_first(func, args, kwargs, key), True
        if known.flops:
            self.flops[func._opname] += known.flops
        if known.layouts is None:
            place = self._changed[id(func)]
            return (kwargs[place] if isinstance(place, str) else None if place is None else args[place]), False
        if not known.is_tuple:
            shape, stride, dtype = known.layouts[0]
            return torch.empty_strided(shape, stride, dtype=dtype, device=META), True
        made = (torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in known.layouts)
        return tuple(made), True

    def _kind(self, func: Any) -> _Kind:
        """What the operator's signature says of it."""
        schema, kind = func._schema, _Kind.VIEW if func.is_view else _Kind.OTHER
        changes_layout = torch.Tag.inplace_view in func.tags  # set_, resize_ and the like
        if not func.is_view and not changes_layout and func.namespace != "c10d":
            if not schema.is_mutable:
                kind = _Kind.NEW
            elif (changed := _changed_argument(schema)) is not NotImplemented:
                kind, self._changed[id(func)] = _Kind.IN_PLACE, changed
        self._kinds[id(func)] = kind
        return kind

    def _run_first(self, func: Any, args: tuple, kwargs: dict[str, Any], key: Hashable) -> Any:
        """Run it, and remember what comes out."""
        in_place = self._kinds[id(func)] is _Kind.IN_PLACE
        makes_nothing = in_place and self._changed[id(func)] is None  # torch may not even have it for meta tensors
        result = None if makes_nothing else func(*args, **kwargs)
        made = [] if in_place else list(result) if isinstance(result, tuple | list) else [result]
        if not all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in made) or _share_memory(made, args):
            self._kinds[id(func)] = _Kind.OTHER
            return result
        flops = _flops(func, args, result)
        if flops:
            self.flops[func._opname] += flops
        layouts = None if in_place else [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made]
        self._known[key] = _Known(layouts, isinstance(result, tuple | list), flops)
        return result


def _changed_argument(schema: Any) -> Any:
    """The place or name of the argument that an operator changes and returns, None where it returns nothing.

    NotImplemented where it returns something else, or several things.
    """
    if not schema.returns:
        return None
    alias = schema.returns[0].alias_info
    if len(schema.returns) > 1 or alias is None:
        return NotImplemented
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == alias.before_set:
            return argument.name if argument.kwarg_only else place
    return NotImplemented


def _describe(values: Iterable[Any], parts: list[Any]) -> bool:
    """Add to `parts` what an operator's result depends on of the values. False where one is a tensor with numbers."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                return False
            parts += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, list | tuple):
            parts.append(len(value))
            if not _describe(value, parts):
                return False
        else:
            parts += (value, value.__class__)  # (1, 1.0 and True are equal, and make different dtypes)
    return True


def _share_memory(made: list[Tensor], args: tuple) -> bool:
    """Whether a result is a view, whatever the operator's signature says."""
    given = {value.untyped_storage()._cdata for value in tree_leaves(args) if isinstance(value, Tensor)}
    return any(tensor.storage_offset() or tensor.untyped_storage()._cdata in given for tensor in made)


def _flops(func: Any, args: tuple, result: Any) -> int:
    """Of a product or of attention, which follow from the shapes of its tensors alone; 0 of all else."""
    packet = func._overloadpacket
    formula = flop_registry.get(_IN_PLACE_PRODUCTS.get(packet, packet))
    return 0 if formula is None else formula(*(value for value in args if isinstance(value, Tensor)), out_val=result)
