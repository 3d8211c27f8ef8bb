import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semroute.pipeline.store.features import NULL_CAPTION
from semroute.pipeline.store.order.dataset import SampleIndex
from semroute.pipeline.store.order.sampler import BatchPartition, Interleave, MixtureSampler
from semroute.schemas import InputError
from semroute.schemas.seeds import Purpose


def source(counts, weights=None, shard_size=None, first=1):
    """Samples 0, 10, 20 ... of so many captions each, whose ids count from ``first``."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    captions = np.arange(starts[-1]) + first
    shards = None if shard_size is None else np.random.default_rng(0).permutation(captions)
    return SampleIndex(
        np.arange(len(counts)) * 10,
        starts,
        captions,
        None if weights is None else np.asarray(weights, np.float64),
        None if shards is None else (shards - first) // shard_size,
    )


def order(*counts, seed=0, dropout=0.0, shard_size=3, **arguments):
    sources = [source(each, shard_size=shard_size) for each in counts]
    return MixtureSampler(sources, seed=seed, caption_dropout=dropout, **arguments)


def table(order, first, num):
    """int64 [P, 3]"""
    found = order.indices(first, num)
    return np.stack([found.source, found.sample, found.caption], 1)


counted = st.lists(st.integers(1, 4), min_size=1, max_size=30)
orders = st.fixed_dictionaries(
    {
        "counts": st.lists(counted, min_size=1, max_size=3),
        "seed": st.integers(0, 2**40),
        "dropout": st.sampled_from([0.0, 0.3]),
        "window": st.sampled_from([None, 1, 2, 1000]),
    }
)


def make(kind):
    counts = kind["counts"]
    return order(
        *counts,
        seed=kind["seed"],
        dropout=kind["dropout"],
        window=kind["window"],
        proportions=[0.25] * (len(counts) - 1),
    )


class TestOrder:
    @settings(max_examples=40)
    @given(orders, st.integers(0, 5000), st.lists(st.integers(1, 400), max_size=5), st.randoms())
    def test_it_does_not_matter_how_it_is_cut(self, kind, first, lengths, random):
        whole = table(make(kind), first, sum(lengths))
        stops = np.cumsum([0, *lengths]).tolist()
        parts = [*itertools.pairwise(stops)]
        random.shuffle(parts)  # by anyone, at any time
        again = make(kind)
        for start, stop in parts:
            fresh = make(kind)  # no memory of what came before
            for reader in (again, fresh):
                assert np.array_equal(table(reader, first + start, stop - start), whole[start:stop])

    @settings(max_examples=40)
    @given(orders)
    def test_an_epoch_holds_every_sample_once(self, kind):
        mixed = make(kind)
        found = table(mixed, 0, 1200)  # more than one block of the mixture
        for number, counts in enumerate(kind["counts"]):
            samples = found[found[:, 0] == number, 1]
            epochs = samples[: len(samples) // len(counts) * len(counts)].reshape(-1, len(counts))
            assert len(epochs) >= 2
            assert (np.sort(epochs) == np.arange(len(counts)) * 10).all()

    @settings(max_examples=40)
    @given(orders)
    def test_captions_are_those_of_the_sample(self, kind):
        mixed = make(kind)
        for number, sample, caption in table(mixed, 0, 300).tolist():
            own = mixed.sources[number]
            start, stop = own.starts[sample // 10 :][:2]
            allowed = own.captions[start:stop].tolist()
            assert caption in allowed or (kind["dropout"] and caption == NULL_CAPTION)

    @pytest.mark.parametrize(
        ("counts", "seed", "digest"),
        [
            ([1] * 10, 0, "9aeb9da94faae7c7"),
            ([1, 2, 3, 4, 5] * 10, 3, "e63e2bb345cfba70"),
            ([3] * 7, 2**33 + 1, "e1f5999bdcd47a16"),
        ],
    )
    def test_a_plain_order_is_what_it_was_in_the_first_version(self, counts, seed, digest):
        indices = order(counts, seed=seed, dropout=0.1).indices(13, 200)
        starts = np.concatenate([[0], np.cumsum(counts)])
        choice = indices.caption - 1 - starts[indices.sample // 10]
        choice[indices.caption == NULL_CAPTION] = -1
        content = b"".join(v.astype("<i8").tobytes() for v in (indices.sample // 10, choice))
        assert hashlib.sha256(content).hexdigest()[:16] == digest

    @pytest.mark.parametrize("window", [None, 2])
    def test_epochs_and_seeds_differ(self, window):
        drawn = [
            tuple(order([1] * 50, seed=seed, window=window).indices(50 * epoch, 50).sample)
            for seed in (0, 1)
            for epoch in (0, 1)
        ]
        assert len(set(drawn)) == 4

    def test_dropout_is_the_share_that_was_asked_for(self):
        def share(dropout):
            captions = order([1] * 100, dropout=dropout).indices(0, 20_000).caption
            return np.mean(captions == NULL_CAPTION)

        assert share(0.1) == pytest.approx(0.1, abs=0.01)
        assert share(0.0) == 0
        assert share(1.0) == 1

    def test_a_sample_is_not_dropped_at_every_epoch(self):
        assert len(set(order([1], dropout=0.5).indices(0, 64).caption)) == 2

    @pytest.mark.parametrize("window", [None, 2])
    def test_captions_of_a_sample_are_chosen_evenly(self, window):
        captions = order([1, 3] * 10, window=window).indices(0, 30_000).caption
        shares = np.bincount(captions)[1:].reshape(10, 4) / 1_500
        assert shares == pytest.approx(np.tile([1, 1 / 3, 1 / 3, 1 / 3], (10, 1)), abs=0.06)
        assert shares.mean(0) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3], abs=0.02)

    @pytest.mark.parametrize("window", [None, 2])
    def test_captions_of_a_sample_are_chosen_by_their_weights(self, window):
        weighed = source([2, 1, 3] * 10, [1, 3, 5, 2, 2, 0.5] * 10, shard_size=2)
        sampler = MixtureSampler([weighed], seed=0, caption_dropout=0, window=window)
        shares = np.bincount(sampler.indices(0, 60_000).caption)[1:].reshape(10, 6) / 2_000
        expected = [0.25, 0.75, 1, 2 / 4.5, 2 / 4.5, 0.5 / 4.5]
        assert shares == pytest.approx(np.tile(expected, (10, 1)), abs=0.05)
        assert shares.mean(0) == pytest.approx(expected, abs=0.01)


class TestMixture:
    @given(
        st.lists(st.floats(0.001, 0.3), min_size=1, max_size=3),
        st.integers(0, 10**9),
    )
    def test_proportions_are_kept_in_every_block(self, proportions, block):
        mixed = order(*[[1] * 7] * (1 + len(proportions)), proportions=proportions)
        source, turn = mixed.interleave.turns(1024 * block, 1024)
        for number, share in enumerate(proportions, 1):
            own = turn[source == number]
            assert abs(len(own) - 1024 * share) <= 2
            assert (np.diff(own) == 1).all()
            # over everything before too, however long ago it began
            assert not len(own) or abs(own[0] - 1024 * block * share) <= 3 + 1e-6 * block

    def test_sources_take_turns_within_a_block(self):
        source, _ = order([1], [1], proportions=[0.5]).interleave.turns(0, 1024)
        runs = np.diff(np.flatnonzero(np.diff(source)))
        assert runs.max() < 20
        other = order([1], [1], proportions=[0.5], seed=1).interleave.turns(0, 1024)[0]
        assert not np.array_equal(source, other)

    def test_each_source_has_an_order_of_its_own(self):
        mixed = table(order([1] * 40, [1] * 40, proportions=[0.5]), 0, 80)
        first, second = (mixed[mixed[:, 0] == number, 1] for number in (0, 1))
        num = min(len(first), len(second))
        assert not np.array_equal(first[:num], second[:num])

    @given(
        st.integers(2, 200),
        st.sampled_from([0.0, 1.0, 4.0]),
        st.integers(0, 10**9),
        st.integers(0, 99),
    )
    def test_any_number_of_any_shares_is_divided(self, num, spread, block, seed):
        shares = np.exp(np.random.default_rng(seed).normal(0, spread, num))
        shares = (shares / shares.sum()).tolist()
        interleave = Interleave(shares, 0, Purpose.SHAPES)
        source, turn = interleave.turns(1024 * block, 2048)
        for number, share in enumerate(shares):
            own = turn[source == number]
            assert abs(len(own) - 2048 * share) <= 4
            assert (np.diff(own) == 1).all()  # none twice, none left out, over blocks too

    def test_an_earlier_version_divides_as_it_did(self):
        """Its turns, and where it had none to give."""
        first = Interleave([0.45, 0.3, 0.25], 7, Purpose.MIXTURE, version=1)
        source, turn = first.turns(5000, 3000)
        digest = hashlib.sha256(np.stack([source, turn]).astype("<i8").tobytes()).hexdigest()
        assert digest[:16] == "4f1465f52c651adf"
        equal = Interleave([1 / 60] * 60, 0, Purpose.SHAPES, version=1)
        with pytest.raises(InputError, match="set random_version=2"):
            equal.turns(0, 20 * 1024)

    def test_nothing_for_the_first_is_refused(self):
        with pytest.raises(InputError, match=r"0\.6, 0\.4, leave nothing for the first source"):
            order([1], [1], [1], proportions=[0.6, 0.4])


class TestShards:
    def shards(self, window, num=4000, size=100):
        """Shard of every sample in the order in which it comes: int64 [N]."""
        made = order([1] * num, window=window, shard_size=size)
        captions = made.indices(0, num).caption
        return made.sources[0].shards[captions - 1]

    @pytest.mark.parametrize("window", [1, 3, 8])
    def test_so_many_shards_are_read_at_a_time(self, window):
        shards = self.shards(window)
        for start in range(0, 4000, 50):
            assert len(np.unique(shards[start : start + 50])) <= window + 2
        if window > 1:  # the window goes round: shards that are cut by the end begin the epoch
            assert len(np.unique(shards[:50])) >= window

    def test_a_shard_is_spread_over_the_window(self):
        shards = self.shards(8)
        for shard in range(40):
            positions = np.sort(np.flatnonzero(shards == shard))
            gaps = np.diff(np.concatenate([positions, [positions[0] + 4000]]))
            span = 4000 - gaps.max()  # around the end
            assert 600 < span < 1000
            assert np.sort(gaps)[-2] < 150

    def test_a_window_of_everything_is_a_permutation(self):
        mates = np.mean(self.shards(1000)[1:] == self.shards(1000)[:-1])
        assert mates == pytest.approx(1 / 40, abs=0.01)

    def test_captions_of_one_sample_may_lie_in_several_shards(self):
        made = order([3] * 400, window=2, shard_size=100)
        for epoch in range(3):
            captions = made.indices(400 * epoch, 400).caption
            shards = made.sources[0].shards[captions - 1]
            assert max(len(np.unique(shards[i : i + 20])) for i in range(0, 400, 20)) <= 4


class TestBatchPartition:
    def test_parts_follow_each_other_by_step_and_then_by_rank(self):
        ranks = [BatchPartition(rank, world_size=2, grad_accum_steps=3) for rank in (0, 1)]
        parts = [rank.first_position(12, 5, micro) for micro in range(3) for rank in ranks]
        assert parts == [60, 62, 64, 66, 68, 70]
        assert {rank.size(12) for rank in ranks} == {2}

    def test_a_batch_that_it_does_not_divide_is_refused(self):
        with pytest.raises(InputError, match="batch_size 8 is not a multiple of 6"):
            BatchPartition(0, 2, 3).size(8)
