"""Float8 linears against torchao's, which are another implementation of the same recipes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.kernels.float8_kernels import E4M3, E5M2, float8_kernels, float8_missing, quantize
from parallel.kernels.table import resolve_kernels

RECIPES = {"tensorwise": "tensorwise", "rowwise": "rowwise_with_gw_hp"}  # ours, torchao's
TOKENS, INPUTS, OUTPUTS = (8, 4), 64, 48
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def scaled_by_row_on_a_cpu() -> bool:
    """Whether this torch can do on a CPU what GPUs do: 2.11 cannot."""
    ones = torch.ones(16, 16).to(E4M3)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=torch.ones(16, 1), scale_b=torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needs_rows = pytest.mark.skipif(not scaled_by_row_on_a_cpu(), reason="this torch has no products scaled by row on CPUs")
recipes = pytest.mark.parametrize("recipe", ["tensorwise", pytest.param("rowwise", marks=needs_rows)])


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x [8, 4, i], W [o, i], dy [8, 4, o], with rows of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 2, TOKENS[0])[:, None, None]
    x = torch.randn(*TOKENS, INPUTS, generator=generator) * sizes
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.02
    dy = torch.randn(*TOKENS, OUTPUTS, generator=generator) * sizes.flip(0) * 1e-4
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def ours(recipe: str, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kernels = float8_kernels(resolve_kernels(), recipe)
    dweight = torch.zeros(OUTPUTS, INPUTS, device=x.device)
    for _ in range(2):  # it adds
        kernels.wgrad(dweight, x.flatten(0, -2), dy.flatten(0, -2))
    return kernels.fprop(x, weight), kernels.dgrad(dy, weight), dweight / 2


@needs_torchao
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("by_row", "power_of_two"), [(False, False), (False, True), (True, True)])
def test_numbers_and_scales_are_torchao_s(dtype: torch.dtype, by_row: bool, power_of_two: bool) -> None:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    for x in (*operands(), torch.zeros(16, 32, dtype=torch.bfloat16)):
        rows = x.flatten(0, -2)
        granularity = ScalingGranularity.AXISWISE if by_row else ScalingGranularity.TENSORWISE
        factor = tensor_to_scale(
            rows,
            dtype,
            scaling_granularity=granularity,
            axiswise_dim=-1 if by_row else None,
            round_scales_to_power_of_2=power_of_two,
        )
        made = quantize(rows, dtype, by_row, power_of_two)
        assert torch.equal(made.scale, factor.reciprocal())
        assert torch.equal(made.values.view(torch.uint8), to_fp8_saturated(rows.float() * factor, dtype).view(torch.uint8))


@needs_torchao
@recipes
def test_the_three_products_are_those_of_torchao_s_linear(recipe: str) -> None:
    """Both round the same float8 operands; torchao multiplies what they stand for in bf16, so outputs are rounded otherwise."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    x, weight, dy = operands()
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    settings = replace(Float8LinearConfig.from_recipe_name(RECIPES[recipe]), emulate=True)
    theirs = Float8Linear.from_float(linear, config=settings)
    x = x.requires_grad_()
    y = theirs(x)
    y.backward(dy)
    for mine, right in zip(ours(recipe, x.detach(), weight, dy), (y, x.grad, theirs.weight.grad), strict=True):
        assert relative(mine, right) < 6e-3  # bf16: half a unit in the last place is 4e-3


@recipes
def test_products_are_near_those_in_fp32(recipe: str) -> None:
    """Three bits of mantissa in e4m3, two in e5m2: errors of random signs of a few percent; a wrong scale is far off."""
    x, weight, dy = operands()
    y, dx, dw = (
        x.float() @ weight.float().t(),
        dy.float() @ weight.float(),
        dy.float().flatten(0, 1).t() @ x.float().flatten(0, 1),
    )
    made = ours(recipe, x, weight, dy)
    limits = (0.06, 0.1, 0.2) if recipe == "tensorwise" else (0.06, 0.06, 1e-6)
    assert all(relative(mine, right) < limit for mine, right, limit in zip(made, (y, dx, dw), limits, strict=True))
    assert made[0].dtype == made[1].dtype == torch.bfloat16 and made[2].dtype == torch.float32


@needs_rows
def test_small_rows_keep_their_precision_with_scales_of_their_own() -> None:
    x, weight, _ = operands()
    right = x[0].float() @ weight.float().t()  # the smallest tokens, 1e-5 of the largest
    errors = {recipe: relative(float8_kernels(resolve_kernels(), recipe).fprop(x, weight)[0], right) for recipe in RECIPES}
    assert errors["rowwise"] < 0.06 and errors["tensorwise"] > 0.2, errors


def test_a_value_that_is_not_finite_stays_visible() -> None:
    """So that the step is skipped."""
    x, weight, _ = operands()
    for bad in (float("inf"), float("nan")):
        spoilt = x.clone()
        spoilt[0, 0, 0] = bad
        assert not torch.isfinite(float8_kernels(resolve_kernels(), "tensorwise").fprop(spoilt, weight)).all()


def test_without_a_recipe_nothing_changes() -> None:
    kernels = resolve_kernels()
    assert float8_kernels(kernels, "none") is kernels
    assert "linear float8 rowwise" in str(float8_kernels(kernels, "rowwise"))


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 8.9" in float8_missing(torch.device("cpu"))
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (float8_missing(torch.device("cuda")) is None) == fits


@pytest.mark.gpu
@pytest.mark.skipif(
    float8_missing(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None, reason="no float8"
)
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_gpu_makes_the_same_numbers(recipe: str) -> None:
    """Not run yet: there was no GPU at hand."""
    on_gpu = ours(recipe, *(x.cuda() for x in operands()))
    for mine, right in zip(on_gpu, ours(recipe, *operands()), strict=True):
        assert relative(mine.cpu(), right) < 6e-3


@pytest.mark.slow
def test_compiled_quantisation_makes_the_same_bits() -> None:
    for by_row in (False, True):
        x = operands()[0].flatten(0, -2)
        compiled, eager = (f(x, E4M3, by_row, by_row) for f in (torch.compile(quantize, dynamic=False), quantize))
        assert torch.equal(compiled.scale, eager.scale)
        assert torch.equal(compiled.values.view(torch.uint8), eager.values.view(torch.uint8))
