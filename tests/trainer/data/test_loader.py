import gc
import hashlib
import json
import pickle
import shutil
import threading
from contextlib import closing
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from semroute.pipeline.store.base import Store
from semroute.pipeline.store.open import open_features, open_latents
from semroute.pipeline.store.order.sampler import BatchPartition
from semroute.schemas import DataConfig, InputError
from semroute.trainer.data.batch import on_device
from semroute.trainer.data.loader import PackedLoader, PaddedLoader
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise import NoiseSource, jitter
from semroute.trainer.training.train import train

NUM_SAMPLES = 200


def test_training_reads_no_columns_that_it_does_not_need(configure, tmp_path, monkeypatch):
    """Texts and token ids are most of the tables of millions of captions, in every rank."""
    columns, read_table = set(), Store.read_table

    def recording(store, name, schema, *arguments):
        columns.update((store.kind, column) for column in schema.names)
        return read_table(store, name, schema, *arguments)

    monkeypatch.setattr(Store, "read_table", recording)
    train(configure(tmp_path / "run", steps=1, validation={"share": 0.2}), progress=False)
    assert columns >= {("feature", "row_start"), ("feature", "caption_ids"), ("latent", "row")}
    assert not {"text", "token_ids", "image", "sha256"} & {column for _, column in columns}


def reading():
    return [t for t in threading.enumerate() if t.name.startswith("semroute-stream")]


class TestNoise:
    def draw(self, first=0, num=4, draws=3, seed=0, version=2, shape=(2, 3, 3), **options):
        return NoiseSource(Flow(shift=3.0), seed, draws, version=version, **options).draw(
            first, num, shape
        )

    @pytest.mark.parametrize("version", [1, 2])
    def test_it_does_not_matter_how_it_is_cut(self, version):
        whole = self.draw(first=5, num=6, version=version, t_jitter=0.1)
        assert (whole.t.shape, whole.noise.shape) == ((18,), (18, 2, 3, 3))
        parts = [self.draw(first, 2, version=version, t_jitter=0.1) for first in (5, 7, 9)]
        for found, cut in zip(
            whole.tensors(), zip(*(part.tensors() for part in parts), strict=True), strict=True
        ):
            assert torch.equal(found, torch.cat(cut))
            assert found.dtype == torch.float32

    def test_nothing_is_drawn_twice(self):
        """Not even where seeds or positions have the same lower 32 bits."""
        places = [(seed, first) for seed in (0, 1, 2**32) for first in (0, 4, 2**32)]
        drawn = [self.draw(seed=seed, first=first) for seed, first in places]
        assert len(torch.cat([each.t for each in drawn]).unique()) == len(places) * 12
        noise = torch.cat([each.noise for each in drawn]).flatten(1)
        assert len(noise.unique(dim=0)) == len(places) * 12
        values = noise.flatten()
        assert len(values.unique()) > 0.999 * len(values)

    def test_it_is_normal_and_independent_of_t(self):
        found = self.draw(num=2000, draws=1, shape=(4, 4, 4))
        noise = found.noise.flatten(1)
        assert float(noise.mean()) == pytest.approx(0, abs=0.01)
        assert float(noise.std()) == pytest.approx(1, abs=0.01)
        together = torch.corrcoef(torch.cat([noise.T, found.t[None]]))
        assert float((together - torch.eye(65)).abs().max()) < 0.1
        logit = torch.logit(found.t / (found.t + 3 * (1 - found.t)))  # before the shift
        assert float(logit.mean()) == pytest.approx(0, abs=0.08)
        assert float(logit.std()) == pytest.approx(1, abs=0.06)

    @pytest.mark.parametrize(
        ("shape", "digest"), [((2, 3, 3), "9c83095d16990065"), ((4, 16, 16), "8a8f8926cff60c4e")]
    )
    def test_an_earlier_version_draws_what_it_drew(self, shape, digest):
        found = self.draw(first=7, seed=2**33 + 5, version=1, shape=shape)
        content = found.t.numpy().tobytes() + found.noise.numpy().tobytes()
        assert hashlib.sha256(content).hexdigest()[:16] == digest

    def test_it_writes_where_it_is_told(self):
        lent = []

        def empty(shape, dtype):
            lent.append(torch.empty(shape, dtype=dtype))
            return lent[-1]

        found = NoiseSource(Flow(), 0, 2).draw(0, 3, (2, 2, 2), empty)
        assert {each.data_ptr() for each in found.tensors()} == {e.data_ptr() for e in lent}


