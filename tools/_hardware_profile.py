"""From measurements to a hardware profile: efficiencies fitted to the planner's own formulas, as TOML with their sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
from _hardware_rank import HardwareMeasured, Message, Product

from megatron_llama.plan import kernels, step_time
from megatron_llama.plan.configured import FUSED_ATTENTION
from megatron_llama.plan.hardware import GIB, GIGA, TERA, Efficiency, Hardware
from megatron_llama.plan.kernels import product_seconds

DEPTHS = (0.0, *np.geomspace(4, 4096, 81).tolist())  # that the fit tries
RINGS = ("all_gather", "reduce_scatter")  # what the planner's formulas count by
ELEMENTWISE = "partial"  # how it takes this program's element-wise kernels
COMMENT = 34  # column
LEAST_SLOPE = 0.05  # of the largest message's time that its bytes take, for a slope to be believed


@dataclass(frozen=True)
class Line:
    """Bytes per second of a rank, and seconds of an empty message, fitted to messages of several sizes."""

    bytes_per_second: float
    latency_seconds: float


def fit_line(messages: Sequence[Message]) -> Line:
    """Least squares of relative errors: seconds = latency + bytes / rate."""
    sizes, seconds = (np.array([getattr(one, name) for one in messages]) for name in ("sent_bytes", "seconds"))
    (latency, per_byte), *_ = np.linalg.lstsq(np.stack([1 / seconds, sizes / seconds], 1), np.ones(len(sizes)), rcond=None)
    if per_byte * sizes[-1] < LEAST_SLOPE * seconds[-1]:  # noise alone: the largest message counts
        return Line(float(sizes[-1] / seconds[-1]), float(seconds.min()))
    return Line(float(1 / per_byte), max(0.0, float(latency)))


def ring_rate(messages: Sequence[Message]) -> Line:
    """The geometric mean of the collectives that steps are made of."""
    lines = [fit_line([one for one in messages if one.kind == kind]) for kind in RINGS]
    return Line(math.exp(fmean(math.log(one.bytes_per_second) for one in lines)), fmean(one.latency_seconds for one in lines))


def fit_products(products: Sequence[Product], hardware: Hardware) -> Efficiency:
    """`product` and `product_depth` with the least squared logarithms of predicted over measured seconds.

    For each depth the best `product` is a mean, since seconds are inversely proportional to it.
    """
    best, least = hardware.efficiency, math.inf
    for depth in DEPTHS:
        trial = replace(hardware, efficiency=replace(hardware.efficiency, product=1.0, product_depth=depth))
        errors = [math.log(_predicted(trial, one) / one.seconds) for one in products]
        centre = fmean(errors)
        cost = sum((error - centre) ** 2 for error in errors)
        if cost < least:
            best, least = replace(trial.efficiency, product=math.exp(centre)), cost
    return best


def _predicted(hardware: Hardware, one: Product) -> float:
    return product_seconds(hardware, one.m, one.n, one.k, output_bytes=one.output_bytes)


def product_errors(products: Sequence[Product], hardware: Hardware) -> list[float]:
    """Predicted over measured seconds less 1, of each product."""
    return [_predicted(hardware, one) / one.seconds - 1 for one in products]


def attention_shares(measured: HardwareMeasured, peak: float) -> tuple[float, float]:
    """Medians of what the planner's formula would need to give the measured seconds, forward and backward."""
    unit = {"unit": (1.0, 1.0)}
    forward, backward = [], []
    for one in measured.attention:
        ideal = _plain(peak, unit)
        sizes = one.samples, one.positions, one.positions, one.heads, one.head_dim
        expected = kernels.attention_seconds(ideal, "unit", *sizes)
        forward.append(expected[0] / one.forward)
        backward.append(expected[1] / one.backward)
    return median(forward), median(backward)


def _plain(peak: float, attention: dict[str, tuple[float, float]]) -> Hardware:
    """A device of that peak that reaches all of everything."""
    efficiency = Efficiency(product=1.0, product_depth=0.0, attention=1.0, memory=1.0, link=1.0, network=1.0)
    return Hardware("ideal", 1.0, peak, 0.0, 1.0, 1, 1.0, 1.0, 1, 1.0, attention, efficiency)


