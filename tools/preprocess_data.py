"""Turns jsonl, parquet and text files into an indexed dataset that Megatron and this project train on.

    python tools/preprocess_data.py --input corpus/ more.jsonl.zst --output-prefix data/corpus \\
        --tokenizer-model data/tokenizer.model --append-bos --append-eos --workers 8

writes data/corpus.bin, data/corpus.idx and data/corpus.json, all at once at the end; the bytes are the same for any number
of workers. A run that was stopped or killed leaves what it finished in data/corpus.partial: the same command goes on there.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

try:
    from tqdm import tqdm

    from megatron_llama.data.fast_encoding import ENGINES
    from megatron_llama.data.inputs import expand_inputs
    from megatron_llama.data.preprocess import Settings, Summary, preprocess
    from megatron_llama.tool_frame import positive_integer, run_tool
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def fraction(text: str) -> float:
    """An argument that is above 0 and below 1."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, directories or patterns: jsonl (.jsonl, .ndjson, .json), .parquet, other names are text; "
        "jsonl and text may be packed (.gz, .zst, .bz2, .xz)",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    add("--tokenizer-model", required=True, metavar="FILE", help="a SentencePiece .model, a tokenizer.json or a tiktoken file")
    add("--json-key", default="text", metavar="KEY", help="which value of a jsonl object or column of parquet (%(default)s)")
    add("--append-bos", action="store_true", help="put the bos token before each document (LLaMA: yes)")
    add("--append-eos", action="store_true", help="put the eos token after each document (LLaMA: yes)")
    add("--workers", type=positive_integer, default=1, metavar="N", help="processes that encode (%(default)s)")
    add(
        "--documents",
        choices=("files", "lines"),
        default="files",
        help="a text file is one document, or one a line (%(default)s)",
    )
    add("--valid-fraction", type=fraction, default=0.0, metavar="F", help="hold out so many documents, as PREFIX-valid")
    add(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="at a bad line: stop, or note it in PREFIX.errors.jsonl (%(default)s)",
    )
    add("--max-errors", type=positive_integer, default=1000, metavar="N", help="stop after so many skipped lines (%(default)s)")
    add(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="auto: gigatoken where it is installed and agrees with the tokenizer; sentencepiece: the tokenizer's own package",
    )
    add("--keep-parts", action="store_true", help="make PREFIX a directory of parts instead of joining them")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> Summary:
    settings = Settings(
        arguments.tokenizer_model,
        arguments.json_key,
        arguments.append_bos,
        arguments.append_eos,
        arguments.on_error,
        arguments.max_errors,
        arguments.valid_fraction,
        arguments.engine,
    )
    files = expand_inputs(arguments.input)
    total_bytes = sum(path.stat().st_size for path in files if path.is_file())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
        tokens, start = 0, time.perf_counter()

        def progress(read_bytes: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            seconds = time.perf_counter() - start
            bar.set_postfix_str(f"{tokens / 1e6:.2f} M tokens, {tokens / 1e6 / max(seconds, 1e-9):.2f} M/s", refresh=False)
            bar.update(read_bytes)

        return preprocess(
            files,
            arguments.output_prefix,
            settings,
            arguments.workers,
            arguments.documents,
            progress,
            keep_parts=arguments.keep_parts,
        )


def report(arguments: argparse.Namespace, summary: Summary, seconds: float) -> None:
    splits = [(arguments.output_prefix, summary)]
    if summary.valid is not None:
        splits.append((f"{arguments.output_prefix}-valid", summary.valid))
    for prefix, counts in splits:
        print(
            f"{prefix}: {counts.documents:,} documents ({counts.empty_documents:,} empty), {counts.tokens:,} tokens, "
            f"{counts.text_bytes / max(counts.tokens, 1):.3f} bytes a token"
        )
    if summary.skipped_lines:
        print(f"{arguments.output_prefix}.errors.jsonl: {summary.skipped_lines:,} bad lines left out")
    print(f"engine: {summary.engine_note}")
    resumed = f"; {summary.resumed_parts} of {summary.parts} parts were finished before" if summary.resumed_parts else ""
    text_bytes = sum(counts.text_bytes for _, counts in splits)
    rate = f"{text_bytes / 1e6 / seconds:.2f} MB/s with {arguments.workers} workers"
    print(f"{text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s, {rate}{resumed}")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a stopped job ends its workers
    arguments = parse_arguments()
    start = time.perf_counter()
    try:
        summary = run(arguments)
    except BaseException:
        work = Path(f"{arguments.output_prefix}.partial")
        if work.is_dir() and (parts := len(list(work.glob("*.json")))):
            print(f"note: {parts} finished parts are kept in {work}; the same command goes on from there", file=sys.stderr)
        raise
    report(arguments, summary, time.perf_counter() - start)


if __name__ == "__main__":
    run_tool(main)
