"""The timelines that tools/draw_schedule.py draws: predicted and measured, as text and as pictures."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from parallel.errors import DataError
from parallel.groups import build_groups
from parallel.pipeline.choice import candidates
from parallel.pipeline.costs import Costs
from parallel.pipeline.draw import colour, save_picture
from parallel.pipeline.layout import Placement
from parallel.pipeline.schedules import SCHEDULES, Action, ScheduleKind
from parallel.pipeline.timeline import compare, predict, read_trace, text_lines
from parallel.pipeline.trace import Trace
from parallel.topology import Topology
from tests.parallel.building import CPU
from tests.ranks import run_ranks
from tests.tools.test_data_tools import ROOT, run

UNEVEN = Costs(forward=1.0, backward=2.0, input_backward=1.5, weight_backward=0.5, send=0.25)


def draw(*arguments):
    return run("draw_schedule", *arguments)


def timeline(name, pp=4, micro_batches=8, costs=UNEVEN):
    return predict(SCHEDULES[name], pp, SCHEDULES[name].min_chunks, micro_batches, costs)


def test_1f1b_as_text_exactly():
    """As the paper draws it, a backward pass taking two forward passes."""
    assert text_lines(timeline("1f1b", 3, 4, Costs()), 64) == [
        "1f1b: pp 3, micro-batches 4; time 18, bubble 33.3%, peak activations 3",
        "rank 0 F0-F1-F2-............B0----F3-B1----...B2----...B3----",
        "rank 1 ...F0-F1-......B0----F2-B1----F3-B2----...B3----......",
        "rank 2 ......F0-B0----F1-B1----F2-B2----F3-B3----............",
    ]


def test_split_backward_passes_and_odd_chunks_in_small_letters():
    assert text_lines(timeline("zb-v", 2, 3, Costs()), 40) == [
        "zb-v: pp 2, chunks 2, micro-batches 3; time 9.5, bubble 5.3%, peak activations 2",
        "rank 0 FFFfiwfiwIWfiIwIWW.",
        "rank 1 .FfFfiwFIWfiIiIwWwW",
    ]


@pytest.mark.parametrize("width", [10, 100, 1000])
def test_text_is_as_wide_as_asked_unless_actions_would_vanish(width):
    for row in text_lines(timeline("zb-h1"), width)[1:]:
        assert row.count("F") == row.count("I") == row.count("W") == 8
        assert width == 10 or 0.6 * width < len(row) <= width


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_prediction_has_the_checkers_figures(name):
    """Costs and memory are those of a rank, whatever its chunks; waits fill what no action does."""
    drawn, kind = timeline(name), SCHEDULES[name]
    assert sum(bar.end - bar.start for row in drawn.rows for bar in row if bar.kind != "wait") == pytest.approx(4 * 8 * 3.0)
    found = candidates(4, 8, [kind.min_chunks], lambda placement: _split_over(placement.chunks))
    report = next(one.report for one in found if one.kind is kind)
    assert (drawn.makespan, drawn.bubble) == pytest.approx((report.makespan_seconds, report.bubble))
    assert drawn.peaks == pytest.approx(report.peak_memory)
    for row in drawn.rows:
        assert [bar.start for bar in row] == pytest.approx([0.0] + [bar.end for bar in row[:-1]])


def _split_over(chunks):
    return Costs(1.0 / chunks, 2.0 / chunks, 1.5 / chunks, 0.5 / chunks, 0.25, 1 / chunks, 1 / chunks)


def test_compare_has_every_schedule_that_fits_and_the_fastest_first():
    assert {drawn.name for drawn in compare(4, 2, 8, Costs())} == set(SCHEDULES)
    assert {drawn.name for drawn in compare(4, 2, 7, Costs())} == set(SCHEDULES) - {"dualpipe-v"}
    drawn = compare(4, 3, 8, Costs())
    chunks = {one.name: one.chunks for one in drawn}
    assert chunks == {"gpipe": 1, "1f1b": 1, "zb-h1": 1, "zb-h2": 1, "interleaved": 3}
    assert [one.makespan for one in drawn] == sorted(one.makespan for one in drawn)


def test_compare_says_what_does_not_fit():
    code, output, errors = draw("--compare", "--pp", 2, "--micro-batches", 3)
    titles = [line.split(":")[0] for line in output.splitlines() if "bubble" in line]
    assert (code, errors, set(titles)) == (0, "", set(SCHEDULES) - {"dualpipe-v"})
    assert output.endswith("not for these sizes: dualpipe-v\n")


def write_trace(path, rows):
    """The file that a run writes, for given bars: one rank per stage."""
    events = []
    for rank, row in enumerate(rows):
        for kind, micro_batch, chunk, start, end in row:
            place = {"micro_batch": micro_batch, "chunk": chunk, "pp_rank": rank}
            times = {"ts": start * 1e6, "dur": (end - start) * 1e6}
            events.append({"ph": "X", "name": kind, "cat": kind, "pid": 0, "tid": rank, "args": place} | times)
    path.write_text(json.dumps({"traceEvents": events}))


@pytest.mark.parametrize("name", ["1f1b", "v-half"])
def test_a_trace_draws_as_the_prediction_that_it_fulfils(name, tmp_path):
    predicted = timeline(name)
    write_trace(tmp_path / "step_2.json", predicted.rows)
    measured = read_trace(tmp_path / "step_2.json")
    assert (measured.name, measured.time) == ("step_2", f"{predicted.makespan * 1e3:.4g} ms")
    assert (measured.bubble, measured.peaks) == (pytest.approx(predicted.bubble), predicted.peaks)
    assert text_lines(measured, 120)[1:] == text_lines(predicted, 120)[1:]


def trace_two_actions(rank, world_size, path):
    groups = build_groups(Topology(pp=2, dp=2), rank)
    trace = Trace(groups, Placement(2), CPU)
    for kind in ("wait", "F"):
        with trace.span(kind, Action("F", rank)):
            pass
    trace.write(path)


def test_the_trace_of_real_ranks_shows_the_first_rank_of_each_stage(tmp_path):
    path = tmp_path / "step_3.json"
    run_ranks(4, trace_two_actions, path)
    rows = [[(bar.kind, bar.micro_batch) for bar in row] for row in read_trace(path).rows]
    assert rows == [[("wait", 0), ("F", 0)], [("wait", 2), ("F", 2)]]
    code, output, errors = draw("--trace", path)
    assert (code, errors) == (0, "") and output.startswith("step_3: pp 2, micro-batches 3; time ")


def test_pictures_show_every_action_in_its_colour(tmp_path):
    drawn = timeline("zb-v", 2, 3, Costs())
    save_picture([drawn], tmp_path / "zb-v.png")
    pixels = np.asarray(Image.open(tmp_path / "zb-v.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 1500 and (tmp_path / "zb-v.png").stat().st_size < 50_000
    shares = {}
    for kind in "FIW":
        for chunk in (0, 1):
            wanted = np.array(colour(kind, chunk, 2)) * 255
            shares[kind, chunk] = (np.abs(pixels - wanted).max(axis=2) < 6).sum()
    assert min(shares.values()) > 0.75 * max(shares.values()) > 0  # each has 6 equal bars; numbers cover a part


def test_svg_has_the_numbers_as_text_and_is_the_same_every_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_picture([timeline("1f1b"), timeline("zb-h1")], tmp_path / name)
    texts = [element.text for element in ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"1f1b", "zb-h1", "rank 3", "weight gradient"} <= set(texts) and texts.count("7") >= 4 * (2 + 3)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_kinds_differ_in_grey():
    """A copy without colours still tells them apart, and chunks too: each is lighter than the one before."""
    red_green_blue = (0.299, 0.587, 0.114)
    steps = [np.dot(colour(kind, chunk, 2), red_green_blue) for kind in "FBIW" for chunk in (0, 1)]
    steps.append(np.dot(colour("wait", 0, 1), red_green_blue))
    assert all(lighter - darker > 0.03 for darker, lighter in zip(steps, steps[1:], strict=False))


def test_tool_writes_what_it_drew(tmp_path):
    path = tmp_path / "all.png"
    code, output, errors = draw("--compare", "--pp", 2, "--micro-batches", 4, "--costs", "F=1,I=1.5,W=0.5", "--output", path)
    assert (code, errors) == (0, "") and f"picture      {path}\n" in output
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "gpipe        pp 2, micro-batches 4; time 15, bubble 20.0%, peak activations 4\n" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpipe", "--chunks", 2], "error: parallel.schedule = gpipe cannot have parallel.chunks = 2: set --parallel.ch"),
        (["dualpipe-v", "--micro-batches", 7], "error: parallel.schedule = dualpipe-v with parallel.pp = 4 needs 8 micro-"),
        (["1f1b", "--output", "x.txt"], "error: x.txt: cannot write the picture: Format 'txt' is not supported"),
        (["1f1b", "--output", "absent/x.png"], "error: absent/x.png: cannot write the picture"),
        (["--trace", "absent.json"], "error: absent.json: cannot read the trace: No such file or directory"),
        (["--trace", "setup.py"], "error: setup.py: is not a trace as log.trace_steps makes them"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    code, output, errors = draw(*arguments)
    assert (code, output, errors.count("\n")) == (2, "", 1) and errors.startswith(message)


@pytest.mark.parametrize("content", ["[]", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": []}'])
def test_json_that_is_no_trace(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DataError, match=f"^{tmp_path / 't.json'}: "):
        read_trace(tmp_path / "t.json")


@pytest.mark.parametrize("arguments", [[], ["1f1b", "--compare"], ["2f2b"], ["1f1b", "--costs", "F=0"], ["1f1b", "--pp", 0]])
def test_wrong_usage(arguments):
    code, output, errors = draw(*arguments)
    assert (code, output) == (2, "") and "draw_schedule.py: error: " in errors


TEXT = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 6), (4, 11), (8, 16)])
def test_closed_forms_of_the_docs(p, m):
    """The table of docs/pipeline.md: time beyond the work itself, and peak activations."""
    v_min = (4 * p - 3 if p % 3 == 0 else 4 * p - 5) / 2
    beyond = {"gpipe": 3 * (p - 1), "1f1b": 3 * (p - 1), "interleaved": 3 * (p - 1) / 2, "zb-h1": p - 1, "zb-h2": p - 1}
    beyond |= {"zb-v": (p - 1) / 2, "v-half": max(1.5, (3 * p - 4) / 2), "v-min": v_min, "dualpipe-v": (p - 1) / 2}
    peaks = {"gpipe": m, "1f1b": p, "zb-h1": p, "zb-h2": 2 * p - 1, "zb-v": p, "dualpipe-v": p + 0.5}
    peaks |= {"v-half": (p + 2) // 2, "v-min": (p + 4) // 3}
    if m % p == 0:
        peaks["interleaved"] = p + (p - 1) / 2
    drawn = {one.name: one for one in compare(p, 2, m, Costs())}
    assert {name: one.makespan - 3 * m for name, one in drawn.items()} == beyond
    assert {name: max(drawn[name].peaks) for name in peaks} == peaks
    assert all(f"### {name}\n\n![{name}](images/pipeline-{name}.png)" in TEXT for name in SCHEDULES)


def test_predictions_of_the_docs():
    lines = [line for line in TEXT.splitlines() if line.startswith(("| | gpipe", "| equal", "| other"))]
    names, equal, other = ([cell.strip() for cell in line.strip("|").split("|")[1:]] for line in lines)
    for costs, times in ((Costs(), equal), (Costs(1, 2, 1.2, 0.8, 0.1), other)):
        assert {one.name: f"{one.makespan:.4g}" for one in compare(8, 2, 32, costs)} == dict(zip(names, times, strict=True))


def test_the_docs_own_schedule():
    """It is valid, and does what is said of it."""
    code = re.search(r"```python\n(from .*?)```", TEXT, re.DOTALL)[1]
    made = {}
    exec(code, made)
    late = Costs(send=0.2)
    eager, plain = (predict(ScheduleKind("eager", make), 4, 1, 8, late) for make in (made["eager_1f1b"], SCHEDULES["1f1b"]))
    assert eager.makespan < plain.makespan and eager.peaks == [2 * (4 - rank) - 1 for rank in range(4)]
    predict(ScheduleKind("eager", made["eager_1f1b"]), 8, 1, 3, late)


WITHOUT = """
import runpy, sys
sys.modules.update(matplotlib=None, torch=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_text_needs_neither_matplotlib_nor_torch():
    code, output, errors = run_without("1f1b")
    assert (code, errors) == (0, "") and output.startswith("1f1b: pp 4")
    code, output, errors = run_without("1f1b", "--output", "x.png")
    assert (code, output) == (2, "") and errors.startswith("error: --output needs matplotlib: pip install matplotlib")


def run_without(*arguments):
    command = [sys.executable, "-c", WITHOUT, "tools/draw_schedule.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr
