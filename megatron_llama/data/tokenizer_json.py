"""A SentencePiece model as a Hugging Face `tokenizer.json`, for the fast engine and for export.

SentencePiece merges the adjacent pair whose joined piece has the best score; a `tokenizer.json` lists pairs by rank. So
every way to split a piece into two pieces becomes a pair, ranked by the score of the whole. Control, byte and unknown
pieces are never made by merging. The result tokenises as SentencePiece does, with the exception of a literal `</s>` where
the program that reads it looks for special tokens in texts: see `tokenizer_config`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_llama.data.atomic import publish, staging_directory
from megatron_llama.tokenizer import WORD_START, Tokenizer
from parallel.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of sentencepiece_model.proto
BPE = 2


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json`. Raises DataError for a model that it cannot express exactly."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    if tokenizer.kind != "sentencepiece":
        raise DataError(f"{tokenizer.path}: found a file for {tokenizer.kind}, needed a SentencePiece .model")
    model = proto.ModelProto.FromString(tokenizer.content)
    _check_expressible(tokenizer, model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    control = [number for number, (_, _, kind) in enumerate(pieces) if kind in (CONTROL, UNKNOWN)]
    bos = pieces[tokenizer.bos_id][0]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, pieces[number][0]) for number in control],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": WORD_START},
                {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(piece for piece, _, kind in pieces if kind == UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, (piece, _, _) in enumerate(pieces)},
            "merges": _merges({piece: score for piece, score, kind in pieces if kind == NORMAL}),
        },
    }


def _check_expressible(tokenizer: Tokenizer, model: Any) -> None:
    kinds = {piece.type for piece in model.pieces}
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    reasons = (
        (trainer.model_type != BPE, "it is not a BPE model"),
        (not trainer.byte_fallback, "it has no byte fallback"),
        (bool(normalizer.precompiled_charsmap), f"it normalises texts ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "it removes spaces"),
        (not normalizer.add_dummy_prefix, "it puts no space before a text"),
        (not normalizer.escape_whitespaces, f"it does not write spaces as {WORD_START}"),
        (trainer.treat_whitespace_as_suffix, "it puts spaces at the end of words"),
        (USER_DEFINED in kinds or UNUSED in kinds, "it has pieces that are user-defined or unused"),
    )
    for applies, reason in reasons:
        if applies:
            raise DataError(f"{tokenizer.path}: cannot be written as a tokenizer.json that tokenises identically: {reason}")


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """All pairs that make a piece; the best score first, then the longer left part."""
    pairs = []
    for piece, score in scores.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs += [(-score, -len(left), left, right) for left, right in splits if left in scores and right in scores]
    pairs.sort(key=lambda pair: pair[:2])
    return [[left, right] for _, _, left, right in pairs]


def _added(number: int, piece: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": piece, **flags}


def _special(piece: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of `tokenizer_config.json`.

    The class is the one that uses the `tokenizer.json` as it stands: `LlamaTokenizer` of transformers 5 rebuilds it, and
    then differs from SentencePiece on every text that begins with a space. `split_special_tokens` keeps a literal
    `</s>` in a text.
    """
    unknown = json.loads(json.dumps(tokenizer_json(tokenizer)["model"]["unk_token"]))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": unknown,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],  # what LlamaForCausalLM.generate takes
    }


def export_tokenizer(tokenizer: Tokenizer, directory: Path) -> list[Path]:
    """Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the `.model` itself.

    Raises DataError for a model that a `tokenizer.json` cannot express exactly, or where they cannot be written.
    """
    config = tokenizer_config(tokenizer)
    contents = {
        "tokenizer.json": tokenizer_json(tokenizer),
        "special_tokens_map.json": {name: config[name] for name in ("bos_token", "eos_token", "unk_token")},
        "tokenizer_config.json": config,
    }
    with staging_directory(directory / "tokenizer.json") as staging:
        for name, content in contents.items():
            (staging / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(tokenizer.path, staging / "tokenizer.model")
        names = ["tokenizer.model", *contents]
        publish([(staging / name, directory / name) for name in names])
    return [directory / name for name in names]
