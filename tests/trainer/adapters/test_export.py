import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from adapter_runs import TEMPLATE, write_run
from conftest import write_samples
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import load_pipeline, run_size

import semroute
from semroute.cli import cli
from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.latents import encode_images
from semroute.pipeline.store.open import open_features
from semroute.schemas import InputError, TrainConfig
from semroute.trainer.adapters.approximation import fit_layers, linear_change, low_rank
from semroute.trainer.adapters.families import find_family
from semroute.trainer.model.strategies import make_router
from semroute.trainer.runs.adapter import load_adapter
from semroute.trainer.runs.adapter_export import KINDS, choose_layers, export_adapter
from semroute.trainer.runs.record import build_model, load_trained
from semroute.trainer.training.train import train

PROMPT = "a red cup"
UNGUIDED = {"krea2": 0.0, "sana": 1.0, "pixart": 1.0}
"""Guidance scales that switch guidance off: it multiplies rounding errors."""
# A process in which this library cannot be imported: what it loads is loaded by others alone.
PLAIN = """
import json, sys
sys.modules["semroute"] = None
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    names = {}
    exec(job["code"], names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        "a red cup", num_inference_steps=2, output_type="latent", return_dict=False,
        generator=torch.Generator().manual_seed(0), **job["how"],
    )[0]
    save_file({"latents": latents.contiguous()}, job["out"])
try:
    import semroute
except ImportError:
    sys.exit(0)
sys.exit("semroute was imported")
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_run(tiny_pipeline, tmp_path_factory):
    """Family and what is trained -> a run with random weights of that."""

    def make_run(family, **arguments):
        return write_run(
            tmp_path_factory.mktemp("runs") / "run", tiny_pipeline(family), **arguments
        )

    return make_run


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    texts = [
        f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cup", "tree", "car")
    ]
    return str(write_samples(tmp_path_factory.mktemp("samples") / "samples.parquet", texts, 16))


@pytest.fixture(scope="module")
def flux2_features(tiny_pipeline, samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "flux2-klein"
    model = str(tiny_pipeline("flux2-klein") / "text_encoder")
    how = {"template": "flux2-klein", "codec": "bf16", "workers": 0}
    extract(samples, path, model=model, report=lambda line: None, **how)
    return open_features(path)


@pytest.fixture(scope="module")
def klein_run(make_run):
    """A gain for each of the three layers of a FLUX.2 klein."""
    return make_run("flux2-klein", train="fusion", num_llm_layers=28)


@pytest.fixture(scope="module")
def krea2_run(tiny_pipeline, samples, tmp_path_factory):
    """The projector of a Krea 2, trained for six steps."""
    folder, pipeline = tmp_path_factory.mktemp("krea2"), tiny_pipeline("krea2")
    quiet = {"workers": 0, "report": lambda line: None}
    how = {"model": str(pipeline / "text_encoder"), "template": "krea2", "codec": "bf16"}
    extract(samples, folder / "features", **how, **quiet)
    encode_images(samples, folder / "latents", vae=str(pipeline), **quiet)
    config = {
        "features": str(folder / "features"),
        "latents": str(folder / "latents"),
        "output": str(folder / "run"),
        "steps": 6,
        "mixed_precision": "no",
        "model": {"kind": "pretrained", "pretrained": str(pipeline), "train": "fusion"},
        "data": {"batch_size": 2, "unverified": True},
        "optimizer": {"router_lr": 0.1},
        "ema": {"every": 1},
    }
    return train(TrainConfig.model_validate(config), progress=False)


def export(run, out, kind, *options):
    """``semroute export --as``: the folder, and what it says about exactness."""
    done = CliRunner().invoke(cli, ["export", str(run), str(out), "--as", kind, *options])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}\n"
    return Path(out), done.stderr.strip()


def refusal(run, out, kind, *options):
    done = CliRunner().invoke(cli, ["export", str(run), str(out), "--as", kind, *options])
    assert done.exit_code == 1, done.output
    assert not Path(out).exists()
    return done.stderr


def sampled(pipe, family):
    """What a pipeline gives in two steps from seed 0."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    how = {"num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    how["guidance_scale"] = UNGUIDED[family]
    return pipe(PROMPT, generator=generator, **how, **run_size(family))[0]


