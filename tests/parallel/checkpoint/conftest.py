"""A small model in many layouts, ranks as threads or as forked gloo processes, and small CRC blocks."""

import datetime
import json
import math
import os
import signal
import threading
import time
import traceback
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.checkpoint import files
from parallel.checkpoint.save import save_checkpoint
from parallel.checkpoint.voting import GroupVoter
from parallel.shards import Box, Replica, Segment, Shard, TensorBox, range_pieces

torch.set_num_threads(1)  # the ranks are forked

LAYERS, HIDDEN, QUERY, KEY, FFN, VOCABULARY = 3, 36, 36, 18, 50, 101
OPTIMIZER_KINDS = ("master", "exp_avg", "exp_avg_sq")


def part(total, parts, index):
    return index * total // parts, (index + 1) * total // parts


def full_value(name, shape, dtype):
    """The whole global tensor: a function of its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


def rows_shard(names, sizes, width, tp, rank):
    """Fused row-split tensors: a block of each, one after the other."""
    segments, rows = [], 0
    for name, total in zip(names, sizes, strict=True):
        low, high = part(total, tp, rank)
        box = Box((low, 0), (high - low, width))
        segments.append(Segment(name, (total, width), box, Box((rows, 0), box.shape)))
        rows += high - low
    return Shard((rows, width), tuple(segments))


def columns_shard(name, rows, total, tp, rank):
    low, high = part(total, tp, rank)
    shape = (rows, high - low)
    return Shard(shape, (Segment(name, (rows, total), Box((0, low), shape), Box.whole(shape)),))


def vocabulary_shard(name, tp, rank):
    """Rows padded to a multiple of tp."""
    rows = -(-VOCABULARY // tp)
    low, high = min(rank * rows, VOCABULARY), min((rank + 1) * rows, VOCABULARY)
    box = Box((low, 0), (high - low, HIDDEN))
    segments = (Segment(name, (VOCABULARY, HIDDEN), box, Box((0, 0), box.shape)),) if high > low else ()
    return Shard((rows, HIDDEN), segments)


def replicated_shard(name, shape, tp, rank):
    return Shard(shape, (Segment(name, shape, Box.whole(shape), Box.whole(shape), Replica("tp", rank, tp, True)),))


def rank_shards(tp, pp, tp_rank, pp_rank):
    """The parameters of one rank: {runtime name: Shard}."""
    shards = {}
    if pp_rank == 0:
        shards["embedding"] = vocabulary_shard("embedding", tp, tp_rank)
        shards["scale"] = replicated_shard("scale", (), tp, tp_rank)
    for i in range(*part(LAYERS, pp, pp_rank)):
        layer = f"layers.{i}"
        names = [f"{layer}.attention.{n}" for n in ("wq", "wk", "wv")]
        shards[f"{layer}.wqkv"] = rows_shard(names, (QUERY, KEY, KEY), HIDDEN, tp, tp_rank)
        shards[f"{layer}.wo"] = columns_shard(f"{layer}.attention.wo", HIDDEN, QUERY, tp, tp_rank)
        shards[f"{layer}.w13"] = rows_shard([f"{layer}.ffn.w1", f"{layer}.ffn.w3"], (FFN, FFN), HIDDEN, tp, tp_rank)
        shards[f"{layer}.w2"] = columns_shard(f"{layer}.ffn.w2", HIDDEN, FFN, tp, tp_rank)
        shards[f"{layer}.norm"] = replicated_shard(f"{layer}.norm", (HIDDEN,), tp, tp_rank)
    if pp_rank == pp - 1:
        shards["norm"] = replicated_shard("norm", (HIDDEN,), tp, tp_rank)
        shards["head"] = vocabulary_shard("head", tp, tp_rank)
    return shards


class RankState:
    """What one rank of a layout (tp, pp, dp) holds: bf16 weights, and its flat fp32 slice of the optimizer's three states.

    Every element starts as NaN where not `filled`; padding is always NaN, so a load that touches it shows.
    """

    def __init__(self, layout, rank, filled):
        tp, pp, dp = layout
        self.filled = filled
        pp_rank, rest = divmod(rank, dp * tp)
        self.dp_rank, tp_rank = divmod(rest, tp)
        self.shards = rank_shards(tp, pp, tp_rank, pp_rank)
        self.weights = {name: self._local(shard) for name, shard in self.shards.items()}
        total = sum(math.prod(shard.shape) for shard in self.shards.values())
        self.low, self.high = part(total, dp, self.dp_rank)  # of the concatenated local tensors: cuts fall anywhere
        self.optimizer = {kind: torch.full((self.high - self.low,), math.nan) for kind in OPTIMIZER_KINDS}
        if filled:
            for item in self.optimizer_boxes():
                item.tensor.copy_(full_value(item.name, item.global_shape, torch.float32)[item.box.slices()])

    def _local(self, shard):
        local = torch.full(shard.shape, math.nan, dtype=torch.bfloat16)
        for segment in shard.segments if self.filled else ():
            whole = full_value(segment.name, segment.global_shape, torch.bfloat16)
            local[segment.local.slices()] = whole[segment.box.slices()]
        return local

    def weight_boxes(self, writing=False):
        for name, shard in self.shards.items():
            for segment in shard.segments:
                if writing and (self.dp_rank or (segment.replica and segment.replica.index)):
                    continue
                yield TensorBox(segment.name, segment.global_shape, segment.box, self.weights[name][segment.local.slices()])

    def optimizer_boxes(self, writing=False):
        for kind in OPTIMIZER_KINDS:
            offset = 0
            for shard in self.shards.values():
                count = math.prod(shard.shape)
                low, high = max(self.low - offset, 0), min(self.high - offset, count)
                for piece in range_pieces(shard, low, high):
                    if writing and piece.segment.replica and piece.segment.replica.index:
                        continue
                    first = offset + piece.start - self.low
                    view = self.optimizer[kind][first : first + piece.box.numel].view(piece.box.shape)
                    yield TensorBox(f"{kind}.{piece.segment.name}", piece.segment.global_shape, piece.box, view)
                offset += count

    def groups(self):
        return {"weights": self.weight_boxes(writing=True), "optimizer": self.optimizer_boxes(writing=True)}

    def targets(self):
        return [*self.weight_boxes(), *self.optimizer_boxes()]

    def equals(self, other):
        """Bit for bit, padding included (both NaN)."""
        mine, theirs = ([*state.weights.values(), *state.optimizer.values()] for state in (self, other))
        return all(
            torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
            for a, b in zip(mine, theirs, strict=True)
        )


class ThreadVoter:
    """Ranks as threads of this process."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def _exchange(self, value):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait(20)
        values = list(self.shared.values)
        self.shared.barrier.wait(20)
        return values

    def all_ok(self, ok):
        return all(self._exchange(ok))

    def broadcast_int(self, value):
        return self._exchange(value)[0]


