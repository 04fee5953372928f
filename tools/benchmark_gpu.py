"""One GPU: our training step beside transformers' under torch.compile, with and without Liger; causal MFU; where the time goes.

    python tools/benchmark_gpu.py --preset llama-3.2-1b --profile profiles/1b
    python tools/benchmark_gpu.py --preset llama-3.2-3b --profile profiles/3b
    python tools/benchmark_gpu.py --preset llama-7b --num-layers 16 --profile profiles/7b

bf16, sequences of 4096, 4 micro-batches of 1, no recomputation; further --section.field flags are ours alone, as in training.
The contestants run one after another, each in a process of its own; a step ends when the host has its loss.

ours            the executor, the kernels that `auto` chooses, the native engine; weights and activations bf16; gradients
                summed, and AdamW run, in fp32 on fp32 masters
compile         LlamaForCausalLM, sdpa attention, under torch.compile; parameters and gradients fp32, bf16 by torch.autocast;
                clip_grad_norm_, AdamW(fused=True)
liger           the same with Liger's kernels, the fused head and loss included
transformers    the same model, neither compiled nor with Liger: the only peer that a CPU runs without a compiler

All start from the same weights; the exit code is 1 where the first losses or gradient norms differ by more than TOLERANCES.
--profile writes, for one further step of each, a trace for Perfetto and the seconds of each kind of kernel, and a picture of
them. On a CPU it measures nothing of use: there it runs at small sizes, so that its parts can be tested.

No figure of this program has been measured yet: it has not run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import median

try:
    import torch
    from _contestants import Ours, Setting, add_arguments, check_first, make_setting
    from _peers import Transformers
    from _profiling import Profiled, draw
    from _teams import Clock, Contestant, Measured, Team, preload

    from megatron_llama.config import ParallelConfig
    from megatron_llama.flops import dense_peak_flops, flops_per_token, model_flops_utilization, parameter_count
    from parallel.errors import ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .[hf]")

OPTIONS = {
    "transformers": {},
    "compile": {"is_compiled": True},
    "liger": {"is_compiled": True, "has_liger": True},
}
LEAST_MFU = 0.5


def build(name: str, setting: Setting, profile: Path | None, rank: int, clock: Clock) -> Contestant:
    """A contestant in its process."""
    if setting.device.startswith("cuda"):
        torch.cuda.set_device(setting.device)
    contestant = Ours(setting, rank, clock) if name == "ours" else Transformers(setting, rank, clock, **OPTIONS[name])
    return contestant if profile is None else Profiled(contestant, profile / name, setting.device)


def measure(name: str, setting: Setting, arguments: argparse.Namespace) -> list[Measured]:
    """The first step, which is compared, and those that count."""
    team = Team(name, 1, torch.get_num_threads(), partial(build, name, setting, arguments.profile))
    first, *_ = [team.step(number) for number in range(1 + arguments.warm_up)]
    steps = [team.step(1 + arguments.warm_up + number) for number in range(arguments.steps)]
    if arguments.profile:
        team.step(Profiled.NUMBER)
    team.close()
    return [first, *steps]


def print_steps(results: dict[str, list[Measured]], setting: Setting) -> None:
    """A row for each contestant: medians, and the range of its steps."""
    flops = flops_per_token(setting.model, setting.train.sequence_length)
    cuda = setting.device.startswith("cuda")
    peak = dense_peak_flops(torch.cuda.get_device_name(setting.device), setting.train.dtype) if cuda else None
    print(f"\n{'':14s}   s/step  (lowest to highest)   tokens/s  TFLOP/s   causal MFU  peak GiB")
    for name, steps in results.items():
        seconds = [step.wall_seconds for step in steps[1:]]
        rate = setting.targets / median(seconds)
        mfu = model_flops_utilization(rate, flops, 1, peak)
        share = "peak unknown" if mfu is None else f"{mfu:12.1%}"
        spread = f"({min(seconds):.3f} to {max(seconds):.3f})"
        memory = max(step.peak_bytes for step in steps) / 2**30
        print(f"{name:14s}{median(seconds):9.3f}  {spread:20s}{rate:11.0f}{rate * flops / 1e12:9.2f} {share}{memory:10.2f}")
        if name == "ours" and mfu is not None:
            verdict = "met" if mfu >= LEAST_MFU else "missed"
            print(f"{'':14s}needed {LEAST_MFU:.0%}: {verdict}; peak {peak / 1e12:.0f} TFLOP/s dense")
    ours = median(step.wall_seconds for step in results["ours"][1:])
    for name, steps in results.items():
        if name != "ours":
            print(f"{name} / ours: {median(step.wall_seconds for step in steps[1:]) / ours:.3f}")


def parse_arguments() -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cuda = torch.cuda.is_available()
    add_arguments(parser, preset="llama-3.2-1b", sequence_length=4096, dtype="bf16")
    peers = ["compile", "liger"] if cuda else ["transformers"]
    parser.add_argument("--peers", nargs="*", choices=list(OPTIONS), default=peers, help="(%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before those that count (%(default)s)")
    parser.add_argument("--steps", type=int, default=7, metavar="N", help="steps that count (%(default)s)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(%(default)s)")
    parser.add_argument("--profile", type=Path, metavar="DIRECTORY", help="profile one step of each contestant")
    arguments, flags = parser.parse_known_args()
    return arguments, make_setting(arguments, flags, ParallelConfig(dp=1), arguments.device)


def describe(setting: Setting) -> str:
    """What a figure is worth nothing without, printed; the line of the model."""
    import transformers

    cuda = setting.device.startswith("cuda")
    device = torch.cuda.get_device_name(setting.device) if cuda else f"{platform.machine()} CPU"
    train = setting.train
    model = (
        f"{parameter_count(setting.model):,} parameters; {train.dtype}; {setting.micro_batches} micro-batches of "
        f"{train.micro_batch_size} x {train.sequence_length} tokens"
    )
    print(f"command    {shlex.join(['python', *sys.argv])}")
    print(f"hardware   {device}")
    print(f"versions   Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"model      {model}", flush=True)
    return f"{device}; {model}"


def main() -> None:
    try:
        arguments, setting = parse_arguments()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    title = describe(setting)
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    preload(["megatron_llama.step", "transformers.models.llama.modeling_llama"])
    results: dict[str, list[Measured]] = {}
    for name in ("ours", *arguments.peers):
        results[name] = measure(name, setting, arguments)
        if name != "ours":
            check_first(results["ours"][0], results[name][0], name, setting.train.dtype)
    print_steps(results, setting)
    if arguments.profile:
        draw({name: json.loads((arguments.profile / f"{name}.json").read_text()) for name in results}, title,
             arguments.profile / "profile.png")  # fmt: skip


if __name__ == "__main__":
    main()