class TestStream:
    @pytest.fixture
    def make(self, feature_store, latent_store):
        features, latents = open_features(feature_store), open_latents(latent_store)

        def make(batch_size=8, prefetch=2, caption_dropout=0.1, seed=0, layers=None, **arguments):
            data = DataConfig(
                batch_size=batch_size, prefetch=prefetch, caption_dropout=caption_dropout
            )
            layers = features.layers if layers is None else layers
            return PackedLoader(features, latents, data, seed=seed, layers=layers, **arguments)

        return make

    def take(self, stream, num):
        with closing(iter(stream)) as batches:
            return list(islice(batches, num))

    def test_a_batch_holds_what_the_stores_hold(self, make):
        stream = make(batch_size=16, caption_dropout=0.3)
        (batch,) = self.take(stream, 1)
        assert batch.hidden.dtype == torch.bfloat16
        assert batch.latents.dtype == torch.float32
        texts = stream.features.samples["caption_ids"].to_pylist()
        dropped = 0
        for i, sample in enumerate(batch.sample_ids):
            latent = stream.latents.read([sample])[0]
            assert np.array_equal(batch.latents[i].numpy(), latent)
            start, stop = batch.offsets[batch.caption[i] :][:2].tolist()
            rows = batch.hidden[start:stop].float().numpy()
            (caption,) = texts[sample]
            null, own = (stream.features[c].hidden for c in (0, caption))
            is_own = rows.shape == own.shape and np.array_equal(rows, own)
            assert is_own or np.array_equal(rows, null)
            dropped += not is_own
        assert 0 < dropped < 16

    @pytest.mark.parametrize("codec", ["bf16", "lossless", "predictive", "linear"])
    def test_codes_are_decoded_where_the_batch_goes(self, codec, random_store, latent_store):
        features, latents = open_features(random_store(codec)), open_latents(latent_store)
        late, early = (
            PackedLoader(
                features, latents, DataConfig(batch_size=8), seed=0, layers=[2, 4], codes=codes
            )
            for codes in (True, False)
        )
        cpu = torch.device("cpu")
        found, expected = late.read(3).to(cpu).hidden, early.read(3).to(cpu).hidden
        if codec == "linear":  # numpy and torch multiply matrices each in their own way
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    def test_batches_come_to_the_device_one_ahead(self, make):
        stream, taken = make(), []

        def read():
            for step in range(5):
                taken.append(step)
                yield stream.read(step)

        for step, batch in enumerate(on_device(read(), torch.device("cpu"))):
            assert taken == [*range(min(step + 2, 5))]
            assert torch.equal(batch.hidden, stream.read(step).hidden)
            assert torch.equal(batch.latents, stream.read(step).latents)
            if step == 3:
                break

    def test_every_unique_caption_is_read_once(self, make):
        (batch,) = self.take(make(batch_size=32, caption_dropout=1.0), 1)
        assert len(batch.offsets) == 2
        assert batch.caption.tolist() == [0] * 32

    def test_reads_only_the_layers_that_are_asked_for(self, make):
        (one,) = self.take(make(layers=[3]), 1)
        (every,) = self.take(make(), 1)
        assert torch.equal(one.hidden[:, 0], every.hidden[:, 2])

    @settings(max_examples=15)
    @given(
        ranks=st.sampled_from([1, 2, 4]),
        accumulation=st.sampled_from([1, 2, 4]),
        prefetch=st.integers(1, 5),
        workers=st.integers(1, 3),
        order=st.sampled_from(["random", "shards"]),
        start=st.integers(0, 40),
    )
    def test_global_batches_do_not_depend_on_how_they_are_read(
        self, feature_store, latent_store, ranks, accumulation, prefetch, workers, order, start
    ):
        features, latents = open_features(feature_store), open_latents(latent_store)

        def global_batches(steps, **arguments):
            data = DataConfig(
                batch_size=16,
                prefetch=arguments.pop("prefetch"),
                workers=arguments.pop("workers"),
                order=order,
                window=2,
            )
            cut = arguments.pop("accumulation")
            parts = {}
            world_size = arguments.pop("world_size")
            for rank in range(world_size):
                stream = PackedLoader(
                    features,
                    latents,
                    data,
                    seed=3,
                    layers=[4],
                    partition=BatchPartition(rank, world_size, cut),
                    **arguments,
                )
                for batch in self.take(stream, steps * cut):
                    text = [
                        batch.hidden[batch.offsets[c] : batch.offsets[c + 1]] for c in batch.caption
                    ]
                    part = [
                        (int(s), t.float().sum().item())
                        for s, t in zip(batch.sample_ids, text, strict=True)
                    ]
                    parts[batch.step, batch.micro_step, rank] = part
            return [
                [pair for key in sorted(parts) if key[0] == step for pair in parts[key]]
                for step in sorted({step for step, _, _ in parts})
            ]

        plain = {"world_size": 1, "prefetch": 1, "workers": 1, "accumulation": 1}
        expected = global_batches(start + 2, **plain)[start:]
        found = global_batches(
            2,
            world_size=ranks,
            prefetch=prefetch,
            workers=workers,
            accumulation=accumulation,
            start_step=start,
        )
        assert found == expected

    def test_batches_may_be_larger_than_the_store(self, make):
        (batch,) = self.take(make(batch_size=NUM_SAMPLES + 50), 1)
        counts = np.bincount(batch.sample_ids, minlength=NUM_SAMPLES)
        assert counts.min() == 1
        assert counts.max() == 2

    def test_a_batch_that_ranks_do_not_divide_is_refused(self, make):
        with pytest.raises(
            InputError, match="batch_size 8 is not a multiple of 6: 2 ranks with 3 accumulation"
        ):
            make(batch_size=8, partition=BatchPartition(0, 2, 3))

    def test_reads_no_further_ahead_than_prefetch(self, make, monkeypatch):
        stream = make(prefetch=3)
        read, steps = stream.read, []
        monkeypatch.setattr(stream, "read", lambda *step: (steps.append(step), read(*step))[1])
        with closing(iter(stream)) as batches:
            for _ in range(4):
                next(batches)
            assert 4 <= len(steps) <= 4 + 3

    def test_reads_the_first_batch_before_it_is_asked_for(self, make, monkeypatch):
        stream = make(prefetch=3)
        read, begun, steps = stream.read, threading.Event(), []

        def recording(step, micro_step):
            steps.append(step)
            begun.set()
            return read(step, micro_step)

        monkeypatch.setattr(stream, "read", recording)
        with closing(iter(stream)) as batches:
            assert begun.wait(10)
            assert steps == [0]
            assert next(batches).step == 0
        assert not reading()

    def test_closing_stops_the_thread_before_a_batch_was_asked_for(self, make):
        iter(make()).close()
        assert not reading()

    def test_an_error_while_reading_is_raised_at_its_batch(self, make, monkeypatch):
        stream = make()
        read = stream.read

        def failing(step, micro_step):
            if step == 2:
                raise OSError("disk gone")
            return read(step, micro_step)

        monkeypatch.setattr(stream, "read", failing)
        batches = iter(stream)
        assert [next(batches).step for _ in range(2)] == [0, 1]
        with pytest.raises(OSError, match="disk gone"):
            next(batches)
        assert not reading()

    def test_closing_stops_the_thread(self, make):
        with closing(iter(make())) as batches:
            next(batches)
            assert reading()
        assert not reading()

    def test_forgetting_it_stops_the_thread(self, make):
        batches = iter(make())
        next(batches)
        del batches
        gc.collect()
        assert not reading()

    def test_workers_of_a_data_loader_give_the_same_batches(self, make, fork_server):
        stream = make(start_step=3, partition=BatchPartition(grad_accum_steps=2), held_out=[5, 6])
        expected = self.take(stream, 5)
        assert len(pickle.dumps(stream)) < 20_000
        loader = DataLoader(
            stream, batch_size=None, num_workers=2, multiprocessing_context="forkserver"
        )
        batches = iter(loader)
        for one in expected:
            found = next(batches)
            assert (found.step, found.micro_step, found.position) == (
                one.step,
                one.micro_step,
                one.position,
            )
            assert np.array_equal(found.sample_ids, one.sample_ids)
            assert torch.equal(found.hidden, one.hidden)
            assert torch.equal(found.latents, one.latents)
        batches._shutdown_workers()

    def test_a_data_loader_without_workers_gives_the_same_batches(self, make):
        stream = make()
        batches = iter(DataLoader(stream, batch_size=None))
        for one in self.take(stream, 3):
            assert torch.equal(next(batches).hidden, one.hidden)

    @pytest.mark.parametrize("kind", ["PackedLoader", "PaddedLoader"])
    def test_reading_starts_no_threads_of_torch(
        self, feature_store, latent_store, kind, start_command, tmp_path
    ):
        """No OpenMP team for the thread that reads: it would slow down the threads that train."""
        (tmp_path / "count_threads.py").write_text(
            "import psutil, sys, torch\n"
            "from semroute import open_features, open_latents\n"
            "from semroute.schemas import DataConfig\n"
            "from semroute.trainer.data import loader\n"
            "torch.set_num_threads(int(sys.argv[4]))\n"
            "features, latents = open_features(sys.argv[1]), open_latents(sys.argv[2])\n"
            "make, data = getattr(loader, sys.argv[3]), DataConfig(batch_size=512)\n"
            "found = make(features, latents, data, seed=0, layers=features.layers)\n"
            "before = psutil.Process().num_threads()\n"
            "found.read(0)\n"
            "print(psutil.Process().num_threads() - before)\n"
        )
        given = {"module": "count_threads", "PYTHONPATH": str(tmp_path)}
        counts = []
        for threads in (1, 8):
            done = start_command(feature_store, latent_store, kind, threads, **given)
            assert done.wait() == 0, done.output.read_text()
            counts.append(int(done.output.read_text()))
        one, eight = counts
        assert abs(eight - one) < 7  # torch starts seven; the store's vary by how busy it is

    def test_waiting_is_counted(self, make):
        stream = make()
        self.take(stream, 3)
        assert stream.wait_seconds > 0


