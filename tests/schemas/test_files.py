"""Stores as objects: in memory, and behind a real S3 server on this machine (moto)."""

import json
import logging
import pickle
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

fsspec = pytest.importorskip("fsspec")
torch = pytest.importorskip("torch")

from semroute.cli import cli  # noqa: E402
from semroute.pipeline.extraction.append import stage  # noqa: E402
from semroute.pipeline.extraction.driver import exclusive_writer  # noqa: E402
from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.extraction.latents import encode_images  # noqa: E402
from semroute.pipeline.inspection.status import status  # noqa: E402
from semroute.pipeline.store import lock  # noqa: E402
from semroute.pipeline.store.documents import StoreError  # noqa: E402
from semroute.pipeline.store.lock import LockedError, locked, read_driver  # noqa: E402
from semroute.pipeline.store.open import open_features, open_latents  # noqa: E402
from semroute.pipeline.store.verify import repair, verify  # noqa: E402
from semroute.schemas import LOCK_FILE, InputError, write_document  # noqa: E402
from semroute.schemas.files import (  # noqa: E402
    StorageError,
    create_object,
    list_files,
    list_names,
    locate,
    on_fuse,
    read_file,
    read_files,
    remove,
    write_files,
)

NAMES = st.lists(st.text("ab.-", min_size=1, max_size=3).filter(lambda n: n.strip(".")), min_size=1)
TREES = st.dictionaries(NAMES.map(lambda parts: "/".join(parts[:3])), st.binary(max_size=20))


@pytest.fixture(scope="module")
def s3():
    """The file system of an S3 server on this machine, with a bucket ``bucket``."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.moto_server.threaded_moto_server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        # Where tests are dealt to processes this module's may come in two parts, and what one
        # server held the next one holds too.
        with urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=60):
            system = fsspec.filesystem("s3", use_listings_cache=False)
        system.mkdir("bucket")
        yield system
        for each in type(system)._cache.values():
            type(system).close_session(each.loop, each._s3)
        type(system).clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def place(request):
    """An empty place for a store, and its URL as a path."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        root = locate(f"s3://bucket/{request.node.originalname}")
    else:
        root = locate("memory://store")
    yield root
    remove(root)


@pytest.fixture(scope="module")
def arguments(samples_file, tiny_llm):
    """Arguments of every extraction here."""
    how = {"model": str(tiny_llm), "codec": "bf16", "shard_bytes": 100_000, "threads": 1}
    return {"source": str(samples_file), "workers": 0, "report": [].append} | how


@pytest.fixture(scope="module")
def local(arguments, tmp_path_factory):
    """The same store in a folder."""
    return extract(features=tmp_path_factory.mktemp("local") / "features", **arguments)


def contents(path) -> dict[str, bytes]:
    """All files that hold no time."""
    changing = ("receipts/", "manifest.json", "checksums.json", "driver.json")
    names = [name for name in list_files(path) if not name.startswith(changing)]
    return read_files(path, names)


class TestFiles:
    @settings(max_examples=40)
    @given(tree=TREES)
    def test_objects_are_listed_and_read_as_files_are(self, tree, tmp_path_factory):
        files = {n: c for n, c in tree.items() if not any(o.startswith(f"{n}/") for o in tree)}
        folder, url = tmp_path_factory.mktemp("tree"), locate("memory://tree")
        for root in (folder, url):
            write_files(root, files)
        found = [{n: e.num_bytes for n, e in list_files(root).items()} for root in (folder, url)]
        assert found[0] == found[1] == {name: len(content) for name, content in files.items()}
        assert list(found[0]) == list(found[1])
        assert list_names(folder) == list_names(url) == {name.partition("/")[0] for name in files}
        assert read_files(folder, files) == read_files(url, files) == files
        for name in {name.partition("/")[0] for name in files}:
            remove(folder / name)
            remove(url / name)
            assert [*list_files(folder)] == [*list_files(url)]
        assert list_files(url) == {}
        remove(url)  # nothing there is nothing to do

    def test_an_object_is_created_once(self, place):
        assert create_object(place / "x", b"first")
        assert not create_object(place / "x", b"second")
        assert (place / "x").read_bytes() == b"first"
        assert abs(time.time() - list_files(place)["x"].changed) < 60

    def test_what_others_wrote_is_seen_at_once(self, s3):
        root = locate("s3://bucket/others")
        assert list_files(root) == {}
        s3.pipe("bucket/others/x", b"1")
        assert [*list_files(root)] == ["x"]
        assert [*list_files(pickle.loads(pickle.dumps(root)))] == ["x"]

    def test_a_file_url_is_a_folder(self, tmp_path):
        assert locate(f"file://{tmp_path}") == tmp_path


