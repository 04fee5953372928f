"""What there is to say about checkpoints: a table of a root's steps, and how two of them differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.checkpoint.manifest import MANIFEST_NAME, Manifest, dtype_name, read_manifest
from parallel.checkpoint.offline import PIECE_ELEMENTS, StepReader, pieces_of
from parallel.checkpoint.recovery import quarantined_steps
from parallel.checkpoint.retention import TRASH_MARK, verified_time
from parallel.checkpoint.steps import STEP_NAME, TEMPORARY_MARK, step_directories
from parallel.errors import CheckpointError
from parallel.shards import Box

COLUMNS = ("step", "size", "files", "layout", "tokens", "groups", "state")


def root_of(path: Path) -> Path:
    """The checkpoints root that `path` means: itself, `checkpoints` in a run directory, or that of a step directory.

    Raises CheckpointError where there are no steps.
    """
    if STEP_NAME.fullmatch(path.resolve().name) and path.is_dir():
        return path.resolve().parent
    for root in (path, path / "checkpoints"):
        if root.is_dir() and any(root.glob("step_*")):
            return root
    raise CheckpointError(f"{path}: no step_* directories in it, nor in {path / 'checkpoints'}")


def steps_of(path: Path) -> list[Path]:
    """The step directory that `path` is, or those that its root has, oldest first, damaged ones too. Raises CheckpointError."""
    if path.is_dir() and ((path / MANIFEST_NAME).exists() or STEP_NAME.fullmatch(path.resolve().name)):
        return [path]
    root = root_of(path)
    found = [step for _, step in step_directories(root)]
    if not found:
        raise CheckpointError(f"{root}: no whole step in it, only what saves have left")
    return found


def listing(root: Path) -> list[str]:
    """A table of the steps under `root`, and of what else lies there."""
    aside = quarantined_steps(root)
    rows = [COLUMNS, *(_row(path, aside.get(path)) for path in sorted(root.glob("step_*")) if path.is_dir())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(path: Path, why_aside: str | None) -> tuple[str, ...]:
    unknown = (path.name, _size(sum(file.stat().st_size for file in path.rglob("*") if file.is_file())), "", "", "", "")
    if TRASH_MARK in path.name:
        return *unknown, "being removed, or left so: the next save removes it"
    if TEMPORARY_MARK in path.name:
        return *unknown, "being written, or left by a save that did not finish: never read"
    if why_aside is not None:
        return *unknown, f"put aside as damaged, never read: {why_aside}"
    if not STEP_NAME.fullmatch(path.name):
        return *unknown, "not a step's name: never read"
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return *unknown, f"damaged: {str(error).removeprefix(f'{path}: ')}"
    verified = verified_time(path)
    state = f"verified {verified}" if verified else "complete (not verified)"
    groups = ", ".join(sorted({info.group for info in manifest.tensors.values()}))
    position = manifest.state.get("position", {})
    tokens = f"{position.get('tokens', 0):,}"
    return path.name, _size(manifest.total_bytes), str(len(manifest.files)), layout_text(manifest), tokens, groups, state


def layout_text(manifest: Manifest) -> str:
    """The layout that wrote a checkpoint, as far as it says."""
    parallel: dict[str, Any] = manifest.state.get("config", {}).get("parallel", {})
    ranks = manifest.state.get("world_size")
    if not parallel or not ranks:
        return "not said"
    tp, pp, cp = (parallel.get(name, 1) for name in ("tp", "pp", "cp"))
    return f"tp {tp} x pp {pp} x dp {ranks // (tp * pp * cp)}"


def _size(count: float) -> str:
    """Bytes as people read them: 840.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def compare(
    first: StepReader, second: StepReader, groups: Collection[str] | None, progress: Callable[[int], object]
) -> tuple[list[str], bool]:
    """What differs between two checkpoints of whatever layouts and dtypes, tensor by tensor, and whether anything does.

    `progress` is told the tensors done. Memory: some pieces of 12 MiB.
    """
    names = [
        {name for name, info in reader.manifest.tensors.items() if groups is None or info.group in groups}
        for reader in (first, second)
    ]
    lines, largest = [], (0.0, "")
    for name in sorted(names[0] & names[1]):
        ours, theirs = (reader.manifest.tensors[name] for reader in (first, second))
        if ours.shape != theirs.shape:
            lines.append(f"{name}: {list(ours.shape)} and {list(theirs.shape)}")
        else:
            difference = largest_difference(first, second, name)
            if difference != 0.0:
                dtypes = "" if ours.dtype == theirs.dtype else f" ({dtype_name(ours.dtype)} and {dtype_name(theirs.dtype)})"
                lines.append(f"{name}: differs by up to {difference:.3g}{dtypes}")
                largest = max(largest, (difference, name), key=lambda found: math.inf if math.isnan(found[0]) else found[0])
        progress(1)
    changed = len(lines)
    for directory, only in ((first.directory, names[0] - names[1]), (second.directory, names[1] - names[0])):
        if only:
            lines.append(f"only in {directory}: {len(only)} tensors, such as {min(only)}")
    common = len(names[0] & names[1])
    most = f"; the largest difference is {largest[0]:.3g}, in {largest[1]}" if largest[1] else ""
    return [*lines, f"{changed} of {common} tensors differ{most}"], bool(lines)


def largest_difference(first: StepReader, second: StepReader, name: str) -> float:
    """max |a - b| over a tensor of two checkpoints; NaN where one of them has a NaN that the other lacks."""
    largest = 0.0
    for box in pieces_of(Box.whole(first.manifest.tensors[name].shape), PIECE_ELEMENTS):
        difference = _difference(first.read(name, box).float(), second.read(name, box).float())
        if math.isnan(difference):
            return difference
        largest = max(largest, difference)
    return largest


def _difference(a: Tensor, b: Tensor) -> float:
    different = (a != b) & ~(a.isnan() & b.isnan())
    if not different.any():
        return 0.0
    return (a - b).abs()[different].max().item()
