"""The overlap benchmark: its model of a step, and a short run on two nodes, which counts bytes and times nothing."""

import json
import sys
from pathlib import Path

import pytest

from tests.tools.test_benchmarks import check_setting, run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import _nodes  # noqa: E402
from _overlap_model import Compute, Linear, Send, Wait, play, tensor_step, zero_step_seconds  # noqa: E402

MODES = ("none", "backward", "chunks")


def test_a_message_travels_behind_what_comes_after_it_and_behind_the_one_before():
    start = [Send("a", 10), Compute(3), Send("b", 10)]
    assert play([*start, Wait("a")], bytes_per_second=2) == 5
    assert play([*start, Wait("b")], bytes_per_second=2) == 10
    assert play([*start, Compute(9), Wait("a"), Wait("b")], bytes_per_second=2) == 12
    assert play([*start, Wait("a"), Compute(1), Wait("b")], bytes_per_second=10) == 4


def test_zero_hides_the_gathers_behind_the_forward_pass_and_the_sums_behind_the_backward_pass():
    layers, rest = [(1.0, 10.0)] * 4, 0.5
    plain, hidden = (zero_step_seconds(layers, rest, overlap, bytes_per_second=10.0) for overlap in (False, True))
    assert plain == pytest.approx(4 + 8 + rest + 4 + 4)
    assert hidden == pytest.approx(4 + 8 + rest + 1 + 1)  # the first gather and the last sum have nothing to hide behind
    slow = zero_step_seconds(layers, rest, True, bytes_per_second=1.0)
    assert slow == pytest.approx(40 + 1 + 2 + 40 + rest)  # of 120 messages' seconds all is hidden that can be


@pytest.mark.parametrize("pieces", [1, 4])
def test_tensor_parallelism_hides_what_each_mode_allows(pieces):
    """One column and one row linear, each product 4 s, each message 2 s; the embedding's two messages are not hidden."""
    linears = [Linear("up", True, 4.0, 2.0, pieces), Linear("down", False, 4.0, 2.0, pieces)]
    seconds = {mode: play(list(tensor_step(linears, 2.0, 1.0, mode)), 1.0) for mode in MODES}
    computation, embedding = 6 * 4 + 1, 4
    assert seconds["none"] == computation + embedding + 5 * 2
    assert seconds["backward"] == computation + embedding + 3 * 2  # x's gather and dx's sum are behind dgrad and wgrad
    assert seconds["chunks"] == computation + embedding  # a half of each product hides the whole message


def test_in_pieces_a_message_as_long_as_its_product_is_nearly_hidden():
    linear = [Linear("up", True, 4.0, 4.0, pieces=4)]
    forward = [event for event in tensor_step(linear, 0.0, 0.0, "chunks")]
    forward = forward[: forward.index(Compute(0.0))]
    assert play(forward, 1.0) == 4 + 0.5  # the last piece's product


# ---- on nodes -----------------------------------------------------------------------------------------------------------


def our_namespaces():
    return list(Path("/run/netns").glob(f"{_nodes.PREFIX}-*"))


@pytest.fixture(scope="module")
def nodes_can_be_made():
    reason = _nodes.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.slow
def test_two_nodes_send_what_the_ledger_counts(nodes_can_be_made, tmp_path):
    """Bytes, not seconds: reductions go as (D-1)/D of a buffer, and no mode sends more than another."""
    done = run("overlap", "--rounds", 1, "--scale", 0.1, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    check_setting(done.stdout, ("--rounds",))
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    for section, modes in (("zero", ("off", "on")), ("tp", MODES)):
        values = {figure["name"]: figure["value"] for figure in figures if figure["section"] == section}
        for mode in modes:
            assert 1.0 <= values[f"interface / ledger, {mode}"] < 1.3
    elements = 4 * 48 * (4 * 48 + 3 * 96) + 2 * 512 * 48  # 4 layers, embedding and head; norms and padding besides
    ledger = [figure["value"] for figure in figures if figure["name"] == "  ledger"]
    assert ledger[0] == ledger[1] and ledger[2] == ledger[3] == ledger[4]
    assert 1.0 <= ledger[0] / (elements * (4 + 4) / 2) < 1.05
    assert our_namespaces() == []


@pytest.mark.slow
def test_other_losses_end_the_program_and_nothing_stays_behind(nodes_can_be_made):
    done = run("overlap", "--only", "tp", "--rounds", 1, "--scale", 0.1, "--plant-error")
    assert done.returncode == 1 and "not the same training" in done.stderr
    assert our_namespaces() == []


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(_nodes.shutil, "which", lambda program: None if program == "tc" else program)
    assert _nodes.missing() == "tc not found: install iproute2"
    monkeypatch.setattr(_nodes.shutil, "which", lambda program: program)
    monkeypatch.setattr(_nodes.os, "geteuid", lambda: 1000)
    assert _nodes.missing() == "network namespaces need root"
    with pytest.raises(OSError, match="need root"), _nodes.Nodes():
        pass
