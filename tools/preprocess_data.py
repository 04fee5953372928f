"""Turns jsonl and text files into an indexed dataset that Megatron and this project train on.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-model data/tokenizer.model --append-eos --workers 8

writes data/corpus.bin, data/corpus.idx and data/corpus.json, all at once at the end: an error leaves nothing behind. The
bytes are the same for any number of workers.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

try:
    from tqdm import tqdm

    from megatron_llama.data.preprocess import Settings, Summary, preprocess
    from parallel.errors import UserError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def positive(text: str) -> int:
    """An argument that is an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE", help="jsonl (.jsonl, .ndjson, .json) or text files"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--tokenizer-model", required=True, metavar="FILE", help="a SentencePiece .model")
    parser.add_argument("--json-key", default="text", help="which value of a jsonl object is the text (%(default)s)")
    parser.add_argument("--append-bos", action="store_true", help="put the bos token before each document")
    parser.add_argument("--append-eos", action="store_true", help="put the eos token after each document")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes that encode (%(default)s)")
    parser.add_argument(
        "--documents",
        choices=("files", "lines"),
        default="files",
        help="a document of a text file is the file, or a line (%(default)s)",
    )
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> Summary:
    settings = Settings(arguments.tokenizer_model, arguments.json_key, arguments.append_bos, arguments.append_eos)
    total_bytes = sum(path.stat().st_size for path in arguments.input if path.is_file())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
        tokens = 0

        def progress(read_bytes: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / 1e6:.2f} M tokens", refresh=False)
            bar.update(read_bytes)

        return preprocess(arguments.input, arguments.output_prefix, settings, arguments.workers, arguments.documents, progress)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a stopped job cleans up
    arguments = parse_arguments()
    start = time.perf_counter()
    summary = run(arguments)
    seconds = time.perf_counter() - start
    print(
        f"{arguments.output_prefix}: {summary.documents:,} documents ({summary.empty_documents:,} empty), "
        f"{summary.tokens:,} tokens, {summary.text_bytes / summary.tokens:.3f} bytes a token; "
        f"{summary.text_bytes / 1e6:.1f} MB of text "
        f"in {seconds:.1f} s, {summary.text_bytes / 1e6 / seconds:.2f} MB/s with {arguments.workers} workers"
    )


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a full disk, say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
