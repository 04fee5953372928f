"""The best layouts for a model on a number of GPUs, predicted before anything runs.

    python tools/plan.py --preset llama-65b --gpus 2048 --gpu a100-80gb --global-batch-tokens 4M
    python tools/plan.py --preset llama-13b --gpus 64 --gpu h100 --tokens 1T --data data/web --output 13b.toml --report 13b.png
    python tools/plan.py --config run.toml --gpus 64 --gpu my_cluster.toml --calibrate runs/13b/metrics.jsonl
    python tools/plan.py --explain bubble

Further --section.field value flags are those of the training program: what they set is kept in every layout. docs/planning.md
shows how to go from here to a running job.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

try:
    from megatron_llama.config import DataSource, RunConfig, load_config, to_toml, validate
    from megatron_llama.plan import economics, hardware, report
    from megatron_llama.plan.calibration import calibrate
    from megatron_llama.plan.explain import explain
    from megatron_llama.plan.hardware import Hardware
    from megatron_llama.plan.search import Found, search, with_global_batch
    from megatron_llama.tool_frame import positive_integer, positive_number, run_tool
    from parallel.errors import ConfigError, DataError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")

BINARY = {"K": 2**10, "M": 2**20, "G": 2**30}  # of batches: 4M tokens are 2048 samples of 2048
DECIMAL = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
DEFAULT_BATCH = 4 * 2**20
DEFAULT_TOKENS = 10**12
PLACEHOLDER = "data/train"  # the dataset of a written configuration where none is given
PICTURED = 6  # layouts


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", metavar="NAME", help="a published size, such as llama-65b")
    parser.add_argument("--config", metavar="FILE", help="a configuration to start from")
    parser.add_argument("--gpus", type=positive_integer, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(hardware.names())}, or a profile's file")
    parser.add_argument("--network-gb-per-second", type=positive_number, metavar="X", help="per GPU (the profile's)")
    parser.add_argument("--gpus-per-node", type=positive_integer, metavar="N", help="(default: the profile's)")
    parser.add_argument("--global-batch-tokens", type=count_of(BINARY), metavar="N", help="of a step, as 4M (default: 4M)")
    parser.add_argument("--tokens", type=count_of(DECIMAL), metavar="N", help="of the run (default: the preset's, or 1T)")
    parser.add_argument("--sequence-length", type=positive_integer, metavar="N", help="(default: the preset's)")
    parser.add_argument("--data", nargs="+", default=[], metavar="PREFIX", help="training datasets, for --output")
    parser.add_argument("--top", type=positive_integer, default=8, metavar="N", help="layouts to show (default: 8)")
    parser.add_argument("--pue", type=positive_number, default=economics.LLAMA_PUE, metavar="X", help="(default: %(default)s)")
    parser.add_argument(
        "--carbon", type=positive_number, default=economics.LLAMA_CARBON, metavar="KG", help="per kWh (default: %(default)s)"
    )
    parser.add_argument("--price", type=positive_number, metavar="X", help="per GPU-hour")
    parser.add_argument("--calibrate", type=Path, metavar="METRICS", help="metrics.jsonl of a run on the same kind of GPUs")
    parser.add_argument("--calibrate-gpus", type=positive_integer, metavar="N", help="of that run (default: by its log)")
    parser.add_argument("--explain", metavar="FIELD", help="how a figure is predicted, with its sources")
    parser.add_argument("--json", action="store_true", help='print {"layouts": [...]}, the best first')
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the best layout as a configuration (TOML)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="draw the plan: .png, .svg or .pdf")
    return parser.parse_known_args()


def count_of(units: dict[str, int]) -> Callable[[str], int]:
    """A parser of counts such as 1.4T."""

    def count(text: str) -> int:
        found = re.fullmatch(rf"([\d.]+)([{''.join(units)}]?)", text.upper())
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is no count; write it as 4194304 or 4M")
        number = round(float(found[1]) * units.get(found[2], 1))
        if number < 1:
            raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
        return number

    return count


def main() -> None:
    arguments, flags = parse_arguments()
    if arguments.explain:
        print(explain(arguments.explain))
        return
    for name in ("gpus", "gpu"):
        if getattr(arguments, name) is None:
            raise ConfigError(f"--{name} is not given: say how many GPUs of which kind, as --gpus 64 --gpu h100")
    gpu = profile(arguments)
    base = base_config(arguments, flags)
    calibration = calibrate(arguments.calibrate, gpu, arguments.calibrate_gpus) if arguments.calibrate else 1.0
    found = search(base, arguments.gpus, gpu, calibration)
    rates = economics.Rates(arguments.pue, arguments.carbon, arguments.price)
    tokens = base.train.tokens or base.train.steps * base.train.global_batch_size * base.train.sequence_length
    if arguments.json:
        shown = [report.layout_values(one, tokens, rates) for one in found[: arguments.top]]
        print(json.dumps({"layouts": shown, "calibration": calibration}, indent=2))
    else:
        print("\n".join(report.plan_lines(found, arguments.top, tokens, rates)))
        if arguments.calibrate:
            print(f"calibrated: steps took {calibration:.2f} times as long as predicted")
    notes = []
    if arguments.output:
        notes.append(write(arguments.output, found[0], arguments))
    if arguments.report:
        draw(arguments.report, found, base, gpu, calibration)
        notes.append(f"picture {arguments.report}")
    if notes and not arguments.json:
        print("\n" + "\n".join(notes))


def profile(arguments: argparse.Namespace) -> Hardware:
    """The GPU's profile, with what the flags say of the cluster."""
    gpu = hardware.find(arguments.gpu)
    if arguments.network_gb_per_second:
        gpu = replace(gpu, network_bytes_per_second=arguments.network_gb_per_second * hardware.GIGA)
    if arguments.gpus_per_node:
        gpu = replace(gpu, gpus_per_node=arguments.gpus_per_node)
    return gpu


