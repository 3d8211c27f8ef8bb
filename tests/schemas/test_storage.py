"""Speed of a disk, measured past the page cache."""

import os

import pytest

from semroute.schemas import InputError, storage
from semroute.schemas.storage import StorageSpeed, measure_storage


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(os.urandom(200_000))
    return tmp_path


def test_a_disk_is_measured_at_whole_blocks(folder, monkeypatch):
    monkeypatch.setattr(storage, "MIN_BYTES", 300_000)
    found = measure_storage(folder, 5000, seconds=0.05)
    if found is None:
        pytest.skip("the folder for tests is on a file system without O_DIRECT")
    assert found.request_bytes == 8192
    assert found.bytes_per_second > 0


@pytest.mark.parametrize(("size", "least"), [(5000, 500_000), (300_000, 1)])
def test_too_little_says_nothing_about_a_disk(folder, monkeypatch, size, least):
    monkeypatch.setattr(storage, "MIN_BYTES", least)
    assert measure_storage(folder, size, seconds=5.0) is None


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        measure_storage(tmp_path / "none", 5000)


def test_objects_are_not_measured():
    assert measure_storage("memory://none", 5000) is None


@pytest.mark.parametrize(
    ("needed", "expected"),
    [(None, "uncached"), (5e6, "2x what training reads"), (2e7, "TOO SLOW, 50% of")],
)
def test_a_speed_is_compared_with_what_is_needed(needed, expected):
    assert expected in StorageSpeed(1e7, 4096).compare(needed)
