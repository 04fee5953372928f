"""The optional fast engine, the package gigatoken: several times faster, and used only where it gives the same ids.

The tokenizer's own package stays the judge: the engine has to agree with it on texts made to be difficult and on the first
documents of the run, each time it is chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_llama.data.tokenizer_json import tokenizer_json
from megatron_llama.tokenizer import Tokenizer
from megatron_llama.tokenizer_models import LLAMA_3_RUN_CHARACTERS, PACKAGE_HINT, cut_as_meta, without_special_tokens
from parallel.errors import ConfigError, DataError

ENGINES = ("auto", "sentencepiece", "gigatoken")
CACHE_CHARACTERS = 16 << 20  # of text, after which the engine is made anew: its cache of words only grows
TIKTOKEN_SCHEME = "gpt4"  # its name for a pattern that splits every text as LLAMA_3_PATTERN does
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
        "I'll, WE'VE, it'S, 'Tis ''s '\u017f 12345\u0661\u00b2\u2160",
        "\U000328f8's\u0c5c'd",
    ),
)

# Letters and numbers since Unicode 17, as which gigatoken's tables know them, while tiktoken's and tokenizers' do not.
_NEWEST_CHARACTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011ddb"
    "\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    "\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)

EncodeArrays = Callable[[Sequence[str], np.dtype], tuple[np.ndarray, np.ndarray]]


class Engine(NamedTuple):
    """What encodes: `sentencepiece` (the tokenizer's own package) or `gigatoken`; a sentence that says why; the vocabulary
    that the latter loads."""

    name: str
    note: str
    vocabulary: str = ""


def make_encoder(tokenizer: Tokenizer, engine: str, vocabulary: str = "") -> EncodeArrays:
    """What turns texts into ids joined and their numbers per text, with an engine that `choose_engine` has chosen."""
    return tokenizer.encode_arrays if engine == "sentencepiece" else GigatokenEncoder(tokenizer, vocabulary)


def choose_engine(tokenizer: Tokenizer, wanted: str, documents: Callable[[], Sequence[str]]) -> Engine:
    """The engine to use where `wanted` of ENGINES is asked for.

    `documents` gives some of the first documents, on which gigatoken has to agree with the tokenizer.
    Raises ConfigError for an engine that is asked for and not installed, DataError for one that gives other ids.
    """
    if wanted == "sentencepiece":
        return Engine(wanted, f"{tokenizer.kind}, as asked for")
    if not _is_installed():
        if wanted == "gigatoken":
            raise ConfigError(f"--engine gigatoken: the package is not installed: {PACKAGE_HINT}")
        return Engine("sentencepiece", f"{tokenizer.kind}, not gigatoken: the package is not installed: {PACKAGE_HINT}")
    try:
        encoder = GigatokenEncoder(tokenizer)
        for texts in (DIFFICULT_TEXTS, list(documents())):
            _check_agreement(tokenizer, encoder, texts)
    except DataError as error:
        if wanted == "gigatoken":
            raise DataError(f"--engine gigatoken: {error}") from error
        return Engine("sentencepiece", f"{tokenizer.kind}, not gigatoken: {error}")
    return Engine("gigatoken", "gigatoken: it agrees with the tokenizer on the first documents", encoder.vocabulary)


def _is_installed() -> bool:
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return False
    return True


def _check_agreement(tokenizer: Tokenizer, encode: EncodeArrays, texts: Sequence[str]) -> None:
    """Raises DataError at the first text whose ids differ."""
    if not texts:
        return
    dtype = np.dtype(np.int64)
    expected, found = (_split(*encode_arrays(texts, dtype)) for encode_arrays in (tokenizer.encode_arrays, encode))
    for text, own, other in zip(texts, expected, found, strict=True):
        if np.array_equal(own, other):
            continue
        short = min(len(own), len(other))
        place = next(iter(np.flatnonzero(own[:short] != other[:short])), short)
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise DataError(
            f"it gives other ids than {tokenizer.kind}, from token {place} of {shown!r} on: "
            f"{other[place : place + 5].tolist()} instead of {own[place : place + 5].tolist()}"
        )


def _split(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1])


class GigatokenEncoder:
    """Encodes with gigatoken, on one thread, text by text: its calls for many texts are slower and import much more.

    `vocabulary` is what another encoder for the same tokenizer had: making it anew takes time and memory.
    Raises DataError for a tokenizer that gigatoken cannot load.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: str = "") -> None:
        self.vocabulary = vocabulary or _vocabulary(tokenizer)
        self._tokenizer = tokenizer
        self._engine: Any = self._load()
        self._characters = 0  # that it has encoded

    def __call__(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_arrays`."""
        if self._characters > CACHE_CHARACTERS:
            self._engine = None  # first, so that there are never two of them in memory
            self._engine, self._characters = self._load(), 0
        self._characters += sum(map(len, texts))
        encode = self._engine.encode if self._tokenizer.kind == "sentencepiece" else self._encode_words
        ids = [encode(text) for text in texts]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.concatenate(ids, dtype=dtype, casting="unsafe") if ids else np.empty(0, dtype), lengths

    def _encode_words(self, text: str) -> np.ndarray | list[int]:
        """The ids of a text that the tokenizer first splits at letters and numbers."""
        if not text.isascii() and _NEWEST_CHARACTERS.search(text):
            return self._tokenizer.encode(text)
        if self._tokenizer.kind != "tiktoken" or len(text) <= LLAMA_3_RUN_CHARACTERS:
            return self._engine.encode(text)
        return np.concatenate([self._engine.encode(part) for part in cut_as_meta(text)])

    def _load(self) -> Any:
        import gigatoken

        try:
            if self._tokenizer.kind == "tiktoken":
                return gigatoken.Tokenizer.from_tiktoken(self.vocabulary, TIKTOKEN_SCHEME).backend
            return gigatoken.Tokenizer.from_json(self.vocabulary).backend
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            raise DataError(f"gigatoken cannot load {self._tokenizer.path}: {error}") from None


def _vocabulary(tokenizer: Tokenizer) -> str:
    """The path of a tiktoken file, or the content of a `tokenizer.json`."""
    if tokenizer.kind == "tiktoken":
        return str(tokenizer.path)
    content = tokenizer_json(tokenizer) if tokenizer.kind == "sentencepiece" else json.loads(tokenizer.content)
    return json.dumps(without_special_tokens(content))
