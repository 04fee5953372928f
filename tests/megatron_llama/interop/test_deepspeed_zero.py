"""ZeRO checkpoints as DeepSpeed saves them from several ranks, against its engine's own masters and moments."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.stored_model import Options
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
)
from tests.ranks import run_ranks
from tests.with_deepspeed import deepspeed_imported  # noqa: F401

STEP = "global_step3"
pytestmark = pytest.mark.usefixtures("deepspeed_imported")


def read(folder: Path, options: Options | None = None):
    return open_stored("deepspeed-zero", folder, options or Options())


@pytest.fixture(scope="module")
def saved(deepspeed_imported, tmp_path_factory) -> Path:  # noqa: F811
    """Stage 2 in bf16, on two ranks."""
    folder = tmp_path_factory.mktemp("zero") / "checkpoint-3"
    run_ranks(2, save, Run(2, bf16=True), folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("run", "ranks"),
    [
        (Run(1), 2),
        (Run(1, bf16=True, extra=FP32_GRADIENTS), 2),
        (Run(1, bf16=True, extra={"zero_optimization": {"elastic_checkpoint": True}}), 2),
        (Run(2, bf16=True, extra={"zero_optimization": {"round_robin_gradients": True}}), 3),
        (Run(3, bf16=True), 2),
        (Run(3, tied=True, extra=SMALL_GROUPS), 3),  # every parameter is padded
    ],
    ids=["1", "1-bf16", "1-elastic", "2-bf16-round-robin", "3-bf16", "3-sub-groups"],
)
def test_masters_and_moments_are_the_engines(run: Run, ranks: int, tmp_path: Path) -> None:
    expected, _ = run_ranks(ranks, save, run, tmp_path)[0]
    stored = read(tmp_path)
    assert stored.model == replace(MODEL, tie_embeddings=run.tied)
    assert (stored.optimizer_steps, stored.sequence_length) == (3, CONTEXT)
    assert_same(contents(stored), expected)


def test_a_run_that_made_no_update_has_weights_alone(tmp_path: Path) -> None:
    run_ranks(1, _save_at_once, tmp_path)
    stored = read(tmp_path)
    assert not stored.optimizer and stored.optimizer_steps == 0
    assert stored.weights["norm"].load().eq(1.0).all()


def _save_at_once(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    Run(1).engine().save_checkpoint(str(folder))
    Run(1).architecture.save_pretrained(folder)


def test_the_folder_of_the_step_and_the_tokenizer_beside_it(saved: Path, broken: Path) -> None:
    (broken / "tokenizer.model").write_bytes(b"a tokenizer")
    stored = read(broken / STEP)
    assert stored.files["tokenizer.model"] == b"a tokenizer"
    assert_same(contents(stored), contents(read(saved)))


def test_the_architecture_is_asked_for_where_nothing_tells_it(broken: Path) -> None:
    (broken / "config.json").unlink()
    with pytest.raises(ConfigError, match="no config.json here or above .* --model PRESET or --config FILE"):
        read(broken)
    assert read(broken, Options(model=MODEL)).model == MODEL
    with pytest.raises(CheckpointError, match=r"9 unknown \(layers.2.attention.wk.*is the architecture right"):
        read(broken, Options(model=replace(MODEL, num_layers=2)))


def test_only_one_tensor_is_read_at_a_time(saved: Path) -> None:
    """What is mapped costs no memory: each read makes its own tensor, and the files' own are not handed out."""
    weight = read(saved).weights["layers.1.attention.wq"]
    weight.load().zero_()
    assert weight.load().any()


def test_it_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format deepspeed-zero is only read"):
        convert(read(saved), "deepspeed-zero", tmp_path / "out", Options())


def rank_file(folder: Path, rank: int) -> Path:
    return folder / STEP / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def changed(file: Path, change) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def test_a_rank_that_is_missing_or_from_another_save_is_noticed(broken: Path) -> None:
    changed(rank_file(broken, 1), lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"].add_(1))
    with pytest.raises(CheckpointError, match="files are of steps 3, 4: not of one checkpoint"):
        read(broken)
    rank_file(broken, 1).unlink()
    with pytest.raises(CheckpointError, match="holds 1 .* of 2 ranks: was it saved completely"):
        read(broken)
    rank_file(broken, 0).unlink()
    with pytest.raises(CheckpointError, match="holds no .*_optim_states.pt of a ZeRO stage: read the weights with --from hf"):
        read(broken)


def test_pieces_that_do_not_make_up_the_parameters_are_refused(broken: Path) -> None:
    def mappings(content):
        return content["optimizer_state_dict"]["param_slice_mappings"][0]

    def longer(content):
        place = list(mappings(content).values())[-1]
        place.numel += 10**6

    def without_the_first(content):
        del mappings(content)[next(iter(mappings(content)))]

    changed(rank_file(broken, 1), without_the_first)  # of which the other rank has the rest
    with pytest.raises(CheckpointError, match="the files hold .* elements for fp32 of model.layers.*: are they of one save"):
        read(broken)
    changed(rank_file(broken, 1), longer)
    with pytest.raises(CheckpointError, match="rank_1.* of group 0, which has"):
        read(broken)


def test_frozen_parameters_and_pipelines_are_refused(broken: Path) -> None:
    model_states = broken / STEP / "mp_rank_00_model_states.pt"
    changed(model_states, lambda content: content.update(frozen_param_shapes={"model.norm.weight": torch.Size([32])}))
    with pytest.raises(CheckpointError, match=r"1 parameters were not trained \(model.norm.weight, ...\): not supported"):
        read(broken)
    shutil.copy(model_states, broken / STEP / "layer_01-model_00-model_states.pt")
    with pytest.raises(CheckpointError, match="is of a pipeline-parallel run: .* ds_to_universal"):
        read(broken)


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_01_optim_states.pt", "expp_rank_0_mp_rank_00_optim_states.pt"])
def test_other_parallelism_is_sent_to_the_universal_format(name: str, broken: Path) -> None:
    shutil.copy(rank_file(broken, 0), broken / STEP / name)
    with pytest.raises(CheckpointError, match=f"{name} is of a run with more than data parallelism: .* ds_to_universal"):
        read(broken)


def test_files_of_two_runs_in_one_folder_are_named(broken: Path) -> None:
    shutil.copy(rank_file(broken, 0), broken / STEP / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="are both of rank 0"):
        read(broken)


@pytest.mark.parametrize("tag", ["../elsewhere", "", "a/b", ".."])
def test_latest_names_a_folder_beside_it_or_nothing(tag: str, broken: Path) -> None:
    (broken / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="latest.* not the name of a folder beside it"):
        read(broken)


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither .*_model_states.pt nor a file latest"):
        read(tmp_path)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def test_no_class_but_deepspeeds_own_is_unpickled(broken: Path) -> None:
    changed(rank_file(broken, 1), lambda content: content.update(further=Trap()))
    with pytest.raises(CheckpointError, match="rank_1.*exec"):
        read(broken)
