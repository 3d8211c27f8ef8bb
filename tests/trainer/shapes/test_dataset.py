import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semroute.schemas import InputError
from semroute.trainer.shapes.dataset import read_scenes, write_world
from semroute.trainer.shapes.judge import judge


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "world"
    return out, write_world(out, 400, seed=3, num_test=60, num_dev=20, progress=False)


class TestWriteWorld:
    def test_counts_what_it_wrote(self, world):
        out, summary = world
        train, test = (pq.read_table(out / f"{name}.parquet") for name in ("train", "test"))
        assert train.num_rows == summary.num_train_images == 400
        assert len(set(train["text"].to_pylist())) == summary.num_train_captions == 100
        splits = Counter(test["split"].to_pylist())
        assert splits == {
            "test": summary.num_test_captions,
            "held-out": summary.num_held_out_captions,
        }
        assert splits["test"] == splits["held-out"] == 30
        assert set(train["split"].to_pylist()) == {"train"}
        dev = pq.read_table(out / "dev.parquet")
        assert dev["split"].to_pylist() == ["dev"] * summary.num_dev_captions == ["dev"] * 20
        assert sorted(path.stem for path in out.iterdir()) == ["dev", "test", "train"]

    def test_no_caption_is_in_two_files(self, world):
        out, _ = world
        train, dev, test = (
            set(pq.read_table(out / f"{name}.parquet")["text"].to_pylist())
            for name in ("train", "dev", "test")
        )
        assert len(test) == 60
        assert len(train | dev | test) == len(train) + len(dev) + len(test)

    def test_no_scene_is_in_two_files(self, world):
        out, _ = world
        train, dev, test = (
            {scene.content for scene in read_scenes(pq.read_table(out / f"{name}.parquet"))}
            for name in ("train", "dev", "test")
        )
        assert len(train | dev | test) == len(train) + len(dev) + len(test)

    def test_captions_alone_may_differ(self, tmp_path):
        """As in the first release: about half of the scenes come back in other words."""
        out = tmp_path / "world"
        write_world(out, 8000, seed=3, num_test=60, num_dev=20, by="caption", progress=False)
        train, test = (pq.read_table(out / f"{name}.parquet") for name in ("train", "test"))
        seen = {scene.content for scene in read_scenes(train)}
        again = sum(scene.content in seen for scene in read_scenes(test) if not scene.held_out)
        assert 5 < again < 25
        assert not {*train["text"].to_pylist()} & {*test["text"].to_pylist()}

    def test_images_captions_and_scenes_belong_together(self, world):
        out, _ = world
        for name in ("train", "dev", "test"):
            table = pq.read_table(out / f"{name}.parquet")
            rows = table.to_pylist()
            for index, (row, scene) in enumerate(zip(rows, read_scenes(table), strict=True)):
                image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
                assert row["image"]["path"] == f"{name}-{index:06d}.png"
                assert judge(image, scene)["all"]
                assert row["text"] in scene.captions()
                assert scene.held_out is (row["split"] == "held-out")

    def test_images_of_a_caption_differ(self, world):
        table = pq.read_table(world[0] / "train.parquet")
        images = {}
        for text, image in zip(*(table[c].to_pylist() for c in ("text", "image")), strict=True):
            images.setdefault(text, set()).add(image["bytes"])
        assert Counter(map(len, images.values())).most_common(1)[0][0] == 4

    def test_columns_are_those_of_hugging_face_images(self, world):
        schema = pq.read_schema(world[0] / "train.parquet")
        assert schema.names == ["text", "image", "scene", "split"]
        assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", "string")])
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"}

    def test_is_a_function_of_the_seed(self, world, tmp_path):
        write_world(tmp_path / "again", 400, seed=3, num_test=60, num_dev=20, progress=False)
        write_world(tmp_path / "other", 400, seed=4, num_test=60, num_dev=20, progress=False)
        for name in ("train.parquet", "test.parquet"):
            expected = (world[0] / name).read_bytes()
            assert (tmp_path / "again" / name).read_bytes() == expected
            assert (tmp_path / "other" / name).read_bytes() != expected

    def test_refuses_a_folder_that_holds_something(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="is not empty: name a new folder"):
            write_world(tmp_path, 4, seed=0, num_test=2, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_takes_an_empty_folder(self, tmp_path):
        (tmp_path / "world").mkdir()
        write_world(tmp_path / "world", 4, seed=0, num_test=2, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["world"]

    def test_leaves_nothing_behind_when_it_fails(self, tmp_path, monkeypatch):
        def fail(*_: object) -> None:
            raise OSError("no space")

        monkeypatch.setattr("semroute.trainer.shapes.dataset.pq.write_table", fail)
        with pytest.raises(OSError, match="no space"):
            write_world(tmp_path / "world", 4, seed=0, num_test=2, progress=False)
        assert not [*tmp_path.iterdir()]

    def test_refuses_more_captions_than_are_found_at_once(self, tmp_path):
        with pytest.raises(
            InputError, match=r"found 600,2\d\d different captions .* expected at most"
        ):
            write_world(tmp_path / "world", 4, seed=0, num_test=600_000, progress=False)
        assert not (tmp_path / "world").exists()

    @pytest.mark.parametrize(
        ("num", "num_test", "message"),
        [(10, 2, "not a positive multiple"), (0, 2, "not a positive mult"), (4, 3, "even number")],
    )
    def test_refuses_numbers_that_do_not_divide(self, tmp_path, num, num_test, message):
        with pytest.raises(InputError, match=message):
            write_world(tmp_path / "world", num, seed=0, num_test=num_test, progress=False)
