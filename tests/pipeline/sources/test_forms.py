"""Each form in which people bring captions and images, made as its tools write it."""

import gzip
import io
import json
import re
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image

from semroute.pipeline.sources.labels import read_labels
from semroute.pipeline.sources.table import column_names, read_samples
from semroute.schemas import InputError, fingerprint


def png(value, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, kind)
    return file.getvalue()


def files(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def texts(source, **options):
    return read_samples(str(source), need="text", **options).texts().to_pylist()


def images(source, **options):
    samples = read_samples(str(source), need="image", **options)
    return samples, [*samples.image_files()]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestFolders:
    @pytest.mark.parametrize("suffix", ["txt", "caption", "json"])
    def test_images_with_captions_beside_them(self, tmp_path, suffix):
        text = {"txt": "{}\n", "caption": "{}", "json": '{{"caption": "{}", "tags": ["x"]}}'}[
            suffix
        ]
        pairs = [("b/2.PNG", png(2)), ("a.jpg", png(1, "JPEG")), ("b/10.x.png", png(3))]
        beside = {f"{name.rpartition('.')[0]}.{suffix}": text.format(name) for name, _ in pairs}
        folder = files(tmp_path / "photos", {**dict(pairs), **beside, "README.md": "about"})
        assert texts(folder) == [["a.jpg"], ["b/10.x.png"], ["b/2.PNG"]]
        samples, found = images(folder)
        assert found == [png(1, "JPEG"), png(3), png(2)]
        assert samples.image_names().to_pylist() == ["a.jpg", "b/10.x.png", "b/2.PNG"]
        assert samples.identity().fingerprint == fingerprint(
            [["a.jpg"], ["b/10.x.png"], ["b/2.PNG"]]
        )
        column = "txt" if suffix == "txt" else "caption"
        assert f"3 images with .{suffix} files beside them" in samples.describe()
        assert f"captions from '{column}'" in samples.describe()

    def test_captions_in_two_kinds_of_files_are_a_question(self, tmp_path):
        folder = files(tmp_path, {"1.png": png(1), "1.txt": "a", "1.caption": "b"})
        with pytest.raises(InputError, match=r"'txt' and 'caption'; name .* with --text-column"):
            texts(folder)
        assert texts(folder, text_column="caption") == [["b"]]

    def test_files_of_img2dataset(self, tmp_path):
        contents = {}
        for number in (0, 2):
            name = f"00000/0000000{number:02d}"
            record = {"caption": f"c{number}", "url": "u", "status": "success", "exif": "{}"}
            contents |= {f"{name}.jpg": png(number, "JPEG"), f"{name}.txt": f"c{number}"}
            contents[f"{name}.json"] = json.dumps(record)
        folder = files(tmp_path, {**contents, "00000_stats.json": "{}"})
        failed = pa.table({"caption": ["c0", "c1", "c2"], "error_message": pa.nulls(3)})
        pyarrow.parquet.write_table(failed, tmp_path / "00000.parquet")
        assert texts(folder) == texts(folder, text_column="caption") == [["c0"], ["c2"]]
        assert len(images(folder)[1]) == 2
        assert texts(tmp_path / "*.parquet") == [["c0"], ["c1"], ["c2"]]

    @pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
    def test_imagefolder_of_the_datasets_library(self, tmp_path, suffix):
        rows = [{"file_name": f"./{n} x.png", "text": f"t{n}"} for n in (2, 1)]
        files(tmp_path / "train", {"1 x.png": png(1), "2 x.png": png(2)})
        path = tmp_path / f"train/metadata.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        elif suffix == "csv":
            path.write_text(
                "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows)
            )
        else:
            path.write_text(lines(rows))
        for source in (tmp_path, tmp_path / "train", path):
            assert texts(source) == [["t2"], ["t1"]]
            samples, found = images(source)
            assert found == [png(2), png(1)]
            assert samples.image_column == "file_name"
        (tmp_path / "train/metadata.csv").write_text("file_name,text\n")
        (tmp_path / "train/metadata.jsonl").write_text("{}\n")
        with pytest.raises(InputError, match=r"metadata of several kinds.*metadata\.jsonl"):
            texts(tmp_path)

    def test_metadata_in_several_folders(self, tmp_path):
        files(tmp_path, {"a/1.png": png(1), "b/1.png": png(2)})
        for name in "ab":
            (tmp_path / name / "metadata.jsonl").write_text(lines([{"file_name": "1.png"}]))
        assert images(tmp_path)[1] == [png(1), png(2)]

    def test_a_dataset_saved_to_disk(self, tmp_path):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]  # order of state.json
        for number, name in enumerate(names):
            image = pa.array([{"bytes": png(number), "path": f"{number}.png"}], kind)
            table = pa.table({"image": image, "text": [f"t{number}"]})
            (tmp_path / "train").mkdir(exist_ok=True)
            path = str(tmp_path / "train" / name)
            with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
        state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
        files(tmp_path / "train", {"state.json": json.dumps(state), "dataset_info.json": "{}"})
        assert texts(tmp_path / "train") == [["t0"], ["t1"]]
        samples, found = images(tmp_path / "train")
        assert found == [png(0), png(1)]
        assert samples.image_names().to_pylist() == ["0.png", "1.png"]
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
        with pytest.raises(InputError, match=r"holds the splits train; name one, such as .*/train"):
            texts(tmp_path)

    def test_tables_of_a_folder_but_not_of_several_splits(self, tmp_path):
        for name in ("train-00001-of-00002", "train-00000-of-00002"):
            path = tmp_path / "data" / f"{name}.parquet"
            path.parent.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(pa.table({"text": [name]}), path)
        files(tmp_path, {"README.md": "card", "dataset_infos.json": "{}", ".cache/x.csv": "text\n"})
        assert texts(tmp_path) == [["train-00000-of-00002"], ["train-00001-of-00002"]]
        pyarrow.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "data/test-0.parquet")
        with pytest.raises(InputError, match=r"several splits.*test-0\.parquet.*train-00000"):
            texts(tmp_path)
        assert len(texts(tmp_path / "data" / "train-*")) == 2
        (tmp_path / "more.csv").write_text("text\na\n")
        with pytest.raises(InputError, match=r"tables of several kinds.*parquet.*more\.csv"):
            texts(tmp_path)

    def test_folders_that_hold_nothing(self, tmp_path):
        with pytest.raises(InputError, match=r"neither images nor tables; found no files"):
            texts(tmp_path)
        files(tmp_path, {"a.doc": "x"})
        with pytest.raises(InputError, match=r"found \.doc, expected images or one of"):
            texts(tmp_path)
        files(tmp_path, {"a.png": png(1)})
        assert images(tmp_path)[1] == [png(1)]
        with pytest.raises(InputError, match=r"has no column 'text'.*its columns are image\."):
            texts(tmp_path)

    def test_tars_of_img2dataset_and_the_lists_beside_them(self, tmp_path):
        for number in range(2):
            stem = tmp_path / f"{number:05d}"
            pyarrow.parquet.write_table(
                pa.table({"caption": [f"c{number}", "not downloaded"], "status": ["success", "x"]}),
                f"{stem}.parquet",
            )
            members = {f"{number}.jpg": png(number, "JPEG"), f"{number}.txt": b"c%d" % number}
            with tarfile.open(f"{stem}.tar", "w") as tar:
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            (tmp_path / f"{number:05d}_stats.json").write_text('{"successes": 1}')
        assert texts(tmp_path) == [["c0"], ["c1"]]
        assert images(tmp_path)[1] == [png(0, "JPEG"), png(1, "JPEG")]
        pyarrow.parquet.write_table(pa.table({"caption": ["x"]}), tmp_path / "more.parquet")
        with pytest.raises(InputError, match=r"several kinds.*00000\.tar.*more\.parquet"):
            texts(tmp_path)


