import io
import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semroute.schemas import InputError
from semroute.trainer.shapes import (
    BACKGROUND,
    CELL_PIXELS,
    COLOURS,
    GRID,
    HELD_OUT,
    IMAGE_PIXELS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    SKILLS,
    UNCLEAR,
    Detection,
    Object,
    Scene,
    judge,
    judge_cells,
    read_cells,
    read_image,
    read_scenes,
    render,
    sample_scene,
    write_world,
)

RED_STAR = Object("red", "star")
BLUE_CROSS = Object("blue", "cross")


def draw(num, seed, held_out=False):
    """Scenes and their true images."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out) for _ in range(num)]
    return scenes, np.stack([render(scene, rng) for scene in scenes])


def accuracy(images, scenes):
    """Skill -> share right."""
    right, asked = Counter(), Counter()
    for cells, scene in zip(read_cells(images), scenes, strict=True):
        skills = judge_cells(cells, scene)
        asked.update(list(skills))
        right.update(skill for skill, good in skills.items() if good)
    return {skill: right[skill] / asked[skill] for skill in SKILLS}


def noisy(images, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, 255 * sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def paint(*things):
    """An image of (colour, shape, size, row, column), through single-object renders."""
    image = np.empty((IMAGE_PIXELS, IMAGE_PIXELS, 3), np.uint8)
    image[:] = BACKGROUND
    for colour, shape, size, row, column in things:
        scene = Scene("single", (Object(colour, shape, size),))
        stamp = render(scene, np.random.default_rng(0))
        found = read_image(stamp)[0]
        source = window(stamp, found.row, found.column)
        window(image, row, column)[:] = source
    return image


def window(image, row, column):
    top, left = row * CELL_PIXELS, column * CELL_PIXELS
    return image[top : top + CELL_PIXELS, left : left + CELL_PIXELS]


class TestWorld:
    def test_every_two_objects_differ_in_at_least_three_pixels(self):
        things = list(itertools.product(COLOURS, SHAPES, SIZES))
        cells = [window(paint((*thing, 0, 0)), 0, 0).astype(int) for thing in things]
        cells.append(np.broadcast_to(BACKGROUND, cells[0].shape))
        for first, second in itertools.combinations(cells, 2):
            far = np.abs(first - second).max(-1) > 120
            assert far.sum() >= 3

    def test_neighbours_never_touch(self):
        for shape, size in itertools.product(SHAPES, SIZES):
            cell = window(paint(("white", shape, size, 1, 1)), 1, 1)
            assert (cell[-1] == BACKGROUND).all()
            assert (cell[:, -1] == BACKGROUND).all()

    def test_a_fifth_of_the_pairs_is_held_out_and_every_word_remains(self):
        assert len(HELD_OUT) == 6
        assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
        assert {shape for _, shape in HELD_OUT} == set(SHAPES)
        seen = set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
        assert min(Counter(shape for _, shape in seen).values()) >= 4


class TestScene:
    @pytest.mark.parametrize("held_out", [False, True])
    def test_held_out_pairs_are_where_they_belong(self, held_out):
        scenes, _ = draw(1000, 1, held_out)
        assert all(scene.held_out is held_out for scene in scenes)
        assert {scene.kind for scene in scenes} == set(KINDS)

    def test_every_seen_pair_number_relation_and_order_occurs(self):
        scenes, _ = draw(2000, 2)
        pairs = {thing.pair for scene in scenes for thing in scene.objects}
        assert len(pairs) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
        assert {s.objects[0].count for s in scenes if s.kind == "count"} == {1, 2, 3, 4, 5}
        assert {s.relation for s in scenes} == {None, *RELATIONS}
        assert {s.objects[0].size for s in scenes if s.kind == "size"} == set(SIZES)

    def test_the_held_out_pair_is_named_first_or_second(self):
        scenes, _ = draw(500, 3, held_out=True)
        slots = {s.objects[0].pair in HELD_OUT for s in scenes if len(s.objects) == 2}
        assert slots == {True, False}

    def test_survives_json(self):
        for scene in draw(200, 4)[0]:
            assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("single", (RED_STAR, BLUE_CROSS)), "has 1 entries in objects, found 2"),
            (("pair", (RED_STAR,)), "has 2 entries in objects, found 1"),
            (("pair", (RED_STAR, Object("red", "cross"))), "differ in colour and in shape"),
            (("single", (Object("red", "star", count=2),)), "only kind 'count'"),
            (("pair", (RED_STAR, BLUE_CROSS), "above"), "relation 'above' is unknown"),
            (("relation", (RED_STAR, BLUE_CROSS)), "relation None is unknown.*left of"),
            (("triple", (RED_STAR,)), "kind 'triple' is unknown.*single"),
        ],
    )
    def test_refuses_what_is_no_scene(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Scene(*arguments)

    def test_refuses_unknown_words(self):
        with pytest.raises(ValueError, match=r"colour 'pink' is unknown.*red"):
            Object("pink", "star")
        with pytest.raises(ValueError, match="count 6 is unknown"):
            Object("red", "star", count=6)

    def test_refuses_a_document_that_is_no_scene(self):
        with pytest.raises(ValueError, match=r"is not a scene.*expected kind, objects"):
            Scene.from_dict({"kind": "single"})


class TestCaptions:
    def test_say_everything_that_is_asked(self):
        for scene in draw(300, 5)[0]:
            for text in scene.captions():
                for thing in scene.objects:
                    assert thing.colour in text
                    assert thing.shape in text

    def test_scenes_that_differ_never_share_a_caption(self):
        owner = {}
        for scene in set(draw(2000, 6)[0]):
            for text in scene.captions():
                assert owner.setdefault(text, scene) == scene

    def test_have_several_phrasings_each_once(self):
        for scene in draw(300, 7)[0]:
            assert len(scene.captions()) == len(set(scene.captions())) >= 6

    def test_read_as_english(self):
        count = Scene("count", (Object("red", "cross", "big", 3),))
        assert "there are three large red crosses" in count.captions()
        assert "there is one red star" in Scene("count", (RED_STAR,)).captions()
        relation = Scene("relation", (RED_STAR, BLUE_CROSS), "left of")
        assert "a red star to the left of a blue cross" in relation.captions()
        size = Scene("size", (Object("red", "star", "big"), Object("blue", "cross", "small")))
        assert "a big red star and a small blue cross" in size.captions()

    def test_phrasing_is_a_function_of_the_generator(self):
        scene = Scene("pair", (RED_STAR, BLUE_CROSS))
        texts = [scene.caption(np.random.default_rng(seed)) for seed in range(40)]
        assert len(set(texts)) > 5
        assert texts[:5] == [scene.caption(np.random.default_rng(seed)) for seed in range(5)]


class TestJudge:
    @pytest.mark.parametrize("held_out", [False, True])
    @pytest.mark.parametrize(("sigma", "least"), [(0, 1.0), (0.1, 1.0), (0.2, 0.985)])
    def test_is_right_about_true_images(self, held_out, sigma, least):
        scenes, images = draw(1500, 8, held_out)
        scores = accuracy(noisy(images, sigma), scenes)
        assert min(scores.values()) >= least

    def test_sees_nothing_in_noise(self):
        scenes, images = draw(1000, 9)
        noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
        assert max(accuracy(noise, scenes).values()) <= 0.01

    def test_sees_nothing_in_blank_images(self):
        scenes, images = draw(1000, 9)
        for blank in (images * 0 + np.uint8(BACKGROUND[0]), images * 0, images * 0 + np.uint8(255)):
            assert max(accuracy(blank, scenes).values()) == 0

    @pytest.mark.parametrize("held_out", [False, True])
    def test_is_near_chance_on_wrong_captions(self, held_out):
        scenes, images = draw(2000, 10, held_out)
        scores = accuracy(np.roll(images, 1, axis=0), scenes)
        assert scores.pop("total") < 0.6  # most scenes have one or two objects
        assert 0.15 < scores.pop("count") < 0.25
        assert max(scores.values()) < 0.1

    def test_skills_follow_the_kind(self):
        scenes, images = draw(300, 11)
        always = {"colour", "shape", "total", "all"}
        extra = {
            "single": set(),
            "count": {"count"},
            "pair": {"binding"},
            "relation": {"binding", "relation"},
            "size": {"binding", "size"},
        }
        for scene, image in zip(scenes, images, strict=True):
            sized = {"size"} if scene.objects[0].size else set()
            assert set(judge(image, scene)) == always | extra[scene.kind] | sized

    def test_tells_binding_from_colour_and_shape(self):
        scene = Scene("pair", (RED_STAR, BLUE_CROSS))
        swapped = paint(("red", "cross", "big", 0, 0), ("blue", "star", "big", 2, 2))
        expected = {"colour": True, "shape": True, "binding": False, "total": True, "all": False}
        assert judge(swapped, scene) == expected

    def test_counts_whatever_the_objects_are(self):
        scene = Scene("count", (Object("red", "star", count=2),))
        image = paint(("red", "star", "big", 0, 0), ("white", "moon", "big", 0, 2))
        expected = {"count": True, "colour": False, "shape": False, "total": True, "all": False}
        assert judge(image, scene) == expected

    def test_one_object_too_many_spoils_count_total_and_all(self):
        scene = Scene("count", (Object("red", "star", count=1),))
        image = paint(("red", "star", "big", 0, 0), ("red", "star", "big", 0, 2))
        expected = {"count": False, "colour": True, "shape": True, "total": False, "all": False}
        assert judge(image, scene) == expected

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_tells_each_relation_from_the_others(self, relation):
        drawn = Scene("relation", (RED_STAR, BLUE_CROSS), relation)
        for seed in range(30):
            image = render(drawn, np.random.default_rng(seed))
            for asked in RELATIONS:
                scene = Scene("relation", (RED_STAR, BLUE_CROSS), asked)
                assert judge(image, scene)["relation"] is (asked == relation)

    def test_a_diagonal_is_no_relation(self):
        image = paint(("red", "star", "big", 0, 0), ("blue", "cross", "big", 1, 1))
        for relation in RELATIONS:
            scene = Scene("relation", (RED_STAR, BLUE_CROSS), relation)
            skills = judge(image, scene)
            assert skills["binding"]
            assert not skills["relation"]
            assert not skills["all"]

    def test_size_belongs_to_its_object(self):
        scene = Scene("size", (Object("red", "star", "big"), Object("blue", "cross", "small")))
        right = paint(("red", "star", "big", 0, 0), ("blue", "cross", "small", 1, 1))
        wrong = paint(("red", "star", "small", 0, 0), ("blue", "cross", "big", 1, 1))
        assert judge(right, scene)["size"]
        assert judge(right, scene)["all"]
        assert not judge(wrong, scene)["size"]
        assert judge(wrong, scene)["binding"]

    def test_what_is_no_object_is_found_but_is_nothing(self):
        image = paint(("red", "star", "big", 0, 0))
        window(image, 2, 1)[:, :3] = (255, 140, 0)
        assert read_image(image) == [
            Detection("red", "star", "big", 0, 0),
            Detection(None, None, None, 2, 1),
        ]
        assert read_cells(image[None])[0, 2, 1] == UNCLEAR
        skills = judge(image, Scene("single", (RED_STAR,)))
        assert not skills["total"]
        assert not skills["all"]

    def test_reads_every_object_everywhere(self):
        cells = list(itertools.product(range(GRID), repeat=2))
        things = list(itertools.product(COLOURS, SHAPES, SIZES))
        for index, thing in enumerate(things):
            place = cells[index % len(cells)]
            assert read_image(paint((*thing, *place))) == [Detection(*thing, *place)]

    @pytest.mark.parametrize("shape", [(2, 18, 18), (2, 3, 18, 18), (2, 32, 32, 3)])
    def test_refuses_other_images(self, shape):
        with pytest.raises(InputError, match=r"expected uint8 \[N, 18, 18, 3\]"):
            read_cells(np.zeros(shape, np.uint8))

    def test_refuses_floats(self):
        with pytest.raises(InputError, match="found images float32"):
            read_cells(np.zeros((1, 18, 18, 3), np.float32))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "world"
    return out, write_world(out, 400, seed=3, num_test=60, progress=False)


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
        assert sorted(path.name for path in out.iterdir()) == ["test.parquet", "train.parquet"]

    def test_no_test_caption_is_in_train(self, world):
        out, _ = world
        train, test = (
            set(pq.read_table(out / f"{name}.parquet")["text"].to_pylist())
            for name in ("train", "test")
        )
        assert len(test) == 60
        assert not train & test

    def test_images_captions_and_scenes_belong_together(self, world):
        out, _ = world
        for name in ("train", "test"):
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
        write_world(tmp_path / "again", 400, seed=3, num_test=60, progress=False)
        write_world(tmp_path / "other", 400, seed=4, num_test=60, progress=False)
        for name in ("train.parquet", "test.parquet"):
            expected = (world[0] / name).read_bytes()
            assert (tmp_path / "again" / name).read_bytes() == expected
            assert (tmp_path / "other" / name).read_bytes() != expected

    def test_refuses_a_folder_that_holds_something(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="is not empty: choose another folder or delete it"):
            write_world(tmp_path, 4, seed=0, num_test=2, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_takes_an_empty_folder(self, tmp_path):
        (tmp_path / "world").mkdir()
        write_world(tmp_path / "world", 4, seed=0, num_test=2, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["world"]

    def test_leaves_nothing_behind_when_it_fails(self, tmp_path):
        (tmp_path / "world").symlink_to(tmp_path / "nowhere")  # a folder cannot be renamed onto it
        with pytest.raises(NotADirectoryError):
            write_world(tmp_path / "world", 4, seed=0, num_test=2, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["world"]

    def test_says_when_the_world_is_exhausted(self, tmp_path):
        with pytest.raises(InputError, match=r"found only \d+ new captions with held-out pairs"):
            write_world(tmp_path / "world", 4, seed=0, num_test=100_000, progress=False)
        assert not (tmp_path / "world").exists()

    @pytest.mark.parametrize(
        ("num", "num_test", "message"),
        [(10, 2, "not a positive multiple"), (0, 2, "not a positive mult"), (4, 3, "even number")],
    )
    def test_refuses_numbers_that_do_not_divide(self, tmp_path, num, num_test, message):
        with pytest.raises(InputError, match=message):
            write_world(tmp_path / "world", num, seed=0, num_test=num_test, progress=False)
