import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from semroute.cli import cli
from semroute.pipeline.extraction.features import extract
from semroute.pipeline.inspection import figures
from semroute.pipeline.inspection.linear_probe import probe_layers, wilson
from semroute.pipeline.sources.labels import read_labels
from semroute.pipeline.store.open import open_features
from semroute.pipeline.style import readable
from semroute.schemas import InputError, Routing


def probed(store, table, **options):
    return probe_layers(store, str(table), progress=False, **options)


def invoke(*arguments):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def labels(tmp_path_factory, texts):
    """Labels that captions state and that they do not, and numbers, which are no labels."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("labels") / "labels.parquet"
    table = {
        "text": texts,
        "scene": [json.dumps({"colour": text.split()[1], "of": [{"thing": 1}]}) for text in texts],
        "coin": rng.choice(["heads", "tails"], len(texts)).tolist(),
        "number": [*range(len(texts))],
    }
    pq.write_table(pa.table(table), path)
    return path


class TestLabels:
    def test_leaves_of_json_have_dotted_names(self, labels, texts):
        unique = list(dict.fromkeys(texts))
        found, skipped = read_labels(str(labels), unique)
        assert [label.name for label in found] == ["scene.colour", "coin"]
        (colour, _) = found
        assert [colour.classes[value] for value in colour.values] == [t.split()[1] for t in unique]
        assert skipped == [
            "scene.of.0.thing: fewer than two classes of 20 captions or more",
            "number: 200 values, more than 64",
        ]

    def test_what_rows_label_differently_is_counted_and_left_out(self, labels, texts):
        """Eight captions occur twice in the table; their coins were tossed twice."""
        coins = pq.read_table(labels)["coin"].to_pylist()
        twice = [texts.index(text) for text in texts[-8:]]
        differing = [at for n, at in enumerate(twice) if coins[at] != coins[-8 + n]]
        found, _ = read_labels(str(labels), texts[:-8], names=["coin"])
        assert differing
        assert found[0].num_ambiguous == len(differing)
        assert np.flatnonzero(found[0].values < 0).tolist() == sorted(differing)

    def test_rare_classes_are_counted_and_left_out(self, tmp_path):
        table = tmp_path / "table.csv"
        names = [f"caption {n}" for n in range(60)]
        kinds = ["cat"] * 25 + ["dog"] * 25 + ["emu"] * 9 + [""]
        table.write_text("\n".join(["text,kind", *map(",".join, zip(names, kinds, strict=True))]))
        (label,), _ = read_labels(str(table), names)
        assert (label.classes, len(label), label.num_rare) == (["cat", "dog"], 50, 9)

    @pytest.mark.parametrize(
        ("captions", "names", "message"),
        [
            (["unheard of"], (), "none of its 200 captions is among the 1 that are stored"),
            (None, ["weather"], "no column 'weather'; its columns are text, scene, coin, number"),
            (None, ["scene.size"], "no label 'scene.size'; it has scene.colour, scene.of.0.thing"),
            (None, ["scene.of"], "fewer than two classes"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, labels, feature_store, captions, names, message):
        if captions is None:
            captions = open_features(feature_store).captions["text"].to_pylist()
        with pytest.raises(InputError, match=message):
            read_labels(str(labels), captions, names=names)


class TestProbes:
    @pytest.mark.parametrize("pool", ["mean", "last"])
    def test_layers_know_what_captions_say_and_not_what_they_do_not(
        self, pool, feature_store, labels
    ):
        found = probed(feature_store, labels, pool=pool)
        by_label = {probe.label: probe for probe in found.probes}
        colour, coin = by_label["scene.colour"], by_label["coin"]
        if pool == "mean":
            assert min(colour.low) > 2 * colour.chance
        assert np.mean(coin.accuracy) == pytest.approx(0.5, abs=0.2)
        for probe in found.probes:
            assert len(probe.accuracy) == len(found.layers) == 4
            assert all(np.array(probe.low) <= probe.accuracy)
            assert all(probe.accuracy <= np.array(probe.high))
            assert probe.num_judged == pytest.approx(probe.num_fitted / 3, abs=1)

    def test_a_token_knows_its_word_and_little_of_the_one_before(self, tiny_llm, tmp_path):
        """With an untrained LLM whose tokens are letters."""
        letters = np.random.default_rng(0).choice([*"abcd"], (700, 8))
        captions = sorted({"".join(row) for row in letters})
        table = tmp_path / "letters.csv"
        rows = (f"{text},{text[0]}" for text in captions)
        table.write_text("\n".join(["text,first", *rows]))
        features = tmp_path / "features"
        extract(str(table), features, model=str(tiny_llm), workers=0, report=lambda line: None)
        found = probed(features, table)
        by_label = {probe.label: probe for probe in found.probes}
        word, before = by_label["word"], by_label["word before"]
        assert (word.num_classes, before.num_classes) == (4, 4)
        assert min(word.low) > 0.9
        assert word.accuracy[0] > max(before.accuracy)
        assert before.chance < 0.5

    def test_results_are_reproducible(self, feature_store, labels):
        assert probed(feature_store, labels) == probed(feature_store, labels)

    def test_fewer_captions_may_be_asked_for(self, feature_store, labels):
        found = probed(feature_store, labels, labels=["coin"], num_captions=100)
        assert sum(p.num_fitted * 5 / 3 for p in found.probes if p.label == "coin") <= 100

    def test_an_interval_is_wilsons(self):
        """Brown, Cai and DasGupta, Stat. Sci. 16, 2001: 0 of n is 0 to z^2 / (n + z^2)."""
        low, high = wilson(0.0, 10)
        assert low == 0
        assert high == pytest.approx(1.959964**2 / (10 + 1.959964**2))
        assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


class TestFigure:
    def test_it_has_an_axes_a_label_and_one_for_the_router(self, feature_store, labels):
        found = probed(feature_store, labels)
        weights = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]
        routing = Routing(strategy="depth", step=1, source="ema", layers=[1, 2, 4], weights=weights)
        figure = figures.probe_accuracy(found, routing)
        titles = [axes.get_title() for axes in figure.axes]
        assert [re.split(" \\(|;", title)[0] for title in titles] == [
            *(readable(probe.label) for probe in found.probes),
            "what the router reads",
        ]
        heights = [bar.get_height() for bar in figure.axes[-1].patches]
        assert heights == pytest.approx([0.3, 0.225, 0, 0.475])


class TestCommand:
    def test_it_prints_a_line_a_label_and_draws(self, feature_store, labels, tmp_path):
        picture = tmp_path / "knowledge.png"
        run = invoke("probe", feature_store, labels, "--figure", picture)
        assert "scene.colour" in run.stdout
        assert "chance" in run.stdout
        assert "number: 200 values, more than 64" in run.stdout
        assert picture.read_bytes().startswith(b"\x89PNG")
        found = json.loads(invoke("probe", feature_store, labels, "--json").stdout)
        assert {probe["label"] for probe in found["probes"]} >= {"scene.colour", "coin"}
