import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.codecs.chunks import ChunkCodec, choose_rows_per_chunk, compress, decompress
from semroute.pipeline.codecs.registry import CODECS

SHAPE = (3, 2, 4)


@given(data=st.data(), name=st.sampled_from(list(CODECS)), num_rows=st.integers(1, 40))
def test_chunks_give_their_codes_back_and_zeros_cost_nothing(data, name, num_rows):
    codec = CODECS[name](3, 6, {}, 4.0, rank=2)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    used = np.flatnonzero(rng.random(num_rows) < data.draw(st.sampled_from([0.0, 0.1, 0.9])))
    codes = {}
    for spec in codec.arrays:
        codes[spec.name] = np.zeros((num_rows, 3, spec.size), spec.dtype)
        codes[spec.name][used] = rng.integers(1, 256, (len(used), 3, spec.size))
    chunks = compress(codec, codes)
    size = choose_rows_per_chunk(2 * 3 * 6)
    for array, parts in chunks.items():
        in_use = [
            bool(codes[array][start : start + size].any()) for start in range(0, num_rows, size)
        ]
        assert [bool(part) for part in parts] == in_use
    found = decompress(codec, chunks, num_rows)
    for array, expected in codes.items():
        np.testing.assert_array_equal(found[array], expected)


def test_a_compressed_chunk_has_its_axes_in_their_order():
    rows = np.arange(24, dtype="<u2").reshape(SHAPE)
    content = ChunkCodec(SHAPE, rows.dtype, (1, 0, 2)).encode(rows)
    stored = zstandard.ZstdDecompressor().decompress(content)
    assert stored == rows.transpose(1, 0, 2).tobytes()
    assert ChunkCodec(SHAPE, rows.dtype, None).encode(rows) == rows.tobytes()


@pytest.mark.parametrize("order", [None, (1, 0, 2)])
def test_a_chunk_of_another_size_is_an_error(order):
    codec = ChunkCodec(SHAPE, np.dtype("<u2"), order)
    for shape in ((2, 2, 4), (4, 2, 4)):
        content = ChunkCodec(shape, np.dtype("<u2"), order).encode(np.ones(shape, "<u2"))
        with pytest.raises((ValueError, zstandard.ZstdError)):
            codec.decode(content)