def predict(transformer, given, x_t, t):
    """What a network predicts from the text that its pipeline encoded."""
    family = find_family(type(transformer).__name__, "")
    rows = next(iter(given.values())).shape[:2]
    given = {**given, "mask": torch.ones(rows, dtype=torch.bool)}
    text = family.read_conditioning(given, transformer.config, torch.float32)
    with torch.no_grad():
        return family.call(transformer, x_t, t, text)


@pytest.fixture(scope="module")
def plain(krea2_run, make_run, tmp_path_factory):
    """Family -> its run, and what the code of the export's README samples in a process of its
    own."""
    folder = tmp_path_factory.mktemp("plain")
    lora = {"train": "lora", "lora": {"rank": 4, "alpha": 6}}
    runs = {"krea2": krea2_run, "sana": make_run("sana", **lora)}
    runs["pixart"] = make_run("pixart", **lora)
    jobs = []
    for family, run in runs.items():
        exported, _ = export(run, folder / family, "lora")
        code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert ("peft" in code) == (family == "pixart")
        code = code.replace("path/of/this/folder", str(exported)).replace("bfloat16", "float32")
        jobs.append(
            {
                "code": code.removesuffix('pipe(prompt="a cat")\n'),
                "how": {**run_size(family), "guidance_scale": UNGUIDED[family]},
                "out": str(folder / f"{family}.safetensors"),
            }
        )
    command = [sys.executable, "-c", PLAIN, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    outputs = {f: load_file(folder / f"{f}.safetensors")["latents"] for f in runs}
    return {family: (run, outputs[family]) for family, run in runs.items()}


class TestLoRA:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", ["krea2", "sana", "pixart"])
    def test_plain_diffusers_gives_what_was_trained(self, plain, tiny_pipeline, family):
        run, found = plain[family]
        pipe = load_pipeline(tiny_pipeline(family))
        base = sampled(pipe, family)
        expected = sampled(semroute.attach(pipe, run), family)
        assert (expected - base).abs().max() > 1e-3 * expected.abs().max()
        torch.testing.assert_close(
            found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
        )

    @pytest.mark.parametrize(
        "family",
        [
            *("wan", "sd3", "qwen-image", "auraflow", "flux2", "flux2-klein", "lumina2"),
            *("z-image", "krea2", "hidream", "fibo"),
        ],
    )
    def test_each_family_loads_the_same_changes(self, make_run, tiny_pipeline, tmp_path, family):
        num = {"flux2": 31, "flux2-klein": 28}.get(family, 6)
        lora = {"rank": 2, "alpha": 6}
        run = make_run(family, train="lora", lora=lora, num_llm_layers=num)
        folder, note = export(run, tmp_path / "lora", "lora")
        assert note == ""
        pipe = load_pipeline(tiny_pipeline(family))
        pipe.load_lora_weights(folder)
        (name,) = pipe.transformer.peft_config
        trained = dict(semroute.load_run(run).model.transformer.named_modules())
        layers = {n: m for n, m in pipe.transformer.named_modules() if hasattr(m, "lora_A")}
        assert {n for n, m in trained.items() if hasattr(m, "lora_A")} == {*layers}
        for layer, module in layers.items():
            if not hasattr(module, "get_delta_weight"):
                continue
            change = trained[layer].get_delta_weight("default")
            assert change.abs().max() > 0
            torch.testing.assert_close(module.get_delta_weight(name), change)

    def test_beside_a_router_says_that_it_is_not_all(self, make_run, tmp_path):
        run = make_run("sana", train="router+lora", routing={"strategy": "time"})
        folder, note = export(run, tmp_path / "lora", "lora")
        assert note == "LoRA alone, without the router that it was trained with"
        assert "alone it is not what was trained" in (folder / "README.md").read_text()

    def test_on_another_base_is_refused(self, krea2_run, make_run, tiny_pipeline, tmp_path):
        folder, _ = export(krea2_run, tmp_path / "adapter", "pipeline")
        sana = load_pipeline(tiny_pipeline("sana"))
        message = "SanaPipeline has a SanaTransformer2DModel, but .* adapted a Krea2Transformer2D"
        with pytest.raises(InputError, match=message):
            semroute.attach(sana, folder)


class TestKrea2:
    def test_predicts_what_the_routed_network_predicts(self, krea2_run, tiny_pipeline, tmp_path):
        """On stored features, through the LoRA, ComfyUI's rule and the numbers."""
        run = semroute.load_run(krea2_run)
        layers = run.model.router.layers_read
        features = open_features(run.record.config.features)
        batch = features.read([1, 2], layers)
        x_t = torch.randn(2, *run.model.latent_shape)
        t, caption = torch.tensor([0.3, 0.8]), torch.tensor([1, 0])
        inputs = (x_t, t, batch.tensor(), torch.from_numpy(batch.offsets), caption)
        with torch.no_grad():
            expected = run.model(*inputs)
        record = run.record
        projector = "text_fusion.projector.weight"

        def predicted(change):
            fresh = build_model(record).eval()
            pipe = load_pipeline(tiny_pipeline("krea2"))
            change(pipe)
            fresh.transformer = pipe.transformer
            with torch.no_grad():
                return fresh(*inputs)

        def comfyui(pipe):
            folder, _ = export(krea2_run, tmp_path / "comfyui", "comfyui")
            (key, diff), *rest = load_file(folder / "comfyui-krea2-layers.safetensors").items()
            assert key == "diffusion_model.txtfusion.projector.diff"
            assert rest == []
            pipe.transformer.get_parameter(projector).data.add_(1.0 * diff)

        def numbers(pipe):
            folder, _ = export(krea2_run, tmp_path / "weights", "weights")
            document = json.loads((folder / "weights.json").read_text())
            weight = pipe.transformer.get_parameter(projector)
            assert document["base_layers"] == [1, 3, 5]
            gains = np.fromstring((folder / "gains.txt").read_text(), sep=",", dtype=np.float32)
            scaled = weight.detach().flatten() * torch.from_numpy(gains)
            torch.testing.assert_close(scaled, torch.tensor(document["weights"]), rtol=1e-5, atol=0)
            weight.data.copy_(torch.tensor([document["weights"]]))

        def lora(pipe):
            pipe.load_lora_weights(export(krea2_run, tmp_path / "lora", "lora")[0])

        assert (predicted(lambda pipe: None) - expected).abs().max() > 1e-3
        largest = float(expected.abs().max())
        for change in (comfyui, numbers, lora):
            found = predicted(change)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)

    def test_lora_is_the_change_to_1e_7(self, krea2_run, tmp_path):
        folder, note = export(krea2_run, tmp_path / "lora", "lora")
        assert note == ""
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        name = "transformer.text_fusion.projector.lora_{}.weight"
        assert {*tensors} == {name.format("A"), name.format("B")}
        adapter = load_adapter(krea2_run)
        base = adapter.read_base("text_fusion.projector.weight")
        learned = adapter.trained["transformer.text_fusion.projector.weight"]
        change = tensors[name.format("B")] @ tensors[name.format("A")]
        torch.testing.assert_close(base + change, learned, rtol=0, atol=1e-7)
        assert (learned - base).abs().min() > 1e-3

    def test_a_mix_in_front_of_attention_is_gains_at_most(self, krea2_run, make_run, tmp_path):
        features = open_features(load_adapter(krea2_run).record.config.features)
        routing = {"strategy": "depth", "where": "taps"}
        run = make_run("krea2", train="router", routing=routing, features=features)
        assert "pass attention before they meet its projector" in refusal(
            run, tmp_path / "out", "lora"
        )
        folder, note = export(run, tmp_path / "weights", "weights")
        document = json.loads((folder / "weights.json").read_text())
        assert len(document["gains"]) == 3
        assert 0.05 < document["error"] < 1
        assert f"error {document['error']:.3g}" in note

    def test_a_base_that_changed_is_refused(self, krea2_run, tiny_pipeline, tmp_path):
        folder = tmp_path / "krea2"
        folder.mkdir()
        for path in tiny_pipeline("krea2").iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "transformer").unlink()
        (folder / "transformer").mkdir()
        source = tiny_pipeline("krea2") / "transformer"
        (folder / "transformer" / "config.json").symlink_to(source / "config.json")
        (file,) = source.glob("*.safetensors")
        tensors = load_file(file)
        tensors["text_fusion.projector.weight"] += 1
        save_file(tensors, folder / "transformer" / file.name)
        run = write_run(tmp_path / "run", folder, train="fusion")
        export(run, tmp_path / "before", "lora")
        tensors["text_fusion.projector.weight"] += 1
        save_file(tensors, folder / "transformer" / file.name)
        assert "is not the pretrained network of the run" in refusal(run, tmp_path / "out", "lora")


