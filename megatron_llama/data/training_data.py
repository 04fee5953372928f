"""The training data of a run: from its configuration, and from what the checkpoint says that it goes on from.

A *leg* is a stretch of a run with one mixture and one sequence length. In a leg, the position in the data is one integer,
the number of samples read; every source enters it with a cursor. A run that resumes with the settings of its checkpoint
stays in its leg, whatever its end. Other weights, sources, limits or another sequence length begin a new leg: each source
that was there before goes on where it stopped. All legs of a run have the same order and the same packing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megatron_llama.config.sections import DataConfig
from megatron_llama.data.blend import Blend, check_entries
from megatron_llama.data.indexed import IndexedDataset
from megatron_llama.data.megatron_order import MegatronBlend
from megatron_llama.data.mixture import MixtureRow, capped_weights, redistribute, table_lines
from megatron_llama.data.packing import Packing
from megatron_llama.data.samples import START, Cursor, Source
from megatron_llama.data.vocabulary import check_token_ids
from parallel.errors import ConfigError, DataError

ALLOW = "restore what it was, or set --data.allow_changed true"


@dataclass(frozen=True)
class Known:
    """A source as a checkpoint knows it: its dataset, the key of its order, how far it was read."""

    prefix: str
    dataset: dict[str, Any]  # fingerprint
    seed: int
    key: int
    cursor: Cursor

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Known:
        return cls(**{**state, "cursor": Cursor.from_state(state["cursor"])})


@dataclass
class TrainingData:
    """What a run reads: `blend` gives its samples, `rows` say how often it reads each source, `notes` what has changed."""

    blend: Blend | MegatronBlend
    rows: list[MixtureRow]  # at the end of the run
    notes: list[str]
    leg: dict[str, Any]  # the part of the state that doesn't change within a leg

    def state(self, sample: int) -> dict[str, Any]:
        """What a checkpoint at that sample holds, JSON-able. `reached` are the cursors there; `tokens_read` is for people."""
        read = self.blend.tokens_read(sample)
        names = [source["prefix"] for source in self.leg["sources"]]
        state = {**self.leg, "tokens_read": [list(pair) for pair in zip(names, read, strict=True)]}
        if isinstance(self.blend, Blend):
            state["reached"] = [asdict(cursor) for cursor in self.blend.cursors(sample)]
        return state


@dataclass(frozen=True)
class Request:
    """What the configuration asks for, and the datasets it names."""

    data: DataConfig
    sequence_length: int
    vocab_size: int
    end_sample: int
    datasets: Sequence[IndexedDataset]
    asked: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        asked = {name: [getattr(source, name) for source in self.data.train] for name in ("weight", "max_epochs")}
        object.__setattr__(self, "asked", asked)


def open_training_data(
    data: DataConfig,
    sequence_length: int,
    vocab_size: int,
    end_sample: int,
    sample: int = 0,
    stored: dict[str, Any] | None = None,
) -> TrainingData:
    """Opens and checks the datasets of `data.train`, for a run that reads samples up to `end_sample`.

    At a fresh start `stored` is None. Otherwise it is what `TrainingData.state` gave for the checkpoint, at `sample`.
    Raises ConfigError for impossible weights and exceeded limits, DataError for what is wrong with a dataset or isn't as
    the checkpoint knows it.
    """
    check_entries([(source.prefix, source.weight) for source in data.train])
    datasets = [IndexedDataset(source.prefix) for source in data.train]
    for dataset in datasets:
        check_token_ids(dataset, vocab_size)
    request = Request(data, sequence_length, vocab_size, end_sample, datasets)
    found = [
        Known(source.prefix, dataset.fingerprint(), data.seed, number, START)
        for number, (source, dataset) in enumerate(zip(data.train, datasets, strict=True))
    ]
    if not stored:
        return _megatron(request, found) if data.order == "megatron" else _begin(request, found, [], 0)
    changes = [
        f"data.{name} {stored[name]} in the checkpoint, now {getattr(data, name)}"
        for name in ("order", "packing")
        if stored[name] != getattr(data, name)
    ]
    if changes:
        _refuse(changes, data)
        started = _megatron(request, found) if data.order == "megatron" else _begin(request, found, [], sample)
        return replace(started, notes=[f"{change}: text may be read again" for change in changes] + started.notes)
    return _resume_megatron(request, found, stored) if data.order == "megatron" else _resume(request, found, sample, stored)


def _megatron(request: Request, found: list[Known]) -> TrainingData:
    """Megatron's order of the whole run, of which some samples may have been read."""
    data, length = request.data, request.sequence_length
    entries = [(dataset, source.weight) for dataset, source in zip(request.datasets, data.train, strict=True)]
    blend = MegatronBlend(entries, length, request.end_sample, data.seed, request.vocab_size, data.megatron_split)
    read = blend.tokens_read(request.end_sample)
    rows = [
        MixtureRow(entry.prefix, share, source.num_windows * length, tokens, entry.max_epochs, length)
        for entry, share, source, tokens in zip(data.train, blend.weights, blend.sources, read, strict=True)
    ]
    if any(row.exceeds for row in rows):
        raise ConfigError(
            "the run would read sources more often than their max_epochs; shorten it or raise max_epochs "
            "(data.order = megatron cannot redistribute)\n" + "\n".join(table_lines(rows))
        )
    leg = {
        "order": "megatron",
        "packing": "none",
        "sequence_length": length,
        "asked": {"weight": request.asked["weight"], "split": data.megatron_split},
        "sources": [
            {**asdict(known), "num_epochs": source.num_epochs, "separate_last_epoch": source.separate_last_epoch}
            for known, source in zip(found, blend.sources, strict=True)
        ],
    }
    return TrainingData(blend, rows, [f"Megatron's index arrays take {blend.index_bytes / 1e6:,.1f} MB on each rank"], leg)


