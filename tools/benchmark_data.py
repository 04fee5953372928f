"""Our data preparation and loading beside sentencepiece alone, megatron-core's dataset builder and bare reads.

    python tools/benchmark_data.py --megabytes 16

Text: the sources of Python's standard library, one jsonl line each. Three comparisons, in rounds of another order each time:

preprocess  ours, in this process, and as tools/preprocess_data.py with --workers, start-up included, with sentencepiece
            and with gigatoken (its verification included) | sentencepiece in a loop over the same documents, nothing
            written | what Megatron's preprocessing does: Pool.imap over lines,
            IndexedDatasetBuilder in the parent, start-up not included. CPU seconds are of all processes. All token ids
            are compared, and .bin and .idx byte for byte
loader      Loader.micro_batches of a shuffled blend | os.pread of the same windows, whose tokens are compared. Page cache warm
start-up    build_blend and the first sample of a large synthetic index, which ours checks completely | megatron-core's
            IndexedDataset, which checks the header | reading the bytes of the index

The exit code is 1 where outputs differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

try:
    import numpy as np
    import sentencepiece
    import torch

    from megatron_llama.data.blend import Blend, build_blend
    from megatron_llama.data.indexed import HEADER, MAGIC, IndexedDataset
    from megatron_llama.data.loader import Loader
    from megatron_llama.data.preprocess import Settings, preprocess
    from megatron_llama.data.tokenizer_training import train_tokenizer
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .[dev]")

VOCABULARY = 4096
UINT16 = 8  # its code in an index
Figures = dict[str, list[tuple[float, float]]]  # (wall, CPU) seconds of each round


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def timed(figures: Figures, name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    yield
    figures.setdefault(name, []).append((time.perf_counter() - wall, cpu_seconds() - cpu))


def compete(actions: dict[str, Callable[[int], object]], rounds: int, check: Callable[[int], None] | None = None) -> Figures:
    """Times every action with the number of each round, the order rotated; `check` looks at what a round has made."""
    names, figures = list(actions), {name: [] for name in actions}
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            with timed(figures, name):
                actions[name](number)
        if check is not None:
            check(number)
    return figures


def python_sources(limit_bytes: int) -> list[str]:
    """Files of the standard library in a fixed order, up to about `limit_bytes`."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size >= limit_bytes or "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            size += len(text.encode())
    return texts


# ---- preprocess -----------------------------------------------------------------------------------------------------


