"""The three formats of tokenizer files behind one interface, told apart by their content.

SentencePiece's `.model` (LLaMA 1 and 2), Hugging Face's `tokenizer.json`, and the tiktoken file of LLaMA 3, which Meta names
`tokenizer.model` too. In none of them can a text produce a control token: a literal `</s>` stays text.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from parallel.errors import DataError

WORD_START = "\u2581"  # how SentencePiece writes a space inside a piece
NEEDED = "needed: a SentencePiece .model, a Hugging Face tokenizer.json or a tiktoken file"
PACKAGE_HINT = "pip install 'megatron-llama[data]'"

# LLaMA 3: Meta's regular expression and special tokens, models/llama3/tokenizer.py of llama-models.
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_SPECIAL_TOKENS = 256
LLAMA_3_NAMES = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
)
LLAMA_3_TEXT_CHARACTERS = 400_000  # Meta encodes so many at a time,
LLAMA_3_RUN_CHARACTERS = 25_000  # and cuts longer runs of spaces, or of anything else

# Names of the tokens that begin and end a document in a tokenizer.json.
BOS_AND_EOS = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class TokenizerModel(Protocol):
    """What a format has to offer; the ids of an absent bos or eos token are -1."""

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    cuts_at_spaces: bool  # a text may be cut at a space after a non-space, which is dropped, without changing the ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text, which is valid Unicode."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are in the vocabulary; control tokens vanish."""

    def piece(self, token: int) -> str:
        """How the vocabulary writes an id."""

    def piece_id(self, piece: str) -> int | None:
        """The id of an entry of the vocabulary."""

    def is_byte(self, token: int) -> bool:
        """Whether the id stands for one raw byte as a fallback."""


def parse_model(path: Path, content: bytes) -> TokenizerModel:
    """The model in a file. Raises DataError for a foreign or damaged file, or a package that is missing."""
    if not content:
        raise DataError(f"{path}: the file is empty; {NEEDED}")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return TiktokenModel(path, content)
    if content[:1] in b"{[":
        return HuggingFaceModel(path, content)
    return SentencePieceModel(path, content)


class SentencePieceModel:
    """A SentencePiece `.model`. It turns a literal `<s>` into ordinary pieces unless it defines it as text."""

    kind = "sentencepiece"

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{path}: found {len(content)} bytes that begin with {content[:12]!r}; {NEEDED}") from error
        self.vocab_size: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        self.encode = self.processor.encode
        self.decode = self.processor.decode
        self.cuts_at_spaces = self._cuts_at_spaces()

    def piece(self, token: int) -> str:
        return self.processor.id_to_piece(token)

    def piece_id(self, piece: str) -> int | None:
        token = self.processor.piece_to_id(piece)
        return None if token == self.processor.unk_id() else token

    def is_byte(self, token: int) -> bool:
        return self.processor.is_byte(token)

    def _cuts_at_spaces(self) -> bool:
        """Whether the model writes every space as the start of a word, re-creates the dropped one as its dummy prefix,
        changes nothing else, and has no piece in which a word start follows another character: then no merge crosses a
        cut.
        """
        probe = "  a  b \ufb01\u00a0\t "  # U+FB01: a normalising model would write "fi"
        if self.processor.normalize(probe) != WORD_START + probe.replace(" ", WORD_START):
            return False
        pieces = map(self.processor.id_to_piece, range(self.vocab_size))
        return self.piece_id(WORD_START) is not None and not any(WORD_START in p.lstrip(WORD_START) for p in pieces)


class HuggingFaceModel:
    """A `tokenizer.json`, told not to look for its special tokens in texts."""

    kind = "tokenizers"
    cuts_at_spaces = False

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"{path}: a tokenizer.json needs the package tokenizers: {PACKAGE_HINT}") from error
        try:
            without_merges = _without_special_merges(json.loads(content))
            self._decoder = tokenizers.Tokenizer.from_str(content.decode())
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(without_merges))
        except Exception as error:  # tokenizers raises no narrower class
            raise DataError(f"{path}: found JSON that is no tokenizer.json: {error}; {NEEDED}") from error
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._special = {id for id, token in self._decoder.get_added_tokens_decoder().items() if token.special}
        self._names = {token: id for token, id in self._decoder.get_vocab().items()}
        self.vocab_size: int = max(self._names.values(), default=-1) + 1
        found = next((pair for pair in BOS_AND_EOS if all(self._names.get(name) in self._special for name in pair)), None)
        self.bos_id, self.eos_id = (self._names[name] for name in found) if found else (-1, -1)

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode([token for token in ids if token not in self._special], skip_special_tokens=False)

    def piece(self, token: int) -> str:
        return self._decoder.id_to_token(token) or f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        return self._names.get(piece)

    def is_byte(self, token: int) -> bool:
        return re.fullmatch("<0x[0-9A-F]{2}>", self.piece(token)) is not None


