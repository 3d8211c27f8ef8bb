import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.store.layout import pack
from semroute.schemas import InputError
from semroute.schemas.units import format_bytes, parse_bytes

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=200).map(np.array)


@given(
    num_rows=lengths,
    bytes_per_row=st.integers(1, 300_000),
    shard_bytes=st.integers(1, 10**8),
    aligned=st.booleans(),
)
def test_no_entry_straddles_a_shard_and_no_row_is_used_twice(
    num_rows, bytes_per_row, shard_bytes, aligned
):
    packing = pack(
        num_rows,
        bytes_per_row=bytes_per_row,
        shard_bytes=shard_bytes,
        batch_tokens=1,
        aligned=aligned,
    )
    layout = packing.layout
    stops = packing.row_start + num_rows
    assert (packing.row_start // layout.rows_per_shard == packing.shard).all()
    assert ((stops - 1) // layout.rows_per_shard == packing.shard).all()
    assert (packing.row_start[1:] >= stops[:-1]).all()
    assert layout.num_rows == num_rows.sum()
    assert 1 <= layout.rows_per_chunk <= 8
    assert not aligned or (packing.row_start % layout.rows_per_chunk == 0).all()
    assert layout.rows_per_shard % layout.rows_per_chunk == 0
    entries = [list(packing.entries(shard)) for shard in range(layout.num_shards)]
    assert all(entries)
    assert [*itertools.chain(*entries)] == list(range(len(num_rows)))
    full = layout.rows_per_shard * bytes_per_row
    longest = -(-int(num_rows.max()) // layout.rows_per_chunk) * layout.rows_per_chunk
    assert full <= max(shard_bytes, longest * bytes_per_row)


@given(rows=lengths, cuts=st.tuples(st.integers(1, 40), st.integers(1, 40)), aligned=st.booleans())
def test_what_was_packed_stays_where_it_is_when_entries_are_added(rows, cuts, aligned):
    rows = np.concatenate([[rows.max()], rows])  # so that every entry fits
    earlier = sorted({min(cut, len(rows)) for cut in cuts} - {len(rows)})
    options = {"bytes_per_row": 10, "shard_bytes": 500, "batch_tokens": 64, "rows_per_chunk": 4}
    options |= {"aligned": aligned}
    whole = pack(rows, **options, earlier=earlier)
    for number, stop in enumerate(earlier):
        before = pack(rows[:stop], **options, earlier=earlier[:number])
        assert whole.layout.rows_per_shard == before.layout.rows_per_shard
        np.testing.assert_array_equal(whole.row_start[:stop], before.row_start)
        np.testing.assert_array_equal(whole.shard[:stop], before.shard)
        assert whole.shard[stop] == before.layout.num_shards
    starts, stops = whole.row_start, whole.row_start + rows
    assert (starts[1:] >= stops[:-1]).all()
    np.testing.assert_array_equal(starts // whole.layout.rows_per_shard, whole.shard)
    np.testing.assert_array_equal((stops - 1) // whole.layout.rows_per_shard, whole.shard)


def test_small_stores_are_not_a_full_shard_long():
    layout = pack(np.array([5, 6]), bytes_per_row=2, shard_bytes=10**9, batch_tokens=1).layout
    assert (layout.num_shards, layout.rows_per_shard) == (1, 16)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("256MB", 256 * 10**6), ("1 GiB", 2**30), ("1.5kb", 1500), ("7", 7)]
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "5 parsecs", "1e3"])
def test_nonsense_is_no_size(text):
    with pytest.raises(InputError, match="is not a size; expected"):
        parse_bytes(text)


def test_sizes_are_shown():
    assert [format_bytes(n) for n in (12, 1234, 256e6, 18.4e12)] == [
        "12 B",
        "1.2 KB",
        "256.0 MB",
        "18.4 TB",
    ]
