"""Rows without a caption and columns with weights, from the source to training."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

torch = pytest.importorskip("torch")

from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.extraction.latents import encode_images  # noqa: E402
from semroute.pipeline.store.documents import StoreError  # noqa: E402
from semroute.pipeline.store.order.dataset import select  # noqa: E402
from semroute.pipeline.store.verify import verify  # noqa: E402
from semroute.schemas import SelectionConfig  # noqa: E402


@pytest.fixture
def make(tiny_llm, tmp_path):
    """Extract columns of captions into a folder; returns the store."""

    def run(columns, **options):
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / "c.parquet")
        arguments = {"model": str(tiny_llm), "codec": "bf16", "workers": 0, "threads": 1}
        report = [].append
        return extract(
            str(tmp_path / "c.parquet"),
            tmp_path / "features",
            report=report,
            **arguments,
            **options,
        )

    return run


def captions_of(store):
    texts = store.captions["text"].to_pylist()
    return [[texts[i] for i in row] for row in store.samples["caption_ids"].to_pylist()]


def test_rows_left_out_are_listed_and_the_store_grows(make):
    store = make({"text": ["a cup", " ", "a dog"]}, blank="skip")
    assert captions_of(store) == [["a cup"], ["a dog"]]
    assert store.samples["source_row"].to_pylist() == [0, 2]
    assert store.manifest.identity.samples.blank == "skip"
    store = make({"text": ["a cup", " ", "a dog", None, "a hat"]}, blank="skip")
    assert store.samples["source_row"].to_pylist() == [0, 2, 4]
    assert not verify(store.path, progress=False).problems
    with pytest.raises(StoreError, match=r"--blank skip.*now it is --blank null"):
        make({"text": ["a cup", "a dog", "a hat", "x"]}, blank="null")


def test_growth_by_the_first_rows_without_a_caption(make):
    assert "source_row" not in make({"text": ["a cup"]}, blank="null").samples.column_names
    store = make({"text": ["a cup", "", "a dog"]}, blank="null")
    assert captions_of(store) == [["a cup"], [""], ["a dog"]]
    assert store.samples["caption_ids"].to_pylist()[1] == [0]  # the null caption
    assert store.samples["source_row"].to_pylist() == [0, 1, 2]
    assert not verify(store.path, progress=False).problems


def test_weights_of_columns_are_those_of_training(make, tmp_path):
    columns = {
        "caption": ["a cup", "a dog"],
        "tags": [["cup", "red"], None],
        "image": pa.array([bytes(2)] * 2),
    }
    store = make(columns, text_column=("caption=3", "tags=1"))
    assert store.samples["caption_weights"].to_pylist() == [[3.0, 0.5, 0.5], [3.0]]
    assert store.manifest.identity.samples.weights == (3.0, 1.0)
    latents = encode_images(
        _with_images(tmp_path, columns),
        tmp_path / "latents",
        workers=0,
        report=[].append,
        text_column=("caption=3", "tags=1"),
    )
    index = select(store, latents, SelectionConfig()).index
    np.testing.assert_array_equal(index.weights, [3, 0.5, 0.5, 3])
    index = select(store, latents, SelectionConfig(caption_weights=[1, 0, 1])).index
    np.testing.assert_array_equal(index.weights, [1, 1, 1])


def _with_images(tmp_path, columns):
    """The same table with images, in parts of one source."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    table = pa.table({**columns, "image": [file.getvalue()] * 2})
    for row in range(2):
        pyarrow.parquet.write_table(table.slice(row, 1), tmp_path / f"part-{row}.parquet")
    return str(tmp_path / "part-*.parquet")