def passes_share(measured: HardwareMeasured) -> float:
    """Of the copy's bandwidth, what element-wise kernels reach by the bytes that the planner counts for a block."""
    factor = step_time.TRAFFIC[ELEMENTWISE][True] * (1 + step_time.BACKWARD_TRAFFIC) * step_time.BF16
    shares = []
    for one in measured.passes:
        numbers = 10 * one.hidden + 2 * 3 * one.hidden + 3 * one.ffn
        shares.append(one.tokens * numbers * factor / measured.copy_bytes_per_second / one.seconds)
    return median(shares)


# ---- the file -----------------------------------------------------------------------------------------------------------


def profile_text(measured: HardwareMeasured, base: Hardware | None, base_name: str | None, watts: float | None) -> str:
    """The profile as TOML, each figure with where it comes from."""
    where = f"{measured.ranks} x {measured.device}"
    if measured.device_type == "cpu":
        where += f", {measured.threads} threads each"
    lines = [
        f"# Measured by tools/profile_throughput.py on {where}, in {measured.dtype}: for runs in {measured.dtype}"
        f"{', with as many ranks per node and threads' if measured.device_type == 'cpu' else ''}.",
    ]
    sheet, efficiency = _sheet_lines(measured, base, watts), _efficiency_lines(measured, base)
    if base_name is not None:
        lines += [f'based_on = "{base_name}"', "# what is not given here is that profile's"]
    forward, backward = attention_shares(measured, base.bf16_flops if base else measured.best_flops)
    kernel = f"measured: {measured.attention_kernel}; the planner takes this row for this program"
    lines += [*sheet, "", "[attention]", _entry(FUSED_ATTENTION, f"[{forward:.4f}, {backward:.4f}]", kernel)]
    return "\n".join([*lines, "", "[efficiency]", *efficiency]) + "\n"


def _entry(key: str, value: float | str, source: str) -> str:
    text = value if isinstance(value, str) else f"{value:.4g}"
    return f"{key} = {text}".ljust(COMMENT) + f"# {source}"


def _sheet_lines(measured: HardwareMeasured, base: Hardware | None, watts: float | None) -> list[str]:
    lines = []
    if base is None:
        unit = f"measured: {measured.dtype}, the fastest product; taken for the peak"
        memory, waves = ("of the device",) * 2 if _on_gpu(measured) else ("main memory / ranks", "a CPU has no waves of tiles")
        lines += [
            _entry("memory_gib", measured.memory_bytes / GIB, memory),
            _entry("bf16_tflops", measured.best_flops / TERA, unit),
            _entry("float8_tflops", "0", "not measured"),
            _entry("memory_tb_per_second", measured.copy_bytes_per_second / TERA, "measured: copy and sum"),
            _entry("multiprocessors", str(measured.multiprocessors), waves),
            *_link_lines(measured),
        ]
    lines.append(_entry("gpus_per_node", str(measured.ranks_per_node), "ranks of this job on a node"))
    if watts or base is None:
        lines.append(_entry("watts", watts or 0.0, "given" if watts else "not known: energy is 0; give --watts"))
    return lines


def _on_gpu(measured: HardwareMeasured) -> bool:
    return measured.device_type == "cuda"


def _link_lines(measured: HardwareMeasured) -> list[str]:
    """Without a data sheet the measured rates themselves; where nobody was there to send to, those of the faster medium."""
    link, network = measured.copy_bytes_per_second, None
    source = "not measured, one rank: memory's"
    if measured.inside:
        link, source = ring_rate(measured.inside).bytes_per_second, _ring_source(measured.inside)
    if measured.across:
        network, network_source = ring_rate(measured.across).bytes_per_second, _ring_source(measured.across)
    else:
        network, network_source = link, "not measured, one node: the link's"
    return [
        _entry("link_gb_per_second", link / GIGA, source),
        _entry("network_gb_per_second", network / GIGA, network_source),
    ]


def _ring_source(messages: Sequence[Message]) -> str:
    latency = 1e6 * ring_rate(messages).latency_seconds
    return f"measured: all-gather and reduce-scatter; latency {latency:.0f} us"


