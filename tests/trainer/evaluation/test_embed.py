"""semroute embed: prompts encoded where an LLM fits, sampled where none does."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
import tiny_runs  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_pipelines import load_pipeline, run_size  # noqa: E402
from tiny_text_halves import make_text_half  # noqa: E402

import semroute  # noqa: E402
from semroute.cli import cli  # noqa: E402
from semroute.pipeline.models.text_pipelines import open_text_pipeline  # noqa: E402
from semroute.schemas import EmbedsRecord, InputError, ModelIdentity  # noqa: E402
from semroute.trainer.evaluation.embed import embed, read_embeds  # noqa: E402

PRESETS = (
    *("pixart", "sana", "wan", "qwen-image", "lumina2", "z-image", "krea2", "flux2"),
    *("flux2-klein", "hidream", "auraflow", "sd3"),
)
PROMPTS, NEGATIVE = ["a red cup", "a green tree in the snow"], "blurry, far away"
WITHOUT_NEGATIVE = ("flux2", "flux2-klein")
"""Pipelines that take no negative prompt as text."""


def load(folder: Path, *, text: bool = True) -> Any:
    """A pipeline; without tokenizers and text encoders, if asked for."""
    return load_pipeline(folder, without=() if text else ("tokenizer", "text_encoder"))


DEFAULT_NEGATIVE = ("pixart", "sana")
"""Pipelines whose negative prompt is "" by default, which has to make way for embeddings."""


def sample(pipe: Any, preset: str, **arguments: Any) -> Any:
    size = run_size(preset) | ({"num_frames": 1} if preset == "wan" else {})
    if preset in DEFAULT_NEGATIVE:
        size["negative_prompt"] = None
    output = pipe(
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **size | arguments,
    )
    return output[0]


def prompts_of(preset: str) -> dict[str, Any]:
    """Arguments of a pipeline that encodes the prompts itself."""
    if preset in WITHOUT_NEGATIVE:
        return {"prompt": [*PROMPTS]}
    return {"prompt": [*PROMPTS], "negative_prompt": [NEGATIVE] * len(PROMPTS)}


@functools.cache
def plain(folder: Path, preset: str) -> Any:
    """What the pipeline gives by itself."""
    return sample(load(folder), preset, **prompts_of(preset))


def distance(latents: Any, expected: Any) -> float:
    """Norm of a difference, as a part of what is expected."""
    return float((latents - expected).norm() / expected.norm())


@pytest.fixture
def make_run(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """Preset, and settings of a run -> the folder of its pipeline, and the run."""

    def make(preset: str, **settings: Any) -> tuple[Path, Path]:
        folder = tiny_pipeline(preset)
        return folder, tiny_runs.make_run(folder, preset, tmp_path / "run", **settings)

    return make


@pytest.mark.parametrize("preset", PRESETS)
class TestEveryFamily:
    def check(
        self, preset: str, folder: Path, run: Path, file: Path, learned: str, attached: bool
    ) -> None:
        """Embeddings give the latents that the pipeline gives for the prompts themselves."""
        negative = None if preset in WITHOUT_NEGATIVE else NEGATIVE
        record = embed(run, PROMPTS, file, negative=negative).record
        assert (record.learned, record.prompts) == (learned, PROMPTS)
        expected = sample(semroute.attach(load(folder), run), preset, **prompts_of(preset))
        assert distance(plain(folder, preset), expected) > 1e-4
        pipe = load(folder, text=False)
        if attached:
            semroute.attach(pipe, run, embeds=file)
        latents = sample(pipe, preset, **read_embeds(file).given)
        assert distance(latents, expected) < 2e-5

    def test_where_the_input_is_routed(self, preset: str, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run(preset, size=0.3, where="input")
        by_block = preset == "hidream"  # it reads an input per block
        file = tmp_path / "embeds.safetensors"
        learned = "layers" if by_block else "added"
        self.check(preset, folder, run, file, learned, attached=by_block)

    def test_where_blocks_are_routed(self, preset: str, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run(preset, size=0.3, strategy="joint")
        file = tmp_path / "embeds.safetensors"
        self.check(preset, folder, run, file, "layers", attached=True)


SAMPLE = """
import json, sys
import torch
sys.modules["semroute"] = None  # an import would fail
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

