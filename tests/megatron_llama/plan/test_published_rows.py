"""The planner against published measurements: the errors that docs/planning.md states, by source and in all."""

from dataclasses import replace

import pytest

from megatron_llama.plan import evaluation, rows
from megatron_llama.plan.evaluation import summary
from megatron_llama.plan.shape import token_flops
from parallel.errors import DataError
from tools.evaluate_planner import report_lines

CORE_MEDIAN, CORE_P90 = 0.07, 0.17
MEMORY_MEDIAN = 0.03
REGRET_MEDIAN = 0.02
TRAITS = 3  # of a software stack, the attention kernel among them


@pytest.fixture(scope="module")
def predicted():
    return [evaluation.predict_row(row) for row in rows.read_rows() if rows.usable(row) and row["precision"] == "bf16"]


def test_core_rows(predicted):
    print("\n".join(report_lines(predicted, [])))
    core = summary(one.error for one in predicted if rows.core(one.row))
    assert core.rows >= 200
    assert core.median <= CORE_MEDIAN
    assert core.p90 <= CORE_P90


def test_without_traits_the_error_grows_by_little(predicted):
    neutral = summary(evaluation.predict_row(one.row, traits=False).error for one in predicted if rows.core(one.row))
    assert neutral.median <= 0.09


def test_no_source_has_constants_of_its_own():
    """What a row's software contributes is one of few combinations of three flags, and many sources share each."""
    assert len(vars(rows.NEUTRAL)) == TRAITS
    assert len(set(rows.STACKS.values())) <= 5


def test_layouts_chosen_in_sweeps(predicted):
    regrets = sorted(evaluation.layout_regrets(predicted).values())
    assert len(regrets) >= 3
    assert regrets[len(regrets) // 2] <= REGRET_MEDIAN


def test_allocated_memory():
    errors = evaluation.memory_errors(rows.read_rows())
    allocated = summary(error for (_, field), values in errors.items() if field == evaluation.ALLOCATED for error in values)
    assert allocated.rows >= 25
    assert allocated.median <= MEMORY_MEDIAN
    assert allocated.p90 <= 2 * MEMORY_MEDIAN


def test_flops_agree_with_those_that_the_file_states():
    """tok_s_gpu x model FLOPs is a figure of the file, made by other code."""
    for row in rows.read_rows():
        shape = rows.job_of(row).shape
        for attention, name in (("causal", "model_tflops_causal"), ("full", "model_tflops_full_attn")):
            tflops = row["tok_s_gpu"] * token_flops(shape, attention) / 1e12
            assert tflops == pytest.approx(row[name], rel=0.01, abs=0.06), row["id"]  # 4 layers of 405B: another vocabulary


def test_one_run_removes_what_all_rows_of_a_source_share(predicted):
    slow = [replace(one, tokens_per_second_per_gpu=1.3 * one.row["tok_s_gpu"]) for one in predicted[:5]]
    assert evaluation.one_run_median(slow) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_sources_held_out():
    measured = [row for row in rows.read_rows() if rows.usable(row) and row["precision"] == "bf16"]
    core = summary(one.error for one in evaluation.held_out(measured) if rows.core(one.row))
    assert core.median <= 0.09


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gpu": "V100"}, "V100"),
        ({"recompute": "sac:x"}, "broken"),
        ({"schedule": "zigzag"}, "zigzag"),
        ({"layers": None}, "broken"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(change, named):
    row = {**rows.read_rows()[0], "id": "broken", **change}
    with pytest.raises(DataError, match=named):
        evaluation.predict_row(row)


def test_a_file_without_rows(tmp_path):
    (tmp_path / "rows.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="no list of rows"):
        rows.read_rows(tmp_path / "rows.json")