def _without_special_merges(content: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` in which no merge makes a special token: converters of other projects leave such merges in."""
    special = {token["content"] for token in content.get("added_tokens") or [] if token.get("special")}
    model = content["model"]
    merges = [merge for merge in model.get("merges") or [] if _merged(merge) not in special]
    return {**content, "model": {**model, "merges": merges} if "merges" in model else model}


def _merged(merge: str | list[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)


def without_special_tokens(content: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer.json` that knows no special token at all, for programs that would look for them in texts.

    Raises DataError where it has tokens that texts may hold: without the special ones they would get other ids.
    """
    of_text = [token["content"] for token in content.get("added_tokens") or [] if not token.get("special")]
    if of_text:
        raise DataError(f"the tokenizer has added tokens that are not special, {of_text[0]!r}")
    content = _without_special_merges(content)
    return {**content, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


class TiktokenModel:
    """The tiktoken file of LLaMA 3: lines of base64 and rank. 256 special tokens follow the ranks."""

    kind = "tiktoken"
    cuts_at_spaces = False

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(f"{path}: a tiktoken file needs the package tiktoken: {PACKAGE_HINT}") from error
        ranks = parse_ranks(path, content)
        first = len(ranks)
        names = [*LLAMA_3_NAMES, *(f"reserved_special_token_{i}" for i in range(2, LLAMA_3_SPECIAL_TOKENS))]
        special = {f"<|{name}|>": first + i for i, name in enumerate(names[:LLAMA_3_SPECIAL_TOKENS])}
        self._encoding = tiktoken.Encoding(path.name, pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self._special = {token: name for name, token in special.items()}
        self.vocab_size = first + LLAMA_3_SPECIAL_TOKENS
        self.bos_id, self.eos_id = first, first + 1

    def encode(self, text: str) -> list[int]:
        text.encode()  # tiktoken would replace a lone surrogate in silence
        if len(text) <= LLAMA_3_RUN_CHARACTERS:
            return self._encoding.encode_ordinary(text)
        return [token for part in cut_as_meta(text) for token in self._encoding.encode_ordinary(part)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([token for token in ids if token not in self._special], errors="replace")

    def piece(self, token: int) -> str:
        return self._special.get(token) or self._encoding.decode_single_token_bytes(token).decode(errors="backslashreplace")

    def piece_id(self, piece: str) -> int | None:
        try:
            return self._encoding.encode_single_token(piece)
        except KeyError:
            return None

    def is_byte(self, token: int) -> bool:
        return False


def parse_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Piece -> rank of a tiktoken file. Raises DataError naming the line."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a line of a tiktoken file (base64 and rank): {line[:40]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise DataError(f"{path}: found {len(ranks)} different pieces whose ranks are not 0, 1, 2, ...: is it cut short?")
    return ranks


_LONG_RUN = re.compile(rf"\s{{{LLAMA_3_RUN_CHARACTERS + 1},}}|\S{{{LLAMA_3_RUN_CHARACTERS + 1},}}")


def cut_as_meta(text: str) -> Iterator[str]:
    """The parts in which Meta's LLaMA 3 encodes a long text: its ids depend on them."""
    for start in range(0, len(text), LLAMA_3_TEXT_CHARACTERS):
        part = text[start : start + LLAMA_3_TEXT_CHARACTERS]
        begin = 0
        for run in _LONG_RUN.finditer(part):
            for cut in range(run.start() + LLAMA_3_RUN_CHARACTERS, run.end(), LLAMA_3_RUN_CHARACTERS):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]
