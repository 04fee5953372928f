"""The fault matrix: which faults strike where, and how each run is to end. FAST is what every change must pass."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tests.faults.campaign import EVALUATED, FOUR_LAYERS, LAYOUTS, Injection
from tests.faults.disk import can_mount
from tests.faults.places import Place
from tests.faults.strikes import Strike

ROWS = {
    "F1": "a rank is killed or crashes, in each phase of a step",
    "F2": "a rank is killed at a message between pipeline stages",
    "F3": "a rank is killed while its part of a checkpoint is written",
    "F4": "rank 0 is killed while it commits; before the first checkpoint; in the last save",
    "F5": "a rank hangs: in a collective, a message, a save, an evaluation, loading, the start",
    "F6": "a rank, or its disk, is slow",
    "F7": "TERM or USR1 to one rank, to all, twice",
    "F8": "a disk is full, broken or read-only while a checkpoint is written",
    "F9": "the newest checkpoint is damaged",
    "F10": "all checkpoints are damaged",
    "F13": "after a death the run goes on in another layout",
    "F14": "the next start has an impossible layout",
    "F15": "a rank comes late, or not at all",
    "F17": "the training data is damaged between two starts",
    "F19": "a bit of one rank's weights changes in memory",
    "F20": "kills at random places, several in a run",
    "F22": "the supervisor is killed; the clock jumps",
}
SYNCHRONOUS = ("--checkpoint.asynchronous", "false")
NO_RESTART = ("--max-restarts", "0")
STEP = 4  # at which most strikes happen: step 2 is saved by then, step 4 is about to be
GRID = "dp2 tp2"


def one(row: str, layout: str, fault: str, place: Place, **how: object) -> Injection:
    return Injection(row, layout, (Strike(fault, place),), **how)


def at_each_rank(
    row: str, layout: str, fault: str, points: Iterable[str | tuple[str, int]], step: int = STEP, **how: object
) -> list[Injection]:
    """A point is a name, or a name and the visit."""
    named = [(point, 1) if isinstance(point, str) else point for point in points]
    ranks = range(LAYOUTS[layout].ranks)
    return [one(row, layout, fault, Place(point, rank, step, visit), **how) for point, visit in named for rank in ranks]


def in_steps() -> list[Injection]:
    points = (
        "before reading data", "step", "F0", "F1", "B0", "B1", ("reduce_scatter over tp", 10), ("all_gather over tp", 20),
        "reduce_scatter over data", "all_reduce over world", "before update", ("before part of the update", 2), "after update",
        "all_gather over data",
    )  # fmt: skip
    post_validated = (("before update", 2), "broadcast over pp", ("F0", 2))
    return [
        *at_each_rank("F1", GRID, "SIGKILL", points),
        *at_each_rank("F1", GRID, "SIGKILL", ["evaluate"], 3, settings=EVALUATED),
        *at_each_rank("F1", GRID, "crash", ["B1", "before update"]),
        *at_each_rank("F1", "dp4 zero0", "SIGKILL", ["all_reduce over data", "before update"]),
        *at_each_rank("F1", "dp2 zero2", "SIGKILL", [("reduce_scatter over data", 3), "all_gather over data"]),
        *at_each_rank("F1", "pp2 zb-h1", "SIGKILL", post_validated),
        *at_each_rank("F1", "one rank", "SIGKILL", ["B2"]),
    ]


def in_messages() -> list[Injection]:
    ends = {0: ["waits for B1", "B2"], 1: ["waits for F1", "waits for B0", "B3"], 2: ["waits for F2", "waits for B1", "F3"],
            3: ["waits for F2", "B1"]}  # fmt: skip
    transfers = [("receive over pp", 1), ("receive over pp", 3), ("send over pp", 1), ("send over pp", 4)]
    return [
        *at_each_rank("F2", "pp4", "SIGKILL", transfers),
        *(one("F2", "pp4", "SIGKILL", Place(point, rank, STEP)) for rank, points in ends.items() for point in points),
        *at_each_rank("F2", "tp2 pp2", "SIGKILL", [("send over pp", 2), ("receive over pp", 2)]),
        *at_each_rank("F2", "pp2 dp2", "SIGKILL", [("send over pp", 1), ("receive over pp", 2)]),
        *at_each_rank("F2", "pp2 interleaved", "SIGKILL",
                      [("send over pp", 6), ("receive over pp", 12), "F0.1", "B1.1", "waits for B0"]),
        *at_each_rank("F2", "pp2 zb-h1", "SIGKILL", [("send over pp", 4), ("receive over pp", 3), "I2", "W1"]),
        *at_each_rank("F2", "pp2 zb-v", "SIGKILL", [("send over pp", 3), ("receive over pp", 2), "I1", "W2"]),
    ]  # fmt: skip


COMMIT_POINTS = ("before fsync of manifest", "after fsync of manifest", "after fsync of COMMIT", "before fsync of step")


def in_parts_of_saves() -> list[Injection]:
    points = ("before part", ("before block", 16), "before fsync of weights", "after fsync of optimizer")
    return [
        *at_each_rank("F3", GRID, "SIGKILL", [*points, "before vote", "after vote"], settings=SYNCHRONOUS),
        *at_each_rank("F3", GRID, "SIGKILL", ["before copy", *points, "after part", "before hearing of sums", "before commit"]),
        *at_each_rank("F3", "pp4", "SIGKILL", ["after part"]),
    ]


def in_commits() -> list[Injection]:
    renames = ("before rename to step", "after rename to step")
    found = []
    for how in ({"settings": SYNCHRONOUS}, {}):
        found += [one("F4", GRID, "SIGKILL", Place(point, 0, STEP), **how) for point in (*COMMIT_POINTS, *renames)]
        found += [one("F4", GRID, "SIGKILL", Place(point, 0, step), **how) for point in renames for step in (2, 6)]
    return [
        *found,
        *at_each_rank("F4", GRID, "SIGKILL", ["first step"], 1),
        *at_each_rank("F4", GRID, "SIGKILL", ["save"], 2),
        *at_each_rank("F4", GRID, "SIGKILL", [("before vote", 2)], 6),
    ]


def in_hangs() -> list[Injection]:
    death = Strike("SIGKILL", Place("B0", 0, STEP))
    loading = [
        Injection("F5", GRID, (death, Strike("SIGSTOP", Place("before loading", rank))), settings=SYNCHRONOUS)
        for rank in range(4)
    ]
    return [
        *at_each_rank("F5", GRID, "SIGSTOP", [("all_gather over tp", 20), "reduce_scatter over data"]),
        *at_each_rank("F5", GRID, "sleep", ["F1"]),
        *at_each_rank("F5", GRID, "SIGSTOP", ["evaluate"], 3, settings=EVALUATED),
        *at_each_rank("F5", "pp4", "SIGSTOP", [("send over pp", 2), ("receive over pp", 3)]),
        *at_each_rank("F5", "pp2 zb-v", "SIGSTOP", ["W1"]),
        *at_each_rank("F5", GRID, "SIGSTOP", ["before vote"], settings=SYNCHRONOUS),
        *at_each_rank("F5", GRID, "sleep", ["before fsync of weights"], settings=SYNCHRONOUS),
        *at_each_rank("F5", GRID, "SIGSTOP", ["after copy"]),
        one("F5", GRID, "sleep", Place("before fsync of weights", 1, 2)),
        one("F5", "pp4", "sleep", Place("before fsync of weights", 3, STEP)),
        *loading,
    ]


def slow() -> list[Injection]:
    return [
        *at_each_rank("F6", GRID, "1 s late", ["F1"]),
        *at_each_rank("F6", "pp4", "1 s late", ["B1"]),
        one("F6", GRID, "1 s late", Place("before reading data", 1, STEP)),
        one("F6", GRID, "1 s late", Place("before fsync of weights", 2, STEP)),
        one("F6", GRID, "1 s late", Place("before fsync of manifest", 0, STEP), settings=SYNCHRONOUS),
    ]


def signals() -> list[Injection]:
    stopped = {"codes": (75, 0)}
    to_all = ("SIGTERM to all", "SIGUSR1 to all", "SIGTERM to all twice")
    return [
        *at_each_rank("F7", GRID, "SIGTERM", ["B0"], 2, **stopped),
        *at_each_rank("F7", GRID, "SIGUSR1", ["F1"], 3, **stopped),
        *at_each_rank("F7", "pp4", "SIGTERM", ["F2"], 2, **stopped),
        *(one("F7", GRID, fault, Place("F0", 1, 2), **stopped) for fault in to_all),
        one("F7", GRID, "SIGTERM twice", Place("F0", 2, 2), **stopped),
        one("F7", GRID, "SIGTERM", Place("save", 3, 2), **stopped),
        one("F7", "pp2 zb-h1", "SIGTERM", Place("F1", 1, 3), **stopped),
    ]


def disks() -> list[Injection]:
    places = {"ENOSPC": Place("before block", 1, STEP, 5), "EIO": Place("before fsync of weights", 2, STEP),
              "EROFS": Place("before part", 3, STEP)}  # fmt: skip
    commits = {"ENOSPC": "before fsync of manifest", "EIO": "before fsync of step", "EROFS": "before rename to step"}
    found = []
    for how in ({"settings": SYNCHRONOUS}, {}):
        found += [one("F8", GRID, fault, place, unsaved=(STEP,), **how) for fault, place in places.items()]
        found += [one("F8", GRID, fault, Place(point, 0, STEP), unsaved=(STEP,), **how) for fault, point in commits.items()]
    return [
        *found,
        *(full_disks() if can_mount() else []),
        one("F8", "pp4", "ENOSPC", Place("before fsync of optimizer", 3, 2), unsaved=(2,)),
        Injection("F8", GRID, (Strike("ENOSPC", Place("before block", 1, STEP, 5)), Strike("SIGKILL", Place("B1", 2, 5))),
                  unsaved=(), settings=SYNCHRONOUS),
    ]  # fmt: skip


def full_disks() -> list[Injection]:
    """A disk that is really full; root can have one where the machine lets it mount."""
    found = []
    for point, how in (("F0", {"settings": SYNCHRONOUS}), ("before copy", {})):
        strikes = (Strike("full disk", Place(point, 1, STEP)), Strike("room on the disk", Place("F0", 1, 6)))
        found.append(Injection("F8", GRID, strikes, unsaved=(STEP,), small_disk=True, **how))
    return found


DAMAGES = (
    "flipped weight", "flipped moment", "flipped manifest", "flipped COMMIT", "no COMMIT", "truncated file", "missing file",
    "empty step",
)  # fmt: skip
REFUSED = {"codes": (78, 78), "says": "no good checkpoint is left"}


def damage() -> list[Injection]:
    return [
        *(one("F9", GRID, fault, Place("F0", i % 4, 5), settings=SYNCHRONOUS, aside=1) for i, fault in enumerate(DAMAGES)),
        one("F9", "pp4", "flipped weight", Place("F0", 2, 5), settings=SYNCHRONOUS, aside=1),
        one("F10", GRID, "all damaged", Place("F0", 1, 5), settings=SYNCHRONOUS, **REFUSED),
        one("F10", "pp4", "all damaged", Place("F0", 3, 6), **REFUSED),
    ]


def other_layouts() -> list[Injection]:
    pairs = [(GRID, "pp4"), ("pp4", GRID), (GRID, "one rank"), ("one rank", "tp2 pp2"), ("tp2 pp2", "pp2 interleaved"),
             ("pp2 interleaved", "dp4 zero0"), ("dp4 zero0", "pp2 zb-v"), ("pp2 zb-v", "dp2 zero2"), ("dp2 zero2", "pp2 dp2"),
             ("pp2 dp2", "pp2 zb-h1"), ("pp2 zb-h1", GRID)]  # fmt: skip
    moved = {"options": NO_RESTART, "settings": FOUR_LAYERS, "codes": (69, 0)}
    generator = random.Random(13)
    found = []
    for layout, then in pairs:
        place = Place("before update", generator.randrange(LAYOUTS[layout].ranks), generator.randrange(1, 7))
        found.append(one("F13", layout, "SIGKILL", place, then=(then,), **moved))
    return found


IMPOSSIBLE = {  # layouts, and what the error is to name
    "dp3": "train.global_batch_size",
    "tp3": "num_heads",
    "pp3": "num_layers",
    "tp2 on 3 ranks": "must be a multiple of tp 2",
}


def impossible_layouts() -> list[Injection]:
    how = {"options": NO_RESTART, "codes": (69, 78, 0), "settings": SYNCHRONOUS}
    death = Place("B0", 2, 5)
    return [one("F14", GRID, "SIGKILL", death, then=(layout, GRID), says=text, **how) for layout, text in IMPOSSIBLE.items()]


def late() -> list[Injection]:
    return [
        *at_each_rank("F15", GRID, "sleep", ["start"], 0, settings=("--train.start_timeout", "2")),
        one("F15", GRID, "1 s late", Place("start", 2)),
    ]


def data() -> list[Injection]:
    return [one("F17", GRID, "truncated data", Place("F0", 1, 5), codes=(78, 78), says="train.bin")]


def corrupted_memory() -> list[Injection]:
    return at_each_rank("F19", "dp4 zero0", "flipped bit in memory", ["F0"], 3)


def supervisors() -> list[Injection]:
    killed = {"codes": (-9, 0)}
    jumps = ("clock a day forward", "clock a day back")
    return [
        one("F22", GRID, "SIGKILL to the supervisor", Place("B1", 2, 3), **killed),
        one("F22", GRID, "SIGKILL to the supervisor", Place("before vote", 0, STEP), settings=SYNCHRONOUS, **killed),
        one("F22", "pp4", "SIGKILL to the supervisor", Place("F1", 0, 1), **killed),
        *(one("F22", GRID, jump, Place("F0", rank, 3)) for jump in jumps for rank in (0, 3)),
    ]


def random_kills(seed: int, runs: int = 8, kills: int = 3) -> list[Injection]:
    """Runs in which several ranks are killed, each in another step, at any of the points that every rank passes in a step."""
    generator = random.Random(seed)
    points = {
        GRID: ["step", "F0", "B1", "all_gather over tp", "reduce_scatter over tp", "all_reduce over world", "before update",
               "before reading data", "after update"],
        "pp4": ["step", "F1", "B2", "send over pp", "receive over pp", "all_reduce over world", "after update"],
        "pp2 interleaved": ["step", "F3.1", "B0", "B1.1", "send over pp", "receive over pp", "before update"],
    }  # fmt: skip
    found = []
    for _ in range(runs):
        layout = generator.choice(list(points))
        steps = sorted(generator.sample(range(2, 7), kills))
        places = [Place(generator.choice(points[layout]), generator.randrange(LAYOUTS[layout].ranks), step) for step in steps]
        strikes = tuple(Strike("SIGKILL", place) for place in places)
        found.append(Injection("F20", layout, strikes, options=("--max-restarts", "10")))
    return found


def whole_matrix(seed: int) -> list[Injection]:
    parts = (in_steps, in_messages, in_parts_of_saves, in_commits, in_hangs, slow, signals, disks, damage, other_layouts,
             impossible_layouts, late, data, corrupted_memory, supervisors)  # fmt: skip
    return [injection for part in parts for injection in part()] + random_kills(seed)


FAST = [
    one("F1", GRID, "SIGKILL", Place("before reading data", 1, STEP)),
    one("F1", GRID, "SIGKILL", Place("reduce_scatter over data", 2, STEP)),
    one("F1", GRID, "SIGKILL", Place("before part of the update", 3, STEP, 2)),
    one("F1", GRID, "crash", Place("B1", 0, STEP)),
    one("F2", "pp4", "SIGKILL", Place("send over pp", 0, STEP)),
    one("F2", "pp4", "SIGKILL", Place("waits for B0", 1, STEP)),
    one("F2", "pp4", "SIGKILL", Place("receive over pp", 3, STEP, 3)),
    one("F3", GRID, "SIGKILL", Place("before block", 2, STEP, 16)),
    one("F3", GRID, "SIGKILL", Place("after vote", 1, STEP), settings=SYNCHRONOUS),
    one("F4", GRID, "SIGKILL", Place("after fsync of manifest", 0, STEP)),
    one("F4", GRID, "SIGKILL", Place("after rename to step", 0, STEP), settings=SYNCHRONOUS),
    one("F4", GRID, "SIGKILL", Place("first step", 3, 1)),
    one("F5", GRID, "SIGSTOP", Place("all_gather over tp", 3, STEP, 20)),
    one("F5", "pp4", "SIGSTOP", Place("send over pp", 1, STEP, 2)),
    one("F5", GRID, "sleep", Place("before fsync of weights", 1, STEP), settings=SYNCHRONOUS),
    one("F6", GRID, "1 s late", Place("F1", 1, STEP)),
    one("F7", GRID, "SIGTERM", Place("B0", 3, 2), codes=(75, 0)),
    one("F8", GRID, "ENOSPC", Place("before block", 1, STEP, 5), unsaved=(STEP,)),
    one("F9", GRID, "flipped moment", Place("F0", 2, 5), settings=SYNCHRONOUS, aside=1),
    one("F10", GRID, "all damaged", Place("F0", 1, 5), settings=SYNCHRONOUS, **REFUSED),
    one("F13", "tp2 pp2", "SIGKILL", Place("before update", 2, 5), then=(GRID,), options=NO_RESTART, codes=(69, 0)),
    impossible_layouts()[0],
    late()[2],
    *data(),
    supervisors()[0],
]
