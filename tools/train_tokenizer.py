"""Trains a SentencePiece BPE tokenizer with LLaMA's settings (split digits, byte fallback, no normalisation).

    python tools/train_tokenizer.py --input corpus.jsonl notes.txt --output data/tokenizer --vocab-size 32000

writes data/tokenizer.model and data/tokenizer.vocab.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from tqdm import tqdm

    from megatron_llama.data.text import iterate_documents
    from megatron_llama.data.tokenizer_training import train_tokenizer
    from parallel.errors import UserError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="jsonl or text files")
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
    parser.add_argument("--threads", type=int, default=16, metavar="N", help="%(default)s; the .model records it")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    documents = iterate_documents(arguments.input, "files", arguments.json_key)
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


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:  # OSError: a full disk, say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
