"""A training step calls what the kernel table chose, and calls it as often as the model has it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

import megatron_llama.runtime
from parallel.kernels.table import ROWS, resolve_kernels
from tests.parity.test_parity import GQA, layout
from tests.parity.training import Case, Session

LAYERS, MICRO_BATCHES, LINEARS = GQA.num_layers, 8, 4


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each operation's kernel has been called, head_loss apart: logits this small are whole."""
    counted: Counter = Counter()

    def counting(wanted, workload):
        kernels = resolve_kernels(wanted, workload)

        def wrapped(operation):
            kernel = getattr(kernels, operation)
            return lambda *inputs, **settings: (counted.update([operation]), kernel(*inputs, **settings))[1]

        return replace(kernels, **{operation: wrapped(operation) for operation in ROWS if operation != "head_loss"})

    monkeypatch.setattr(megatron_llama.runtime, "resolve_kernels", counting)
    return counted


def test_a_step_uses_the_kernels_of_the_table(calls: Counter) -> None:
    Session(0, 1, Case("kernels", layout(), GQA)).step(0)
    in_each_layer = {"add_rms_norm": 1, "qkv_rope": 1, "rope": 2, "swiglu": 1, "attention": 1}
    assert {operation: calls.pop(operation) for operation in in_each_layer} == {
        operation: count * LAYERS * MICRO_BATCHES for operation, count in in_each_layer.items()
    }
    assert calls.pop("rms_norm") == (LAYERS + 1) * MICRO_BATCHES  # before attention, and before the head
    assert calls.pop("wgrad") == (LAYERS * LINEARS + 1) * MICRO_BATCHES  # the head's too
    assert calls.pop("cross_entropy") == MICRO_BATCHES
    assert calls == {"adamw": 2, "l2_norm": calls["l2_norm"]} and calls["l2_norm"]  # matrices are decayed, norms are not
