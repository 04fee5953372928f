"""Looks into checkpoints: lists, verifies, compares and prunes them. PATH is a step directory, a checkpoints folder or a run.

    python tools/inspect_checkpoint.py ls runs/7b
    python tools/inspect_checkpoint.py verify runs/7b --all
    python tools/inspect_checkpoint.py diff runs/7b/checkpoints/step_00010000 resharded
    python tools/inspect_checkpoint.py prune runs/7b --keep 3 --keep-every 10000 --dry-run

Nothing but prune changes a checkpoint. Exit codes: 0; 1 where verify finds damage, or diff a difference; 2 for anything else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from tqdm import tqdm

    from megatron_llama.checkpoint_report import compare, listing, root_of, steps_of
    from megatron_llama.tool_frame import run_tool
    from parallel.checkpoint.load import find_damage, read_manifest
    from parallel.checkpoint.offline import StepReader
    from parallel.checkpoint.retention import mark_verified, removable_steps, remove_old_steps
    from parallel.checkpoint.steps import committed_steps, resolve_checkpoint, step_directory
    from parallel.errors import CheckpointError, ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="the steps: size, layout, tokens, and whether they are whole")
    ls.add_argument("path", type=Path, metavar="PATH")
    verify = commands.add_parser("verify", help="read every byte of the newest step, or of the one given")
    verify.add_argument("path", type=Path, metavar="PATH")
    verify.add_argument("--all", action="store_true", help="of every step")
    diff = commands.add_parser("diff", help="the largest difference in each tensor, whatever the layouts")
    diff.add_argument("first", type=Path, metavar="A")
    diff.add_argument("second", type=Path, metavar="B")
    diff.add_argument("--weights-only", action="store_true", help="pass over the optimizer's state")
    prune = commands.add_parser("prune", help="remove old steps, never the newest one that was verified")
    prune.add_argument("path", type=Path, metavar="PATH")
    prune.add_argument("--keep", type=int, required=True, metavar="K", help="leave the newest K steps")
    prune.add_argument("--keep-every", type=int, default=0, metavar="N", help="and those that N divides")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser.parse_args()


def show(arguments: argparse.Namespace) -> int:
    print("\n".join(listing(root_of(arguments.path))))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    directories = steps_of(arguments.path)
    return max(_verify(directory) for directory in (directories if arguments.all else directories[-1:]))


def _verify(directory: Path) -> int:
    try:
        manifest = read_manifest(directory)
        with tqdm(total=manifest.total_bytes, unit="B", unit_scale=True, desc=directory.name, disable=None) as bar:
            damage = list(find_damage(directory, bar.update))
    except CheckpointError as error:
        damage = [error]
    if damage:
        print("\n".join(f"damaged  {error}" for error in damage))
        return 1
    mark_verified(directory)
    print(f"good     {directory}: {manifest.total_bytes:,} bytes in {len(manifest.files)} files")
    return 0


def diff(arguments: argparse.Namespace) -> int:
    groups = ("weights",) if arguments.weights_only else None
    first, second = (StepReader(resolve_checkpoint(path, groups), groups) for path in (arguments.first, arguments.second))
    with tqdm(total=len(first.manifest.tensors), unit=" tensors", disable=None) as bar:
        lines, different = compare(first, second, groups, bar.update)
    print("\n".join(lines))
    return int(different)


def prune(arguments: argparse.Namespace) -> int:
    if arguments.keep < 1:
        raise ConfigError(f"--keep {arguments.keep}: at least one step must stay; give 1 or more")
    root = root_of(arguments.path)
    steps = removable_steps(root, arguments.keep, arguments.keep_every)
    if steps and not arguments.dry_run:
        remove_old_steps(root, committed_steps(root)[-1], arguments.keep, arguments.keep_every)
    left = [step for step in steps if step_directory(root, step).exists()]
    verb = "would remove" if arguments.dry_run else "removed"
    print("\n".join(f"{verb} {step_directory(root, step)}" for step in steps) or f"{root}: nothing to remove")
    if left and not arguments.dry_run:
        raise CheckpointError(f"{root}: steps {', '.join(map(str, left))} could not be removed")
    return 0


def main() -> int:
    """Returns the exit code."""
    arguments = parse_arguments()
    return {"ls": show, "verify": verify, "diff": diff, "prune": prune}[arguments.command](arguments)


if __name__ == "__main__":
    run_tool(main)
