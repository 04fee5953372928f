"""Trains a SentencePiece BPE tokenizer with LLaMA's settings (split digits, byte fallback, no normalisation).

    python tools/train_tokenizer.py --input corpus.jsonl notes.txt --output data/tokenizer --vocab-size 32000

writes data/tokenizer.model and data/tokenizer.vocab.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from tqdm import tqdm

    from megatron_llama.data.inputs import expand_inputs
    from megatron_llama.data.text import iterate_documents
    from megatron_llama.data.tokenizer_training import choose_pieces, measure, train_tokenizer
    from megatron_llama.tokenizer import Tokenizer
    from megatron_llama.tool_frame import run_tool
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


REPORTED_FILES = 20
REPORTED_CHARACTERS = 300_000  # of each


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, directories or patterns, as of preprocess_data.py"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model and PREFIX.vocab")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="LLaMA: 32000")
    parser.add_argument("--json-key", default="text", help="which value of a jsonl object is the text (%(default)s)")
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=10_000_000,
        metavar="N",
        help="train on at most so many lines, chosen at random (%(default)s); memory is about 7.5 times their size",
    )
    parser.add_argument(
        "--sample-bytes", type=float, metavar="N", help="read only about so much of the input, at random places: 2e9, say"
    )
    parser.add_argument("--threads", type=int, default=16, metavar="N", help="%(default)s; the .model records it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    files = expand_inputs(arguments.input)
    choose = choose_pieces(files, int(arguments.sample_bytes)) if arguments.sample_bytes else None
    documents = iterate_documents(files, "files", arguments.json_key, choose)
    with tqdm(desc="reading", unit=" characters", unit_scale=True, disable=None) as bar:
        tokenizer, quality = train_tokenizer(
            documents, arguments.output, arguments.vocab_size, arguments.max_sentences, arguments.threads, bar.update
        )
    print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:16]}")
    print(
        f"on the first {quality.sample_bytes / 1e6:.2f} MB of the input: {quality.bytes_per_token:.3f} bytes a token, "
        f"{100 * quality.character_coverage:.3f} % of the characters in the vocabulary "
        "(others, such as line ends, become bytes)"
    )
    shown = dict.fromkeys(files)  # a file may be given twice
    if len(shown) > 1:
        report_files(tokenizer, list(shown)[:REPORTED_FILES], arguments.json_key)


def report_files(tokenizer: Tokenizer, files: Sequence[Path], json_key: str) -> None:
    """How the tokenizer does on the beginning of each file."""
    print("bytes a token, coverage in %, file")
    for path in files:
        texts, left = [], REPORTED_CHARACTERS
        for text in iterate_documents([path], "files", json_key):
            texts.append(text[:left])
            left -= len(texts[-1])
            if left <= 0:
                break
        quality = measure(tokenizer, texts)
        print(f"{quality.bytes_per_token:13.3f}  {100 * quality.character_coverage:13.3f}  {path}")


if __name__ == "__main__":
    run_tool(main)
