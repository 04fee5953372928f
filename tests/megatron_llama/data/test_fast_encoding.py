"""gigatoken, and the tokenizer.json that it and Hugging Face's packages read, against sentencepiece."""

import argparse
import base64
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_llama.data import fast_encoding
from megatron_llama.data.fast_encoding import DIFFICULT_TEXTS, GigatokenEncoder, choose_engine
from megatron_llama.data.preprocess import Settings, preprocess
from megatron_llama.data.tokenizer_json import export_tokenizer, tokenizer_json
from megatron_llama.data.tokenizer_training import LLAMA_SETTINGS, train_tokenizer
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import ConfigError, DataError

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
HTML = "<html><s>old</s> <s>gone</s></html> s> /s> </s> <s <s>\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT, HTML], tmp_path_factory.mktemp("tokenizer") / "t", 900, 10**6, 1)[0]


def nasty_documents(count):
    choose = random.Random(11)
    alphabet = [
        *(
            "</s>",
            "<s>",
            "<unk>",
            "s>",
            "<0x0A>",
            " ",
            "  ",
            " " * 9,
            "\u2581",
            "\t",
            "\n",
            "\r\n",
            "\u00a0",
            "\u3000",
            "\ufeff",
        ),
        *(
            "\u0301",
            "\u00e9",
            "\u4e2d\u6587",
            "\U0001f468\u200d\U0001f469",
            "0123",
            "3.14",
            "--",
            "=====",
            "aaaa",
            "x" * 20,
            "\x00",
        ),
        *(TEXT[i : i + 25] for i in range(0, 2500, 50)),
    ]
    return ["".join(choose.choices(alphabet, k=choose.randint(0, 30))) for _ in range(count)]


def test_gigatoken_gives_the_same_ids(tokenizer):
    pytest.importorskip("gigatoken")
    encode, dtype = GigatokenEncoder(tokenizer), np.dtype(np.uint16)
    for texts in (nasty_documents(3000), list(DIFFICULT_TEXTS), [TEXT * 3], [""]):
        expected, found = tokenizer.encode_arrays(texts, dtype), encode(texts, dtype)
        assert found[0].dtype == dtype and np.array_equal(expected[0], found[0]) and np.array_equal(expected[1], found[1])


@pytest.fixture
def tiktoken_tokenizer(tmp_path):
    """A file as LLaMA 3's, with a piece for every beginning of a word."""
    pytest.importorskip("tiktoken")
    words = sorted({word[:end] for word in TEXT.encode().split() for end in range(2, len(word) + 1)}, key=lambda w: (len(w), w))
    pieces = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *words, b"'s", b" the"])
    (tmp_path / "ranks").write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % n for n, piece in enumerate(pieces)))
    return Tokenizer(tmp_path / "ranks")


def test_gigatoken_gives_the_ids_of_tiktoken(tiktoken_tokenizer):
    pytest.importorskip("gigatoken")
    encode, dtype = GigatokenEncoder(tiktoken_tokenizer), np.dtype(np.int32)
    newest = ["\U000328f8's", "\u0c5c's", "a \U0001e6c7'd b"]  # letters that only one of the two packages knows
    long = ["x" * 60_003 + " " * 70_000 + "\u3000" * 30_000 + "one two " * 60_000]  # Meta's code cuts it, also in a word
    for texts in (nasty_documents(1000), newest, long, [TEXT], ["", ""], []):
        expected, found = tiktoken_tokenizer.encode_arrays(texts, dtype), encode(texts, dtype)
        assert np.array_equal(expected[0], found[0]) and np.array_equal(expected[1], found[1])
    assert choose_engine(tiktoken_tokenizer, "auto", lambda: [TEXT]).name == "gigatoken"


def test_workers_load_the_vocabulary_of_their_parent(tokenizer, monkeypatch):
    pytest.importorskip("gigatoken")
    vocabulary = choose_engine(tokenizer, "gigatoken", list).vocabulary
    monkeypatch.setattr(fast_encoding, "tokenizer_json", None)
    ids, _ = fast_encoding.make_encoder(tokenizer, "gigatoken", vocabulary)([TEXT], np.dtype(np.uint16))
    assert ids.tolist() == tokenizer.encode(TEXT)