class TestGains:
    """FLUX.2 reads its layers side by side with one linear layer."""

    def predict(self, transformer, embeds, x_t, t):
        return predict(transformer, {"prompt_embeds": embeds}, x_t, t)

    @pytest.mark.parametrize("kind", ["lora", "comfyui", "weights"])
    def test_other_programs_get_what_was_learned(self, klein_run, tiny_pipeline, tmp_path, kind):
        folder, note = export(klein_run, tmp_path / kind, kind)
        assert note == ""
        embeds, x_t = torch.randn(2, 9, 96), torch.randn(2, 16, 4, 4)
        inputs = (embeds, x_t, torch.tensor([0.2, 0.7]))
        gains = 1 + load_adapter(klein_run).trained["fusion_gain"]
        pipe = load_pipeline(tiny_pipeline("flux2-klein"))
        scaled = (embeds.unflatten(2, (3, -1)) * gains[:, None]).flatten(2)
        expected = self.predict(pipe.transformer, scaled, *inputs[1:])
        assert (self.predict(pipe.transformer, *inputs) - expected).abs().max() > 1e-3
        weight = pipe.transformer.context_embedder.weight
        if kind == "lora":
            pipe.load_lora_weights(folder)
        elif kind == "comfyui":
            tensors = load_file(folder / "comfyui-flux2-layers.safetensors")
            weight.data.add_(tensors["diffusion_model.txt_in.diff"])
        else:
            numbers = json.loads((folder / "weights.json").read_text())["gains"]
            code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
            lines = [line for line in code.splitlines() if line.startswith(("gains", "weight"))]
            assert str(numbers) in lines[0]
            exec("\n".join(lines), {"torch": torch, "pipe": pipe})
        found = self.predict(pipe.transformer, *inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_the_routed_network_scales_its_layers_so(self, klein_run, tiny_pipeline):
        routed = semroute.load_run(klein_run).model
        gains = 1 + load_adapter(klein_run).trained["fusion_gain"]
        embeds, x_t = torch.randn(1, 9, 96), torch.randn(1, 16, 4, 4)
        hidden, offsets = torch.randn(9, 28, 32), torch.tensor([0, 9])
        t = torch.tensor([0.5])
        with torch.no_grad():
            given = {"prompt_embeds": embeds, "mask": torch.ones(1, 9, dtype=torch.bool)}
            found = routed(x_t, t, hidden, offsets, torch.tensor([0]), conditioning=given)
        scaled = (embeds.unflatten(2, (3, -1)) * gains[:, None]).flatten(2)
        pipe = load_pipeline(tiny_pipeline("flux2-klein"))
        expected = self.predict(pipe.transformer, scaled, x_t, t)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_a_low_rank_states_its_error(self, klein_run, tmp_path):
        change = load_file(
            export(klein_run, tmp_path / "exact", "comfyui")[0] / "comfyui-flux2-layers.safetensors"
        )["diffusion_model.txt_in.diff"]
        folder, note = export(klein_run, tmp_path / "lora", "lora", "--rank", "5")
        first, second = (
            load_file(folder / "pytorch_lora_weights.safetensors")[
                f"transformer.context_embedder.lora_{part}.weight"
            ]
            for part in "AB"
        )
        assert first.shape == (5, 96)
        error = float((change - second @ first).norm() / change.norm())
        assert note == f"rank 5 of 32, error {error:.3g}"
        assert 0.1 < error < 1
        assert f"error of {error:.3g}" in (folder / "README.md").read_text()
        # No other product of this rank comes closer.
        values = torch.linalg.svdvals(change)
        best = float(values[5:].norm() / values.norm())
        assert error == pytest.approx(best, rel=1e-4)

    def test_a_router_at_the_input_states_its_error(self, make_run, flux2_features, tmp_path):
        routing = {"strategy": "depth", "where": "taps"}
        run = make_run("flux2-klein", train="router", routing=routing, features=flux2_features)
        adapter = load_adapter(run)
        weight = adapter.read_base("context_embedder.weight")
        folder, note = export(run, tmp_path / "comfyui", "comfyui")
        change = load_file(folder / "comfyui-flux2-layers.safetensors")[
            "diffusion_model.txt_in.diff"
        ]
        # What the folder's weights read of the layers, against what the network read.
        hidden = adapter.read_hidden().float()
        base = hidden[:, [8, 17, 26]]  # [R, K, H]: layers 9, 18, 27
        deviation = (base.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        mix = adapter.router.deviation(hidden)
        fit = fit_layers(adapter.router, hidden, [9, 18, 27], diagonal=False)
        torch.testing.assert_close(linear_change(weight, fit.matrix), change)
        step = (fit.matrix - torch.eye(3, dtype=torch.float64)).float()
        missing = mix - torch.einsum("kj,rjh->rkh", step, base) / deviation
        error = float(missing.norm() / mix.norm())
        assert error == pytest.approx(fit.error, rel=1e-4)
        assert f"error {error:.3g} of the learned change" in note
        assert 0 < error < 1
        gains = fit_layers(adapter.router, hidden, [9, 18, 27], diagonal=True)
        assert gains.error > fit.error

    def test_the_fit_is_exact_where_it_can_be(self):
        """Rows without mean and of deviation 1, and weights of the base layers alone."""
        hidden = torch.randn(40, 5, 16)
        hidden = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, False, keepdim=True)
        from semroute.schemas import RoutingConfig

        config = RoutingConfig(strategy="depth", weights="signed", where="taps")
        router = make_router(
            config, layers=[1, 2, 3, 4, 5], num_llm_layers=5, num_blocks=2, text_width=16
        )
        router.weight.data[:, [1, 3]] = torch.tensor([[2.0, -1.0], [0.5, 4.0]])
        fit = fit_layers(router, hidden, [2, 4], diagonal=False)
        expected = torch.eye(2) + torch.tensor([[2.0, -1.0], [0.5, 4.0]]) / 5
        torch.testing.assert_close(fit.matrix.float(), expected, rtol=1e-4, atol=1e-4)
        assert fit.error < 1e-4
        assert fit_layers(router, hidden, [2, 4], diagonal=True).error > 0.1

    @pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
    def test_products_of_full_rank_are_exact(self, shape):
        change = torch.randn(shape)
        for rank in (None, 6, 99):
            (first, second), error = low_rank(change, rank)
            assert torch.equal(second @ first, change)
            assert error == 0
        (first, second), error = low_rank(change, 2)
        values = torch.linalg.svdvals(change)
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
        assert low_rank(torch.zeros(shape), 2)[1] == 0


class TestConfig:
    def test_hidream_runs_with_the_chosen_layers(self, make_run, tiny_pipeline, tmp_path):
        run = make_run("hidream", train="router", routing={"strategy": "depth"})
        adapter = load_adapter(run)
        adapter.trained["router.weight"].zero_()
        adapter.trained["router.weight"][1, 4] = 9  # the second block, which reads layer 3: layer 5
        export_adapter(adapter, tmp_path / "config", "config")
        document = json.loads((tmp_path / "config" / "layers.json").read_text())
        assert document["base_layers"] == [1, 3, 5, 6]
        assert document["layers"] == [1, 5, 5, 6]
        assert document["llama_layers"] == [0, 4, 4, 5]
        assert document["weights"] == pytest.approx([1, 1.5, 1, 1])
        assert document["shares"] == pytest.approx([1, 0.6, 1, 1])
        pipe = load_pipeline(tiny_pipeline("hidream"))
        t5, _, llama3, _, pooled, _ = pipe.encode_prompt(PROMPT, *[None] * 3)
        given = {"prompt_embeds_t5": t5, "pooled_prompt_embeds": pooled}
        given |= {"prompt_embeds_llama3": llama3.permute(1, 2, 0, 3)}
        inputs = (given, torch.randn(1, 4, 8, 8), torch.tensor([0.5]))
        before = predict(pipe.transformer, *inputs)
        exec(document["call"], {"pipe": pipe})
        after = predict(pipe.transformer, *inputs)
        assert after.isfinite().all()
        assert (after - before).abs().max() > 1e-3
        assert "1 of 4 layers differ" in (tmp_path / "config" / "README.md").read_text()

    def chosen(self, make_run, out, family, num_layers, place, layer):
        """What is exported if the mix of one tap has most of a layer."""
        routing = {"strategy": "depth", "where": "taps"}
        run = make_run(family, train="router", num_llm_layers=num_layers, routing=routing)
        adapter = load_adapter(run)
        adapter.trained["router.weight"].zero_()
        adapter.trained["router.weight"][place, layer - 1] = 2 * num_layers
        note = export_adapter(adapter, out, "config").note
        assert note == (
            "approximation: the chosen layers have 89 % of the weight on average, 1 of 3 differ "
            "from the base"
        )
        return json.loads((out / "layers.json").read_text())

    def test_krea2_opens_with_the_chosen_layers(self, make_run, tiny_pipeline, tmp_path):
        document = self.chosen(make_run, tmp_path / "config", "krea2", 6, 1, 4)
        assert document["text_encoder_select_layers"] == [1, 4, 5]
        opened = {"DiffusionPipeline": DiffusionPipeline, "torch": torch}
        exec(document["call"].replace("bfloat16", "float32"), opened)
        found = opened["pipe"].encode_prompt(PROMPT)[0]  # [1, T, 3, H]
        folder = tiny_pipeline("krea2")
        layers = (2, 4, 6)
        other = DiffusionPipeline.from_pretrained(folder, text_encoder_select_layers=layers)
        assert torch.equal(found[:, :, 1], other.encode_prompt(PROMPT)[0][:, :, 1])

    def test_flux2_reads_the_chosen_layers(self, make_run, tiny_pipeline, tmp_path):
        document = self.chosen(make_run, tmp_path / "config", "flux2-klein", 28, 0, 12)
        assert document["text_encoder_out_layers"] == [12, 18, 27]
        assert document["call"] == 'pipe(prompt="a cat", text_encoder_out_layers=(12, 18, 27))'
        pipe = load_pipeline(tiny_pipeline("flux2-klein"))
        seen = []
        pipe.transformer.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["encoder_hidden_states"]),
            with_kwargs=True,
        )
        pipe.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": 1, "output_type": "latent", **run_size("flux2-klein")}
        call = document["call"].replace("))", "), **how)")
        exec(call, {"pipe": pipe, "how": how})
        expected = pipe.encode_prompt("a cat", text_encoder_out_layers=(12, 18, 27))[0]
        assert torch.equal(seen[0], expected)

    @pytest.mark.parametrize("where", ["input", "blocks"])
    def test_mixes_of_all_layers_and_blocks_are_averaged(self, make_run, tmp_path, where):
        run = make_run("krea2", train="router", routing={"strategy": "time", "where": where})
        adapter = load_adapter(run)
        alpha = torch.from_numpy(adapter.weights())  # [T, D, L]
        assert alpha.shape[1] == {"input": 1, "blocks": 12}[where]
        added = alpha.mean(0) - 1 / 6
        if where == "blocks":  # four, of three layers each
            added = torch.stack([added[tap::3].mean(0) for tap in range(3)])
        weights = added + torch.eye(6)[[0, 2, 4]]
        choice = choose_layers(adapter)
        assert choice.base == [1, 3, 5]
        assert choice.layers == (weights.argmax(1) + 1).tolist()
        shares = weights.max(1).values / weights.abs().sum(1)
        assert choice.shares == pytest.approx(shares.tolist(), rel=1e-4)


