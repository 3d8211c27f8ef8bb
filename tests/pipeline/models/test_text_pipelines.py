import fnmatch
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from tiny_pipelines import FAMILIES, run_size  # noqa: E402
from tiny_text_halves import VIDEO_FAMILIES, make_text_half  # noqa: E402

from semroute.pipeline.models.text_pipelines import (  # noqa: E402
    TextPipeline,
    find_text_pipeline,
    open_text_pipeline,
)
from semroute.pipeline.models.text_recipes import RECIPES  # noqa: E402
from semroute.schemas import MASK, InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("short_padding")
TEXTS = ["", "a red cup", "two Green dogs on a very long table"]


@pytest.fixture(scope="module", params=[*FAMILIES, *VIDEO_FAMILIES])
def pipeline(request, tiny_pipeline, tmp_path_factory):
    family = request.param
    if family in VIDEO_FAMILIES:
        return make_text_half(family, tmp_path_factory.mktemp(family)), family
    return tiny_pipeline(family), family


@pytest.fixture(scope="module")
def opened(pipeline, short_padding):
    folder, _ = pipeline
    return open_text_pipeline(str(folder))


@pytest.fixture(scope="module")
def encoded(opened):
    return opened.encode(TEXTS)


@pytest.fixture
def pixart(tiny_pipeline):
    return tiny_pipeline("pixart")


