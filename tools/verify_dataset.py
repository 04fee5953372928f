"""Verifies an indexed dataset: its structure, that every id is in the vocabulary, and a random sample against the text.

    python tools/verify_dataset.py data/corpus --tokenizer-model data/tokenizer.model --input corpus/ --samples 1000

Exit code 0 says that all holds.
"""

from __future__ import annotations

import argparse
import sys

try:
    from tqdm import tqdm

    from megatron_llama.data.indexed import IndexedDataset
    from megatron_llama.data.verify import verify_ids, verify_text
    from megatron_llama.tokenizer import Tokenizer
    from megatron_llama.tool_frame import run_tool
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="a prefix, or a directory of parts")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="its vocabulary is the limit of the ids")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="the limit without a tokenizer")
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="the text, as given to preprocess_data.py")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="(%(default)s)")
    parser.add_argument("--documents", choices=("files", "lines"), default="files", help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="documents to tokenise again (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of documents (%(default)s)")
    arguments = parser.parse_args()
    if arguments.input and not arguments.tokenizer_model:
        parser.error("--input needs --tokenizer-model")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    dataset = IndexedDataset(arguments.prefix)
    print(f"structure  {dataset.num_tokens:,} tokens in {dataset.num_documents:,} documents: index and files agree")
    tokenizer = Tokenizer(arguments.tokenizer_model) if arguments.tokenizer_model else None
    limit = tokenizer.vocab_size if tokenizer else arguments.vocab_size
    with tqdm(total=dataset.num_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
        largest = verify_ids(dataset, limit, bar.update)
    print(f"ids        0 to {largest}" + (f", all in the vocabulary of {limit}" if limit else "; no vocabulary given"))
    if arguments.input:
        options = arguments.json_key, arguments.documents, arguments.samples, arguments.seed
        checked = verify_text(dataset, tokenizer, arguments.input, *options)
        print(f"text       {checked:,} documents tokenised again: their ids are equal")


if __name__ == "__main__":
    run_tool(main)