class TestPadded:
    @pytest.fixture(params=["bf16", "lossless", "predictive", "linear"])
    def stores(self, request, random_store, latent_store):
        return open_features(random_store(request.param)), open_latents(latent_store)

    def test_holds_what_packed_batches_hold(self, stores):
        data = DataConfig(batch_size=24, caption_dropout=0.3)
        options = {"seed": 1, "layers": [4, 2], "partition": BatchPartition(1, 2)}
        packed, padded = (kind(*stores, data, **options) for kind in (PackedLoader, PaddedLoader))
        for step in range(3):
            one, other = packed.read(step), padded.read(step)
            lengths = one.offsets.diff()[one.caption]
            assert other.hidden.shape == (12, int(lengths.max()), 2, 32)
            assert torch.equal(other.mask.sum(1), lengths)
            assert other.num_rows == int(lengths.sum())
            assert not other.hidden[~other.mask].any()
            assert torch.equal(other.latents, one.latents)
            assert other.sample_ids.tolist() == one.sample_ids.tolist()
            assert other.position == one.position
            for hidden, mask, caption in zip(other.hidden, other.mask, one.caption, strict=True):
                start, stop = one.offsets[caption:][:2].tolist()
                torch.testing.assert_close(
                    hidden[mask],
                    one.hidden[start:stop],
                    rtol=2**-7 if stores[0].manifest.codec.name == "linear" else 0,
                    atol=1e-3 if stores[0].manifest.codec.name == "linear" else 0,
                    equal_nan=True,
                )

    def test_workers_of_a_data_loader_give_the_same_batches(
        self, feature_store, latent_store, fork_server
    ):
        stores = open_features(feature_store), open_latents(latent_store)
        stream = PaddedLoader(*stores, DataConfig(batch_size=8), seed=0, layers=[1, 3])
        loader = DataLoader(
            stream, batch_size=None, num_workers=2, multiprocessing_context="forkserver"
        )
        batches = iter(loader)
        for step in range(3):
            found, expected = next(batches), stream.read(step)
            assert torch.equal(found.hidden, expected.hidden)
            assert torch.equal(found.mask, expected.mask)
        batches._shutdown_workers()


