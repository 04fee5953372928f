"""DeepSpeed for the tests that need it, imported once in the process from which ranks are forked (seconds in each else)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from parallel.launch import lent_environment
from parallel.zero.deepspeed_setup import import_deepspeed


@pytest.fixture(scope="module")
def deepspeed_imported() -> None:
    """Imports DeepSpeed and what it imports when it begins; skips where it is not installed."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with lent_environment({"DS_ACCELERATOR": "cpu"}):
        import_deepspeed()
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
