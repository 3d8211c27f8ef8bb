import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tiny_pipelines import FAMILIES, load_pipeline  # noqa: E402
from tiny_text_halves import VIDEO_FAMILIES, make_text_half  # noqa: E402

from semroute.cli import cli  # noqa: E402
from semroute.pipeline.extraction.driver import provenance  # noqa: E402
from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.inspection.against import compare_with_pipeline  # noqa: E402
from semroute.pipeline.models.text_pipelines import open_text_pipeline  # noqa: E402
from semroute.pipeline.models.text_recipes import RECIPES  # noqa: E402
from semroute.pipeline.store.documents import StoreError, passed_against  # noqa: E402
from semroute.pipeline.store.features import FeatureStore  # noqa: E402
from semroute.pipeline.store.layout import pack  # noqa: E402
from semroute.pipeline.store.verify import verify  # noqa: E402
from semroute.pipeline.text.presets import PRESETS  # noqa: E402
from semroute.schemas import (  # noqa: E402
    CAPTIONS_SCHEMA,
    SAMPLES_SCHEMA,
    CaptionsIdentity,
    Codec,
    FeatureIdentity,
    FeatureManifest,
    ModelIdentity,
    Receipt,
    SamplesIdentity,
    Template,
    fingerprint,
)

pytestmark = pytest.mark.usefixtures("short_padding")
EVERY_FAMILY = (*FAMILIES, *VIDEO_FAMILIES)
TEXTS = ["", "a red cup", "Two green dogs on a table"]


class Made:
    """A feature store written from what a pipeline gives, which a test may change before.

    Attributes:
        tokens, rows: of each caption; rows float32 ``[T, layers, H]``, of the base layers the
            pipeline's, of the others random.
    """

    def __init__(self, text, encoded):
        self.text, self.folder = text, str(text.source.folder)
        self.layers = sorted({*range(1, text.num_layers + 1), *text.base_layers})
        self.tokens = [text.tokens(caption) for caption in TEXTS]
        self.rows = []
        self.files = {
            name.partition("/")[2]: sha
            for name, sha in text.source.files.items()
            if name.startswith(text.recipe.encoder)
        }
        self.template = {"prefix_tokens": [], "suffix_tokens": [], "keep_prefix": False}
        rng = np.random.default_rng(0)
        for number, own in enumerate(self.tokens):
            rows = rng.normal(size=(len(own), len(self.layers), text.width))
            base = text.rows(encoded, number).float().numpy()
            rows[:, [self.layers.index(layer) for layer in text.base_layers]] = base
            self.rows.append(rows.astype(np.float32))

    def change(self, select, number=None):
        """Keep some rows of all captions, or of one: ``select`` takes and gives row numbers."""
        for i in range(len(TEXTS)) if number is None else [number]:
            kept = select(np.arange(len(self.tokens[i])))
            self.tokens[i], self.rows[i] = self.tokens[i][kept], self.rows[i][kept]

    def write(self, path):
        lengths = np.array([*map(len, self.tokens)])
        width = self.rows[0].shape[-1]
        packing = pack(
            lengths,
            bytes_per_row=2 * len(self.layers) * width,
            shard_bytes=10**9,
            batch_tokens=1,
        )
        identity = FeatureIdentity(
            model=ModelIdentity(
                architecture="tiny",
                num_layers=self.text.num_layers,
                width=width,
                files=self.files,
            ),
            tokenizer="of a test",
            template=Template(text="{caption}", **self.template),
            layers=self.layers,
            final_norm="both" if self.layers[-1] > self.text.num_layers else "normed",
            dtype="float32",
            attention="sdpa",
            max_length=512,
            captions=CaptionsIdentity(
                num_captions=len(TEXTS), fingerprint=fingerprint(TEXTS), seed=0
            ),
            samples=SamplesIdentity(num_samples=2, fingerprint=None),
        )
        columns = [
            range(len(TEXTS)),
            TEXTS,
            [tokens.tolist() for tokens in self.tokens],
            lengths,
            [0] * len(TEXTS),
            packing.shard,
            packing.row_start,
            packing.row_start + lengths,
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, CAPTIONS_SCHEMA, strict=True)]
        samples = [[0, 1], [[1], [2]], ["", ""]]
        sample_arrays = [pa.array(c, f.type) for c, f in zip(samples, SAMPLES_SCHEMA, strict=True)]
        manifest = FeatureManifest(
            status="extracting",
            identity=identity,
            layout=packing.layout,
            codec=Codec(name="bf16"),
            provenance=provenance("test", "test"),
        )
        store = FeatureStore.create(
            path,
            manifest,
            pa.table(arrays, schema=CAPTIONS_SCHEMA),
            pa.table(sample_arrays, schema=SAMPLES_SCHEMA),
        )
        codes = np.zeros((packing.layout.rows_per_shard, *self.rows[0].shape[1:]), np.uint16)
        rows = torch.from_numpy(np.concatenate(self.rows)).to(torch.bfloat16)
        codes[: len(rows)] = rows.view(torch.uint16).numpy()
        receipt = Receipt(
            shard=0,
            num_rows=int(lengths.sum()),
            num_entries=len(TEXTS),
            files={},
            codec_error={},
            warnings=[],
            seconds={},
            worker="none",
        )
        store.complete_shard({"hidden": codes}, receipt)
        store.finish()
        return path


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory):
    """Family -> folder of its pipeline."""

    @functools.cache
    def folder(family):
        if family in VIDEO_FAMILIES:
            return make_text_half(family, tmp_path_factory.mktemp(family))
        return tiny_pipeline(family)

    return folder


