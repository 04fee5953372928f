"""The first part of benchmark_data.py: text to token ids, beside sentencepiece alone and what Megatron's tool does."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from _measuring import Report, Usage, compete, watch

from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.preprocess import Settings, preprocess
from megatron_llama.data.tokenizer_training import train_tokenizer

VOCAB_SIZE = 32_000
SMALL_VOCAB_SIZE = 1_000  # for texts that are too few for the other
TRAINING_BYTES = 20_000_000
MEMORY_SIZES = (50, 500)  # MB
MEMORY_GROWTH = 1.1


def python_sources(limit_bytes: int) -> list[str]:
    """Sources of the standard library and of the installed packages in a fixed order, up to about `limit_bytes`."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    texts, size = [], 0
    for path in (path for root in roots for path in sorted(root.rglob("*.py"))):
        if size >= limit_bytes:
            break
        if path.is_relative_to(roots[0] / "site-packages") and not path.is_relative_to(roots[1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            size += len(text.encode())
    return texts


def write_corpus(path: Path, texts: list[str]) -> Path:
    """A line of JSON each."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def train(texts: list[str], folder: Path) -> Path:
    """A tokenizer for them."""
    size = sum(map(len, texts))
    vocab_size = VOCAB_SIZE if size > TRAINING_BYTES // 4 else SMALL_VOCAB_SIZE
    sample = texts[:: -(-size // TRAINING_BYTES)]
    return train_tokenizer(sample, folder / "tokenizer", vocab_size, 10**6, os.cpu_count() or 1)[0].path


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


def megatron_pipeline(corpus: Path, model: Path, prefix: Path, workers: int, make_builder: Callable) -> None:
    """What Megatron's tool does: Pool.imap over the lines, its IndexedDatasetBuilder in the parent."""
    encoder, builder = MegatronEncoder(model), make_builder(f"{prefix}.bin", dtype=np.uint16)
    with open(corpus, encoding="utf-8") as lines:
        pool = multiprocessing.get_context("fork").Pool(workers, initializer=encoder.start)
        for ids, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


def bare_encoding(corpus: Path, model: Path) -> Iterator[list[int]]:
    """sentencepiece in a loop over the documents."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            yield [*processor.encode(json.loads(line)["text"]), processor.eos_id()]


def benchmark_preprocess(report: Report, folder: Path, texts: list[str], rounds: int, workers: int, plant_error: bool) -> Path:
    """Reports the comparison; returns the prefix of our dataset. Exits where token ids or files differ."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # processes that are spawned don't need it

    corpus = write_corpus(folder / "corpus.jsonl", texts)
    changed = chr(ord(texts[0][0]) + 1) + texts[0][1:] if plant_error else texts[0]
    peers_corpus = write_corpus(folder / "peers.jsonl", [changed, *texts[1:]])
    model = train(texts, folder)
    slow = Settings(tokenizer_path=str(model), append_eos=True)
    fast = replace(slow, engine="gigatoken")
    usages: list[Usage] = []
    names = ("slow", "fast", "slow-program", "fast-program", "megatron")
    prefixes = {name: folder / name for name in names}

    preprocess([corpus], prefixes["slow"], slow)
    check_documents(prefixes["slow"], bare_encoding(peers_corpus, model))
    seconds = compete(
        {
            "bare": lambda _: deque(bare_encoding(peers_corpus, model), 0),
            "megatron": lambda _: megatron_pipeline(peers_corpus, model, prefixes["megatron"], workers, IndexedDatasetBuilder),
            "slow": lambda _: preprocess([corpus], prefixes["slow"], slow),
            "fast": lambda _: preprocess([corpus], prefixes["fast"], fast),
            "slow-program": lambda _: run_program(corpus, model, prefixes["slow-program"], workers, "sentencepiece"),
            "fast-program": lambda _: usages.append(run_program(corpus, model, prefixes["fast-program"], workers, "gigatoken")),
        },
        rounds,
        lambda _: [check_files(prefixes["slow"], prefixes[name]) for name in names[1:]],
    )
    megabytes = corpus.stat().st_size / 1e6
    tokens = IndexedDataset(prefixes["slow"]).num_tokens
    report.section(
        "preprocess", f"{len(texts):,} documents, {megabytes:.1f} MB of JSON, {tokens:,} tokens; ids and files are equal"
    )
    report_speed(report, {name: [megabytes / value for value in values] for name, values in seconds.items()}, workers)
    tenth = run_program(write_corpus(corpus, texts[::10]), model, folder / "tenth", workers, "gigatoken")
    report_parent(report, usages, tenth, len(texts) - len(texts[::10]))
    return prefixes["slow"]


def report_speed(report: Report, speeds: dict[str, list[float]], workers: int) -> None:
    """`speeds`: MB per CPU second of all processes, of each round."""
    names = {
        "bare": "sentencepiece, a bare encode loop, nothing written",
        "megatron": f"megatron-core's builder in Megatron's pipeline, {workers} workers",
        "slow": "ours, sentencepiece, 1 process",
        "fast": "ours, gigatoken, 1 process, its verification included",
        "slow-program": f"ours, sentencepiece, the program, {workers} workers, start-up incl.",
        "fast-program": f"ours, gigatoken, the program, {workers} workers, start-up incl.",
    }
    for name, title in names.items():
        report.add(title, speeds[name], "MB / CPU second")
    for ours, theirs, at_least in (
        ("slow", "bare", 0.95),
        ("fast", "bare", 4),
        ("slow-program", "megatron", None),
        ("fast-program", "megatron", 3),
    ):
        ratios = [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]
        short = {"bare": "bare loop", "megatron": "Megatron"}[theirs]
        engine = "gigatoken" if "fast" in ours else "sentencepiece"
        report.add(f"ours, {engine}, against {short}", ratios, "times", at_least=at_least)


def report_parent(report: Report, usages: list[Usage], tenth: Usage, more_documents: int) -> None:
    """The parent's part of the program with workers and gigatoken; `tenth` is of a tenth of the documents."""
    report.add("its parent: CPU, start-up and verification included", [u.parent_cpu_seconds for u in usages], "seconds")
    report.add("its parent: of the program's CPU", [100 * u.parent_cpu_seconds / u.cpu_seconds for u in usages], "%")
    more_seconds = [usage.parent_cpu_seconds - tenth.parent_cpu_seconds for usage in usages]
    report.add("its parent: CPU for one document more", [1e6 * s / more_documents for s in more_seconds], "microseconds")
    report.add("its parent: peak memory", [u.parent_peak_bytes / 1e6 for u in usages], "MB")
    report.add("its largest worker: peak memory", [u.worker_peak_bytes / 1e6 for u in usages], "MB")


def run_program(corpus: Path, model: Path, prefix: Path, workers: int, engine: str) -> Usage:
    """As a user does: workers are spawned, and would import all of this program were they started from here."""
    options = ["--input", corpus, "--output-prefix", prefix, "--tokenizer-model", model, "--append-eos"]
    options += ["--workers", workers, "--engine", engine]
    return watch([sys.executable, *map(str, [Path(__file__).with_name("preprocess_data.py"), *options])])


def check_documents(prefix: Path, expected: Iterator[list[int]]) -> None:
    """Exits where a document has other ids."""
    dataset, number = IndexedDataset(prefix), -1
    for number, ids in enumerate(expected):
        if number >= dataset.num_documents or dataset.document(number).tolist() != ids:
            sys.exit(f"error: document {number}: our token ids differ from those of sentencepiece alone")
    if dataset.num_documents != number + 1:
        sys.exit(f"error: ours has {dataset.num_documents} documents, sentencepiece alone {number + 1}")


def check_files(ours: Path, other: Path) -> None:
    """Exits where `.bin` or `.idx` differ."""
    for suffix in (".bin", ".idx"):
        if Path(f"{ours}{suffix}").read_bytes() != Path(f"{other}{suffix}").read_bytes():
            sys.exit(f"error: {ours.name}{suffix} and {other.name}{suffix} differ")


def benchmark_memory(report: Report, folder: Path, texts: list[str], workers: int) -> None:
    """Reports what the program needs for two sizes: the same texts once and repeated, in random order."""
    small, large = MEMORY_SIZES
    model = train(texts, folder)
    usages, documents = {}, {}
    for size in MEMORY_SIZES:
        order = texts * (size // small)
        random.Random(size).shuffle(order)
        corpus = write_corpus(folder / "memory.jsonl", order)
        documents[size] = len(order)
        for engine in ("sentencepiece", "gigatoken"):
            usages[engine, size] = run_program(corpus, model, folder / "memory", workers, engine)
        corpus.unlink()
    report.section("memory", f"the program with {workers} workers, {small} MB of text and {large} MB, the same ten times")
    for engine in ("sentencepiece", "gigatoken"):
        first, second = usages[engine, small], usages[engine, large]
        for name, before, after in (
            ("parent", first.parent_peak_bytes, second.parent_peak_bytes),
            ("largest worker", first.worker_peak_bytes, second.worker_peak_bytes),
        ):
            report.add(f"{engine}, {name}: peak at {small} MB", before / 1e6, "MB")
            report.add(f"{engine}, {name}: peak at {large} MB", after / 1e6, "MB", at_most=MEMORY_GROWTH * before / 1e6)
        more_seconds = second.parent_cpu_seconds - first.parent_cpu_seconds
        more_documents = documents[large] - documents[small]
        report.add(f"{engine}, parent: CPU for one document more", 1e6 * more_seconds / more_documents, "microseconds")
