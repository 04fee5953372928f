"""The second part of benchmark_data.py: samples out of datasets, start-up, the mixture, packing."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import tracemalloc
from bisect import bisect_left, insort
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _measuring import Report

from megatron_llama.config.sections import DataConfig, DataSource
from megatron_llama.data.blend import Blend, build_blend
from megatron_llama.data.indexed import HEADER, MAGIC, IndexedDataset
from megatron_llama.data.loader import Loader
from megatron_llama.data.packing import Packing
from megatron_llama.data.training_data import open_training_data

VOCAB_SIZE = 32_000
UINT16 = 8  # its code in an index
BATCH = 8
STEP = 32  # samples of one data rank in a step, which the loader looks up together
LOOKUP_MICROSECONDS = 15
MIXTURE = {  # LLaMA's (Touvron et al., 2023, table 1): share in percent
    "common_crawl": 67.0, "c4": 15.0, "github": 4.5, "wikipedia": 4.5, "books": 4.5, "arxiv": 2.5, "stack_exchange": 2.0,
}  # fmt: skip
MIXTURE_SAMPLES = 1_000_000
RUN_TOKENS = 1_400_000_000_000
DOCUMENT_TOKENS = 700_000
START_SECONDS, START_MEGABYTES = 1.0, 50
DP_SIZES = (1, 2, 4, 8)
PACKED_DOCUMENTS, PYTHON_DOCUMENTS = 2_000_000, 50_000


# ---- lookup ---------------------------------------------------------------------------------------------------------


def benchmark_lookup(report: Report, prefix: Path, sequence_length: int, samples: int) -> None:
    """Reports the wall time of reading samples of a dataset that is in the page cache. Exits where tokens differ."""
    blend = build_blend([(str(prefix), 1.0), (str(prefix), 2.0)], sequence_length, 1, VOCAB_SIZE)
    masked, plain = (Loader(blend, sequence_length, BATCH, BATCH, 0, 1, document_mask=mask) for mask in (True, False))
    with open(f"{prefix}.bin", "rb", buffering=0) as file:
        places = window_places(blend, samples)
        check_windows(plain, file.fileno(), places)
        report.section("lookup", f"{samples:,} samples of {sequence_length} + 1 tokens in random order, the files in memory")
        limit = LOOKUP_MICROSECONDS
        for name, size, call, at_most in (
            ("os.pread alone", 1, lambda i: os.pread(file.fileno(), *places[i]), None),
            ("os.pread, to an int64 tensor", 1, lambda i: read_tensor(file.fileno(), *places[i]), None),
            ("ours, a call for one sample", 1, blend.sample, limit),
            (f"ours, a call for {BATCH}", BATCH, lambda i: blend.samples(range(i, i + BATCH)), limit),
            (f"ours, a call for {STEP}, as the loader's", STEP, lambda i: blend.samples(range(i, i + STEP)), limit),
            (f"ours, a micro-batch of {BATCH}, all its tensors", BATCH, plain.micro_batches, None),
            ("the same, with masks between documents", BATCH, masked.micro_batches, None),
        ):
            best, middle = time_calls(call, samples, size)
            report.add(f"{name}: best", best, "microseconds / sample", at_most=at_most)
            report.add(f"{name}: median", middle, "microseconds / sample", at_most=at_most)


def time_calls(call: Callable[[int], object], samples: int, size: int) -> tuple[float, float]:
    """The least and the median of the microseconds a sample of calls for `size` samples, after a round that is not timed."""
    took = np.zeros(samples // size)
    for _ in range(2):
        for number in range(len(took)):
            start = time.perf_counter_ns()
            call(number * size)
            took[number] = time.perf_counter_ns() - start
    took /= 1000 * size
    return float(took.min()), float(np.median(took))


def read_tensor(file: int, count: int, position: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(os.pread(file, count, position), np.uint16).astype(np.int64))


def window_places(blend: Blend, count: int) -> list[tuple[int, int]]:
    """(bytes, position in the file) of the first samples."""
    size = 2 * (blend.sequence_length + 1)
    return [(size, 2 * pieces[0].start_token) for pieces in blend.pieces(range(count))]


def check_windows(loader: Loader, file: int, places: list[tuple[int, int]]) -> None:
    """Exits where a micro-batch is not what the file holds at its places."""
    for first in range(0, len(places), BATCH):
        (micro_batch,) = loader.micro_batches(first)
        found = torch.cat([micro_batch.tokens, micro_batch.targets[-1:]]).t().numpy()
        read = [np.frombuffer(os.pread(file, *place), np.uint16) for place in places[first : first + BATCH]]
        if not np.array_equal(found, np.stack(read)):
            sys.exit(f"error: the micro-batch from sample {first} on is not the windows of the file")


# ---- start-up -------------------------------------------------------------------------------------------------------


def write_synthetic(prefix: Path, documents: int, document_tokens: int) -> None:
    """A dataset of equal documents as `preprocess_data.py` leaves it; its .bin file is a hole that takes no room."""
    lengths = np.full(documents, document_tokens, np.int64)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, UINT16, documents, documents + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((2 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    tokens = documents * document_tokens
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    Path(f"{prefix}.json").write_text(json.dumps({"tokens": tokens, "documents": documents, "max_token_id": 0}))


def benchmark_start(report: Report, folder: Path, scale: float, rounds: int) -> None:
    """Reports what a run over LLaMA's seven sources needs until it has its first and a late sample.

    `scale` makes everything smaller. Each round is a process of its own.
    """
    tokens = int(RUN_TOKENS * scale)
    for name, percent in MIXTURE.items():
        write_synthetic(folder / name, max(1, int(tokens * percent / 100 / DOCUMENT_TOKENS)), DOCUMENT_TOKENS)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        timed = [pool.apply(measure_start, (folder, tokens, False)) for _ in range(rounds)]
        traced = pool.apply(measure_start, (folder, tokens, True))
    documents = sum(IndexedDataset(folder / name).num_documents for name in MIXTURE)
    report.section("start-up", f"7 sources, {tokens:.3g} tokens in {documents:,} documents, the indices in memory")
    seconds = [measured["seconds"] for measured in timed]
    report.add("datasets checked, mixture planned, two samples read", seconds, "seconds", at_most=START_SECONDS)
    for name, title in (("rss", "growth of resident memory"), ("anonymous", "of it not the files' own")):
        report.add(title, [r[name] for r in timed], "MB", at_most=START_MEGABYTES if name == "rss" else None)
    report.add("the indices themselves", sum((folder / f"{name}.idx").stat().st_size for name in MIXTURE) / 1e6, "MB")
    report.add("peak of what Python and numpy allocated", traced["peak"], "MB", at_most=START_MEGABYTES)


def measure_start(folder: Path, tokens: int, trace: bool) -> dict[str, float]:
    """Opens the mixture in this process; seconds, and megabytes of memory."""
    data = DataConfig(train=tuple(DataSource(str(folder / name), percent) for name, percent in MIXTURE.items()))
    samples = tokens // 2048
    before = memory()
    if trace:
        tracemalloc.start()
    start = time.perf_counter()
    opened = open_training_data(data, 2048, VOCAB_SIZE, samples)
    opened.blend.samples([0, samples - 1])
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1] if trace else 0
    growth = {name: (value - before[name]) / 1e6 for name, value in memory().items()}
    return {"seconds": seconds, "peak": peak / 1e6, "rss": growth["VmRSS"], "anonymous": growth["RssAnon"]}


def memory() -> dict[str, int]:
    """Bytes that this process holds in memory, with and without the pages of files."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(value.split()[0]) for name, value in lines if name in ("VmRSS", "RssAnon")}


