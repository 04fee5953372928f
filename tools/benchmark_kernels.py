"""Times each kernel of the table against its twin and its peers, and the output head with its loss in chunks against whole.

    python tools/benchmark_kernels.py
    python tools/benchmark_kernels.py --preset llama-3.2-1b --sequence-length 4096 --micro-batch-size 2     (a GPU)

Sizes are those of one micro-batch of the preset on one rank. Each provider that can run here makes a forward and a backward
pass, in turn with the others; the median of --rounds counts, in seconds of the GPU, or of the CPU over all its threads, which
is less noisy there than wall time. Its error is that of its worst result, relative by norm, against the reference in fp32 from
the same inputs. Providers that are unverified on the device are timed too.

The head's contestants start from x [s, b, h] and end with the gradients of x and of the weight. Their memory is that of the
largest storage that an operation made, and on GPUs also the peak that was allocated above what was there before.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_llama.config import ModelConfig
from megatron_llama.config.presets import preset_layer, preset_names
from parallel.groups import Axis
from parallel.kernels.providers import Kernel, Workload
from parallel.kernels.self_test import Numbers
from parallel.kernels.table import ROWS, resolve_kernels
from parallel.tensor import head_loss
from parallel.tensor.embedding import vocabulary_shard
from parallel.tensor.head_loss import VocabularyParallelHead
from parallel.tensor.parameter import ShardedParameter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
WHOLE = sys.maxsize  # bytes of a chunk
Run = Callable[[], list[Tensor]]  # a forward and a backward pass: results and gradients
Case = Callable[[Kernel, Numbers], Run]  # an operation's inputs, made ready for a kernel


@dataclass(frozen=True)
class Sizes:
    """Of one micro-batch: s positions, b samples, and the model."""

    s: int
    b: int
    model: ModelConfig


def differentiable(kernel: Kernel, numbers: Numbers, inputs: list[Tensor], *settings: object) -> Run:
    """Both passes, the output gradients being given."""
    leaves = [x.requires_grad_() for x in inputs]
    gradients: list[Tensor] = []

    def run() -> list[Tensor]:
        outputs = kernel(*leaves, *settings)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not gradients:
            gradients.extend(numbers(*y.shape).to(y.dtype) for y in outputs)
        return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, gradients))

    return run


def cases(sizes: Sizes) -> Mapping[str, Case]:
    """Inputs of each operation as a block of the model has them."""
    s, b, model = sizes.s, sizes.b, sizes.model
    h, f, n, k, d = model.hidden_size, model.ffn_hidden_size, model.num_heads, model.num_kv_heads, model.head_dim

    def tables(numbers: Numbers) -> list[Tensor]:
        angles = numbers(s, 1, d // 2, dtype=torch.float32)
        return [angles.cos(), angles.sin()]

    def targets(numbers: Numbers) -> Tensor:
        return torch.randint(0, model.vocab_size, (s, b), generator=numbers.generator).to(numbers.device)

    def wgrad(kernel: Kernel, numbers: Numbers) -> Run:
        main_grad, x, dy = numbers(h, f, dtype=torch.float32), numbers(s * b, f), numbers(s * b, h)
        return lambda: [kernel(main_grad, x, dy) or main_grad.clone()]

    def passes_over_logits(kernels: Kernel, numbers: Numbers) -> Run:
        logits, rows, scale = numbers(s * b, model.vocab_size), targets(numbers).flatten(), numbers(s * b, dtype=torch.float32)

        def run() -> list[Tensor]:
            statistics = kernels.statistics(logits, rows)
            kernels.gradient_(logits, rows, statistics[1].log() + statistics[0], scale)
            return [*statistics, logits]

        return run

    def simple(*shapes: tuple[int, ...], settings: tuple[object, ...] = ()) -> Case:
        return lambda kernel, numbers: differentiable(kernel, numbers, [numbers(*shape) for shape in shapes], *settings)

    return {
        "rms_norm": simple((s, b, h), (h,), settings=(1e-5,)),
        "add_rms_norm": simple((s, b, h), (s, b, h), (h,), settings=(1e-5,)),
        "rope": lambda kernel, numbers: differentiable(kernel, numbers, [numbers(s, b, n, d)], *tables(numbers)),
        "qkv_rope": lambda kernel, numbers: differentiable(
            kernel, numbers, [numbers(s, b, (n + 2 * k) * d)], *tables(numbers), n, k
        ),
        "swiglu": simple((s, b, 2 * f)),
        "attention": simple((s, b, n, d), (s, b, k, d), (s, b, k, d)),
        "wgrad": wgrad,
        "cross_entropy": lambda kernel, numbers: differentiable(
            kernel, numbers, [numbers(s, b, model.vocab_size)], targets(numbers), model.vocab_size, Axis.single("tp")
        ),
        "head_loss": passes_over_logits,
    }


def seconds_of(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The median of each, which take turns; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(_seconds(run, device))
    return {name: median(values[1:]) for name, values in seconds.items()}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def error_of(ours: list[Tensor], right: list[Tensor]) -> float:
    """Of the worst result."""
    pairs = zip(ours, right, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item() for a, b in pairs)


def benchmark_operation(operation: str, case: Case, workload: Workload, rounds: int, left_out: Sequence[str]) -> None:
    """A line for each provider."""
    row = [provider for provider in ROWS[operation] if provider.name not in left_out]
    usable = {provider.name: provider for provider in row if provider.missing(workload) is None}
    reference = usable["reference"].load()
    right = [x.detach().clone() for x in case(reference, Numbers(workload, torch.float32))()]
    runs, errors = {}, {}
    for name, provider in usable.items():
        try:
            runs[name] = case(provider.load(), Numbers(workload, workload.dtype))
            errors[name] = error_of(runs[name](), right)
        except Exception as failure:  # a provider that cannot take these sizes must not end the program
            runs.pop(name, None)
            print(f"  {operation:14s}{name:20s} fails: {type(failure).__name__}: {str(failure).splitlines()[0]}")
    seconds = seconds_of(runs, rounds, workload.device)
    for name in runs:
        note = "" if workload.device.type in usable[name].verified else "  unverified"
        faster = seconds["reference"] / seconds[name]
        print(f"  {operation:14s}{name:20s}{1e3 * seconds[name]:10.3f} ms{faster:8.2f} x{errors[name]:12.1e}{note}", flush=True)


class LargestStorage(TorchDispatchMode):
    """Inside, `bytes` becomes the size of the largest storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        sizes = [
            x.untyped_storage().nbytes()
            for x in tree_leaves(made)
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given
        ]
        self.bytes = max([self.bytes, *sizes])
        return made


