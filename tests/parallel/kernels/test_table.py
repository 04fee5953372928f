"""The kernel table: what is chosen, and what is refused."""

from dataclasses import fields

import pytest
import torch

from parallel.errors import ConfigError
from parallel.kernels import table, torch_kernels
from parallel.kernels.table import ROWS, Backend, Kernels, resolve_kernels

CPU = torch.device("cpu")


def broken(*arguments):
    raise NotImplementedError


@pytest.fixture
def a_fused_backend(monkeypatch):
    """A preferred backend of rms_norm that only CUDA devices have."""
    missing = lambda device: None if device.type == "cuda" else "package fused is not installed: pip install fused"  # noqa: E731
    row = (Backend("fused", broken, missing), *ROWS["rms_norm"])
    monkeypatch.setattr(table, "ROWS", {**ROWS, "rms_norm": row})


def test_every_operation_has_a_torch_twin_that_is_always_there():
    for operation, row in ROWS.items():
        (twin,) = (backend for backend in row if backend.name == "torch")
        assert twin.missing(CPU) is None
        assert twin.function is getattr(torch_kernels, operation)
        assert len({backend.name for backend in row}) == len(row)


def test_the_chosen_functions_are_the_fields():
    assert {field.name for field in fields(Kernels)} == {*ROWS, "names", "fprop", "dgrad"}
    kernels = resolve_kernels(dict.fromkeys(ROWS, "torch"))
    assert kernels.attention is torch_kernels.attention
    assert kernels.names == dict.fromkeys(ROWS, "torch")
    assert str(kernels) == "rms_norm torch, rope torch, swiglu torch, attention torch, wgrad torch"


def test_auto_takes_the_first_that_is_available(a_fused_backend):
    assert resolve_kernels().names["attention"] == "sdpa"
    assert resolve_kernels({"rms_norm": "auto"}, CPU).names["rms_norm"] == "lean"
    assert resolve_kernels({"rms_norm": "auto"}, torch.device("cuda")).names["rms_norm"] == "fused"
    assert resolve_kernels({"rms_norm": "torch"}, torch.device("cuda")).names["rms_norm"] == "torch"


def test_a_backend_that_cannot_run_here_says_why(a_fused_backend):
    with pytest.raises(ConfigError, match=r"kernels.rms_norm = 'fused' cannot run here: package fused is not installed"):
        resolve_kernels({"rms_norm": "fused"})


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"kernels.attention = 'magic' is not a backend .*; there are auto, varlen, sdpa"):
        resolve_kernels({"attention": "magic"})


def test_an_unknown_operation_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"kernels.softmax: no such operation; there are rms_norm, rope"):
        resolve_kernels({"softmax": "torch"})
