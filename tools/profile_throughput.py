"""How fast a configuration trains here, and where its steps go; sweeps over settings; a hardware profile for tools/plan.py.

    python tools/profile_throughput.py run --config 7b.toml --steps 20
    torchrun --nproc-per-node 8 tools/profile_throughput.py run --config 7b.toml --trace step.json --output profiles/7b
    python tools/profile_throughput.py run --config 7b.toml --sweep parallel.tp=1,2,4 --sweep train.micro_batch_size=1,2 \\
        --csv sweep.csv --plot sweep.png
    srun --ntasks-per-node=8 python tools/profile_throughput.py hardware --based-on h100 --output my_cluster.toml

run       makes real training steps and throws the model away; random tokens where the configuration names no dataset. Nothing
          is read from or written to its run directory. --output DIR writes a run's metrics for plan.py --calibrate.
hardware  times matrix products, attention, memory and, between the ranks, collectives; fits a profile to them, which plan.py,
          `run --gpu` and a training take.

Under torchrun, srun or mpirun all ranks take part; otherwise the program starts --ranks of them on this machine. Further
--section.field flags of `run` are those of the training program. docs/profiling.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

try:
    from _hardware_profile import fitted_lines, profile_text
    from _hardware_rank import GRIDS, HardwareMeasured, HardwareWish, measure_hardware
    from _local_ranks import default_ranks, run_local_ranks, starts_ranks
    from _sweep import Row, run_sweep, sweep_lines, table_rows, write_csv
    from _throughput_rank import Wish, measure, prepared
    from _throughput_report import Figures, lines, write_run

    from megatron_llama.config import RunConfig, load_config
    from megatron_llama.plan import hardware
    from megatron_llama.program import run_program
    from megatron_llama.tool_frame import positive_integer, positive_number, run_tool
    from parallel import launch as launching
    from parallel.errors import ConfigError, DataError
    from parallel.launch import Launch
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The tool's arguments, and the flags of the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    modes = parser.add_subparsers(dest="mode", required=True, metavar="run|hardware")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--ranks", type=positive_integer, metavar="N", help="to start here (default: one per GPU, or 1)")
    common.add_argument("--threads", type=positive_integer, metavar="N", help="of each rank (default: cores / ranks)")
    run = modes.add_parser("run", parents=[common], help="measure training steps", allow_abbrev=False)
    add_run_arguments(run)
    profile = modes.add_parser("hardware", parents=[common], help="measure a hardware profile", allow_abbrev=False)
    add_hardware_arguments(profile)
    arguments, flags = parser.parse_known_args()
    if flags and arguments.mode == "hardware":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return arguments, flags


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="of a training")
    add("--steps", type=positive_integer, default=20, metavar="N", help="measured (default 20)")
    add("--warmup", type=positive_integer, default=3, metavar="N", help="steps before those (default 3)")
    add("--gpu", metavar="NAME", help=f"predict too: {', '.join(hardware.names())}, or a profile's file")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--trace", type=Path, metavar="FILE", help="write the last step's actions on all ranks, for Perfetto")
    add("--profile", type=Path, metavar="FOLDER", help="write what torch's profiler sees of one more step on rank 0")
    add("--output", type=Path, metavar="FOLDER", help="write metrics.jsonl and config.toml for plan.py --calibrate")
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="measure all values (of several keys: all pairs)")
    add("--csv", type=Path, metavar="FILE", help="of a sweep: write its table")
    add("--plot", type=Path, metavar="FILE", help="of a sweep: draw it (.png, .svg or .pdf)")


def add_hardware_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.toml", help="the profile")
    add("--based-on", metavar="NAME", help=f"data sheet and what is not measured: one of {', '.join(hardware.names())}")
    add("--dtype", choices=("bf16", "fp32"), help="of products and attention (default: bf16 on GPUs, fp32 on CPUs)")
    add("--grid", choices=list(GRIDS), help="sizes of what is timed (default: large on GPUs, small on CPUs)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default auto)")
    add("--watts", type=positive_number, metavar="X", help="of a device at full load, for plan.py's energy")


def main() -> None:
    """Started by a person: the ranks are started here."""
    arguments, flags = parse_arguments()
    check_flags(arguments)
    check_files(arguments)
    ranks = arguments.ranks or default_ranks()
    if arguments.mode == "hardware":
        wish = hardware_wish(arguments)
        save_profile(run_local_ranks(partial(measure_hardware, wish=wish), ranks, arguments.threads), arguments)
        return
    config, gpu = load(arguments, flags), profile(arguments)
    if arguments.sweep:
        rows = run_sweep(config, arguments.sweep, arguments.steps, arguments.warmup, ranks, arguments.threads, gpu)
        report_sweep(rows, arguments)
        return
    prepared(config, arguments.warmup + arguments.steps, ranks)  # what is wrong with it is said by nobody else then
    measured = run_local_ranks(partial(measure, wish=wish_of(config, arguments)), ranks, arguments.threads)
    report_run(Figures(measured, gpu), arguments)


def rank_main(launch: Launch) -> int:
    """Started by torchrun, srun or mpirun as one of their ranks."""
    arguments, flags = parse_arguments()
    check_flags(arguments)
    if arguments.ranks:
        raise ConfigError(f"--ranks {arguments.ranks}: {launch.launcher} has started {launch.world_size} ranks; leave it out")
    if launch.rank == 0:
        check_files(arguments)
    if arguments.mode == "hardware":
        measured = measure_hardware(launch, hardware_wish(arguments))
        if measured is not None:
            save_profile(measured, arguments)
        return 0
    if arguments.sweep:
        raise ConfigError(
            f"--sweep starts ranks of its own for each configuration, and {launch.launcher} has started this one: leave "
            f"{launch.launcher} out on one node; on several, start `run` once per configuration with --json"
        )
    gpu = profile(arguments)
    measured = measure(launch, wish_of(load(arguments, flags), arguments))
    if measured is not None:
        report_run(Figures(measured, gpu), arguments)
    return 0


def load(arguments: argparse.Namespace, flags: list[str]) -> RunConfig:
    return load_config([*(["--config", arguments.config] if arguments.config else []), *flags])


def profile(arguments: argparse.Namespace) -> hardware.Hardware | None:
    return hardware.find(arguments.gpu) if arguments.gpu else None


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags of a sweep without one, and those of one configuration in a sweep. Raises ConfigError."""
    if arguments.mode != "run":
        return
    for name, of_sweep in (("csv", True), ("plot", True), ("trace", False), ("profile", False), ("output", False)):
        if getattr(arguments, name) and bool(arguments.sweep) != of_sweep:
            advice = "add --sweep KEY=V1,V2" if of_sweep else "measure one configuration, without --sweep"
            raise ConfigError(f"--{name} is for {'a sweep' if of_sweep else 'one configuration'}: {advice}")


