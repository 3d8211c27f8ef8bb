import itertools
import json
from collections import Counter

import numpy as np
import pytest

from semroute.schemas import InputError
from semroute.trainer.shapes.images import BACKGROUND, CELL_PIXELS, GRID, IMAGE_PIXELS, render
from semroute.trainer.shapes.judge import EMPTY, SKILLS, UNCLEAR, judge, judge_cells, read_cells
from semroute.trainer.shapes.scenes import (
    COLOURS,
    HELD_OUT,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    sample_scene,
    split_of,
)

RED_STAR = Object("red", "star")
BLUE_CROSS = Object("blue", "cross")
DIRECTIONS = ("left of", "right of", "above", "below")
DISTANCES = ("next to", "far from")
THINGS = list(itertools.product(COLOURS, SHAPES, SIZES))
"""All objects, by their codes."""


def random_scenes(num, seed, held_out=False):
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
        *_, from_row, from_column = things_in(stamp)[0]
        source = window(stamp, from_row, from_column)
        window(image, row, column)[:] = source
    return image


def things_in(image):
    """(colour, shape, size, row, column) of everything in an image, row by row; the first three are
    None where something is no object."""
    cells = read_cells(image[None])[0]
    return [
        (*(THINGS[code] if code >= 0 else (None, None, None)), *cell)
        for cell, code in np.ndenumerate(cells)
        if code != EMPTY
    ]


def window(image, row, column):
    top, left = row * CELL_PIXELS, column * CELL_PIXELS
    return image[top : top + CELL_PIXELS, left : left + CELL_PIXELS]


class TestWorld:
    def test_every_two_objects_differ_in_at_least_three_pixels(self):
        things = list(itertools.product(COLOURS, SHAPES, SIZES))
        cells = [window(paint((*thing, 0, 0)), 0, 0).astype(int) for thing in things]
        cells.append(np.broadcast_to(BACKGROUND, cells[0].shape))
        for first, second in itertools.combinations(cells, 2):
            far = np.linalg.norm(first - second, axis=-1) > 120
            assert far.sum() >= 3

    def test_neighbours_never_touch(self):
        for shape, size in itertools.product(SHAPES, SIZES):
            cell = window(paint(("white", shape, size, 1, 1)), 1, 1)
            assert (cell[-1] == BACKGROUND).all()
            assert (cell[:, -1] == BACKGROUND).all()

    def test_a_quarter_of_the_pairs_is_held_out_and_every_word_remains(self):
        assert Counter(colour for colour, _ in HELD_OUT) == dict.fromkeys(COLOURS, 2)
        assert Counter(shape for _, shape in HELD_OUT) == dict.fromkeys(SHAPES, 2)
        seen = set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
        assert set(Counter(shape for _, shape in seen).values()) == {6}


class TestScene:
    @pytest.mark.parametrize("held_out", [False, True])
    def test_held_out_pairs_are_where_they_belong(self, held_out):
        scenes, _ = random_scenes(1000, 1, held_out)
        assert all(scene.held_out is held_out for scene in scenes)
        assert {scene.kind for scene in scenes} == set(KINDS)

    def test_every_seen_pair_number_relation_and_order_occurs(self):
        scenes, _ = random_scenes(2000, 2)
        pairs = {thing.pair for scene in scenes for thing in scene.objects}
        assert len(pairs) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
        assert {s.objects[0].count for s in scenes if s.kind == "count"} == {1, 2, 3, 4, 5}
        groups = {thing.count for s in scenes if s.kind == "groups" for thing in s.objects}
        assert groups == {1, 2, 3, 4}
        assert {s.relation for s in scenes} == {None, *RELATIONS}
        assert {s.objects[0].size for s in scenes if s.kind == "size"} == set(SIZES)

    def test_the_held_out_pair_is_named_first_or_second(self):
        scenes, _ = random_scenes(500, 3, held_out=True)
        slots = {s.objects[0].pair in HELD_OUT for s in scenes if len(s.objects) == 2}
        assert slots == {True, False}

    def test_survives_json(self):
        for scene in random_scenes(200, 4)[0]:
            assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("single", (RED_STAR, BLUE_CROSS)), "has 1 entries in objects, found 2"),
            (("pair", (RED_STAR,)), "has 2 entries in objects, found 1"),
            (("pair", (RED_STAR, Object("red", "cross"))), "differ in colour and in shape"),
            (("single", (Object("red", "star", count=2),)), "only kinds 'count' and 'groups'"),
            (("pair", (RED_STAR, BLUE_CROSS), "above"), "relation 'above' is unknown"),
            (("relation", (RED_STAR, BLUE_CROSS)), "relation None is unknown.*left of"),
            (("groups", (RED_STAR, BLUE_CROSS)), r"one above 1, found \[1, 1\]"),
            (("groups", (RED_STAR, Object("blue", "cross", count=5))), "groups are of up to 4"),
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