# ---- mixture --------------------------------------------------------------------------------------------------------


def benchmark_mixture(report: Report, folder: Path, prefix: Path) -> None:
    """Reports how far any prefix is from the proportions. Exits where ranks or a restart change the global batches.

    Uses the datasets of `benchmark_start`, and `prefix` as three sources.
    """
    blend = build_blend([(str(folder / name), percent) for name, percent in MIXTURE.items()], 2048, 1, VOCAB_SIZE)
    sources, _ = blend.locate(np.arange(MIXTURE_SAMPLES))
    numbers = np.arange(1, MIXTURE_SAMPLES + 1)
    shares = np.array(list(MIXTURE.values())) / sum(MIXTURE.values())
    deviations = [np.abs(np.cumsum(sources == source) - numbers * share).max() for source, share in enumerate(shares)]
    check_same_batches(prefix)
    what = f"7 sources, every prefix of {MIXTURE_SAMPLES:,} samples; dp {', '.join(map(str, DP_SIZES))} and a restart"
    report.section("mixture", f"{what} with another dp read the same global batches")
    report.add("largest deviation of a source from its share", float(max(deviations)), "samples", at_most=2)


def check_same_batches(prefix: Path) -> None:
    """Exits where the global batches are others with another dp, or after a restart with another dp."""
    length, batch, steps = 256, 16, 8
    data = DataConfig(train=tuple(DataSource(str(prefix), weight) for weight in (0.5, 0.3, 0.2)))
    opened = open_training_data(data, length, VOCAB_SIZE, batch * steps)
    expected = global_batches(opened.blend, batch, range(steps), 1)
    for dp_size in DP_SIZES[1:]:
        if not torch.equal(global_batches(opened.blend, batch, range(steps), dp_size), expected):
            sys.exit(f"error: with dp {dp_size} the global batches are others than with dp 1")
    middle = steps // 2
    stored = json.loads(json.dumps(opened.state(middle * batch)))
    resumed = open_training_data(data, length, VOCAB_SIZE, batch * steps, middle * batch, stored)
    if not torch.equal(global_batches(resumed.blend, batch, range(middle, steps), DP_SIZES[-1]), expected[middle:]):
        sys.exit(f"error: a restart with dp {DP_SIZES[-1]} reads other global batches")


