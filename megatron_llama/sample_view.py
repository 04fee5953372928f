"""One sample of a run as its training sees it, for people: where its tokens are from, and which of its targets count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_llama.config import RunConfig, validate_model, validate_training
from megatron_llama.data.blend import Piece
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.run_data import end_sample, make_loader, open_run_data
from megatron_llama.state import Position
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where a run reads a sample; all but the step count from 0."""

    step: int
    dp_rank: int
    micro_batch: int
    row: int


@dataclass(frozen=True)
class Stretch:
    """Inputs [start, end) of a sample that are tokens [first, ...) of one document, or padding (None)."""

    start: int
    end: int
    document: int | None
    first: int = 0
    document_tokens: int = 0


def sample_lines(config: RunConfig, sample: int, tokenizer: Tokenizer | None) -> list[str]:
    """A sample of a run, read by the run's own loader, as text or, without a tokenizer, as ids.

    There is one data rank where `parallel.dp` doesn't say how many. Raises ConfigError for a sample that the run doesn't
    read, and all that opening its data raises.
    """
    parallel = config.parallel
    dp_size = parallel.dp or 1
    validate_model(config)
    validate_training(config, dp_size * parallel.tp * parallel.pp * parallel.cp)
    data, position = open_run_data(config)
    _check_range(config, position, sample, data.blend.first_sample)
    batch_size, length = config.train.global_batch_size, config.train.sequence_length
    step, within = divmod(sample + _left_out_from(position, sample) - position.samples, batch_size)
    place = _place(position.step + step + 1, within, config, dp_size)
    loader = make_loader(config, data, place.dp_rank, dp_size)
    read = loader.micro_batches(sample - within)[place.micro_batch]
    tokens, targets, counted = (t[:, place.row].numpy() for t in (read.tokens, read.targets, read.loss_mask))
    positions = read.positions[:, min(place.row, read.positions.shape[1] - 1)].tolist()
    (pieces,) = data.blend.pieces([sample])
    source = data.blend.sources[pieces[0].source]
    inside = "inside documents" if loader.document_mask else "across documents"
    lines = [
        f"sample     {sample}: step {place.step}, data rank {place.dp_rank} of {dp_size}, micro-batch {place.micro_batch}, "
        f"row {place.row}",
        f"source     {source.dataset.prefix}",
        f"targets    {np.count_nonzero(counted):,} of {length:,} count{_exceptions(counted)}",
        f"attention  {inside}",
    ]
    for stretch in stretches(source.dataset, pieces, length):
        inputs = slice(stretch.start, stretch.end)
        lines += ["", _header(stretch, positions[inputs], counted[inputs])]
        if stretch.document is not None:
            lines += _content(tokens[inputs], tokenizer)
    return [*lines, "", f"the target of input {length - 1}", *_content(targets[-1:], tokenizer)]


def stretches(dataset: IndexedDataset, pieces: list[Piece], sequence_length: int) -> list[Stretch]:
    """The documents of a sample, in order, and its padding. A last token that is a target alone is left out."""
    found, position = [], 0
    for piece in pieces:
        begin = np.union1d([0], dataset.starts_within(piece.start_token, piece.num_tokens)).tolist()
        for first, end in zip(begin, [*begin[1:], piece.num_tokens], strict=True):
            number, document_start, size = dataset.document_at(piece.start_token + first)
            offset = piece.start_token + first - document_start
            found.append(Stretch(position + first, min(position + end, sequence_length), number, offset, size))
        position += piece.num_tokens
    if position < sequence_length:
        found.append(Stretch(position, sequence_length, None))
    return [stretch for stretch in found if stretch.start < stretch.end]


def _check_range(config: RunConfig, position: Position, sample: int, first_of_leg: int) -> None:
    first = max(0, position.samples - position.step * config.train.global_batch_size - _left_out_from(position, 0))
    end = end_sample(config, position)
    if not first <= sample < end:
        raise ConfigError(f"--sample {sample}: the run reads the samples {first} to {end - 1}; choose one of them")
    if sample < first_of_leg:
        raise ConfigError(
            f"--sample {sample} was read before the mixture or the sequence length changed at sample {first_of_leg}; "
            "name a checkpoint from before that with --config"
        )


    for left_out in position.skipped_samples:
        if left_out.went_back and left_out.first <= sample < left_out.stop:
            raise ConfigError(
                f"--sample {sample} is among those that the run has left out, {left_out.first} to {left_out.stop - 1}: at step "
                f"{left_out.step} it {left_out.reason}"
            )


def _left_out_from(position: Position, sample: int) -> int:
    """How many samples from this one on were left out so far, as the run went back and on behind them."""
    return sum(one.stop - one.first for one in position.skipped_samples if one.went_back and one.first >= sample)


def _place(step: int, within: int, config: RunConfig, dp_size: int) -> Place:
    """Where sample number `within` of a global batch is read: ranks take contiguous parts of it."""
    dp_rank, local = divmod(within, config.train.global_batch_size // dp_size)
    return Place(step, dp_rank, *divmod(local, config.train.micro_batch_size))


def _header(stretch: Stretch, positions: list[int], counted: np.ndarray) -> str:
    inputs = f"inputs {stretch.start}-{stretch.end - 1}"
    numbered = f"positions {positions[0]}-{positions[-1]}"
    if stretch.document is None:
        return f"{inputs}: padding, {numbered}"
    last = stretch.first + stretch.end - stretch.start - 1
    part = f"document {stretch.document}, its tokens {stretch.first}-{last} of {stretch.document_tokens:,}"
    return f"{inputs}: {part}; {numbered}; {np.count_nonzero(counted):,} targets count"


def _exceptions(counted: np.ndarray) -> str:
    """Names the inputs whose targets don't count, as ranges."""
    missing = np.flatnonzero(counted == 0)
    if not missing.size:
        return ""
    runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
    named = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f", not those of the inputs {', '.join(named)}"


def _content(ids: np.ndarray, tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return ["  " + " ".join(map(str, ids.tolist()))]
    return ["  | " + line for line in tokenizer.decode(ids.tolist()).splitlines()]