@pytest.fixture(scope="module")
def make(folder):
    """Family -> a store of it, to be changed and written."""

    @functools.cache
    def opened(family):
        text = open_text_pipeline(str(folder(family)))
        return text, text.encode(TEXTS)

    return lambda family: Made(*opened(family))


@pytest.mark.parametrize("family", ["pixart", "krea2", "flux2-klein", "cosmos", "ltx2"])
def test_a_store_of_a_pipelines_rows_passes(make, family, tmp_path):
    made = make(family)
    path = made.write(tmp_path / "store")
    found = compare_with_pipeline(path, made.folder)
    assert found.problems == []
    assert found.captions == [0, 1, 2]
    assert 0 < found.max_difference < 2**-8
    source = made.text.source
    assert passed_against(path, made.text.recipe.pipeline, source.files)
    assert passed_against(path, made.text.recipe.pipeline, source.files | {"vae/a": "b"})
    assert not passed_against(path, "OtherPipeline", source.files)
    assert not passed_against(path, made.text.recipe.pipeline, dict.fromkeys(source.files, "x"))
    checked = verify(path)
    assert checked.problems == checked.warnings == []


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_store_of_the_preset_passes(folder, family, tmp_path):
    """Extracted by the LLM on its own, with other batches and without padding."""
    recipe = next(recipe for recipe in RECIPES.values() if recipe.family == family)
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(TEXTS[1:]) + "\n")
    extract(
        str(captions),
        tmp_path / "store",
        model=str(folder(family) / recipe.encoder),
        template=family,
        codec="bf16",
        workers=0,
        threads=1,
        report=lambda _: None,
    )
    found = compare_with_pipeline(tmp_path / "store", str(folder(family)), num=1)
    assert found.problems == []
    assert 0 < found.max_difference < found.tolerance


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.family)
def test_recipes_are_those_of_the_presets(recipe):
    preset = PRESETS[recipe.family]
    assert recipe.pipeline in preset.pipelines
    assert (recipe.encoder, recipe.final_norm) == (preset.encoder, preset.final_norm)
    assert recipe.reads_padding == preset.reads_padding
    layers = [
        layer + (layer == 36 and recipe.final_norm == "raw") for layer in recipe.layers(36, {})
    ]
    assert tuple(layers) == preset.base_layers(36)


