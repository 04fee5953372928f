"""Merges indexed datasets to one, in the order given, in memory that does not grow with them.

    python tools/merge_datasets.py data/part-a data/part-b data/parts/ --output-prefix data/all

The bytes are those of one run of preprocess_data.py over all texts. --link copies no ids: data/all.parts lists the files.
"""

from __future__ import annotations

import argparse
import sys

try:
    from tqdm import tqdm

    from megatron_llama.data.merge import merge_datasets
    from megatron_llama.tool_frame import run_tool
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="datasets: prefixes, or directories of parts")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--link", action="store_true", help="leave the ids where they are; the files have to stay there")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:
        tokens = merge_datasets(arguments.prefixes, arguments.output_prefix, arguments.link, bar.update)
    print(f"{arguments.output_prefix}: {tokens:,} tokens of {len(arguments.prefixes)} datasets")


if __name__ == "__main__":
    run_tool(main)