class TestSeveralFiles:
    def test_order(self, tmp_path):
        for name in ("b", "a", "c", "10"):
            (tmp_path / f"{name}.csv").write_text(f"text\n{name}\n")
        at = str(tmp_path)
        assert texts(f"{at}/b.csv::{at}/a.csv") == [["b"], ["a"]]
        assert texts(f"{at}/{{c,b}}.csv::{at}/1*.csv") == [["c"], ["b"], ["10"]]
        assert texts(f"{at}/*.csv") == texts(tmp_path) == [["10"], ["a"], ["b"], ["c"]]
        assert texts(f"{at}/*.csv", limit=2) == [["10"], ["a"]]
        (tmp_path / "[x]*.csv").write_text("text\nliteral\n")
        assert texts(f"{at}/[x]*.csv") == [["literal"]]

    def test_other_kinds_and_columns_are_refused(self, tmp_path):
        files(tmp_path, {"a.csv": "text\na\n", "b.tsv": "text\na\n", "c.csv": "caption\na\n"})
        with pytest.raises(InputError, match=r"several kinds: \.csv, \.tsv"):
            texts(f"{tmp_path}/a.csv::{tmp_path}/b.tsv")
        with pytest.raises(InputError, match=r"c\.csv .*'text'"):
            texts(f"{tmp_path}/a.csv::{tmp_path}/c.csv")
        for name, value in (("d", ["x"]), ("e", [["x"]])):
            pyarrow.parquet.write_table(pa.table({"text": value}), tmp_path / f"{name}.parquet")
        with pytest.raises(InputError, match="columns differ between its files"):
            texts(tmp_path / "*.parquet")

    def test_types_that_differ_only_in_width_join(self, tmp_path):
        kinds = (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
        for number, kind in enumerate(kinds):
            table = pa.table({"text": pa.array(["x"]).cast(kind)})
            pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
        assert texts(tmp_path) == [["x"]] * 3

    def test_a_data_set_of_the_hub(self):
        table = pa.table({"caption": ["a"]})
        with fsspec.open("memory://datasets/me/set/data/train-0.parquet", "wb") as file:
            pyarrow.parquet.write_table(table, file)
        with fsspec.open("memory://datasets/me/set/README.md", "wb") as file:
            file.write(b"card")

        class Hub(type(fsspec.filesystem("memory"))):
            protocol = "hf"

            @classmethod
            def _strip_protocol(cls, path):
                return super()._strip_protocol(path.replace("hf://", "memory://"))

            def unstrip_protocol(self, name):
                return f"hf://{name.lstrip('/')}"

        fsspec.register_implementation("hf", Hub, clobber=True)
        assert (
            texts("hf://datasets/me/set") == texts("hf://datasets/me/set/data/*.parquet") == [["a"]]
        )


class TestDocuments:
    def test_lists_of_objects(self, tmp_path):
        rows = [{"text": "a", "n": 1}, {"n": "x", "text": "b"}]
        for name, document in (("a", rows), ("b", {"items": rows}), ("c", {"v": 1, "data": rows})):
            (tmp_path / f"{name}.json").write_text(json.dumps(document))
            assert texts(tmp_path / f"{name}.json") == [["a"], ["b"]]
        (tmp_path / "x.jsonlines").write_text(lines(rows))
        assert texts(tmp_path / "x.jsonlines") == [["a"], ["b"]]
        assert column_names(str(tmp_path / "a.json")) == ["text", "n"]

    def test_the_only_list_and_lists_per_column(self, tmp_path):
        rows = [{"filename": "a.jpg", "sentences": [{"raw": "x"}, {"raw": "y"}]}]
        path = tmp_path / "split.json"
        path.write_text(json.dumps({"images": rows, "dataset": "d"}))
        assert texts(path, text_column="sentences.raw") == [["x", "y"]]
        path.write_text(json.dumps({"urls": ["u", "v"], "captions": ["x", "y"]}))
        assert texts(path, text_column="captions") == [["x"], ["y"]]
        assert column_names(str(path)) == ["urls", "captions"]
        path.write_text('{"urls": ["u"], "captions": ["x", "y"]}')
        with pytest.raises(InputError, match="different lengths: 'urls' has 1, 'captions' has 2"):
            texts(path, text_column="captions")
        path.write_text('{"urls": ["u"], "urls": ["v"]}')
        with pytest.raises(InputError, match="the key 'urls' twice"):
            texts(path, text_column="urls")

    @pytest.mark.parametrize("suffix", ["tsv", "csv"])
    def test_a_table_without_a_header(self, tmp_path, suffix):
        rows = ["https://x.test/1.jpg,one", "https://x.test/2.jpg,two", 'https://x.test/3.jpg,3" x']
        path = tmp_path / f"set.{suffix}"
        path.write_text("\n".join(rows).replace(",", "\t" if suffix == "tsv" else ","))
        with pytest.raises(InputError, match="may be in: column_1, column_2"):
            texts(path)
        assert texts(path, text_column="column_2") == [["one"], ["two"], ['3" x']]
        samples = read_samples(str(path), need="image", image_column="column_1")
        assert samples.image_names().to_pylist() == [row.split(",")[0] for row in rows]

    def test_metadata_of_kohya(self, tmp_path):
        files(tmp_path, {"a/1.png": png(1), "2.webp": png(2, "WEBP")})
        document = {
            "a\\1.png": {"caption": "one", "train_resolution": [4, 4]},
            "2": {"tags": "two"},
        }
        path = tmp_path / "meta.json"
        path.write_text(json.dumps(document))
        with pytest.raises(InputError, match=r"1 of 2 rows have an empty caption.*rows 1"):
            texts(path)
        assert texts(path, fallback_column="tags") == [["one"], ["two"]]
        samples, found = images(path, fallback_column="tags")
        assert samples.image_column == "image_path"
        assert found == [png(1), png(2, "WEBP")]

    def test_captions_of_coco_are_joined_to_images(self, tmp_path):
        files(tmp_path / "val2014", {"a.jpg": png(1, "JPEG"), "b.jpg": png(2, "JPEG")})
        document = {
            "info": {},
            "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 5, "file_name": "a.jpg"}],
            "annotations": [
                {"image_id": 5, "id": 0, "caption": "x"},
                {"image_id": 7, "id": 1, "caption": "y"},
                {"image_id": 5, "id": 2, "caption": "z"},
            ],
        }
        path = tmp_path / "captions_val2014.json"
        path.write_text(json.dumps(document))
        assert texts(path) == [["y"], ["x", "z"]]
        _, found = images(path, image_folder=str(tmp_path / "val2014"))
        assert found == [png(2, "JPEG"), png(1, "JPEG")]
        document["annotations"][0]["image_id"] = 6
        path.write_text(json.dumps(document))
        with pytest.raises(InputError, match=r"1 of its annotations' image_id are no id.*6"):
            texts(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("[1]", r"row 0 \(counted from 0\) is 1; expected an object"),
            ('{"a": 1}', "'a' is 1; expected an object per image"),
            ('{"a": {}, "a": {}}', "has the key 'a' twice"),
            ('"a"', "expected a list or an object"),
            ("{", "not a readable json file"),
            (b"\xff", "is not UTF-8"),
        ],
    )
    def test_other_documents_are_refused(self, tmp_path, content, message):
        with pytest.raises(InputError, match=message):
            texts(f"{files(tmp_path, {'c.json': content})}/c.json")


