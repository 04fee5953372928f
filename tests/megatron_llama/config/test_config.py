"""Layering, typed parsing, error messages, the TOML round trip, and every cross-field rule."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.config import (
    DataSource,
    RunConfig,
    checkpoint_directory,
    data_parallel_size,
    from_dict,
    help_text,
    load_config,
    micro_batches_per_step,
    to_dict,
    to_toml,
    tokens_per_step,
    total_steps,
    validate,
    validate_layout,
    validate_model,
)
from parallel.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples" / "configs"
VALID = [
    *("--model.num_layers", "4", "--model.hidden_size", "64", "--model.num_heads", "8", "--model.num_kv_heads", "4"),
    *("--model.ffn_hidden_size", "96", "--model.vocab_size", "100", "--data.train", "a", "--train.steps", "10"),
    *("--train.global_batch_size", "16", "--train.micro_batch_size", "2", "--train.sequence_length", "32"),
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


# layers


def test_defaults_are_a_valid_dataclass_and_frozen():
    config = load_config([])
    assert config == RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.num_layers = 3


def test_preset_then_file_then_flags(tmp_path):
    path = write(tmp_path / "run.toml", '[model]\npreset = "llama-7b"\nnum_layers = 3\nvocab_size = 77\n[parallel]\ntp = 2\n')
    config = load_config(["--model.vocab_size", "99", "--config", path, "--parallel.pp=2"])
    assert config.model.hidden_size == 4096  # preset
    assert config.model.num_layers == 3  # file over preset
    assert config.model.vocab_size == 99  # flag over file
    assert (config.parallel.tp, config.parallel.pp) == (2, 2)
    assert config.optimizer.warmup_steps == 2000  # preset's hyper-parameters


def test_preset_flag_wins_over_preset_of_the_file(tmp_path):
    path = write(tmp_path / "run.toml", '[model]\npreset = "llama-7b"\n')
    assert load_config(["--config", path, "--model.preset", "llama-13b"]).model.hidden_size == 5120
    assert load_config(["--config", path, "--model.preset", ""]).model.hidden_size == 0


def test_base_stands_in_for_the_defaults_and_keeps_overrides_of_its_preset():
    base = load_config(["--model.preset", "llama-7b", "--model.num_layers", "2"])
    config = load_config(["--parallel.tp", "2"], base=base)
    assert config.model == base.model and config.parallel.tp == 2
    assert load_config(["--model.preset", "llama-13b"], base=base).model.num_layers == 40


@pytest.mark.parametrize("flags, expected", [(["--train.steps", "5"], (5, 0)), (["--train.tokens", "7"], (0, 7))])
def test_the_higher_layer_wins_between_steps_and_tokens(tmp_path, flags, expected):
    for text in ("[train]\nsteps = 100\n", "[train]\ntokens = 100\n", "[train]\nsteps = 100\ntokens = 0\n"):
        config = load_config(["--config", write(tmp_path / "run.toml", text), *flags])
        assert (config.train.steps, config.train.tokens) == expected


def test_steps_over_the_tokens_of_a_preset():
    config = load_config(["--model.preset", "llama-7b", "--train.steps", "20"])
    assert (config.train.steps, config.train.tokens) == (20, 0)


def test_both_lengths_in_one_layer_is_an_error(tmp_path):
    path = write(tmp_path / "run.toml", "[train]\nsteps = 100\ntokens = 200\n")
    message = error_of(load_config, ["--config", path])
    assert path in message and "100" in message and "200" in message
    assert "the command line" in error_of(load_config, ["--train.steps", "1", "--train.tokens", "2"])


# values


def test_typed_values_on_the_command_line():
    config = load_config(
        [
            *("--parallel.sequence_parallel", "false", "--optimizer.learning_rate", "1", "--train.tokens", "1_000"),
            *("--parallel.layers_per_stage", "[3, 1]", "--data.train", '["a", {prefix = "b", weight = 0.7}]'),
            *("--data.valid=c=d", "--checkpoint.load", "/some/where"),
        ]
    )
    assert config.parallel.sequence_parallel is False
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.train.tokens == 1000
    assert config.parallel.layers_per_stage == (3, 1)
    assert config.data.train == (DataSource("a"), DataSource("b", 0.7))
    assert config.data.valid == (DataSource("c=d"),)
    assert config.checkpoint.load == "/some/where"


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("parallel.tp", "two", "an integer"),
        ("parallel.tp", "2.0", "an integer"),
        ("parallel.tp", "yes", "an integer"),
        ("parallel.sequence_parallel", "1", "true or false"),
        ("optimizer.learning_rate", "high", "a finite number"),
        ("optimizer.learning_rate", "nan", "a finite number"),
        ("parallel.layers_per_stage", "[1, 2.5]", "list of integers"),
        ("parallel.layers_per_stage", "[1, ", "list of integers"),
        ("data.train", "[1]", "PREFIX"),
        ("data.train", '[{prefix = "a", weight = 0}]', "weights above 0"),
        ("data.train", '[{prefix = "a", wait = 1}]', "PREFIX"),
        ("data.train", '[{prefix = "a", max_epochs = -1}]', "max_epochs = NUMBER"),
        ("data.train", '[{weight = 1}]', "PREFIX"),
    ],
)
def test_wrong_types_name_value_field_and_expected_type(flag, value, expected):
    message = error_of(load_config, [f"--{flag}", value])
    assert message.startswith(f"--{flag}: {flag} = ") and expected in message
    if value[0] not in "[{":
        assert value in message


def test_wrong_type_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path / "run.toml", '[parallel]\ntp = "2"\n')
    message = error_of(load_config, ["--config", path])
    assert path in message and "parallel.tp = '2'" in message and "an integer" in message


def test_true_is_not_an_integer_and_an_integer_not_text(tmp_path):
    for text in ("[parallel]\ntp = true\n", "[checkpoint]\nload = 3\n", "[parallel]\nsequence_parallel = 1\n"):
        assert "wrong type" in error_of(load_config, ["--config", write(tmp_path / "run.toml", text)])


@pytest.mark.parametrize(
    "flag, closest",
    [
        ("parallel.tpp", "parallel.tp"),
        ("paralel.tp", "parallel.tp"),
        ("tp", "parallel.tp"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("model.n_layers", "model.num_layers"),
        ("confg", "config"),
    ],
)
def test_unknown_keys_name_the_closest(tmp_path, flag, closest):
    assert error_of(load_config, [f"--{flag}", "2"]).endswith(closest)
    if "." in flag:
        section, name = flag.split(".")
        path = write(tmp_path / "run.toml", f"[{section}]\n{name} = 2\n")
        message = error_of(load_config, ["--config", path])
        assert path in message and (message.endswith(closest) or message.endswith(closest.split(".")[0]))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["train.steps", "3"], "--section.field value"),
        (["--train.steps"], "needs a value"),
        (["--train.steps", "--train.tokens"], "needs a value"),
        (["--parallel", "2"], "is a section"),
        (["--config", "/does/not/exist.toml"], "No such file"),
        (["--model.preset", "lama-7b"], "llama-7b"),
        (["--parallel.schedule", "1f1"], "did you mean 1f1b"),
        (["--train.dtype", "fp64"], "fp32, bf16"),
        (["--train.global_batch_size", "0"], "at least 1"),
    ],
)
def test_other_bad_arguments(arguments, part):
    assert part in error_of(load_config, arguments)


def test_broken_toml_names_file_and_line(tmp_path):
    path = write(tmp_path / "run.toml", "[model]\nnum_layers = \n")
    message = error_of(load_config, ["--config", path])
    assert path in message and "line 2" in message


def test_a_value_where_a_section_belongs(tmp_path):
    assert "not a section" in error_of(load_config, ["--config", write(tmp_path / "run.toml", "model = 3\n")])


# output


def test_help_lists_every_field_with_type_and_default(capsys):
    text = help_text()
    for section, fields in to_dict(RunConfig()).items():
        for name in fields:
            assert f"--{section}.{name} " in text
    assert '--parallel.schedule auto|gpipe|1f1b|interleaved|zb-h1|zb-h2|zb-v|v-half|v-min|dualpipe-v  (default "1f1b")' in text
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0 and capsys.readouterr().out == text


def any_value(item: dataclasses.Field) -> st.SearchStrategy:
    """Values that a field accepts."""
    text = st.text(st.characters(codec="utf-8"), max_size=8)
    if item.name == "preset":
        return st.sampled_from(["", "llama-7b", "llama-3.2-1b", "llama-tiny"])
    if item.metadata["choices"]:
        return st.sampled_from(item.metadata["choices"])
    if item.name in ("train", "valid"):
        number = st.none() | st.floats(1e-6, 1e6)
        sources = st.builds(DataSource, st.text(min_size=1, max_size=8), number, number)
        return st.lists(sources, max_size=3).map(tuple)
    if item.name == "layers_per_stage":
        return st.just("auto") | st.lists(st.integers(0, 99), max_size=4).map(tuple)
    low = item.metadata["minimum"]
    integers = st.integers(0 if low is None else int(low), 10**15)
    floats = st.floats(1e-9 if low is None else low, 1e12)
    return {bool: st.booleans(), int: integers, float: floats, str: text}[item.type]


SECTIONS = {
    section.name: st.builds(section.type, **{item.name: any_value(item) for item in dataclasses.fields(section.type)})
    for section in dataclasses.fields(RunConfig)
}


@settings(max_examples=50, deadline=None)
@given(st.builds(RunConfig, **SECTIONS), st.booleans())
def test_toml_read_back_gives_an_equal_configuration(tmp_path_factory, config, by_steps):
    one_length = {"tokens": 0} if by_steps else {"steps": 0}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **one_length))
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_bytes(to_toml(config).encode())
    assert load_config(["--config", str(path)]) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_refuses_unknown_fields_naming_the_origin():
    assert "manifest.json" in error_of(from_dict, {"model": {"num_layer": 3}}, "manifest.json")


def test_derived_values():
    config = load_config([*VALID, "--parallel.tp", "2", "--train.tokens", "1025", "--train.steps", "0"])
    assert tokens_per_step(config) == 512
    assert total_steps(config) == 3  # 1025 tokens are two steps and a bit
    assert data_parallel_size(config, 8) == 4
    assert micro_batches_per_step(config, 8) == 2
    assert str(checkpoint_directory(config)) == "runs/llama/checkpoints"
    assert config.model.head_dim == 8


def test_kv_heads_follow_the_heads_where_not_given():
    config = load_config(["--model.num_heads", "6"])
    assert config.model.num_kv_heads == 6


# rules


def test_the_base_of_the_rule_tests_is_valid():
    validate(load_config(VALID), 1)
    validate(load_config([*VALID, "--parallel.tp", "2", "--parallel.pp", "2"]), 8)


RULES = [
    # flags, world size, what the message must contain
    (["--model.num_layers", "0"], 1, ["model.num_layers", "--model.preset"]),
    (["--model.vocab_size", "0"], 1, ["model.vocab_size", "--model.preset"]),
    (["--model.num_kv_heads", "3"], 1, ["3 over 8", "2 or 4"]),
    (["--model.hidden_size", "72"], 1, ["72 over 8", "64 or 80"]),
    (["--model.norm_eps", "0"], 1, ["model.norm_eps", "above 0"]),
    (["--model.rope_scaling_factor", "8", "--model.rope_low_freq_factor", "4"], 1, ["4.0 and 4.0", "1.0"]),
    (["--parallel.cp", "2"], 2, ["cp = 2", "has not landed", "to 1"]),
    (["--zero.shard_group_size", "4"], 6, ["4 over 6", "to 3 or 6", "or to 0"]),
    (["--zero.shard_group_size", "2", "--zero.stage", "0"], 2, ["shard_group_size = 2", "--zero.stage 1"]),
    (["--zero.gradient_dtype", "bf16", "--train.dtype", "fp32"], 1, ["train.dtype = bf16", "is fp32", "gradient_dtype fp32"]),
    (["--parallel.tp", "3"], 3, ["tp 3", "8 heads", "ffn 96", "4 kv heads", "to 2 or 4"]),
    (["--parallel.tp", "16"], 16, ["tp 16", "8 heads", "to 8"]),
    (["--model.num_heads", "12", "--model.num_kv_heads", "6", "--model.hidden_size", "96", "--parallel.tp", "4"], 4,
     ["tp 4", "6 kv heads", "3 or 6"]),
    (["--parallel.tp", "2", "--parallel.tp_overlap", "async", "--parallel.sequence_parallel", "false"], 2,
     ["tp_overlap = async", "sequence_parallel = false", "set --parallel.tp_overlap chunks"]),
    (["--parallel.tp", "2", "--parallel.tp_overlap", "async", "--train.device", "cpu"], 2, ["NVLink", "train.device = cpu"]),
    (["--parallel.pp", "5"], 5, ["num_layers is 4", "5 x 1 = 5", "at most 4"]),
    (["--parallel.pp", "2", "--parallel.layers_per_stage", "[4]"], 2, ["[4]", "1 numbers", "= 2"]),
    (["--parallel.pp", "2", "--parallel.layers_per_stage", "[4, 0]"], 2, ["[4, 0]", "at least 1"]),
    (["--parallel.pp", "2", "--parallel.layers_per_stage", "[3, 2]"], 2, ["sums to 5", "is 4", "last one to 1"]),
    (["--parallel.tp", "2", "--parallel.dp", "2"], 8, ["tp 2", "= 4", "is 8", "start 4", "--parallel.dp to 4"]),
    (["--parallel.tp", "2", "--parallel.pp", "2"], 6, ["= 4", "is 6", "4 or 8 processes"]),
    (["--parallel.tp", "4"], 2, ["= 4", "is 2", "start 4 processes"]),
    (["--train.global_batch_size", "18"], 2, ["18", "2 x 2 = 4", "16 or 20"]),
    (["--train.global_batch_size", "3"], 2, ["3", "= 4", "to 4"]),
    (["--train.sequence_length", "33", "--parallel.tp", "2"], 2, ["33", "tp 2", "32 or 34", "sequence_parallel"]),
    (["--data.train", "[]"], 1, ["data.train", "--data.train PREFIX"]),
    (["--data.packing", "best_fit", "--data.order", "megatron"], 1, ["packing = best_fit", "megatron", "--data.packing none"]),
    (["--data.packing", "best_fit", "--data.document_mask", "false"], 1, ["packing = best_fit", "--data.document_mask true"]),
    (["--train.steps", "0"], 1, ["train.steps", "train.tokens", "512 tokens"]),
    (["--train.exit_step", "11"], 1, ["11", "10"]),
    (["--optimizer.warmup_steps", "11"], 1, ["11", "10", "at most 10"]),
    (["--optimizer.learning_rate", "0"], 1, ["learning_rate = 0.0", "above 0"]),
    (["--optimizer.beta2", "1"], 1, ["beta2 = 1.0", "below 1"]),
    (["--optimizer.min_learning_rate_ratio", "1.5"], 1, ["1.5", "at most 1"]),
    (["--optimizer.eps", "0"], 1, ["eps = 0.0", "1e-8"]),
    (["--train.evaluate_every", "5"], 1, ["evaluate_every = 5", "--data.valid"]),
    (["--optimizer.master_weights", "remainder", "--train.dtype", "fp16"], 1,
     ["remainder", "dtype = fp16", "master_weights fp32"]),
    (["--optimizer.moment_dtype", "bf16", "--optimizer.name", "sgd"], 1, ["= bf16", "= sgd", "--optimizer.moment_dtype fp32"]),
    (["--train.dtype", "fp16", "--parallel.pp", "2", "--parallel.post_validation", "true"], 2,
     ["fp16", "--parallel.post_validation false", "--train.dtype bf16"]),
]  # fmt: skip


@pytest.mark.parametrize("flags, world_size, parts", RULES)
def test_each_rule_gives_the_numbers_and_the_fix(flags, world_size, parts):
    message = error_of(validate, load_config([*VALID, *flags]), world_size)
    assert [part for part in parts if part not in message] == [], message


def test_limits_are_checked_on_configurations_built_in_code():
    config = load_config(VALID)
    broken = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="fp64"))
    assert "train.dtype" in error_of(validate_model, broken)


def test_evaluation_and_generation_need_no_data_nor_length():
    config = load_config(["--model.preset", "llama-tiny", "--parallel.tp", "2"])
    validate_model(config)
    validate_layout(config, 4)


def test_an_odd_sequence_is_fine_without_sequence_parallelism():
    odd = [*VALID, "--train.sequence_length", "33", "--parallel.tp", "2"]
    validate(load_config([*odd, "--parallel.sequence_parallel", "false"]), 2)


@pytest.mark.parametrize("name, world_size", [("laptop", 4), ("llama-7b", 32), ("llama-65b", 2048), ("llama-3-8b", 64)])
def test_the_example_configurations_can_run(name, world_size):
    data = ["--data.train", "a", "--data.valid", "b"] if name == "laptop" else []
    validate(load_config(["--config", str(EXAMPLES / f"{name}.toml"), *data]), world_size)
