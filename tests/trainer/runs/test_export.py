import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

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
