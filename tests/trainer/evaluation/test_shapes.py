import json
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damaged_tables import DAMAGES

from semroute.pipeline.store.open import open_features
from semroute.schemas import InputError, ModelConfig, RoutingConfig, Scoring
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.sampling import SamplingConfig
from semroute.trainer.evaluation.generate import CaptionSet, generate
from semroute.trainer.evaluation.shapes import images_by_scale, read_captions, score
from semroute.trainer.model.dit import DiT
from semroute.trainer.runs.scores import EVALUATION_SCHEMA
from semroute.trainer.shapes.dataset import write_world
from semroute.trainer.shapes.images import IMAGE_PIXELS, render
from semroute.trainer.shapes.judge import SKILLS
from semroute.trainer.shapes.scenes import Object, Scene, sample_scene

SIZE = (3, IMAGE_PIXELS, IMAGE_PIXELS)


def draw(num, seed, held_out=False):
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out) for _ in range(num)]
    return scenes, np.stack([render(scene, rng) for scene in scenes])


def numbered(num):
    """Scenes that all differ, of one kind and size, so that every skill applies to each."""
    scenes = {s for s in draw(num * 12, 5)[0] if s.kind == "pair"}
    return sorted(scenes, key=lambda scene: scene.captions())[:num]


class TestScore:
    def test_true_images_are_right_and_far_above_chance(self):
        scenes, images = draw(500, 0)
        table = score(images, scenes, ["test"] * 500).table
        assert table.schema == EVALUATION_SCHEMA
        assert table["skill"].to_pylist() == list(SKILLS)
        for row in table.to_pylist():
            assert row["accuracy"] == row["low"] == row["high"] == 1.0
            assert row["chance"] < 0.6

    def test_images_of_other_scenes_score_chance(self):
        scenes, _ = draw(3000, 1)
        scenes = [*dict.fromkeys(scenes)]
        rng = np.random.default_rng(2)
        images = np.stack([render(scene, rng) for scene in scenes])
        wrong = np.roll(images, 1, axis=0)
        for row in score(wrong, scenes, ["test"] * len(scenes)).table.to_pylist():
            error = np.sqrt(row["chance"] * (1 - row["chance"]) / row["num_scenes"])
            assert abs(row["accuracy"] - row["chance"]) < 4 * error + 0.005
            assert row["low"] <= row["accuracy"] <= row["high"]

    def test_noise_scores_below_chance(self):
        scenes, images = draw(300, 3)
        noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
        scores = score(noise, scenes, ["test"] * 300).to_dict()["test"]
        assert scores["count"]["accuracy"] < 0.02 < scores["count"]["chance"]

    def test_splits_are_scored_apart(self):
        scenes, images = draw(100, 4)
        splits = ["test"] * 50 + ["held-out"] * 50
        images[50:] = 0
        scores = score(images, scenes, splits).to_dict()
        assert list(scores) == ["test", "held-out"]
        assert scores["test"]["all"]["accuracy"] == 1
        assert scores["held-out"]["all"]["accuracy"] == 0
        assert scores["held-out"]["all"]["num_images"] == 50

    def test_interval_has_the_width_of_a_binomial(self):
        scenes = numbered(200)
        images = np.stack([render(scene, np.random.default_rng(0)) for scene in scenes])
        images[::2] = 0
        row = score(images, scenes, ["test"] * 200).to_dict()["test"]["binding"]
        assert row["accuracy"] == 0.5
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)

    def test_more_images_of_the_same_scenes_do_not_narrow_the_interval(self):
        scenes = numbered(100)
        images = np.stack([render(scene, np.random.default_rng(0)) for scene in scenes])
        images[::2] = 0
        once = score(images, scenes, ["test"] * 100).to_dict()["test"]["all"]
        four = score(np.tile(images, (4, 1, 1, 1)), scenes * 4, ["test"] * 400)
        row = four.to_dict()["test"]["all"]
        assert row["num_images"] == 400
        assert row["num_scenes"] == 100
        assert row["high"] - row["low"] == pytest.approx(once["high"] - once["low"], rel=0.1)

    def test_a_single_scene_has_no_chance(self):
        scene = Scene("single", (Object("red", "star"),))
        image = render(scene, np.random.default_rng(0))
        evaluation = score(np.stack([image, image]), [scene, scene], ["test"] * 2)
        assert evaluation.to_dict()["test"]["all"]["chance"] is None
        assert re.search(r"all +1\.000 +1\.000 to 1\.000 +- +2 +1$", evaluation.to_text())

    def test_is_a_function_of_the_seed(self):
        scenes, images = draw(60, 6)
        images[::3] = 0
        first = score(images, scenes, ["test"] * 60, seed=1).table
        assert first.equals(score(images, scenes, ["test"] * 60, seed=1).table)
        assert not first.equals(score(images, scenes, ["test"] * 60, seed=2).table)

    def test_refuses_lengths_that_differ(self):
        scenes, images = draw(3, 7)
        with pytest.raises(InputError, match="found 3 images, 2 scenes and 3 splits"):
            score(images, scenes[:2], ["test"] * 3)
        with pytest.raises(InputError, match="at least one"):
            score(images[:0], [], [])


