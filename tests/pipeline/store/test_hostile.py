"""Stores from strangers: what lies, leads outside or would burst ends in one message."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from attacked import Attacked
from forgeries import (
    ALL,
    find_faults,
    folder_there,
    link,
    named,
    outside,
    pipe,
    snapshot,
    zeros,
)
from random_forgeries import Fuzz
from tiny_stores import (
    KINDS,
    WIDTH,
    edit,
    make_store,
    read,
)

from semroute.pipeline.codecs.kernels import copy_runs
from semroute.pipeline.store.documents import commit, prepare_folder, remove_partial_files
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.lock import locked, read_driver
from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.verify import repair, verify
from semroute.schemas import InputError, Quarantine, Receipt

NUM_RANDOM = 12
"""Random forgeries of a test."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Callable[[str], Path]:
    """Kind -> a store; not to be changed."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_store(kind, folder / kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    process = Attacked()
    yield process
    process.close()


@pytest.mark.parametrize("kind", KINDS)
def test_forgeries_end_in_one_message(kind, stores, attacked, tmp_path):
    """Each of one kind of store; ``benchmarks/fuzz.py --every`` tries it on all."""
    chosen = [
        each for number, each in enumerate(ALL) if each.kinds[number % len(each.kinds)] == kind
    ]
    assert chosen
    assert find_faults(chosen, kind, stores(kind), attacked, tmp_path) == {}


class TestWriters:
    """What a writer would write or delete in a stranger's store that is not finished."""

    @pytest.fixture
    def store(self, stores, tmp_path):
        store = shutil.copytree(stores("bf16"), tmp_path / "store")
        edit(store, "manifest.json", "status", "extracting")
        return store

    @pytest.mark.parametrize("name", ["growing", "receipts", "hidden.zarr", "quarantine"])
    def test_nothing_behind_a_link_is_touched(self, name, store, stores):
        opened = FeatureStore.open(store, complete=False)
        (store / name).mkdir(exist_ok=True)
        for more in ("shard-000000.json", "x.partial", "manifest.json"):
            (store / name / more).write_text("mine")
        link(named(name))(store)
        before = snapshot(outside(store))
        receipt = Receipt.model_validate(read(stores("bf16"), "receipts/shard-000000.json"))
        codes = np.ones((opened.manifest.layout.rows_per_shard, 3, WIDTH), np.uint16)
        failed = Quarantine(shard=0, entries=[], reason="", traceback="")
        attempts = (
            lambda: FeatureStore.open_existing(store),
            lambda: opened.reopen([0, 1]),
            lambda: opened.write_receipt(receipt),
            lambda: opened.write_shard(0, {"hidden": codes}),
            lambda: opened.write_quarantine(failed),
            lambda: remove_partial_files(store),
            lambda: commit(store),
            lambda: repair(verify(store)),
        )
        refused = 0
        for attempt in attempts:
            try:
                attempt()
            except InputError:
                refused += 1
        assert refused >= 2
        assert snapshot(outside(store)) == before
        with pytest.raises(InputError, match=f"{name} is a link"):
            FeatureStore.open_existing(store)

    def test_an_unfinished_file_is_not_written_through(self, store):
        precious = outside(store) / "precious.txt"
        precious.write_text("mine")
        opened = FeatureStore.open(store, complete=False)
        receipt = opened.receipts()[0]
        for name in ("manifest.json.tmp", "receipts/shard-000000.json.tmp"):
            (store / name).symlink_to(precious)
        opened.write_receipt(receipt)
        opened.finish()
        assert precious.read_text() == "mine"
        assert verify(store).problems == []

    def test_a_folder_is_not_cleared_through_a_link(self, store):
        for file in ("manifest.json", "captions.parquet", "samples.parquet"):
            (store / file).unlink()
        shutil.rmtree(store / "receipts")
        shutil.rmtree(store / "hidden.zarr")
        (outside(store) / "precious.txt").write_text("mine")
        (store / "hidden.zarr").symlink_to(outside(store))
        with suppress(InputError):
            prepare_folder(store, "feature", "hidden.zarr", FeatureStore.tables)
        assert (outside(store) / "precious.txt").read_text() == "mine"

    @pytest.mark.parametrize("make", [link, pipe, zeros, folder_there])
    def test_a_lock_that_is_no_file_is_nobodys(self, make, store):
        (store / "driver.json").write_text("mine")
        outside(store)
        make(named("driver.json"))(store)
        before = snapshot(outside(store))
        assert read_driver(store) is None
        with suppress(InputError, OSError), locked(store, [].append):
            pass
        assert snapshot(outside(store)) == before


class TestRuns:
    """``copy_runs`` keeps to its arrays, whoever calls it."""

    @pytest.mark.parametrize(
        "run",
        [(-1, 4, 0), (0, 4, -1), (0, -4, 8), (13, 4, 0), (0, 4, 29), (2**62, 4, 0), (0, 2**62, 0)],
    )
    def test_a_run_outside_is_refused_and_nothing_is_copied(self, run):
        source, out = np.arange(16, dtype=np.uint8), np.zeros(32, np.uint8)
        runs = np.array([(0, 4, 0), run], np.int64)
        with pytest.raises(ValueError, match="are not inside 16 and 32 bytes"):
            copy_runs(source, *np.ascontiguousarray(runs.T), out)
        assert not out.any()

    def test_other_arrays_are_refused(self):
        source, one = np.arange(16, dtype=np.uint8), np.zeros(1, np.int64)
        for arguments in (
            (source[::2], one, one, one, source.copy()),
            (source.astype(np.uint16), one, one, one, source.copy()),
            (source, one, np.zeros(2, np.int64), one, source.copy()),
            (source, one.astype(np.uint64), one, one, source.copy()),
        ):
            with pytest.raises(ValueError, match="expected"):
                copy_runs(*arguments)

    @pytest.mark.parametrize("kind", ["lossless", "delta", "linear", "exact"])
    def test_codes_rows_and_layers_that_do_not_fit_are_refused(self, kind, stores):
        codec = open_features(stores(kind)).codec
        rows, layers = 4, [0, 1, 2]
        shapes = {s.name: (rows, s.num_layers(3), s.size) for s in codec.arrays}
        dtypes = {s.name: s.dtype for s in codec.arrays}
        codes = {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items()}
        targets, out = np.arange(rows), np.zeros((rows, 3, WIDTH), np.uint16)
        codec.decode(codes, layers, targets, out)
        for wrong in ([0, 1, 2, rows], [-1, 0, 1, 2], [0, 1]):
            with pytest.raises((ValueError, IndexError)):
                codec.decode(codes, layers, np.array(wrong), out)
        with pytest.raises((ValueError, IndexError)):
            codec.decode(codes, layers, targets, out[:, :2])
        for name, (num, depth, size) in shapes.items():
            if name == "exact":
                continue  # numpy's own indexing copies it
            for shape in ((num - 1, depth, size), (num, depth - 1, size), (num, depth, size - 1)):
                changed = codes | {name: np.zeros(shape, dtypes[name])}
                with pytest.raises(ValueError, match=f"{name}|expected"):
                    codec.decode(changed, layers, targets, out)


@pytest.mark.parametrize("seed", range(3))
def test_random_forgeries(seed, tmp_path_factory, stores, attacked):
    """Some of each kind of change; ``benchmarks/fuzz.py`` tries thousands."""
    chosen = {kind: stores(kind) for kind in KINDS[seed::3]}
    fuzz = Fuzz(chosen, attacked, tmp_path_factory.mktemp("fuzz"))
    for number in range(NUM_RANDOM):
        found = fuzz.run(number, seed)
        assert not found["fault"], found
