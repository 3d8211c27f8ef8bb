import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.codecs.base import LAYER_MAJOR, U1, U2, ArraySpec, allocate
from semroute.pipeline.store.layout import rows_of

SPECS = [
    ArraySpec("hidden", U2, 5, None, "as they are"),
    ArraySpec("code", U1, 3, LAYER_MAJOR, "layer by layer"),
    ArraySpec("scalar", U1, 4, (2, 1, 0), "value by value"),
]


@given(
    gaps=st.lists(st.integers(0, 9), max_size=20), counts=st.data(), num_layers=st.integers(1, 4)
)
def test_rows_that_no_caption_has_are_zero(gaps, counts, num_layers):
    nums = [counts.draw(st.integers(1, 9)) for _ in gaps]
    starts = np.cumsum([gap + num for gap, num in zip(gaps, [0, *nums], strict=False)])
    used = rows_of(starts.astype(np.int64), np.array(nums, np.int64))
    expected = [
        row for start, num in zip(starts, nums, strict=True) for row in range(start, start + num)
    ]
    assert used.tolist() == expected

    num_rows = max(expected, default=0) + 3
    for value in (255, 7):  # the second time in memory that is not zero
        arrays = allocate(SPECS, num_rows, num_layers, used)
        for spec in SPECS:
            array = arrays[spec.name]
            assert array.shape == (num_rows, num_layers, spec.size)
            assert array.dtype == spec.dtype
            assert array.transpose(spec.order or (0, 1, 2)).flags.c_contiguous
            array[used] = value
            assert int(array.astype(int).sum()) == value * len(used) * num_layers * spec.size
            array[:] = 255
