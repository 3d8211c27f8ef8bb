"""Training on latents of several shapes: order, batches, runs and images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from semroute.cli import cli
from semroute.pipeline.store.features import NULL_CAPTION
from semroute.pipeline.store.open import open_features, open_latents
from semroute.pipeline.store.order.dataset import by_shape, open_pairs
from semroute.pipeline.store.order.sampler import BatchPartition, make_sampler
from semroute.schemas import DataConfig, InputError, parse
from semroute.trainer.data.loader import PackedLoader, PaddedLoader
from semroute.trainer.runs.checkpoint import latest_checkpoint
from semroute.trainer.runs.metrics import read_metrics
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.train import train

SHAPES = [(3, 16, 16), (3, 24, 8), (3, 8, 24)]


@pytest.fixture
def stores(feature_store, bucket_store):
    return open_features(feature_store), open_latents(bucket_store)


@pytest.fixture
def configure(configure, bucket_store, tmp_path):
    usual = {"steps": 12, "log_every": 1, "checkpoint_every": 5, "data": {"batch_size": 8}}
    usual |= {"latents": str(bucket_store)}
    return lambda output="run", **changes: configure(tmp_path / output, **usual | changes)


def same(first, second):
    first, second = (latest_checkpoint(Path(path)).model() for path in (first, second))
    return all(torch.equal(first[name], second[name]) for name in first)


class TestOrder:
    def test_a_shape_may_have_hardly_any_of_a_source(
        self, feature_store, bucket_store, latent_store
    ):
        """A store of one shape that is nearly all of what is shown of it, and one of several."""
        columns = [{"filter": "sample_id < 1"}, {"filter": "sample_id > 0"}]
        source = {"features": str(feature_store), "latents": str(bucket_store)}
        source |= {"proportion": 0.998, "select": columns[1]}
        data = parse(
            DataConfig, {"batch_size": 2, "select": columns[0], "mixture": [source]}, "test"
        )
        pairs = open_pairs(open_features(feature_store), open_latents(bucket_store), data)
        source = make_sampler(pairs, data, 0).indices(0, 200_000).source
        assert np.mean(source == 0) == pytest.approx(0.002, abs=2e-4)

    @settings(max_examples=25)
    @given(
        batch_size=st.integers(1, 24),
        seed=st.integers(0, 3),
        order=st.sampled_from(["random", "shards"]),
        cut=st.integers(1, 50),
    )
    def test_a_batch_has_one_shape_however_it_is_cut(
        self, feature_store, bucket_store, batch_size, seed, order, cut
    ):
        stores = open_features(feature_store), open_latents(bucket_store)
        data = DataConfig(batch_size=batch_size, order=order, window=2)
        found = make_sampler(open_pairs(*stores, data), data, seed)
        num = 12 * batch_size
        whole = found.indices(0, num)
        buckets = stores[1].buckets[whole.sample].reshape(-1, batch_size)
        assert (buckets == buckets[:, :1]).all()
        parts = [found.indices(first, min(cut, num - first)) for first in range(0, num, cut)]
        for name in ("source", "sample", "caption"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name))

    @pytest.mark.slow
    def test_every_sample_is_shown_as_often(self, stores):
        data = DataConfig(batch_size=5)
        order = make_sampler(open_pairs(*stores, data), data, 0)
        counts = np.bincount(order.indices(0, 200 * 1024).sample, minlength=200)
        # Rounded to one batch per block of 1,024 batches.
        assert counts.min() >= 1020
        assert counts.max() <= 1028

    def test_shapes_are_told_apart(self, stores):
        pairs = open_pairs(*stores, DataConfig(batch_size=5))
        found = by_shape(pairs)
        assert [*found] == SHAPES
        sizes = [len(sources[0]) for sources in found.values()]
        assert sum(sizes) == 200
        assert sizes == sorted(sizes, reverse=True)

    def test_a_mixture_has_its_proportions_in_every_shape(
        self, feature_store, bucket_store, latent_store
    ):
        """A store of one shape mixed with one of several."""
        source = {"features": str(feature_store), "latents": str(latent_store)}
        data = parse(
            DataConfig, {"batch_size": 4, "mixture": [{**source, "proportion": 0.4}]}, "test"
        )
        pairs = open_pairs(open_features(feature_store), open_latents(bucket_store), data)
        assert [*by_shape(pairs)] == [(3, 12, 12), *SHAPES]
        indices = make_sampler(pairs, data, 0).indices(0, 40_000)
        assert np.mean(indices.source) == pytest.approx(0.4, abs=0.01)
        batches = indices.source.reshape(-1, 4)
        assert (batches == batches[:, :1]).all()


class TestStream:
    @pytest.mark.parametrize("kind", [PackedLoader, PaddedLoader])
    def test_batches_hold_what_the_stores_hold(self, stores, kind):
        stream = kind(*stores, DataConfig(batch_size=6), seed=0, layers=[2])
        shapes = set()
        for step in range(12):
            batch = stream.read(step)
            shapes.add(tuple(batch.latents.shape[1:]))
            assert np.array_equal(batch.latents.numpy(), stores[1].read(batch.sample_ids))
        assert shapes == {*SHAPES}

    def test_ranks_share_a_shape(self, stores):
        data = DataConfig(batch_size=8)
        whole = PackedLoader(*stores, data, seed=0, layers=[2])
        ranks = [
            PackedLoader(*stores, data, seed=0, layers=[2], partition=BatchPartition(rank, 2, 2))
            for rank in range(2)
        ]
        for step in range(6):
            parts = [ranks[rank].read(step, micro) for micro in range(2) for rank in range(2)]
            assert torch.equal(torch.cat([p.latents for p in parts]), whole.read(step).latents)


class TestRuns:
    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", ["depth", "joint"])
    def test_continues_bit_for_bit(self, configure, strategy):
        changes = {
            "routing": {"strategy": strategy},
            "validation": {"share": 0.1, "every": 6, "num_samples": 12, "num_bins": 4},
        }
        whole = train(configure("whole", **changes))
        train(configure("parts", **{**changes, "steps": 7}))
        parts = train(configure("parts", **changes))
        assert same(whole, parts)
        lines = read_metrics(whole)
        assert [line["step"] for line in lines if line.get("validation_loss")] == [6, 12]
        assert len({line["loss"] for line in lines}) == 12

    def test_images_have_the_size_that_is_asked_for(self, configure, feature_store):
        run = train(configure())
        assert "3 x 16 x 16 and other shapes of 5 buckets" in str(load_run(run))
        out = run / "samples"
        command = ["sample", str(run), "--features", str(feature_store), "--num", "2"]
        for size, expected in ((None, (16, 16)), ("24x8", (24, 8)), ("8x24", (8, 24))):
            options = [] if size is None else ["--size", size]
            result = CliRunner().invoke(cli, [*command, "--num-steps", "2", *options])
            assert result.exit_code == 0, result.output
            from PIL import Image

            with Image.open(sorted(out.glob("0*.png"))[0]) as image:
                assert image.size[::-1] == expected
        result = CliRunner().invoke(cli, [*command, "--size", "10x10"])
        assert result.exit_code == 1
        assert "was not trained on 10x10; its sizes are 16x16, 8x24, 24x8" in result.output

    def test_null_captions_are_dropped_equally_often(self, stores):
        data = DataConfig(batch_size=8, caption_dropout=0.25)
        order = make_sampler(open_pairs(*stores, data), data, 0)
        dropped = order.indices(0, 8000).caption == NULL_CAPTION
        assert dropped.mean() == pytest.approx(0.25, abs=0.02)

    def test_a_patch_that_does_not_tile_a_shape_is_refused(self, configure):
        config = configure(model={"size": "nano", "depth": 2, "patch_size": 16})
        with pytest.raises(InputError, match="latents of 24 x 8 are not divisible"):
            train(config)
        assert not Path(config.output).exists()
