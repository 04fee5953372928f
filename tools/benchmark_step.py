"""One process's training step beside transformers' LlamaForCausalLM with torch's fused AdamW, and torch.mm as the limit.

    python tools/benchmark_step.py --preset llama-20m --sequence-length 512 --micro-batches 4 --steps 7

The contestants are processes of their own that take steps in turn, in another order in each round, so that all meet the
same load of the machine.

ours   the executor, the kernels that `auto` chooses, NativeZero; in bf16: weights and activations bf16; gradients summed,
       and AdamW run, in fp32 on fp32 masters
peer   LlamaForCausalLM, sdpa attention, no cache; loss = sum / targets of the step, backward after each micro-batch,
       clip_grad_norm_, AdamW(fused=True); parameters and gradients always fp32, in bf16 under torch.autocast, which
       casts the weights in every forward pass
limit  torch.mm in the same dtype, [tokens of a micro-batch, hidden] x [hidden, 2 ffn]: what the processor gives matrices

Both start from the same weights, clip at norm 1.0 and do not decay norms; the tokens are random. The exit code is 1 where their
first losses or gradient norms differ by more than TOLERANCES. On a CPU shared with others trust CPU seconds.

The CUDA path of this program (synchronisation, memory, MFU) has not been run on a device yet.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

try:
    import torch
    from torch import Tensor

    from megatron_llama.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
    from megatron_llama.data.loader import MicroBatch
    from megatron_llama.flops import dense_peak_flops, flops_per_token, model_flops_utilization, parameter_count
    from megatron_llama.presets import preset_layer, preset_names
    from megatron_llama.runtime import DTYPES, Runtime, build_runtime
    from megatron_llama.step import TrainStep, optimizer_settings
    from parallel.zero.native import NativeZero
except ImportError as missing:
    sys.exit(f"error: {missing}; install the project first, from its root: pip install -e .[hf]")

TOLERANCES = {"fp32": (2e-6, 1e-5), "bf16": (2e-3, 1e-2)}  # relative, of the first loss and norm: sums in another order
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size")
PARTS = ("forward and backward", "reduction and norm", "update")
NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
         "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}  # fmt: skip


class Clock:
    """Seconds of the parts of a step. Off, it costs nothing; on, it makes the host wait for a GPU at every part."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.on = device, Counter(), False

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self.on:
            self.synchronize()
        start = time.perf_counter()
        yield
        if self.on:
            self.synchronize()
        self.seconds[name] += time.perf_counter() - start

    def wrap(self, owner: object, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*arguments: object) -> object:
            with self.part(name):
                return original(*arguments)

        setattr(owner, method, timed)


def make_runtime(arguments: argparse.Namespace) -> Runtime:
    train = TrainConfig(
        steps=1,
        global_batch_size=arguments.micro_batch_size * arguments.micro_batches,
        micro_batch_size=arguments.micro_batch_size,
        sequence_length=arguments.sequence_length,
        dtype=arguments.dtype,
    )
    config = RunConfig(model=arguments.model, parallel=ParallelConfig(dp=1), train=train, optimizer=OPTIMIZER)
    return build_runtime(config, 0, 1, torch.device(arguments.device), timedelta(minutes=1))


class Ours:
    def __init__(self, arguments: argparse.Namespace, clock: Clock) -> None:
        runtime = make_runtime(arguments)
        self.engine = NativeZero(runtime.chunks, runtime.groups, optimizer_settings(runtime.config))
        self.step = TrainStep(runtime, self.engine, arguments.micro_batches)
        clock.wrap(self.step.executor, "run", PARTS[0])
        clock.wrap(self.engine, "step", "engine")
        clock.wrap(self.engine, "_update", PARTS[2])

    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # [micro-batches, b, s + 1] -> loss, gradient norm
        length = tokens.shape[-1] - 1
        parts = [part.t().contiguous() for part in tokens]
        batches = [MicroBatch(t[:-1], t[1:], torch.ones(t[1:].shape), torch.arange(length)[:, None]) for t in parts]
        info = self.step.run(self.step.prepare(batches), OPTIMIZER.learning_rate)
        return info.sums[0], info.norm


