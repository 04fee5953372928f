"""An optimizer step at whose end the pipeline ranks do not meet: it is made at once and validated during the next one.

Clipping and the check for finite gradients need the norm over all ranks. Waiting for it would align the ranks at the end of
every step, and a schedule whose first ranks begin and end early (ZB-2p, ZB-V) would lose what it gains. So each rank updates
without clipping as soon as its own gradients are there. Partial sums are relayed from the first pipeline rank to the last,
whose totals go to all. When they have come, in the next step's forward passes, each rank sees whether the update was right,
and otherwise takes it back and makes the right one. Every rank sees the same totals, so all of them decide alike.
Source: Qi et al. 2023 (Zero Bubble Pipeline Parallelism), section 4; there the update is taken back by inverting it, here from
a copy, so weights are bit for bit those of `NativeZero`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.collectives import Done, Handle, all_reduce, broadcast, start_broadcast, start_receive, start_send
from parallel.groups import ProcessGroups
from parallel.host_copy import HostCopy
from parallel.kernels.table import Kernels
from parallel.zero.engine import Judge, OptimizerSettings, StepInfo, not_finite
from parallel.zero.native import NativeZero


@dataclass(frozen=True)
class SpeculativeUpdate:
    """An update that was made before its norm was known; `host` brings the norm and `skipped`.

    `relayed` are the buffers of the partial sums, which belong to their messages until `sent` is done and `info` is there.
    """

    learning_rate: float
    info: StepInfo
    host: HostCopy
    relayed: tuple[Tensor, ...]
    sent: Handle


class PostValidatedZero(NativeZero):
    """`NativeZero` with updates that are validated late: `validate` in the next step, or `finish` now.

    Keeps a copy of this rank's master weights and moments: 12 bytes more per parameter of a shard (4 with SGD), and their copy
    in every step. The gradients stay until the update is validated. Pipeline ranks must share no parameter: the sum of
    a tied embedding's two gradients would make the first and the last rank meet.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        groups: ProcessGroups,
        settings: OptimizerSettings,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(chunks, groups, settings, kernels)
        self._state = self.update.tensors()
        self._kept = [torch.empty_like(tensor) for tensor in self._state]
        self._update_to_validate: SpeculativeUpdate | None = None
        self._device = self.buckets[0].main_grad.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        broadcast(torch.zeros(1, device=self._device), groups.pp_backward, source=0)  # NCCL's first one aligns the ranks

    @property
    def state_bytes(self) -> int:
        """The copy counts too."""
        return super().state_bytes + sum(kept.nbytes for kept in self._kept)

    def begin_step(self) -> None:
        """Clear the gradients; those of an update that is not validated yet are cleared by `validate`."""
        if self._update_to_validate is None:
            super().begin_step()

    @torch.no_grad()
    def step(self, learning_rate: float, sums: Tensor, judge: Judge = not_finite) -> StepInfo:
        """As `NativeZero.step`, but waits for no other pipeline rank than the one before, which has ended its step already.

        The weights are wrong until validated where the gradients should have been clipped, or the step skipped.
        """
        assert self._update_to_validate is None, "the last update was not validated"
        self.reduce_gradients()
        self._gathers.finish()
        part = self._local_totals(sums)
        stage_totals = all_reduce(all_reduce(part.clone(), self.groups.data), self.groups.tp)
        for kept, tensor in zip(self._kept, self._state, strict=True):
            kept.copy_(tensor)
        zero = torch.zeros((), device=self._device)
        self.update.apply(learning_rate, norm=zero, skipped=zero)
        self._start_gathers()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # (None changes nothing)
            self._update_to_validate = self._relay(stage_totals, part, judge, learning_rate)
        return self._update_to_validate.info

    def _relay(self, stage_totals: Tensor, part: Tensor, judge: Judge, learning_rate: float) -> SpeculativeUpdate:
        """Send the totals over all stages on their way: each rank adds its own to the sum of those before it.

        The messages go along lanes that have been read to the end of the step on both sides, so nothing gets between.
        """
        groups, rank, last = self.groups, self.groups.place.pp, self.groups.topology.pp - 1
        so_far, sent = stage_totals, Done()
        if rank > 0:
            so_far = torch.empty_like(stage_totals)
            start_receive(so_far, groups.lane("F", rank - 1, rank), rank - 1, tag=0).wait()
            so_far += stage_totals
        if rank < last:
            sent = start_send(so_far, groups.lane("F", rank, rank + 1), rank + 1, tag=0)
        totals = so_far.clone()
        info = StepInfo(totals, part, judge, start_broadcast(totals, groups.pp_backward, source=last), self._stream)
        host = HostCopy(lambda: [info.norm, info.skipped], self._device, self._stream)
        return SpeculativeUpdate(learning_rate, info, host, (stage_totals, so_far), sent)

    @torch.no_grad()
    def validate(self) -> bool:
        """Wait for the totals of the last step and clear its gradients. Returns whether the weights were right.

        Otherwise they are corrected first: the update is taken back, and made with the clipped gradients or not at all.
        All ranks call it, each when it needs to know.
        """
        update, self._update_to_validate = self._update_to_validate, None
        if update is None:
            return True
        norm, skipped = update.host.read()
        update.sent.wait()
        clip_norm = self.settings.clip_norm
        was_right = not skipped and (clip_norm == 0 or norm <= clip_norm)
        if not was_right:
            self._correct(update)
        super().begin_step()
        return was_right

    def _correct(self, update: SpeculativeUpdate) -> None:
        """Take the update back and make the right one."""
        super().finish()  # the wrong weights may still be on their way
        for kept, tensor in zip(self._kept, self._state, strict=True):
            tensor.copy_(kept)
        self.update.apply(update.learning_rate, update.info.norm, update.info.skipped)
        self._start_gathers()

    def finish(self) -> None:
        """Validate the last update and wait for the gathers under way; all ranks call it together."""
        self.validate()
        super().finish()
