import json

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.text import Text
from PIL import Image

from semroute.pipeline.store.open import open_features, open_latents
from semroute.schemas import (
    CheckpointState,
    InputError,
    ModelConfig,
    RoutingConfig,
    RunRecord,
    TrainConfig,
)
from semroute.trainer.evaluation.shapes import score
from semroute.trainer.plots.adapters import layer_weights, lora_sizes
from semroute.trainer.plots.images import list_images, sample_grid, save_images
from semroute.trainer.plots.routing import routing_heatmap, routing_over_steps, routing_over_time
from semroute.trainer.plots.scores import accuracy_bars
from semroute.trainer.plots.training import loss_curve, validation_curves
from semroute.trainer.runs.checkpoint import save_checkpoint
from semroute.trainer.runs.figures import plot_run
from semroute.trainer.runs.metrics import METRICS, METRICS_SCHEMA
from semroute.trainer.runs.record import build_model, write_record
from semroute.trainer.runs.run import load_run
from semroute.trainer.runs.scores import EvaluationReport
from semroute.trainer.shapes.images import render
from semroute.trainer.shapes.scenes import sample_scene


def softmax(*shape, seed=0):
    z = np.exp(np.random.default_rng(seed).normal(size=shape))
    return (z / z.sum(-1, keepdims=True)).astype(np.float32)


def texts(figure):
    """Every visible text."""
    figure.draw_without_rendering()
    found = figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible())
    return [artist.get_text() for artist in found]


def metrics(num=200, validate_every=None):
    step = np.arange(1, num + 1) * 10
    loss = 1 + np.random.default_rng(0).normal(0, 0.1, num)
    lines = [
        {f.name: 0 for f in METRICS_SCHEMA if not f.nullable} | {"step": s, "loss": x}
        for s, x in zip(step.tolist(), loss.tolist(), strict=True)
    ]
    for number in range(0, num, validate_every or num + 1):
        by_t = [2.0 + 0.1 * k - 0.005 * number for k in range(4)]
        if validate_every:
            lines[number] |= {"validation_loss": sum(by_t) / 4, "validation_by_t": by_t}
    return pa.Table.from_pylist(lines, schema=METRICS_SCHEMA)


def evaluation(num=120):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, number % 2 == 1) for number in range(num)]
    images = np.stack([render(scene, rng) for scene in scenes])
    images[::3] = 0
    splits = ["held-out" if number % 2 else "test" for number in range(num)]
    return score(images, scenes, splits)


class TestRoutingHeatmap:
    def test_shows_the_weights_and_their_mean(self):
        weights = softmax(5, 8)
        top, main, bar = routing_heatmap(weights, range(1, 9)).axes
        np.testing.assert_array_equal(main.images[0].get_array(), weights)
        heights = [patch.get_height() for patch in top.patches]
        np.testing.assert_allclose(heights, weights.mean(0), rtol=1e-6)
        assert bar.get_ylim()[1] == pytest.approx(max(weights.max(), 2 / 8))

    def test_names_layers_and_blocks(self):
        figure = routing_heatmap(softmax(5, 3), [4, 9, 30], "Mine")
        _, main, _ = figure.axes
        assert [label.get_text() for label in main.get_xticklabels()] == ["4", "9", "30"]
        assert [label.get_text() for label in main.get_yticklabels()] == ["1", "2", "3", "4", "5"]
        assert {"Mine", "LLM layer", "DiT block"} <= set(texts(figure))

    def test_marks_uniform_in_the_mean_and_on_the_bar(self):
        figure = routing_heatmap(softmax(5, 8), range(1, 9))
        top, _, bar = figure.axes
        for axes in (top, bar):
            assert any(np.allclose(line.get_ydata(), 1 / 8) for line in axes.lines)
        assert texts(figure).count("uniform") == 2

    def test_noise_around_uniform_does_not_fill_the_scale(self):
        weights = np.full((3, 10), 0.1) + np.random.default_rng(0).normal(0, 1e-3, (3, 10))
        assert routing_heatmap(weights, range(10)).axes[1].images[0].get_clim() == (0, 0.2)

    def test_thins_the_names_of_many_layers_and_blocks(self):
        _, main, _ = routing_heatmap(softmax(24, 36), range(1, 37)).axes
        assert 8 <= len(main.get_xticks()) <= 16
        assert 8 <= len(main.get_yticks()) <= 12

    def test_one_row_is_bars_alone(self):
        figure = routing_heatmap(np.eye(6)[4:5], range(1, 7))
        (axes,) = figure.axes
        assert [patch.get_height() for patch in axes.patches] == [0, 0, 0, 0, 1, 0]

    @pytest.mark.parametrize("shape", [(5, 7), (8,), (2, 5, 8), (0, 8)])
    def test_refuses_other_shapes(self, shape):
        with pytest.raises(InputError, match=r"expected \[D, L\] with L = 8"):
            routing_heatmap(np.zeros(shape), range(8))