for folder, embeds, out, options in json.loads(sys.argv[1]):
    absent = {name: None for name in options.pop("absent")}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    latents = pipe(
        **load_file(embeds),
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **options,
    )[0]
    save_file({"latents": latents}, out)
"""


def test_plain_diffusers_reads_it(tiny_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process without semroute."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    jobs, expected = [], {}
    for preset, model, routing in (
        ("pixart", {}, {"where": "input"}),
        ("krea2", {}, {"where": "taps"}),
        ("flux2-klein", {"train": "fusion"}, {}),
    ):
        folder, place = tiny_pipeline(preset), tmp_path / preset
        run = tiny_runs.make_run(folder, preset, place / "run", size=0.3, model=model, **routing)
        file, out = place / "embeds.safetensors", place / "latents.safetensors"
        negative = [] if preset in WITHOUT_NEGATIVE else ["--negative", NEGATIVE]
        arguments = ["embed", str(run), str(tmp_path / "prompts.txt"), str(file), *negative]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{file}\n"
        options = run_size(preset) | {"absent": ["tokenizer", "text_encoder"]}
        if preset in DEFAULT_NEGATIVE:
            options["negative_prompt"] = None
        jobs.append((str(folder), str(file), str(out), options))
        pipe = semroute.attach(load(folder), run)
        expected[out] = sample(pipe, preset, **prompts_of(preset))
    elsewhere = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", SAMPLE, json.dumps(jobs)]
    subprocess.run(command, check=True, cwd=tmp_path, env=elsewhere)
    for out, latents in expected.items():
        assert distance(load_file(out)["latents"], latents) < 2e-5


class TestPipelines:
    """Prompts for a pipeline that nothing was learned for."""

    @pytest.mark.parametrize("preset", ["sana", "flux2-klein", "krea2"])
    def test_gives_what_the_pipeline_gives_itself(
        self, preset: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder, file = tiny_pipeline(preset), tmp_path / "embeds.safetensors"
        negative = None if preset in WITHOUT_NEGATIVE else NEGATIVE
        embeds = embed(folder, PROMPTS, file, negative=negative)
        assert (embeds.record.step, embeds.record.learned, embeds.usage) == (None, "none", "")
        expected = sample(load(folder), preset, **prompts_of(preset))
        latents = sample(load(folder, text=False), preset, **read_embeds(file).given)
        assert distance(latents, expected) < 2e-5

    @pytest.mark.parametrize(("family", "width"), [("ltx2", 32 * 7), ("cosmos", 32 * 6)])
    def test_networks_that_cannot_be_trained(self, family: str, width: int, tmp_path: Path) -> None:
        folder, file = make_text_half(family, tmp_path), tmp_path / "embeds.safetensors"
        given = embed(folder, PROMPTS, file, negative=NEGATIVE).given
        text = open_text_pipeline(str(folder))
        for number, prompt in enumerate([*PROMPTS, NEGATIVE]):
            name = "prompt_embeds" if number < 2 else "negative_prompt_embeds"
            rows = given[name][number % 2]
            own = text.encode_one(prompt)[name.removeprefix("negative_")]
            mask = given.get(name.replace("embeds", "attention_mask"))
            rows = rows if mask is None else rows[mask[number % 2].bool()]
            assert rows.shape[1] == own.shape[1]
            assert torch.equal(rows[-len(own) :], own)

    def test_options_of_runs_are_refused(
        self, tiny_pipeline: Callable[[str], Path], tmp_path: Path
    ) -> None:
        file = tmp_path / "embeds.safetensors"
        with pytest.raises(InputError, match="is a pipeline: leave out --pipeline, --step"):
            embed(tiny_pipeline("sana"), PROMPTS, file, step=3)
        with pytest.raises(InputError, match="BriaFiboPipeline takes no embeddings"):
            embed(tiny_pipeline("fibo"), PROMPTS, file)


class TestEmbed:
    def test_prompts_may_be_sampled_one_by_one(self, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run("qwen-image", size=0.3)
        file = tmp_path / "embeds.safetensors"
        given = embed(run, PROMPTS, file, negative=NEGATIVE).given
        pipe = semroute.attach(load(folder, text=False), run, embeds=file)
        whole = semroute.attach(load(folder), run)
        for number, prompt in enumerate(PROMPTS):
            one = {name: value[number : number + 1] for name, value in given.items()}
            latents = sample(pipe, "qwen-image", **one)
            expected = sample(whole, "qwen-image", prompt=prompt, negative_prompt=NEGATIVE)
            assert distance(latents, expected) < 2e-5

    def test_weights_of_the_network_come_from_attach(self, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run("pixart", size=0.1, where="input", model={"train": "router+lora"})
        file = tmp_path / "embeds.safetensors"
        embeds = embed(run, PROMPTS, file, negative=NEGATIVE)
        assert (embeds.record.learned, embeds.record.network) == ("added", True)
        assert "semroute.attach(pipe, RUN, embeds=OUT)" in embeds.usage
        pipe = semroute.attach(load(folder, text=False), run, embeds=file)
        latents = sample(pipe, "pixart", **embeds.given)
        expected = sample(semroute.attach(load(folder), run), "pixart", **prompts_of("pixart"))
        assert distance(latents, expected) < 2e-5

    def test_rows_that_nothing_was_learned_about_stay(self, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run("pixart", size=0.1, model={"train": "lora"})
        embeds = embed(run, PROMPTS, tmp_path / "embeds.safetensors")
        assert embeds.record.learned == "none"
        assert embeds.record.negative == ""
        pipe = load(folder)
        with torch.no_grad():
            plain = pipe.encode_prompt([*PROMPTS], negative_prompt="")
        assert distance(embeds.given["prompt_embeds"], plain[0]) < 1e-6
        assert torch.equal(embeds.given["prompt_attention_mask"], plain[1])

    def test_names_are_those_of_the_pipeline(self, make_run: Any, tmp_path: Path) -> None:
        _, run = make_run("krea2", size=0.3, where="taps")
        file = tmp_path / "embeds.safetensors"
        embed(run, PROMPTS, file, negative=NEGATIVE)
        shapes = {name: [*value.shape] for name, value in load_file(file).items()}
        assert shapes == {
            "prompt_embeds": [2, 512, 3, 32],
            "prompt_embeds_mask": [2, 512],
            "negative_prompt_embeds": [2, 512, 3, 32],
            "negative_prompt_embeds_mask": [2, 512],
        }
        with safe_open(file, "pt") as opened:
            record = json.loads(opened.metadata()["semroute"])
        assert record["prompts"] == PROMPTS
        assert record["pipeline"] == "Krea2Pipeline"

    def test_refuses_what_does_not_fit(
        self, make_run: Any, tiny_pipeline: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder, run = make_run("flux2-klein", size=0.3, where="taps")
        file = tmp_path / "embeds.safetensors"
        with pytest.raises(InputError, match="no prompts"):
            embed(run, [], file)
        with pytest.raises(InputError, match=r"let it end in \.safetensors"):
            embed(run, PROMPTS, tmp_path / "embeds.pt")
        with pytest.raises(InputError, match="is a SanaPipeline, but"):
            embed(run, PROMPTS, file, pipeline=str(tiny_pipeline("sana")))
        with pytest.raises(InputError, match="is not the LLM"):
            embed(run, PROMPTS, file, pipeline=str(tiny_pipeline("flux2")))
        assert not file.exists()
        embed(run, PROMPTS, file, pipeline=str(folder))
        with pytest.raises(InputError, match=r"hold all that .* learned"):
            semroute.attach(load(folder, text=False), run, embeds=file)

    def test_refuses_a_negative_prompt_that_is_not_taken(
        self, make_run: Any, tmp_path: Path
    ) -> None:
        _, run = make_run("flux2", size=0.3, where="taps")
        with pytest.raises(InputError, match="Flux2Pipeline takes no negative prompt"):
            embed(run, PROMPTS, tmp_path / "embeds.safetensors", negative=NEGATIVE)

    def test_refuses_files_of_others(self, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run("pixart", size=0.3)
        pipe = load(folder, text=False)
        with pytest.raises(InputError, match="has no text_encoder"):
            semroute.attach(pipe, run)
        with pytest.raises(InputError, match="holds no embeddings"):
            semroute.attach(pipe, run, embeds=tmp_path / "none.safetensors")
        save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="not a file of semroute embed"):
            semroute.attach(pipe, run, embeds=tmp_path / "other.safetensors")
        file = tmp_path / "embeds.safetensors"
        embed(run, PROMPTS, file)
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            record = json.loads(opened.metadata()["semroute"])
        record["model"]["width"] = 64
        save_file(tensors, file, {"semroute": json.dumps(record)})
        with pytest.raises(InputError, match=r"not for .*\n.*width: 64 instead of 32"):
            semroute.attach(pipe, run, embeds=file)

    def test_prompts_that_the_file_does_not_hold(self, make_run: Any, tmp_path: Path) -> None:
        folder, run = make_run("pixart", size=0.3)
        file, other = tmp_path / "embeds.safetensors", tmp_path / "other.safetensors"
        embed(run, PROMPTS, file)
        pipe = semroute.attach(load(folder, text=False), run, embeds=file)
        with pytest.raises(InputError, match=r"rows of text .* are not known"):
            sample(pipe, "pixart", **embed(run, ["a bird"], other).given)


def test_embeddings_that_are_damaged(tmp_path: Path) -> None:
    """Whoever gave the file: its texts and numbers end in a message that names it."""
    model = ModelIdentity(architecture="llama", num_layers=2, width=4, files={})
    record = {
        **{"pipeline": "P", "model": model.model_dump(), "base_layers": [1], "prompts": ["a"]},
        **{"negative": "", "learned": "none", "layers": [], "network": False, "step": None},
        "weights": None,
    }
    sound = EmbedsRecord.model_validate(record).model_dump_json()
    rows, file = torch.zeros(3, 1, 4), tmp_path / "embeds.safetensors"
    hidden, offsets = "semroute.hidden", "semroute.offsets"
    save_file({hidden: rows, offsets: torch.tensor([0, 1, 3])}, file, {"semroute": sound})
    assert [len(part) for part in read_embeds(file).hidden] == [1, 2]
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert read_embeds(link).hidden[1].shape == (2, 1, 4)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="is a named pipe"):
        read_embeds(tmp_path / "pipe.safetensors")
    for text in ("", "{", "[" * 50_000, "[]", '{"a": 1, "a": 1}', sound.replace("null", "NaN")):
        save_file({"prompt_embeds": rows}, file, {"semroute": text})
        with pytest.raises(InputError, match=r"embeds\.safetensors"):
            read_embeds(file)
    for tensors in (
        {hidden: rows},
        {offsets: torch.tensor([0, 3])},
        *({hidden: rows, offsets: torch.tensor(each)} for each in ([0, 4], [1, 3], [0, 4, 3], [])),
        *({hidden: rows, offsets: torch.tensor(each)} for each in (3, [[0, 3]], [0.0, 3.0])),
        *({f"prompt_embeds.{number}": rows} for number in ("x", "-1", "\u0661", "9" * 5000, "")),
        {"prompt_embeds": rows, "prompt_embeds.0": rows.clone()},
    ):
        save_file(tensors, file, {"semroute": sound})
        with pytest.raises(InputError, match=r"embeds\.safetensors is damaged"):
            read_embeds(file)