class TestContent:
    def test_is_equal_where_the_same_images_are_right(self):
        """Of random pairs of scenes with the same objects, whatever is said first."""
        rng = np.random.default_rng(0)
        for scene in random_scenes(200, seed=5)[0]:
            if len(scene.objects) < 2:
                continue
            relations = [None] if scene.relation is None else [*RELATIONS]
            for relation in relations:
                other = Scene(scene.kind, scene.objects[::-1], relation)
                images = [render(scene, rng) for _ in range(4)]
                alike = all(judge(image, other)["all"] for image in images)
                images = [render(other, rng) for _ in range(4)]
                alike = alike and all(judge(image, scene)["all"] for image in images)
                assert (scene.content == other.content) is alike, (scene, other)

    def test_says_all_that_a_scene_asks_for(self):
        contents = {}
        for scene in random_scenes(3000, seed=1)[0]:
            contents.setdefault(scene.content, []).append(scene)
        for scenes in contents.values():
            assert len({(scene.kind, frozenset(scene.objects)) for scene in scenes}) == 1

    def test_every_split_has_scenes_of_every_kind(self):
        rng = np.random.default_rng(0)
        scenes = [sample_scene(rng, False) for _ in range(4000)]
        kinds = Counter((split_of(scene), scene.kind) for scene in scenes)
        for kind, share in KINDS.items():
            for split, part in (("train", 0.7), ("test", 0.2), ("dev", 0.1)):
                assert 0.5 < kinds[split, kind] / (4000 * share * part) < 1.6, (split, kind)


