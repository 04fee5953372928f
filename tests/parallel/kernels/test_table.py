"""The kernel table: what is chosen, what is refused, and what it says of a machine."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_llama.config import KernelConfig
from parallel.errors import ConfigError
from parallel.groups import Axis
from parallel.kernels import reference_kernels, report, table
from parallel.kernels.providers import Package, Provider, Workload
from parallel.kernels.report import markdown_lines, table_lines
from parallel.kernels.self_test import EXAMPLES
from parallel.kernels.table import ROWS, Kernels, check_same_choice, resolve_kernels
from parallel.ledger import Ledger
from tests.ranks import run_ranks

HERE = __name__


def right(x, weight, eps):
    return reference_kernels.rms_norm(x, weight, eps)


def wrong(x, weight, eps):
    return reference_kernels.rms_norm(x, weight, 100 * eps)


FUSED = Provider("fused", f"{HERE}:right", Package(("torch",), ""), verified=("cuda",))


@pytest.fixture
def plant(monkeypatch):
    """Puts a provider before the others of rms_norm."""

    def first(provider):
        monkeypatch.setattr(table, "ROWS", {**ROWS, "rms_norm": (provider, *ROWS["rms_norm"])})

    return first


def test_every_row_ends_with_a_reference_that_needs_no_package():
    for row in ROWS.values():
        assert row[-1].name == "reference" and row[-1].package is None and row[-1].missing(Workload()) is None
        assert len({provider.name for provider in row}) == len(row)


@pytest.mark.parametrize("operation", ROWS)
def test_every_function_is_there(operation):
    """Modules that need their package to be imported are those of Triton kernels."""
    for provider in ROWS[operation]:
        if provider.name not in ("triton", "compiled"):
            assert provider.load() is not None


def test_only_what_is_torchs_own_is_taken_as_verified():
    """A row that claims to have run on a device has a device test to show for it: there is none yet."""
    for row in ROWS.values():
        assert all(provider.verified == () for provider in row if provider.package is not None)


def test_operations_are_the_fields_the_settings_and_the_self_tests():
    assert {field.name for field in fields(Kernels)} == {*ROWS, "names", "unverified", "fprop", "dgrad"}
    assert {field.name for field in fields(KernelConfig)} == set(ROWS) == set(EXAMPLES)


def test_the_chosen_functions_are_the_fields():
    kernels = resolve_kernels(dict.fromkeys(ROWS, "reference"))
    assert kernels.attention is reference_kernels.attention
    assert kernels.names == dict.fromkeys(ROWS, "reference")
    assert str(kernels).startswith("rms_norm reference, add_rms_norm reference, rope reference")


def test_auto_takes_the_first_that_is_verified_on_the_device(plant):
    assert resolve_kernels().names["attention"] == "sdpa"
    plant(FUSED)  # verified on CUDA only
    assert resolve_kernels({"rms_norm": "auto"}).names["rms_norm"] == "torch"
    plant(replace(FUSED, verified=("cpu",)))
    assert resolve_kernels({"rms_norm": "auto"}).names["rms_norm"] == "fused"


def test_a_name_takes_an_unverified_provider_and_says_so(plant):
    plant(FUSED)
    kernels = resolve_kernels({"rms_norm": "fused"})
    assert kernels.rms_norm is right and kernels.unverified == {"rms_norm"}
    assert str(kernels).startswith("rms_norm fused (unverified), add_rms_norm torch,")


def test_a_provider_that_fails_its_self_test_is_refused_with_the_error_found(plant):
    plant(replace(FUSED, function=f"{HERE}:wrong"))
    with pytest.raises(ConfigError, match=r"kernels.rms_norm = 'fused' .*: fused fails its self-test: result 1 of 3 differs"):
        resolve_kernels({"rms_norm": "fused"})


def test_auto_passes_over_a_provider_that_fails_its_self_test_and_warns(plant):
    plant(replace(FUSED, function=f"{HERE}:wrong", verified=("cpu",)))
    with pytest.warns(UserWarning, match="kernels.rms_norm = auto passes over fused: .* differs from the reference by"):
        assert resolve_kernels().names["rms_norm"] == "torch"


@pytest.mark.parametrize(
    ("changes", "workload", "reason"),
    [
        ({"devices": ("cuda",)}, Workload(), "it runs on cuda, not on cpu"),
        ({"dtypes": (torch.bfloat16, torch.float16)}, Workload(), "it computes in bf16 and fp16, not in fp32"),
        ({"tensor_parallel": False}, Workload(tp_size=2), "it knows no tensor parallelism, and parallel.tp = 2"),
        ({"package": Package(("no_such_module",), "pip install it")}, Workload(), "no_such_module is not installed: pip ins"),
    ],
)
def test_a_provider_that_cannot_run_here_says_why(plant, changes, workload, reason):
    provider = replace(FUSED, verified=("cpu",), **changes)
    plant(provider)
    with pytest.raises(ConfigError, match=rf"'fused' cannot run here: .*{reason}.*; set --kernels.rms_norm auto"):
        resolve_kernels({"rms_norm": "fused"}, workload)
    assert resolve_kernels(workload=workload).names["rms_norm"] == "torch"


def test_an_unknown_provider_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"kernels.attention = 'magic' is not a provider .*; there are auto, flash_attent"):
        resolve_kernels({"attention": "magic"})


def test_an_unknown_operation_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"kernels.softmax: no such operation; there are rms_norm, add_rms_norm"):
        resolve_kernels({"softmax": "torch"})


def choose(rank, world_size, names):
    kernels = replace(resolve_kernels(), names={**resolve_kernels().names, "attention": names[rank]})
    try:
        check_same_choice(kernels, Axis("world", rank, world_size, (0, 1), dist.group.WORLD, Ledger()), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_choose_differently_all_say_so():
    assert run_ranks(2, choose, ("sdpa", "sdpa")) == ["", ""]
    first, second = run_ranks(2, choose, ("sdpa", "varlen"))
    assert first == second and "auto chooses varlen on some ranks and sdpa on others" in first
    assert first.endswith("set --kernels.attention sdpa")


def test_the_printed_table_gives_each_provider_a_state():
    lines = list(table_lines(Workload(), {"rms_norm": "torch"}))
    states = [line.split(maxsplit=1) for line in lines[: len(ROWS["rms_norm"])]]
    assert len(lines) == sum(map(len, ROWS.values()))
    assert states[0] == ["rms_norm", "apex                missing: it runs on cuda, not on cpu"]
    assert ["torch", "chosen"] in states and ["reference", "available"] in states


def test_the_printed_table_names_what_has_never_run(monkeypatch):
    monkeypatch.setattr(report, "ROWS", {"rms_norm": (FUSED,)})
    (line,) = table_lines(Workload(), {})
    assert line.split() == "rms_norm fused unverified: it has never run on cpu; its name chooses it".split()


def test_the_reference_page_lists_the_rows():
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")
    missing = [line for line in markdown_lines() if line not in page.splitlines()]
    assert missing == [], "docs/kernels.md is behind: paste the output of python -m parallel.kernels --markdown"


IMPORTS = """
import importlib.util, sys
import torch
from parallel.kernels.providers import Workload
from parallel.kernels.table import ROWS, resolve_kernels
looked_up = []
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: (looked_up.append(name), find_spec(name))[1]
resolve_kernels()
assert looked_up == [], looked_up  # auto considers no provider that it wouldn't take
workload = Workload(torch.device("cuda"), torch.float16)
for row in ROWS.values():
    for provider in row:
        provider.missing(workload)
packages = ("triton", "apex", "amp_C", "transformer_engine", "liger_kernel", "flash_attn", "torch._dynamo")
assert not [name for name in packages if name in sys.modules]
assert not torch.cuda.is_initialized()
print(len(looked_up), len({*looked_up}))
"""


def test_finding_providers_imports_no_package_and_touches_no_gpu():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lookups, modules = map(int, done.stdout.split())
    assert modules <= 12 and lookups <= 2 * sum(map(len, ROWS.values()))
