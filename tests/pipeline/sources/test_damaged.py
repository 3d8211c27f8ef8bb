"""Files of captions that are damaged, or that say two things: one message, or what was meant."""

import io
import json
import os
import random
import tarfile

import pyarrow as pa
import pyarrow.ipc
import pytest

from semroute.pipeline.sources.prompts import read_prompts
from semroute.pipeline.sources.table import read_samples
from semroute.schemas import InputError

DEEP = "[" * 100_000


def read(path, column=None):
    table = read_samples(str(path), text_column=column, need="text", blank="skip")
    return table.texts().to_pylist()


def refused(path, column=None):
    with pytest.raises(InputError) as error:
        read(path, column)
    return str(error.value)


def write_arrow(path, table):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'{{"text": "a", "x": {DEEP}'),
        ("a.json", f'[{{"text": "a", "x": {DEEP}'),
        ("folder/state.json", DEEP),
    ],
)
def test_json_that_is_nested_too_deep(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    if path.parent != tmp_path:
        (path.parent / "dataset_info.json").write_text("{}")
        path = path.parent
    assert "nested too deep" in refused(path)


def test_prompts_that_are_nested_too_deep(tmp_path):
    for text in (DEEP, '{"a": ' * 50_000, f"[{'9' * 5000}]"):
        (tmp_path / "prompts.json").write_text(text)
        with pytest.raises(InputError, match=r"prompts\.json is not a readable json file"):
            read_prompts(str(tmp_path / "prompts.json"))


@pytest.mark.parametrize(
    "state",
    [
        *("{}", "[]", "null", '{"_data_files": 3}', '{"_data_files": []}'),
        *('{"_data_files": ["a.arrow"]}', '{"_data_files": [{"filename": 1}]}'),
        *('{"_data_files": [{"filename": "../a.arrow"}]}', '{"_data_files": [{"file'),
    ],
)
def test_a_dataset_whose_state_is_damaged(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert "state.json is damaged: " in refused(tmp_path)


@pytest.mark.parametrize("value", [None, True, 1.0, [1], {"a": 1}])
@pytest.mark.parametrize("key", ["id", "image_id"])
def test_ids_of_coco_are_numbers_or_texts(tmp_path, key, value):
    document = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}
    place = document["images" if key == "id" else "annotations"][0]
    place[key] = value
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert f"a.json: {key} {value!r} of COCO" in refused(tmp_path / "a.json", "caption")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ('{"y": {"t": "x", "t": "z"}}', "y.t"),
        ('{"y": [{"t": "x"}, {"t": "x", "t": "z"}]}', "y.t"),
        ('{"y": {"u": {"t": "x"}, "u": {"t": "z"}}}', "y.u.t"),
        ('{"y.z": {"t": "x", "t": "z"}}', "y.z.t"),
    ],
)
def test_a_key_inside_another_that_is_there_twice(tmp_path, text, column):
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.json").write_text(f"[{text}]")
    write_tar(tmp_path / "a.tar", {"0.json": text.encode(), "0.txt": b"x"})
    for suffix in ("jsonl", "json", "tar"):
        message = refused(tmp_path / f"a.{suffix}", column)
        assert "twice; expected it once" in message, suffix
        assert "row 0 (counted from 0)" in message, suffix


def test_a_null_that_lies_over_texts_is_null(tmp_path):
    """As in lists of a fixed size, which have a place for every value."""
    structs = pa.StructArray.from_arrays([pa.array(["a", "b", "c"])], ["t"])
    offsets, mask = pa.array([0, 1, 2, 3]), pa.array([False, True, False])
    columns = {
        "fixed": pa.array([["a"], None, ["c"]], pa.list_(pa.string(), 1)),
        "lists": pa.ListArray.from_arrays(offsets, pa.array(["a", "b", "c"]), mask=mask),
        "structs": pa.ListArray.from_arrays(offsets, structs, mask=mask),
    }
    path = write_arrow(tmp_path / "a.arrow", pa.table(columns))
    for column in ("fixed", "lists", "structs.t"):
        assert read(path, column) == [["a"], ["c"]], column