def base_config(arguments: argparse.Namespace, flags: list[str]) -> RunConfig:
    """The model, the batch and the length of the run; the search sets the layout."""
    if not arguments.preset and not arguments.config:
        flags_model = any(flag.startswith("--model.") for flag in flags)
        if not flags_model:
            raise ConfigError("no model is given: name a published size with --preset llama-13b, or a file with --config")
    argv = ["--config", arguments.config] if arguments.config else []
    argv += ["--model.preset", arguments.preset] if arguments.preset else []
    if arguments.sequence_length:
        argv += ["--train.sequence_length", str(arguments.sequence_length)]
    base = load_config(argv + flags)
    batch_is_set = arguments.config or any(flag.startswith("--train.global_batch_size") for flag in flags)
    if arguments.global_batch_tokens or not batch_is_set:
        base = with_global_batch(base, arguments.global_batch_tokens or DEFAULT_BATCH)
    train, data = base.train, base.data
    if arguments.tokens or not (train.tokens or train.steps):
        train = replace(train, steps=0, tokens=arguments.tokens or DEFAULT_TOKENS)
    if arguments.data or not data.train:
        data = replace(data, train=tuple(DataSource(prefix) for prefix in arguments.data or [PLACEHOLDER]))
    return replace(base, train=train, data=data)


def write(path: Path, best: Found, arguments: argparse.Namespace) -> str:
    """Write the configuration of the best layout, checked as the training program will check it; what to say of it."""
    config = best.config
    if arguments.gpu.endswith(".toml"):  # which the run cannot find by its GPU's name
        config = replace(config, log=replace(config.log, hardware=arguments.gpu))
    validate(config, arguments.gpus)
    try:
        path.write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot write the configuration: {error}") from error
    missing = config.data.train == (DataSource(PLACEHOLDER),)
    note = f"; its dataset is {PLACEHOLDER}: give yours with --data, or --data.train when training" if missing else ""
    return f"configuration {path}: python -m megatron_llama.train --config {path} on {arguments.gpus:,} GPUs{note}"


def draw(path: Path, found: list[Found], base: RunConfig, gpu: Hardware, calibration: float) -> None:
    try:
        from megatron_llama.plan.picture import save_picture
    except ImportError as error:
        raise ConfigError(f"--report needs {error.name}: pip install matplotlib; without it, text is printed") from error
    best = found[0].prediction
    sizes = {best.job.cluster.gpus: best.tokens_per_second_per_gpu}
    for factor in (1 / 8, 1 / 4, 1 / 2, 2, 4):
        gpus = int(best.job.cluster.gpus * factor)
        if not gpus:
            continue
        try:
            sizes[gpus] = search(base, gpus, gpu, calibration)[0].prediction.tokens_per_second_per_gpu
        except ConfigError:
            continue  # the model does not fit so few, or the batch does not divide among so many
    layouts = {f"{place}. {one}": one.prediction for place, one in enumerate(found[:PICTURED], 1)}
    speed = f"{best.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
    title = f"{base.model.preset or 'model'} on {best.job.cluster.gpus:,} x {gpu.name}: {speed}"
    save_picture(path, title, best, layouts, sizes)


if __name__ == "__main__":
    run_tool(main)
