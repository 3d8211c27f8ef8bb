import pyarrow as pa
import pytest

from semroute.pipeline.store.order.filters import parse_filter
from semroute.schemas import InputError

TABLE = pa.table(
    {
        "n": [1, 2, 3, 4, None],
        "m": [4.0, 3.0, 2.0, 1.0, 0.0],
        "s": ["cat", "dog", "a cat", None, "bird"],
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("n <= 2", [0, 1]),
        ("1 < n <= 3", [1, 2]),
        ("n > 1 and m > 1", [1, 2]),
        ("n == 1 or s == 'bird'", [0, 4]),
        ("not n == 1 and n < 10", [1, 2, 3]),
        ("n + m * 2 > 8", [0]),
        ("-n < -3", [3]),
        ("s in ['cat', 'dog']", [0, 1]),
        ("s not in ('cat', 'dog') and s is not None", [2, 4]),
        ("n is None", [4]),
        ("match_substring(s, pattern='cat')", [0, 2]),
        ("utf8_length(s) == 3 and n != 1", [1]),
        ("n / m < 1", [0, 1]),
    ],
)
def test_rows_that_pass(text, rows):
    expression, _ = parse_filter(text)
    table = TABLE.append_column("row", pa.array(range(5)))
    assert table.filter(expression)["row"].to_pylist() == rows


def test_columns_are_named():
    assert parse_filter("utf8_length(s) > n and 1 < n")[1] == {"s", "n"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n <=", "is not understood"),
        ("1 < 2", "uses no column"),
        ("n.real > 1", r"'n\.real' is not a comparison"),
        ("__import__('os').system('x')", "is not a comparison"),
        ("open(n)", "calls open, which is not a scalar function"),
        ("sum(n) > 1", "calls sum, which is not a scalar function"),
        ("n ** 2 > 1", r"has an operator that Arrow does not have \(Pow\)"),
        ("n is 3", "only None may follow is"),
        ("match_substring(s, patern='x')", "cannot be called"),
        ("3 in n", "is not an Arrow expression"),
        ("lambda: n", "is not a comparison"),
    ],
)
def test_what_is_not_understood_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_filter(text)
