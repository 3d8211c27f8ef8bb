"""Runs from an object store, and data.cache."""

import errno
import gc
import json
import os
import shutil
from collections import deque
from contextlib import closing, suppress
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("obstore")
pytest.importorskip("s3fs")

from click.testing import CliRunner
from object_server import is_shard, serving
from pydantic import ValidationError

from semroute.cli import cli
from semroute.pipeline.store.checks.watch import ChangedError
from semroute.pipeline.store.open import open_features, open_latents
from semroute.pipeline.store.remote.clients import DiskClient
from semroute.schemas import DataConfig, InputError
from semroute.trainer.data import remote
from semroute.trainer.data.loader import PackedLoader
from semroute.trainer.runs.metrics import read_metrics
from semroute.trainer.training.dry_run import plan
from semroute.trainer.training.train import train


@pytest.fixture(scope="module")
def server(feature_store, latent_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    shutil.copytree(feature_store, folder / "bucket" / "features")
    shutil.copytree(latent_store, folder / "bucket" / "latents")
    with serving(folder) as found:
        yield found


@pytest.fixture
def keys(server):
    """Shards of which something is requested from here on."""
    found = []
    server.fault = lambda key, _span: found.append(key) if is_shard(key) else None
    yield found
    server.fault = lambda _key, _span: None


def make(place, data, **options):
    features, latents = open_features(f"{place}/features"), open_latents(f"{place}/latents")
    return PackedLoader(
        features, latents, DataConfig(batch_size=4, **data), seed=0, layers=[1, 2], **options
    )


def first(loader, num):
    with closing(iter(loader)) as batches:
        return [*islice(batches, num)]


def equal(one, two) -> bool:
    return (
        np.array_equal(one.sample_ids, two.sample_ids)
        and torch.equal(one.hidden, two.hidden)
        and torch.equal(one.latents, two.latents)
    )


@pytest.mark.parametrize("order", ["random", "shards"])
def test_batches_are_those_of_files_and_a_second_epoch_that_fits_fetches_nothing(
    order, server, keys, tmp_path
):
    place = server.folder / "bucket"
    loader = make(place, {"order": order})
    epoch = -(-loader.num_samples // 4)
    expected = first(loader, 2 * epoch)
    assert keys == []
    cache = {"folder": str(tmp_path / "cache"), "size": "50MB"}
    own = {"order": order, "caption_dropout": 0.1}
    cached = make("s3://bucket", own | {"cache": cache})
    found = first(cached, epoch)
    assert keys
    found += first(make("s3://bucket", own | {"cache": cache}, start_step=epoch), epoch)
    for data in (own, own | {"cache": cache, "workers": 2}):
        assert all(map(equal, first(make("s3://bucket", data), epoch), expected[:epoch]))
    assert all(map(equal, found, expected))
    # Of the shards that were fetched, another loader needs nothing but the indexes.
    del keys[:]
    again = make("s3://bucket", own | {"cache": cache})
    assert all(map(equal, first(again, epoch), expected[:epoch]))
    assert len(keys) == len({*keys})
    fetched = again.fetched()
    assert fetched.cached_bytes > 0
    assert (fetched.fetch_retries, fetched.cache_faults) == (0, 0)
    # Nor does a store on a slow disk, which may be behind a cache too.
    slow = own | {"cache": cache | {"folder": str(tmp_path / "slow")}}
    for bytes_cached in (False, True):
        loader = make(place, slow)
        assert all(map(equal, first(loader, epoch), expected[:epoch]))
        assert loader.fetched().fetched_bytes > 0
        assert bool(loader.fetched().cached_bytes) >= bytes_cached


def test_batches_are_requested_ahead_by_time(server):
    loader = make("s3://bucket", {"prefetch": 1})
    with closing(iter(loader)) as batches:
        next(batches)
        ahead = loader.read_ahead
        assert ahead.hungry()  # the store is smaller than what is requested ahead
        next(batches)
        requested = ahead.counts.num_bytes
    small = make("s3://bucket", {"prefetch": 1})
    two = sum(small.stored_bytes(small.read(n).num_rows, 4) for n in range(2))
    assert requested > 2 * two


def test_a_full_disk_is_told_once(server, tmp_path, monkeypatch):
    loader = make("s3://bucket", {"cache": {"folder": str(tmp_path / "c"), "size": "1GB"}})
    assert loader.read_ahead is not None

    def full(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "pwrite", full)
    first(loader, 2)
    assert "Disk quota exceeded" in loader.warning()
    assert loader.warning() is None
    assert loader.fetched().cache_faults > 0


def test_a_run_says_what_it_fetches_and_ends_in_the_same_weights(configure, server, tmp_path):
    place = {name: f"s3://bucket/{name}" for name in ("features", "latents")}
    cache = {"folder": str(tmp_path / "cache"), "size": "50MB"}
    runs = {
        "files": configure(tmp_path / "files"),
        "objects": configure(tmp_path / "objects", **place),
        "cache": configure(tmp_path / "cached", data={"cache": cache}, **place),
    }
    weights = {name: weights_of(train(config, progress=False)) for name, config in runs.items()}
    assert weights["files"] == weights["objects"] == weights["cache"]
    *_, line = read_metrics(tmp_path / "cached")
    assert line["fetched_bytes"] > 0
    assert "fetched_bytes" not in read_metrics(tmp_path / "files")[-1]
    # So does status, of a run alone.
    result = CliRunner().invoke(cli, ["status", str(tmp_path / "cached"), "--json"])
    position = json.loads(result.stdout)
    assert position["fetched"]["fetch_requests"] >= line["fetch_requests"] > 0
    assert position["fetched"]["fetched_bytes"] >= line["fetched_bytes"]
    result = CliRunner().invoke(cli, ["status", str(tmp_path / "cached")])
    assert result.exit_code == 0, result.output
    assert f"in {position['fetched']['fetch_requests']:,} requests, no retries" in result.stdout
    assert not (tmp_path / "files" / "position.json").exists()


def weights_of(run) -> bytes:
    newest = max((run / "checkpoints").iterdir())
    return b"".join(path.read_bytes() for path in sorted(newest.glob("model*.safetensors")))


def test_a_dry_run_says_what_will_be_fetched_and_writes_nothing(
    configure, server, tmp_path, monkeypatch
):
    place = {name: f"s3://bucket/{name}" for name in ("features", "latents")}
    folder = tmp_path / "cache"

    def said(**data) -> str:
        return plan(configure(tmp_path / "run", data=data, **place)).details["fetching"]

    assert plan(configure(tmp_path / "run")).details["fetching"] is None
    assert "every epoch reads all of it again" in said()
    assert "whole shards" in said(order="shards")
    cache = {"folder": str(folder), "size": "50MB"}
    assert "later epochs fetch nothing" in said(cache=cache)
    assert "of it fits" in said(cache=cache | {"size": "1KB"})
    assert "need data.cache" in said(order="shards", cache=cache | {"size": "1KB"})
    monkeypatch.setattr(remote, "_free_bytes", lambda _folder: 7)
    assert "only 7 B are free there" in said(cache=cache)
    assert not folder.exists()


def test_a_cache_that_cannot_be_is_refused_before_any_work(configure, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    cache = {"folder": str(tmp_path / "taken"), "size": "1GB"}
    with pytest.raises(InputError, match="no cache and not empty"):
        train(configure(tmp_path / "run", data={"cache": cache}), progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises((InputError, ValidationError), match="not a size"):
        configure(tmp_path / "run", data={"cache": cache | {"size": "much"}})


class TestMountedByAProgram:
    """Stores as if they lay in a file system of a program (FUSE)."""

    @pytest.mark.parametrize("order", ["random", "shards"])
    def test_it_is_fetched_in_ranges_and_gives_the_same_batches(self, order, server, monkeypatch):
        mapped = make(server.folder / "bucket", {"order": order})
        expected = first(mapped, 6)
        assert mapped.fetched() is None
        monkeypatch.setattr(remote, "on_fuse", lambda _path: True)
        fetching = make(server.folder / "bucket", {"order": order})
        assert all(equal(*pair) for pair in zip(first(fetching, 6), expected, strict=True))
        assert fetching.fetched().fetched_bytes > 0

    def test_a_file_that_changes_ends_the_reading(self, server, monkeypatch, tmp_path):
        monkeypatch.setattr(remote, "on_fuse", lambda _path: True)
        place = tmp_path / "bucket"
        shutil.copytree(server.folder / "bucket", place)
        loader = make(place, {})
        with closing(iter(loader)) as batches:
            next(batches)
            for shard in (place / "features" / "hidden.zarr" / "hidden" / "c").rglob("*"):
                if shard.is_file():
                    shard.write_bytes(shard.read_bytes()[::-1])
            with pytest.raises(InputError, match="has changed since"):
                deque(batches, maxlen=0)


def test_few_files_of_a_disk_are_kept_open(tmp_path):
    for number in range(100):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    client = DiskClient(tmp_path)
    for number in [*range(100), *range(100)]:
        assert client.get(str(number), 2, 5).content.tolist() == [number] * 3
    assert num_open(tmp_path) == 64
    del client
    gc.collect()
    assert num_open(tmp_path) == 0


def num_open(folder):
    """Files in a folder that this process has open."""
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{entry}").startswith(f"{folder}/")
    return found


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    (tmp_path / "a").write_bytes(b"before")
    client = DiskClient(tmp_path)
    version = client.get("a", 0, 3).version
    (tmp_path / "b").write_bytes(b"after")
    (tmp_path / "b").rename(tmp_path / "a")
    assert client.get("a", 0, None).content.tobytes() == b"after"
    with pytest.raises(ChangedError, match="a has changed since"):
        client.get("a", 0, 3, version)
