"""Where documents begin inside samples: what attention that stays inside documents needs to know.

Legend: s sequence, b micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_llama.data.blend import Blend, Piece
from parallel.kernels.documents import Documents

PADDING_MULTIPLE = 64  # cu_seqlens has few different lengths, so that kernels see few different shapes


def document_starts(blend: Blend, samples: Sequence[Sequence[Piece]]) -> list[np.ndarray]:
    """For each sample, given as its pieces, the positions in 1 to s - 1 at which a new document begins, ascending.

    They come from the index, so they are right for foreign datasets too. Each piece begins a new document, and so does the
    padding behind the last one.
    """
    starts = []
    for pieces in samples:
        found, position = [], 0
        for source, start_token, num_tokens in pieces:
            found.append(np.array([position]))
            if not blend.packed:
                found.append(position + blend.sources[source].dataset.starts_within(start_token, num_tokens))
            position += num_tokens
        inside = np.unique(np.concatenate([*found, [position]]))
        starts.append(inside[(inside > 0) & (inside < blend.sequence_length)])
    return starts


def counted_targets(blend: Blend, samples: Sequence[Sequence[Piece]]) -> np.ndarray:
    """Which targets count, for samples given as their pieces: float32 [b, s] of ones and zeros.

    In windows all do, also the first token of a document as the target of the last one before it. In packed samples that one
    doesn't, nor does the padding: a piece of n tokens has n - 1 targets that count.
    """
    without_target = 1 if blend.packed else 0  # tokens of each piece
    mask = np.zeros((len(samples), blend.sequence_length), np.float32)
    for row, pieces in zip(mask, samples, strict=True):
        position = 0
        for piece in pieces:
            row[position : position + piece.num_tokens - without_target] = 1
            position += piece.num_tokens
    return mask


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
