"""Rows of text are found again by value, whatever a pipeline did with them."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from semroute.schemas import InputError  # noqa: E402
from semroute.trainer.adapters.captures import Captures  # noqa: E402

WIDTH = 6


def tokens(num: int, layers: int, seed: int) -> torch.Tensor:
    return torch.randn(num, layers, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    layers=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_every_row_leads_to_its_token(
    lengths: list[int], layers: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    base = data.draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=3))
    captures = Captures(range(layers), base)
    calls = [tokens(num + 3, layers, seed) for seed, num in enumerate(lengths)]
    for call in calls:
        captures.add(call[:-3], call[-3:, base])
    # Any rows of any calls in any order: tokens, padding and zeros.
    choice = st.tuples(st.integers(0, len(calls) - 1), st.integers(0, 9))
    chosen = data.draw(st.lists(choice, min_size=2, max_size=24))
    chosen = chosen[: len(chosen) // 2 * 2]
    zeros = torch.zeros(len(base), WIDTH)
    rows = torch.stack(
        [calls[call][row, base] if row < len(calls[call]) else zeros for call, row in chosen]
    )
    hidden, numbers = captures.find(rows.to(dtype).unflatten(0, (2, -1)))
    assert numbers.shape == (2, len(chosen) // 2)
    for (call, row), number in zip(chosen, numbers.flatten().tolist(), strict=True):
        if row < lengths[call]:
            assert torch.equal(hidden[number], calls[call][row])
        else:
            assert number == len(hidden)
    assert len(hidden) <= sum(lengths)


class TestCaptures:
    def test_unknown_rows_are_counted(self) -> None:
        captures = Captures([1, 2], [2])
        call = tokens(4, 2, 0)
        captures.add(call, call[:0, 1:])
        rows = call[None, :, 1:].clone()
        rows[0, 1] += 1e-6
        rows[0, 3] *= 2
        with pytest.raises(InputError, match="2 of 4 rows of text"):
            captures.find(rows)

    def test_calls_that_were_read_last_are_kept(self) -> None:
        captures = Captures([1], [1], max_calls=3)
        calls = [tokens(2, 1, seed) for seed in range(4)]
        for call in calls[:3]:
            captures.add(call, call[:0])
        captures.find(calls[0][None])
        captures.add(calls[3], calls[3][:0])  # puts call 1 out
        for number in (0, 2, 3):
            captures.find(calls[number][None])
        with pytest.raises(InputError, match="2 of 2 rows"):
            captures.find(calls[1][None])

    def test_nothing_is_known_after_remove(self) -> None:
        captures = Captures([1], [1])
        call = tokens(2, 1, 0)
        captures.add(call, call[:0])
        captures.remove()
        with pytest.raises(InputError, match="2 of 2 rows"):
            captures.find(call[None])
