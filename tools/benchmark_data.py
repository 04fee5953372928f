"""Every number of the data tools beside its peer or limit: preprocessing, samples, start-up, mixture and packing.

    python tools/benchmark_data.py
    python tools/benchmark_data.py --memory --json figures.json

preprocess  ours in this process, and as tools/preprocess_data.py with --workers, start-up included, with sentencepiece and
            with gigatoken | sentencepiece in a loop over the same documents, nothing written | what Megatron's tool does:
            Pool.imap over the lines, IndexedDatasetBuilder in the parent, start-up not included. Seconds are CPU seconds
            of all processes. All token ids are compared, and .bin and .idx byte for byte
memory      with --memory: the program's parent and workers, for 50 MB and for 500 MB
lookup      samples one by one, in batches, and as micro-batches | os.pread of the same windows, whose tokens are compared
start-up    a mixture of LLaMA's seven sources with 1.4 T tokens, in documents of 700,000, so that the indices fit on a disk
mixture     how far any prefix is from the proportions; the global batches of other numbers of ranks are compared
packing     whole documents into samples | best fit in plain Python, whose numbers of samples are compared

Text: the sources of Python's standard library and of installed packages, one jsonl line each. Contestants take turns, in
another order each round. Each figure is a median, with the range of its rounds. The exit code is 1 where outputs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

warnings.filterwarnings("ignore", module=r"megatron\.")  # of packages for GPUs that it does not find

try:
    from _measuring import Report
    from _preprocess_benchmark import MEMORY_SIZES, benchmark_memory, benchmark_preprocess, python_sources
    from _reading_benchmark import (
        PACKED_DOCUMENTS,
        PYTHON_DOCUMENTS,
        benchmark_lookup,
        benchmark_mixture,
        benchmark_packing,
        benchmark_start,
    )
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .[dev]")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50, metavar="N", help="of text (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="(%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="of the lookup (%(default)s)")
    parser.add_argument("--samples", type=int, default=4096, metavar="N", help="of the lookup (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="F", help="of start-up and packing (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--memory", action="store_true", help="also preprocess 50 MB and 500 MB; takes minutes more")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--plant-error", action="store_true", help="change one character for the peers: a check must fail")
    return parser.parse_args()


def describe_setting() -> dict[str, str]:
    """What a figure is worth nothing without."""
    packages = ("sentencepiece", "gigatoken", "numpy", "torch", "megatron-core")
    versions = {"Python": platform.python_version(), **{name: version(name) for name in packages}}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {platform.machine()} CPU",
        "versions": ", ".join(" ".join(pair) for pair in versions.items()),
    }


def main() -> None:
    arguments = parse_arguments()
    try:
        setting = describe_setting()
    except PackageNotFoundError as missing:
        sys.exit(f"error: the package {missing.name} is not installed; pip install -e '.[data,dev]'")
    for name, value in setting.items():
        print(f"{name:10s} {value}")
    report, rounds, scale = Report(), arguments.rounds, arguments.scale
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = python_sources(arguments.megabytes * 10**6)
        prefix = benchmark_preprocess(report, folder, texts, rounds, arguments.workers, arguments.plant_error)
        if arguments.memory:
            benchmark_memory(report, folder, python_sources(MEMORY_SIZES[0] * 10**6), arguments.workers)
        benchmark_lookup(report, prefix, arguments.sequence_length, arguments.samples)
        benchmark_start(report, folder, scale, rounds)
        benchmark_mixture(report, folder, prefix)
        benchmark_packing(report, int(PACKED_DOCUMENTS * scale), int(PYTHON_DOCUMENTS * scale), rounds)
    if arguments.json:
        content = {**setting, "figures": report.as_json()}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