class TestRoutingOverTime:
    def test_one_panel_per_block_on_one_scale(self):
        weights, t = softmax(11, 5, 8), np.linspace(0, 1, 11)
        figure = routing_over_time(weights, t, range(1, 9))
        panels = [axes for axes in figure.axes if axes.get_visible()][:5]
        assert [axes.get_title() for axes in panels] == [f"block {d}" for d in range(1, 6)]
        for block, axes in enumerate(panels):
            np.testing.assert_array_equal(axes.collections[0].get_array(), weights[:, block])
            assert axes.collections[0].get_clim() == (0, pytest.approx(weights.max()))

    def test_blocks_that_read_the_same_share_a_panel(self):
        weights = np.repeat(softmax(11, 1, 8), 6, axis=1)
        panel, _ = routing_over_time(weights, np.linspace(0, 1, 11), range(1, 9)).axes
        np.testing.assert_array_equal(panel.collections[0].get_array(), weights[:, 0])
        assert panel.get_title() == ""

    def test_t_may_be_spaced_unevenly(self):
        t = np.array([0.0, 0.5, 0.6, 1.0])
        panel, _ = routing_over_time(softmax(4, 1, 3), t, [1, 2, 3]).axes
        edges = panel.collections[0].get_coordinates()[:, 0, 1]
        np.testing.assert_allclose(edges, [0, 0.25, 0.55, 0.8, 1])

    @pytest.mark.parametrize("t", [[0, 1], [0, 0.5, 0.5], [1, 0.5, 0]])
    def test_refuses_t_that_does_not_fit(self, t):
        with pytest.raises(InputError, match="expected as many, at least two, ascending"):
            routing_over_time(softmax(3, 2, 4), np.array(t), range(4))

    def test_refuses_weights_without_t(self):
        with pytest.raises(InputError, match=r"expected \[T, D, L\]"):
            routing_over_time(softmax(3, 4), np.linspace(0, 1, 3), range(4))


class TestLossCurve:
    def test_shows_what_was_logged_and_a_calmer_mean(self):
        table = metrics()
        (axes,) = loss_curve(table).axes
        raw, smooth = axes.lines
        np.testing.assert_array_equal(raw.get_xdata(), table["step"])
        np.testing.assert_array_equal(raw.get_ydata(), table["loss"])
        loss, half = table["loss"].to_numpy(), 200 // 40
        expected = loss[100 - half : 101 + half].mean()
        assert smooth.get_ydata()[100] == pytest.approx(expected)
        assert smooth.get_ydata()[0] == loss[0]
        assert smooth.get_ydata()[-1] == pytest.approx(loss[-1 - half :].mean())
        assert smooth.get_ydata()[20:].std() < 0.5 * loss.std()

    def test_few_rows_are_not_smoothed(self):
        (axes,) = loss_curve(metrics(3)).axes
        assert len(axes.lines) == 1

    def test_a_long_fall_has_a_log_scale(self):
        loss = np.geomspace(100, 1, 50)
        (axes,) = loss_curve(pa.table({"step": np.arange(50), "loss": loss})).axes
        assert axes.get_yscale() == "log"
        assert loss_curve(metrics()).axes[0].get_yscale() == "linear"

    def test_refuses_empty_metrics(self):
        with pytest.raises(InputError, match="hold no rows"):
            loss_curve(METRICS_SCHEMA.empty_table())


