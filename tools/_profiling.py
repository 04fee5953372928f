"""Where the time of a step goes: torch's profiler, its operations sorted into kinds, and a picture of them."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from _teams import Contestant
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# Names of CUDA kernels and of torch's operations on a CPU; the first row that matches decides.
KINDS = (
    ("attention", r"flash|fmha|sdpa|attention", "#cf6a37"),
    ("optimizer", r"adam|sgd|multi_tensor|foreach", "#7a5aa6"),
    ("head and loss", r"cross_entropy|softmax|nll_loss|vocabulary|head_loss", "#4e8f4a"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|::(mm|bmm|addmm_?|matmul|_scaled_mm)$", "#24517f"),
    ("communication", r"nccl|gloo|c10d|all_gather|reduce_scatter|all_reduce", "#b03a5b"),
    ("copies and fills", r"^(?!triton).*(memcpy|memset|copy|fill|zero_|::cat$|catarray|::to$)", "#8c8c8c"),
    ("element-wise and sums", r"norm|rope|rotary|silu|swiglu|triton|elementwise|reduce_kernel|::(mul|add|sum|mean)", "#eda03f"),
)
OTHER, IDLE = "other", "idle"
COLOURS = {name: colour for name, _, colour in KINDS} | {OTHER: "#c9c9c9", IDLE: "#f0f0f0"}


def kind_of(name: str) -> str:
    """The kind of a kernel or operation by its name."""
    return next((kind for kind, pattern, _ in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


class Profiled:
    """A contestant one of whose steps is profiled: PATH.trace.json.gz (open it in Perfetto) and PATH.json, seconds by kind."""

    NUMBER = -1  # of that step

    def __init__(self, contestant: Contestant, path: Path, device: str) -> None:
        self.contestant, self.path, self.on_gpu = contestant, path, device.startswith("cuda")

    def run(self, number: int) -> tuple[float, float]:
        if number != self.NUMBER:
            return self.contestant.run(number)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        with profile(activities=activities) as profiler:
            start = time.perf_counter()
            result = self.contestant.run(0)
            wall = time.perf_counter() - start
        profiler.export_chrome_trace(f"{self.path}.trace.json.gz")
        seconds = seconds_by_kind(profiler.events(), self.on_gpu)
        if self.on_gpu:  # all kernels on one stream: what is left of the step, none of them ran
            seconds[IDLE] = max(0.0, wall - sum(seconds.values()))
        Path(f"{self.path}.json").write_text(json.dumps(seconds, indent=1))
        return result


def seconds_by_kind(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Of the kernels on a GPU; else the operations' own times on the CPU."""
    seconds: Counter = Counter()
    for event in events:
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[kind_of(event.name)] += event.self_device_time_total / 1e6
        elif not on_gpu:
            seconds[kind_of(event.name)] += event.self_cpu_time_total / 1e6
    return {kind: seconds[kind] for kind in COLOURS if kind in seconds}


def draw(contestants: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """One bar per contestant, its kinds in a fixed order."""
    figure = Figure(figsize=(10, 1.6 + 0.55 * len(contestants)), layout="constrained")
    axes = figure.add_subplot()
    left = dict.fromkeys(contestants, 0.0)
    for kind, colour in COLOURS.items():
        widths = {name: seconds.get(kind, 0.0) for name, seconds in contestants.items()}
        if any(widths.values()):
            axes.barh(list(widths), list(widths.values()), left=list(left.values()), color=colour, label=kind, height=0.7)
        left = {name: left[name] + width for name, width in widths.items()}
    axes.invert_yaxis()
    axes.set_xlabel("seconds of one step")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
