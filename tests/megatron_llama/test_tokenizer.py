import argparse
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llama.data.tokenizer_training import LLAMA_SETTINGS, train_tokenizer
from megatron_llama.tokenizer import LONG_TEXT_CHARACTERS, Tokenizer, cut_text
from parallel.errors import DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")


def train(vocab_size=700, **changes):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=vocab_size, minloglevel=2,
        **{**LLAMA_SETTINGS, **changes},
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "t"
    return train_tokenizer([TEXT], prefix, 700, 10**6, 1)[0]


def test_reads_the_model_and_its_identity(tokenizer):
    assert tokenizer.vocab_size == 700
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert tokenizer.piece(3) == "<0x00>" and tokenizer.is_byte(258) and not tokenizer.is_byte(259)


def test_training_is_reproducible(tokenizer, tmp_path):
    again = train_tokenizer([TEXT], tmp_path / "elsewhere", 700, 10**6, 1)[0]
    assert again.sha256 == tokenizer.sha256
    threads = train_tokenizer([TEXT], tmp_path / "threads", 700, 10**6, 3)[0]  # the number is part of the file
    assert [threads.piece(token) for token in range(700)] == [tokenizer.piece(token) for token in range(700)]
    vocabulary = Path(f"{tmp_path}/elsewhere.vocab").read_text(encoding="utf-8").splitlines()
    assert vocabulary[:3] == ["<unk>\t0", "<s>\t0", "</s>\t0"] and len(vocabulary) == 700
    assert vocabulary[260].endswith("\t-1")


def test_training_on_a_sample_is_the_same_in_every_process(tmp_path):
    """SentencePiece's own choice of sentences is not, so it is made here."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of {n * n % 977} in {TEXT[n : n + 40]!r}" for n in range(3000)), encoding="utf-8")
    models = []
    for run in range(2):
        flags = ["--input", text, "--output", tmp_path / f"{run}", "--vocab-size", "500", "--max-sentences", "1000"]
        subprocess.run([sys.executable, "tools/train_tokenizer.py", *flags], check=True, capture_output=True)
        models.append((tmp_path / f"{run}.model").read_bytes())
    assert models[0] == models[1]
    whole = train_tokenizer([text.read_text(encoding="utf-8")], tmp_path / "whole", 500, 10**6, 1)[0]
    assert whole.path.read_bytes() != models[0]  # it was a sample


def test_pieces_follow_llama_settings(tokenizer):
    pieces = [tokenizer.piece(token) for token in range(259, tokenizer.vocab_size)]
    assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))  # split_digits
    assert "\u2581\u2581" in pieces  # allow_whitespace_only_pieces
    assert tokenizer.decode(tokenizer.encode("\ufb01 \u2460")) == "\ufb01 \u2460"  # no normalisation


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    # as every SentencePiece model, it takes U+2581 for a space
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", ["</s>", "<s>", "a</s>b <s> <unk>", "<0x0A>"])
def test_text_cannot_inject_control_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2]) == text


def test_encode_batch_and_empty(tokenizer):
    assert tokenizer.encode_batch(["", "a b", " "]) == [[], tokenizer.encode("a b"), tokenizer.encode(" ")]


LONG_TEXTS = {
    "words": "alpha beta  gamma\n" * 3000,
    "spaces": "a" + " " * 40000 + "b " * 20000,
    "no space": "x" * 40000,
    "literal word start": "a\u2581 b\u2581\u2581 c " * 5000,
    "space at the end": "word " * 9000,
    "source": TEXT * 2,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_long_texts_are_encoded_as_one(tokenizer, name):
    text = LONG_TEXTS[name]
    assert tokenizer.cuts_at_spaces and len(text) > LONG_TEXT_CHARACTERS
    assert tokenizer.encode(text) == tokenizer._model.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab \u2581\n", min_size=1, max_size=200), st.integers(1, 20))
def test_cuts_change_no_id(tokenizer, text, part_characters):
    parts = list(cut_text(text, part_characters))
    assert " ".join(parts) == text
    assert [token for part in parts for token in tokenizer._model.encode(part)] == tokenizer._model.encode(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"treat_whitespace_as_suffix": True},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc"},
        {"split_by_whitespace": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_models_that_cannot_be_cut_are_recognised(tmp_path, changes):
    path = tmp_path / "t.model"
    path.write_bytes(train(**changes))
    tokenizer = Tokenizer(path)
    assert not tokenizer.cuts_at_spaces
    text = "alpha  beta \ufb01 " * 3000
    assert tokenizer.encode(text) == tokenizer._model.encode(text)


def test_lone_surrogate(tokenizer):
    with pytest.raises(DataError, match=r"lone surrogate U\+D83D"):
        tokenizer.encode("a\ud83db")


@pytest.mark.parametrize("token", [-1, 700])
def test_decode_refuses_foreign_ids(tokenizer, token):
    with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of 700"):
        tokenizer.decode([5, token])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the file is empty"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "3 different pieces"),
        (b'{"version": "1.0"}', "JSON that is no tokenizer.json"),
        (b"hello world", "begin with b'hello world'"),
        (train()[:5000], "5000 bytes"),
    ],
    ids=["empty", "tiktoken", "json", "text", "truncated"],
)
def test_foreign_files_are_named(tmp_path, content, found):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and found in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="missing.model: cannot read the tokenizer: No such file"):
        Tokenizer(tmp_path / "missing.model")


def test_model_without_control_tokens_is_refused(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train(eos_id=-1))
    with pytest.raises(DataError, match="no eos control token"):
        Tokenizer(path)


def test_model_whose_control_token_is_text_is_refused(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train(user_defined_symbols=["</s>"]))
    with pytest.raises(DataError, match="no eos control token"):
        Tokenizer(path)
