"""Images while a run trains."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from semroute.pipeline.models.llm import Encoder
from semroute.schemas.errors import InputError
from semroute.trainer.diffusion.sampling import SamplingConfig
from semroute.trainer.evaluation.generate import generate, stored_captions
from semroute.trainer.runs.checkpoint import latest_checkpoint
from semroute.trainer.runs.metrics import read_metrics
from semroute.trainer.runs.run import load_run
from semroute.trainer.shapes.images import render
from semroute.trainer.shapes.scenes import sample_scene
from semroute.trainer.training import previews as module
from semroute.trainer.training.setup import prepare
from semroute.trainer.training.train import train

CPU = torch.device("cpu")
SAMPLING = {"every": 2, "captions": 3, "cfg_scale": 2.0, "num_steps": 2, "seed": 5}


@pytest.fixture
def config(configure, tmp_path):
    def config(output="run", **changes):
        usual = {"steps": 5, "log_every": 50, "ema": {"every": 1}, "sampling": SAMPLING}
        return configure(tmp_path / output, **usual | changes)

    return config


def encoders():
    """LLMs in memory; fixtures may have left some."""
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is Encoder}


def weights(path):
    checkpoint = latest_checkpoint(path)
    return {**checkpoint.model(), **{f"ema {k}": v for k, v in checkpoint.ema().items()}}


def test_they_are_those_of_the_average_and_change_no_weight(config, monkeypatch):
    seen = []
    draw = module.Previews.draw

    def recorded(self, *arguments):
        caught = []

        def decoding(latents):
            caught.append(latents)
            return self.decode(latents)

        result = draw(replace(self, decode=decoding), *arguments)
        seen.extend(caught)
        return result

    monkeypatch.setattr(module.Previews, "draw", recorded)
    path = train(config(tracker="tensorboard"))
    other = train(config("other", sampling={}))
    drawn, plain = weights(path), weights(other)
    assert all(torch.equal(drawn[name], plain[name]) for name in plain)
    names = sorted(file.name for file in (path / "previews").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (2, 4, 5)]
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 5]
    run = load_run(path)
    captions = stored_captions(run, run.record.config.features, 3)
    expected = generate(
        run.model,
        run.flow,
        captions.features,
        captions.ids,
        SamplingConfig(2, 2.0),
        seed=5,
        batch_size=3,
        progress=False,
    )
    np.testing.assert_allclose(seen[-1], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(seen[0], expected)  # fewer steps, the same noise
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    tags = [
        (value.tag, event.step)
        for file in path.rglob("events.out.tfevents*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag.startswith("samples")
    ]
    assert sorted({step for _, step in tags}) == [2, 4, 5]


def test_prompts_are_encoded_once_and_the_llm_is_not_kept(config):
    sampling = {**SAMPLING, "prompts": ["one red circle", "two blue stars"]}
    before = encoders()
    opened = module.open_previews(prepare(config(sampling=sampling)), CPU)
    assert encoders() <= before
    assert opened.texts == ["one red circle", "two blue stars"]
    rows = opened.features.read([2, 0, 1], [3])
    assert rows.offsets.shape == (4,)
    assert rows.bits.shape[1:] == (1, 32)


def test_images_are_scored_where_that_is_known(config):
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, held_out=False) for _ in range(3)]
    images = np.stack([render(scene, rng) for scene in scenes])
    images[2] = 255  # nothing is seen on it
    found = []
    draw = module.Previews.draw

    def scored(self, *arguments):
        found.append(draw(replace(self, scenes=scenes, decode=lambda _: images), *arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Previews, "draw", scored)
        path = train(config(steps=2))
    assert found == [pytest.approx(2 / 3)]
    assert read_metrics(path)[-1]["sample_score"] == found[0]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"prompts": ["a"], "features": "f"}, "give either prompts or features"),
        ({"samples": "s"}, "samples is given without features"),
        ({"llm": "l"}, "llm is given without prompts"),
    ],
)
def test_two_sources_are_refused(config, sampling, message):
    with pytest.raises(ValueError, match=message):
        config(sampling=sampling)


def test_a_store_of_another_kind_is_refused_before_training(config, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        train(config(sampling={**SAMPLING, "features": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "run" / "checkpoints").exists()