class TestCaptions:
    def test_say_everything_that_is_asked(self):
        for scene in random_scenes(300, 5)[0]:
            for text in scene.captions():
                for thing in scene.objects:
                    assert any(word in text for word in COLOURS[thing.colour])
                    assert any(word in text for word in SHAPES[thing.shape])

    def test_scenes_that_differ_never_share_a_caption(self):
        owner = {}
        for scene in set(random_scenes(2000, 6)[0]):
            for text in scene.captions():
                assert owner.setdefault(text, scene) == scene

    def test_have_several_phrasings_each_once(self):
        for scene in random_scenes(300, 7)[0]:
            assert len(scene.captions()) == len(set(scene.captions())) >= 6

    def test_read_as_english(self):
        count = Scene("count", (Object("red", "cross", "big", 3),))
        assert "there are three large crimson crosses" in count.captions()
        assert "a trio of big red plus signs" in count.captions()
        assert "there is one red star" in Scene("count", (RED_STAR,)).captions()
        assert "a single star" not in " ".join(Scene("single", (RED_STAR,)).captions())
        arch = Scene("single", (Object("cyan", "arch"),))
        assert "we see an arch that is turquoise" in arch.captions()
        assert "this image shows a turquoise gateway" in arch.captions()
        groups = Scene("groups", (Object("red", "arch", count=2), BLUE_CROSS))
        assert "two arches that are red together with a single blue plus sign" in groups.captions()
        pair = Scene("pair", (RED_STAR, BLUE_CROSS))
        assert "a star and a cross, red and blue respectively" in pair.captions()
        relation = Scene("relation", (RED_STAR, BLUE_CROSS), "left of")
        assert "a red star to the left of a blue cross" in relation.captions()
        assert "a blue cross with a red star to its left" in relation.captions()
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
        scenes, images = random_scenes(1500, 8, held_out)
        scores = accuracy(noisy(images, sigma), scenes)
        assert min(scores.values()) >= least

    def test_sees_nothing_in_noise(self):
        scenes, images = random_scenes(1000, 9)
        noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
        assert max(accuracy(noise, scenes).values()) <= 0.01

    def test_sees_nothing_in_blank_images(self):
        scenes, images = random_scenes(1000, 9)
        for blank in (images * 0 + np.uint8(BACKGROUND[0]), images * 0, images * 0 + np.uint8(255)):
            assert max(accuracy(blank, scenes).values()) == 0

    @pytest.mark.parametrize("held_out", [False, True])
    def test_is_near_chance_on_wrong_captions(self, held_out):
        scenes, images = random_scenes(2000, 10, held_out)
        scores = accuracy(np.roll(images, 1, axis=0), scenes)
        assert scores.pop("total") < 0.6  # most scenes have one or two objects
        assert 0.15 < scores.pop("count") < 0.25
        assert max(scores.values()) < 0.1

    def test_skills_follow_the_kind(self):
        scenes, images = random_scenes(300, 11)
        always = {"colour", "shape", "total", "all"}
        extra = {
            "single": set(),
            "count": {"count"},
            "pair": {"binding"},
            "relation": {"binding", "relation"},
            "size": {"binding", "size"},
            "groups": {"binding", "groups"},
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

    @pytest.mark.parametrize("family", [DIRECTIONS, DISTANCES])
    def test_tells_each_relation_from_its_opposites(self, family):
        for relation in family:
            shown = Scene("relation", (RED_STAR, BLUE_CROSS), relation)
            for seed in range(30):
                image = render(shown, np.random.default_rng(seed))
                for asked in family:
                    scene = Scene("relation", (RED_STAR, BLUE_CROSS), asked)
                    assert judge(image, scene)["relation"] is (asked == relation)

    def test_groups_are_of_the_number_asked_each(self):
        scene = Scene("groups", (Object("red", "star", count=2), BLUE_CROSS))
        stars = [("red", "star", "big", 0, column) for column in range(2)]
        crosses = [("blue", "cross", "small", 2, column) for column in range(2)]
        right = judge(paint(*stars, crosses[0]), scene)
        assert right["groups"]
        assert right["all"]
        swapped = judge(paint(stars[0], *crosses), scene)
        assert swapped["total"]
        assert swapped["binding"]
        assert not swapped["groups"]
        assert not swapped["all"]

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
        assert things_in(image) == [
            ("red", "star", "big", 0, 0),
            (None, None, None, 2, 1),
        ]
        assert read_cells(image[None])[0, 2, 1] == UNCLEAR
        skills = judge(image, Scene("single", (RED_STAR,)))
        assert not skills["total"]
        assert not skills["all"]

    def test_reads_every_object_everywhere(self):
        cells = list(itertools.product(range(GRID), repeat=2))
        for index, thing in enumerate(THINGS):
            cell = cells[index % len(cells)]
            assert things_in(paint((*thing, *cell))) == [(*thing, *cell)]

    @pytest.mark.parametrize("shape", [(2, 18, 18), (2, 3, 18, 18), (2, 32, 32, 3)])
    def test_refuses_other_images(self, shape):
        with pytest.raises(InputError, match=r"expected uint8 \[N, 18, 18, 3\]"):
            read_cells(np.zeros(shape, np.uint8))

    def test_refuses_floats(self):
        with pytest.raises(InputError, match="found images float32"):
            read_cells(np.zeros((1, 18, 18, 3), np.float32))
