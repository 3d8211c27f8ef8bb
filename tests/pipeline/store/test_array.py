import os
import resource
from pathlib import Path

import numpy as np
import pytest
import zarr

from semroute.pipeline.store.array import ShardedArray, create_array, new_group
from semroute.pipeline.store.shard_file import ChunkSlices, CorruptShardError
from semroute.schemas import InputError, Layout

LAYOUT = Layout(
    num_shards=3, rows_per_shard=32, rows_per_chunk=8, num_rows=90, batch_tokens=1, num_threads=1
)
ROW = (3, 4)


@pytest.fixture(params=["<u2", "u1"])
def array(request, tmp_path):
    dtype = np.dtype(request.param)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    create_array(group, "x", LAYOUT, ROW, dtype, ("row", "layer", "channel"), {})
    return ShardedArray(tmp_path / "a.zarr" / "x", LAYOUT)


def shard_rows(array, used=32, seed=0):
    rows = np.random.default_rng(seed).integers(0, 255, (32, *ROW)).astype(array.dtype)
    rows[used:] = 0
    return rows


def read(array, starts, stops, select=slice(None)):
    starts, stops = np.array(starts), np.array(stops)
    num = len(ROW) and len(range(ROW[0])[select] if isinstance(select, slice) else select)
    out = np.empty(((stops - starts).sum(), num, ROW[1]), array.dtype)
    array.read(starts, stops, out, select)
    return out


def test_runs_come_back_and_zarr_python_agrees(array):
    first, second = shard_rows(array), shard_rows(array, used=26, seed=1)
    array.write_shard(0, first)
    array.write_shard(1, second)
    starts, stops = [3, 32 + 20, 8, 3, 32 + 23], [21, 32 + 26, 9, 4, 32 + 32]  # the last: not used
    parts = [first[3:21], second[20:26], first[8:9], first[3:4], second[23:32]]
    expected = np.concatenate(parts)
    assert array.direct
    slow = ShardedArray(array.path, LAYOUT, direct=False)
    for select in (slice(None), [2, 0], [1]):
        np.testing.assert_array_equal(read(array, starts, stops, select), expected[:, select])
        np.testing.assert_array_equal(read(slow, starts, stops, select), expected[:, select])
    np.testing.assert_array_equal(zarr.open_array(array.path, mode="r")[32:64], second)


def test_more_shards_than_a_process_may_open_files_by_default(tmp_path):
    layout = LAYOUT.model_copy(update={"num_shards": 150, "num_rows": 150 * 32})
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    create_array(group, "x", layout, ROW, np.dtype("<u2"), ("row", "layer", "channel"), {})
    array = ShardedArray(tmp_path / "a.zarr" / "x", layout)
    for shard in range(150):
        array.write_shard(shard, shard_rows(array, seed=shard))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        for shard in range(150):
            found = read(array, [shard * 32], [shard * 32 + 32])
            np.testing.assert_array_equal(found, shard_rows(array, seed=shard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_buffer_that_rows_do_not_fit_is_refused(array):
    array.write_shard(0, shard_rows(array))
    runs = np.array([0]), np.array([9])
    for out in (np.empty((8, *ROW), array.dtype), np.empty((9, *ROW), np.uint64)):
        with pytest.raises(ValueError, match="do not fit"):
            array.read(*runs, out)
    every_other = np.empty((18, *ROW), array.dtype)[::2]
    array.read(*runs, every_other)
    np.testing.assert_array_equal(every_other, read(array, [0], [9]))


def test_unused_rows_cost_nothing(array):
    sizes = []
    for shard, used in enumerate((32, 16)):
        (written,) = array.write_shard(shard, shard_rows(array, used)).values()
        sizes.append(written.num_bytes)
    row_bytes = int(np.prod(ROW)) * array.dtype.itemsize
    assert sizes[0] - sizes[1] == 16 * row_bytes + 2 * 4  # two chunks and their checksums


def test_a_shard_of_zeros_is_stored_all_the_same(array):
    array.write_shard(2, np.zeros((32, *ROW), array.dtype))
    assert not read(array, [64], [96]).any()


def test_writing_the_same_rows_gives_the_same_bytes(array):
    assert array.write_shard(0, shard_rows(array)) == array.write_shard(0, shard_rows(array))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", [None, (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("dtype", ["<u2", "u1", "<f2"])
def test_a_file_is_what_zarr_python_would_write(tmp_path, dtype, order, threads):
    layout = LAYOUT.model_copy(update={"num_threads": threads})
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    for name in ("ours", "zarrs"):
        create_array(group, name, layout, ROW, np.dtype(dtype), ("a", "b", "c"), {}, order)
    ours = ShardedArray(tmp_path / "a.zarr" / "ours", layout)
    zarrs = group["zarrs"]
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, (96, *ROW)).astype(dtype)
    values[8:16] = 0  # a chunk, and later a shard, of nothing but zeros
    values[64:] = 0
    for shard in range(3):
        rows = slice(32 * shard, 32 * shard + 32)
        ours.write_shard(shard, values[rows])
        zarrs.with_config({"write_empty_chunks": shard == 2})[rows] = values[rows]
    np.testing.assert_array_equal(zarr.open_array(ours.path, mode="r")[:], values)
    files = [sorted((tmp_path / "a.zarr" / name).glob("c/**/0")) for name in ("ours", "zarrs")]
    found, expected = ([file.read_bytes() for file in kind if file.is_file()] for kind in files)
    assert len(found) == 3
    assert found == expected


def test_two_that_write_the_same_shard_do_not_meet(array, monkeypatch):
    """A worker that was taken for dead, and the one that now has its shard."""
    from semroute.schemas import atomic

    rows, publish = shard_rows(array), atomic.publish
    written = []

    def late(unfinished, path):
        monkeypatch.setattr(atomic, "publish", publish)
        written.append(array.write_shard(0, rows))  # the other, from its beginning to its end
        publish(unfinished, path)

    monkeypatch.setattr(atomic, "publish", late)
    written.append(array.write_shard(0, rows))
    assert written[0] == written[1]
    np.testing.assert_array_equal(read(array, [0], [32]), rows)
    assert [path.name for path in (array.path / "c/0/0").iterdir()] == ["0"]


def test_every_flipped_byte_is_an_error_never_a_wrong_number(array):
    rows = shard_rows(array, used=20)
    array.write_shard(0, rows)
    path = array.path / "c" / "0" / "0" / "0"
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(CorruptShardError, match=r"damaged"):
            read(ShardedArray(array.path, LAYOUT), [0], [32])
    path.write_bytes(good)
    np.testing.assert_array_equal(read(ShardedArray(array.path, LAYOUT), [0], [32]), rows)


@pytest.mark.parametrize("keep", [0, 3, 100])
def test_a_truncated_shard_is_an_error(array, keep):
    array.write_shard(0, shard_rows(array))
    path = array.path / "c" / "0" / "0" / "0"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptShardError, match=r"damaged|is empty"):
        read(array, [0], [1])


