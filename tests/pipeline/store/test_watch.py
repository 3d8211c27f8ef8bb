"""A store that changes while it is read: the file is named, whatever was done to it."""

import os
import shutil
import time

import numpy as np
import pytest
from tiny_stores import make_store, shards

from semroute.pipeline.store.checks.watch import ChangedError
from semroute.pipeline.store.open import open_store
from semroute.schemas import InputError


def overwrite(file):
    file.write_bytes(bytes(reversed(file.read_bytes())))


def truncate(file):
    os.truncate(file, 4096 if file.stat().st_size > 8192 else 1)


def empty(file):
    os.truncate(file, 0)


def replace(file):
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[::-1])
    other.rename(file)


def remove(file):
    file.unlink()


def move_the_store(file):
    store = next(folder for folder in file.parents if (folder / "manifest.json").exists())
    store.rename(store.with_name("moved"))


CHANGES = [overwrite, truncate, empty, replace, remove, move_the_store]


@pytest.fixture(scope="module", params=["bf16", "delta", "buckets", "ragged"])
def made(request, tmp_path_factory):
    return make_store(request.param, tmp_path_factory.mktemp("made") / request.param)


@pytest.fixture
def path(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def read(store):
    """All that there is, a third at a time."""
    values = []
    entries = np.asarray(store.ids if hasattr(store, "ids") else np.arange(len(store)))
    buckets = getattr(store, "buckets", np.zeros(len(store)))[entries]
    for part in (entries[buckets == bucket] for bucket in np.unique(buckets)):
        for some in np.array_split(part, 3):
            found = store.read(some)
            found = found if isinstance(found, dict) else {"rows": found}
            values += [v.numpy() if hasattr(v, "numpy") else v.copy() for v in found.values()]
    return values


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read_before", [True, False])
def test_a_file_that_changes_is_named(path, change, read_before):
    store = open_store(path)
    store.watch()
    if read_before:
        read(store)
    time.sleep(0.01)  # as coarse as a file system's clock may be
    file = shards(path)[-1]
    change(file)
    unread = change is move_the_store and not read_before  # then tables cannot be read either
    with pytest.raises(InputError, match=r"has changed since|is gone|cannot be read") as raised:
        read(store)
    assert unread or isinstance(raised.value, ChangedError)
    assert str(path) in str(raised.value)


def test_hard_links_copies_and_permissions_are_no_change(path):
    store = open_store(path)
    store.watch()
    expected = read(store)
    for file in shards(path):
        os.link(file, file.with_name("backup"))
        file.chmod(0o400)
        shutil.copy2(file, file.with_name("copy"))
        file.with_name("copy").rename(file)
    for found, before in zip(read(store), expected, strict=True):
        np.testing.assert_array_equal(found, before)
