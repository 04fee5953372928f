"""The tokenizer of a written folder, beside the packages that define each kind."""

from __future__ import annotations

import argparse
import base64
import json
import random
from pathlib import Path

import pytest
import torch

from megatron_llama.config import ModelConfig
from megatron_llama.data.tokenizer_training import train_tokenizer
from megatron_llama.interop.formats import convert, open_stored
from megatron_llama.interop.hugging_face_tokenizer import with_tokenizer
from megatron_llama.interop.stored_model import Options, StoredModel, StoredTensor, logical_shapes
from megatron_llama.tokenizer import Tokenizer
from parallel.errors import DataError

transformers = pytest.importorskip("transformers")

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")
MODEL = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, ffn_hidden_size=16, vocab_size=2000)
ALPHABET = (
    *("a", "e", "in", "the ", "import ", "argparse", "'s", "'LL", ".", "--", "1", "42", " ", "  ", "\t", "\n", "\r\n", "\xa0"),
    *("</s>", "<s>", "<|end_of_text|>", "\u2581", "\u200b", "\ufb01", "\x00", "\U0010ffff", "\u00e9", "e\u0301"),
    *("\u4e2d\u6587", "\U0001f600", "\U0001f469\u200d\U0001f680", "\ufdfa"),
)


def nasty_texts(count: int) -> list[str]:
    random.seed(7)
    made = ["".join(random.choices(ALPHABET, k=random.randint(1, 12))) for _ in range(count)]
    return ["", " ", "  a", "qzxjk", "qzxjkqzxjk", "aaaaaaa" + " " * 17 + "b", "\n\n\n", TEXT[:2000], *made]


def store(files: dict[str, bytes]) -> StoredModel:
    """A model of zeros with these files."""
    zeros = {name: StoredTensor(s, torch.float32, lambda s=s: torch.zeros(s)) for name, s in logical_shapes(MODEL).items()}
    return StoredModel("memory", MODEL, zeros, files=files)


def written(folder: Path, files: dict[str, bytes]):
    convert(store(files), "hf", folder, Options())
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Tokenizer:
    return train_tokenizer([TEXT], tmp_path_factory.mktemp("tokenizer") / "t", 700, 10**6, 1)[0]


def ranks_file() -> bytes:
    """Byte pairs merged as tiktoken's own training does, most frequent first."""
    words = [[bytes([byte]) for byte in word.encode()] for word in (TEXT[:20_000] + " " * 40).split("\n")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 599:
        pairs: dict[bytes, int] = {}
        for word in words:
            for left, right in zip(word, word[1:], strict=False):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(pairs, key=pairs.__getitem__)
        ranks[best] = len(ranks)
        words = [_merge(word, best) for word in words]
    ranks[b"qzxjk"] = len(ranks)  # no two pieces make it: only as a whole is it found
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())


def _merge(word: list[bytes], best: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for piece in word:
        if merged and merged[-1] + piece == best:
            merged[-1] = best
        else:
            merged.append(piece)
    return merged


def test_sentencepiece(sentencepiece_model, tmp_path):
    ours = sentencepiece_model
    theirs = written(tmp_path / "hf", {"tokenizer.model": ours.content})
    texts = nasty_texts(500)
    assert sum("</s>" in text for text in texts) > 50 and sum(text.startswith(" ") for text in texts) > 20
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.encode("a") == [1, *ours.encode("a")]
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == ours.content
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "hf" / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (1, 2)


def test_generating_with_what_is_written(sentencepiece_model, tmp_path):
    theirs = written(tmp_path / "hf", {"tokenizer.model": sentencepiece_model.content})
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert "token_type_ids" not in settings["model_input_names"]  # which transformers 4 would make, and not take
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = module.generate(**theirs("import", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert ids[0].tolist() == [1, *sentencepiece_model.encode("import"), 0, 0]  # weights of zero: the first id is the likeliest


def test_tiktoken(tmp_path):
    pytest.importorskip("tiktoken")
    content = ranks_file()
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours = Tokenizer(tmp_path / "tokenizer.model")
    theirs = written(tmp_path / "hf", {"tokenizer.model": content})
    for text in nasty_texts(500):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.decode(ids) == text
    assert theirs.encode("a")[0] == ours.bos_id == 600 and theirs.eos_token_id == ours.eos_id == 601
    assert theirs.convert_ids_to_tokens(600 + 9) == "<|eot_id|>" and len(theirs) == ours.vocab_size


def test_a_tokenizer_json_is_kept(sentencepiece_model, tmp_path):
    """Through our own format too, where a tokenizer has one name: its kind is told by the content."""
    written(tmp_path / "first", {"tokenizer.model": sentencepiece_model.content})
    (tmp_path / "first" / "tokenizer.model").unlink()
    (tmp_path / "first" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "first" / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_p": 0.9}')
    files = dict(open_stored("hf", tmp_path / "first", Options()).files)
    content = (tmp_path / "first" / "tokenizer.json").read_bytes()
    assert files["tokenizer.model"] == files["tokenizer.json"] == content
    convert(store(files), "hf", tmp_path / "all", Options())
    names = [path.name for path in (tmp_path / "first").iterdir()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "all").iterdir())
    for name in set(names) - {"config.json"}:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert json.loads((tmp_path / "all" / "config.json").read_text())["eos_token_id"] == [2, 3]
    convert(store({"tokenizer.model": content}), "hf", tmp_path / "one", Options())
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == content
    assert not (tmp_path / "one" / "tokenizer.model").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert theirs.encode(" x</s>") == [1, *sentencepiece_model.encode(" x</s>")]


def test_settings_of_the_source_stay(sentencepiece_model, tmp_path):
    """All but the class, which tokenises in another way."""
    given = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages }}", "model_max_length": 77}
    files = {"tokenizer.model": sentencepiece_model.content, "tokenizer_config.json": json.dumps(given).encode()}
    theirs = written(tmp_path / "hf", files)
    assert theirs.chat_template == "{{ messages }}" and theirs.model_max_length == 77
    assert theirs.encode(" a", add_special_tokens=False) == sentencepiece_model.encode(" a")


def test_another_tokenizer_replaces_all_files(sentencepiece_model):
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "generation_config.json": b"{}", "LICENSE": b"free"}
    assert with_tokenizer(files, b"new") == {"tokenizer.model": b"new", "LICENSE": b"free"}
    assert with_tokenizer(files, None) == {"LICENSE": b"free"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"damaged", "^tokenizer.model: found 7 bytes.*; --tokenizer FILE gives another"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", b"[]", "generation_config.json holds no JSON object"),
    ],
)
def test_damaged_files(name, content, message, sentencepiece_model, tmp_path):
    with pytest.raises(DataError, match=message):
        convert(store({"tokenizer.model": sentencepiece_model.content, name: content}), "hf", tmp_path / "hf", Options())
    assert list(tmp_path.iterdir()) == []