def test_a_shard_that_is_not_written_is_named(array):
    with pytest.raises(InputError, match="is not written yet"):
        read(array, [40], [41])


def test_what_cannot_be_read_cannot_be_requested(array):
    with pytest.raises(InputError, match="is not written yet"):
        array.request(ChunkSlices.from_runs(np.array([40]), np.array([41]), 8))


def test_a_cold_shard_is_read_only_where_it_is_needed(tmp_path):
    """The kernel would read up to megabytes around each page fault."""
    layout = LAYOUT.model_copy(update={"num_shards": 1, "rows_per_shard": 256, "num_rows": 256})
    values = np.random.default_rng(0).integers(1, 2**16, (256, 40, 1000), np.uint16)
    with new_group(tmp_path / "cold.zarr") as group:
        create_array(group, "x", layout, (40, 1000), values.dtype, ("row", "y", "z"), {})
    array = ShardedArray(tmp_path / "cold.zarr/x", layout)
    array.write_shard(0, values)
    with (array.path / "c/0/0/0").open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    out = np.empty((2, 40, 1000), np.uint16)
    before = bytes_from_disk()
    array.read(np.array([10, 203]), np.array([11, 204]), out)
    np.testing.assert_array_equal(out, values[[10, 203]])
    assert bytes_from_disk() - before < 3 * values[:8].nbytes  # of 20 MB; two chunks are needed


def bytes_from_disk():
    """That the kernel read for this process; none in a folder in memory."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])


def test_shards_are_written_whole(array):
    with pytest.raises(ValueError, match="a shard is written whole: expected"):
        array.write_shard(0, shard_rows(array)[:16])
    with pytest.raises(ValueError, match="a shard is written whole: expected"):
        array.write_shard(0, shard_rows(array).astype(np.float32))


def test_other_codecs_are_left_to_zarr_python(tmp_path):
    array = zarr.create_array(
        tmp_path / "x", shape=(96, *ROW), chunks=(8, *ROW), shards=(32, *ROW), dtype="uint16"
    )
    values = np.arange(96 * 12, dtype=np.uint16).reshape(96, *ROW)
    array[:] = values
    rows = ShardedArray(tmp_path / "x", LAYOUT)
    assert not rows.direct
    np.testing.assert_array_equal(read(rows, [5], [15]), values[5:15])
    with pytest.raises(InputError, match=r"other codecs .* can only be read"):
        rows.write_shard(0, values[:32])


def test_an_array_that_is_not_the_manifests_is_refused(array):
    other = LAYOUT.model_copy(update={"num_shards": 2})
    with pytest.raises(CorruptShardError, match=r"the array is \(96, 3, 4\) but .* \(64, 3, 4\)"):
        ShardedArray(array.path, other)
