"""The processes of a node's ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_llama.supervision import rank_processes
from megatron_llama.supervision.rank_processes import RankProcesses
from parallel.launch import Launch
from parallel.launchers import MeetingPoint


def test_nobody_waits_for_ranks_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one may end between two looks: to wait for nothing is to wait for the whole time of grace."""
    point = MeetingPoint("127.0.0.1", 1, serves=False)
    ranks = RankProcesses(lambda launch: 3, [Launch(0, 0, 1, 1, "supervisor", point)], tmp_path)
    while ranks.alive:
        ranks.wait(10.0)
    monkeypatch.setattr(rank_processes.connection, "wait", lambda *arguments: pytest.fail("waits for nobody"))
    ranks.wait(10.0)
    assert ranks.codes == {0: 3}
