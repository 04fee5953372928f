"""`python -m megatron_llama.train --dry-run`: what a job of any size will hold, send and compute, by running a step of it here.

It is the real program, on one process that stands for any rank: process groups without other ranks, and tensors without memory.
No dataset is needed, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from typing import NoReturn

from megatron_llama.config import DataSource, KernelConfig, RunConfig, load_config, validate
from megatron_llama.dry_run.measure import Figures, measure
from megatron_llama.dry_run.report import figures_json, report_lines
from megatron_llama.dry_run.shapes import Shapes
from megatron_llama.pipeline_plan import settle_schedule
from megatron_llama.runtime import topology_of
from megatron_llama.tool_frame import positive_integer
from parallel.errors import ConfigError
from parallel.launch import Launch
from parallel.topology import Coordinates, Topology

GPUS_PER_NODE = 8


def dry_run(launch: Launch, argv: list[str]) -> int:
    """Measure a step and print its figures. Returns the exit code 0. Raises ConfigError."""
    if launch.rank:
        return 0
    arguments, settings = _parse(argv)
    config, world_size = load_config(settings), arguments.world_size
    if not config.data.train:
        config = replace(config, data=replace(config.data, train=(DataSource("none"),)))
    _refuse(config)
    validate(config, world_size)
    config, notes = as_it_can_run(settle_schedule(config, world_size))
    topology = topology_of(config, world_size)
    ranks = _measure_all(config, _ranks(arguments, topology), world_size, arguments.gpus_per_node)
    figures = config, topology, ranks, arguments.gpus_per_node, notes
    if arguments.json:
        print(json.dumps(figures_json(*figures), indent=1))
    else:
        print("\n".join(report_lines(*figures)))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--dry-run: {message}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The dry run's own flags, and those of the configuration. Raises ConfigError."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--world-size", type=positive_integer)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--all-stages", action="store_true")
    parser.add_argument("--gpus-per-node", type=positive_integer, default=GPUS_PER_NODE)
    parser.add_argument("--json", action="store_true")
    arguments, settings = parser.parse_known_args(argv)
    if arguments.world_size is None:
        parser.error("of how many GPUs? Give --world-size NUMBER, for example --world-size 2048")
    if arguments.rank is not None and arguments.all_stages:
        parser.error(f"--rank {arguments.rank} and --all-stages cannot be had together: remove one of them")
    last = arguments.world_size - 1
    if arguments.rank is not None and not 0 <= arguments.rank <= last:
        parser.error(f"--rank {arguments.rank} is not one of the {arguments.world_size} ranks: give one of 0 to {last}")
    return arguments, settings


def _ranks(arguments: argparse.Namespace, topology: Topology) -> list[int]:
    """The ranks to measure: the given one, or the first of each pipeline stage."""
    if not arguments.all_stages:
        return [arguments.rank or 0]
    return [topology.rank(Coordinates(pp, 0, 0, 0)) for pp in range(topology.pp)]


def _measure_all(config: RunConfig, ranks: list[int], world_size: int, gpus_per_node: int) -> list[Figures]:
    """The figures of each rank; no rank waits for another, so there are as many at once as there are cores."""
    processes = min(len(ranks), len(os.sched_getaffinity(0)))
    if processes == 1:
        return _measure_some(config, ranks, world_size, gpus_per_node)
    with get_context("fork").Pool(processes) as pool:
        parts = [(config, ranks[first::processes], world_size, gpus_per_node) for first in range(processes)]
        found = [figures for part in pool.starmap(_measure_some, parts) for figures in part]
    return sorted(found, key=lambda figures: figures.rank)


def _measure_some(config: RunConfig, ranks: list[int], world_size: int, gpus_per_node: int) -> list[Figures]:
    """One rank after the other; they share the shapes that they have seen."""
    shapes = Shapes()
    return [measure(config, rank, world_size, gpus_per_node, shapes) for rank in ranks]


def _refuse(config: RunConfig) -> None:
    """What cannot be run without numbers, or without another library. Raises ConfigError."""
    if config.zero.engine == "deepspeed":
        stage = min(config.zero.stage, 2)
        less = "" if stage == config.zero.stage else ", the nearest that is our own"
        raise ConfigError(
            f"--dry-run does not support zero.engine = deepspeed, which needs processes to talk to: set --zero.engine native "
            f"--zero.stage {stage}{less}"
        )
    if config.parallel.post_validation:
        raise ConfigError(
            "--dry-run does not support parallel.post_validation = true, whose steps begin by reading a norm: set "
            "--parallel.post_validation false, which takes a copy of the optimizer's state less"
        )


def as_it_can_run(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with what there is on a CPU in place of what needs a GPU, and what that changes in the figures."""
    notes = list(_notes(config))
    train = replace(config.train, compile=False, float8="none", cuda_graphs=False)
    overlap = "backward" if config.parallel.tp_overlap == "async" else config.parallel.tp_overlap
    parallel = replace(config.parallel, tp_overlap=overlap)
    return replace(config, train=train, parallel=parallel, kernels=KernelConfig()), notes


def _notes(config: RunConfig) -> Iterator[str]:
    train = config.train
    chosen = [f"kernels.{name} = {value}" for name, value in vars(config.kernels).items() if value != "auto"]
    if chosen:
        yield f"{', '.join(chosen)}: torch's kernels ran instead; fused ones may keep and need less, messages are the same"
    if train.compile:
        yield "train.compile = true: kernels ran uncompiled; compiled ones need less workspace"
    if train.float8 != "none":
        yield f"train.float8 = {train.float8}: products ran in {train.dtype}; float8 copies of operands are in no figure"
    if train.cuda_graphs:
        yield "train.cuda_graphs = true: ran without; the graphs' own memory is in no figure"
    if config.parallel.tp_overlap == "async":
        yield "parallel.tp_overlap = async: ran as backward, which sends as much; symmetric memory is in no figure"