class TestEvaluation:
    @pytest.fixture
    def evaluation(self):
        scenes, images = draw(80, 8)
        images[::3] = 0
        return score(images, scenes, ["test"] * 40 + ["<held-out>"] * 40)

    def test_dict_is_json_and_holds_every_number(self, evaluation):
        scores = json.loads(json.dumps(evaluation.to_dict()))
        rows = evaluation.table.to_pylist()
        assert sum(map(len, scores.values())) == len(rows)
        for row in rows:
            found = scores[row["split"]][row["skill"]]
            assert found == {key: row[key] for key in row if key not in ("split", "skill")}

    def test_text_is_aligned(self, evaluation):
        lines = evaluation.to_text().splitlines()
        assert len(lines) == evaluation.table.num_rows + 1
        assert len(set(map(len, lines))) == 1
        assert str(evaluation) == repr(evaluation) == evaluation.to_text()

    def test_html_says_the_same_and_is_escaped(self, evaluation):
        html = evaluation._repr_html_()
        assert "<held-out>" not in html
        cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", html.replace("&lt;", "<").replace("&gt;", ">"))
        assert "".join("".join(cells).split()) == "".join(evaluation.to_text().split())


@pytest.fixture(scope="module")
def features(feature_store):
    return open_features(feature_store)


def network(features, strategy="depth"):
    torch.manual_seed(0)
    identity = features.manifest.identity
    model = DiT(
        ModelConfig(size="nano", depth=2, patch_size=6),
        RoutingConfig(strategy=strategy),
        latent_shape=SIZE,
        layers=identity.layers,
        num_llm_layers=identity.model.num_layers,
        text_width=identity.model.width,
    )
    with torch.no_grad():
        for parameter in (*model.router_parameters(), model.patch_out.weight):
            parameter.normal_(std=0.2)
    return model


def run(model, features, ids, cfg_scale=2.0, **options):
    given = {"seed": 0, "batch_size": 4, "progress": False}
    sampling = SamplingConfig(3, cfg_scale)
    return generate(model, Flow(shift=3.0), features, ids, sampling, **given | options)


