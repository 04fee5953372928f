"""DeepSpeed's universal checkpoints: what its converter writes we read, what we write its engine loads and goes on from."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.hugging_face import hugging_face_name
from megatron_llama.interop.stored_model import Options, StoredModel, logical_shapes
from parallel.errors import CheckpointError, ConfigError
from tests.megatron_llama.interop.deepspeed_runs import (
    CONTEXT,
    FP32_GRADIENTS,
    MODEL,
    SMALL_GROUPS,
    Run,
    assert_same,
    contents,
    save,
    state,
    train,
)
from tests.megatron_llama.interop.models import random_model
from tests.ranks import run_ranks
from tests.with_deepspeed import deepspeed_imported  # noqa: F401

UNIVERSAL = "global_step3_universal"
pytestmark = pytest.mark.usefixtures("deepspeed_imported")


@dataclass(frozen=True)
class Saved:
    """A run's folder, with the step as it was saved and as DeepSpeed made it universal; its state, and losses after it."""

    folder: Path
    state: dict[str, Tensor]
    losses: list[float]

    @property
    def universal(self) -> StoredModel:
        return open_stored("deepspeed-universal", self.folder, Options())


def run_and_convert(run: Run, folder: Path) -> Saved:
    from deepspeed.checkpoint.ds_to_universal import main

    kept, losses = run_ranks(2, save, run, folder)[0]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(
            Namespace(
                input_folder=str(folder / "global_step3"),
                output_folder=str(folder / UNIVERSAL),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    return Saved(folder, kept, losses)


@pytest.fixture(scope="module")
def saved(deepspeed_imported, tmp_path_factory) -> Saved:  # noqa: F811
    """Stage 1 in fp32, on two ranks."""
    return run_and_convert(Run(1, schedule="torch"), tmp_path_factory.mktemp("universal") / "checkpoint-3")


@pytest.fixture(scope="module")
def exported(saved: Saved, tmp_path_factory) -> Path:
    """The same as we write it."""
    folder = tmp_path_factory.mktemp("exported") / "checkpoint-3"
    convert(open_stored("deepspeed-zero", saved.folder, Options()), "deepspeed-universal", folder, Options())
    return folder


@pytest.fixture
def broken(exported: Path, tmp_path: Path) -> Path:
    """A copy of that, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def read(folder: Path, options: Options | None = None) -> StoredModel:
    return open_stored("deepspeed-universal", folder, options or Options())


@pytest.mark.parametrize(
    "run",
    [Run(1, bf16=True, extra=FP32_GRADIENTS), Run(2, bf16=True, tied=True), Run(3, extra=SMALL_GROUPS)],
    ids=["1-bf16", "2-bf16-tied", "3"],
)
def test_what_deepspeed_made_universal_is_the_engines_state(run: Run, tmp_path: Path) -> None:
    made = run_and_convert(run, tmp_path)
    stored = made.universal
    assert stored.model == replace(MODEL, tie_embeddings=run.tied)
    assert (stored.optimizer_steps, stored.sequence_length) == (3, CONTEXT)
    assert_same(contents(stored), made.state)


def resume(rank: int, world_size: int, run: Run, folder: Path) -> tuple[dict[str, Tensor], list[float], list[int]]:
    """Another run loads it: its state, its next losses, the updates that its optimizer has counted in the end."""
    engine = replace(run, extra=run.extra | {"checkpoint": {"load_universal": True}}).engine(seed=1)
    engine.load_checkpoint(str(folder))
    if engine.lr_scheduler:  # schedulers set the learning rate after a step, for the next one
        for group, learning_rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_lr(), strict=True):
            group["lr"] = learning_rate
    for kept in engine.optimizer.optimizer.state.values():  # stage 3 gives all sub-groups the same tensor, and each adds to it
        kept["step"] = kept["step"].clone()
    loaded = state(engine)
    losses = train(engine, 2, rank)
    steps = [int(kept["step"]) for kept in engine.optimizer.optimizer.state.values()]
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.1, 0.0]
    return loaded, losses, steps


def test_a_run_goes_on_from_our_export_as_from_its_own(saved: Saved, exported: Path) -> None:
    loaded, losses, steps = run_ranks(2, resume, Run(1, schedule="torch"), exported)[0]
    assert_same(loaded, saved.state)
    assert losses == saved.losses and steps == [5, 5]


@pytest.mark.parametrize(
    "run",
    [
        Run(1, bf16=True, schedule="deepspeed", extra=FP32_GRADIENTS),
        Run(2, bf16=True, schedule="torch"),
        Run(3, schedule="torch", extra=SMALL_GROUPS),
    ],
    ids=["1-bf16", "2-bf16", "3"],
)
def test_our_export_loads_at_every_stage(run: Run, saved: Saved, exported: Path) -> None:
    loaded, losses, steps = run_ranks(2, resume, run, exported)[0]
    assert_same(loaded, saved.state)
    assert losses == pytest.approx(saved.losses, rel=1e-2 if run.bf16 else 1e-5) and set(steps) == {5}


def test_our_export_is_what_deepspeed_writes(saved: Saved, exported: Path) -> None:
    """Every tensor of its own conversion, under the same name; and it reads back as what it was."""
    ours, theirs = exported / UNIVERSAL / "zero", saved.folder / UNIVERSAL / "zero"
    files = sorted(file.relative_to(theirs) for file in theirs.glob("*/*.pt"))
    assert files == sorted(file.relative_to(ours) for file in ours.glob("*/*.pt")) and len(files) == 4 * len(saved.state) // 3
    for file in files:
        written, expected = (torch.load(folder / file, weights_only=True) for folder in (ours, theirs))
        if file.name == "step.pt":
            assert written.dtype == expected.dtype and written == expected == 3.0
        else:
            assert torch.equal(written["param"], expected["param"])
            assert (ours / file).stat().st_size < written["param"].nbytes + 4096
    assert_same(contents(read(exported)), saved.state)


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_without_moments_begin_an_optimizer(stage: int, tmp_path: Path) -> None:
    model = replace(random_model(MODEL, torch.bfloat16), files={})
    convert(model, "deepspeed-universal", tmp_path / "out", Options())
    loaded, _, steps = run_ranks(2, resume, Run(stage), tmp_path / "out")[0]
    for name, weight in model.weights.items():
        assert torch.equal(loaded[f"fp32/{name}"], weight.load(torch.float32))
        assert not loaded[f"exp_avg/{name}"].any() and not loaded[f"exp_avg_sq/{name}"].any()
    assert set(steps) == {2}
    assert read(tmp_path / "out").optimizer_steps == 0


def folder_of(root: Path, name: str) -> Path:
    return root / UNIVERSAL / "zero" / hugging_face_name(name)


def test_prefixes_of_wrappers_and_what_is_no_weight(saved: Saved, broken: Path) -> None:
    for name in logical_shapes(MODEL):
        place = folder_of(broken, name)
        place.rename(place.with_name(f"module._orig_mod.{place.name}"))
    (place.with_name("model.rotary_emb.inv_freq")).mkdir()
    torch.save({"param": torch.ones(4)}, place.with_name("model.rotary_emb.inv_freq") / "fp32.pt")
    assert_same(contents(read(broken)), saved.state)
    shutil.copytree(place.with_name(f"module._orig_mod.{place.name}"), place)
    with pytest.raises(CheckpointError, match="are the same parameter"):
        read(broken)


def test_rows_above_the_vocabulary_go_where_they_are_marked_as_padding(saved: Saved, broken: Path) -> None:
    marked = {"tok_embeddings": True, "output": True}
    for name in marked:
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            file = folder_of(broken, name) / f"{kind}.pt"
            content = torch.load(file)
            assert content["vocab_tensor"]
            torch.save(content | {"param": torch.nn.functional.pad(content["param"], (0, 0, 0, 5))}, file)
    assert_same(contents(read(broken)), saved.state)
    torch.save({"param": torch.load(file)["param"]}, file)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq/output is \[136, 32\], the architecture says \[131, 32\]"):
        read(broken)


def test_moments_of_some_weights_are_refused_and_of_none_are_not(broken: Path) -> None:
    for name in logical_shapes(MODEL):
        (folder_of(broken, name) / "exp_avg.pt").unlink()
        if name == "layers.0.attention.wq":
            with pytest.raises(CheckpointError, match=r"moments of the optimizer: .* missing \(.*exp_avg/layers.0.attention"):
                read(broken)
        (folder_of(broken, name) / "exp_avg_sq.pt").unlink()
    assert not read(broken).optimizer


def test_what_is_missing_is_named(broken: Path) -> None:
    (broken / "config.json").unlink()
    with pytest.raises(ConfigError, match="no config.json here or above .* --model PRESET or --config FILE"):
        read(broken)
    model = Options(model=MODEL)
    assert read(broken, model).optimizer_steps == 3
    (folder_of(broken, "norm") / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"of 30 weights: 1 missing \(norm\)"):
        read(broken, model)
    (broken / "latest_universal").write_text("global_step9_universal")
    with pytest.raises(CheckpointError, match="global_step9_universal, which latest_universal names, holds no zero/"):
        read(broken, model)
    (broken / "latest_universal").unlink()
    with pytest.raises(CheckpointError, match="holds neither zero/.* nor a file latest_universal"):
        read(broken, model)


@pytest.mark.parametrize("steps", [2.5, -1, float("nan"), "3", None, torch.ones(2)])
def test_a_number_of_updates_that_is_none(steps: Any, broken: Path) -> None:
    for file in (broken / UNIVERSAL).glob("zero/*/step.pt"):
        torch.save(steps, file)
    with pytest.raises(CheckpointError, match="step.pt: AdamW's step is .*, not a number of updates"):
        read(broken)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_nothing_is_unpickled_but_tensors_and_plain_values(broken: Path) -> None:
    torch.save({"param": torch.ones(32), "cat_dim": Trap()}, folder_of(broken, "norm") / "fp32.pt")
    with pytest.raises(CheckpointError, match="model.norm.weight/fp32.pt.*exec"):
        read(broken)
    torch.save(["param"], folder_of(broken, "norm") / "fp32.pt")
    with pytest.raises(CheckpointError, match="model.norm.weight/fp32.pt holds no tensor of numbers"):
        read(broken)