def test_a_new_engine_when_its_cache_is_full(tokenizer, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(fast_encoding, "CACHE_CHARACTERS", 10_000)
    encode, dtype = GigatokenEncoder(tokenizer), np.dtype(np.uint16)
    engines = set()
    for _ in range(5):
        assert np.array_equal(encode([TEXT[:9000]], dtype)[0], tokenizer.encode(TEXT[:9000]))
        engines.add(encode._engine)
    assert len(engines) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_both_engines_write_the_same_files(tokenizer, tmp_path, workers):
    pytest.importorskip("gigatoken")
    (tmp_path / "long.txt").write_text(TEXT * 15, encoding="utf-8")
    lines = [json.dumps({"text": text}) + "\n" for text in [*nasty_documents(500), TEXT]]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    for engine in ("sentencepiece", "auto"):
        settings = Settings(str(tokenizer.path), append_bos=True, append_eos=True, engine=engine)
        summary = preprocess([tmp_path], tmp_path / engine / "d", settings, workers, piece_bytes=300_000)
    assert summary.engine_note == "gigatoken: it agrees with the tokenizer on the first documents"
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"auto/d{suffix}").read_bytes() == (tmp_path / f"sentencepiece/d{suffix}").read_bytes()


class WrongEncoder:
    """Agrees with the tokenizer but on one document."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, dtype):
        ids, lengths = self.tokenizer.encode_arrays(texts, dtype)
        if "one two" in texts:
            ids[-1] += 1
        return ids, lengths


def test_an_engine_that_differs_is_refused(tokenizer, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(fast_encoding, "GigatokenEncoder", WrongEncoder)
    engine, note, _ = choose_engine(tokenizer, "auto", lambda: ["zero", "one two"])
    assert engine == "sentencepiece"
    assert note.startswith("sentencepiece, not gigatoken: it gives other ids than sentencepiece, from token ")
    assert "of 'one two' on: [" in note
    with pytest.raises(DataError, match="--engine gigatoken: it gives other ids than sentencepiece"):
        choose_engine(tokenizer, "gigatoken", lambda: ["one two"])
    assert choose_engine(tokenizer, "sentencepiece", None) == ("sentencepiece", "sentencepiece, as asked for", "")


def test_an_engine_that_is_not_installed(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert choose_engine(tokenizer, "auto", list)[0] == "sentencepiece"
    with pytest.raises(
        ConfigError, match=r"--engine gigatoken: the package is not installed: pip install 'megatron-llama\[data\]'"
    ):
        choose_engine(tokenizer, "gigatoken", list)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"add_dummy_prefix": False}, "it puts no space before a text"),
        ({"normalization_rule_name": "nfkc"}, "it normalises texts"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces at the end of words"),
        ({"user_defined_symbols": ["<mark>"]}, "it has pieces that are user-defined or unused"),
        ({"model_type": "unigram"}, "it is not a BPE model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_expressed(tmp_path, changes, reason):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=600, minloglevel=2,
        **{**LLAMA_SETTINGS, **changes},
    )  # fmt: skip
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(tmp_path / "t.model")
    with pytest.raises(DataError, match=f"tokenises identically: {reason}"):
        tokenizer_json(tokenizer)
    assert choose_engine(tokenizer, "auto", list)[0] == "sentencepiece"


def test_no_merge_makes_a_control_token(tokenizer):
    assert not {"<unk>", "<s>", "</s>", "<0x0A>"} & {"".join(merge) for merge in tokenizer_json(tokenizer)["model"]["merges"]}


# Export


def test_exported_files_tokenise_identically(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    files = export_tokenizer(tokenizer, tmp_path / "hf")
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "hf").iterdir())
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')  # as beside a model
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    documents = nasty_documents(1000)
    assert sum(text.startswith(" ") for text in documents) > 50 and sum("</s>" in text for text in documents) > 100
    for text in documents:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.encode("Hello") == [1, *tokenizer.encode("Hello")]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, len(theirs)) == (1, 2, 0, 900)
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.content


def test_our_reader_of_the_exported_json_agrees(tokenizer, tmp_path):
    export_tokenizer(tokenizer, tmp_path)
    exported = Tokenizer(tmp_path / "tokenizer.json")
    assert (exported.kind, exported.bos_id, exported.eos_id, exported.vocab_size) == ("tokenizers", 1, 2, 900)
    for text in nasty_documents(300):
        assert exported.encode(text) == tokenizer.encode(text)
    pytest.importorskip("gigatoken")
    assert choose_engine(exported, "auto", lambda: nasty_documents(50))[0] == "gigatoken"
