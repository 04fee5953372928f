"""Samples to micro-batches: which tokens each data-parallel rank reads in each step.

Legend: s sequence, b micro-batch.

The global batch of a step is the samples [first_sample, first_sample + global_batch_size), whatever the layout: ranks take
contiguous parts of it. The position in the data is that one integer, so a run resumes with any number of ranks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megatron_llama.data.blend import Blend, Piece, read_pieces
from megatron_llama.data.boundaries import boundaries, counted_targets, document_starts
from parallel.errors import ConfigError
from parallel.kernels.documents import Documents


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one data-parallel rank reads.

    `targets` are the tokens one position further; a target counts where `loss_mask` is not 0. `positions` are those in the
    document, or without `documents` those in the sample, 0 to s - 1.
    """

    tokens: Tensor  # [s, b] int64
    targets: Tensor | None  # [s, b] int64; None asks the model for logits
    loss_mask: Tensor | None  # [s, b] float32
    positions: Tensor  # [s, b or 1] int64
    documents: Documents | None = None  # None: each sample is one document

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on `device`; from pinned memory the copy does not block."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        documents = tensors.pop("documents")
        if documents is not None:
            documents = replace(documents, cu_seqlens=documents.cu_seqlens.to(device, non_blocking=True))
        return MicroBatch(**{name: t.to(device, non_blocking=True) for name, t in tensors.items()}, documents=documents)


def target_count(micro_batches: list[MicroBatch]) -> int:
    """The number of targets that count."""
    return sum(int(torch.count_nonzero(micro_batch.loss_mask)) for micro_batch in micro_batches)


def micro_batch(blend: Blend, samples: Sequence[Sequence[Piece]], size: int, document_mask: bool) -> MicroBatch:
    """The micro-batch of `size` samples, given as their pieces; where they are fewer, padding whose targets don't count.

    Raises DataError for a token id outside the vocabulary.
    """
    samples = [*samples, *([] for _ in range(size - len(samples)))]
    length, datasets = blend.sequence_length, [source.dataset for source in blend.sources]
    rows = read_pieces(datasets, samples, length, blend.vocab_size)  # [b, s + 1]
    tokens = torch.from_numpy(np.ascontiguousarray(rows.T))  # [s + 1, b]
    loss_mask = torch.from_numpy(np.ascontiguousarray(counted_targets(blend, samples).T))
    positions, documents = torch.arange(length)[:, None], None
    if document_mask:
        positions, documents = boundaries(document_starts(blend, samples), length)
    return MicroBatch(tokens[:-1].contiguous(), tokens[1:].contiguous(), loss_mask, positions, documents)


class Loader:
    """The training samples of one data-parallel rank.

    Raises ConfigError where global_batch_size is not a multiple of micro_batch_size x dp_size.
    """

    def __init__(
        self,
        blend: Blend,
        sequence_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        document_mask: bool = False,
    ) -> None:
        assert document_mask or not blend.packed, "documents that share a sample must not see each other"
        assert sequence_length == blend.sequence_length, f"{sequence_length}, but the blend has {blend.sequence_length}"
        assert 0 <= dp_rank < dp_size
        multiple = micro_batch_size * dp_size
        if global_batch_size < 1 or global_batch_size % multiple:
            below, above = global_batch_size // multiple * multiple, -(-max(global_batch_size, 1) // multiple) * multiple
            raise ConfigError(
                f"train.global_batch_size {global_batch_size} has to be a multiple of train.micro_batch_size "
                f"{micro_batch_size} x dp {dp_size}; nearest: {f'{below} or ' if below else ''}{above}"
            )
        self.blend = blend
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.document_mask = document_mask
        self.num_micro_batches = global_batch_size // multiple  # in a step of this rank

    def micro_batches(self, first_sample: int) -> list[MicroBatch]:
        """This rank's part of the global batch that begins at `first_sample`.

        Raises DataError for a token id outside the vocabulary.
        """
        local_samples = self.num_micro_batches * self.micro_batch_size
        start = first_sample + self.dp_rank * local_samples
        pieces = self.blend.pieces(range(start, start + local_samples))
        size = self.micro_batch_size
        parts = [pieces[first : first + size] for first in range(0, local_samples, size)]
        return [micro_batch(self.blend, part, size, self.document_mask) for part in parts]


def evaluation_micro_batches(
    blend: Blend,
    num_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    first_sample: int = 0,
    document_mask: bool = False,
) -> list[MicroBatch]:
    """This rank's part of the samples [first_sample, first_sample + num_samples), usually of a blend with shuffle=False.

    Every rank gets the same number of micro-batches; where the samples do not suffice for that, the rest is padding with
    loss_mask 0. All of them are in memory at once: 20 bytes a token.
    """
    assert num_samples >= 1 and 0 <= dp_rank < dp_size
    per_round = micro_batch_size * dp_size
    end = first_sample + num_samples
    micro_batches = []
    for round_start in range(first_sample, end, per_round):
        start = round_start + dp_rank * micro_batch_size
        numbers = range(start, min(end, start + micro_batch_size))  # none where the samples have ended
        micro_batches.append(micro_batch(blend, blend.pieces(numbers), micro_batch_size, document_mask))
    return micro_batches


class Prefetcher(Iterator[list[MicroBatch]]):
    """Iterates over the steps of a run, reading ahead in a thread: one step is ready, the next is being read.

    Yields `loader.micro_batches(first)` for first = first_sample, first_sample + global_batch_size, ... while the whole
    global batch lies below `end_sample`, the last position of the run. What the thread raises is raised by `next`.
    Close it, or use it in a `with` block: the thread ends then.
    """

    def __init__(self, loader: Loader, first_sample: int, end_sample: int) -> None:
        self._queue: queue.Queue[list[MicroBatch] | BaseException | None] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        steps = range(first_sample, end_sample - loader.global_batch_size + 1, loader.global_batch_size)
        self._thread = threading.Thread(
            target=_read_ahead, args=(loader, steps, self._queue, self._closed), name="prefetch", daemon=True
        )
        self._thread.start()

    def __next__(self) -> list[MicroBatch]:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, list):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the thread; a read in progress is waited for. May be called twice."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_ahead(loader: Loader, steps: range, results: queue.Queue, closed: threading.Event) -> None:
    def put(item: list[MicroBatch] | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return results.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for first_sample in steps:
            put(loader.micro_batches(first_sample))
            if closed.is_set():
                return
        put(None)
    except BaseException as error:  # raised again in the consumer
        put(error)
