"""The bytes of live tensors on one kind of device, by component: an exact ledger of a step that really runs.

It sees what operators return, on "cpu" and on "meta" alike, and forgets a storage when it is freed. What a kernel or a message
allocates inside for itself is not a tensor of the program, and not in it.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.pipeline.executor import Executor
from parallel.pipeline.schedules import Action
from parallel.zero.native import NativeZero
from parallel.zero.post_validation import PostValidatedZero

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "workspace", "buffers")  # as in megatron_llama.plan.memory


class _Storage(weakref.ref):
    """A live storage: `key` is its address (not that of its memory, which meta tensors lack), `size` its bytes.

    `born` numbers the storages that may turn out to be activations; it is -1 for those whose component is settled.
    """

    __slots__ = ("key", "size", "component", "born")


class AllocationLedger(TorchDispatchMode):
    """While it is entered, counts the storages of the tensors that operators return: once each, until they are freed.

    `live`: bytes by component now. `peak_bytes`: the most that were live together, `peak`: of which component. Tensors that
    exist already are unknown until `own` tells of them, or an operator returns a view of them.

    Of what an executor's actions allocate (`follow`), what outlives an F or I is `activations`, what does not is `workspace`;
    what an action hands to another stage is `buffers`, and so is what it gets from there, until an F or I takes and maybe keeps
    it. All else that is allocated belongs to the innermost `component`, or is `workspace`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.peak_bytes = 0
        self.peak: dict[str, int] = {}
        self._live: Counter[str] = Counter()
        self._bytes = 0
        self._storages: dict[int, _Storage] = {}
        self._freed: deque[_Storage] = deque()  # by any thread: messages keep tensors, too
        self._component: str | None = None
        self._young: list[_Storage] | None = None  # of the action that runs
        self._young_at_peak = 0  # as many of them had been allocated at the peak
        self._aliases: dict[Any, bool] = {}

    @property
    def live(self) -> Counter[str]:
        """Bytes by component now."""
        self._forget_freed()
        return self._live

    def reset_peak(self) -> None:
        """The peak is what is live now."""
        self._forget_freed()
        self._note_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.account(func, args, kwargs, result)
        return result

    def account(self, func: Any, args: tuple, kwargs: dict[str, Any] | None, result: Any) -> None:
        """Note the storages of an operator's `result`. Those of its arguments matter only where they are returned."""
        if isinstance(result, Tensor):
            if result.device.type == self.device_type:
                self._see(func, result)
        elif result is not None:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                    self._see(func, tensor)

    def _see(self, func: Any, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._forget_freed()
        known = self._storages.get(storage._cdata)
        if known is None:
            settled = self._component is not None or self._young is None or self._is_alias(func)
            self._add(storage, self._component or "workspace", settled)
        elif known.size != storage.nbytes():
            self._resize(known, storage.nbytes())

    def _is_alias(self, func: Any) -> bool:
        """Whether the operator returns a view of its argument: an unknown storage is not new then."""
        if func not in self._aliases:
            self._aliases[func] = any(value.alias_info is not None for value in func._schema.returns)
        return self._aliases[func]

    def _add(self, storage: torch.UntypedStorage, component: str, settled: bool = True) -> None:
        noted = _Storage(storage, self._freed.append)
        noted.key, noted.size, noted.component, noted.born = storage._cdata, 0, component, -1
        self._storages[noted.key] = noted
        if not settled:
            noted.born = len(self._young)
            self._young.append(noted)
        self._resize(noted, storage.nbytes())

    def _resize(self, noted: _Storage, size: int) -> None:
        self._live[noted.component] += size - noted.size
        self._bytes += size - noted.size
        noted.size = size
        if self._bytes > self.peak_bytes:
            self._note_peak()

    def _note_peak(self) -> None:
        self.peak_bytes, self.peak = self._bytes, dict(self._live)
        self._young_at_peak = 0 if self._young is None else len(self._young)

    def _forget_freed(self) -> None:
        while self._freed:
            noted = self._freed.popleft()
            if self._storages.get(noted.key) is noted:
                del self._storages[noted.key]
            self._live[noted.component] -= noted.size
            self._bytes -= noted.size

    def _assign(self, noted: _Storage, component: str) -> None:
        """From now on it belongs to `component`; and at the peak it did, if that was in the action that has allocated it."""
        self._live[noted.component] -= noted.size
        self._live[component] += noted.size
        if 0 <= noted.born < self._young_at_peak:
            self.peak[noted.component] -= noted.size
            self.peak[component] = self.peak.get(component, 0) + noted.size
        noted.component, noted.born = component, -1

    # ---- components -----------------------------------------------------------------------------------------------------

    def own(self, component: str, tensors: Iterable[Tensor]) -> None:
        """The storages of `tensors` belong to `component`, whatever they were before."""
        self._forget_freed()
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                continue
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None:
                self._add(storage, component)
            else:
                self._assign(known, component)

    @contextmanager
    def component(self, name: str | None) -> Iterator[None]:
        """What is allocated inside belongs to `name`; None: to none, as if there were no context around."""
        before, self._component = self._component, name
        try:
            yield
        finally:
            self._component = before

    def _labelled(self, function: Callable[..., Any], component: str) -> Callable[..., Any]:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self.component(component):
                return function(*args, **kwargs)

        return labelled

    def follow_engine(self, engine: NativeZero) -> None:
        """Own the engine's weights, gradients and optimizer state; what it allocates for messages from now on is `buffers`."""
        self.own("optimizer", (tensor for _, _, tensor in engine.update.kept()))
        if isinstance(engine, PostValidatedZero):
            self.own("optimizer", engine._kept)
        for bucket in engine.buckets:
            self.own("gradients", [bucket.master_grad] if bucket.every_pass else [bucket.master_grad, bucket.main_grad])
            self.own("weights", [bucket.weights])
            for name in ("start_reduction", "start_copies_sum", "wait_reduction", "start_gather", "new_main_grad"):
                setattr(bucket, name, self._labelled(getattr(bucket, name), "buffers"))

    def follow(self, executor: Executor) -> None:
        """From now on, tell what the executor's actions allocate and keep."""
        compute, run = executor._compute, executor.run

        def followed(action: Action, arrived: Tensor | None, micro_batch: Any, train: bool) -> Tensor | None:
            if action.kind in ("F", "I") and arrived is not None:
                self.own("activations", [arrived])
            with self._action(action.kind), self.component(None):
                made = compute(action, arrived, micro_batch, train)
                if made is not None:
                    self.own("buffers", [made])
            return made

        executor._compute = followed
        executor.run = self._labelled(run, "buffers")

    @contextmanager
    def _action(self, kind: str) -> Iterator[None]:
        """Inside, what is allocated may turn out to be activations: what is still there at the end of an F or I."""
        self._young, self._young_at_peak = [], 0
        try:
            yield
        finally:
            self._forget_freed()
            for noted in self._young:
                if kind in ("F", "I") and noted.born >= 0 and noted() is not None:
                    self._assign(noted, "activations")
                noted.born = -1
            self._young = None