def _efficiency_lines(measured: HardwareMeasured, base: Hardware | None) -> list[str]:
    hardware = fitted(measured, base)
    values = hardware.efficiency
    errors = [abs(error) for error in product_errors(measured.products, hardware)]
    fit = f"fitted to {len(errors)} products: {median(errors):.0%} off in the median, {max(errors):.0%} at most"
    lines = [
        _entry("product", values.product, fit),
        _entry("product_depth", values.product_depth, "the same fit"),
        _entry("attention", 1.0, "in the shares above"),
        _entry("memory", values.memory, _memory_source(measured)),
        _entry("launch_seconds", values.launch_seconds, "measured: a small kernel under autograd"),
    ]
    for name, messages in (("link", measured.inside), ("network", measured.across)):
        if base is None:
            lines.append(_entry(name, 1.0, "the rate above is what is reached"))
        elif messages:
            lines.append(_entry(name, getattr(values, name), f"{_ring_source(messages)}; of the data sheet"))
    if measured.inside:
        latency = "measured: of an all-gather or reduce-scatter of nothing, inside a node"
        lines.append(_entry("latency_seconds", values.latency_seconds, latency))
    if base is None:
        lines += [
            _entry("contention", values.contention, "not measured: a general value"),
            _entry("jitter", values.jitter, "not measured: a general value"),
        ]
    return lines


def _memory_source(measured: HardwareMeasured) -> str:
    if _on_gpu(measured):
        return f"measured: copy and sum; element-wise kernels as the planner counts them: {passes_share(measured):.2f} of that"
    return f"measured: element-wise kernels in {measured.dtype}, as the planner counts them in 16 bits"


def fitted(measured: HardwareMeasured, base: Hardware | None) -> Hardware:
    """The hardware that the file describes."""
    copy = measured.copy_bytes_per_second
    hardware = base or replace(
        _plain(measured.best_flops, {}),
        memory_bytes_per_second=copy,
        multiprocessors=measured.multiprocessors,
        efficiency=Efficiency(link=1.0, network=1.0),
    )
    memory = copy / hardware.memory_bytes_per_second if _on_gpu(measured) else passes_share(measured)
    values = replace(hardware.efficiency, attention=1.0, memory=memory, launch_seconds=measured.launch_seconds)
    if measured.inside:
        values = replace(values, latency_seconds=ring_rate(measured.inside).latency_seconds)
    if base is not None and measured.inside:
        values = replace(values, link=ring_rate(measured.inside).bytes_per_second / base.link_bytes_per_second)
    if base is not None and measured.across:
        values = replace(values, network=ring_rate(measured.across).bytes_per_second / base.network_bytes_per_second)
    hardware = replace(hardware, efficiency=values)
    return replace(hardware, efficiency=fit_products(measured.products, hardware))


def fitted_lines(measured: HardwareMeasured, found: Hardware) -> list[str]:
    """How well the profile describes what it was made from."""
    errors = [abs(error) for error in product_errors(measured.products, found)]
    lines = [
        f"products  {len(errors)}, the fastest {measured.best_flops / TERA:.3g} TFLOP/s in {measured.dtype}; predicted by the "
        f"profile {median(errors):.1%} off in the median, {max(errors):.1%} at most",
        f"attention {measured.attention_kernel}, forward + backward: {_attention_text(measured)}",
        f"memory    {measured.copy_bytes_per_second / GIGA:,.1f} GB/s copied; kernels start in "
        f"{1e6 * measured.launch_seconds:.1f} us",
    ]
    for where, messages in (("inside a node", measured.inside), ("between nodes", measured.across)):
        for kind in dict.fromkeys(one.kind for one in messages):
            line = fit_line([one for one in messages if one.kind == kind])
            rate, latency = line.bytes_per_second / GIGA, 1e6 * line.latency_seconds
            lines.append(f"{where} {kind:14s} {rate:8.3g} GB/s sent, latency {latency:,.0f} us")
    return lines


def _attention_text(measured: HardwareMeasured) -> str:
    times = [(one.positions, 1e3 * one.forward, 1e3 * one.backward) for one in measured.attention]
    return ", ".join(f"{positions} positions {forward:.3g} + {backward:.3g} ms" for positions, forward, backward in times)