ROWS = {
    "first": (lambda rows: rows[1:], "the store lacks rows in front", "from row 0 on token"),
    "last": (lambda rows: rows[:-1], "the store lacks rows at the end", "not stored"),
    "two last": (lambda rows: rows[:-2], "the store lacks rows at the end", "2 tokens"),
    "middle": (lambda rows: np.delete(rows, 1), "the store lacks rows in between", "from row 1"),
    "in front": (lambda rows: np.append(0, rows), "rows in front that the pipeline drops", "row"),
    "padding": (lambda rows: np.append(rows, 0), "rows at the end that the pipeline does", "not"),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("family", ["qwen-image", "krea2"])
def test_wrong_rows_are_named(make, family, case, tmp_path):
    select, kind, detail = ROWS[case]
    made = make(family)
    if case == "in front":
        made.tokens = [np.append(tokens, tokens[-1] - 1) for tokens in made.tokens]
        made.rows = [np.concatenate([rows, rows[:1]]) for rows in made.rows]
        made.change(lambda rows: np.append(rows[-1], rows[:-1]))
    else:
        made.change(select)
    found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
    assert kind in found.problems[0]
    assert detail in found.problems[0]
    assert f"--template {family}" in found.problems[-1]
    assert not passed_against(tmp_path / "store", found.pipeline_class, made.text.source.files)


def test_a_wrong_null_caption_alone_is_named(make, tmp_path):
    made = make("flux2-klein")
    made.change(lambda rows: rows[:-1], number=0)
    found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
    assert found.problems[0].startswith("1 of 3 captions: the store lacks rows at the end")
    assert "the null caption: " in found.problems[0]


class TestLayers:
    @pytest.mark.parametrize("shift", [-1, 1])
    def test_a_layer_that_is_off_by_one(self, make, shift, tmp_path):
        made = make("krea2")  # reads 1, 3 and 5 of 6
        made.rows = [np.roll(rows, shift, axis=1) for rows in made.rows]
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        layer = 1 if shift == 1 else 3
        there = made.layers[(made.layers.index(layer) + shift) % len(made.layers)]
        if shift == 1:
            expected = f"what the pipeline reads as layer {layer} is layer {there} of the store"
        else:
            expected = "what the pipeline reads as layer 1 is layer 6 of the store"
        assert expected in found.problems[0]

    def test_the_last_layer_stored_before_the_norm(self, make, tmp_path):
        made = make("pixart")
        pipe = load_pipeline(Path(made.folder))
        raw = []
        norm = pipe.text_encoder.encoder.final_layer_norm
        norm.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0][0].detach()))
        for caption, rows in zip(TEXTS, made.rows, strict=True):
            pipe.encode_prompt(caption, do_classifier_free_guidance=False)
            rows[:, -1] = raw[-1][: len(rows)]
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert "the last layer is stored before the final norm" in found.problems[0]
        assert "the pipeline reads it after" in found.problems[0]

    def test_the_last_layer_stored_after_the_norm(self, make, tmp_path):
        made = make("ideogram4")
        for rows in made.rows:
            rows[:, -1] = made.text.final_norm(torch.from_numpy(rows[:, -1])).float()
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder, num=1)
        assert "the last layer is stored after the final norm" in found.problems[0]
        assert "the pipeline reads it before" in found.problems[0]

    def test_layers_that_are_not_stored(self, make, tmp_path):
        made = make("krea2")
        made.layers, made.rows = made.layers[:4], [rows[:, :4] for rows in made.rows]
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert found.problems[0] == "the pipeline reads layers 1, 3, 5, but layer 5 is not stored"

    def test_another_width(self, make, tmp_path):
        made = make("krea2")
        made.rows = [rows[..., :16] for rows in made.rows]
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert "hidden states are 16 wide; those of the pipeline's LLM 32" in found.problems[0]


