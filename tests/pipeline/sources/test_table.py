import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.sources.places import SUFFIXES, TAR
from semroute.pipeline.sources.table import column_names, read_samples, read_table
from semroute.schemas import InputError, fingerprint

TABLES = [suffix for suffix in SUFFIXES if suffix != TAR]
FIRST_WITH_VIEWS = 21
"""Version of Arrow that writes views of strings to Parquet."""
TEXTS = ["a red cup", 'a "quoted", odd\tcup', "tasse d'été ☕", "NA"]


def write(path: Path, texts: list[str], column: str = "text") -> str:
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(pa.table({"other": [1] * len(texts), column: texts}), path)
        case ".jsonl":
            rows = [{"other": number, column: text} for number, text in enumerate(texts)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps([{"other": 1, column: text} for text in texts]))
        case ".arrow":
            table = pa.table({"other": [1] * len(texts), column: texts})
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        case ".csv":
            quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
            path.write_text(f"other,{column}\n" + "".join(f"1,{q}\n" for q in quoted))
        case ".tsv":
            path.write_text(f"other\t{column}\n" + "".join(f"1\t{text}\n" for text in texts))
        case ".txt":
            path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("suffix", TABLES)
def test_every_format_gives_the_same_captions(tmp_path, suffix):
    texts = [text.replace("\t", " ") for text in TEXTS] if suffix == ".tsv" else TEXTS
    samples = read_samples(write(tmp_path / f"c{suffix}", texts), need="text")
    assert samples.texts().to_pylist() == [[text] for text in texts]
    assert samples.identity().fingerprint == fingerprint([[text] for text in texts])
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
    with pytest.raises(
        InputError,
        match=r"no column 'text' or .* or 'TEXT'; its columns are other, Pro.*may be in: Prompt\.",
    ):
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
    rows = "1, 2" if column[1] == " " else "1, 2, 3"
    with pytest.raises(InputError, match=rf"of 4 rows have an empty caption.*rows {rows}, counted"):
        read_samples(str(tmp_path / "c.parquet"), need="text")


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


def test_captions_are_held_once(tmp_path):
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "c.parquet")
    samples = read_samples(str(tmp_path / "c.parquet"), need="text")
    asked = [samples.texts().values.buffers()[2].address for _ in range(2)]
    (chunk,) = samples.table["text"].chunks
    assert asked == [chunk.values.buffers()[2].address] * 2


