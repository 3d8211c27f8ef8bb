"""semroute.attach: pipelines of diffusers read what a run learned, as the run's network does."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import tiny_runs  # noqa: E402
from tiny_pipelines import run_size  # noqa: E402

import semroute  # noqa: E402
from semroute.trainer.adapters.arguments import ARGUMENTS  # noqa: E402
from semroute.trainer.adapters.families import FAMILIES as KNOWN  # noqa: E402

PRESETS = (
    *("pixart", "sana", "wan", "qwen-image", "lumina2", "z-image", "krea2", "flux2"),
    *("flux2-klein", "hidream", "auraflow", "sd3"),
)
PROMPT, NEGATIVE = "a red cup", "blurry, far away"
WITHOUT_NEGATIVE = ("flux2", "flux2-klein")
"""Pipelines that take no negative prompt; klein guides by an empty one."""
NULL_APART = ("sana", "lumina2")
"""Their negative prompts are put to the LLM in the template of the null caption."""
CONDITIONED = ("flux2", "flux2-klein", "hidream", "sd3")


def load(folder: Path, **options: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, preset: str, prompt: Any = PROMPT, **arguments: Any) -> Any:
    """Latents after two steps, of two images per prompt, with guidance and a negative prompt."""
    given = {"negative_prompt": NEGATIVE, "num_images_per_prompt": 2}
    if preset in WITHOUT_NEGATIVE:
        del given["negative_prompt"]
    if preset == "wan":
        given["num_videos_per_prompt"] = given.pop("num_images_per_prompt")
    size = run_size(preset) | ({"num_frames": 1} if preset == "wan" else {})
    output = pipe(
        prompt=prompt,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **size | given | arguments,
    )
    return output[0]


class Reference:
    """A network that stands in for a pipeline's: a run's own, reading packed features.

    It takes what the pipeline gives its network apart, and looks nothing up in it but which prompt
    each item of the batch has.
    """

    def __init__(self, pipe: Any, preset: str, run: Path, texts: Sequence[str]) -> None:
        opened = semroute.load_run(run)
        self.model, self.family = opened.model, opened.model.family.name
        self.names = ARGUMENTS[self.family]
        self.config = pipe.transformer.config
        self.signature = inspect.signature(type(pipe.transformer).forward)
        record = opened.record
        hidden, self.offsets = tiny_runs.encode(record.features, record.model_source, texts)
        read = self.model.router.layers_read
        self.hidden = hidden[:, [record.features.layers.index(layer) for layer in read]]
        each = [encode_prompt(pipe, preset, text) for text in texts]
        self.known = [self.names.read(one[self.names.embeds], self.config)[0] for one in each]
        self.conditioning = None
        if preset in CONDITIONED:
            if preset == "hidream":
                for one in each:
                    one["prompt_embeds_llama3"] = one["prompt_embeds_llama3"].transpose(0, 1)
            self.conditioning = {name: torch.cat([one[name] for one in each]) for name in each[0]}
            shape = len(texts), len(self.known[0])
            mask = torch.zeros(shape, dtype=torch.bool)
            for item, length in zip(mask, self.offsets.diff().tolist(), strict=True):
                if preset == "flux2":
                    item[-length:] = True  # its tokenizer pads on the left
                else:
                    item[:length] = True
            self.conditioning["mask"] = mask

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any]:
        given = self.signature.bind(None, *args, **kwargs).arguments
        rows = self.names.read(given[self.names.text], self.config)
        caption = torch.tensor([self.find(item) for item in rows])
        t = self.names.read_t(given[self.names.timestep], self.config).expand(len(rows))
        x = self.unpack(given["x" if self.family == "z-image" else "hidden_states"])
        text = self.model.encode_text(self.hidden, self.offsets, caption, t, self.conditioning)
        return (self.pack(self.model.denoise(x, t, text)),)

    def find(self, rows: Any) -> int:
        """Number of the text whose rows these begin with, but for rounding."""
        shared = [min(len(known), len(rows)) for known in self.known]
        apart = [
            (known[:num] - rows[:num]).abs().max().item()
            for known, num in zip(self.known, shared, strict=True)
        ]
        assert min(apart) < 1e-4
        return apart.index(min(apart))

    def unpack(self, x: Any) -> Any:
        if self.family == "wan":
            return x[:, :, 0]
        if self.family == "z-image":
            return torch.stack(x)[:, :, 0]
        if self.family == "flux2":
            return x.mT.unflatten(2, 2 * (round(x.shape[1] ** 0.5),))
        if self.family in ("qwen-image", "krea2"):
            side = round(x.shape[1] ** 0.5)
            patches = x.reshape(len(x), side, side, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return patches.flatten(4).flatten(2, 3)
        return x

    def pack(self, out: Any) -> Any:
        if self.family in ("lumina2", "z-image", "hidream"):
            out = -out
        if self.family == "pixart":
            return torch.cat([out, out], dim=1)  # the second half is the variance
        if self.family == "wan":
            return out[:, :, None]
        if self.family == "z-image":
            return [*out[:, :, None]]
        if self.family == "flux2":
            return out.flatten(2).mT
        if self.family in ("qwen-image", "krea2"):
            batch, channels, height, width = out.shape
            patches = out.view(batch, channels, height // 2, 2, width // 2, 2)
            return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return out


def encode_prompt(pipe: Any, preset: str, text: str) -> dict[str, Any]:
    """What the pipeline's own ``encode_prompt`` gives for a text, by argument of the pipeline."""
    call = inspect.signature(type(pipe).__call__).parameters
    names = inspect.signature(type(pipe).encode_prompt).parameters
    given = {name: call[name].default for name in names if name in call and name != "self"}
    outputs = pipe.encode_prompt(**given | {"prompt": [text]})
    encoded = dict(zip(ARGUMENTS[family_of(preset)].encoded, outputs, strict=True))
    negative = preset in NULL_APART and not text
    return {
        name.removeprefix("negative_"): value
        for name, value in encoded.items()
        if name is not None and name.startswith("negative_") == negative
    }