def _resume_megatron(request: Request, found: list[Known], stored: dict[str, Any]) -> TrainingData:
    """All of Megatron's order depends on each of these, the length of the run included."""
    going_on = _megatron(request, found)
    changes = []
    for name in ("sequence_length", "asked"):
        if going_on.leg[name] != stored[name]:
            changes.append(f"{name} {stored[name]} in the checkpoint, now {going_on.leg[name]}")
    for old, new in zip(stored["sources"], going_on.leg["sources"], strict=False):
        if old["dataset"] != new["dataset"] or old["seed"] != new["seed"]:
            changes.append(_difference(Known.from_state(_known_fields(old)), Known.from_state(_known_fields(new))))
        elif any(old[name] != new[name] for name in ("num_epochs", "separate_last_epoch")):
            epochs = f"{old['num_epochs']} epochs shuffled together in the checkpoint's run, now {new['num_epochs']}"
            changes.append(f"{new['prefix']}: {epochs}, or the last one is apart now or was: Megatron reshuffles all of it")
    _refuse(changes, request.data)
    return replace(going_on, notes=[*(f"{change}: text may be read again" for change in changes), *going_on.notes])


def _known_fields(state: dict[str, Any]) -> dict[str, Any]:
    return {item.name: state[item.name] for item in fields(Known)}


def _resume(request: Request, found: list[Known], sample: int, stored: dict[str, Any]) -> TrainingData:
    begun = [Known.from_state(source) for source in stored["sources"]]
    resting = [Known.from_state(source) for source in stored["resting"]]
    reached = [
        replace(known, cursor=Cursor.from_state(cursor)) for known, cursor in zip(begun, stored["reached"], strict=True)
    ]
    same_request = stored["asked"] == request.asked
    known, rests, notes = _match(request.data, found, reached, resting, same_request)
    same_mixture = same_request and [source.key for source in known] == [source.key for source in begun]
    if same_mixture and stored["sequence_length"] == request.sequence_length:
        entered = [replace(now, cursor=then.cursor) for now, then in zip(known, begun, strict=True)]
        going_on = _leg(request, entered, rests, stored["first_sample"], stored["weights"])
        if not any(row.exceeds for row in going_on.rows):
            return replace(going_on, notes=notes + going_on.notes)
    elif not same_mixture:
        notes.append(f"the mixture changes at sample {sample:,}: each source goes on where it stopped")
    if stored["sequence_length"] != request.sequence_length:
        lengths = f"from {stored['sequence_length']} to {request.sequence_length}"
        notes.append(f"the sequence length changes {lengths} at sample {sample:,}: each source goes on where it stopped")
    started = _begin(request, known, rests, sample)
    return replace(started, notes=notes + started.notes)


