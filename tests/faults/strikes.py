"""What strikes: one fault at one place, once, with a note of when it did."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_llama.step import TrainStep
from parallel.checkpoint.steps import step_directories
from tests.faults import disk
from tests.faults.places import Journey, Place

CHECKPOINTS = Path("run/checkpoints")
LONG = 300.0  # seconds; until somebody ends the process


def _signal(*numbers: int, to: Callable[[], int] = os.getpid) -> Callable[[], None]:
    def send() -> None:
        for number in numbers:
            os.kill(to(), number)

    return send


def _error(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _crash() -> None:
    raise RuntimeError("planted")


def _signal_all_twice() -> None:
    for _ in range(2):
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def _end_supervisor() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(LONG)


def _set_clock(seconds: float) -> Callable[[], None]:
    """The time of day jumps, for this process."""

    def jump() -> None:
        now = time.time
        time.time = lambda: now() + seconds

    return jump


def newest_step() -> Path:
    """The newest step directory; not all of it needs to be there."""
    return step_directories(CHECKPOINTS)[-1][1]


def _damaged(damage: Callable[[Path], object], everywhere: bool = False) -> Callable[[], None]:
    """Checkpoints are damaged, and the rank dies, so that they are loaded."""

    def strike() -> None:
        for _, step in step_directories(CHECKPOINTS)[0 if everywhere else -1 :]:
            damage(step)
        os.kill(os.getpid(), signal.SIGKILL)

    return strike


def flip(path: Path, position: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _flip_in_memory() -> None:
    """A bit of a weight of this rank changes."""
    (step,) = (found for found in gc.get_objects() if isinstance(found, TrainStep))
    weight = next(step.runtime.chunks[0].parameters()).detach()
    weight.view(torch.int32).view(-1)[:1] ^= 1 << 16


def _cut_data() -> None:
    """The training data loses its end, and the rank dies."""
    os.truncate("train.bin", Path("train.bin").stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """`incident`: what the supervisor finds, a death or a hang, if it is anything; of a death, whether it comes at once."""

    strike: Callable[[], None]
    incident: str = ""
    at_once: bool = True


FAULTS = {
    "SIGKILL": Fault(_signal(signal.SIGKILL), "death"),
    "crash": Fault(_crash, "death"),
    "SIGSTOP": Fault(_signal(signal.SIGSTOP), "hang"),
    "sleep": Fault(lambda: time.sleep(LONG), "hang"),
    "1 s late": Fault(lambda: time.sleep(1.0)),
    "SIGTERM": Fault(_signal(signal.SIGTERM)),
    "SIGUSR1": Fault(_signal(signal.SIGUSR1)),
    "SIGTERM twice": Fault(_signal(signal.SIGTERM, signal.SIGTERM)),
    "SIGTERM to all": Fault(_signal(signal.SIGTERM, to=os.getppid)),
    "SIGUSR1 to all": Fault(_signal(signal.SIGUSR1, to=os.getppid)),
    "SIGTERM to all twice": Fault(_signal_all_twice),
    "ENOSPC": Fault(_error(errno.ENOSPC)),
    "EIO": Fault(_error(errno.EIO)),
    "EROFS": Fault(_error(errno.EROFS)),
    "clock a day forward": Fault(_set_clock(86400.0)),
    "clock a day back": Fault(_set_clock(-86400.0)),
    "SIGKILL to the supervisor": Fault(_end_supervisor),
    "full disk": Fault(disk.fill),
    "room on the disk": Fault(disk.empty),
    "flipped weight": Fault(_damaged(lambda step: flip(step / "weights-00000.safetensors")), "death"),
    "flipped moment": Fault(_damaged(lambda step: flip(step / "optimizer-00000.safetensors")), "death"),
    "flipped manifest": Fault(_damaged(lambda step: flip(step / "manifest.json", 40)), "death"),
    "flipped COMMIT": Fault(_damaged(lambda step: flip(step / "COMMIT")), "death"),
    "no COMMIT": Fault(_damaged(lambda step: (step / "COMMIT").unlink()), "death"),
    "truncated file": Fault(_damaged(lambda step: os.truncate(step / "optimizer-00000.safetensors", 100)), "death"),
    "missing file": Fault(_damaged(lambda step: (step / "weights-00000.safetensors").unlink()), "death"),
    "empty step": Fault(_damaged(lambda step: (shutil.rmtree(step), step.mkdir())), "death"),
    "all damaged": Fault(_damaged(lambda step: flip(step / "weights-00000.safetensors"), everywhere=True), "death"),
    "flipped bit in memory": Fault(_flip_in_memory, "death", at_once=False),
    "truncated data": Fault(_cut_data, "death"),
}


@dataclass(frozen=True)
class Strike:
    """A fault at a place, the first time that a rank gets there."""

    fault: str
    place: Place

    def __str__(self) -> str:
        return f"{self.fault} at: {self.place}"


@dataclass(frozen=True)
class Struck:
    """When a strike happened (seconds since the epoch), and how many steps were done then."""

    time: float
    complete_steps: int


def plant(strikes: Sequence[Strike]) -> None:
    """From now on ranks that this process forks meet with the strikes, each of which is noted in the working directory."""
    folder = Path.cwd()

    def on_arrival(journey: Journey, in_step: Place, in_all: Place) -> None:
        for number, strike in enumerate(strikes):
            if strike.place == (in_step if strike.place.step else in_all) and _first(folder, number, journey):
                FAULTS[strike.fault].strike()

    Journey(on_arrival).begin()


def _first(folder: Path, number: int, journey: Journey) -> bool:
    """Whether this strike has not happened yet; now it does."""
    try:
        with open(_note(folder, number), "x", encoding="utf-8") as file:
            json.dump({"time": time.time(), "complete_steps": journey.complete_steps}, file)
    except FileExistsError:
        return False
    return True


def struck(folder: Path, number: int) -> Struck | None:
    """When the strike of this number happened; None if it has not."""
    note = _note(folder, number)
    return Struck(**json.loads(note.read_text())) if note.exists() else None


def _note(folder: Path, number: int) -> Path:
    return folder / f"strike-{number}"
