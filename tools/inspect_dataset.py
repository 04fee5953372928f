"""Shows what is in an indexed dataset: counts, lengths, how it was made, and documents.

    python tools/inspect_dataset.py data/corpus --tokenizer-model data/tokenizer.model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from megatron_llama.data.describe import (
        describe,
        document_lines,
        histogram_lines,
        length_histogram,
        save_picture,
        tokenizer_warning,
    )
    from megatron_llama.data.indexed import IndexedDataset
    from megatron_llama.tokenizer import Tokenizer
    from parallel.errors import UserError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

FIRST_DOCUMENTS = 3
FIRST_TOKENS = 60  # shown of each of the first documents; one asked for by number is shown whole


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="a SentencePiece .model, to show text instead of ids")
    parser.add_argument("--document", type=int, metavar="N", help="show this document whole, counted from 0")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the histogram of the lengths")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    dataset = IndexedDataset(arguments.prefix)
    tokenizer = Tokenizer(arguments.tokenizer_model) if arguments.tokenizer_model else None
    lines = describe(dataset)
    if tokenizer and (warning := tokenizer_warning(dataset, tokenizer)):
        lines.append(warning)
    lines += ["", "sequences by length in tokens", *histogram_lines(length_histogram(dataset)), ""]
    if arguments.document is not None:
        lines += document_lines(dataset, arguments.document, tokenizer, dataset.num_tokens)
    else:
        for number in range(min(FIRST_DOCUMENTS, dataset.num_documents)):
            lines += document_lines(dataset, number, tokenizer, FIRST_TOKENS)
    print("\n".join(lines))
    if arguments.picture:
        save_picture(dataset, arguments.picture)
        print(f"\npicture    {arguments.picture}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