class MegatronEncoder:
    """What Megatron's pool workers do with a line."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def start(self) -> None:
        MegatronEncoder.processor = sentencepiece.SentencePieceProcessor(model_file=str(self.model))

    def encode(self, line: str) -> tuple[list[int], int]:
        ids = self.processor.encode(json.loads(line)["text"])
        ids.append(self.processor.eos_id())
        return ids, len(line)


def megatron_pipeline(corpus: Path, model: Path, prefix: Path, workers: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoder, builder = MegatronEncoder(model), IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    with open(corpus, encoding="utf-8") as lines:
        pool = multiprocessing.get_context("fork").Pool(workers, initializer=encoder.start)
        for ids, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


def bare_encoding(corpus: Path, model: Path) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with open(corpus, encoding="utf-8") as lines:
        return [[*processor.encode(json.loads(line)["text"]), processor.eos_id()] for line in lines]


def benchmark_preprocess(folder: Path, arguments: argparse.Namespace) -> Path:
    """Prints the comparison; returns the prefix of our dataset."""
    texts = python_sources(arguments.megabytes * 10**6)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    corpus, peers_corpus = folder / "corpus.jsonl", folder / "peers.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    if arguments.plant_error:
        texts[0] = chr(ord(texts[0][0]) + 1) + texts[0][1:]
    peers_corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    model = train_tokenizer(texts, folder / "tokenizer", VOCABULARY, 20_000, os.cpu_count() or 1)[0].path
    settings = Settings(tokenizer_path=str(model), append_eos=True)
    ids: dict[int, list[list[int]]] = {}
    fast = replace(settings, engine="gigatoken")
    names = ("ours", "many", "fast", "fast-many", "megatron")
    ours, many, ours_fast, many_fast, peer = (lambda number, name=name: folder / f"{name}-{number}" for name in names)

    def check(number: int) -> None:
        check_documents(ours(number), ids.pop(number))
        for other in (many, ours_fast, many_fast, peer):
            check_files(ours(number), other(number))

    workers = arguments.workers
    actions = {
        "ours, 1 process": lambda n: preprocess([corpus], ours(n), settings),
        "sentencepiece alone": lambda n: ids.update({n: bare_encoding(peers_corpus, model)}),
        f"ours, program, {workers} workers": lambda n: run_program(corpus, model, many(n), workers, "sentencepiece"),
        "gigatoken, 1 process": lambda n: preprocess([corpus], ours_fast(n), fast),
        f"gigatoken, program, {workers} workers": lambda n: run_program(corpus, model, many_fast(n), workers, "gigatoken"),
        f"megatron-core, {workers} workers": lambda n: megatron_pipeline(peers_corpus, model, peer(n), workers),
    }
    figures = compete(actions, arguments.rounds, check)
    tokens = IndexedDataset(ours(0)).num_tokens
    print(f"\npreprocess: {len(texts)} documents, {megabytes:.1f} MB, {tokens:,} tokens; ids and files are equal")
    table(figures, "MB", megabytes)
    return ours(0)


def run_program(corpus: Path, model: Path, prefix: Path, workers: int, engine: str) -> None:
    """As a user does: workers are spawned, and would import all of this program were they started from here."""
    options = ["--input", corpus, "--output-prefix", prefix, "--tokenizer-model", model, "--append-eos"]
    options += ["--workers", workers, "--engine", engine]
    program = Path(__file__).with_name("preprocess_data.py")
    subprocess.run([sys.executable, program, *map(str, options)], check=True, stdout=subprocess.DEVNULL)


def check_documents(prefix: Path, expected: list[list[int]]) -> None:
    dataset = IndexedDataset(prefix)
    if dataset.num_documents != len(expected):
        sys.exit(f"error: ours has {dataset.num_documents} documents, sentencepiece alone {len(expected)}")
    for number, ids in enumerate(expected):
        if dataset.document(number).tolist() != ids:
            sys.exit(f"error: document {number}: our token ids differ from those of sentencepiece alone")


def check_files(ours: Path, other: Path) -> None:
    for suffix in (".bin", ".idx"):
        if Path(f"{ours}{suffix}").read_bytes() != Path(f"{other}{suffix}").read_bytes():
            sys.exit(f"error: {ours.name}{suffix} and {other.name}{suffix} differ")


def table(figures: Figures, unit: str, amount: float) -> None:
    """The first row is ours, and the ratios are to it."""
    print(f"  {'':30s}   wall s    CPU s  {unit}/s  {unit}/CPU s  CPU s of ours / this (rounds)")
    ours = next(iter(figures.values()))
    for name, rows in figures.items():
        wall, cpu = (median(row[i] for row in rows) for i in (0, 1))
        ratios = [a[1] / b[1] for a, b in zip(ours, rows, strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name:30s}{wall:9.3f}{cpu:9.3f} {amount / wall:9.2f} {amount / cpu:9.2f}     {spread}")


# ---- loader ---------------------------------------------------------------------------------------------------------


def benchmark_loader(prefix: Path, arguments: argparse.Namespace) -> None:
    blend = build_blend([(str(prefix), 1.0), (str(prefix), 2.0)], arguments.sequence_length, 1, VOCABULARY)
    batch, steps = 64, max(1, arguments.samples // 64)
    loader = Loader(blend, arguments.sequence_length, 4, batch, 0, 1)
    windows = window_places(blend, steps * batch)
    file = os.open(f"{prefix}.bin", os.O_RDONLY)
    check_windows(loader, batch, file, windows)
    actions = {
        "Loader.micro_batches": lambda _: deque((loader.micro_batches(step * batch) for step in range(steps)), 0),
        "os.pread": lambda _: deque((os.pread(file, *place) for place in windows), 0),
        "os.pread, to int64 tensors": lambda _: deque((read_tensor(file, *place) for place in windows), 0),
    }
    for action in actions.values():  # the first call of each is not timed
        action(0)
    figures = compete(actions, arguments.rounds + 2)
    os.close(file)
    print(f"\nloader: {len(windows):,} samples of {arguments.sequence_length} + 1 tokens, micro-batches of 4")
    table(figures, "samples", len(windows))
    for name, rows in figures.items():
        print(f"  {name:30s}{median(row[1] for row in rows) / len(windows) * 1e6:9.2f} CPU microseconds a sample")


def read_tensor(file: int, count: int, position: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(os.pread(file, count, position), np.uint16).astype(np.int64))


def window_places(blend: Blend, count: int) -> list[tuple[int, int]]:
    """(bytes, position in the file) of the first samples."""
    sources, draws = blend.locate(np.arange(count))
    size = 2 * (blend.sequence_length + 1)
    starts = [int(blend.sources[s].start_token(np.array([d]))[0]) for s, d in zip(sources, draws, strict=True)]
    return [(size, 2 * start) for start in starts]


def check_windows(loader: Loader, batch: int, file: int, windows: list[tuple[int, int]]) -> None:
    for step in range(min(8, len(windows) // batch)):
        micro_batches = loader.micro_batches(step * batch)
        found = torch.cat([torch.cat([mb.tokens, mb.targets[-1:]]) for mb in micro_batches], dim=1).t().numpy()
        read = [np.frombuffer(os.pread(file, *place), np.uint16) for place in windows[step * batch : (step + 1) * batch]]
        if not np.array_equal(found, np.stack(read)):
            sys.exit(f"error: the micro-batches of step {step} are not the windows of the file")


# ---- start-up -------------------------------------------------------------------------------------------------------


def write_synthetic(prefix: Path, documents: int) -> None:
    """An index of documents of 100 to 1099 tokens, and a .bin file of zeros that takes no room."""
    lengths = np.random.default_rng(1).integers(100, 1100, documents, np.int64)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, UINT16, documents, documents + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((2 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum()))


def benchmark_start(folder: Path, arguments: argparse.Namespace) -> None:
    prefix = folder / "synthetic"
    write_synthetic(prefix, arguments.documents)
    actions = {
        "ours, checked, first sample": lambda _: build_blend([(str(prefix), None)], 2048, 1, 2**16).sample(0),
        "ours, sample 10^9": lambda _: build_blend([(str(prefix), None)], 2048, 1, 2**16).sample(10**9),
        "megatron-core IndexedDataset": lambda _: megatron_open(prefix),
        "reading the index": lambda _: Path(f"{prefix}.idx").read_bytes(),
    }
    figures = compete(actions, arguments.rounds)
    size = Path(f"{prefix}.idx").stat().st_size / 1e6
    tokens = Path(f"{prefix}.bin").stat().st_size // 2
    print(f"\nstart-up: {arguments.documents:,} documents, {tokens:,} tokens, index of {size:.1f} MB, in the page cache")
    table(figures, "MB", size)


def megatron_open(prefix: Path) -> object:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    return MegatronDataset(str(prefix), mmap=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=16, metavar="N", help="of text (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="(%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="of the loader (%(default)s)")
    parser.add_argument("--samples", type=int, default=16384, metavar="N", help="of the loader (%(default)s)")
    parser.add_argument("--documents", type=int, default=20_000_000, metavar="N", help="of the start-up (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--plant-error", action="store_true", help="change one character for the peers: a check must fail")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.")  # of packages for GPUs that it does not find
    import megatron.core

    print(f"command    {shlex.join(['python', *sys.argv])}")
    print(f"hardware   {os.cpu_count()} x {platform.machine()} CPU")
    print(f"versions   Python {platform.python_version()}, sentencepiece {sentencepiece.__version__}, numpy {np.__version__}, "
          f"torch {torch.__version__}, megatron-core {megatron.core.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        prefix = benchmark_preprocess(Path(folder), arguments)
        benchmark_loader(prefix, arguments)
        benchmark_start(Path(folder), arguments)


if __name__ == "__main__":
    main()
