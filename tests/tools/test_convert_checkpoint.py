import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_llama.interop import verify
from megatron_llama.interop.formats import open_stored
from megatron_llama.interop.stored_model import Options
from parallel.errors import CheckpointError, ConfigError, DataError
from tools import convert_checkpoint

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the tool in this process: its exit code and output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        code = convert_checkpoint.main()
        return code, capsys.readouterr().out

    return run


def start(*arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # where the project is not installed
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_stages_and_verification(call, source, tmp_path):
    flags = ("--from", "hf", "--to", "hf", "--dtype", "bf16", "--max-shard-size", "20KB", "--verify")
    code, output = call(*flags, source, tmp_path / "new")
    lines = output.splitlines()
    assert code == 0 and len(lines) == 3
    assert lines[0] == f"{source} (hf): 23,904 parameters in float32 (95.6 KB); generation_config.json"
    assert lines[1].startswith(f"{tmp_path / 'new'} (hf): 5") and lines[1].endswith("KB in 6 files")
    assert "apart from rounding) over 4 prompts of 48 tokens" in lines[2] and lines[2].endswith(": the same model")
    assert lines[2].count("run by transformers") == 1 and "result by transformers" in lines[2]
    stored = open_stored("hf", tmp_path / "new", Options())
    assert {tensor.dtype for tensor in stored.weights.values()} == {torch.bfloat16}


def test_through_our_own_format(call, source, tmp_path):
    """Read by transformers at one end and run by our model at the other, then the other way round."""
    code, output = call("--from", "hf", "--to", "native", "--step", "7", "--verify", source, tmp_path / "ours")
    assert code == 0 and (tmp_path / "ours" / "step_00000007").is_dir()
    assert "source run by transformers" in output and "result by our own model: the same model" in output
    code, output = call("--from", "native", "--to", "hf", "--verify", tmp_path / "ours", tmp_path / "theirs")
    assert code == 0 and "source run by our own model, result by transformers" in output
    weights = [transformers.LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (source, tmp_path / "theirs")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_verification_that_fails(call, source, tmp_path, monkeypatch):
    ours = verify.our_logits
    monkeypatch.setattr(verify, "_fits", lambda stored: stored.origin == str(source))  # the result is run by us
    arguments = ("--from", "hf", "--to", "hf", "--verify", source)
    code, output = call(*arguments, tmp_path / "good")
    assert code == 0 and "result by our own model: the same model" in output
    monkeypatch.setattr(verify, "our_logits", lambda *given: ours(*given) + 0.01)
    code, output = call(*arguments, tmp_path / "bad")
    assert code == 1 and "difference of logits 1.0e-02" in output and "NOT THE SAME MODEL" in output


def test_tokenizer(call, source, tmp_path):
    from megatron_llama.data.tokenizer_training import train_tokenizer

    text = Path(verify.__file__).read_text()
    large = train_tokenizer([text], tmp_path / "large", 500, 10**6, 1)[0]
    with pytest.raises(ConfigError, match="has 500 pieces, and the model a vocabulary of 131"):
        call("--from", "hf", "--to", "hf", "--tokenizer", large.path, source, tmp_path / "a")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        call("--from", "hf", "--to", "hf", "--tokenizer", tmp_path / "absent", source, tmp_path / "a")
    call("--from", "hf", "--to", "hf", "--tokenizer", "none", source, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] is None
    assert not (tmp_path / "a").exists()


def test_errors(call, source, tmp_path):
    convert = ("--from", "hf", "--to", "hf")
    with pytest.raises(CheckpointError, match="absent does not exist"):
        call(*convert, tmp_path / "absent", tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists already: give another destination"):
        call(*convert, source, tmp_path)
    with pytest.raises(ConfigError, match="only read: choose another for --to"):
        call("--from", "hf", "--to", "deepspeed-zero", source, tmp_path / "a")
    with pytest.raises(ConfigError, match="--tp 2: the format hf is the same for every tp; leave it out"):
        call(*convert, "--tp", "2", source, tmp_path / "a")
    with pytest.raises(ConfigError, match="unknown model.preset 'llama-7'; the closest known one is llama-7b"):
        call(*convert, "--model", "llama-7", source, tmp_path / "a")
    with pytest.raises(ConfigError, match="model.num_layers is not given"):
        (tmp_path / "c.toml").write_text("")
        call(*convert, "--config", tmp_path / "c.toml", source, tmp_path / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-shard-size", "5"), "'5' is not a size such as 5GB"),
        (("--tp", "0"), "'0' is not a number from 1"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--model", "llama-7b", "--config", "c.toml"), "not allowed with argument --model"),
        (("--from", "gguf"), "invalid choice: 'gguf'"),
    ],
)
def test_wrong_flags(arguments, message, call, capsys):
    with pytest.raises(SystemExit) as caught:
        call("--from", "hf", "--to", "hf", "source", "destination", *arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), ("7B", 7)])
def test_sizes(text, size):
    assert convert_checkpoint._size(text) == size


def test_as_a_program(source, tmp_path):
    done = start("--from", "hf", "--to", "hf", source, tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} exists already") and "Traceback" not in done.stderr
    done = start("--help")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in convert_checkpoint.MODULES)
