"""The formats other than SentencePiece, beside the packages that define them."""

import argparse
import base64
import json
import random
from pathlib import Path

import pytest

from megatron_llama import tokenizer_models
from megatron_llama.tokenizer import Tokenizer
from megatron_llama.tokenizer_models import LLAMA_3_PATTERN, cut_as_meta
from parallel.errors import DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
NASTY = [
    "",
    " ",
    "  a",
    "\u00e9\u4e2d\U0001f600",
    "</s>",
    "<|begin_of_text|>x",
    "<|eot_id|>",
    "1234567",
    TEXT[:3000],
    "\t\n\r x",
]


def write_json(path, special=("<|begin_of_text|>", "<|end_of_text|>"), text_tokens=("<|extra|>",)):
    """A byte-level tokenizer.json, as LLaMA 3's."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.add_special_tokens(list(special))
    made.add_tokens(list(text_tokens))
    path.write_text(made.to_str(), encoding="utf-8")
    return made


def write_ranks(path, merges=300):
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = sorted({word[:n] for word in TEXT.encode().split() for n in (2, 3) if len(word) >= n})
    for word in words[: merges // 2]:
        for piece in (word[:2], word):
            ranks.setdefault(piece, len(ranks))
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()))
    return ranks


def test_tokenizer_json(tmp_path):
    path = tmp_path / "anything"
    theirs = write_json(path)
    ours = Tokenizer(path)
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.eos_id) == ("tokenizers", 503, 500, 501)
    for text in NASTY:
        ids = ours.encode(text)
        assert not {500, 501} & set(ids) and ours.decode(ids) == text == ours.decode([500, *ids, 501])
        if "<|begin" not in text:
            assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert theirs.encode("<|begin_of_text|>").ids == [500]  # what must not happen
    assert ours.encode("a<|extra|>b")[1:-1] == [502]  # a token of text is one
    assert ours.piece(500) == "<|begin_of_text|>" and ours.contains("<|extra|>")


@pytest.mark.parametrize("as_text", [False, True])
def test_no_merge_can_make_a_control_token(tmp_path, as_text):
    """Converters make merges for every piece, `<s>` too."""
    path = tmp_path / "t.json"
    write_json(path, special=("<s>", "</s>"))
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = None  # as a converted SentencePiece model
    model = content["model"]
    model["vocab"] |= {"s>": 503, "<s>": 500}
    merges = [["s", ">"], ["<", "s>"]]
    model["merges"] = [" ".join(merge) for merge in merges] if as_text else merges
    path.write_text(json.dumps(content))
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    assert 500 in theirs.encode("<s>").ids  # what must not happen
    ours = Tokenizer(path)
    assert 500 not in ours.encode("<s>") and len(ours.encode("<s>")) == 2


def test_tokenizer_json_without_known_control_tokens(tmp_path):
    write_json(tmp_path / "t.json", special=("[START]",))
    with pytest.raises(DataError, match="t.json: the tokenizer has no bos control token"):
        Tokenizer(tmp_path / "t.json")
    write_json(tmp_path / "t.json", special=(), text_tokens=("<s>", "</s>"))  # they could be written in a text
    with pytest.raises(DataError, match="no bos control token"):
        Tokenizer(tmp_path / "t.json")


def test_tiktoken(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = write_ranks(tmp_path / "tokenizer.model")
    n = len(ranks)
    ours = Tokenizer(tmp_path / "tokenizer.model")
    theirs = tiktoken.Encoding("t", pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.eos_id) == ("tiktoken", n + 256, n, n + 1)
    for text in NASTY:
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text) and max(ids, default=0) < n
        assert ours.decode([n, *ids, n + 1]) == text
    names = [ours.piece(n + i) for i in range(256)]
    assert names[:2] == ["<|begin_of_text|>", "<|end_of_text|>"] and names.index("<|eot_id|>") == 9  # 128009 in LLaMA 3
    assert names.index("<|start_header_id|>") == 6 and names.index("<|python_tag|>") == 10 and len(set(names)) == 256


def test_cuts_of_meta(monkeypatch):
    monkeypatch.setattr(tokenizer_models, "LLAMA_3_TEXT_CHARACTERS", 40)
    monkeypatch.setattr(tokenizer_models, "_LONG_RUN", __import__("re").compile(r"\s{6,}|\S{6,}"))
    monkeypatch.setattr(tokenizer_models, "LLAMA_3_RUN_CHARACTERS", 5)
    choose = random.Random(3)
    for _ in range(300):
        runs = (choose.choice(["a", " ", "\u3000", "\x1c", "\u200b"]) * choose.randint(1, 14) for _ in range(9))
        text = "".join(runs)
        parts = list(cut_as_meta(text))
        assert "".join(parts) == text and parts == expected_cuts(text, 40, 5)


def expected_cuts(text, whole, run):
    """The rule in words: so many characters at a time, and in each of them no run of a kind longer than `run`."""
    parts = []
    for start in range(0, len(text), whole):
        chunk = text[start : start + whole]
        begin = run_start = 0
        for i in range(1, len(chunk)):
            if chunk[i].isspace() != chunk[i - 1].isspace():
                run_start = i
            elif i - run_start == run:
                parts.append(chunk[begin:i])
                begin = run_start = i
        parts.append(chunk[begin:])
    return parts


@pytest.mark.parametrize("content", [b"IQ== 0\nIg== 1\n", b"IQ== 0\n=== 1\n", b"IQ== 0\nIg== one\n"])
def test_damaged_tiktoken_files(tmp_path, content):
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(DataError, match="t.model"):
        Tokenizer(tmp_path / "t.model")


@pytest.mark.parametrize(("package", "write"), [("tokenizers", write_json), ("tiktoken", write_ranks)])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, write):
    write(tmp_path / "t")
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(DataError, match=rf"needs the package {package}: pip install 'megatron-llama\[data\]'"):
        Tokenizer(tmp_path / "t")


def test_lone_surrogates(tmp_path):
    write_json(tmp_path / "j")
    write_ranks(tmp_path / "t")
    for name in "jt":
        with pytest.raises(DataError, match=r"lone surrogate U\+D83D"):
            Tokenizer(tmp_path / name).encode("a\ud83db")


def test_json_is_told_from_other_json(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([1, 2]))
    with pytest.raises(DataError, match="JSON that is no tokenizer.json"):
        Tokenizer(tmp_path / "t.json")