class TestPipeline:
    @pytest.mark.parametrize(
        ("family", "arguments"),
        [
            ("krea2", {"train": "fusion"}),
            ("flux2-klein", {"train": "fusion", "num_llm_layers": 28}),
            ("sana", {"train": "gain"}),
            ("sana", {"train": "router", "routing": {"strategy": "depth", "rank": 2}}),
            ("sana", {"train": "router+lora", "routing": {"strategy": "joint"}}),
            ("sana", {"train": "router+projection", "routing": {"strategy": "static"}}),
            ("sana", {"train": "full", "routing": {"strategy": "time"}}),
            ("pixart", {"train": "lora"}),
        ],
        ids=lambda value: value if isinstance(value, str) else value["train"],
    )
    def test_holds_all_that_was_trained(self, make_run, tmp_path, family, arguments):
        run = make_run(family, **arguments)
        folder, note = export(run, tmp_path / "adapter", "pipeline")
        assert note == ""
        before, after = load_adapter(run), load_adapter(folder)
        assert after.record == before.record
        assert (after.step, after.source) == (1, "ema")
        assert {*after.trained} == {*before.trained}
        for name, value in before.trained.items():
            assert torch.equal(after.trained[name], value), name
        model = build_model(after.record)
        load_trained(model, after.trained)
        # What was exported can be exported further.
        again, _ = export(folder, tmp_path / "again", "pipeline")
        assert load_adapter(again).trained.keys() == before.trained.keys()

    def test_attaches_as_the_run_does(self, make_run, tiny_pipeline, tmp_path):
        how = {"train": "router+lora", "routing": {"strategy": "depth"}}
        run = make_run("sana", architecture="gemma2", **how)
        folder, _ = export(run, tmp_path / "adapter", "pipeline")
        pipe = load_pipeline(tiny_pipeline("sana"))
        base = sampled(pipe, "sana")
        expected = sampled(semroute.attach(pipe, run), "sana")
        semroute.detach(pipe)
        assert torch.equal(sampled(semroute.attach(pipe, folder), "sana"), expected)
        assert not torch.allclose(expected, base)

    def test_refuses_what_it_does_not_hold(self, make_run, tmp_path):
        run = make_run("sana", train="gain")
        folder, _ = export(run, tmp_path / "adapter", "pipeline")
        with pytest.raises(InputError, match="step: 5 instead of 1"):
            load_adapter(folder, step=5)
        with pytest.raises(InputError, match="weights: 'model' instead of 'ema'"):
            load_adapter(folder, weights="model")
        with pytest.raises(InputError, match=r"neither run\.json nor adapter\.json"):
            load_adapter(tmp_path)
        (folder / "gains.safetensors").write_bytes(b"x")
        with pytest.raises(InputError, match=r"gains\.safetensors is damaged"):
            load_adapter(folder)
        (folder / "adapter.json").write_text("{")
        with pytest.raises(InputError, match=r"adapter\.json is damaged"):
            load_adapter(folder)

    @pytest.mark.parametrize("strategy", ["depth", "time"])
    def test_router_alone(self, make_run, tmp_path, strategy):
        run = make_run("sana", train="router", routing={"strategy": strategy})
        out = tmp_path / "router"
        done = CliRunner().invoke(cli, ["export", str(run), str(out), "--router"])
        assert done.exit_code == 0, done.output
        assert sorted(p.name for p in out.iterdir()) == ["config.json", "router.safetensors"]
        router = semroute.load_router(out)
        opened = semroute.load_run(run)
        hidden = torch.randn(5, 6, 32)
        arguments = {}
        if strategy == "time":
            arguments = {"t": torch.tensor([0.2]), "rows": torch.arange(5)}
            arguments["owners"] = torch.zeros(5, dtype=torch.long)
        found = router.deviation(hidden, **arguments)
        assert torch.equal(found, opened.model.router.deviation(hidden, **arguments))
        tensors = load_file(out / "router.safetensors")
        np.testing.assert_allclose(tensors["alpha"], opened.weights(tensors["t"].numpy()))
        config = json.loads((out / "config.json").read_text())
        assert config["pretrained"]["family"] == "sana"
        assert config["routing"]["where"] == "blocks"
        lora = make_run("sana", train="lora")
        done = CliRunner().invoke(cli, ["export", str(lora), str(tmp_path / "no"), "--router"])
        assert "has no router" in done.stderr