def inputs_of_transformer(folder, family, text):
    """All tensors that a pipeline's transformer is called with, with guidance and "" as negative
    prompt where the pipeline has them."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def keep(value):
        if torch.is_tensor(value):
            seen.append(value.detach().clone())
        elif isinstance(value, (list, tuple)):
            for each in value:
                keep(each)

    def record(_module, args, kwargs):
        keep(args)
        keep([*kwargs.values()])

    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    options = {
        "prompt": text,
        "num_inference_steps": 2,
        "output_type": "latent",
        **run_size(family),
    }
    if family == "qwen-image":
        options["negative_prompt"] = ""
    pipe(**options)
    return seen


def rows_of(tensors, width):
    """Every vector of so many values in tensors, as bytes."""
    fitting = [t for t in tensors if t.ndim > 1 and t.shape[-1] == width and t.is_floating_point()]
    return {row.tobytes() for t in fitting for row in t.reshape(-1, width).float().numpy()}


def num_blocks(folder):
    config = json.loads((folder / "transformer/config.json").read_text())
    return config["num_layers"] + config["num_single_layers"]


def test_every_family_has_a_recipe(opened, pipeline):
    assert opened.recipe.family == pipeline[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_is_given_what_encode_returns(
    family, tiny_pipeline, short_padding, monkeypatch
):
    monkeypatch.setitem(RECIPES, short_padding.pipeline, short_padding)
    folder = tiny_pipeline(family)
    opened = open_text_pipeline(str(folder))
    encoded = opened.encode(TEXTS[:2])
    inputs = inputs_of_transformer(folder, family, TEXTS[1])
    guided = family not in ("flux2", "ideogram4")  # no negative prompt reaches these transformers
    for number in (0, 1) if guided else (1,):
        for name, values in encoded.items():
            if name == MASK:
                continue
            caption = values[number]
            if not opened.recipe.reads_padding:
                caption = caption[encoded[MASK][number]]
            if name == "prompt_layers":  # FIBO's transformer takes as many as it has blocks
                caption = caption[:, -num_blocks(folder) :]
            vectors = caption.reshape(-1, values.shape[-1]).float().numpy()
            there = rows_of(inputs, values.shape[-1])
            missing = [n for n, row in enumerate(vectors) if row.tobytes() not in there]
            assert missing == [], (family, name, number)


def test_a_caption_does_not_depend_on_others(opened, encoded):
    (alone,) = (opened.encode([text]) for text in TEXTS[1:2])
    for name, values in alone.items():
        whole = encoded[name][1]
        assert torch.equal(values[0], whole[: len(values[0])]), name
        assert not whole[len(values[0]) :].any()


def test_rows_are_the_captions_own_tokens(opened, encoded):
    for number, text in enumerate(TEXTS):
        rows, tokens = opened.rows(encoded, number), opened.tokens(text)
        assert rows.shape == (len(tokens), len(opened.base_layers), opened.width)
        assert encoded[MASK][number].sum() == len(tokens) > 0
        words = opened.tokenizer.decode(tokens).lower().replace(" ", "")
        assert text.lower().replace(" ", "") in words


@pytest.mark.parametrize("family", ["pixart", "sana", "wan", "lumina2", "hidream", "auraflow"])
def test_rows_are_hidden_states_of_the_base_layers(family, tiny_pipeline):
    """Of the LLM run on the tokens alone; other families give their LLM positions or no mask."""
    text = open_text_pipeline(str(tiny_pipeline(family)))
    folder = text.source.folder / text.recipe.encoder
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    llm = getattr(transformers, name).from_pretrained(folder)
    tokens = torch.from_numpy(text.sequence(TEXTS[1]))[None]
    states = llm(tokens, output_hidden_states=True).hidden_states
    rows = text.rows(text.encode(TEXTS[1:2]), 0)
    for tap, layer in enumerate(text.base_layers):
        torch.testing.assert_close(rows[-1, tap], states[layer][0, -1], rtol=1e-4, atol=1e-4)


def test_standardized_layers(tmp_path):
    """Cosmos: each layer has mean 0 and deviation 1 in every row."""
    text = open_text_pipeline(str(make_text_half("cosmos", tmp_path)))
    encoded = text.encode(["a red cup"])
    rows = text.rows(encoded, 0)
    assert rows.mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(rows.std(-1), torch.ones(rows.shape[:2]), rtol=0, atol=1e-5)
    assert encoded["prompt_embeds"].shape == (1, 512, len(text.base_layers) * text.width)
    assert text.attends_padding


def test_weights_are_not_needed_for_tokens(pipeline, monkeypatch):
    folder, _ = pipeline
    text = TextPipeline(find_text_pipeline(str(folder)))
    monkeypatch.setattr(TextPipeline, "pipe", property(lambda _: pytest.fail("weights loaded")))
    assert len(text.tokens("a cup")) > 0


def test_half_precision_runs(pipeline):
    folder, _ = pipeline
    text = open_text_pipeline(str(folder), dtype="bfloat16")
    rows = text.rows(text.encode(["a cup"]), 0)
    assert rows.float().isfinite().all()
    assert rows.dtype == (torch.float32 if text.recipe.family == "ideogram4" else torch.bfloat16)


class TestFinding:
    def test_files_name_text_encoders_and_tokenizers_alone(self, pipeline):
        folder, _ = pipeline
        files = find_text_pipeline(str(folder)).files
        parts = {name.partition("/")[0] for name in files}
        assert all(part.startswith(("text_encoder", "tokenizer")) for part in parts)
        assert {p for p in parts if p.startswith("text_encoder")}
        assert all(len(sha) == 64 for sha in files.values())

    def test_only_the_text_half_is_downloaded(self, pixart, tmp_path, monkeypatch):
        asked = []

        def download(hub_id, revision, allow_patterns):
            asked.append((hub_id, revision))
            target = tmp_path / "0123456789abcdef"
            for file in (f for f in pixart.rglob("*") if f.is_file()):
                name = str(file.relative_to(pixart))
                if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target / name)
            return str(target)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        text = open_text_pipeline("org/pixart@main")
        assert text.source.name == "org/pixart@0123456789abcdef"
        assert asked == [("org/pixart", "main"), ("org/pixart", "0123456789abcdef")]
        assert not {f.parent.name for f in Path(text.source.folder).rglob("*")} & {
            "transformer",
            "vae",
            "scheduler",
        }
        local = open_text_pipeline(str(pixart))
        assert text.source.files == local.source.files
        assert torch.equal(text.encode(["a cup"])[MASK], local.encode(["a cup"])[MASK])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"_class_name": "FluxPipeline"}, "its class is FluxPipeline; expected one of PixArt"),
            ({"_class_name": ["pipeline", "Mine"]}, "expected one of"),
            ({"text_encoder": ["my_code", "Encoder"]}, "code of a pipeline is not run"),
        ],
    )
    def test_pipelines_of_others_are_refused(self, pixart, tmp_path, change, message):
        folder = shutil.copytree(pixart, tmp_path / "pipeline")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(InputError, match=message):
            open_text_pipeline(str(folder))

    def test_a_pipeline_without_its_llm_is_refused(self, tiny_pipeline, tmp_path):
        """As HiDream is on the Hub, where Llama is not part of it."""
        folder = shutil.copytree(tiny_pipeline("hidream"), tmp_path / "pipeline")
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"text_encoder_4": [None, None], "tokenizer_4": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="has no text_encoder_4 and no tokenizer_4, the LLM"):
            open_text_pipeline(str(folder))

    def test_weights_that_would_be_unpickled_are_refused(self, pixart, tmp_path):
        folder = shutil.copytree(pixart, tmp_path / "pipeline")
        weights = folder / "text_encoder/model.safetensors"
        weights.rename(weights.with_name("pytorch_model.bin"))
        with pytest.raises(InputError, match=r"no model\.safetensors"):
            open_text_pipeline(str(folder))

    @pytest.mark.parametrize("name", ["nowhere", "model.gguf", "https://huggingface.co/org/name"])
    def test_other_names_are_refused(self, name):
        with pytest.raises(InputError, match="no such folder, and not a hub id"):
            open_text_pipeline(name)

    def test_a_folder_without_an_index_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="no model_index"):
            open_text_pipeline(str(tmp_path))
        (tmp_path / "model_index.json").write_text("[")
        with pytest.raises(InputError, match="is not JSON"):
            open_text_pipeline(str(tmp_path))

    def test_an_llm_of_too_few_layers_is_refused(self, tiny_pipeline, tmp_path):
        folder = shutil.copytree(tiny_pipeline("krea2"), tmp_path / "krea2")
        index = json.loads((folder / "model_index.json").read_text())
        index["text_encoder_select_layers"] = [1, 3, 7]
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="reads layer 7, but the LLM in text_encoder has 6"):
            open_text_pipeline(str(folder))


def test_recipes_name_classes_and_outputs_of_diffusers():
    for recipe in RECIPES.values():
        found = getattr(diffusers, recipe.pipeline)
        assert callable(found.encode_prompt)
        assert recipe.tapped is None or callable(getattr(found, recipe.tapped))


def test_views_of_rows_agree():
    recipes = {recipe.order: recipe for recipe in RECIPES.values()}
    layers = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # rows, layers, channels
    stored = {
        "stacked": layers,
        "side by side": layers.reshape(2, 12),
        "interleaved": layers.transpose(0, 2, 1).reshape(2, 12),
    }
    for order, rows in stored.items():
        viewed = recipes[order].view(torch.from_numpy(rows.copy()), 3)
        assert np.array_equal(viewed.numpy(), layers), order