COMPRESS = {"gz": gzip.compress, "zst": zstandard.compress}


class TestCompressed:
    @pytest.mark.parametrize("how", COMPRESS)
    def test_every_text_format(self, tmp_path, how):
        contents = {
            "a.jsonl": '{"text": "a"}\n{"text": "b"}\n',
            "b.json": '[{"text": "a"}, {"text": "b"}]',
            "c.csv": 'text\n"a"\nb\n',
            "d.tsv": "text\na\nb\n",
            "e.txt": "a\nb\n",
            "f.jsonlines": '{"text": "a"}\n{"text": "b"}\n',
        }
        for name, content in contents.items():
            path = tmp_path / f"{name}.{how}"
            whole = COMPRESS[how](content.encode())
            path.write_bytes(whole)
            assert texts(path) == [["a"], ["b"]]
            path.write_bytes(
                COMPRESS[how](content[:7].encode()) + COMPRESS[how](content[7:].encode())
            )
            assert texts(path) == [["a"], ["b"]]  # several streams in a file are one
            for bad in (whole[:-3], b"no archive"):
                path.write_bytes(bad)
                with pytest.raises(InputError, match="is damaged or truncated"):
                    texts(path)
        with pytest.raises(InputError, match=r"cannot tell the format from '\.parquet\.gz'"):
            texts(tmp_path / "c.parquet.gz")


