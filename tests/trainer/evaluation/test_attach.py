"""semroute.attach: pipelines of diffusers read what a run learned, as the run's network does."""

import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
import tiny_runs  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_pipelines import load_pipeline, run_size  # noqa: E402

import semroute  # noqa: E402
from semroute.pipeline.models.text_pipelines import open_text_pipeline  # noqa: E402
from semroute.schemas import InputError  # noqa: E402
from semroute.trainer.adapters.arguments import ARGUMENTS  # noqa: E402
from semroute.trainer.adapters.families import FAMILIES as KNOWN  # noqa: E402
from semroute.trainer.runs.checkpoint import describe_file  # noqa: E402

PRESETS = (
    *("pixart", "sana", "wan", "qwen-image", "lumina2", "z-image", "krea2", "flux2"),
    *("flux2-klein", "hidream", "auraflow", "sd3", "ideogram4", "fibo"),
)
PROMPT, NEGATIVE = "a red cup", "blurry, far away"
WITHOUT_NEGATIVE = ("flux2", "flux2-klein", "ideogram4")
"""Pipelines that take no negative prompt; klein guides by an empty one."""
NULL_APART = ("sana", "lumina2")
"""Their negative prompts are put to the LLM in the template of the null caption."""


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


@functools.cache
def sample_plain(folder: str, preset: str, **arguments: Any) -> Any:
    """What a pipeline gives that nothing was ever attached to."""
    return sample(load_pipeline(folder), preset, **arguments)


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
        each = [encode_prompt(pipe.config._name_or_path, preset, text) for text in texts]
        rows = [self.read_encoded(one) for one in each]
        self.known = [self.names.read(one, self.config)[0] for one in rows]
        self.conditioning = None
        if opened.model.family.needs_conditioning:
            self.conditioning = open_text_pipeline(record.config.model.pretrained).encode(texts)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any]:
        given = self.signature.bind(None, *args, **kwargs).arguments
        rows = self.names.read(given[self.names.text], self.config)
        caption = torch.tensor([self.find(item) for item in rows])
        t = self.names.read_t(given[self.names.timestep], self.config).expand(len(rows))
        x = self.unpack(given["x" if self.family == "z-image" else "hidden_states"])
        text = self.model.encode_text(self.hidden, self.offsets, caption, t, self.conditioning)
        return (self.pack(self.model.denoise(x, t, text)),)

    def read_encoded(self, encoded: dict[str, Any]) -> Any:
        """What of it the network is given."""
        if self.family != "fibo":
            return encoded[self.names.embeds]
        layers = encoded["prompt_layers"]  # one per block: the last ones, or the last one again
        missing = self.model.depth - len(layers)
        return layers[-self.model.depth :] + layers[-1:] * max(missing, 0)

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
        if self.family == "ideogram4":
            x = x[:, len(self.known[0]) :]
        if self.family in ("flux2", "ideogram4", "fibo"):
            return x.mT.unflatten(2, 2 * (round(x.shape[1] ** 0.5),))
        if self.family in ("qwen-image", "krea2"):
            side = round(x.shape[1] ** 0.5)
            patches = x.reshape(len(x), side, side, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return patches.flatten(4).flatten(2, 3)
        return x

    def pack(self, out: Any) -> Any:
        if self.family in ("lumina2", "z-image", "hidream", "ideogram4"):
            out = -out
        if self.family == "pixart":
            return torch.cat([out, out], dim=1)  # the second half is the variance
        if self.family == "wan":
            return out[:, :, None]
        if self.family == "z-image":
            return [*out[:, :, None]]
        if self.family in ("flux2", "fibo"):
            return out.flatten(2).mT
        if self.family == "ideogram4":  # behind the text
            return torch.nn.functional.pad(out.flatten(2).mT, (0, 0, len(self.known[0]), 0))
        if self.family in ("qwen-image", "krea2"):
            batch, channels, height, width = out.shape
            patches = out.view(batch, channels, height // 2, 2, width // 2, 2)
            return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return out


@functools.cache
def encode_prompt(folder: str, preset: str, text: str) -> dict[str, Any]:
    """What the pipeline's own ``encode_prompt`` gives for a text, by argument of the pipeline."""
    pipe = load_pipeline(folder)
    call = inspect.signature(type(pipe).__call__).parameters
    names = inspect.signature(type(pipe).encode_prompt).parameters
    given = {name: call[name].default for name in names if name in call and name != "self"}
    if "grid_h" in names:  # without an image
        size = {"grid_h": 0, "grid_w": 0, "device": pipe.device}
        given |= size | {"max_sequence_length": run_size(preset)["max_sequence_length"]}
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
        return load_pipeline(folder), run

    return make


def write_again(file: Path, tensors: Mapping[str, Any]) -> None:
    """Write other tensors into a checkpoint, with their checksums."""
    save_file(dict(tensors), file)
    checksums = file.with_name("checksums.json")
    document = json.loads(checksums.read_text())
    document["files"][file.name] = describe_file(file).model_dump()
    checksums.write_text(json.dumps(document))


def state_of(network: Any) -> Mapping[str, Any]:
    """Which tensors a network has, their gradients, and hooks on its modules."""
    tensors = {
        name: (id(each), each.data_ptr(), each.requires_grad)
        for name, each in network.state_dict(keep_vars=True).items()
    }
    hooks = {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in network.named_modules()
    }
    attributes = {  # but the one that some pipelines set when they are first called
        f"{name}.": sorted(vars(module).keys() - {"_diffusers_hook"})
        for name, module in network.named_modules()
    }
    return tensors | hooks | attributes


def distance(latents: Any, expected: Any) -> float:
    """Norm of a difference, as a part of what is expected."""
    return float((latents.float() - expected.float()).norm() / expected.float().norm())


def test_every_family_has_arguments() -> None:
    assert {*ARGUMENTS} == {family.name for family in KNOWN}


@pytest.mark.parametrize("preset", PRESETS)
class TestEveryFamily:
    def test_changes_nothing_at_zero_logits(self, preset: str, make_run: Any) -> None:
        pipe, run = make_run(preset, size=0.0)
        plain = sample_plain(pipe.config._name_or_path, preset)
        assert semroute.attach(pipe, run) is pipe
        assert torch.equal(sample(pipe, preset), plain)

    def test_samples_what_the_network_of_the_run_does(self, preset: str, make_run: Any) -> None:
        """With weights that depend on t, as the harder case; others are tried below."""
        pipe, run = make_run(preset, size=0.3, strategy="joint")
        check_against_run(pipe, preset, run, least=5e-3)


@pytest.mark.parametrize("preset", ["sana", "qwen-image", "lumina2", "flux2", "fibo"])
def test_runs_in_bfloat16(preset: str, make_run: Any) -> None:
    """A network of each kind of sockets."""
    _, run = make_run(preset, size=0.3)
    folder = semroute.load_run(run).record.config.model.pretrained
    exact = load_pipeline(folder)
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    error = distance(sample(pipe, preset), sample(exact, preset))
    for each in (pipe, exact):
        semroute.attach(each, run)
    assert pipe.transformer.dtype == torch.bfloat16
    assert distance(sample(pipe, preset), sample(exact, preset)) < 3 * error


def check_against_run(pipe: Any, preset: str, run: Path, least: float) -> None:
    """Latents of a pipeline that a run is attached to are those of the run's own network; and
    differ from the pipeline's by a part of at least ``least``."""
    null = "" if preset in WITHOUT_NEGATIVE + NULL_APART else NEGATIVE
    given: dict[str, Any] = {"negative_prompt": null} if preset in NULL_APART else {}
    reference = Reference(pipe, preset, run, [PROMPT, null])
    if preset == "flux2":
        given["guidance_scale"] = reference.model.guidance  # which its network is told
    plain = sample_plain(pipe.config._name_or_path, preset, **given)
    before = state_of(pipe.transformer)
    latents = sample(semroute.attach(pipe, run), preset, **given)
    assert semroute.detach(pipe) is pipe
    assert state_of(pipe.transformer) == before
    assert torch.equal(sample(pipe, preset, **given), plain)
    pipe.transformer.forward = reference
    expected = sample(pipe, preset, **given)
    assert distance(expected, plain) > least
    assert distance(latents, expected) < 1e-5


@pytest.mark.parametrize(
    ("preset", "train", "routing"),
    [
        ("pixart", "gain", {"where": "input"}),
        ("krea2", "gain", {}),
        ("pixart", "lora", {}),
        ("hidream", "router+lora", {}),
        ("qwen-image", "router+lora", {"where": "input", "strategy": "token"}),
        ("lumina2", "router+projection", {"strategy": "static"}),
        ("wan", "full", {}),
        ("krea2", "fusion", {}),
        ("flux2-klein", "fusion", {}),
        ("ideogram4", "fusion", {}),
        ("ideogram4", "router", {"where": "input", "strategy": "token"}),
        ("flux2-klein", "router", {"where": "taps"}),
        ("krea2", "router", {"where": "taps", "strategy": "joint"}),
        ("sd3", "router", {"where": "input"}),
        ("z-image", "router", {"where": "input", "strategy": "time"}),
        ("hidream", "router", {"where": "input"}),
        ("sana", "router", {"weights": "softmax", "top_k": 2}),
    ],
)
def test_all_that_a_run_trains(
    preset: str, train: str, routing: Mapping[str, Any], make_run: Any
) -> None:
    pipe, run = make_run(preset, size=0.1, model={"train": train}, **routing)
    check_against_run(pipe, preset, run, least=1e-4)


class TestAttach:
    def test_reads_the_step_and_weights_that_are_asked_for(self, make_run: Any) -> None:
        pipe, run = make_run("pixart", size=0.3)
        with pytest.raises(InputError, match=r"no checkpoint of step 7; it has \[1\]"):
            semroute.attach(pipe, run, step=7)
        (weights,) = run.glob("checkpoints/*/model.safetensors")
        write_again(weights, {n: torch.zeros_like(v) for n, v in load_file(weights).items()})
        plain = sample(pipe, "pixart")
        averaged = sample(semroute.attach(pipe, run), "pixart")
        assert not torch.equal(averaged, plain)
        semroute.detach(pipe)
        assert torch.equal(sample(semroute.attach(pipe, run, "model"), "pixart"), plain)

    @pytest.mark.parametrize("train", ["router", "router+lora", "router+projection", "full"])
    def test_the_dtype_may_change(self, train: str, make_run: Any) -> None:
        pipe, run = make_run("pixart", size=0.1, model={"train": train})
        semroute.attach(pipe, run)
        routed = sample(pipe.to(torch.bfloat16), "pixart")
        assert {each.dtype for each in pipe.transformer.parameters()} == {torch.bfloat16}
        semroute.detach(pipe)
        plain = sample(pipe, "pixart")
        assert {each.dtype for each in pipe.transformer.parameters()} == {torch.bfloat16}
        assert not torch.equal(routed, plain)
        assert torch.equal(sample(semroute.attach(pipe, run), "pixart"), routed)
        never_attached = load_pipeline(pipe.config._name_or_path).to(torch.bfloat16)
        assert torch.equal(sample(never_attached, "pixart"), plain)

    @pytest.mark.parametrize("preset", ["sana", "z-image"])
    def test_each_prompt_of_a_batch_is_its_own(self, preset: str, make_run: Any) -> None:
        pipe, run = make_run(preset, size=0.3)
        semroute.attach(pipe, run)
        prompts = [PROMPT, "a green tree in the snow, seen from far above"]
        given: dict[str, Any] = {"num_images_per_prompt": 1}
        together = sample(pipe, preset, [*prompts], negative_prompt=[NEGATIVE, ""], **given)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for number, (prompt, negative) in enumerate(zip(prompts, [NEGATIVE, ""], strict=True)):
            one = slice(number, number + 1)
            alone = sample(
                pipe, preset, prompt, negative_prompt=negative, latents=noise[one], **given
            )
            assert distance(alone, together[one]) < 1e-4

    def test_reads_embeddings_that_the_pipeline_encoded(self, make_run: Any) -> None:
        pipe, run = make_run("pixart", size=0.3)
        semroute.attach(pipe, run)
        expected = sample(pipe, "pixart")
        encoded = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
        given = dict(zip(ARGUMENTS["pixart"].encoded, encoded, strict=True))
        given |= {"prompt": None, "negative_prompt": None}
        assert distance(sample(pipe, "pixart", **given), expected) < 1e-6
        given["negative_prompt_embeds"] = torch.zeros_like(given["negative_prompt_embeds"])
        assert sample(pipe, "pixart", **given).isfinite().all()

    def test_refuses_embeddings_from_elsewhere(self, make_run: Any) -> None:
        pipe, run = make_run("pixart", size=0.3)
        encoded = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
        given = dict(zip(ARGUMENTS["pixart"].encoded, encoded, strict=True))
        given |= {"prompt": None, "negative_prompt": None}
        plain = sample(pipe, "pixart", **given)
        semroute.attach(pipe, run)
        with pytest.raises(InputError, match=r"1,200 of 1,200 rows .* semroute embed"):
            sample(pipe, "pixart", **given)
        given["prompt_embeds"], *_ = pipe.encode_prompt(PROMPT)
        with pytest.raises(InputError, match=r"600 of 1,200 rows .* semroute embed"):
            sample(pipe, "pixart", **given)
        semroute.detach(pipe)
        assert torch.equal(sample(pipe, "pixart", **given), plain)

    def test_leaves_the_text_encoder_as_it_is(self, make_run: Any) -> None:
        pipe, run = make_run("krea2", size=0.3)
        plain = pipe.encode_prompt([PROMPT])
        before = state_of(pipe.text_encoder)
        semroute.attach(pipe, run)
        assert all(map(torch.equal, pipe.encode_prompt([PROMPT]), plain))
        semroute.detach(pipe)
        assert state_of(pipe.text_encoder) == before

    def test_blocks_of_the_text_encoder_that_nobody_reads_may_be_missing(
        self, make_run: Any
    ) -> None:
        layers = [5, 9, 18]
        pipe, run = make_run("flux2-klein", size=0.3, layers=layers, model={"base_layers": layers})
        read = {"text_encoder_out_layers": tuple(layers)}
        whole = sample(semroute.attach(pipe, run), "flux2-klein", **read)
        semroute.detach(pipe)
        tower = pipe.text_encoder.model
        tower.layers = tower.layers[:20]
        tower.config.num_hidden_layers = 20
        assert torch.equal(sample(semroute.attach(pipe, run), "flux2-klein", **read), whole)
        with pytest.raises(InputError, match=r"rows of text .* are not known"):
            sample(pipe, "flux2-klein", text_encoder_out_layers=(4, 9, 18))
        semroute.detach(pipe)
        tower.layers = tower.layers[:17]
        with pytest.raises(InputError, match="num_layers: 17 instead of 28"):
            semroute.attach(pipe, run)

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
    @pytest.mark.parametrize("train", ["router", "router+lora", "full"])
    def test_lora_of_others_is_loaded_and_unloaded_beside_it(
        self, train: str, make_run: Any, tmp_path: Path
    ) -> None:
        import peft

        pipe, run = make_run("sd3", size=0.1, model={"train": train})
        styled = copy.deepcopy(pipe.transformer)
        targets = {"r": 2, "target_modules": ["to_q"], "init_lora_weights": False}
        styled.add_adapter(peft.LoraConfig(**targets))
        lora = peft.get_peft_model_state_dict(styled)
        type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=lora)
        plain = sample(pipe, "sd3")
        before = {name: id(each) for name, each in pipe.transformer.named_parameters()}
        routed = sample(semroute.attach(pipe, run), "sd3")
        pipe.load_lora_weights(tmp_path, adapter_name="style")
        if "lora" in train:
            pipe.set_adapters(["default", "style"])
        assert distance(sample(pipe, "sd3"), routed) > 1e-3
        pipe.delete_adapters("style")
        assert distance(sample(pipe, "sd3"), routed) < 1e-6
        pipe.load_lora_weights(tmp_path, adapter_name="style")
        semroute.detach(pipe)
        assert pipe.get_list_adapters() == {"transformer": ["style"]}
        pipe.unload_lora_weights()
        assert torch.equal(sample(pipe, "sd3"), plain)
        parameters = dict(pipe.transformer.named_parameters())
        assert {name: id(each) for name, each in parameters.items()} == before

    @pytest.mark.slow
    def test_compiled_blocks_read_it(self, make_run: Any) -> None:
        pipe, run = make_run("qwen-image", size=0.3)
        expected = sample(semroute.attach(pipe, run), "qwen-image")
        pipe.transformer.compile_repeated_blocks(backend="eager")
        assert distance(sample(pipe, "qwen-image"), expected) < 1e-5


def offload_sequentially(pipe: Any, device: str) -> None:
    """``enable_sequential_cpu_offload`` onto a CPU: the pipeline's own asks for numbered devices,
    and accelerate's hooks do not return from those of a CPU."""
    import accelerate

    pipe.remove_all_hooks()
    pipe._offload_device = device
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            buffers = len(module._parameters) > 0
            accelerate.cpu_offload(module, torch.device("cpu"), offload_buffers=buffers)


@pytest.mark.parametrize(
    ("preset", "train"), [("pixart", "router"), ("z-image", "router+lora"), ("pixart", "full")]
)
@pytest.mark.parametrize("kind", ["sequential", "model"])
@pytest.mark.parametrize("first", ["attached", "offloaded"])
def test_offloading(
    preset: str,
    train: str,
    kind: str,
    first: str,
    make_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, run = make_run(preset, size=0.1, model={"train": train})
    monkeypatch.setattr(type(pipe), "enable_sequential_cpu_offload", offload_sequentially)
    plain = sample(pipe, preset)
    routed = sample(semroute.attach(pipe, run), preset)
    if first == "offloaded":
        semroute.detach(pipe)
    getattr(pipe, f"enable_{kind}_cpu_offload")(device="cpu")
    if first == "offloaded":
        semroute.attach(pipe, run)
    assert distance(sample(pipe, preset), routed) < 1e-6
    semroute.detach(pipe)
    assert distance(sample(pipe, preset), plain) < 1e-6
    pipe.remove_all_hooks()
    assert not any(parameter.is_meta for parameter in pipe.transformer.parameters())


class TestRefusals:
    """A pipeline that does not fit the run: one message each, and nothing is changed."""

    def check(self, pipe: Any, run: Path, match: str, **options: Any) -> None:
        network = getattr(pipe, "transformer", None)
        before = state_of(network) if network is not None else None
        with pytest.raises(InputError, match=f"(?s){match}"):
            semroute.attach(pipe, run, **options)
        assert network is None or state_of(network) == before

    def test_other_classes(self, make_run: Any, tiny_pipeline: Callable[[str], Path]) -> None:
        pipe, run = make_run("pixart")
        other = load_pipeline(tiny_pipeline("sana"))
        self.check(other, run, "SanaPipeline has a SanaTransformer2DModel, but .* adapted a PixArt")
        other.transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8
        )
        self.check(other, run, "DiTTransformer2DModel cannot be adapted")
        pipe.transformer = None
        self.check(pipe, run, "has no transformer")

    def test_a_compiled_network(self, make_run: Any) -> None:
        pipe, run = make_run("pixart")
        network = pipe.transformer
        pipe.transformer = torch.compile(network, backend="eager")
        with pytest.raises(InputError, match=r"attach before torch.compile"):
            semroute.attach(pipe, run)

    def test_twice_and_none(self, make_run: Any) -> None:
        pipe, run = make_run("pixart")
        with pytest.raises(InputError, match="no run is attached to this PixArtSigmaPipeline"):
            semroute.detach(pipe)
        semroute.attach(pipe, run)
        self.check(pipe, run, "attached to this PixArtSigmaPipeline already")
        semroute.detach(pipe)
        with pytest.raises(InputError, match="no run is attached"):
            semroute.detach(pipe)

    def test_other_weights(self, make_run: Any, tmp_path: Path) -> None:
        pipe, run = make_run("pixart", size=0.3)
        with torch.no_grad():
            pipe.transformer.proj_out.bias.add_(1)
        pipe.save_pretrained(tmp_path / "other")
        other = load_pipeline(tmp_path / "other")
        self.check(other, run, "the weights in .*other/transformer are not those .* check=False")
        semroute.attach(other, run, check=False)
        pipe.transformer.register_to_config(_name_or_path="")
        self.check(pipe, run, "came from is not known.* check=False")

    def test_other_sizes(self, make_run: Any) -> None:
        pipe, run = make_run("pixart")
        config = dict(pipe.transformer.config) | {"num_layers": 3}
        pipe.transformer = type(pipe.transformer).from_config(config)
        self.check(pipe, run, "num_layers: 3 instead of 4", check=False)

    def test_other_layers_of_the_text_encoder(self, make_run: Any) -> None:
        pipe, run = make_run("krea2")
        pipe.register_to_config(text_encoder_select_layers=(1, 2, 5))
        self.check(pipe, run, r"reads layers \[1, 2, 5\] .* reads layers \[1, 3, 5\]")

    def test_another_text_encoder(
        self, make_run: Any, tiny_pipeline: Callable[[str], Path]
    ) -> None:
        pipe, run = make_run("z-image")
        pipe.text_encoder = load_pipeline(tiny_pipeline("lumina2")).text_encoder
        self.check(pipe, run, "text_encoder of this ZImagePipeline is not the LLM .*gemma2")
        pipe.text_encoder = None
        self.check(pipe, run, "has no text_encoder.* semroute embed")

    def test_lora_of_others(self, make_run: Any) -> None:
        import peft

        pipe, run = make_run("pixart", model={"train": "lora"})
        config = peft.LoraConfig(r=2, target_modules=["to_q"])
        peft.inject_adapter_in_model(config, pipe.transformer, "style")
        self.check(pipe, run, r"LoRA of others \(style\)")

    def test_two_transformers(self, make_run: Any) -> None:
        pipe, run = make_run("wan")
        pipe.transformer_2 = pipe.transformer
        self.check(pipe, run, "two transformers")

    def test_a_damaged_checkpoint(self, make_run: Any) -> None:
        pipe, run = make_run("pixart", model={"train": "router+lora"})
        (weights,) = run.glob("checkpoints/*/ema.safetensors")
        values = load_file(weights)
        del values["router.weight"]
        write_again(weights, values)
        self.check(pipe, run, "holds other weights than the network learns")