def global_batches(blend: Blend, batch: int, steps: range, dp_size: int) -> torch.Tensor:  # [steps, batch, s]
    """What all ranks together read in each step."""
    loaders = [Loader(blend, blend.sequence_length, 1, batch, rank, dp_size, document_mask=True) for rank in range(dp_size)]
    read = [[mb.tokens.t() for loader in loaders for mb in loader.micro_batches(step * batch)] for step in steps]
    return torch.stack([torch.cat(rows) for rows in read])


# ---- packing --------------------------------------------------------------------------------------------------------


def benchmark_packing(report: Report, documents: int, python_documents: int, rounds: int) -> None:
    """Reports packing documents of web-like lengths, beside a loop in Python. Exits where these need other numbers."""
    lengths = np.random.default_rng(1).lognormal(6.2, 1.1, documents).astype(np.int32) + 1
    few = lengths[:python_documents]
    packings, seconds, python_seconds = [], [], []
    for _ in range(rounds):
        start = time.process_time()
        packings = [pack(lengths)]
        seconds.append(time.process_time() - start)
        start = time.process_time()
        python_samples = best_fit_in_python(few, 2049)
        python_seconds.append(time.process_time() - start)
    if pack(few).num_samples != python_samples:
        sys.exit(f"error: {pack(few).num_samples} samples for {python_documents} documents, {python_samples} in Python")
    mean = lengths.mean()
    report.section("packing", f"log-normal lengths, {mean:.0f} tokens on average, whole documents in samples of 2,048 + 1")
    report.add(f"ours, {documents:,} documents", seconds, "CPU seconds", at_most=1)
    report.add("ours, padding", 100 * packings[0].padding, "%", at_most=0.1)
    report.add(f"best fit in plain Python, {python_documents:,} documents", python_seconds, "CPU seconds")
    for name, count, took in (("ours", documents, seconds), ("plain Python", python_documents, python_seconds)):
        report.add(f"{name}, rate", [count / value / 1e6 for value in took], "M documents / CPU second")


def pack(lengths: np.ndarray) -> Packing:
    """All samples of an epoch are planned when this returns."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    packing = Packing(lengths, starts.__getitem__, 2048, 1, 0)
    for block in range(packing.num_blocks):
        packing.sample(packing.first(0, block))
    return packing


def best_fit_in_python(lengths: np.ndarray, capacity: int) -> int:
    """The number of samples that best-fit decreasing needs, document by document."""
    step, pieces = capacity - 1, []
    for length in lengths.tolist():
        full = max(length - 1, 0) // step
        rest = length - full * step
        pieces += [capacity] * full + [rest] * (rest > 1)
    free: list[int] = []  # space left in each open sample, ascending
    samples = 0
    for piece in sorted(pieces, reverse=True):
        place = bisect_left(free, piece)
        if place == len(free):
            samples, left = samples + 1, capacity - piece
        else:
            left = free.pop(place) - piece
        if left:
            insort(free, left)
    return samples
