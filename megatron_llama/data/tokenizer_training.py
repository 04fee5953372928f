"""Trains a SentencePiece BPE tokenizer with the settings of LLaMA 1 and 2."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import sentencepiece

from megatron_llama.data.atomic import publish, staging_directory
from megatron_llama.data.inputs import Piece
from megatron_llama.tokenizer import WORD_START, Tokenizer
from parallel.errors import ConfigError, DataError

MAX_SENTENCE_BYTES = 4192  # LLaMA's; SentencePiece ignores longer sentences, so longer lines are cut at spaces
SENTENCE_CHARACTERS = 1000  # at most 4 bytes each
SAMPLE_BYTES = 1_000_000

# As dumped from Meta's tokenizer.model; what is not here is SentencePiece's default, and LLaMA's.
LLAMA_SETTINGS = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "max_sentence_length": MAX_SENTENCE_BYTES,
    "max_sentencepiece_length": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "treat_whitespace_as_suffix": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "input_sentence_size": 200_000_000,  # never reached: at it, SentencePiece shuffles, differently in each process
    "shuffle_input_sentence": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
}


def choose_pieces(paths: Sequence[Path], sample_bytes: int, seed: int = 1) -> Callable[[Piece], bool]:
    """Which pieces of 1 MiB to read so that about `sample_bytes` are: spread at random over all files, the same each time.

    A packed file or one of parquet is read whole or not at all.
    """
    total_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    share = min(1.0, sample_bytes / max(total_bytes, 1))

    def choose(piece: Piece) -> bool:
        name = f"{seed}\0{piece.path}\0{piece.start}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") < share * 2**64

    return choose


@dataclass(frozen=True)
class Quality:
    """How a tokenizer does on a sample of text: bytes per token, and the share of characters that need no byte fallback."""

    sample_bytes: int
    bytes_per_token: float
    character_coverage: float


def train_tokenizer(
    documents: Iterable[str],
    prefix: str | Path,
    vocab_size: int,
    max_sentences: int,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tokenizer, Quality]:
    """Writes `PREFIX.model` and `PREFIX.vocab`, and measures the tokenizer on the first megabyte of `documents`.

    A sentence is a line; of more than `max_sentences` a random part of that size is used, the same in every run. The pieces
    do not depend on `threads`, but the model records the number. Memory grows with what is used, about 10 bytes a byte.
    `progress` is called with the characters read since the last call.

    Raises DataError or ConfigError where the text does not suffice for the vocabulary or the vocabulary for the text.
    """
    if max_sentences <= 100:
        raise ConfigError(f"--max-sentences {max_sentences}: SentencePiece needs more than 100")
    sample: list[str] = []
    sentences = _Sentences(documents, sample, progress)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_choose(sentences, max_sentences),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=threads,
            minloglevel=2,
            **LLAMA_SETTINGS,
        )
    except RuntimeError as error:
        raise sentences.error or _explained(error, vocab_size, bool(sample)) from error
    return _publish(model.getvalue(), Path(prefix), sample)


def measure(tokenizer: Tokenizer, sample: list[str]) -> Quality:
    """How `tokenizer` does on the documents of `sample`."""
    tokens = sum(map(len, tokenizer.encode_batch(sample)))
    sample_bytes = sum(len(text.encode()) for text in sample)
    characters = Counter("".join(sample))
    known = sum(count for c, count in characters.items() if tokenizer.contains(WORD_START if c == " " else c))
    return Quality(sample_bytes, sample_bytes / max(tokens, 1), known / max(characters.total(), 1))


class _Sentences:
    """Iterates over the lines of documents; keeps a sample of the documents, and the error that ended it.

    SentencePiece would turn an exception of its input into a RuntimeError of its own.
    """

    def __init__(self, documents: Iterable[str], sample: list[str], progress: Callable[[int], None] | None) -> None:
        self.error: DataError | None = None
        self._documents = documents
        self._sample = sample
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        sample_bytes = 0
        try:
            for text in self._documents:
                if sample_bytes < SAMPLE_BYTES:
                    self._sample.append(text[:SAMPLE_BYTES])
                    sample_bytes += len(self._sample[-1].encode())
                for line in text.split("\n"):
                    yield from _sentences_of(line.replace("\0", ""))
                if self._progress is not None:
                    self._progress(len(text))
        except DataError as error:
            self.error = error
            raise


def _choose(sentences: Iterable[str], size: int) -> Iterator[str]:
    """At most `size` of the sentences, each with the same chance, and the same ones in every run.

    SentencePiece would choose too, but differently in each process, whatever its seed. Source: Vitter 1985, algorithm R.
    """
    random = Random(1)
    kept: list[str] = []
    for number, sentence in enumerate(sentences):
        place = number if number < size else random.randrange(number + 1)
        if place == len(kept):
            kept.append(sentence)
        elif place < size:
            kept[place] = sentence
    kept.reverse()
    while kept:  # let go as SentencePiece takes its copies
        yield kept.pop()


def _sentences_of(line: str) -> Iterator[str]:
    while len(line) > SENTENCE_CHARACTERS:
        cut = line.rfind(" ", 1, SENTENCE_CHARACTERS)
        cut = cut if cut > 0 else SENTENCE_CHARACTERS
        yield line[:cut]
        line = line[cut:].removeprefix(" ")
    if line:
        yield line


def _explained(error: RuntimeError, vocab_size: int, any_text: bool) -> Exception:
    reason = str(error).rpartition("] ")[2]
    if not any_text:
        return DataError("--input: found no text to train on")
    if "too high" in reason:
        return DataError(f"--vocab-size {vocab_size}: the text is too small for it; SentencePiece says: {reason}")
    if "smaller than required_chars" in reason:
        return ConfigError(f"--vocab-size {vocab_size}: below bytes and characters of the text; SentencePiece says: {reason}")
    return DataError(f"SentencePiece could not train: {error}")


def _publish(model: bytes, prefix: Path, sample: list[str]) -> tuple[Tokenizer, Quality]:
    paths = Path(f"{prefix}.model"), Path(f"{prefix}.vocab")
    with staging_directory(prefix) as directory:
        (directory / "model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = ((processor.id_to_piece(token), processor.get_score(token)) for token in range(processor.vocab_size()))
        lines = "".join(f"{piece}\t{score:g}\n" for piece, score in pieces)
        (directory / "vocab").write_text(lines, encoding="utf-8")
        publish([(directory / "vocab", paths[1]), (directory / "model", paths[0])])
    tokenizer = Tokenizer(paths[0])
    return tokenizer, measure(tokenizer, sample)