class TestExtraction:
    @pytest.mark.slow
    def test_a_killed_driver_is_continued_to_the_same_bytes(
        self, s3, arguments, local, start_command
    ):
        url = "s3://bucket/killed"
        command = ["extract", arguments["source"], url, "--model", arguments["model"]]
        command += ["--codec", "bf16", "--shard-size", 100_000, "--workers", 0, "--threads", 1]
        process = start_command(*command)
        process.wait_until(lambda: len(s3.glob("bucket/killed/receipts/*")) >= 4)
        assert status(url).details["driver_is_dead"] is False
        with pytest.raises(LockedError, match=f"process {process.pid} on"):
            extract(features=url, **arguments)
        process.kill()
        store = open_features(url, complete=False)
        before = store.receipts()
        assert 4 <= len(before) < store.manifest.layout.num_shards
        found = status(url).details
        assert found["driver_is_dead"] is True
        assert found["shards"] == len(before) == found["shards_total"] - len(store.remaining())
        with pytest.raises(StoreError, match="is not finished"):
            open_features(url)

        lines = []
        store = extract(features=url, **arguments | {"report": lines.append})
        assert f"the lock of process {process.pid}" in lines[0]
        assert store.is_complete
        assert {shard: store.receipts()[shard] for shard in before} == before
        assert contents(store.path) == contents(local.path)
        ids = [3, 4, 100]
        assert np.array_equal(open_features(url).read(ids).bits, local.read(ids).bits)
        assert not (store.path / LOCK_FILE).exists()
        assert verify(url).problems == verify(url).warnings == []

    def test_damage_is_found_and_written_anew(self, place, arguments, local, s3):
        store = extract(features=place, **arguments)
        victim = place / "hidden.zarr" / "hidden" / "c" / "2" / "0" / "0"
        damaged = bytearray(victim.read_bytes())
        damaged[len(damaged) // 2] ^= 4
        victim.fs.pipe_file(victim.path, bytes(damaged))
        remove(place / "hidden.zarr" / "hidden" / "c" / "3")
        found = verify(place)
        assert found.bad_shards == [2, 3]
        assert "its sha256 is not the one in the receipt" in str(found)
        assert "is not written yet" in str(found)
        assert store.remaining() == [3]  # a flipped bit has the same size
        assert repair(found) == [2, 3]
        extract(features=place, **arguments)
        assert contents(place) == contents(local.path)
        assert verify(place).problems == []

    @pytest.mark.slow
    def test_every_codec_and_command(self, s3, arguments, tmp_path):
        how = arguments | {"codec": "delta", "limit": 40}
        local = extract(features=tmp_path / "features", **how)
        extract(features="s3://bucket/delta", **how)
        url = locate("s3://bucket/delta")
        assert contents(url) == contents(local.path)
        for command in ("inspect", "status", "verify"):
            done = CliRunner().invoke(cli, [command, str(url), "--json"], catch_exceptions=False)
            assert done.exit_code == 0
            assert json.loads(done.stdout)["path"] == str(url)
        target = ["rewrite", str(url), "s3://bucket/raw", "--codec", "bf16", "--workers", "0"]
        assert CliRunner().invoke(cli, target, catch_exceptions=False).exit_code == 0
        raw = open_features("s3://bucket/raw")
        assert np.array_equal(raw.read([1, 5]).bits, local.read([1, 5]).bits)
        again = CliRunner().invoke(cli, ["rewrite", str(url), f"{url}/"])
        assert "is the store itself" in again.output

    def test_a_store_grows_and_a_stopped_growth_is_settled(self, place, arguments, texts, tmp_path):
        def make(num, features):
            file = tmp_path / "captions.parquet"
            pyarrow.parquet.write_table(pa.table({"text": texts[:num]}), file)
            return extract(features=features, **arguments | {"source": str(file)})

        make(40, tmp_path / "features")
        expected = make(90, tmp_path / "features")
        small = make(40, place)
        before = contents(place)
        # What a growth that was killed on its way leaves: all of the new manifest's files, staged.
        files = read_files(expected.path, ["captions.parquet", "samples.parquet"])
        name = "hidden.zarr/hidden/zarr.json"
        files |= read_files(expected.path, [name])
        stage(small, expected.manifest.unfinished(), files)
        with pytest.raises(StoreError, match="was growing when it was stopped"):
            open_features(place)
        store = make(90, place)
        assert contents(place) == contents(expected.path)
        shards = [n for n in before if "/c/" in n]
        assert {n: contents(place)[n] for n in shards} == {n: before[n] for n in shards}
        assert verify(place).problems == []
        assert store.samples.num_rows == 90
        assert not [name for name in list_files(place) if name.startswith("growing")]

    def test_a_place_that_holds_something_else_is_not_touched(self, place, arguments):
        write_files(place, {"notes.txt": b"mine"})
        with pytest.raises(StoreError, match=r"is not empty.*notes\.txt"):
            extract(features=place, **arguments)
        assert [*list_files(place)] == ["notes.txt"]

    def test_broken_images_are_listed(self, s3, tmp_path, latent_store, samples_file):
        table = pyarrow.parquet.read_table(samples_file)
        rows = table["image"].to_pylist()
        rows[7]["bytes"] = b"no image"
        broken = table.set_column(1, "image", pa.array(rows, table.schema.field("image").type))
        pyarrow.parquet.write_table(broken, tmp_path / "broken.parquet")
        how = {"workers": 0, "shard_bytes": 30_000, "report": [].append}
        with pytest.raises(StoreError, match="1 of 200 images cannot be read"):
            encode_images(str(tmp_path / "broken.parquet"), "s3://bucket/latents", **how)
        begun = open_latents("s3://bucket/latents", complete=False)
        assert [q.entries for q in begun.quarantined().values()] == [[7]]
        how["broken"] = "skip"
        store = encode_images(str(tmp_path / "broken.parquet"), "s3://bucket/latents", **how)
        good = store.ids[::9]
        assert np.array_equal(store.read(good), open_latents(latent_store).read(good))


class TestLock:
    def test_the_second_driver_is_refused_and_a_dead_one_replaced(self, place, monkeypatch):
        monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
        with locked(place, print):
            with (
                pytest.raises(LockedError, match="is being written by process"),
                locked(place, print),
            ):
                raise AssertionError
            time.sleep(0.5)
            assert read_driver(place).beats > 0
            document = json.loads(read_file(place / LOCK_FILE))  # between beats
        assert not (place / LOCK_FILE).exists()
        write_document(place / LOCK_FILE, json.dumps(document | {"host": "elsewhere"}))
        said = []
        with locked(place, said.append):
            assert "watching for 0 s whether it is alive" in said[0]
            assert "taking over the lock of" in said[1]

    def test_a_driver_elsewhere_that_beats_is_alive(self, s3, monkeypatch):
        monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
        place = locate("s3://bucket/beats")
        with locked(place, print):
            alive = read_driver(place).model_copy(update={"host": "elsewhere"})
        end = threading.Event()

        def beat():
            beats = 0
            while not end.wait(0.1):
                beats += 1
                document = alive.model_copy(update={"beats": beats}).model_dump_json()
                write_document(place / LOCK_FILE, document)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            time.sleep(0.3)
            with pytest.raises(LockedError, match="on elsewhere"), locked(place, print):
                raise AssertionError
        finally:
            end.set()
            thread.join()

    def test_of_many_that_take_over_one_is_left(self, s3, monkeypatch):
        monkeypatch.setattr(lock, "BEAT_SECONDS", 0.3)
        place = locate("s3://bucket/many")
        with locked(place, print):
            dead = read_driver(place).model_copy(update={"pid": 2**22 + 1})
        write_document(place / LOCK_FILE, dead.model_dump_json())
        begin, outcomes = threading.Barrier(4), []

        def drive():
            begin.wait()
            try:
                with locked(place, [].append) as held:
                    held.stop.wait(3)
                    outcomes.append("lost" if held.lost else "held")
            except LockedError:
                outcomes.append("refused")

        threads = [threading.Thread(target=drive) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes).count("held") == 1
        assert len(outcomes) == 4

    def test_a_driver_that_was_taken_for_dead_stops(self, place, monkeypatch):
        monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
        done = []

        def work(shard):
            done.append(shard)
            if shard == 1:
                other = read_driver(place).model_copy(update={"token": "another"})
                for _ in range(100):  # a beat that had begun may write over the first
                    write_document(place / LOCK_FILE, other.model_dump_json())
                    if executor.stop.wait(0.05):
                        return
                raise AssertionError("not stopped")

        with (
            pytest.raises(LockedError, match="another driver took this one for dead"),
            exclusive_writer(place, "local", 0, print) as executor,
        ):
            [*executor.run(range(5), work, lambda s: (s,), on_progress=lambda *_: None)]
        assert done == [0, 1]
        assert read_driver(place).token == "another"


class TestRefusals:
    def test_the_hub_is_written_to_by_push(self, arguments, monkeypatch):
        with pytest.raises(StorageError, match=r"a commit to the Hub.*semroute push"):
            extract(features="hf://datasets/somebody/features", **arguments)

    def test_no_bucket(self, s3, arguments):
        with pytest.raises(StorageError, match=r"cannot be written to: .*bucket does not exist"):
            extract(features="s3://nowhere-else/features", **arguments)

    def test_a_manifest_that_another_changed(self, place, arguments):
        store = extract(features=place, **arguments)
        store.reopen([])
        other = store.manifest.model_copy(
            update={"layout": store.manifest.layout.model_copy(update={"num_rows": 3})}
        )
        write_document(place / "manifest.json", other.model_dump_json())
        with pytest.raises(StoreError, match="was changed by another process meanwhile"):
            store.finish()

    def test_no_store_and_no_such_kind_of_place(self, s3):
        with pytest.raises(StoreError, match=r"is no feature store: it has no manifest\.json"):
            open_features("s3://bucket/x")
        done = CliRunner().invoke(cli, ["inspect", "nowhere://x"])
        assert done.exit_code == 1
        assert "nowhere" in done.output
        assert issubclass(StorageError, InputError)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("/data/bucket/features", True),
        ("/data/bucket", True),
        ("/data/bucket2", False),
        ("/data/bucket/scratch/x", False),
        ("/data/my bucket/x", True),
        ("/data/host/x", True),
        ("/data/server/x", False),
        ("/home", False),
    ],
)
def test_which_file_systems_are_programs(place, found, tmp_path):
    mounts = tmp_path / "mountinfo"
    kinds = {
        "/": "ext4",
        "/data/bucket": "fuse.rclone",
        "/data/bucket/scratch": "xfs",
        r"/data/my\040bucket": "fuse",
        "/data/host": "virtiofs",
        "/data/server": "nfs4",
    }
    mounts.write_text(
        "".join(
            f"{number} 1 0:{number} / {place} rw,noatime shared:1 - {kind} none rw\n"
            for number, (place, kind) in enumerate(kinds.items(), 20)
        )
    )
    assert on_fuse(Path(place), mounts) == found


def test_temporary_files_are_on_no_program(tmp_path):
    assert not on_fuse(tmp_path)
    assert not on_fuse(tmp_path, tmp_path / "no such file")
