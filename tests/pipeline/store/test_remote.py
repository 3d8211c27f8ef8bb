"""Shards behind a URL, and the cache on a local disk, through a server that counts requests."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("obstore")
pytest.importorskip("s3fs")

from object_server import is_shard, serving
from tiny_stores import make_store

from semroute.pipeline.store.checks.watch import ChangedError
from semroute.pipeline.store.open import open_store
from semroute.pipeline.store.remote import cache as caches
from semroute.pipeline.store.remote import transfers
from semroute.pipeline.store.remote.cache import ChunkCache, ShardKey, cache_folder
from semroute.pipeline.store.remote.chunks import ReadAhead
from semroute.schemas import InputError
from semroute.schemas.files import StorageError, locate

KINDS = ("bf16", "delta", "latents", "buckets", "ragged")
FILLER = Path(__file__).with_name("fill_cache.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    for kind in KINDS:
        make_store(kind, folder / "bucket" / kind)
    with serving(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(transfers, "BACKOFF", 0.001)


@pytest.fixture
def no_faults(server):
    yield server
    server.fault = lambda _key, _span: None


def values(store) -> list[np.ndarray]:
    """All that a store holds, read in two orders."""
    if store.kind == "latent":
        kinds = [np.flatnonzero(store.buckets == each) for each in np.unique(store.buckets)]
        return [store.read(order) for ids in kinds for order in (ids, ids[::-3])]
    found = []
    for ids in (np.arange(len(store)), np.arange(len(store))[::-3]):
        read = store.read(ids)
        found += [read[name] for name in sorted(read)] if isinstance(read, dict) else [read.bits]
    return found


def same(found, expected) -> bool:
    return all(map(np.array_equal, found, expected)) and len(found) == len(expected)


def read_again(path, ahead: ReadAhead, *, whole: bool = False) -> list[np.ndarray]:
    """All of a store, opened anew."""
    store = open_store(path)
    store.fetch_by(ahead, whole=whole)
    return values(store)


@pytest.fixture
def counted(no_faults):
    """Requests for parts of shards, by key, from here on."""
    keys = []

    def count(key, _span):
        if is_shard(key):
            keys.append(key)

    no_faults.fault = count
    return keys


class TestReading:
    @pytest.mark.parametrize("kind", KINDS)
    def test_values_are_those_of_files_with_and_without_a_cache(self, kind, server, tmp_path):
        local = server.folder / "bucket" / kind
        expected = values(open_store(local))
        url = locate(f"memory://remote/{kind}")
        url.fs.put(str(local), url.path, recursive=True)
        for number, place in enumerate((f"s3://bucket/{kind}", url, local)):
            assert same(values(open_store(place)), expected)
            assert same(read_again(place, ReadAhead(kept_bytes=1), whole=True), expected)
            for whole in (False, True):
                cache = ChunkCache(tmp_path / f"{number}{whole}", 10_000_000)
                for _ in range(2):
                    assert same(read_again(place, ReadAhead(cache), whole=whole), expected)
        url.fs.rm(url.path, recursive=True)

    def test_neighbours_are_one_request_and_an_index_is_fetched_once(self, counted):
        store = open_store("s3://bucket/bf16")
        num_shards = store.manifest.layout.num_shards
        assert num_shards > 1
        store.read(range(len(store)))
        assert len(counted) == 2 * num_shards
        store.fetch_by(ReadAhead())
        for caption in range(0, len(store), 3):
            store.read([caption])
        assert 2 * num_shards < len(counted) < 3 * num_shards + len(store)
        assert [len({*counted}), store.layers] == [num_shards, [1, 2, 3]]

    def test_a_shard_of_which_something_is_read_follows_whole(self, counted, tmp_path):
        for cache in (None, ChunkCache(tmp_path, 10_000_000)):
            del counted[:]
            store = open_store("s3://bucket/delta")
            ahead = ReadAhead(cache, kept_bytes=10_000_000)
            store.fetch_by(ahead, whole=True)
            first = store.read([0]).bits
            until_idle(ahead)
            requests = len(counted)
            captions = np.flatnonzero(store.shards() == 0)
            assert len(captions) > 3
            for caption in captions.tolist():
                store.read([caption])
            assert len(counted) == requests
            assert np.array_equal(store.read([0]).bits, first)

    def test_requests_of_what_came_with_its_shard_count_as_ahead(self, monkeypatch, server):
        store, ahead = open_store("s3://bucket/delta"), ReadAhead()
        store.fetch_by(ahead, whole=True)
        captions = np.flatnonzero(store.shards() == 0)
        store.read(captions[:1])
        until_idle(ahead)
        for name in ("MIN_AHEAD_BYTES", "MAX_AHEAD_BYTES"):
            monkeypatch.setattr(f"semroute.pipeline.store.remote.chunks.{name}", 1)
        assert ahead.hungry()
        store.request(captions)
        assert not ahead.hungry()
        store.read(captions)
        assert ahead.hungry()

    def test_shards_in_use_do_not_make_room(self, server, counted):
        store = open_store("s3://bucket/bf16")
        files = (server.folder / "bucket" / "bf16").glob("**/hidden/c/*/0/0")
        ahead = ReadAhead(kept_bytes=2 * max(file.stat().st_size for file in files))
        store.fetch_by(ahead, whole=True)
        captions = [np.flatnonzero(store.shards() == n) for n in range(store.shards().max() + 1)]
        assert len(captions) == 4
        for _ in range(2):
            del counted[:]
            for others in captions[1:]:
                for each in (captions[0][:1], others, captions[0][-1:]):
                    store.read(each)
                    until_idle(ahead)
        requests = Counter(key.split("/c/")[1].split("/")[0] for key in counted)
        assert requests.keys() == {"1", "2", "3"}

    def test_failed_tries_are_repeated_and_counted(self, no_faults):
        expected = values(open_store(no_faults.folder / "bucket" / "delta"))
        failing = iter([503, 500, 0, 503])  # 0: the connection breaks off in the middle
        no_faults.fault = lambda key, _span: next(failing, None) if is_shard(key) else None
        ahead = ReadAhead()
        assert same(read_again("s3://bucket/delta", ahead), expected)
        assert ahead.counts.retries == 4

    def test_it_does_not_try_for_ever(self, no_faults):
        store = open_store("s3://bucket/bf16")
        store.read([0])
        ahead = ReadAhead()
        store.fetch_by(ahead)
        no_faults.fault = lambda key, _span: 503
        with pytest.raises(StorageError, match=f"{transfers.TRIES} tries failed"):
            store.read([0])
        assert ahead.counts.requests == transfers.TRIES
        no_faults.fault = lambda key, _span: None
        store.read([0])

    def test_what_is_missing_is_not_tried_again(self, server, tmp_path):
        shutil.copytree(server.folder / "bucket" / "bf16", server.folder / "bucket" / "gone")
        store = open_store("s3://bucket/gone")
        shutil.rmtree(server.folder / "bucket" / "gone" / "hidden.zarr" / "hidden" / "c")
        ahead = ReadAhead()
        store.fetch_by(ahead)
        with pytest.raises(InputError, match="is not written yet"):
            store.read([0])
        assert ahead.counts.retries == 0

    def test_a_shard_that_changes_is_refused(self, server):
        copy = shutil.copytree(server.folder / "bucket" / "bf16", server.folder / "bucket" / "new")
        store = open_store("s3://bucket/new")
        store.read([0])
        for shard in (copy / "hidden.zarr" / "hidden" / "c").rglob("0"):
            if shard.is_file():
                shard.write_bytes(shard.read_bytes())
        with pytest.raises(ChangedError, match="has changed since it was opened"):
            store.read(range(len(store)))

    def test_a_process_that_was_forked_reads_too(self, server):
        store = open_store("s3://bucket/bf16")
        expected = values(store)
        context = multiprocessing.get_context("fork")
        found = context.SimpleQueue()
        child = context.Process(target=lambda: found.put(same(values(store), expected)))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert found.get()

    def test_a_missing_package_is_named(self, server, monkeypatch):
        monkeypatch.setitem(sys.modules, "obstore", None)
        with pytest.raises(StorageError, match=r"semroute\[s3\]"):
            open_store("s3://bucket/bf16").read([0])


def until_idle(ahead: ReadAhead) -> None:
    end = time.monotonic() + 30
    while ahead.transfers.is_busy():
        assert time.monotonic() < end
        time.sleep(0.005)


class TestCache:
    def test_what_fits_is_fetched_once_by_all_processes(self, counted, tmp_path):
        expected = values(open_store("s3://bucket/delta"))
        del counted[:]
        first = ReadAhead(ChunkCache(tmp_path, 10_000_000))
        assert same(read_again("s3://bucket/delta", first), expected)
        indexes = first.counts.requests - len({*counted})
        assert indexes > 0
        del counted[:]
        second = ReadAhead(ChunkCache(tmp_path, 10_000_000))
        assert same(read_again("s3://bucket/delta", second), expected)
        assert len(counted) == len({*counted})  # the index of each shard alone
        assert second.counts.cached_bytes > 0
        assert (first.counts.refetched, second.counts.refetched) == (0, 0)

    def test_damage_is_noticed_fetched_again_and_counted(self, server, tmp_path):
        expected = values(open_store(server.folder / "bucket" / "bf16"))
        cache = ChunkCache(tmp_path, 10_000_000)
        read_again("s3://bucket/bf16", ReadAhead(cache))
        for path in tmp_path.glob("*.chunks"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        ahead = ReadAhead(cache)
        assert same(read_again("s3://bucket/bf16", ahead), expected)
        assert ahead.counts.refetched == len([*tmp_path.glob("*.chunks")])
        healed = ReadAhead(cache)
        assert same(read_again("s3://bucket/bf16", healed), expected)
        assert healed.counts.refetched == 0

    @pytest.mark.parametrize("url", [True, False])
    def test_a_store_that_is_written_again_is_another(self, url, server, tmp_path):
        name = f"again{url}"
        folder = shutil.copytree(server.folder / "bucket" / "bf16", server.folder / "bucket" / name)
        place, cache = (f"s3://bucket/{name}" if url else folder), ChunkCache(tmp_path, 10_000_000)
        before = read_again(place, ReadAhead(cache))
        store = open_store(folder)
        array = store.arrays["hidden"]
        rows = np.random.default_rng(1).integers(
            0, 9, (store.manifest.layout.rows_per_shard, *array.row_shape), np.uint16
        )
        array.write_shard(0, rows)
        after = read_again(place, ReadAhead(cache))
        assert not same(after, before)
        assert same(after, values(open_store(folder)))

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), replace=st.booleans())
    def test_its_size_is_never_exceeded(self, data, replace, tmp_path_factory):
        folder = tmp_path_factory.mktemp("cache") / "new"
        most = data.draw(st.integers(1, 40)) * 10_000
        cache = ChunkCache(folder, most, replace=replace)
        written = {}
        sizes = st.integers(1, 30_000)
        for _ in range(data.draw(st.integers(1, 25))):
            shard, number = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 9))
            content = np.random.default_rng(number + 10 * shard).bytes(data.draw(sizes))
            content = written.setdefault((shard, number), np.frombuffer(content, np.uint8))
            key = ShardKey(f"{shard:040x}", 10)
            left = cache.write(key, {number: (30_001 * number, content)})
            assert disk_use(folder) <= most
            if not left:
                end = 30_001 * number + len(content)
                found = cache.read(key, {number: (30_001 * number, end)})
                assert np.array_equal(found[number], content)
        for (shard, number), content in written.items():
            begin = 30_001 * number
            ranges = {number: (begin, begin + len(content))}
            for found in cache.read(ShardKey(f"{shard:040x}", 10), ranges).values():
                assert np.array_equal(found, content)

    def test_shards_that_are_not_used_make_room(self, tmp_path, monkeypatch):
        content = np.zeros(50_000, np.uint8) + 1
        keys = [ShardKey(f"{number:040x}", 2) for number in range(4)]
        for replace in (True, False):
            cache = ChunkCache(tmp_path / str(replace), 150_000, replace=replace)
            assert [cache.write(key, {0: (0, content)}) for key in keys] == [
                0,
                0,
                *[not replace] * 2,
            ]
            there = [bool(cache.read(key, {0: (0, 50_000)})) for key in keys]
            assert there == [not replace, not replace, replace, replace]
        monkeypatch.setattr(caches, "IDLE_SECONDS", -1.0)
        assert cache.write(keys[3], {0: (0, content)}) == 0

    def test_a_full_disk_is_told_once_and_reading_goes_on(self, server, tmp_path, monkeypatch):
        expected = values(open_store(server.folder / "bucket" / "delta"))
        cache = ChunkCache(tmp_path, 10_000_000)

        def full(file, content, place):
            if os.readlink(f"/proc/self/fd/{file}").endswith("state"):
                return pwrite(file, content, place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", full)
        ahead = ReadAhead(cache)
        assert same(read_again("s3://bucket/delta", ahead), expected)
        assert "No space left on device" in cache.fault
        assert ahead.counts.uncached > 0

    def test_what_a_killed_process_left_is_cleaned(self, tmp_path):
        cache = ChunkCache(tmp_path, 200_000)
        key, content = ShardKey("a" * 40, 3), np.ones(30_000, np.uint8)
        cache.write(key, {1: (30_000, content)})
        (tmp_path / f"{'b' * 40}.chunks").write_bytes(bytes(100_000))  # its chunks are not held
        (tmp_path / "state").write_bytes((1).to_bytes(16, "big"))  # somebody is writing
        cache.write(key, {2: (60_000, content)})
        assert not (tmp_path / f"{'b' * 40}.chunks").exists()
        assert [*cache.read(key, {n: (30_000 * n, 30_000 * (n + 1)) for n in range(3)})] == [1, 2]
        assert int.from_bytes((tmp_path / "state").read_bytes()[:8], "little") >= disk_use(tmp_path)

    def test_only_a_cache_is_used_as_one(self, tmp_path):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "thesis.tex").write_text("text")
        with pytest.raises(InputError, match="no cache and not empty"):
            ChunkCache(tmp_path / "taken", 1_000)
        with pytest.raises(InputError, match="not a URL"):
            cache_folder("s3://bucket/cache")
        (tmp_path / "file").write_text("text")
        with pytest.raises(StorageError, match=r"data\.cache\.folder"):
            ChunkCache(tmp_path / "file", 1_000)
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / caches.MARKER).write_text('{"format": "semroute-cache", "version": 0}')
        with pytest.raises(InputError, match="another version"):
            ChunkCache(tmp_path / "old", 1_000)
        for marker in (b"\xff", b"{", b"[" * 9_000):
            (tmp_path / "old" / caches.MARKER).write_bytes(marker)
            with pytest.raises(InputError, match="is damaged"):
                ChunkCache(tmp_path / "old", 1_000)
        (tmp_path / "old" / caches.MARKER).unlink()
        os.mkfifo(tmp_path / "old" / caches.MARKER)
        with pytest.raises(InputError, match="is a named pipe"):
            ChunkCache(tmp_path / "old", 1_000)

    @pytest.mark.parametrize("suffix", [".chunks", ".held"])
    def test_a_pipe_in_it_does_not_stop_anyone(self, suffix, tmp_path):
        cache, key = ChunkCache(tmp_path, 10_000_000), ShardKey("a" * 40, 3)
        os.mkfifo(tmp_path / f"{key.name}{suffix}")
        assert cache.write(key, {1: (30_000, np.ones(30_000, np.uint8))}) == 1
        assert cache.read(key, {1: (30_000, 60_000)}) == {}

    def test_links_in_it_are_not_followed(self, tmp_path):
        outside = tmp_path / "outside"
        outside.write_bytes(bytes(90_000))
        cache = ChunkCache(tmp_path / "cache", 10_000_000)
        key, content = ShardKey("a" * 40, 3), np.ones(30_000, np.uint8)
        for suffix in (".chunks", ".held"):
            (tmp_path / "cache" / f"{key.name}{suffix}").symlink_to(outside)
        assert cache.write(key, {1: (30_000, content)}) == 1
        assert cache.fault
        assert cache.read(key, {1: (30_000, 60_000)}) == {}
        assert outside.read_bytes() == bytes(90_000)


def disk_use(folder) -> int:
    """Bytes of a cache on disk, while no process writes."""
    with (folder / "state").open() as state:
        fcntl.flock(state, fcntl.LOCK_EX)
        return sum(512 * path.lstat().st_blocks for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_that_are_killed_while_they_fill_a_cache_leave_it_right(
    server, tmp_path, start_command
):
    size, local = 60_000, server.folder / "bucket" / "delta"
    arguments = ("s3://bucket/delta", local, tmp_path / "cache", size, tmp_path / "begin")
    where = {"module": FILLER.stem, "PYTHONPATH": str(FILLER.parent)}
    steady, *victims = (start_command(*arguments, **where) for _ in range(6))
    for filler in (steady, *victims):
        filler.wait_until(lambda out=filler.output: out.exists() and out.read_text() == "ready\n")
    (tmp_path / "begin").touch()
    rng = np.random.default_rng(0)
    for victim in victims:
        time.sleep(rng.uniform(0, 0.3))
        assert victim.poll() is None  # it compares all that it reads
        victim.kill()
        assert disk_use(tmp_path / "cache") <= size
    assert steady.poll() is None
    steady.kill()
    expected = values(open_store(local))
    ahead = ReadAhead(ChunkCache(tmp_path / "cache", size))
    assert same(read_again("s3://bucket/delta", ahead), expected)
    assert ahead.counts.refetched == 0
