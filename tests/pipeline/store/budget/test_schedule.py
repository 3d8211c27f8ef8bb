"""What is on disk as runs go on, fall back and end, simulated without files."""

from dataclasses import dataclass

import numpy as np
import pytest

from semroute.pipeline.store.budget import needs
from semroute.pipeline.store.budget.needs import ShardNeeds
from semroute.pipeline.store.budget.schedule import Residents, merge
from semroute.pipeline.store.order.sampler import SampleIndices


@dataclass
class Needs:
    """Shards that a run needs, position by position."""

    shards: list[list[int]]

    def ahead(self, position, num_shards):
        starts = [p for p in range(position, len(self.shards)) for _ in self.shards[p]]
        flat = [shard for shards in self.shards[position:] for shard in shards]
        return np.array(starts, np.int64), np.array(flat, np.int64)


def draw_needs(rng, num_shards, epochs, window):
    """Each epoch has the shards in another order, of which some are mixed at a time."""
    positions = []
    for _ in range(epochs):
        order = rng.permutation(np.arange(1, num_shards)).tolist()
        positions += [order[max(0, n - window + 1) : n + 1] for n in range(len(order))]
    return Needs(positions)


@pytest.mark.parametrize("seed", range(12))
def test_runs_end_within_the_room_however_they_go(seed):
    rng = np.random.default_rng(seed)
    num_shards, window = int(rng.integers(8, 24)), int(rng.integers(1, 4))
    sizes = rng.integers(50, 100, num_shards)
    runs = [draw_needs(rng, num_shards, 2, window) for _ in range(int(rng.integers(1, 4)))]
    if seed % 2:
        runs = [runs[0]] * len(runs)
    room = (window + 1) * 100 + int(rng.integers(0, 400))
    residents = Residents(room, sizes, {})
    positions = [0] * len(runs)
    num_written = num_evicted = 0
    for _ in range(20_000):
        pending = [(n, p) for n, p in zip(runs, positions, strict=True) if p < len(n.shards)]
        if not pending:
            break
        turn = residents.turn(merge([0], pending, residents.most()))
        for shard in turn.evict:
            assert shard != 0
            del residents.on_disk[shard]
            num_evicted += 1
        if turn.write is not None:
            assert turn.write not in residents.on_disk
            residents.in_flight[turn.write] = int(sizes[turn.write])
            assert turn.write not in residents.held
        assert residents.num_bytes + residents.held_bytes <= room
        still = {s for s in residents.held if s in residents.on_disk or rng.random() < 0.7}
        residents.held = frozenset(still | {s for s in residents.on_disk if rng.random() < 0.2})
        if residents.in_flight and (turn.write is None or rng.random() < 0.5):
            shard = int(rng.choice([*residents.in_flight]))
            residents.on_disk[shard] = residents.in_flight.pop(shard)
            num_written += 1
        if rng.random() < 0.02:  # killed, and resumed from a checkpoint
            fallen = int(rng.integers(len(runs)))
            positions[fallen] = max(0, positions[fallen] - int(rng.integers(1, 8)))
        for number, run in enumerate(runs):
            if positions[number] < len(run.shards) and rng.random() < 0.7:
                needed = {0, *run.shards[positions[number]]}
                positions[number] += needed <= residents.on_disk.keys()
    assert positions == [len(run.shards) for run in runs]
    assert num_written > num_shards - 1
    assert num_written - num_evicted == len(residents.on_disk)


def test_runs_in_the_same_order_share_what_is_written():
    """A shard is written once per epoch for all of them: the fast ones wait."""
    run = draw_needs(np.random.default_rng(0), 12, 2, 2)
    wanted = merge([0], [(run, 9), (run, 2), (run, 5)], 6)
    assert {*wanted[:3]} == {0, *run.shards[2]}
    assert wanted == merge([0], [(run, 2)], 6)


def test_the_last_wanted_goes_first_and_only_as_far_as_there_is_need():
    residents = Residents(40, np.full(6, 10), {0: 10, 1: 10, 2: 10, 3: 10})
    assert residents.turn([0, 1, 2, 3]) == ([], None)
    assert residents.turn([0, 4, 1, 2, 5, 3]) == ([3], 4)
    assert residents.turn([0, 4, 5, 1]) == ([3], 4)  # 3 is not wanted at all
    residents.in_flight[5] = 10
    del residents.on_disk[3]
    assert residents.turn([0, 4, 1, 2]) == ([], None)  # 5 is on its way, and in the way


class Counting:
    """A sampler that shows caption p at position p."""

    def indices(self, first, num):
        captions = np.arange(first, first + num)
        return SampleIndices(np.zeros(num, np.int64), captions, captions)


@pytest.mark.parametrize("block", [8, 1_000])
def test_a_granule_needs_its_shards_and_those_of_the_batch_after_it(monkeypatch, block):
    monkeypatch.setattr(needs, "BLOCK_POSITIONS", block)
    shard_of = np.arange(100) // 3
    found = ShardNeeds(
        shard_of, Counting(), [0], batch_size=2, stop=26, granule=4, kept=frozenset([0]), epoch=26
    )
    for position in range(28):
        starts, shards = found.ahead(position, 99)
        assert (np.diff(starts) >= 0).all()
        expected = set()
        for start in range(position // 4 * 4, 26 if position < 26 else 0, 4):
            stop = min(start + 4, 26) + 2 if start + 4 >= 26 else start + 6
            expected |= {(start, s) for s in shard_of[start:stop].tolist() if s}
        assert {*zip(starts.tolist(), shards.tolist(), strict=True)} == expected
    absent = np.zeros(34, bool)
    absent[5] = True  # captions 15 to 17, of which granule 12 reads 15, and the batch after it 16
    assert found.steps_before(4, absent, 99) == 4
    assert found.largest(np.full(34, 10)) == 30