class MainGradient:
    """An engine's place for a weight's gradient."""

    def __init__(self, weight: Tensor) -> None:
        self.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def ready(self) -> None:
        pass


@dataclass(frozen=True)
class HeadCase:
    """What all contestants of the head get."""

    workload: Workload
    x: Tensor  # [s, b, h]
    weight: Tensor  # [v, h]
    targets: Tensor  # [s, b]

    @classmethod
    def draw(cls, sizes: Sizes, workload: Workload) -> HeadCase:
        """Random inputs."""
        s, b, model, numbers = sizes.s, sizes.b, sizes.model, Numbers(workload, workload.dtype)
        x, weight = numbers(s, b, model.hidden_size), numbers(model.vocab_size, model.hidden_size) * 0.02
        targets = torch.randint(0, model.vocab_size, (s, b), generator=numbers.generator)
        return cls(workload, x, weight, targets.to(workload.device))

    def ours(self, provider: str, chunk_bytes: int) -> Run:
        """Our head; logits are whole where a chunk may have any size."""
        (vocabulary, hidden), tp = self.weight.shape, Axis.single("tp")
        parameter = ShardedParameter(vocabulary_shard("output", vocabulary, hidden, tp), self.x.dtype, self.x.device)
        parameter.data[:vocabulary].copy_(self.weight)
        parameter.sink = MainGradient(parameter)
        kernels = resolve_kernels({"head_loss": provider, "cross_entropy": provider}, self.workload)
        head = VocabularyParallelHead(parameter, vocabulary, tp, False, kernels)
        token_weights = torch.full(self.targets.shape, 1.0 / self.targets.numel(), device=self.x.device)

        def run() -> list[Tensor]:
            head_loss.CHUNK_BYTES = chunk_bytes
            parameter.sink.main_grad.zero_()
            x = self.x.detach().requires_grad_()
            loss = head(x, self.targets, token_weights)
            loss.backward()
            return [loss.detach(), x.grad, parameter.sink.main_grad[:vocabulary]]

        return run

    def peer(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        """A function (x [t, h], weight, targets [t]) -> mean loss, with autograd."""

        def run() -> list[Tensor]:
            x, weight = self.x.detach().requires_grad_(), self.weight.detach().requires_grad_()
            loss = function(x.flatten(0, 1), weight, self.targets.flatten())
            loss.backward()
            return [loss.detach(), x.grad, weight.grad]

        return run


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Whole logits in fp32, as the references have them."""
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def head_contestants(case: HeadCase, compiled: bool) -> dict[str, Callable[[], Run]]:
    """Ours and their peers, those that can run here."""
    bound = head_loss.CHUNK_BYTES
    contestants = {
        f"chunks of {bound // MIB} MiB": partial(case.ours, "torch", bound),
        f"chunks of {bound // (8 * MIB)} MiB": partial(case.ours, "torch", bound // 8),
        "whole logits": partial(case.ours, "torch", WHOLE),
        "plain torch": partial(case.peer, plain),
    }
    if compiled:
        contestants["torch.compile"] = partial(case.peer, torch.compile(plain))
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        contestants["F.linear_cross_entropy"] = partial(case.peer, F.linear_cross_entropy)
    if case.workload.device.type == "cuda":
        contestants["chunks, triton"] = partial(case.ours, "triton", bound)
        contestants["whole, triton"] = partial(case.ours, "triton", WHOLE)
        contestants["liger"] = lambda: case.peer(_liger())
    return contestants


def _liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def benchmark_head(case: HeadCase, rounds: int, compiled: bool) -> None:
    """A line for each contestant."""
    device, runs, facts = case.workload.device, {}, {}
    right = replace(case, x=case.x.float(), weight=case.weight.float()).peer(plain)()
    for name, make in head_contestants(case, compiled).items():
        try:
            run = make()
            error = error_of(run(), right)
            with LargestStorage() as largest:
                run()
            facts[name], runs[name] = (error, largest.bytes, _allocated_bytes(run, device)), run
        except Exception as failure:  # a peer that is absent, or cannot take these sizes
            print(f"  {name:24s} fails: {type(failure).__name__}: {str(failure).splitlines()[0]}")
    seconds = seconds_of(runs, rounds, device)
    for name, (error, largest_bytes, allocated) in facts.items():
        peak = f"{allocated / MIB:10.0f} MiB" if allocated else ""
        print(f"  {name:24s}{1e3 * seconds[name]:10.1f} ms{largest_bytes / MIB:10.0f} MiB{error:12.1e}{peak}", flush=True)


def _allocated_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The peak that a run allocates above what is there before; 0 on a CPU, where torch does not count."""
    if device.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-20m", choices=preset_names(), metavar="NAME", help="(%(default)s)")
    for name, default in (("sequence-length", 512), ("micro-batch-size", 1), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(%(default)s)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="instead of the preset's")
    parser.add_argument("--dtype", choices=DTYPES, help="(bf16 on GPUs, fp32 on CPUs)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without-compile", action="store_true", help="leave out what torch.compile takes its time to make")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="operations of the table, or head")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")
    given = {"vocab_size": arguments.vocab_size} if arguments.vocab_size else {}
    model = ModelConfig(**preset_layer(arguments.preset, "--preset")["model"] | given)
    sizes, workload = Sizes(arguments.sequence_length, arguments.micro_batch_size, model), Workload(device, DTYPES[dtype])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"command    {shlex.join(['python', *sys.argv])}")
    print(f"hardware   {hardware}, {torch.get_num_threads()} threads")
    print(f"versions   Python {platform.python_version()}, torch {torch.__version__}; {dtype}")
    print(f"\n  {'operation':14s}{'provider':20s}{'time':>13s}{'reference':>10s}{'error':>12s}")
    for operation, case in cases(sizes).items():
        if not arguments.only or operation in arguments.only:
            left_out = ["compiled"] if arguments.without_compile else []
            benchmark_operation(operation, case, workload, arguments.rounds, left_out)
    if not arguments.only or "head" in arguments.only:
        peak = f"{'peak':>14s}" if device.type == "cuda" else ""
        print(f"\n  {'head and loss':24s}{'time':>13s}{'largest':>14s}{'error':>12s}{peak}")
        benchmark_head(HeadCase.draw(sizes, workload), arguments.rounds, not arguments.without_compile)


if __name__ == "__main__":
    main()