class TestValidationCurves:
    def test_one_line_per_part_of_t_and_their_mean(self):
        figure = validation_curves(metrics(validate_every=20))
        (axes,) = figure.axes
        assert [line.get_label() for line in axes.lines] == [
            "t 0.75 to 1",
            "t 0.5 to 0.75",
            "t 0.25 to 0.5",
            "t 0 to 0.25",
            "mean",
        ]
        np.testing.assert_allclose(axes.lines[0].get_ydata()[:2], [2.3, 2.2])
        assert axes.lines[-1].get_xdata().tolist() == [*range(10, 2010, 200)]
        assert "mean" in texts(figure)

    def test_refuses_what_was_never_measured(self):
        with pytest.raises(InputError, match=r"no validation: train with validation\.share"):
            validation_curves(metrics())


class TestRoutingOverSteps:
    def test_one_panel_per_block_with_steps_along_x(self):
        figure = routing_over_steps(softmax(5, 6, 8), np.arange(5) * 100, range(1, 9))
        panels = figure.axes[:6]
        assert [axes.get_title() for axes in panels] == [f"block {n}" for n in range(1, 7)]
        assert panels[0].get_xlim() == (0, 400)
        assert panels[0].get_ylim() == (-0.5, 7.5)
        assert len({axes.collections[0].get_clim() for axes in panels}) == 1
        assert {"step", "LLM layer"} <= {*texts(figure)}

    def test_refuses_a_single_step(self):
        with pytest.raises(InputError, match="at least two, ascending"):
            routing_over_steps(softmax(1, 6, 8), np.array([1]), range(1, 9))


class TestSampleGrid:
    IMAGES = np.random.default_rng(0).integers(0, 256, (7, 18, 18, 3), dtype=np.uint8)
    CAPTIONS = tuple(f"a picture of exactly {n} big yellow triangles" for n in range(7))

    def test_shows_every_image_pixel_by_pixel(self):
        figure = sample_grid(self.IMAGES, self.CAPTIONS, columns=3)
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert len(figure.axes) == 9
        for axes, image, caption in zip(panels, self.IMAGES, self.CAPTIONS, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), image)
            assert axes.images[0].get_interpolation() == "nearest"
            assert " ".join(axes.get_xlabel().split()) == caption

    def test_wraps_captions(self):
        figure = sample_grid(self.IMAGES[:1], self.CAPTIONS[:1])
        assert max(map(len, figure.axes[0].get_xlabel().split("\n"))) <= 24

    def test_marks_right_and_wrong(self):
        marks = [True, False] * 3 + [True]
        figure = sample_grid(self.IMAGES, self.CAPTIONS, marks)
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert [axes.texts[0].get_text() for axes in panels] == ["✓", "✗"] * 3 + ["✓"]
        assert len({axes.spines["top"].get_edgecolor() for axes in panels}) == 2
        assert not sample_grid(self.IMAGES, self.CAPTIONS).axes[0].texts

    def test_refuses_lengths_that_differ(self):
        with pytest.raises(InputError, match="7 images, 6 captions and no marks"):
            sample_grid(self.IMAGES, self.CAPTIONS[:6])
        with pytest.raises(InputError, match="7 images, 7 captions and 2 marks"):
            sample_grid(self.IMAGES, self.CAPTIONS, [True, False])
        with pytest.raises(InputError, match="0 images"):
            sample_grid(self.IMAGES[:0], [])


