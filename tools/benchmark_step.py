"""Our training step beside a peer's and beside its bare matrix products, on CPU processes, in one layout.

    python tools/benchmark_step.py --preset llama-20m --sequence-length 512
    python tools/benchmark_step.py --dp 4 --num-layers 4 --hidden-size 768 --num-heads 12 --num-kv-heads 12 \\
        --ffn-hidden-size 2048 --vocab-size 4096 --sequence-length 256
    python tools/benchmark_step.py --tp 2 --pp 2 --num-layers 4 --hidden-size 1536 --num-heads 12 --num-kv-heads 12 \\
        --ffn-hidden-size 4096 --vocab-size 4096 --sequence-length 32 --parallel.sequence_parallel false

Every contestant has processes of its own, one per rank, on gloo; the contestants take steps in turn, in another order in each
round, while the others sleep. A ratio is the median of those of the rounds. A step ends when its weights are everywhere.

ours            the executor, the kernels that `auto` chooses and the native engine, ZeRO stage 1; in bf16: weights and
                activations bf16; gradients summed, and AdamW run, in fp32 on fp32 masters
transformers    one process: LlamaForCausalLM, sdpa attention; backward after each micro-batch, clip_grad_norm_,
                AdamW(fused=True); parameters and gradients always fp32, in bf16 under torch.autocast
deepspeed       dp: the same model under DeepSpeed ZeRO-1, with its gradient accumulation and the same AdamW
megatron-core   tp and pp: GPTModel of the local spec, eager, with sdpa attention and torch's RMSNorm, 1F1B,
                fp32 gradient buffers, the same split of the layers as ours, and the same AdamW
products        the floor: the matrix products of a step and nothing else, on as many processes, each with its rank's weights;
                of each linear and the head, for every micro-batch, y = x W^T, dx = dy W and dW += dy^T x. The two products of
                attention (scaled_dot_product_attention, forward and backward) are timed after them and counted separately

All start from the same weights, clip at norm 1.0 and do not decay norms; the tokens are random. Further --section.field flags
are ours alone, as in training, but parallel.sequence_parallel, which megatron-core has too. The exit code is 1 where the first
losses or gradient norms differ by more than TOLERANCES. On a machine shared with others trust CPU seconds, which are of all
ranks together; wall seconds are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

try:
    import torch
    from _contestants import ATTENTION, LINEARS, Ours, Products, Setting, add_arguments, check_first, make_setting
    from _measuring import Report
    from _teams import Clock, Contestant, Measured, Team, compete, preload

    from megatron_llama.config import ParallelConfig
    from megatron_llama.flops import flops_per_token, parameter_count
    from parallel.errors import ConfigError
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .[hf]")

MOST_OVER_PRODUCTS, LEAST_PRODUCTS = 1.25, 0.6
LLAMA = "transformers.models.llama.modeling_llama"


@dataclass(frozen=True)
class Peer:
    """What a peer needs, what of it takes long to import, and how many times as fast ours is to be."""

    packages: tuple[str, ...]
    slow_imports: tuple[str, ...]
    needed: float | None = None


PEERS = {
    "transformers": Peer(("transformers",), (LLAMA,)),
    "deepspeed": Peer(("transformers", "deepspeed"), (LLAMA,), 1.0),
    "megatron-core": Peer(("megatron.core",), ("megatron.core.models.gpt.gpt_model",), 1.2),
}


def build(name: str, setting: Setting, rank: int, clock: Clock) -> Contestant:
    """A contestant's part in the process of a rank: the peers' packages are imported there."""
    if name == "megatron-core":
        from _megatron_peer import Megatron

        return Megatron(setting, rank, clock)
    if name in ("transformers", "deepspeed"):
        import _peers

        return {"transformers": _peers.Transformers, "deepspeed": _peers.DeepSpeed}[name](setting, rank, clock)
    return {"ours": Ours, "products": Products}[name](setting, rank, clock)


def choose_peer(setting: Setting) -> tuple[str, str]:
    """The layout's peer, and why it cannot take part ("" where it can)."""
    parallel = setting.config.parallel
    if parallel.tp == parallel.pp == 1:
        name = "transformers" if parallel.dp == 1 else "deepspeed"
    else:
        name = "megatron-core"
    absent = [package for package in PEERS[name].packages if not _is_installed(package)]
    if absent:
        return name, f"{absent[0]} is not installed"
    if setting.world_size > 1 and setting.train.dtype != "fp32":
        return name, f"on several processes it is set up for fp32, not {setting.train.dtype}"
    model = setting.model
    if name == "megatron-core":
        if parallel.dp > 1:
            return name, "it is set up for dp 1"
        if model.tie_embeddings or model.rope_scaling_factor != 1.0 or model.vocab_size % parallel.tp:
            return name, "it is set up for untied embeddings, unscaled rotary frequencies, and tp that divides the vocabulary"
    return name, ""


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def print_steps(results: dict[str, list[Measured]], setting: Setting) -> None:
    """A row for each contestant, and one for each part of its step."""
    print(f"\n{'medians of ' + str(len(results['ours'])) + ' steps':28s} s/step  CPU s/step  tokens/s  tokens/CPU s  peak MiB")
    for name, steps in results.items():
        wall, cpu = median(s.wall_seconds for s in steps), median(s.cpu_seconds for s in steps)
        memory = max(s.peak_bytes for s in steps) / 2**20
        rates = f"{setting.targets / wall:10.0f}{setting.targets / cpu:14.0f}" if name != "products" else " " * 24
        print(f"{name:26s}{wall:9.3f}{cpu:12.3f}{rates}{memory:10.0f}")
        for part in steps[0].parts:
            wall, cpu = (median(s.parts[part][index] for s in steps) for index in (0, 1))
            print(f"  {part:24s}{wall:9.3f}{cpu:12.3f}")


