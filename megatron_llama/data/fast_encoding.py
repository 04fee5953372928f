"""The optional fast engine, the package gigatoken: several times faster, and used only where it gives the same ids.

The tokenizer's own package stays the judge: the engine has to agree with it on texts made to be difficult and on the first
documents of the run, each time it is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_llama.data.tokenizer_json import tokenizer_json
from megatron_llama.tokenizer import Tokenizer
from megatron_llama.tokenizer_models import PACKAGE_HINT, without_special_tokens
from parallel.errors import ConfigError, DataError

ENGINES = ("auto", "sentencepiece", "gigatoken")
CACHE_BYTES = 64 << 20  # of text, after which the engine is made anew: its cache of words only grows
DIFFICULT_TEXTS = (
    *(
        "",
        " ",
        "  ",
        "     a",
        "a     ",
        "\n",
        "\t",
        "\r\n",
        "</s>",
        "<s>",
        "a</s>b",
        " <s> <unk>",
        "<0x0A>",
        "<|end_of_text|>",
    ),
    *("\u2581", "a\u2581b", "\u2581\u2581 x", "\u00a0", "\u3000", "\ufeff", "\u0301e\u0301", "\u4e2d\u6587 \u65e5\u672c\u8a9e"),
    *(
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "1234567890",
        "3.14159e-10",
        "x" * 100,
        "ab" * 60,
        "=" * 77,
        "\x00",
    ),
    *(" " * count + "x" for count in range(2, 40)),
    *("-" * count for count in range(2, 40)),
    *(
        "\ud7ff\ue000\ufffd",
        "\U0010ffff",
        "\u05d0\u05d1 \u0627\u0644",
        "if x:\n\t\treturn  {'a': [1, 2]}\n",
        "a\u200bb",
        "\x7f\x80",
    ),
)

EncodeArrays = Callable[[Sequence[str], np.dtype], tuple[np.ndarray, np.ndarray]]


def make_encoder(tokenizer: Tokenizer, engine: str) -> EncodeArrays:
    """What turns texts into ids joined and their numbers per text, with an engine that `choose_engine` has named."""
    return tokenizer.encode_arrays if engine == "sentencepiece" else GigatokenEncoder(tokenizer)


def choose_engine(tokenizer: Tokenizer, wanted: str, documents: Callable[[], Sequence[str]]) -> tuple[str, str]:
    """The engine to use, `sentencepiece` (the tokenizer's own package) or `gigatoken`, and a sentence that says why.

    `documents` gives some of the first documents, on which gigatoken has to agree with the tokenizer.
    Raises ConfigError for an engine that is asked for and not installed, DataError for one that gives other ids.
    """
    if wanted == "sentencepiece":
        return wanted, f"{tokenizer.kind}, as asked for"
    reason = _refuse_gigatoken(tokenizer, documents)
    if reason is None:
        return "gigatoken", "gigatoken: it agrees with the tokenizer on the first documents"
    if wanted == "gigatoken":
        raise (ConfigError if "not installed" in reason else DataError)(f"--engine gigatoken: {reason}")
    return "sentencepiece", f"{tokenizer.kind}, not gigatoken: {reason}"


def _refuse_gigatoken(tokenizer: Tokenizer, documents: Callable[[], Sequence[str]]) -> str | None:
    """Why it cannot be used, or None."""
    if not _is_installed():
        return f"the package is not installed: {PACKAGE_HINT}"
    try:
        encode = GigatokenEncoder(tokenizer)
        for texts in (DIFFICULT_TEXTS, list(documents())):
            if difference := _first_difference(tokenizer, encode, texts):
                return difference
    except DataError as error:
        return str(error)
    return None


def _is_installed() -> bool:
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return False
    return True


def _first_difference(tokenizer: Tokenizer, encode: EncodeArrays, texts: Sequence[str]) -> str | None:
    if not texts:
        return None
    dtype = np.dtype(np.int64)
    expected, lengths = tokenizer.encode_arrays(texts, dtype)
    found, found_lengths = encode(texts, dtype)
    if np.array_equal(lengths, found_lengths) and np.array_equal(expected, found):
        return None
    for text, own, other in zip(texts, _split(expected, lengths), _split(found, found_lengths), strict=True):
        if not np.array_equal(own, other):
            place = next(
                (i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), min(len(own), len(other))
            )
            shown = text if len(text) <= 60 else f"{text[:60]}..."
            return (
                f"it gives other ids than {tokenizer.kind}, from token {place} of {shown!r} on: "
                f"{other[place : place + 5].tolist()} instead of {own[place : place + 5].tolist()}"
            )
    return "it gives other lengths"


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1])


class GigatokenEncoder:
    """Encodes with gigatoken, on one thread. Raises DataError where it cannot load the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._json = json.dumps(_model_json(tokenizer))
        self._path = tokenizer.path
        self._engine: Any = self._load()
        self._characters = 0

    def __call__(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_arrays`."""
        self._characters += sum(map(len, texts))
        if self._characters > CACHE_BYTES:
            self._engine, self._characters = self._load(), 0
        layout = self._engine.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids.astype(dtype), np.diff(offsets)

    def _load(self) -> Any:
        import gigatoken

        try:
            return gigatoken.Tokenizer.from_json(self._json)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            raise DataError(f"gigatoken cannot load {self._path}: {error}") from None


def _model_json(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.kind == "tokenizers":
        return without_special_tokens(json.loads(tokenizer.content))
    if tokenizer.kind == "sentencepiece":
        return without_special_tokens(tokenizer_json(tokenizer))
    raise DataError(f"gigatoken does not read files for {tokenizer.kind}")
