"""Counts the memory that is alive, wherever it is held: what autograd keeps, whatever stands for it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AliveMemory(TorchDispatchMode):
    """Inside, notes the memory of every tensor that an operation makes; `bytes()` is how much of it is alive.

    Views of the tensors `apart` (parameters) don't count.
    """

    def __init__(self, apart: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._apart:
                    self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return made

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self._made.values() if not storage.expired())