class TestCard:
    def test_says_what_it_is(self, make_run, tmp_path):
        markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
        run = make_run("sana", train="router", routing={"strategy": "depth"})
        folder, _ = export(run, tmp_path / "a_b_*c*", "pipeline")
        _, front, text = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front) == {
            "library_name": "diffusers",
            "tags": ["semroute", "text-to-image", "diffusers"],
        }
        tokens = markdown.parse(text)
        heading = tokens[1].children
        assert "".join(token.content for token in heading) == "a_b_*c*"
        (template,) = (t.content for t in tokens if t.type == "fence" and t.info == "text")
        assert template == f"{TEMPLATE}\n"
        html = markdown.render(text)
        for fact in (
            "<code>SanaTransformer2DModel</code> (sana)",
            "<code>an/llm</code>, 6 layers of width 32",
            "strategy <code>depth</code>, <code>signed</code> weights, at <code>blocks</code>",
            "1 of 1, moving average",
            "semroute.attach(pipe, ",
            "Untried: published weights, GPUs",
        ):
            assert fact in html, fact
        with Image.open(folder / "weights.png") as figure:
            assert min(figure.size) > 300

    def test_names_the_base_on_the_hub(self, make_run, tmp_path, monkeypatch):
        adapter = load_adapter(make_run("sana", train="lora"))
        model = adapter.record.config.model.model_copy(update={"pretrained": "org/name@abc"})
        config = adapter.record.config.model_copy(update={"model": model})
        object.__setattr__(adapter, "record", adapter.record.model_copy(update={"config": config}))
        export_adapter(adapter, tmp_path / "lora", "lora")
        text = (tmp_path / "lora" / "README.md").read_text()
        assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "org/name"
        assert "from_pretrained('org/name'," in text


