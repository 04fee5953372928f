"""Shows what is in an indexed dataset: counts, lengths, how it was made, and documents. Or what a run reads as one sample.

    python tools/inspect_dataset.py data/corpus --tokenizer-model data/tokenizer.model
    python tools/inspect_dataset.py --config runs/laptop --sample 1000 --tokenizer-model data/tokenizer.model
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
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
    from megatron_llama.tool_frame import run_tool
    from parallel.errors import ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

FIRST_DOCUMENTS = 3
FIRST_TOKENS = 60  # shown of each of the first documents; one asked for by number is shown whole


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer-model", metavar="FILE", help="a tokenizer, to show text instead of ids")
    dataset = parser.add_argument_group("a dataset")
    dataset.add_argument("prefix", metavar="PREFIX", nargs="?", help="of PREFIX.bin and PREFIX.idx")
    dataset.add_argument("--document", type=int, metavar="N", help="show this document whole, counted from 0")
    dataset.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the histogram of the lengths")
    sample = parser.add_argument_group("a sample, as training sees it")
    sample.add_argument("--config", type=Path, metavar="RUN", help="the run: its .toml file, its directory, or a checkpoint")
    sample.add_argument("--sample", type=int, metavar="K", help="the sample's number in the run, counted from 0")
    sample.add_argument("--dp", type=int, metavar="N", default=0, help="data ranks (default: the run's parallel.dp, or 1)")
    arguments = parser.parse_args()
    if (arguments.prefix is None) == (arguments.config is None):
        raise ConfigError("name either a dataset by its PREFIX, or a run by --config RUN")
    if (arguments.config is None) != (arguments.sample is None):
        raise ConfigError("--config RUN and --sample K go together: give both")
    if arguments.dp < 0:
        raise ConfigError(f"--dp {arguments.dp} must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    tokenizer = Tokenizer(arguments.tokenizer_model) if arguments.tokenizer_model else None
    if arguments.config is None:
        show_dataset(IndexedDataset(arguments.prefix), tokenizer, arguments.document, arguments.picture)
        return
    from megatron_llama.run_data import config_of_run  # torch, which these need, takes seconds to import
    from megatron_llama.sample_view import sample_lines

    config = config_of_run(arguments.config)
    if arguments.dp:
        config = replace(config, parallel=replace(config.parallel, dp=arguments.dp))
    print("\n".join(sample_lines(config, arguments.sample, tokenizer)))


def show_dataset(dataset: IndexedDataset, tokenizer: Tokenizer | None, document: int | None, picture: Path | None) -> None:
    lines = describe(dataset)
    if tokenizer and (warning := tokenizer_warning(dataset, tokenizer)):
        lines.append(warning)
    lines += ["", "sequences by length in tokens", *histogram_lines(length_histogram(dataset)), ""]
    if document is not None:
        lines += document_lines(dataset, document, tokenizer, dataset.num_tokens)
    else:
        for number in range(min(FIRST_DOCUMENTS, dataset.num_documents)):
            lines += document_lines(dataset, number, tokenizer, FIRST_TOKENS)
    print("\n".join(lines))
    if picture:
        save_picture(dataset, picture)
        print(f"\npicture    {picture}")


if __name__ == "__main__":
    run_tool(main)