class TestGenerate:
    @pytest.mark.parametrize("strategy", ["penultimate", "depth", "joint"])
    @pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
    def test_does_not_depend_on_the_batch_size(self, features, strategy, cfg_scale):
        model = network(features, strategy)
        ids = [5, 1, 17, 5, 40]
        once = run(model, features, ids, cfg_scale=cfg_scale, batch_size=5)
        assert once.shape == (5, *SIZE)
        assert once.dtype == np.float32
        for batch_size in (1, 2):
            again = run(model, features, ids, cfg_scale=cfg_scale, batch_size=batch_size)
            np.testing.assert_allclose(again, once, rtol=1e-3, atol=1e-4)

    def test_depends_on_seed_caption_guidance_and_place(self, features):
        model = network(features)
        first = run(model, features, [3, 3])
        assert np.abs(first[0] - first[1]).max() > 0.1
        for other in (
            run(model, features, [3, 3], seed=1),
            run(model, features, [9, 9]),
            run(model, features, [3, 3], cfg_scale=1.0),
        ):
            assert np.abs(other[0] - first[0]).max() > 1e-3

    def test_guides_away_from_the_null_caption(self, features):
        model = network(features)
        null = run(model, features, [0], cfg_scale=1.0)
        np.testing.assert_allclose(run(model, features, [0], cfg_scale=7.0), null, atol=1e-3)

    def test_shows_progress(self, features, capsys):
        run(network(features), features, [1, 2, 3], batch_size=2, progress=True)
        assert "3/3" in capsys.readouterr().err

    def test_refuses_an_empty_batch(self, features):
        with pytest.raises(InputError, match="batch_size is 0, expected at least 1"):
            run(network(features), features, [1], batch_size=0)


class TestImagesByScale:
    def test_every_scale_has_images_of_every_caption_in_turn(self, features):
        model = network(features)
        run_of_model = SimpleNamespace(
            model=model,
            flow=Flow(shift=3.0),
            clock=lambda name: None,
            sampling_dtype=lambda name: torch.float32,
        )
        captions = CaptionSet(features, [*range(1, 7)], ["caption"] * 6)
        scoring = Scoring(
            features="features",
            samples="samples",
            cfg_scales=[1.0, 2.0],
            images_per_caption=2,
            num_steps=3,
            seed=5,
        )
        decoded = []

        def decode(latents):
            decoded.append(latents)
            return latents

        found = dict(
            images_by_scale(run_of_model, captions, scoring, decode, batch_size=4, progress=False)
        )
        assert [*found] == [1.0, 2.0]
        for images, latents in zip(found.values(), decoded, strict=True):
            assert images is latents
        for cfg_scale, images in found.items():
            ids = [1, 2, 3, 4, 5, 6] * 2
            expected = run(model, features, ids, cfg_scale=cfg_scale, seed=5)
            np.testing.assert_array_equal(images, expected)


class TestReadCaptions:
    def test_reads_what_captions_ask_for(self, tmp_path):
        write_world(tmp_path / "shapes", 4, seed=0, num_test=6, num_dev=1, progress=False)
        captions = read_captions(str(tmp_path / "shapes" / "test.parquet"))
        assert captions.splits == ["test"] * 3 + ["held-out"] * 3
        for text, scene in zip(captions.texts, captions.scenes, strict=True):
            assert text in scene.captions()

    def test_refuses_other_files(self, tmp_path):
        file = tmp_path / "other.parquet"
        with pytest.raises(InputError, match=r"samples .*other\.parquet"):
            read_captions(str(file))
        pq.write_table(pa.table({"text": ["a cat"]}), file)
        with pytest.raises(InputError, match=r"samples .*other\.parquet.*scene"):
            read_captions(str(file))

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_refuses_damaged_files(self, tmp_path, damage):
        write_world(tmp_path / "shapes", 4, seed=0, num_test=6, num_dev=1, progress=False)
        file = tmp_path / "shapes" / "test.parquet"
        DAMAGES[damage](file, pq.read_table(file, columns=["text", "scene", "split"]))
        with pytest.raises(InputError, match=r"samples .*test\.parquet: .*expected dev\.parquet"):
            read_captions(str(file))

    @pytest.mark.parametrize(
        "scene",
        ["", "[]", "3", "null", "[" * 5000, '{"kind": "single", "objects": [3]}', '{"a": 1}'],
    )
    def test_refuses_what_is_no_scene(self, tmp_path, scene):
        file = tmp_path / "test.parquet"
        pq.write_table(pa.table({"text": ["a"], "scene": [scene], "split": ["test"]}), file)
        with pytest.raises(InputError, match=r"samples .*test\.parquet: .*expected dev\.parquet"):
            read_captions(str(file))
