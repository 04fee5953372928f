"""Whether a directory is fit for checkpoints: seen by all nodes, fast, roomy, with renames and locks that hold."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llama.doctor.finding import Finding, failed, passed, warned
from parallel.collectives import barrier
from parallel.groups import Axis

PIECE_BYTES = 4 << 20
SLOW_BYTES_PER_SECOND = 100e6
SEEN_SECONDS = 5.0  # that network file systems may take to show a new file to other nodes
ROOM_BYTES = 10 << 30


def storage_findings(directory: Path, world: Axis, device: torch.device, mib: int) -> Iterator[Finding]:
    """The checks of `directory`, which is made if it is missing. All ranks call it; rank 0 alone gets findings.

    It writes `mib` MiB and removes them again.
    """
    names: list[str | None] = [uuid.uuid4().hex if world.rank == 0 else None]
    if world.size > 1:
        dist.broadcast_object_list(names, 0)
    probe = directory / f".doctor-{names[0]}"
    findings: list[Finding] = []
    if world.rank == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            findings += _speed(probe, mib)
            findings += _locks(probe)
        except OSError as error:
            fix = "--checkpoint.directory with a folder that can be written"
            findings.append(failed("storage", f"{directory}: {error.strerror} ({error.filename})", fix))
    barrier(world, device)
    findings += _seen(probe, world)
    barrier(world, device)
    if world.rank == 0:
        with suppress(OSError):
            probe.unlink()
        yield from findings


def _speed(probe: Path, mib: int) -> Iterator[Finding]:
    """Write, flush to the device, rename, read."""
    piece = os.urandom(PIECE_BYTES)  # (a file system that compresses would shine with zeros)
    written = probe.with_name(probe.name + ".tmp")
    count = max(1, mib * 2**20 // PIECE_BYTES)
    started = time.perf_counter()
    try:
        with open(written, "wb", buffering=0) as file:
            for _ in range(count):
                file.write(piece)
            os.fsync(file.fileno())
        rate = count * PIECE_BYTES / (time.perf_counter() - started)
        written.rename(probe)
    finally:
        written.unlink(missing_ok=True)
    folder = probe.parent
    room = shutil.disk_usage(folder).free
    text = f"{folder}: one rank writes {rate / 1e6:,.0f} MB/s, flushed to the device; {room / 2**30:,.1f} GiB free"
    if rate < SLOW_BYTES_PER_SECOND:
        yield warned("storage", text, "a faster file system; keep checkpoint.asynchronous = true and save less often")
    elif room < ROOM_BYTES:
        yield warned("storage", text, "room for checkpoint.keep + 1 checkpoints of 12 bytes per parameter")
    else:
        yield passed("storage", text)


def _locks(probe: Path) -> Iterator[Finding]:
    """Whether a lock keeps others out, as the one on a run directory has to."""
    with open(probe, "rb") as first, open(probe, "rb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"no file locks here ({error.strerror}): two jobs in one run directory would not be noticed"
            yield warned("locks", text, "mount it with locks (Lustre: -o flock), or put log.directory elsewhere")
            return
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield passed("locks", "a locked file is locked")
        else:
            yield warned("locks", "a locked file can be locked again", "mount it with locks, or never start a run twice")


def _seen(probe: Path, world: Axis) -> Iterator[Finding]:
    """Whether every rank sees the file that rank 0 has made."""
    if world.size == 1:
        return
    end = time.monotonic() + SEEN_SECONDS
    while not probe.exists() and time.monotonic() < end:
        time.sleep(0.1)
    here: list[str] = [""] * world.size
    dist.all_gather_object(here, "" if probe.exists() else os.uname().nodename)
    blind = sorted(set(filter(None, here)))
    if blind:
        text = f"{probe.parent} is not the same folder on {', '.join(blind)}"
        yield failed("shared folder", text, "a file system that all nodes share")
    else:
        yield passed("shared folder", f"all {world.size} ranks see it")
