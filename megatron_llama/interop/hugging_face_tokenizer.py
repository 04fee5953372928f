"""The tokenizer's files in a Hugging Face folder, made from whichever tokenizer a model brings along.

A `tokenizer.json` that the model has is kept. Otherwise one is made that gives the same ids, from a SentencePiece model
(data/tokenizer_json.py) or from LLaMA 3's tiktoken file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_llama.data.tokenizer_json import tokenizer_config, tokenizer_json
from megatron_llama.tokenizer import Tokenizer
from megatron_llama.tokenizer_models import LLAMA_3_PATTERN, parse_ranks
from parallel.errors import DataError

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")


def with_tokenizer(files: Mapping[str, bytes], content: bytes | None) -> dict[str, bytes]:
    """The files of a model with another tokenizer, of any kind, or with none."""
    kept = {name: file for name, file in files.items() if name not in (*TOKENIZER_FILES, GENERATION_CONFIG)}
    return kept if content is None else kept | {"tokenizer.model": content}


def tokenizer_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that transformers wants, from those of a model. Raises DataError where a tokenizer cannot be expressed."""
    carried = {name: files[name] for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if name in files}
    model = carried.get("tokenizer.model", b"")
    if model.startswith(b"{"):
        carried.setdefault("tokenizer.json", carried.pop("tokenizer.model"))
    return carried if not model or "tokenizer.json" in files else carried | _made_files(model, carried)


def _made_files(model: bytes, carried: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a tokenizer's own file has to be completed with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model)
        try:
            return _completed(Tokenizer(path), carried)
        except DataError as error:
            found = str(error).replace(str(path), path.name)
            raise DataError(f"{found}; --tokenizer FILE gives another, --tokenizer none leaves it out") from error


def _completed(tokenizer: Tokenizer, carried: Mapping[str, bytes]) -> dict[str, bytes]:
    config, made = _config(tokenizer), {}
    if tokenizer.kind == "sentencepiece":
        config, made["tokenizer.json"] = tokenizer_config(tokenizer), _dump(tokenizer_json(tokenizer))
    elif tokenizer.kind == "tiktoken":
        made["tokenizer.json"] = _dump(tiktoken_json(tokenizer))
    made["tokenizer_config.json"] = _dump(_parsed(carried, "tokenizer_config.json") | config)
    made["special_tokens_map.json"] = _dump({name: config[name] for name in config if name in SPECIAL_TOKENS})
    if GENERATION_CONFIG not in carried:
        made[GENERATION_CONFIG] = generation_config({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    return made


def generation_config(fields: Mapping[str, Any]) -> bytes:
    """The `generation_config.json` of a model that is known by its config.json, or by its tokenizer, alone."""
    return _dump({"_from_model_config": True, **text_ids(fields)})


def text_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin and end a text, as far as a config has them; there may be several that end one."""
    return {name: fields[name] for name in ("bos_token_id", "eos_token_id") if fields.get(name) is not None}


def generation_ids(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The ids in a model's `generation_config.json`. Raises DataError where it is damaged."""
    return text_ids(_parsed(files, GENERATION_CONFIG))


def _parsed(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        fields = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise DataError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{name} holds no JSON object")
    return fields


def tiktoken_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A `tokenizer.json` of LLaMA 3's tiktoken file.

    tiktoken merges the adjacent pair whose joined bytes have the lowest rank: every way to split a piece into two pieces
    is a merge, in the order of the whole's rank.
    """
    ranks = parse_ranks(tokenizer.path, tokenizer.content)
    text = {piece: "".join(BYTE_CHARACTERS[byte] for byte in piece) for piece in ranks}
    special = {number: tokenizer.piece(number) for number in range(len(ranks), tokenizer.vocab_size)}
    bos = special[tokenizer.bos_id]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for number, name in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA_3_PATTERN}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text[piece]: rank for piece, rank in ranks.items()},
            "merges": [[text[left], text[right]] for left, right in _merges(ranks)],
        },
    }


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs that make a piece; the lowest rank first, then the longer left part."""
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        splits = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        merges += [(left, right) for left, right in splits if left in ranks and right in ranks]
    return merges


def _byte_characters() -> list[str]:
    """How a byte-level `tokenizer.json` writes each byte: printable ones as in Latin-1, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a `tokenizer_config.json` for a tokenizer that lacks one."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # what LlamaForCausalLM.generate takes
    }


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