class TestOtherRows:
    """The right tokens, but rows that are not the pipeline's."""

    def scramble(self, made):
        made.rows = [-rows for rows in made.rows]
        return made

    def test_of_another_llm(self, make, tmp_path):
        made = self.scramble(make("pixart"))
        made.files = {"model.safetensors": "0" * 64}
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert "the LLM is another one: its files are not the pipeline's" in found.problems[0]
        assert "The tokenizer of the store is not the pipeline's." in found.problems

    def test_of_the_same_llm(self, make, tmp_path):
        made = self.scramble(make("pixart"))
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert "the same tokens and the same LLM give other rows" in found.problems[0]
        assert "row 0 of layer 6 differs by 2." in found.problems[0]

    def test_of_another_template(self, make, tmp_path):
        made = self.scramble(make("qwen-image"))
        made.template["prefix_tokens"] = [1, 2, 3]
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert "dropped in front are of another template" in found.problems[0]

    def test_without_padding(self, make, tmp_path):
        made = self.scramble(make("sd3"))
        found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
        assert "the pipeline's LLM attends to padding" in found.problems[0]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Two Green Dogs on a Table", "in another case"),
        ("two greendogs on a table", "other spaces"),
        ("two green cats on a table", "other words"),
        ("Nothing alike", "another template, another tokenizer"),
    ],
)
def test_captions_that_were_not_cleaned(make, tmp_path, text, kind):
    made = make("pixart")  # whose pipeline writes captions in lower case
    tokens = np.array(made.text.tokenizer(text)["input_ids"])
    if kind == "another template, another tokenizer":
        tokens[-1] = 3
    made.tokens[2], made.rows[2] = tokens, np.resize(made.rows[2], (len(tokens), 6, 32))
    found = compare_with_pipeline(made.write(tmp_path / "store"), made.folder)
    assert found.problems[0].startswith("1 of 3 captions: ")
    assert kind in found.problems[0]
    assert "in 'Two green dogs on a table'" in found.problems[0]


class TestRefusals:
    def test_stores_that_hold_no_layers(self, make, tmp_path):
        made = make("pixart")
        path = made.write(tmp_path / "store")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["identity"]["shuffled"] = 3
        (path / "manifest.json").write_text(json.dumps(manifest))
        (path / "checksums.json").unlink()
        with pytest.raises(StoreError, match="holds shuffled layers, which no pipeline reads"):
            compare_with_pipeline(path, made.folder)

    def test_other_stores(self, make, latent_store):
        with pytest.raises(StoreError, match="is a latent store; expected one of features"):
            compare_with_pipeline(latent_store, make("pixart").folder)

    def test_a_damaged_record(self, make, tmp_path):
        made = make("pixart")
        path = made.write(tmp_path / "store")
        (path / "against.json").write_text("{")
        with pytest.raises(StoreError, match=r"against\.json is damaged"):
            passed_against(path, "PixArtSigmaPipeline", {})


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(cli, ["verify", *map(str, arguments)])

    def test_exit_code_says_whether_rows_agree(self, make, tmp_path):
        made = make("pixart")
        good = made.write(tmp_path / "good")
        result = self.run(good, "--against", made.folder, "--num", 1)
        assert result.exit_code == 0, result.output
        assert "rows of 2 captions, the null caption among them, are those of" in result.stdout
        assert "PixArtSigmaPipeline (layer 6)" in result.stdout
        made.change(lambda rows: rows[1:], number=1)
        made.change(lambda rows: rows[1:], number=2)
        bad = made.write(tmp_path / "bad")
        result = self.run(bad, "--against", made.folder, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found["captions"] == [0, 1, 2]
        assert "the store lacks rows in front" in found["problems"][0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--num", 3), "--num needs --against"),
            (("--against", "pipeline", "--repair"), "--repair does not go with --against"),
            (("--against", "nowhere"), "--against nowhere: no such folder"),
        ],
    )
    def test_options_that_do_not_fit(self, make, tmp_path, arguments, message):
        path = make("pixart").write(tmp_path / "store")
        result = self.run(path, *arguments)
        assert result.exit_code == 1
        assert message in result.output
