import json
import os
from typing import ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save

import semroute
from semroute.cli import cli
from semroute.schemas import InputError
from semroute.trainer.runs.export import export_router
from semroute.trainer.training.train import train


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_run(configure, tmp_path_factory):
    usual = {
        "steps": 2,
        "model": {"patch_size": 6},
        "optimizer": {"lr": 1e-2, "router_lr": 0.1},
        "ema": {"every": 1},
    }

    def make_run(strategy, **routing):
        output = tmp_path_factory.mktemp("runs") / "run"
        routing = {"strategy": strategy, **routing}
        return train(configure(output, routing=routing, **usual), progress=False)

    return make_run


class TestRouter:
    @pytest.mark.parametrize(
        "routing",
        [
            {"strategy": "penultimate"},
            {"strategy": "depth", "rank": 2, "top_k": 3},
            {"strategy": "joint"},
            {"strategy": "token"},
            {"strategy": "concat", "layers": [1, 3]},
        ],
        ids=lambda routing: routing["strategy"],
    )
    def test_gives_what_the_runs_own_gives(self, make_run, tmp_path, routing):
        run = semroute.load_run(make_run(**routing))
        router = semroute.load_router(export_router(run, tmp_path / "router"))
        hidden = torch.randn(5, len(router.layers_read), 32)
        t = torch.tensor([0.2, 0.9]) if router.depends_on_t else None
        places = {"rows": torch.arange(5), "owners": torch.tensor([0, 0, 1, 1, 0])}
        arguments = places if router.depends_on_t else {}
        found = router(hidden, t, **arguments)
        assert torch.equal(found, run.model.router(hidden, t, **arguments))
        assert not any(parameter.requires_grad for parameter in router.parameters())

    def test_is_readable_without_this_library(self, make_run, tmp_path, feature_store):
        run = semroute.load_run(make_run("joint"))
        folder = export_router(run, tmp_path / "router")
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "router.safetensors"]
        tensors = load_file(folder / "router.safetensors")
        assert tensors["alpha"].shape == (101, 2, 4)
        np.testing.assert_array_equal(tensors["alpha"], run.weights(tensors["t"]))
        assert tensors["layers"].tolist() == [1, 2, 3, 4]
        config = json.loads((folder / "config.json").read_text())
        assert config["routing"]["strategy"] == "joint"
        assert config["features"]["model"]["num_layers"] == 4

    def test_refusals(self, make_run, tmp_path):
        run = semroute.load_run(make_run("depth"))
        export_router(run, tmp_path / "router")
        export_router(run, tmp_path / "router")  # once more is the same
        left = tmp_path / ".router.unfinished"  # by one that was killed
        left.mkdir()
        (left / "router.safetensors").write_bytes(b"half")
        export_router(run, tmp_path / "router")
        assert [path.name for path in tmp_path.iterdir()] == ["router"]
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(InputError, match="is not empty: name a new folder"):
            export_router(run, tmp_path)
        with pytest.raises(InputError, match="holds no exported router"):
            semroute.load_router(tmp_path)

    def test_damage(self, make_run, tmp_path):
        export_router(semroute.load_run(make_run("depth")), tmp_path / "router")
        file = tmp_path / "router" / "router.safetensors"
        tensors = load_file(file)
        first = next(name for name in tensors if name.startswith("parameters."))
        others = ({}, {**tensors, first: tensors[first].flatten()[1:].copy()})
        for damaged in (file.read_bytes()[:-3], b"", *map(save, others), None):
            file.unlink()
            os.mkfifo(file) if damaged is None else file.write_bytes(damaged)
            with pytest.raises(InputError, match=r"router\.safetensors"):
                semroute.load_router(tmp_path / "router")


WITHIN = {"rtol": 1e-3, "atol": 1e-3}