def family_of(preset: str) -> str:
    return "flux2" if preset == "flux2-klein" else preset


@pytest.fixture
def make_run(
    tiny_pipeline: Callable[[str], Path], tmp_path: Path
) -> Callable[..., tuple[Any, Path]]:
    """Preset, and settings of a run -> its pipeline, freshly loaded, and the run."""

    def make(preset: str, **settings: Any) -> tuple[Any, Path]:
        folder = tiny_pipeline(preset)
        run = tiny_runs.make_run(folder, preset, tmp_path / "run", **settings)
        return load(folder), run

    return make


def parameters_of(network: Any) -> Mapping[str, Any]:
    return {
        name: (id(parameter), parameter.data_ptr(), parameter.requires_grad)
        for name, parameter in network.named_parameters()
    }


def test_every_family_has_arguments() -> None:
    assert {*ARGUMENTS} == {family.name for family in KNOWN}


@pytest.mark.parametrize("preset", PRESETS)
class TestAttach:
    def test_changes_nothing_at_zero_logits(self, preset: str, make_run: Any) -> None:
        pipe, run = make_run(preset, size=0.0)
        latents = sample(pipe, preset)
        assert semroute.attach(pipe, run) is pipe
        assert torch.equal(sample(pipe, preset), latents)

    @pytest.mark.parametrize("strategy", ["depth", "joint"])
    def test_samples_what_the_network_of_the_run_does(
        self, preset: str, strategy: str, make_run: Any
    ) -> None:
        pipe, run = make_run(preset, size=0.3, strategy=strategy)
        plain = sample(pipe, preset)
        null = "" if preset in WITHOUT_NEGATIVE + NULL_APART else NEGATIVE
        given = {} if preset in WITHOUT_NEGATIVE else {"negative_prompt": null}
        reference = Reference(pipe, preset, run, [PROMPT, null])
        if preset == "flux2":
            given["guidance_scale"] = reference.model.guidance  # which its network is told
        semroute.attach(pipe, run)
        latents = sample(pipe, preset, **given)
        semroute.detach(pipe)
        pipe.transformer.forward = reference
        expected = sample(pipe, preset, **given)
        assert (expected - plain).norm() > 5e-3 * plain.norm()
        assert (latents - expected).norm() < 1e-5 * expected.norm()