@pytest.fixture(scope="module")
def posterior(samples_file, tiny_vae, tmp_path_factory):
    """A latent store of the samples by a VAE with a posterior."""
    from semroute.pipeline.extraction.latents import encode_images

    path = tmp_path_factory.mktemp("posterior") / "store"
    options = {"vae": str(tiny_vae("kl")), "workers": 0, "report": lambda _: None}
    encode_images(str(samples_file), path, **options)
    return path


class TestLatents:
    def stream(self, features, latents, take="sample", seed=0, **arguments):
        data = DataConfig(batch_size=40, posterior=take)
        stores = open_features(features), open_latents(latents)
        return PackedLoader(*stores, data, seed=seed, layers=[1], **arguments)

    def test_draws_from_the_posterior_follow_from_seed_and_position(self, feature_store, posterior):
        whole, again = (self.stream(feature_store, posterior).read(3) for _ in range(2))
        assert torch.equal(whole.latents, again.latents)
        ranks = [
            self.stream(feature_store, posterior, partition=BatchPartition(rank, 2)).read(3).latents
            for rank in range(2)
        ]
        assert torch.equal(torch.cat(ranks), whole.latents)
        noise = [
            self.stream(feature_store, posterior, seed=seed)._posterior_noise(0, 2, (4, 3, 3))
            for seed in (0, 1)
        ]
        assert len(np.unique(np.concatenate(noise).reshape(4, -1), axis=0)) == 4

    def test_draws_have_the_mean_and_the_deviation_that_are_stored(self, feature_store, posterior):
        stream = self.stream(feature_store, posterior)
        shape = stream.latents.shape()
        draws = [stream._posterior_noise(40 * n, 40, shape) for n in range(10)]
        noise = torch.from_numpy(np.concatenate(draws))
        assert abs(noise.mean()) < 0.02
        assert abs(noise.std() - 1) < 0.02
        batch = stream.read(0)
        mean = self.stream(feature_store, posterior, "mean").read(0).latents
        assert torch.equal(mean, torch.tensor(stream.latents.read(batch.sample_ids)))
        above = stream.latents.read(batch.sample_ids, np.ones(mean.shape, np.float32))
        deviation = above - mean.numpy()
        drawn = (batch.latents - mean).numpy() / deviation
        np.testing.assert_allclose(drawn, noise[:40].numpy(), atol=1e-2)

    def test_a_sample_is_drawn_anew_in_the_next_epoch(self, feature_store, posterior):
        stream = self.stream(feature_store, posterior)
        first, second = (
            {s: b.latents[i] for b in map(stream.read, steps) for i, s in enumerate(b.sample_ids)}
            for steps in (range(5), range(5, 10))
        )
        assert first.keys() == second.keys()
        assert not any(torch.equal(first[sample], second[sample]) for sample in first)

    def test_samples_without_a_latent_do_not_occur(self, feature_store, samples_file, tmp_path):
        from semroute.pipeline.extraction.latents import encode_images

        table = pyarrow.parquet.read_table(samples_file)
        images = table["image"].to_pylist()
        for number in (0, 7, 199):
            images[number] = {"bytes": b"broken", "path": None}
        kind = table.schema.field("image").type
        table = table.set_column(1, "image", pa.array(images, kind))
        pyarrow.parquet.write_table(table, tmp_path / "samples.parquet")
        options = {"workers": 0, "broken": "skip", "report": lambda _: None}
        latents = encode_images(str(tmp_path / "samples.parquet"), tmp_path / "store", **options)
        stream = self.stream(feature_store, latents.path)
        batches = [stream.read(step) for step in range(2 * 197)]
        ids = np.concatenate([batch.sample_ids for batch in batches])
        good = sorted({*range(200)} - {0, 7, 199})
        assert all(sorted(epoch) == good for epoch in ids.reshape(-1, 197))
        batch = batches[0]
        assert np.array_equal(batch.latents.numpy(), latents.read(batch.sample_ids))
        captions = stream.features.samples["caption_ids"].to_pylist()
        own = [captions[sample] for sample in batch.sample_ids]
        starts = np.unique([c for row in own for c in row])  # all of which are read, or null
        assert len(batch.offsets) - 1 <= len(starts) + 1