class TestAccuracyBars:
    def test_shows_accuracy_interval_and_chance(self):
        scores = evaluation()
        (axes,) = accuracy_bars(scores.table).axes
        rows = scores.table.to_pylist()
        heights = [patch.get_height() for patch in axes.patches]
        np.testing.assert_allclose(heights, [row["accuracy"] for row in rows])
        *intervals, chances = axes.collections
        ends = np.concatenate([np.array(lines.get_segments())[:, :, 1] for lines in intervals])
        np.testing.assert_allclose(ends, [[row["low"], row["high"]] for row in rows])
        marked = [segment[0, 1] for segment in chances.get_segments()]
        np.testing.assert_allclose(marked, [row["chance"] for row in rows])

    def test_names_skills_and_splits(self):
        found = set(texts(accuracy_bars(evaluation().table)))
        assert {"count", "binding", "all", "test", "held-out", "chance"} <= found


@pytest.fixture
def make_run(tmp_path, feature_store, latent_store):
    """A run directory as training leaves it, with routing weights that are not uniform."""

    def make(strategy, num_logged=50, **routing):
        features, latents = open_features(feature_store), open_latents(latent_store)
        path = tmp_path / strategy
        config = TrainConfig(
            features=str(feature_store),
            latents=str(latent_store),
            output=str(path),
            routing=RoutingConfig(strategy=strategy, **routing),
            model=ModelConfig(size="nano", depth=3, patch_size=6),
        )
        record = RunRecord(
            config=config,
            features=features.manifest.identity,
            codec=features.manifest.codec,
            latents=latents.manifest.identity,
            model_source="tiny",
            versions={},
            created="2026-01-01T00:00:00+00:00",
        )
        write_record(path, record)
        model = build_model(record)
        rng = np.random.default_rng(0)
        for parameter in model.router_parameters():
            parameter.data += parameter.new_tensor(rng.normal(size=parameter.shape))
        state = {name: value.detach() for name, value in model.state_dict().items()}
        saved = CheckpointState(step=500, num_ranks=1)
        save_checkpoint(path, saved, model=state, ema=state, optimizer={})
        lines = metrics(num_logged).to_pylist() if num_logged else []
        (path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return load_run(path)

    return make


class TestSigned:
    def test_colours_of_signed_weights_part_at_zero(self):
        weights = np.array([[-0.5, 0.2, 0.1], [0.3, 0.2, 0.1]])
        top, main, _ = routing_heatmap(weights, [1, 2, 3]).axes
        assert main.images[0].get_clim() == (-2 / 3, 2 / 3)
        assert top.get_ylim()[0] < -0.1
        over_time = routing_over_time(np.stack([weights] * 2), np.array([0.0, 1.0]), [1, 2, 3])
        assert over_time.axes[0].collections[0].get_clim() == (-2 / 3, 2 / 3)


class TestPlotRun:
    @pytest.mark.parametrize(
        ("strategy", "routing"),
        [
            *((name, {}) for name in ("penultimate", "uniform", "static", "depth", "token")),
            ("one-per-block", {}),
            ("concat", {"layers": [1, 3]}),
            ("attention", {"layers": [1, 3]}),
            ("depth", {"weights": "signed"}),
        ],
    )
    def test_writes_loss_and_routing(self, make_run, tmp_path, strategy, routing):
        paths = plot_run(make_run(strategy, **routing), tmp_path / "new" / "plots")
        assert [path.name for path in paths] == ["loss.png", "routing.png"]
        for path in paths:
            with Image.open(path) as image:
                assert image.format == "PNG"
                assert np.asarray(image.convert("L")).std() > 5

    @pytest.mark.parametrize("strategy", ["time", "joint"])
    def test_strategies_that_depend_on_t_are_plotted_over_it(self, make_run, tmp_path, strategy):
        paths = plot_run(make_run(strategy), tmp_path / "plots")
        names = ["loss.png", "routing.png", "routing-over-time.png"]
        assert [path.name for path in paths] == names
        assert all(path.stat().st_size > 5000 for path in paths)

    def test_adds_accuracy_for_each_guidance_scale(self, make_run, tmp_path):
        scores = {1.0: evaluation(), 3.5: evaluation()}
        run = make_run("depth")
        EvaluationReport(10, "ema", "features", 50, 0, scores).write(run.path)
        paths = plot_run(run, tmp_path / "plots")
        expected = ["loss.png", "routing.png", "accuracy-cfg-1.png", "accuracy-cfg-3.5.png"]
        assert [path.name for path in paths] == expected
        assert sorted(expected) == sorted(path.name for path in (tmp_path / "plots").iterdir())

    def test_a_run_that_logged_nothing_has_no_loss(self, make_run, tmp_path):
        paths = plot_run(make_run("depth", num_logged=0), tmp_path / "plots")
        assert [path.name for path in paths] == ["routing.png"]


class TestAdapters:
    def test_weights_before_and_after_stand_side_by_side(self):
        figure = layer_weights([1.0, -0.5], [0.5, 0.25], [9, 18], "Title", "LLM layer", "gain")
        (axes,) = figure.axes
        assert [patch.get_height() for patch in axes.patches] == [1.0, -0.5, 0.5, 0.25]
        assert {"Title", "LLM layer", "gain", "9", "18", "pretrained", "learned"} <= {
            *texts(figure)
        }

    def test_lora_is_drawn_over_blocks_in_order_of_execution(self):
        names = [f"transformer_blocks.{block}.attn.to_q" for block in (10, 2)]
        norms = {"single_transformer_blocks.0.proj": 4.0, names[0]: 3.0, names[1]: 2.0, "head": 1.0}
        (axes,) = lora_sizes(norms, "LoRA").axes
        drawn = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines]
        assert drawn == [(1, 1.0), (2, 3, 2.0, 3.0), (4, 4.0)]