class TestRefusals:
    @pytest.mark.parametrize(
        ("family", "arguments", "kind", "expected"),
        [
            ("sana", {"train": "router"}, "lora", "sana reads one layer of its LLM"),
            ("sana", {"train": "router"}, "config", "no setting of diffusers names the layer"),
            ("sana", {"train": "lora"}, "weights", "model.train=lora learned no weights of layers"),
            ("sana", {"train": "lora"}, "comfyui", "it may take the file of --as lora"),
            (
                "sana",
                {"train": "router", "routing": {"strategy": "time"}},
                "weights",
                "change with the noise level",
            ),
            ("krea2", {"train": "router"}, "comfyui", "each block reads a mix of its own"),
            ("krea2", {"train": "fusion"}, "config", "model.train=fusion has no router"),
            (
                "krea2",
                {"train": "router+projection", "routing": {"where": "input"}},
                "lora",
                "learned more than weights of layers",
            ),
        ],
    )
    def test_say_what_is_possible(self, make_run, tmp_path, family, arguments, kind, expected):
        run = make_run(family, **arguments)
        message = " ".join(refusal(run, tmp_path / "out", kind).split())
        assert expected in message
        possible = message.partition("Choose --as ")[2].rstrip(".").split(" or ")
        assert possible[0] == "pipeline"
        assert kind not in possible
        assert {*possible} <= {*KINDS}

    def test_options_that_do_nothing(self, make_run, configure, tmp_path):
        run = make_run("sana", train="lora")
        assert "--rank is for --as lora of gains" in refusal(
            run, tmp_path / "out", "lora", "--rank", "3"
        )
        assert "not used with --router" in refusal(run, tmp_path / "out", "lora", "--router")
        own = train(configure(tmp_path / "own", steps=1, model={"patch_size": 6}), progress=False)
        assert "--as lora is for runs on a pretrained network" in refusal(
            own, tmp_path / "out", "lora"
        )
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").touch()
        done = CliRunner().invoke(cli, ["export", str(run), str(tmp_path / "full"), "--as", "lora"])
        assert "not empty: name a new folder" in done.stderr