def check_files(arguments: argparse.Namespace) -> None:
    """Find out now, not after the measuring, what cannot be written. Raises DataError."""
    if arguments.mode == "run" and arguments.output and (arguments.output / "metrics.jsonl").exists():
        raise DataError(f"{arguments.output} has a metrics.jsonl, of another run: give --output a new folder")
    for name in ("csv", "plot", "trace", "json", "output"):
        path = getattr(arguments, name, None)
        if path is not None:
            make_place(path)


def make_place(path: Path) -> None:
    """The folder that a file will lie in. Raises DataError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error.strerror}") from error


def wish_of(config: RunConfig, arguments: argparse.Namespace) -> Wish:
    return Wish(config, arguments.steps, arguments.warmup, arguments.trace, arguments.profile)


def hardware_wish(arguments: argparse.Namespace) -> HardwareWish:
    if arguments.based_on:
        hardware.find(arguments.based_on)  # (an error now, not after minutes)
    return HardwareWish(arguments.device, arguments.dtype, arguments.grid)


def report_run(figures: Figures, arguments: argparse.Namespace) -> None:
    print("\n".join(lines(figures)))
    if arguments.trace:
        print(f"trace     {arguments.trace}: open it in ui.perfetto.dev, or with tools/draw_schedule.py")
    if arguments.profile:
        print(f"profile   {arguments.profile}/rank-00000.trace.json.gz, and seconds by kind of kernel in rank-00000.json")
    if arguments.json:
        write_text(arguments.json, json.dumps(figures.as_json(), indent=1) + "\n")
    if arguments.output:
        write_run(arguments.output, figures)
        print(f"run       {arguments.output}: tools/plan.py --calibrate {arguments.output}/metrics.jsonl takes it")


def report_sweep(rows: list[Row], arguments: argparse.Namespace) -> None:
    print("\n".join(sweep_lines(rows)))
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.json:
        write_text(arguments.json, json.dumps({"rows": table_rows(rows)}, indent=1) + "\n")
    if arguments.plot:
        try:
            from _sweep_picture import save_picture
        except ImportError as error:
            raise ConfigError(f"--plot needs {error.name}: pip install matplotlib; without it, the table is printed") from error
        save_picture(arguments.plot, rows)


def save_profile(measured: HardwareMeasured, arguments: argparse.Namespace) -> None:
    """Write the profile, and say how well it describes what it was made from."""
    base = hardware.find(arguments.based_on) if arguments.based_on else None
    write_text(arguments.output, profile_text(measured, base, arguments.based_on, arguments.watts))
    found = hardware.find(str(arguments.output))
    print("\n".join(fitted_lines(measured, found)))
    print(f"profile   {arguments.output}: tools/plan.py --gpu {arguments.output} takes it, and run --gpu")


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot write: {error.strerror}") from error


if __name__ == "__main__":
    if starts_ranks(launching.detect()):
        run_tool(main)
    sys.exit(run_program(rank_main))