def test_dollar_signs_of_captions_are_dollar_signs(tmp_path):
    """No formula of a stranger's, which may not even be one."""
    captions = ["costs $5, then $6", r"$\frac{1}{", "two\nlines\x1b[31m"]
    figure = sample_grid(np.zeros((3, 4, 4, 3), np.uint8), captions)
    figure.savefig(tmp_path / "figure.png")
    shown = "".join(text.get_text() for text in figure.findobj(Text))
    assert shown.count("$") == shown.count(r"\$") == 3
    assert "\x1b" not in shown


def test_images_are_saved_with_their_captions(tmp_path):
    images = np.stack([np.full((18, 18, 3), value, np.uint8) for value in (10, 200)])
    captions = ["one", "deux é"]
    paths = save_images(tmp_path / "out", images, captions, sample_grid(images, captions))
    assert [path.name for path in paths] == ["grid.png", "captions.jsonl"]
    listed = [json.loads(line) for line in paths[1].read_text("utf-8").splitlines()]
    assert [row["caption"] for row in listed] == captions
    assert sorted(p.name for p in (tmp_path / "out").glob("0*.png")) == ["000000.png", "000001.png"]
    for row, image in zip(listed, images, strict=True):
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "out" / row["image"])), image
        )
    save_images(tmp_path / "out", images[:1], captions[:1], sample_grid(images[:1], captions[:1]))
    assert [p.name for p in (tmp_path / "out").glob("0*.png")] == ["000000.png"]


def test_captions_of_images_may_hold_any_line_break(tmp_path):
    captions = ["a\u2028b\x85c\x0bd\x0ce\x1cf", "a\r\nb", "a \\n b"]
    images = np.zeros((3, 8, 8, 3), np.uint8)
    grid = sample_grid(images, ["", "", ""])
    for _ in range(2):  # the second removes what the first wrote
        save_images(tmp_path, images, captions, grid)
        assert [caption for caption, _ in list_images(tmp_path)] == captions
    for content in (b"\xff\n", b"{}\n", b"[\n", b'{"image": "../a.png", "caption": ""}\n'):
        (tmp_path / "captions.jsonl").write_bytes(content)
        for again in (list_images, lambda out: save_images(out, images, captions, grid)):
            with pytest.raises(InputError, match=r"captions\.jsonl is damaged"):
                again(tmp_path)
