import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.sources.table import SUFFIXES, TAR, read_samples
from semroute.schemas import InputError, fingerprint

TABLES = [suffix for suffix in SUFFIXES if suffix != TAR]
TEXTS = ["a red cup", 'a "quoted", odd\tcup', "tasse d'été ☕", "NA"]


def write(path: Path, texts: list[str], column: str = "text") -> str:
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pa.table({"other": [1] * len(texts), column: texts}), path)
        case ".jsonl":
            rows = [{"other": number, column: text} for number, text in enumerate(texts)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv" | ".tsv":
            mark = "," if path.suffix == ".csv" else "\t"
            quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
            path.write_text(f"other{mark}{column}\n" + "".join(f"1{mark}{q}\n" for q in quoted))
        case ".txt":
            path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("suffix", TABLES)
def test_every_format_gives_the_same_captions(tmp_path, suffix):
    samples = read_samples(write(tmp_path / f"c{suffix}", TEXTS), need="text")
    assert samples.texts().to_pylist() == [[text] for text in TEXTS]
    assert samples.identity().fingerprint == fingerprint([[text] for text in TEXTS])
    assert samples.image_names().to_pylist() == [None] * 4


def test_captions_with_line_breaks_survive_csv(tmp_path):
    path = write(tmp_path / "c.csv", ["one\nline break", "two"])
    assert read_samples(path, need="text").texts().to_pylist() == [["one\nline break"], ["two"]]


def test_txt_with_windows_line_ends_and_a_unicode_separator(tmp_path):
    (tmp_path / "c.txt").write_bytes("one\r\ntwo\u2028still two\r\n".encode())
    texts = read_samples(str(tmp_path / "c.txt"), need="text").texts().to_pylist()
    assert texts == [["one"], ["two\u2028still two"]]


def test_jsonl_whose_other_columns_change_their_type(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a", "tag": [["x", 1]]}\n{"tag": {"y": 2}, "prompt": "b"}\n')
    assert read_samples(str(path), need="text").texts().to_pylist() == [["a"], ["b"]]


def test_several_captions_a_row_and_urls(tmp_path):
    table = pa.table({"caption": [["a", "b"], ["c"]]})
    with fsspec.open("memory://captions.parquet", "wb") as file:
        pyarrow.parquet.write_table(table, file)
    samples = read_samples("memory://captions.parquet", need="text")
    assert samples.texts().to_pylist() == [["a", "b"], ["c"]]


def test_columns_are_found_by_name_or_by_default(tmp_path):
    path = write(tmp_path / "c.parquet", TEXTS, column="Prompt")
    assert len(read_samples(path, text_column="Prompt", need="text")) == 4
    with pytest.raises(InputError, match=r"no column 'text' or 'prompt' or 'caption'; its columns"):
        read_samples(path, need="text")
    with pytest.raises(InputError, match=r"no column 'nope'.*other, Prompt.*--text-column"):
        read_samples(path, text_column="nope", need="text")


def test_limit_takes_the_first_rows(tmp_path):
    samples = read_samples(write(tmp_path / "c.txt", TEXTS), limit=2, need="text")
    assert samples.texts().to_pylist() == [[text] for text in TEXTS[:2]]


@pytest.mark.parametrize("suffix", TABLES)
def test_an_empty_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty; expected at least one row"):
        read_samples(str(path), need="text")


def test_a_file_without_rows_is_refused(tmp_path):
    path = write(tmp_path / "c.parquet", [])
    with pytest.raises(InputError, match=r"has no rows|expected strings"):
        read_samples(path, need="text")


def test_nonsense_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_samples(str(tmp_path / "missing.parquet"), need="text")
    with pytest.raises(InputError, match=r"cannot tell the format from '\.xlsx'"):
        read_samples(str(tmp_path / "c.xlsx"), need="text")
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(InputError, match="not a readable parquet"):
        read_samples(str(tmp_path / "c.parquet"), need="text")
    (tmp_path / "c.jsonl").write_text("[1, 2]\n")
    with pytest.raises(InputError, match="must be an object"):
        read_samples(str(tmp_path / "c.jsonl"), need="text")
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="contains int64; expected strings"):
        read_samples(str(tmp_path / "n.parquet"), need="text")


@pytest.mark.parametrize("column", [["a", " ", None, "b"], [["a"], [], None, ["b", ""]]])
def test_empty_captions_are_counted_and_listed(tmp_path, column):
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    samples = read_samples(str(tmp_path / "c.parquet"), need="text")
    rows = "1, 2" if column[1] == " " else "1, 2, 3"
    with pytest.raises(InputError, match=rf"of 4 rows have an empty caption.*rows {rows}, counted"):
        samples.texts()


def test_images_come_from_bytes_structs_or_paths(tmp_path):
    (tmp_path / "one.png").write_bytes(b"first")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = pa.array([{"bytes": None, "path": "one.png"}, {"bytes": b"2", "path": "two"}], kind)
    for column, names, files in (
        (pa.array(["one.png", "one.png"]), ["one.png", "one.png"], [b"first", b"first"]),
        (pa.array([b"1", b"2"]), [None, None], [b"1", b"2"]),
        (structs, ["one.png", "two"], [b"first", b"2"]),
    ):
        pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "c.parquet")
        samples = read_samples(str(tmp_path / "c.parquet"), need="image")
        assert samples.image_names().to_pylist() == names
        assert list(samples.image_files()) == files
        assert samples.identity().fingerprint is None


def test_a_missing_image_is_named(tmp_path):
    pyarrow.parquet.write_table(pa.table({"image": ["gone.png", None]}), tmp_path / "c.parquet")
    samples = read_samples(str(tmp_path / "c.parquet"), need="image")
    reasons = [file.reason for file in samples.image_files()]
    assert reasons == ["no such file: gone.png", "the row names no image"]


def test_fingerprints_tell_apart_what_runs_together():
    assert fingerprint([["ab", "c"]]) != fingerprint([["a", "bc"]])
    assert fingerprint([["a"], ["b"]]) != fingerprint([["a", "b"]])


@given(st.lists(st.lists(st.text(max_size=5), max_size=3), max_size=9), st.integers(0, 3))
def test_fingerprints_of_arrow_are_those_of_python(rows, first):
    array = pa.array(rows, pa.list_(pa.large_string())).slice(first)
    assert fingerprint(array) == fingerprint(rows[first:])
    flat = [text for row in rows for text in row]
    chunks = pa.chunked_array([flat[:2], flat[2:]], pa.string())
    assert fingerprint(chunks) == fingerprint(flat)


def test_bytes_of_images_are_not_read_for_captions(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"x" * 99, "path": "one"}, {"bytes": b"y", "path": None}], kind)
    for column, names in ((images, ["one", None]), (pa.array([b"1", b"2"]), [None, None])):
        table = pa.table({"image": column, "text": ["a", "b"]})
        pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
        samples = read_samples(str(tmp_path / "c.parquet"), need="text")
        assert samples.image_names().to_pylist() == names
        assert samples.table.nbytes < 80