def test_arrow_whose_offsets_lead_outside(tmp_path):
    """A file of Arrow holds offsets as they lie in memory: unchecked they end the process."""
    table = pa.table(
        {
            "text": ["a cat", "b" * 40, None, "d"] * 8,
            "lists": [["x", "y"], ["z"], [], None] * 8,
            "parts": [{"t": "u"}, None, {"t": "v"}, {"t": None}] * 8,
            "views": pa.array(["a", "b" * 30, "c", "d"] * 8, pa.string_view()),
            "codes": pa.array(["q", "r", "q", "r"] * 8).dictionary_encode(),
        }
    )
    whole = write_arrow(tmp_path / "a.arrow", table).read_bytes()
    rng, num_refused = random.Random(3), 0
    for number in range(150):
        content = bytearray(whole)
        place = rng.randrange(0, len(content) - 4, 4)
        content[place : place + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"))
        path = tmp_path / f"{number}.arrow"  # each is mapped
        path.write_bytes(content)
        column = ("text", "lists", "parts.t", "views", "codes")[number % 5]
        try:
            read(path, column)
        except (InputError, OSError):
            num_refused += 1
    assert 20 < num_refused < 150


@pytest.mark.parametrize("place", ["folder", "table", "pattern"])
def test_names_that_are_not_utf_8(tmp_path, place):
    """As of files from systems that wrote Latin-1; Parquet and JSON cannot hold them."""
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    for suffix, content in ((b".txt", b"a"), (b".csv", b"text\na\n"), (b".png", b"")):
        with open(name + suffix, "wb") as file:
            file.write(content)
    table = os.fsdecode(name + b".csv")
    source = {"folder": str(tmp_path), "table": table, "pattern": f"{tmp_path}/*.csv"}[place]
    assert r"caf\udce9." in (message := refused(source))
    assert "its name is not UTF-8, so it cannot be recorded; rename it" in message


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "txt"])
def test_an_empty_line_of_one_column_is_a_row_without_a_caption(tmp_path, suffix, end):
    lines = ["text", "a", "", "b", "", "", "c", "", ""]
    lines = lines[1:] if suffix == "txt" else lines
    path = tmp_path / f"a.{suffix}"
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())
    with pytest.raises(InputError, match=r"3 of 6 rows have an empty .*rows 1, 3, 4, counted"):
        read_samples(str(path), need="text")
    table = read_samples(str(path), need="text", blank="skip")
    assert table.texts().to_pylist() == [["a"], ["b"], ["c"]]
    assert table.blank_rows.tolist() == [1, 3, 4]


def test_empty_lines_around_rows_are_none(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\n\ntext\n"a\n\nb"\nc\n\n')
    (tmp_path / "b.csv").write_bytes(b"text,image\na,b\n\nc,d\n")
    (tmp_path / "c.csv").write_bytes(b"text\n\n\n")
    assert read(tmp_path / "a.csv") == [["a\n\nb"], ["c"]]
    assert read(tmp_path / "b.csv") == [["a"], ["c"]]
    assert refused(tmp_path / "c.csv").endswith("has no rows; expected at least one")


class TestTars:
    def test_names_that_are_not_utf_8_are_shown(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", {"caf\udce9.txt": b"a", "caf\udce9.png": b"b"})
        table = read_samples(str(path), need="image")
        assert table.image_names().to_pylist() == [f"{path}/caf\\udce9.png"]
        assert [*table.image_files()] == [b"b"]

    def test_a_second_name_of_a_file_is_the_file(self, tmp_path):
        again = {"b.txt": (tarfile.LNKTYPE, "a.txt"), "c.txt": (tarfile.LNKTYPE, "b.txt")}
        path = write_tar(tmp_path / "a.tar", {"a.txt": b"one", **again, "d.txt": b"two"})
        assert read(path) == [["one"], ["one"], ["one"], ["two"]]

    @pytest.mark.parametrize(
        "member",
        [
            *((tarfile.SYMTYPE, "a.txt"), (tarfile.LNKTYPE, "z.txt"), (tarfile.FIFOTYPE, "")),
            *((tarfile.CHRTYPE, ""), (tarfile.LNKTYPE, "../a.txt")),
        ],
    )
    def test_no_sample_is_left_out_without_a_word(self, tmp_path, member):
        path = write_tar(tmp_path / "a.tar", {"a.txt": b"one", "b.txt": member})
        assert "a.tar: b.txt is a link, pipe or device; expected whole files" in refused(path)

    def test_files_with_holes(self, tmp_path):
        info = tarfile.TarInfo("a.txt")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"00000001000\0" + b"00000001000\0"  # a hole, then the bytes
        header[483:495] = b"00000002000\0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(header + b"x" * 512 + bytes(1024))
        assert "a.txt is a file with holes" in refused(tmp_path / "a.tar")

    @pytest.mark.parametrize(
        "record", [b"size=99999999999999999999\n", b"GNU.sparse.map=1\n", b"size=-512\n"]
    )
    def test_numbers_that_lead_outside(self, tmp_path, record):
        for length in (len(record) + 3, 10**30):
            content = b"%d %s" % (length, record)
            extended, info = tarfile.TarInfo("x"), tarfile.TarInfo("a.txt")
            extended.type, extended.size, info.size = b"x", len(content), 3
            header = extended.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0")
            rest = info.tobuf(tarfile.USTAR_FORMAT) + b"one".ljust(512, b"\0") + bytes(1024)
            (tmp_path / "a.tar").write_bytes(header + rest)
            assert "a.tar" in refused(tmp_path / "a.tar")

    @pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
    @pytest.mark.parametrize("name", ["a.txt", "none"])
    def test_a_file_of_fewer_than_no_bytes(self, tmp_path, name, size):
        """By its size the next header would be this one again."""
        info = tarfile.TarInfo(name)
        info.size = size
        header = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(header + bytes(1024))
        assert f"a.tar is damaged: {name} has {size:,} bytes" in refused(tmp_path / "a.tar")
