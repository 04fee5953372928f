"""Rewrites a checkpoint as the ranks of another layout would have written it, in one process and bounded memory.

    python tools/reshard_checkpoint.py runs/7b resharded --world-size 16 --parallel.tp 4 --parallel.pp 2
    python tools/reshard_checkpoint.py runs/7b weights --weights-only --dtype bf16 --world-size 1 --parallel.tp 1

Any layout loads any checkpoint without it: it saves time where one is loaded often. SOURCE is a step directory, a checkpoints
folder or a run directory; DESTINATION becomes a checkpoints folder with the one step in it. The layout is the source's but for
the --section.field flags. Nothing is visible before all is written; after an interruption, start it again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

try:
    from tqdm import tqdm

    from megatron_llama.config import RunConfig, load_config, validate_layout, validate_model
    from megatron_llama.reshard import Resharding
    from megatron_llama.runtime import DTYPES
    from megatron_llama.state import stored_config
    from megatron_llama.tool_frame import run_tool
    from parallel.checkpoint.manifest import read_manifest
    from parallel.checkpoint.steps import resolve_checkpoint
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("destination", type=Path, metavar="DESTINATION")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the new layout (default: as many as wrote it)")
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer's state behind")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights, with --weights-only (default: as stored)")
    parser.add_argument(
        "--SECTION.FIELD", metavar="VALUE", help="a setting of the new layout, such as --parallel.tp 4 or --zero.stage 0"
    )
    return parser.parse_args(argv)


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """The tool's own words, and the `--section.field value` flags."""
    own, settings = [], []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if not (flag.startswith("--") and "." in flag):
            own.append(word)
            continue
        settings += [word] if equals else [word, *([value] if (value := next(words, None)) is not None else [])]
    return own, settings


def new_layout(source: Path, settings: list[str], world_size: int | None) -> tuple[RunConfig, int]:
    """The source's configuration with `settings`, and its number of ranks. Raises ConfigError where they don't fit."""
    directory = resolve_checkpoint(source, groups=("weights",))
    manifest = read_manifest(directory, groups=("weights",))
    stored = stored_config(directory, manifest)
    config = load_config(settings, base=replace(stored, parallel=replace(stored.parallel, dp=0)))
    parallel = config.parallel
    if world_size is None and parallel.dp:
        world_size = parallel.tp * parallel.pp * parallel.cp * parallel.dp
    elif world_size is None:
        world_size = manifest.state.get("world_size", 1)
    validate_model(config)
    validate_layout(config, world_size)
    return config, world_size


def main() -> None:
    own, settings = split_flags(sys.argv[1:])
    arguments = parse_arguments(own)
    config, world_size = new_layout(arguments.source, settings, arguments.world_size)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    resharding = Resharding(arguments.source, config, world_size, arguments.weights_only, dtype)
    with tqdm(total=resharding.total_bytes, unit="B", unit_scale=True, disable=None) as bar:
        directory = resharding.write(arguments.destination, bar.update)
    print(f"{directory}: {resharding.total_bytes:,} bytes for {world_size} ranks, from {resharding.directory}")


if __name__ == "__main__":
    run_tool(main)
