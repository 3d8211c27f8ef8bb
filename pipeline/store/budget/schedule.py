"""Which shard is written next, and which make room for it: arithmetic, without files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from .needs import ShardNeeds


class Turn(NamedTuple):
    """What to do next: shards to evict, and then the shard to write, None if there is none."""

    evict: list[int]
    write: int | None


@dataclass
class Residents:
    """Shards of a store on disk and in flight, within a number of bytes.

    Attributes:
        room: bytes for shards.
        sizes: bytes of each shard, or the most that it may take, ``[shards]``.
        on_disk: shard -> bytes.
        in_flight: shards that are being written -> the most bytes that each may take.
        held: shards whose files a run holds open: evicted ones still take space.
    """

    room: int
    sizes: np.ndarray
    on_disk: dict[int, int]
    in_flight: dict[int, int] = field(default_factory=dict)
    held: frozenset[int] = frozenset()

    @property
    def held_bytes(self) -> int:
        """Bytes of evicted shards that a run holds open."""
        return sum(int(self.sizes[shard]) for shard in self.held if shard not in self.on_disk)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk and in flight."""
        return sum(self.on_disk.values()) + sum(self.in_flight.values())

    def most(self) -> int:
        """Shards that may be on disk together, at most."""
        fitting = np.searchsorted(np.cumsum(np.sort(self.sizes)), self.room, side="right")
        return min(len(self.sizes), int(fitting) + 1)

    def turn(self, wanted: Sequence[int]) -> Turn:
        """What to do next.

        The shards that fit into the room, from the first wanted on, belong on disk. The first of
        them that is not there is written; others are evicted as far as it needs their room, those
        that are wanted last first.

        Args:
            wanted: shards in the order in which they are needed.
        """
        belonging: dict[int, int] = {}  # shard -> its place
        left = self.room
        for shard in wanted:
            left -= int(self.sizes[shard])
            if left < 0:
                break
            belonging[shard] = len(belonging)
        missing = [s for s in belonging if s not in self.on_disk and s not in self.in_flight]
        if not missing:
            return Turn([], None)
        place = {shard: number for number, shard in enumerate(wanted)}
        others = sorted(
            (shard for shard in self.on_disk if shard not in belonging),
            key=lambda shard: place.get(shard, len(place)),
        )
        needed = self.num_bytes + int(self.sizes[missing[0]]) - self.room
        evicted = []
        held = self.held_bytes
        while needed > 0 and others:
            evicted.append(others.pop())
            needed -= self.on_disk[evicted[-1]]
            if evicted[-1] in self.held:
                held += self.on_disk[evicted[-1]]
        # What is in flight may not belong there any more, after a run fell back: it is waited for.
        # So is a run that has yet to close files of what is evicted.
        begins = needed + held <= 0 and missing[0] not in self.held
        return Turn(evicted, missing[0] if begins else None)


def merge(
    kept: Iterable[int], runs: "Iterable[tuple[ShardNeeds, int]]", num_shards: int
) -> list[int]:
    """Shards in the order in which runs need them: first those to keep, then by the position at
    which a run comes to them, so that the slowest run comes first.

    Args:
        runs: needs and position of each run.
        num_shards: that may be on disk.
    """
    ahead = [needs.ahead(position, num_shards) for needs, position in runs]
    starts = np.concatenate([np.empty(0, np.int64), *(start for start, _ in ahead)])
    shards = np.concatenate([np.empty(0, np.int64), *(shard for _, shard in ahead)])
    ordered = shards[np.argsort(starts, kind="stable")]
    unique, first = np.unique(ordered, return_index=True)
    return [*dict.fromkeys([*sorted(kept), *unique[np.argsort(first)].tolist()])]