class TestColumns:
    def test_further_names_of_images(self, tmp_path):
        path = tmp_path / "c.parquet"
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": png(1), "path": "x"}], kind)
        for name in ("image", "jpg", "png", "file_name", "image_path", "image_binary"):
            pyarrow.parquet.write_table(pa.table({name: column, "TEXT": ["a"]}), path)
            samples, found = images(path)
            assert (samples.image_column, found) == (name, [png(1)])
            # As in early versions, whose stores are resumed: only a new column has company.
            assert samples.text_column == (None if name == "image" else "TEXT")
        assert texts(path) == [["a"]]
        pyarrow.parquet.write_table(pa.table({"jpg": column, "png": column}), path)
        with pytest.raises(InputError, match=r"'jpg' and 'png'; name .* --image-column"):
            images(path)

    def test_rarer_names_of_images_and_urls(self, tmp_path):
        files(tmp_path, {"1.png": png(1)})
        path = tmp_path / "rows.jsonl"
        path.write_text(
            lines([{"img_path": "1.png", "prompt": "a", "url": "https://x.test/1.png"}])
        )
        samples, found = images(path)
        assert samples.image_column == "img_path"
        assert found == [png(1)]
        path.write_text(lines([{"img_path": "1.png", "file_name": "none.png", "prompt": "a"}]))
        assert images(path)[0].image_column == "file_name"
        path.write_text(lines([{"URL": "https://x.test/1.png", "TEXT": "a", "WIDTH": 4}]))
        with pytest.raises(InputError, match=r"Images may be in: URL\. Name one with"):
            images(path)

    def test_places_in_lists(self, tmp_path):
        ask, tell = {"by": "user", "value": "?"}, {"by": "model", "value": "one"}
        two = {"by": "model", "value": "two"}
        talks = [[ask, tell], [ask], None, [ask, two, ask]]
        rows = [{"id": name, "talk": talk} for name, talk in zip("xyzw", talks, strict=True)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        kind = pa.struct([("by", pa.string()), ("value", pa.string())])
        schema = pa.schema([("id", pa.string()), ("talk", pa.large_list(kind))])
        part = pa.Table.from_pylist([{}, *rows], schema).slice(1)
        path = str(tmp_path / "rows.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as out:
            out.write_table(part)
        for suffix in ("json", "parquet", "arrow"):
            path = tmp_path / f"rows.{suffix}"
            found = texts(path, text_column="talk.1.value", fallback_column="id")
            assert found == [["one"], ["y"], ["z"], ["two"]]
            assert texts(path, text_column="talk.0.by", blank="skip") == [["user"]] * 3
            with pytest.raises(InputError, match="4 of 4 rows have an empty caption"):
                texts(path, text_column=f"talk.{10**30}.value")
            with pytest.raises(InputError, match=r"no column 'talk\.1\.other'"):
                texts(path, text_column="talk.1.other")
        twice = '[{"a": [{"b": "x", "b": "y"}, {"b": "z"}]}]'
        (tmp_path / "rows.json").write_text(twice)
        assert texts(tmp_path / "rows.json", text_column="a.1.b") == [["z"]]
        with pytest.raises(InputError, match="the key 'b' twice"):
            texts(tmp_path / "rows.json", text_column="a.0.b")

    def test_captions_inside_structs_and_objects(self, tmp_path):
        rows = [
            {"i18n": {"en": {"p": "a", "q": 1}}, "turns": [{"v": "x"}, {"v": "y"}]},
            {"i18n": {"en": {"p": "b", "q": 2}}, "turns": [{"v": "z"}]},
        ]
        (tmp_path / "c.jsonl").write_text(lines(rows))
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
        for name in ("c.jsonl", "c.parquet"):
            path = tmp_path / name
            assert texts(path, text_column="i18n.en.p") == [["a"], ["b"]]
            assert texts(path, text_column="turns.v") == [["x", "y"], ["z"]]
            with pytest.raises(InputError, match=r"may be in: i18n\.en\.p, turns\.v\. Name one"):
                texts(path)
            with pytest.raises(InputError, match=r"no column 'i18n\.fr'"):
                texts(path, text_column="i18n.fr")
        (tmp_path / "d.jsonl").write_text('{"a.b": "whole", "a": {"b": "part"}}\n')
        assert texts(tmp_path / "d.jsonl", text_column="a.b") == [["whole"]]

    def test_several_columns_with_weights(self, tmp_path):
        path = tmp_path / "c.parquet"
        columns = {"caption": ["a", None, "c"], "tags": [["x", "y"], ["z"], [" "]]}
        pyarrow.parquet.write_table(pa.table(columns), path)
        both = ("caption=1", "tags=0.3")
        samples = read_samples(str(path), text_column=both, need="text")
        assert samples.texts().to_pylist() == [["a", "x", "y"], ["z"], ["c"]]
        weights = samples.extra_columns()["weights"].to_pylist()
        assert weights == [[1.0, 0.15, 0.15], [0.3], [1.0]]
        assert samples.identity().weights == (1.0, 0.3)
        assert "'caption' (weight 1) and 'tags' (weight 0.3)" in samples.describe()
        equal = read_samples(str(path), text_column=("tags", "caption"), need="text")
        assert equal.texts().to_pylist() == [["x", "y", "a"], ["z"], ["c"]]
        assert equal.extra_columns() == {}
        assert equal.identity().weights is None
        for wrong, message in (
            (("caption=x", "tags"), "'x' is no number"),
            (("caption=0", "tags"), "expected a weight above 0"),
            (("caption", "caption=2"), "expected each column once"),
            (("caption", "other=1"), "no column 'other'"),
        ):
            with pytest.raises(InputError, match=message):
                texts(path, text_column=wrong)
        pyarrow.parquet.write_table(pa.table({"a=1": ["x"]}), path)
        assert texts(path, text_column="a=1") == [["x"]]

    def test_what_was_chosen_is_told(self, tmp_path):
        path = tmp_path / "c.csv"
        path.write_text("text,caption,image\na,b,c\n")
        told = read_samples(str(path), need="text").describe()
        assert "1 csv file, 1 samples; captions from 'text' (not from 'caption')" in told


class TestBlank:
    COLUMN = (["a"], [], None, ["", "b"], [" "], ["c"])

    def write(self, tmp_path, column=None):
        path = tmp_path / "c.parquet"
        pyarrow.parquet.write_table(pa.table({"text": column or [*self.COLUMN]}), path)
        return str(path)

    def test_left_out(self, tmp_path):
        samples = read_samples(self.write(tmp_path), blank="skip", need="text")
        assert samples.texts().to_pylist() == [["a"], ["b"], ["c"]]
        assert samples.extra_columns()["row"].to_pylist() == [0, 3, 5]
        assert samples.identity().blank == "skip"
        assert "3 rows without a caption are left out (rows 1, 2, 4," in samples.describe()
        with pytest.raises(InputError, match="no row has a caption in column 'text'"):
            texts(self.write(tmp_path, [[""]]), blank="skip")

    def test_as_the_null_caption(self, tmp_path):
        samples = read_samples(self.write(tmp_path), blank="null", need="text")
        assert samples.texts().to_pylist() == [["a"], [""], [""], ["b"], [""], ["c"]]
        assert samples.identity().blank == "null"
        assert "3 rows without a caption are stored as the null caption" in samples.describe()

    def test_none_of_them_changes_nothing_but_the_identity(self, tmp_path):
        path = self.write(tmp_path, [["a"], ["b"]])
        plain = read_samples(path, need="text")
        assert set(plain.identity().model_dump()) == {"num_samples", "fingerprint"}
        for blank in ("skip", "null"):
            other = read_samples(path, blank=blank, need="text")
            assert other.table.equals(plain.table)


class TestEmbedded:
    @pytest.mark.parametrize("as_struct", [True, False])
    def test_images_are_read_in_any_order_and_not_held(self, tmp_path, as_struct):
        contents = [bytes([n]) * 1000 for n in range(200)]
        for first in (0, 100):
            part = contents[first : first + 100]
            column = [{"bytes": c, "path": None} for c in part] if as_struct else part
            path = tmp_path / f"{first:03d}.parquet"
            pyarrow.parquet.write_table(pa.table({"image": column}), path, row_group_size=40)
        samples = read_samples(str(tmp_path), need="image")
        assert samples.table.nbytes < 10_000
        assert [*samples.image_files()] == contents
        rows = np.random.default_rng(0).permutation(200)[:50]
        assert [*samples.take(rows).image_files()] == [contents[row] for row in rows]
        assert [*samples.slice(90, 110).image_files()] == contents[90:110]


def test_labels_of_json_and_several_files(tmp_path):
    for number in range(2):
        rows = [{"text": f"{number} {n}", "kind": "ab"[n % 2]} for n in range(20)]
        (tmp_path / f"{number}.json").write_text(json.dumps(rows))
    captions = [f"{number} {n}" for number in range(2) for n in range(20)]
    (label,), _ = read_labels(f"{tmp_path}/*.json", captions)
    assert (label.name, label.classes, len(label)) == ("kind", ["a", "b"], 40)
    with pytest.raises(InputError, match=re.escape("not from tars or folders")):
        read_labels(files(tmp_path / "i", {"1.png": png(1), "1.txt": "a"}), captions)
