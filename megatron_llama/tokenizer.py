"""Text to token ids and back, with the tokenizer of any LLaMA: SentencePiece, Hugging Face's JSON or tiktoken.

A text can never inject a control token: a literal `<s>` or `</s>` becomes ordinary pieces.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_llama.tokenizer_models import WORD_START, TokenizerModel, parse_model
from parallel.errors import DataError

__all__ = ["WORD_START", "Tokenizer", "cut_text"]

LONG_TEXT_CHARACTERS = 16_384  # BPE is super-linear in the length: a longer text is encoded in parts
PART_CHARACTERS = 8_192

_CUT = re.compile(f"[^ {WORD_START}] (?=.)", re.DOTALL)


class Tokenizer:
    """The tokenizer in the file `path`, whose format is recognised by its content.

    `content` is the file, `sha256` the hex digest of its bytes, `kind` the package that reads it (sentencepiece,
    tokenizers or tiktoken), `vocab_size` the number of ids; `bos_id` and `eos_id` are the ids of the beginning and the
    end of a document, which `encode` never adds.

    Raises DataError where the file is missing, of no known format, or lacks one of the two control tokens.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.content = _read_model(self.path)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self._model: TokenizerModel = parse_model(self.path, self.content)
        self.kind = self._model.kind
        self.vocab_size = self._model.vocab_size
        self.bos_id = self._model.bos_id
        self.eos_id = self._model.eos_id
        self.cuts_at_spaces = self._model.cuts_at_spaces
        self._check_control_tokens()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos; an empty text has none.

        A long text is cut where `cuts_at_spaces` proves that the ids do not change. Raises DataError for a lone
        surrogate, which is not valid Unicode.
        """
        if len(text) <= LONG_TEXT_CHARACTERS or not self.cuts_at_spaces:
            return self._encode(text)
        return [token for part in cut_text(text, PART_CHARACTERS) for token in self._encode(part)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts joined, in `dtype`, which has to hold them, and their number per text, int64."""
        ids = self.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), dtype, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens vanish, bytes that are not UTF-8 become U+FFFD.

        Raises DataError for an id outside the vocabulary.
        """
        ids = [int(token) for token in ids]
        outside = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise DataError(f"{self.path}: token id {outside} is outside the vocabulary of {self.vocab_size}")
        return self._model.decode(ids)

    def piece(self, token: int) -> str:
        """How the vocabulary writes one id, e.g. `▁the` or `<0x0A>`."""
        return self._model.piece(token)

    def is_byte(self, token: int) -> bool:
        """Whether the id stands for one raw byte (byte fallback)."""
        return self._model.is_byte(token)

    def contains(self, piece: str) -> bool:
        """Whether `piece` is an entry of the vocabulary."""
        return self._model.piece_id(piece) is not None

    def _encode(self, text: str) -> list[int]:
        try:
            return self._model.encode(text)
        except (RuntimeError, UnicodeError, TypeError) as error:
            surrogate = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if surrogate is None:
                raise
            message = f"the text holds the lone surrogate U+{ord(surrogate):04X}, which is not valid Unicode"
            raise DataError(message) from error

    def _check_control_tokens(self) -> None:
        for name, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:  # absent, or not of type CONTROL
                message = f"the tokenizer has no {name} control token; train one with tools/train_tokenizer.py"
                raise DataError(f"{self.path}: {message}")


def cut_text(text: str, part_characters: int) -> Iterator[str]:
    """Cuts `text` into parts of at least `part_characters` each, at spaces that follow a non-space and are dropped.

    For a tokenizer with `cuts_at_spaces`, the parts' ids joined are the ids of the whole. The last part is not empty.
    """
    start = 0
    while cut := _CUT.search(text, start + part_characters):
        yield text[start : cut.end() - 1]
        start = cut.end()
    yield text[start:]


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