class Peer:
    def __init__(self, arguments: argparse.Namespace, clock: Clock) -> None:
        self.clock, self.device, self.bf16 = clock, torch.device(arguments.device), arguments.dtype == "bf16"
        self.module = build_peer(make_runtime(arguments)).train()
        decayed = [p for p in self.module.parameters() if p.ndim > 1]
        others = [p for p in self.module.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (OPTIMIZER.beta1, OPTIMIZER.beta2)
        self.is_first = True
        self.optimizer = torch.optim.AdamW(groups, OPTIMIZER.learning_rate, betas, OPTIMIZER.eps, fused=True)

    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens, losses = tokens.to(self.device), []
        targets = tokens[..., 1:].numel()
        with self.clock.part(PARTS[0]):
            for part in tokens:
                x, y = part[:, :-1].contiguous(), part[:, 1:].contiguous()
                with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                    loss = self.module(input_ids=x, labels=y, shift_labels=y, num_items_in_batch=targets, use_cache=False).loss
                loss.backward()
                losses.append(loss.detach())
        exact = [p.grad.double().square().sum() for p in self.module.parameters()] if self.is_first else []
        with self.clock.part("engine"):
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), OPTIMIZER.clip_norm)
            with self.clock.part(PARTS[2]):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        # the first norm is compared: on CPUs torch's own is too small by 1e-5 and more for large parameters
        norm = torch.stack(exact).sum().sqrt() if self.is_first else norm
        self.is_first = False
        return torch.stack(losses).sum(), norm


def build_peer(runtime: Runtime) -> torch.nn.Module:
    """LlamaForCausalLM in fp32 with the runtime's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = runtime.config.model
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling_factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_context,
        }
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=rope,
        attn_implementation="sdpa",
    )
    with runtime.device:
        module = LlamaForCausalLM(config).float()
    named = {}
    for parameter in runtime.chunks[0].parameters():
        for segment in parameter.shard.segments:
            layer, _, rest = segment.name.removeprefix("layers.").partition(".")
            name = f"model.layers.{layer}.{NAMES[rest]}" if rest else NAMES[segment.name]
            named[f"{name}.weight"] = parameter.detach()[segment.local.slices()].float()
    missing, unexpected = module.load_state_dict(named, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set()), (missing, unexpected)
    return module


class Limit:
    REPEATS = 8

    def __init__(self, arguments: argparse.Namespace, clock: Clock) -> None:
        rows, model = arguments.micro_batch_size * arguments.sequence_length, arguments.model
        options = {"dtype": DTYPES[arguments.dtype], "device": arguments.device}
        self.x = torch.randn(rows, model.hidden_size, **options)
        self.w = torch.randn(2 * model.ffn_hidden_size, model.hidden_size, **options)

    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.REPEATS):
            y = self.x @ self.w.t()
        return y[0, 0], y[0, 0]


CONTESTANTS = {"ours": Ours, "transformers": Peer, "torch.mm": Limit}


def memory_bytes(key: str) -> int:
    """VmRSS or VmHWM (the peak since the last reset) of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024


def receive(connection: Connection) -> Iterator[tuple[int, bool]]:
    """What the parent asks for, until it closes its end."""
    with suppress(EOFError):
        while True:
            yield connection.recv()


