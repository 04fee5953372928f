"""What travels between the data ranks: gradients as their buckets fill, weights ahead of the forward pass that needs them."""

from __future__ import annotations

from collections.abc import Sequence

from parallel.zero.buckets import Bucket

REDUCTIONS_UNDER_WAY = 2  # one on the wire, and one behind it so that the link is never idle: more would hold more buffers
GATHERS_AHEAD = 2  # likewise; and more would be in the way of the forward pass's own messages


class Reductions:
    """The buckets whose gradients are on their way, oldest first, at most `limit` of them. 0: each is waited for at once."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._buckets: list[Bucket] = []

    def start(self, bucket: Bucket) -> None:
        """Send a bucket's gradients on their way.

        Shards with copies are summed over them when the next bucket leaves: their first half is about done by then.
        """
        if bucket in self._buckets:  # of the backward pass before
            self._buckets.remove(bucket)
            bucket.wait_reduction()
        bucket.start_reduction()
        for earlier in self._buckets:
            earlier.start_copies_sum()
        self._buckets.append(bucket)
        while len(self._buckets) > self._limit:
            self._buckets.pop(0).wait_reduction()

    def finish(self) -> None:
        """Wait for all that is under way."""
        for bucket in self._buckets:
            bucket.start_copies_sum()
        while self._buckets:
            self._buckets.pop(0).wait_reduction()


class Gathers:
    """The weights of `buckets`, which come in the order of the next forward passes.

    Two are on their way ahead of the bucket in use; waiting for one starts another. Whoever waits for none of them (a parameter
    that no module uses) holds nothing up: `finish` completes all.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = list(buckets)
        self._places = {bucket: place for place, bucket in enumerate(self._buckets)}
        self._started = len(self._buckets)  # nothing to do

    def start(self) -> None:
        """The shards have new weights: send the first ones on their way."""
        self._started = 0
        self._start(GATHERS_AHEAD)

    def wait_for(self, bucket: Bucket) -> None:
        """The bucket's weights are about to be used."""
        self._start(self._places[bucket] + 1 + GATHERS_AHEAD)
        bucket.wait_gather()

    def finish(self) -> None:
        """Wait for all of them."""
        self._start(len(self._buckets))
        for bucket in self._buckets:
            bucket.wait_gather()

    def _start(self, count: int) -> None:
        """Let the first `count` buckets be on their way."""
        for bucket in self._buckets[self._started : count]:
            bucket.start_gather()
        self._started = max(self._started, min(count, len(self._buckets)))