def print_figures(results: dict[str, list[Measured]], setting: Setting, peer: str) -> Report:
    """Ratios, round by round, and what they have to be."""
    report = Report()
    parallel = setting.config.parallel
    most = MOST_OVER_PRODUCTS if parallel.tp == parallel.pp == 1 else None
    for index, what in enumerate(("wall seconds", "CPU seconds")):
        report.section(f"ratios of {what}", "median of the rounds (lowest to highest)")
        steps = {name: [(s.wall_seconds, s.cpu_seconds)[index] for s in rows] for name, rows in results.items()}
        linears, attention = ([s.parts[part][index] for s in results["products"]] for part in (LINEARS, ATTENTION))
        both = [sum(pair) for pair in zip(linears, attention, strict=True)]
        if peer in results:
            report.add(f"{peer} / ours", _ratios(steps[peer], steps["ours"]), "", at_least=PEERS[peer].needed)
        report.add("ours / products of linears, head and attention", _ratios(steps["ours"], both), "", at_most=most)
        report.add("ours / products of linears and head", _ratios(steps["ours"], linears), "")
        report.add("share of linears and head in our step", _ratios(linears, steps["ours"]), "", at_least=LEAST_PRODUCTS)
    return report


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def parse_arguments() -> tuple[argparse.Namespace, Setting]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser, preset="llama-20m", sequence_length=512, dtype="fp32")
    for name in ("tp", "pp", "dp"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="rounds that count (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each process (one, or all cores' for one process)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the setting, the steps and the figures there")
    parser.add_argument("--plant-error", action="store_true", help="change one token of the peer's: the comparison must fail")
    arguments, flags = parser.parse_known_args()
    parallel = ParallelConfig(tp=arguments.tp, pp=arguments.pp, dp=arguments.dp)
    setting = make_setting(arguments, flags, parallel, "cpu")
    if arguments.threads is None:
        arguments.threads = torch.get_num_threads() if setting.world_size == 1 else 1
    return arguments, setting


def describe(setting: Setting, threads: int, peer: str, reason: str) -> dict[str, str]:
    """What a figure is worth nothing without; printed, and returned for the file."""
    packages = ["torch", *(package.replace(".", "-") for package in PEERS[peer].packages)]
    versions = [f"Python {platform.python_version()}", *(f"{package} {_version(package)}" for package in packages)]
    model, parallel = setting.model, setting.config.parallel
    layout = f"tp {parallel.tp}, pp {parallel.pp}, dp {parallel.dp}"
    flops = flops_per_token(model, setting.train.sequence_length) * setting.targets
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, {setting.world_size} processes, "
        f"threads of each: {threads}",
        "versions": ", ".join(versions),
        "model": f"{parameter_count(model):,} parameters; {setting.train.dtype}; {layout}",
        "step": f"{setting.targets:,} tokens, {flops / 1e9:,.0f} GFLOP, attention's causal half counted",
    }
    if reason:
        facts["left out"] = f"{peer}: {reason}"
    for name, fact in facts.items():
        print(f"{name:10s} {fact}", flush=True)
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def main() -> None:
    try:
        arguments, setting = parse_arguments()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    peer, reason = choose_peer(setting)
    facts = describe(setting, arguments.threads, peer, reason)
    settings = {"ours": setting, peer: replace(setting, planted=arguments.plant_error), "products": setting}
    if reason:
        del settings[peer]
    preload(["megatron_llama.step", *PEERS[peer].slow_imports])
    size, threads = setting.world_size, arguments.threads
    teams = [Team(name, size, threads, partial(build, name, values)) for name, values in settings.items()]

    def check(first: dict[str, Measured]) -> None:
        if not reason:
            check_first(first["ours"], first[peer], peer, setting.train.dtype)

    results = compete(teams, arguments.steps, check)
    print_steps(results, setting)
    report = print_figures(results, setting, peer)
    if arguments.json:
        steps = {name: [vars(step) for step in steps] for name, steps in results.items()}
        arguments.json.write_text(json.dumps({**facts, "steps": steps, "figures": report.as_json()}, indent=1))


if __name__ == "__main__":
    main()