class TestPipeline:
    def test_draws_the_pictures_of_sample(self, make_run, tmp_path):
        pytest.importorskip("diffusers")
        run = make_run("time")

        def invoke(*arguments):
            done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
            assert done.exit_code == 0, done.output
            return done.stdout

        prompts = ["a red cup", "two green trees on a table"]
        named = [word for prompt in prompts for word in ("--prompt", prompt)]
        options = ("--cfg-scale", 3, "--num-steps", 4, "--seed", 7, "--out", tmp_path / "drawn")
        invoke("sample", run, *named, *options)
        assert invoke("export", run, tmp_path / "pipeline") == f"{tmp_path / 'pipeline'}\n"

        pipeline = semroute.SemanticRoutingPipeline.from_pretrained(tmp_path / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 7}
        images = pipeline(prompts, **how).images
        for number, image in enumerate(images):
            expected = np.asarray(Image.open(tmp_path / "drawn" / f"{number:06d}.png"))
            np.testing.assert_array_equal(np.asarray(image), expected)
        again = pipeline(prompts[0], num_images_per_prompt=2, output_type="np", **how).images
        assert again.shape == (2, 12, 12, 3)
        np.testing.assert_allclose(again[0] * 255, np.asarray(images[0]), atol=1e-4)
        (latents,) = pipeline(prompts[0], output_type="latent", return_dict=False, **how)
        assert latents.shape == (1, 3, 12, 12)

    @pytest.fixture
    def pipeline(self, make_run, tmp_path):
        """A run whose weights are random, so that what it reads shows."""
        pytest.importorskip("diffusers")
        from semroute.trainer.evaluation.diffusers_pipeline import export_pipeline

        run = semroute.load_run(make_run("time"))
        torch.manual_seed(0)
        for parameter in run.model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        folder = export_pipeline(run, tmp_path / "pipeline")
        pipeline = semroute.SemanticRoutingPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    HOW: ClassVar = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}

    def test_is_called_as_pipelines_of_diffusers_are(self, pipeline):
        def generate(prompt="a red cup", **options):
            return pipeline(prompt, **{**self.HOW, **options}).images

        plain = generate()
        seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        pair = generate(generator=seeds, num_images_per_prompt=2)
        one = generate(generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(pair[1:], one, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(one, plain)
        noise = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(4))
        assert torch.equal(generate(latents=noise), one)
        # The null caption is an empty prompt; any other text guides elsewhere, each its own.
        torch.testing.assert_close(generate(negative_prompt=""), plain, rtol=1e-4, atol=1e-4)
        both = generate(["a red cup", "a cup"], negative_prompt=["blue", "a green tree"])
        torch.testing.assert_close(both[:1], generate(negative_prompt="blue"), **WITHIN)
        assert not torch.allclose(both[:1], plain, **WITHIN)
        images = pipeline("a red cup", num_inference_steps=1, output_type="pt").images
        assert images.shape == (1, 3, 12, 12)
        for options, message in [
            ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
            ({"latents": noise[:, :1]}, r"shape \(1, 1, 12, 12\), expected \(1, 3, 12, 12\)"),
            ({"generator": seeds}, "2 generators for 1 images"),
            ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "expected .'latents'"),
        ]:
            with pytest.raises(InputError, match=message):
                generate(**options)

    def test_a_callback_sees_and_changes_latents(self, pipeline):
        seen = []

        def watch(pipe, step, t, given):
            assert pipe is pipeline
            seen.append((step, t))
            return {"latents": torch.zeros_like(given["latents"])} if step == 2 else None

        changed = pipeline("a cup", callback_on_step_end=watch, **self.HOW).images
        assert not changed.any()
        assert [step for step, _ in seen] == [0, 1, 2]
        assert seen[0][1] == 1.0
        assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)

    @pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")  # newer ones: dtype
    def test_half_precision_is_of_products_alone(self, pipeline, tmp_path):
        exact = pipeline("a cup", **self.HOW).images
        loaded = semroute.SemanticRoutingPipeline.from_pretrained(
            tmp_path / "pipeline", torch_dtype=torch.bfloat16
        )
        loaded.set_progress_bar_config(disable=True)
        moved = pipeline.to(torch.bfloat16)
        assert {p.dtype for p in moved.transformer.dit.router.parameters()} == {torch.float32}
        state = moved.transformer.state_dict()
        for name, value in loaded.transformer.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])
        assert {value.dtype for value in state.values()} == {torch.float32, torch.bfloat16}
        assert moved.dtype == torch.bfloat16
        for each in (loaded, moved):
            half = each("a cup", **self.HOW).images
            assert half.dtype == torch.float32
            assert 0 < float((half - exact).norm() / exact.norm()) < 0.1
        with pytest.raises(InputError, match=r"use torch\.bfloat16 or torch\.float32"):
            pipeline.to(torch.float16)("a cup", **self.HOW)

    def test_hooks_of_the_network_see_every_use(self, pipeline):
        """By which weights are moved to a GPU and back, as ``enable_model_cpu_offload`` does."""
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Counting(ModelHook):
            inside = False
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                self.inside, self.calls = True, self.calls + 1
                return args, kwargs

            def post_forward(self, module, output):
                self.inside = False
                return output

        expected = pipeline("a cup", **self.HOW).images
        hook, outside = Counting(), []
        for module in pipeline.transformer.dit.modules():
            if not [*module.children()]:
                module.register_forward_pre_hook(
                    lambda *_: None if hook.inside else outside.append(1)
                )
        add_hook_to_module(pipeline.transformer, hook)
        assert torch.equal(pipeline("a cup", **self.HOW).images, expected)
        assert not outside
        assert hook.calls == 3 * 2 * 2  # steps, with and without text, which depends on t

    def test_folder_holds_no_code_and_says_what_it_is(self, make_run, tmp_path):
        pytest.importorskip("diffusers")
        from semroute.trainer.evaluation.diffusers_pipeline import export_pipeline

        run = semroute.load_run(make_run("depth"))
        folder = export_pipeline(run, tmp_path / "pipeline")
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        assert files == [
            "README.md",
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
        ]
        index = json.loads((folder / "model_index.json").read_text())
        assert index["transformer"] == ["semroute", "SemanticRoutingTransformer"]
        assert "from step 2 of a run" in (folder / "README.md").read_text()
        pipeline = semroute.SemanticRoutingPipeline.from_pretrained(folder, llm="/nowhere")
        assert pipeline.transformer.config.step == 2
        assert pipeline.record == run.record
        for name, value in run.model.state_dict().items():
            assert torch.equal(pipeline.transformer.dit.state_dict()[name], value)
        with pytest.raises(InputError, match="/nowhere"):
            pipeline("a red cup")
        with pytest.raises(InputError, match="not empty: name a new folder"):
            export_pipeline(run, folder)