def serve(name: str, arguments: argparse.Namespace, connection: Connection) -> None:
    """A contestant's process: takes (step number, whether to time the parts), answers with what it measured."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    before, clock = memory_bytes("VmRSS"), Clock(device)
    contestant = CONTESTANTS[name](arguments, clock)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the set-up does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step, clock.on in receive(connection):
        generator = torch.Generator().manual_seed(step)
        shape = (arguments.micro_batches, arguments.micro_batch_size, arguments.sequence_length + 1)
        tokens = torch.randint(0, arguments.model.vocab_size, shape, generator=generator)
        if arguments.plant_error and name == "transformers":
            tokens[0, 0, 0] = (tokens[0, 0, 0] + 1) % arguments.model.vocab_size
        clock.seconds.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, norm = contestant.run(tokens)
        clock.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_bytes("VmHWM") - before
        connection.send((wall, cpu, loss.item(), norm.item(), peak, dict(clock.seconds)))


def compete(arguments: argparse.Namespace) -> dict[str, list[tuple]]:
    """Per contestant what each step measured: the first is for comparison, the last two are for the parts."""
    context, connections = multiprocessing.get_context("spawn"), {}
    for name in CONTESTANTS:
        connections[name], other = context.Pipe()
        context.Process(target=serve, args=(name, arguments, other), daemon=True).start()
        other.close()
    results: dict[str, list[tuple]] = {name: [] for name in CONTESTANTS}
    for step in range(1 + arguments.steps + 2):
        names = list(connections)
        for name in (*names[step % len(names) :], *names[: step % len(names)]):  # going first may be an advantage
            connection = connections[name]
            try:
                connection.send((step, step > arguments.steps))
                results[name].append(connection.recv())
            except (EOFError, OSError):
                sys.exit(f"error: the process of {name} ended; its message is above")
        if step == 0:
            check_first(results["ours"][0], results["transformers"][0], arguments.dtype)
    return results


def check_first(ours: tuple, peer: tuple, dtype: str) -> None:
    for index, (what, tolerance) in enumerate(zip(("loss", "gradient norm"), TOLERANCES[dtype], strict=True), start=2):
        difference = abs(ours[index] - peer[index]) / abs(peer[index])
        print(f"first {what:14s} ours {ours[index]:.7f}  transformers {peer[index]:.7f}  relative difference {difference:.1e}")
        if not difference <= tolerance:
            sys.exit(f"error: the first {what} of ours and the peer differ by more than {tolerance:.0e}: not the same training")


def report(results: dict[str, list[tuple]], arguments: argparse.Namespace) -> None:
    tokens = arguments.micro_batches * arguments.micro_batch_size * arguments.sequence_length
    flops = flops_per_token(arguments.model, arguments.sequence_length)
    timed = {name: rows[1 : 1 + arguments.steps] for name, rows in results.items()}
    model = arguments.model
    gemm = 2 * Limit.REPEATS * tokens / arguments.micro_batches * model.hidden_size * 2 * model.ffn_hidden_size
    cuda = arguments.device.startswith("cuda")
    seconds = 0 if cuda else 1  # wall, or of the CPU
    limit = gemm / median(row[seconds] for row in timed["torch.mm"])
    peak = dense_peak_flops(torch.cuda.get_device_name(arguments.device), arguments.dtype) if cuda else None
    print(f"\n{'':14s}   s/step  CPU s/step  tokens/s  tokens/CPU s  of torch.mm  peak MiB")
    for name in ("ours", "transformers"):
        wall, cpu = (median(row[i] for row in timed[name]) for i in (0, 1))
        share = f"{tokens * flops / (wall, cpu)[seconds] / limit:.0%}"
        memory = max(row[4] for row in timed[name]) / 2**20
        print(f"{name:14s}{wall:9.3f}{cpu:12.3f}{tokens / wall:10.0f}{tokens / cpu:14.0f}{share:>13s}{memory:10.0f}")
        mfu = model_flops_utilization(tokens / wall, flops, 1, peak)
        if mfu is not None:
            print(f"{'':14s}MFU {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s dense, attention's causal half counted")
    for index, what in ((0, "tokens/s"), (1, "tokens per CPU second")):
        ratios = [b[index] / a[index] for a, b in zip(timed["ours"], timed["transformers"], strict=True)]
        print(f"ratio ours / transformers, {what}: {median(ratios):.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})")
    unit = "second" if cuda else "CPU second"
    print(f"torch.mm: {limit / 1e9:.1f} GFLOP per {unit}; a token: {flops / 1e9:.3f} GFLOP, attention's causal half counted")
    print(f"\nparts of a step, seconds (two further steps){'':5s}{'ours':>8s}{'transformers':>14s}")
    rows = {name: parts_of(results[name][1 + arguments.steps :]) for name in ("ours", "transformers")}
    for part in (*PARTS, "all else"):
        print(f"  {part:46s}{rows['ours'][part]:9.3f}{rows['transformers'][part]:14.3f}")


def parts_of(steps: list[tuple]) -> dict[str, float]:
    seconds = {name: median(row[5][name] for row in steps) for name in (PARTS[0], "engine", PARTS[2])}
    seconds[PARTS[1]] = seconds["engine"] - seconds[PARTS[2]]
    seconds["all else"] = median(row[0] for row in steps) - seconds[PARTS[0]] - seconds["engine"]
    return seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-20m", choices=preset_names(), metavar="NAME", help="(%(default)s)")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="instead of the preset's")
    for name, default in (("sequence-length", 512), ("micro-batch-size", 1), ("micro-batches", 4), ("steps", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="(%(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="(%(default)s)")
    parser.add_argument("--plant-error", action="store_true", help="change one token of the peer's: the comparison must fail")
    arguments = parser.parse_args()
    given = {name: value for name in SIZES if (value := getattr(arguments, name)) is not None}
    arguments.model = ModelConfig(**preset_layer(arguments.preset, "--preset")["model"] | given)
    return arguments


def describe(arguments: argparse.Namespace) -> None:
    import transformers

    cuda = arguments.device.startswith("cuda")
    device = torch.cuda.get_device_name(arguments.device) if cuda else f"{platform.machine()} CPU, {arguments.threads} threads"
    print(f"command    {shlex.join(['python', *sys.argv])}")
    print(f"hardware   {device}")
    print(f"versions   Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"model      {parameter_count(arguments.model):,} parameters; {arguments.dtype}")


if __name__ == "__main__":
    given = parse_arguments()
    describe(given)
    report(compete(given), given)
