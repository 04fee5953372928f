"""Generation: the choice of a token, and the same tokens in every layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_llama.generate import Generator, Sampling, choose
from megatron_llama.inference import open_checkpoint
from megatron_llama.tokenizer import Tokenizer
from parallel.launch import Launch
from tests.megatron_llama.programs import SEQUENCE_LENGTH, VOCAB_SIZE, full_weights, model_config, succeed
from tests.parity import hugging_face
from tests.ranks import run_ranks

GREEDY = Sampling(temperature=0.0)
PROMPT = [1, 40, 41, 300, 7]
LAYOUTS = {
    "tp2-sp": (2, ["--parallel.tp", "2"]),
    "tp2": (2, ["--parallel.tp", "2", "--parallel.sequence_parallel", "false"]),
    "tp4": (4, ["--parallel.tp", "4"]),
    "pp2": (2, ["--parallel.pp", "2"]),
    "tp2-pp2": (4, ["--parallel.tp", "2", "--parallel.pp", "2"]),
    "dp2": (2, []),
}


def generate_on(
    rank: int, size: int, checkpoint: Path, flags: list[str], prompt: list[int], sampling: Sampling, options: dict
) -> list[int]:
    options = {"max_tokens": 12, "vocab_size": VOCAB_SIZE, "stop": None} | options
    runtime, _ = open_checkpoint(str(checkpoint), flags, Launch(rank, rank, size, size))
    generator = Generator(runtime, sampling, options["vocab_size"])
    return generator.generate(prompt, options["max_tokens"], options["stop"])


def generate(
    run: Path, layout: tuple[int, list[str]] = (1, []), prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, **options
) -> list[int]:
    """New ids, which all ranks agree on."""
    size, flags = layout
    results = run_ranks(size, generate_on, run, flags, prompt, sampling, options)
    assert all(result == results[0] for result in results)
    return results[0]


def reference(run: Path, prompt: list[int], max_tokens: int = 12) -> list[int]:
    """The greedy continuation by transformers."""
    module = hugging_face.build(model_config(), full_weights(run / "checkpoints/step_00000006"))
    settings = {"do_sample": False, "max_new_tokens": max_tokens, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt])
    return module.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


# the choice of one token

LOGITS = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()


def chosen(sampling: Sampling, times: int = 2000) -> Counter:
    random = torch.Generator().manual_seed(sampling.seed)
    return Counter(choose(LOGITS, sampling, random).item() for _ in range(times))


def test_greedy_takes_the_likeliest() -> None:
    assert chosen(GREEDY, 5) == {1: 5}


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.01, {1}), (0.499, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {1, 2, 3}), (0.94, {1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_only_the_nucleus(top_p: float, nucleus: set[int]) -> None:
    assert set(chosen(Sampling(1.0, top_p))) == nucleus


def test_the_nucleus_ends_where_its_sum_is_reached() -> None:
    half = torch.tensor([0.5, 0.25, 0.25]).log()
    random = torch.Generator().manual_seed(0)
    assert {choose(half, Sampling(1.0, 0.5), random).item() for _ in range(200)} == {0}


def test_frequencies_follow_the_temperature() -> None:
    times = 2000
    for temperature, share in ((1.0, 0.5), (0.5, 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)), (100.0, 0.25)):
        found = chosen(Sampling(temperature, 1.0), times)[1] / times
        assert abs(found - share) < 0.045  # four standard deviations, at most 0.011 each


# the same tokens in every layout


def test_greedy_is_that_of_transformers(run: Path) -> None:
    assert generate(run) == reference(run, PROMPT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_in_every_layout(layout: str, run: Path) -> None:
    assert generate(run, LAYOUTS[layout]) == generate(run)


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-pp2"])
@pytest.mark.parametrize("length", [1, 2, 3, 2 * SEQUENCE_LENGTH + 5])
def test_prompts_of_any_length(layout: str, length: int, run: Path) -> None:
    """Longer than the training's windows too: positions go on."""
    prompt = [1 + (17 * i) % (VOCAB_SIZE - 1) for i in range(length)]
    expected = reference(run, prompt, 4)
    assert generate(run, LAYOUTS[layout], prompt, max_tokens=4) == expected
    assert generate(run, prompt=prompt, max_tokens=4) == expected


def test_sampling_repeats_with_its_seed(run: Path) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
    first = generate(run, sampling=sampling)
    assert generate(run, sampling=sampling) == first
    assert generate(run, LAYOUTS["pp2"], sampling=sampling) == first  # its logits are the same bits
    assert generate(run, sampling=replace(sampling, seed=4)) != first
    assert generate(run, LAYOUTS["tp2-pp2"], sampling=sampling) == generate(run, LAYOUTS["tp2-pp2"], sampling=sampling)


@pytest.mark.parametrize("layout", [(1, []), LAYOUTS["tp2-pp2"]], ids=["alone", "tp2-pp2"])
def test_the_end_token_stops(layout: tuple[int, list[str]], run: Path) -> None:
    ids = generate(run)
    stop = ids[5]
    assert generate(run, layout, stop=stop) == ids[: ids.index(stop)]


def test_only_ids_of_the_tokenizer_are_chosen(run: Path) -> None:
    """A model may have more rows than its tokenizer has pieces."""
    assert max(generate(run)) >= 200
    assert max(generate(run, vocab_size=200)) < 200
    assert max(generate(run, LAYOUTS["tp2-sp"], vocab_size=200, sampling=Sampling(2.0, 1.0))) < 200


# the program


def test_program_prints_the_prompt_and_its_continuation(run: Path, project: Path) -> None:
    tokenizer = Tokenizer(project / "tokenizer.model")
    text = "def parse(self, x"
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    new = reference(run, prompt, 10)
    assert tokenizer.eos_id not in new
    command = ["generate", "--checkpoint", run, "--prompt", text, "--max-tokens", 10]
    out = succeed(*command, "--greedy")
    assert out == text + tokenizer.decode(prompt + new)[len(tokenizer.decode(prompt)) :] + "\n"
    for ranks, flags in (LAYOUTS["tp2-sp"], LAYOUTS["pp2"]):
        assert succeed(*command, "--temperature", 0, *flags, ranks=ranks) == out


def test_program_with_an_empty_prompt_and_a_step_directory(run: Path) -> None:
    command = ["generate", "--checkpoint", run / "checkpoints/step_00000002", "--prompt", "", "--max-tokens", 3]
    assert succeed(*command, "--seed", 5) == succeed(*command, "--seed", 5)


def test_layout_of_the_checkpoint_is_kept_where_it_fits(workplace: Path) -> None:
    """A checkpoint of four ranks generates on four, on one, and on three."""
    succeed("train", "--config", "config.toml", "--parallel.tp", 2, "--parallel.pp", 2, "--train.exit_step", 1, ranks=4)
    texts = {succeed("generate", "--checkpoint", "run", "--prompt", "x", "--greedy", ranks=ranks) for ranks in (4, 3, 1)}
    assert len(texts) == 1