class TestJoin:
    def amended(self, store, folder, change):
        path = folder / "store"
        shutil.copytree(store, path)
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        (path / "checksums.json").unlink()  # as if by an early version, which sealed no receipts
        for file in (path / "receipts").iterdir():
            file.write_text(json.dumps({**json.loads(file.read_text()), "sha256": ""}))
        return path

    def stream(self, features, latents):
        return PackedLoader(
            open_features(features, complete=False),
            open_latents(latents, complete=False),
            DataConfig(batch_size=4),
            seed=0,
            layers=[1],
        )

    def test_stores_of_other_samples_are_refused(self, feature_store, latent_store, tmp_path):
        other = self.amended(
            latent_store,
            tmp_path,
            lambda m: m["identity"]["samples"].update(fingerprint="0" * 64),
        )
        with pytest.raises(InputError, match=r"different captions or a different .*make both"):
            self.stream(feature_store, other)

    def test_stores_of_other_lengths_are_refused(self, feature_store, latent_store, tmp_path):
        other = self.amended(
            latent_store, tmp_path, lambda m: m["identity"]["samples"].update(num_samples=150)
        )
        with pytest.raises(InputError, match=r"has 200 samples but .* has 150: make both"):
            self.stream(feature_store, other)

    def test_latents_without_captions_are_joined_by_number(
        self, feature_store, latent_store, tmp_path
    ):
        other = self.amended(
            latent_store, tmp_path, lambda m: m["identity"]["samples"].update(fingerprint=None)
        )
        assert self.stream(feature_store, other).read(0).latents.shape == (4, 3, 12, 12)

    def test_an_unfinished_store_is_refused(self, feature_store, latent_store, tmp_path):
        other = self.amended(feature_store, tmp_path, lambda m: m.update(status="extracting"))
        with pytest.raises(InputError, match=r"is not finished: .* to resume"):
            self.stream(other, latent_store)


class TestJitter:
    def test_is_a_function_of_seed_and_position(self):
        t = torch.linspace(0, 1, 24)
        whole = jitter(t, 0.1, seed=3, first=10, draws=2)
        parts = [
            jitter(t[2 * i : 2 * i + 8], 0.1, seed=3, first=10 + i, draws=2) for i in (0, 4, 8)
        ]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, jitter(t, 0.1, seed=4, first=10, draws=2))

    def test_has_its_deviation_and_stays_a_noise_level(self):
        t = jitter(torch.full((4000,), 0.5), 0.1, seed=0, first=0, draws=1)
        assert (t - 0.5).std().item() == pytest.approx(0.1, rel=0.05)
        assert (t.mean() - 0.5).abs() < 0.01
        wide = jitter(torch.full((400,), 0.9), 1.0, seed=0, first=0, draws=1)
        assert (wide.min(), wide.max()) == (0.0, 1.0)