def _match(
    data: DataConfig, found: list[Known], active: list[Known], resting: list[Known], same_request: bool
) -> tuple[list[Known], list[Known], list[str]]:
    """The datasets of `found`, each as the checkpoint knows it if it does; the sources that rest; what has changed.

    A dataset is known by its content and seed, wherever it lies. One that isn't known has changed if its prefix is known,
    or if the mixture looks the same otherwise. Raises DataError where one has changed and that isn't allowed.
    """
    left = [*active, *resting]
    matches: list[Known | None] = []
    for new in found:
        same = [known for known in left if known.dataset == new.dataset and known.seed == new.seed]
        matches.append(replace(same[0], prefix=new.prefix) if same else None)
        if same:
            left.remove(same[0])
    gone = [known for known in left if known in active]
    changes, notes = [], []
    for number, new in enumerate(found):
        if matches[number] is not None:
            continue
        former = [known for known in gone if known.prefix == new.prefix or known.dataset == new.dataset]
        if not former and same_request and active[number] in gone:
            former = [active[number]]
        if former:
            changes.append(_difference(former[0], new))
        else:
            notes.append(f"{new.prefix} joins the mixture")
    notes += [f"{known.prefix} leaves the mixture after {known.cursor.tokens:,} tokens" for known in gone]
    _refuse(changes, data)
    next_key = 1 + max(known.key for known in [*active, *resting])
    for number, new in enumerate(found):
        if matches[number] is None:
            matches[number], next_key = replace(new, key=next_key), next_key + 1
    changed = [f"{change}: read as a new source, from its beginning" for change in changes]
    return [known for known in matches if known is not None], left, changed + notes


def _difference(old: Known, new: Known) -> str:
    prefix = new.prefix if new.prefix == old.prefix else f"{new.prefix} in the place of {old.prefix}"
    before, after = {**old.dataset, "data.seed": old.seed}, {**new.dataset, "data.seed": new.seed}
    names = [name for name in after if after[name] != before.get(name)]
    return f"{prefix}: " + ", ".join(f"{name} {before.get(name)} in the checkpoint, now {after[name]}" for name in names)


def _refuse(changes: list[str], data: DataConfig) -> None:
    if changes and not data.allow_changed:
        raise DataError(f"the training data is not the checkpoint's: {'; '.join(changes)}; {ALLOW}")


def _begin(request: Request, known: list[Known], resting: list[Known], sample: int) -> TrainingData:
    """A new leg at `sample`, its mixture as configured or, where limits ask for it, redistributed."""
    weights = None if request.asked["weight"][0] is None else request.asked["weight"]
    asked = _leg(request, known, resting, sample, weights=weights)
    if not any(row.exceeds for row in asked.rows):
        return asked
    table = table_lines(asked.rows)
    if request.data.on_cap == "error":
        raise ConfigError(
            "the run would read sources more often than their max_epochs; shorten it, raise max_epochs, "
            "or set --data.on_cap redistribute\n" + "\n".join(table)
        )
    length = request.sequence_length
    room = [
        math.inf if row.max_epochs is None else (row.max_epochs * row.unique_tokens - source.cursor.tokens) / length
        for row, source in zip(asked.rows, asked.blend.sources, strict=True)
    ]
    given = redistribute(asked.blend.weights, room, request.end_sample - sample)
    if given is None:
        raise ConfigError(
            "all sources together have too few tokens within their max_epochs; shorten the run or raise max_epochs\n"
            + "\n".join(table)
        )
    used = _leg(request, known, resting, sample, integers=capped_weights(given, room))
    notes = ["sources at their max_epochs leave their share to the others; as configured:", *table]
    return replace(used, notes=[*notes, "as read:", *table_lines(used.rows), *used.notes])


def _leg(
    request: Request,
    known: list[Known],
    resting: list[Known],
    first_sample: int,
    integers: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> TrainingData:
    length = request.sequence_length
    packed = request.data.packing != "none"
    sources = [
        Source(dataset, length, entry.seed, entry.key, cursor=entry.cursor, packed=packed)
        for entry, dataset in zip(known, request.datasets, strict=True)
    ]
    blend = Blend(sources, weights, request.vocab_size, first_sample, integers)
    leg = {
        "order": "windows",
        "packing": request.data.packing,
        "sequence_length": length,
        "first_sample": first_sample,
        "asked": request.asked,
        "weights": blend.weights,
        "sources": [asdict(entry) for entry in known],
        "resting": [asdict(entry) for entry in resting],
    }
    return TrainingData(blend, mixture_rows(request, blend), _packing_notes(blend), leg)


def _packing_notes(blend: Blend) -> list[str]:
    """What packing comes to for each source; nothing where they are not packed."""
    packed = [(source.dataset.prefix, source.order) for source in blend.sources if isinstance(source.order, Packing)]
    return [f"{prefix}: packed into {order.num_samples:,} samples, {order.padding:.3%} padding" for prefix, order in packed]


def mixture_rows(request: Request, blend: Blend) -> list[MixtureRow]:
    """What each source has been read at the end of the run."""
    length, total = request.sequence_length, sum(blend.weights)
    read = blend.tokens_read(max(request.end_sample, blend.first_sample))
    return [
        MixtureRow(entry.prefix, weight / total, source.num_windows * length, tokens, entry.max_epochs, length)
        for entry, weight, source, tokens in zip(request.data.train, blend.weights, blend.sources, read, strict=True)
    ]
