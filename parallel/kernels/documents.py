"""Where documents begin in a micro-batch: attention may stay inside them.

Legend: s sequence, b micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents of a micro-batch [s, b], over its tokens in batch-major order (all of sample 0 first).

    `cu_seqlens`: int32 [n + 1], ascending, from 0 to s * b, with every start of a sample among them; repeated ends are padding.
    `max_length`: no document is longer (an integer on the host, so that no kernel asks the device for it).
    """

    cu_seqlens: Tensor
    max_length: int

    def ids(self, s: int, b: int) -> Tensor:
        """A number for each token that is the same within a document: int64 [b, s]."""
        places = torch.arange(s * b, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens, places, right=True).view(b, s)

    def lengths(self, s: int, b: int) -> list[list[int]]:
        """The documents' lengths of each sample, on the host. For CPU tensors: elsewhere it waits for the device."""
        ends = self.cu_seqlens.unique_consecutive().tolist()
        lengths: list[list[int]] = [[] for _ in range(b)]
        for start, end in zip(ends, ends[1:], strict=False):
            lengths[start // s].append(end - start)
        return lengths
