"""Where documents begin inside samples: what attention that stays inside documents needs to know.

Legend: s sequence, b micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_llama.data.blend import Blend
from parallel.kernels.documents import Documents

PADDING_MULTIPLE = 64  # cu_seqlens has few different lengths, so that kernels see few different shapes


def document_starts(blend: Blend, samples: np.ndarray) -> list[np.ndarray]:
    """For each sample the positions in 1 to s - 1 at which a new document begins, ascending.

    They come from the index, so they are right for foreign datasets too. Where a sample is put together from several stretches
    of a source, each begins a new document.
    """
    starts = []
    for pieces in blend.pieces(samples):
        found, position = [], 0
        for source, start_token, num_tokens in pieces:
            found.append(np.array([position]))
            found.append(position + blend.sources[source].dataset.starts_within(start_token, num_tokens))
            position += num_tokens
        inside = np.unique(np.concatenate(found))
        starts.append(inside[(inside > 0) & (inside < blend.sequence_length)])
    return starts


def boundaries(starts: Sequence[np.ndarray], sequence_length: int) -> tuple[Tensor, Documents]:
    """Positions [s, b] that begin anew with each document, and the documents of the micro-batch of these samples."""
    size = len(starts) * sequence_length
    ends = [sample * sequence_length + np.concatenate([[0], inside]) for sample, inside in enumerate(starts)]
    edges = np.concatenate([*ends, [size]])
    first = np.zeros(size, np.int64)
    first[edges[:-1]] = edges[:-1]
    positions = np.arange(size) - np.maximum.accumulate(first)
    padded = np.full(-(-len(edges) // PADDING_MULTIPLE) * PADDING_MULTIPLE, size, np.int32)
    padded[: len(edges)] = edges
    documents = Documents(torch.from_numpy(padded), int(np.diff(edges).max()))
    return torch.from_numpy(positions.reshape(len(starts), sequence_length).T.copy()), documents
