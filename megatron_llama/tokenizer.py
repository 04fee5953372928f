"""Text to token ids and back: a SentencePiece `.model`, the tokenizer of LLaMA 1 and 2 and of those trained by tools/.

SentencePiece turns a literal `<s>` or `</s>` in a text into ordinary pieces, so a text can never inject a control token; a
model that defines them as text has no control tokens, and is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from parallel.errors import DataError

WORD_START = "\u2581"  # how SentencePiece writes a space inside a piece
LONG_TEXT_CHARACTERS = 16_384  # BPE is super-linear in the length: a longer text is encoded in parts
PART_CHARACTERS = 8_192

_CUT = re.compile(f"[^ {WORD_START}] (?=.)", re.DOTALL)


class Tokenizer:
    """A SentencePiece model read from `path`.

    `path` is the file, `sha256` the hex digest of its bytes, `vocab_size` its number of ids; `bos_id` and `eos_id` are
    the ids of the beginning and the end of a document, which `encode` never adds.

    Raises DataError where the file is missing, not a SentencePiece model, or lacks one of the two control tokens.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = _read_model(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._model = _parse_model(self.path, content)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self._check_control_tokens()
        self.cuts_at_spaces = self._cuts_at_spaces()

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
        return self._model.id_to_piece(token)

    def is_byte(self, token: int) -> bool:
        """Whether the id stands for one raw byte (byte fallback)."""
        return self._model.is_byte(token)

    def contains(self, piece: str) -> bool:
        """Whether `piece` is an entry of the vocabulary."""
        return self._model.piece_to_id(piece) != self._model.unk_id()

    def _encode(self, text: str) -> list[int]:
        try:
            return self._model.encode(text)
        except RuntimeError as error:
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

    def _cuts_at_spaces(self) -> bool:
        """Whether a text may be cut at a space that follows a non-space, the space itself being dropped.

        It may if the model writes every space as the start of a word, re-creates the dropped one as its dummy prefix,
        changes nothing else, and has no piece in which a word start follows another character: then no merge crosses
        the cut.
        """
        probe = "  a  b \ufb01\u00a0\t "  # U+FB01: a normalising model would write "fi"
        if self._model.normalize(probe) != WORD_START + probe.replace(" ", WORD_START) or not self.contains(WORD_START):
            return False
        pieces = map(self._model.id_to_piece, range(self.vocab_size))
        return not any(WORD_START in piece.lstrip(WORD_START) for piece in pieces)


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


def _parse_model(path: Path, content: bytes) -> sentencepiece.SentencePieceProcessor:
    needed = "needed: a SentencePiece .model file"
    if not content:
        raise DataError(f"{path}: the file is empty; {needed}")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        raise DataError(f"{path}: found a tiktoken file (lines of base64 and rank, as LLaMA 3 has); {needed}")
    if content[:1] in b"{[":
        raise DataError(f"{path}: found JSON (a Hugging Face tokenizer.json?); {needed}")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(f"{path}: found {len(content)} bytes that begin with {content[:12]!r}; {needed}") from error