def captions(path, content=None):
    """Captions of a file, written first if its content is given."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_samples(str(path), need="text").texts().to_pylist()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_line_ends_and_a_byte_order_mark_are_no_part_of_captions(tmp_path, end, bom, last):
    rows = {
        "c.txt": ["a cat", " a dog "],
        "c.csv": ["text,other", "a cat,1", " a dog ,2"],
        "c.tsv": ["text\tother", "a cat\t1", " a dog \t2"],
        "c.jsonl": ['{"text": "a cat"}', '{"text": " a dog "}'],
    }
    for name, lines in rows.items():
        content = bom + (end.join(lines) + end * last).encode()
        assert captions(tmp_path / name, content) == [["a cat"], [" a dog "]], name


def test_quoted_values_of_csv_keep_their_line_ends(tmp_path):
    content = 'text,other\r\n"a cat\r\n",1\r\n"\ra dog",2\r\n'
    assert captions(tmp_path / "c.csv", content) == [["a cat\r\n"], ["\ra dog"]]


@pytest.mark.parametrize("text", ['"open', 'shut"', '"both"', 'a "" b', '5" pipe', "'"])
def test_quotes_in_tsv_are_characters(tmp_path, text):
    content = f"other\ttext\n1\t{text}\n2\ta dog\n3\t{text}\n"
    assert captions(tmp_path / "c.tsv", content) == [[text], ["a dog"], [text]]
    assert captions(tmp_path / "one.tsv", f"text\n{text}\na dog\n") == [[text], ["a dog"]]


@pytest.mark.parametrize("content", ['text\na\n"b\nc\nd\n', 'other,text\n1,a\n2,"b\n3,c\n4,d'])
def test_a_quote_of_csv_that_is_never_closed_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"c\.csv: row 1 \(counted from 0\) opens a quote that"):
        captions(tmp_path / "c.csv", content)


def test_a_quote_inside_an_unquoted_value_of_csv_is_a_character(tmp_path):
    assert captions(tmp_path / "c.csv", 'text\n5" pipe\na dog\n') == [['5" pipe'], ["a dog"]]


def test_two_columns_of_one_name_are_refused(tmp_path):
    twice = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    table = pa.Table.from_arrays(twice, ["text", "text", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "c.csv").write_text("text,text,prompt\na,b,c\n")
    (tmp_path / "c.tsv").write_text("text\ttext\tprompt\na\tb\tc\n")
    for name in ("c.parquet", "c.csv", "c.tsv"):
        path = str(tmp_path / name)
        with pytest.raises(InputError, match="has 2 columns of the name 'text', expected one"):
            read_samples(path, need="text")
        with pytest.raises(InputError, match="has 2 columns of the name 'text', expected one"):
            read_table(path, "prompt")
        other = read_samples(path, text_column="prompt", need="text")
        assert other.texts().to_pylist() == [["c"]]
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\): .* has the key 'text'"):
        captions(tmp_path / "c.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n')


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".txt"])
def test_rows_of_any_size(tmp_path, suffix, first):
    large, small = ["a cat", "x" * 3_000_000], ["a dog", "y"]
    rows = [large, small, small] if first else [small, small, large]
    match suffix:
        case ".jsonl":
            lines = [json.dumps({"text": text, "other": other}) for text, other in rows]
        case ".txt":
            lines = [text + other for text, other in rows]
        case _:
            mark = "," if suffix == ".csv" else "\t"
            lines = [mark.join(row) for row in [["text", "other"], *rows]]
    texts = captions(tmp_path / f"c{suffix}", "\n".join(lines))
    assert texts == [[t + o] if suffix == ".txt" else [t] for t, o in rows]


def test_a_large_row_after_many_small_ones(tmp_path):
    """With one thread Arrow 18 waited for itself, in one of some tens of attempts."""
    num = pa.cpu_count()
    pa.set_cpu_count(1)
    try:
        texts = ["a cat in the snow"] * 100_000 + ["x" * 3_000_000, "a dog"]
        content = "text,other\n" + "".join(f"{text},seen from far above\n" for text in texts)
        for number in range(8):
            assert captions(tmp_path / f"{number}.csv", content) == [[text] for text in texts]
    finally:
        pa.set_cpu_count(num)


def test_types_come_from_all_rows(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [
        {"text": [], "size": 1, "scene": {"a": 1}},
        {"size": 1.5, "scene": {"b": "x"}, "text": ["a", "b"], "late": "here"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert column_names(str(path)) == ["text", "size", "scene", "late"]
    assert read_table(str(path))[1].to_pylist() == [
        {"text": [], "size": 1.0, "scene": {"a": 1, "b": None}, "late": None},
        {"text": ["a", "b"], "size": 1.5, "scene": {"a": None, "b": "x"}, "late": "here"},
    ]
    for empty in ('{"text": null}', '{"other": 1}', '{"text": []}'):
        good = '["a"]' if "[" in empty else '"a"'
        with pytest.raises(InputError, match=r"1 of 2 rows have an empty caption.*rows 0, counted"):
            captions(path, f'{empty}\n{{"text": {good}}}\n')
    with pytest.raises(InputError, match="2 of 2 rows have an empty caption"):
        captions(path, '{"text": null}\n{"text": null}\n')


@pytest.mark.parametrize("other", ["1", "true", '["a"]', '{"a": 1}'])
def test_a_value_of_another_type_is_named(tmp_path, other):
    content = f'{{"text": null}}\n{{"text": "a"}}\n{{"text": {other}}}\n'
    with pytest.raises(InputError, match=r"c\.jsonl: row 2 \(counted.*: 'text' is .* like \"a\""):
        captions(tmp_path / "c.jsonl", content)


@pytest.mark.parametrize("bad", [b"caf\xe9", b"\xed\xa0\xbd", b"\xff\xfe"])
def test_bytes_that_are_not_utf8_name_file_and_row(tmp_path, bad):
    contents = {
        "c.txt": b"a\n" + bad + b"\n",
        "c.csv": b"text\na\n" + bad + b"\n",
        "c.tsv": b"other\ttext\n1\ta\n2\t" + bad + b"\n",
        "c.jsonl": b'{"text": "a"}\n\n{"text": "' + bad + b'"}\n',
    }
    offsets = pa.array([0, 1, 1 + len(bad)], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a" + bad)])
    for name, each in (
        ("c.parquet", column),
        ("lists.parquet", pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), column)),
    ):
        pyarrow.parquet.write_table(pa.table({"text": each}), tmp_path / name)
        contents[name] = (tmp_path / name).read_bytes()
    for name, content in contents.items():
        with pytest.raises(InputError, match=rf"{name}: row 1 \(counted from 0\).* is not UTF-8"):
            captions(tmp_path / name, content)


@pytest.mark.parametrize("value", ['"a \\ud83d"', '["a", "\\ude00 b"]'])
def test_half_a_surrogate_pair_is_named(tmp_path, value):
    content = f'{{"text": null}}\n{{"text": {value}}}\n'
    with pytest.raises(InputError, match=r"row 1 \(counted from 0\): 'text' has half a surrogate"):
        captions(tmp_path / "c.jsonl", content)
    whole = '{"text": "\\ud83d\\ude00"}\n'
    assert captions(tmp_path / "c.jsonl", whole) == [["\U0001f600"]]


def test_columns_of_other_arrow_types_are_read(tmp_path):
    texts = pa.array(["a cat", "a dog", "a cat"])
    pairs = pa.array([["a", "b"], ["c", "d"], ["e", "f"]])
    offsets = pa.array([0, 1, 2, 3], pa.int32())
    views = [texts.cast(pa.string_view()), pairs.cast(pa.list_(pa.string_view()))]
    if int(pa.__version__.partition(".")[0]) < FIRST_WITH_VIEWS:
        views = []
    for column in (
        texts.dictionary_encode(),
        pairs.cast(pa.list_(pa.string(), 2)),
        pa.ListArray.from_arrays(offsets, texts.dictionary_encode()),
        *views,
    ):
        pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
        rows = [row if isinstance(row, list) else [row] for row in column.to_pylist()]
        assert captions(tmp_path / "c.parquet") == rows
    for column in (texts.dictionary_encode(), *views[:1]):
        pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "c.parquet")
        images = read_samples(str(tmp_path / "c.parquet"), need="image")
        assert images.image_names().to_pylist() == texts.to_pylist()
