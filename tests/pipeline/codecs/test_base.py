import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.codecs.base import (
    LAYER_MAJOR,
    U1,
    U2,
    ArraySpec,
    allocate,
    layer_norm,
    output_slots,
)
from semroute.pipeline.store.layout import rows_of
from semroute.trainer.model import fusion

SPECS = [
    ArraySpec("hidden", U2, 5, None, "as they are"),
    ArraySpec("code", U1, 3, LAYER_MAJOR, "layer by layer"),
    ArraySpec("scalar", U1, 4, (2, 1, 0), "value by value"),
    ArraySpec("exact", U2, 5, LAYER_MAJOR, "the first layer alone", (0,)),
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
            layers = spec.num_layers(num_layers)
            assert layers == (1 if spec.name == "exact" else num_layers)
            assert array.shape == (num_rows, layers, spec.size)
            assert array.dtype == spec.dtype
            assert array.transpose(spec.order or (0, 1, 2)).flags.c_contiguous
            array[used] = value
            assert int(array.astype(int).sum()) == value * len(used) * layers * spec.size
            array[:] = 255


def test_codecs_and_routing_normalise_alike():
    """Two definitions, as neither package may import the other, and one LN to the bit."""
    hidden = torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(0)) * 7 + 3
    for h in (hidden, hidden.bfloat16()):
        assert torch.equal(layer_norm(h), fusion.layer_norm(h))


def test_positions_find_their_slot_in_the_output():
    assert output_slots([4, 1]).tolist() == [-1, 1, -1, -1, 0]
    assert output_slots([4, 1], [4]).tolist() == [-1, 1]
