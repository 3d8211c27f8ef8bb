"""``semroute estimate --for PIPELINE``: what networks read, and the bytes of stores for them."""

import json
import shutil
from typing import get_args

import pyarrow as pa
import pyarrow.parquet
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from click.testing import CliRunner
from tiny_pipelines import FAMILIES
from tiny_text_encoders import WIDTH

from semroute.cli import cli
from semroute.pipeline.extraction.features import extract
from semroute.pipeline.text.presets import PRESETS
from semroute.schemas import CodecName
from semroute.schemas.units import format_bytes

TEXTS = [f"a {colour} cup on a table" for colour in ("red", "green", "blue", "black")]
BASE = {"krea2": (1, 3, 5), "hidream": (1, 3, 5, 6)}
"""Layers that the tiny networks read by their configuration."""


@pytest.fixture
def captions(tmp_path):
    file = tmp_path / "captions.parquet"
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), file)
    return file


def estimate(*options, code=0):
    result = CliRunner().invoke(cli, ["estimate", *map(str, options)])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_pipeline_reads(family, tiny_pipeline, captions, tmp_path):
    """From its configuration alone: no weights are there."""
    folder = shutil.copytree(
        tiny_pipeline(family), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")
    )
    details = json.loads(estimate(captions, "--for", folder, "--json"))
    found, preset = details["pipeline"], PRESETS[family]
    base = BASE.get(family) or preset.base_layers(details["num_layers"])
    assert found["template"] == family
    assert found["class"] in preset.pipelines
    assert found["base_layers"] == [*base]
    rows = preset.length if preset.reads_padding else details["tokens"] / 5
    others = {
        "sd3": 77 * WIDTH + 8 + 16,
        "hidream": 128 * WIDTH + 16 + 16,
    }.get(family, 0)
    bytes_per_caption = 2 * (rows * len(base) * WIDTH + others)
    assert found["conditioning_bytes_a_caption"] == pytest.approx(bytes_per_caption)
    needed = {"sd3", "flux2", "flux2-klein", "hidream"}
    assert found["conditioning_needed"] == (family in needed)
    exact = {store["codec"]: store["exact_layers"] for store in details["stores"][:4]}
    kept = sorted(base) if len(base) < len(details["stores"][0]["layers"]) else []
    assert exact == {"bf16": [], "lossless": [], "delta": kept, "linear": kept}


def test_people_are_told(tiny_pipeline, captions):
    text = estimate(captions, "--for", tiny_pipeline("flux2-klein"))
    assert "Flux2KleinPipeline, --template flux2-klein: reads layers 9, 18, 27; at most 512" in text
    size = format_bytes(2 * 512 * 3 * WIDTH)
    assert f"needed: it reads rows of padding; {size} per caption" in text
    assert "flux2-klein/text_encoder (qwen3" in text
    assert "bytes per caption for Flux2KleinPipeline, on average" in text
    lines = [line for line in text.splitlines() if " exact " in line]
    assert [line.split()[0] for line in lines] == [*get_args(CodecName)]
    text = estimate(captions, "--for", tiny_pipeline("pixart"), "--exact-layers", "none")
    assert "not needed: its own rows are those of the features" in text
    assert text.count("with the codec's error") == 3


def test_sizes_are_those_of_stores_with_exact_layers(tiny_pipeline, captions, tmp_path):
    folder = tiny_pipeline("z-image")
    options = ["--codec", "delta", "--exact-layers", "1-5", "--json"]
    model = folder / "text_encoder"
    details = json.loads(estimate(captions, "--for", folder, *options))
    store = extract(
        str(captions), tmp_path / "store", model=str(model), template="z-image", workers=0,
        codec="delta", exact_layers="1-5", report=str,
    )  # fmt: skip
    assert store.manifest.layout.num_rows == details["tokens"]
    assert details["stores"][0]["exact_layers"] == [1, 2, 3, 4, 5]
    without = json.loads(estimate(captions, "--for", folder, "--codec", "delta",
                                  "--exact-layers", "none", "--json"))  # fmt: skip
    added = details["stores"][0]["bytes"] - without["stores"][0]["bytes"]
    (file,) = (f for f in (store.path / "hidden.zarr/exact/c").rglob("*") if f.is_file())
    exact = file.stat().st_size
    assert added == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "bos"], "--template is that of the pipeline: leave it out with --for"),
        (["--probe"], "--probe runs the LLM: name it with --model and --template"),
    ],
)
def test_options_that_contradict_the_pipeline_are_refused(
    options, message, tiny_pipeline, captions
):
    assert message in estimate(captions, "--for", tiny_pipeline("sana"), *options, code=1)


def test_what_is_no_known_pipeline_is_refused(tiny_pipeline, captions, tmp_path):
    assert "Missing option --model" in estimate(captions, code=2)
    assert "no such folder, and not a hub id" in estimate(captions, "--for", "nothing", code=1)
    assert "no model_index.json there; expected a pipeline" in estimate(
        captions, "--for", tmp_path, code=1
    )
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    output = estimate(captions, "--for", tmp_path, code=1)
    assert "no preset for FluxPipeline; expected one of AuraFlowPipeline, BriaFibo" in output
    folder = shutil.copytree(tiny_pipeline("hidream"), tmp_path / "without")
    (folder / "vae" / "config.json").write_text("[1]")
    assert "config.json is not the configuration" in estimate(captions, "--for", folder, code=1)
    (folder / "vae" / "config.json").unlink()
    shutil.rmtree(folder / "text_encoder_4")
    output = estimate(captions, "--for", folder, code=1)
    assert "has no text_encoder_4: name the LLM that the pipeline is run with by --model" in output
    model = tiny_pipeline("hidream") / "text_encoder_4"
    assert "llama" in estimate(captions, "--for", folder, "--model", model)
