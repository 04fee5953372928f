"""Output files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import DataError


@contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """A directory next to `target` to write its files in, removed on exit with all that was not published.

    The directory lies on the file system of the target, so that a rename from it is atomic. Missing parents are made.
    Raises DataError where it cannot be created.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot write there: {error.strerror}") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(moves: list[tuple[Path, Path]], stale: Sequence[Path] = ()) -> None:
    """Renames each staged file to its target, in this order, after all of them are safely on disk; removes `stale` files.

    The last target is the one that readers look for first: an old one is removed before anything else is replaced, so
    no reader ever sees it beside files of another run.
    """
    for staged, _ in moves:
        with open(staged, "rb") as file:
            os.fsync(file.fileno())
    for path in (moves[-1][1], *stale):
        path.unlink(missing_ok=True)
    for staged, target in moves:
        os.replace(staged, target)
    directory = os.open(moves[-1][1].parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def publish_directory(staged: Path, target: Path) -> None:
    """Renames a complete directory to `target`; an older dataset there is removed.

    Raises DataError where something else than a dataset has the name.
    """
    old = staged.with_name(f"{staged.name}.old")
    if target.exists():
        if not list(target.glob("*.idx")):
            raise DataError(f"{target}: exists and is not a dataset: remove it or choose another prefix")
        os.replace(target, old)
    os.replace(staged, target)
    shutil.rmtree(old, ignore_errors=True)


def link_file(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