def run_threads(size, function):
    """function(voter) on each of `size` threads -> what each returned or raised, in the order of ranks."""
    shared = SimpleNamespace(values=[None] * size, barrier=threading.Barrier(size))
    outcomes = [None] * size

    def body(rank):
        try:
            outcomes[rank] = function(ThreadVoter(rank, size, shared))
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return outcomes


def save_layout(root, step, layout, **options):
    """Save the model in `layout`, its ranks as threads; returns the step directory."""
    options = {"state": {"step": step}, **options}

    def body(voter):
        return save_checkpoint(root, step, RankState(layout, voter.rank, True).groups(), world=voter, **options)

    outcomes = run_threads(math.prod(layout), body)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    assert len(set(outcomes)) == 1
    return outcomes[0]


def run_ranks(size, function, directory, deadline_seconds=25):
    """Fork `size` gloo ranks; function(voter) on each -> [(exit code, error text)]; -9 where killed.

    Past the deadline the ranks (only these) are killed and the test fails.
    """
    store = Path(directory) / f"store-{time.time_ns()}"
    pids = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code, text = 1, ""
            try:
                timeout = datetime.timedelta(seconds=10)
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
                function(GroupVoter())
                dist.barrier()
                code = 0
            except BaseException as error:
                text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            finally:
                Path(f"{store}.{rank}").write_text(json.dumps(text))
                os._exit(code)
        pids[pid] = rank
    codes, end = {}, time.monotonic() + deadline_seconds
    while pids and time.monotonic() < end:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not pids, f"ranks {sorted(pids.values())} hung"
    texts = [Path(f"{store}.{rank}") for rank in range(size)]
    return [(codes[rank], json.loads(path.read_text()) if path.exists() else "") for rank, path in enumerate(texts)]


@pytest.fixture
def model():
    """The helpers of this file, for test modules (which cannot import a conftest)."""
    return SimpleNamespace(
        RankState=RankState, save_layout=save_layout, run_threads=run_threads, run_ranks=run_ranks, full_value=full_value
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """CRC blocks and staging of 4096 bytes, so that small tensors cross many."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
