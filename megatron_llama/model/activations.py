"""What a stage keeps of its blocks' forward passes for their backward passes: recomputation and offload, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_llama.model.build import ModelContext
from megatron_llama.model.rope import Places
from parallel.kernels.table import Kernels
from parallel.offload import HostMemory, OffloadedLayer
from parallel.recompute import Rematerializer, itself, recompute, unpack


class Activations:
    """Runs the blocks of one stage as `context.recompute` and `context.offload_layers` have it."""

    def __init__(self, context: ModelContext) -> None:
        self._full_layers = (context.recompute_layers or context.model.num_layers) if context.recompute == "full" else 0
        self._offload_layers = context.offload_layers
        self._host = HostMemory(context.device) if context.offload_layers else None
        self._rematerializer = Rematerializer() if context.recompute == "linear_outputs" else None

    def kernels(self, kernels: Kernels) -> Kernels:
        """The kernels that the blocks are built with: under `linear_outputs`, those whose outputs are made again say so."""
        if self._rematerializer is None:
            return kernels
        cheap, note = self._rematerializer.cheap, self._rematerializer.note

        def add_rms_norm(residual: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            total, normed = kernels.add_rms_norm(residual, delta, weight, eps)
            note(normed, normed_again, total, weight, eps)
            return total, normed

        def normed_again(total: Tensor, weight: Tensor, eps: float) -> Tensor:
            """By the same kernel, for the same bits: nothing is added to the sum, which is kept."""
            return kernels.add_rms_norm(total, torch.zeros_like(total), weight, eps)[1]

        made_again = {name: cheap(getattr(kernels, name)) for name in ("rms_norm", "rope", "swiglu")}
        return replace(kernels, add_rms_norm=add_rms_norm, **made_again)

    def run(self, blocks: Iterable[nn.Module], x: Tensor, places: Places) -> Tensor:  # [s/tp, b, h] -> [s/tp, b, h]
        """The blocks in turn, their activations kept, dropped or sent to the host."""
        layer: OffloadedLayer | None = None
        for index, block in enumerate(blocks):
            before, layer = layer, self._offloaded(index, layer, block, places)
            with self._saving(layer):
                x = recompute(block, x, places) if index < self._full_layers else block(x, places)
            if before is not None:
                before.release()
        if layer is not None:
            layer.release()
        return x

    def _offloaded(self, index: int, before: OffloadedLayer | None, block: nn.Module, places: Places) -> OffloadedLayer | None:
        """Where the activations of a layer go; None where they stay and no layer before them has to be brought back."""
        if self._host is None or index > self._offload_layers:
            return None
        stay = [*block.parameters(), places.cos, places.sin]
        return self._host.layer(before, stay, last=index == self._offload_layers)

    def _saving(self, layer: OffloadedLayer | None) -> AbstractContextManager[None]:
        if self._rematerializer is not None:
            return self._rematerializer.saving(itself if layer is None else layer.put)
        return nullcontext() if layer is None else saved_tensors_hooks(layer.put, unpack)
