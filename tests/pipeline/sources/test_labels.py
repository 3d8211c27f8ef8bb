import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from semroute.pipeline.sources.labels import read_labels

TEXTS = [f"caption {number}" for number in range(40)]
KINDS = ["cat", "dog"] * 20


@pytest.mark.parametrize("size", [1, 2])
def test_captions_may_be_lists(tmp_path, size):
    lists = [TEXTS[first : first + size] for first in range(0, 40, size)]
    kinds = [["cat", "dog"][first >= 20] for first in range(0, 40, size)]
    pyarrow.parquet.write_table(pa.table({"text": lists, "kind": kinds}), tmp_path / "c.parquet")
    (label,), _ = read_labels(str(tmp_path / "c.parquet"), TEXTS)
    assert label.values.tolist() == [0] * 20 + [1] * 20


def test_labels_that_the_first_row_lacks(tmp_path):
    rows = [{"text": "other"}]
    rows += [
        {"text": text, "scene": {"kind": kind}} for text, kind in zip(TEXTS, KINDS, strict=True)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (label,), _ = read_labels(str(tmp_path / "c.jsonl"), TEXTS)
    assert (label.name, label.classes, len(label)) == ("scene.kind", ["cat", "dog"], 40)
