import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.text.batching import batches

lengths = st.lists(st.integers(1, 90), min_size=1, max_size=200).map(np.array)


def test_the_rows_of_four_sequences():
    """The example of the docstring: a, b, c, d of 4, 3, 2 and 1 tokens."""
    sizes = np.array([4, 3, 2, 1])
    (padded,) = batches(sizes, 16)
    assert (padded.entries.tolist(), padded.row.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])
    (packed,) = batches(sizes, 16, 5)
    assert (packed.entries.tolist(), packed.row.tolist()) == ([0, 3, 1, 2], [0, 0, 1, 1])


@given(sizes=lengths, budget=st.integers(1, 1000))
def test_batches_hold_every_sequence_once_within_the_budget(sizes, budget):
    found = list(batches(sizes, budget))
    assert sorted(np.concatenate([b.entries for b in found]).tolist()) == list(range(len(sizes)))
    for batch in found:
        assert batch.row.tolist() == list(range(len(batch)))
        assert sizes[batch.entries].max() * len(batch) <= budget or len(batch) == 1
    again = batches(sizes, budget)
    assert [b.entries.tolist() for b in again] == [b.entries.tolist() for b in found]


@given(sizes=lengths, budget=st.integers(1, 1000), row_tokens=st.integers(1, 300))
def test_packed_batches_fill_rows_within_the_budget(sizes, budget, row_tokens):
    found = list(batches(sizes, budget, row_tokens))
    assert sorted(np.concatenate([b.entries for b in found]).tolist()) == list(range(len(sizes)))
    left = set(range(len(sizes)))
    for batch in found:
        longest = max(int(sizes[entry]) for entry in left)
        assert sizes[batch.entries[0]] == longest
        width, num_rows = max(row_tokens, longest), int(batch.row[-1]) + 1
        assert width * num_rows <= budget or num_rows == 1
        assert np.unique(np.diff(batch.row, prepend=0)).tolist() in ([0], [0, 1])
        left -= set(batch.entries.tolist())
        used = np.bincount(batch.row, sizes[batch.entries])
        assert used.max() <= width
        assert not left or used.min() + min(int(sizes[entry]) for entry in left) > width
    again = batches(sizes, budget, row_tokens)
    assert [b.entries.tolist() for b in again] == [b.entries.tolist() for b in found]


@given(sizes=lengths, row_tokens=st.none() | st.integers(1, 300))
def test_halves_of_batches_end_in_single_sequences(sizes, row_tokens):
    def split(batch):
        assert batch.row[0] == 0
        if len(batch) == 1:
            return [batch]
        first, second = batch.halves()
        np.testing.assert_array_equal(np.append(first.entries, second.entries), batch.entries)
        if batch.row[-1]:  # whole rows
            assert first.row[-1] + 1 + second.row[-1] + 1 == batch.row[-1] + 1
        return split(first) + split(second)

    for batch in batches(sizes, 1000, row_tokens):
        assert all(len(part) == 1 for part in split(batch))


def test_packing_takes_no_longer_for_a_budget_that_nothing_fills():
    [batch] = batches(np.array([3, 2, 4]), 2**62, 5)
    assert sorted(batch.entries.tolist()) == [0, 1, 2]
