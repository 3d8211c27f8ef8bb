"""A run whose blocks attend to the LLM's own keys and values, from its start to what is made of
it."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import semroute
from semroute.cli import cli
from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.models import attention as models
from semroute.pipeline.store.open import open_features
from semroute.schemas import ContractError, InputError, TrainConfig, parse
from semroute.trainer.diffusion.sampling import SamplingConfig, sample
from semroute.trainer.evaluation.generate import encoded_captions, generate
from semroute.trainer.runs.checkpoint import latest_checkpoint
from semroute.trainer.runs.export import export_router
from semroute.trainer.runs.record import LLM_WEIGHTS, read_record
from semroute.trainer.runs.run import load_run
from semroute.trainer.studies.ablation import weights_of
from semroute.trainer.training.setup import make_loader, prepare
from semroute.trainer.training.train import train

ROUTING = {"strategy": "deep-fusion", "layers": [1, 3]}


@pytest.fixture(scope="module")
def run(configure, tmp_path_factory):
    """A run of four steps, with validation; read only."""
    validation = {"share": 0.1, "every": 2, "num_samples": 8}
    path = tmp_path_factory.mktemp("deep") / "run"
    return train(configure(path, routing=ROUTING, validation=validation))


def opened_at_random(run):
    """The run with weights as after a long training: at the start it predicts zero."""
    opened = load_run(run)
    generator = torch.Generator().manual_seed(0)
    for name in ("patch_in", "patch_out"):
        weight = opened.model.get_parameter(f"{name}.weight")
        weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    return opened


def tensors(path):
    checkpoint = latest_checkpoint(path)
    return {
        f"{kind}/{name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in getattr(checkpoint, kind)().items()
    }


class TestRun:
    def test_resumes_bit_for_bit_and_without_the_llm(self, configure, run, tmp_path, monkeypatch):
        parts = tmp_path / "parts"
        options = {"routing": ROUTING, "validation": {"share": 0.1, "every": 2, "num_samples": 8}}
        train(configure(parts, steps=2, **options))

        def missing(*_arguments, **_options):
            raise AssertionError("the LLM was looked for")

        monkeypatch.setattr(models, "find_attention", missing)
        monkeypatch.setattr(models, "read_attention", missing)
        train(configure(parts, gradient_checkpointing=True, **options))
        found, expected = tensors(parts), tensors(run)
        assert found.keys() == expected.keys()
        assert not any("router" in name for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_holds_a_copy_of_the_weights_that_it_reads(self, run, tiny_llm):
        record, copied = read_record(run), load_file(run / LLM_WEIGHTS)
        attention = record.llm_attention
        assert (attention.layers, attention.num_heads, attention.num_kv_heads) == ([1, 3], 4, 2)
        assert attention.first_position == 1  # behind the BOS token
        llm = load_file(tiny_llm / "model.safetensors")
        for number, layer in enumerate([1, 3]):
            both = (llm[f"layers.{layer}.self_attn.{name}_proj.weight"] for name in "kv")
            assert torch.equal(copied["weight"][number], torch.cat([*both]))
        learned = load_run(run).model.router.state_dict()
        assert all(torch.equal(learned[name], copied[name]) for name in copied)

    def test_shows_the_layer_of_each_block(self, run, tmp_path):
        opened = load_run(run)
        assert opened.weights().tolist() == [[[1, 0, 0, 0], [0, 0, 1, 0]]]
        assert "0 of them routing" in str(opened)
        assert {"loss", "routing"} <= {*opened.figures()}
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert all("grad_norm_router" not in json.loads(line) for line in lines)
        assert not (run / "routing.jsonl").exists()

    @pytest.mark.parametrize("damage", ["missing", "changed"])
    def test_a_damaged_copy_is_refused(self, run, tmp_path, damage):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        if damage == "missing":
            (copy / LLM_WEIGHTS).unlink()
        else:
            content = bytearray((copy / LLM_WEIGHTS).read_bytes())
            content[-1] ^= 1
            (copy / LLM_WEIGHTS).write_bytes(content)
        with pytest.raises(InputError, match=rf"{LLM_WEIGHTS} is missing or damaged"):
            load_run(copy)

    def test_a_start_stopped_before_the_record_begins_again(self, configure, run, tmp_path):
        path = tmp_path / "begun"
        path.mkdir()
        (path / LLM_WEIGHTS).write_bytes(b"half")
        train(configure(path, routing=ROUTING, steps=1))
        load_run(path)

    def test_another_run_starts_from_it(self, configure, run, tmp_path):
        start = str(run)
        begun = train(configure(tmp_path / "a", routing=ROUTING, start=start, steps=1))
        assert not tensors(begun).keys() ^ tensors(run).keys()
        with pytest.raises(InputError, match="deep_fusion: False instead of True"):
            train(configure(tmp_path / "b", routing={"strategy": "depth"}, start=start))

    def test_dry_run(self, configure, tmp_path):
        config = tmp_path / "run.json"
        config.write_text(configure(tmp_path / "run", routing=ROUTING).model_dump_json())
        done = CliRunner().invoke(cli, ["train", str(config), "--dry-run"])
        assert done.exit_code == 0, done.output
        assert "strategy deep-fusion reads layers 1, 3 (2 of 4 stored)" in done.stdout
        assert not (tmp_path / "run").exists()


class TestNullCaption:
    def test_batches_say_which_caption_it_is(self, configure, tmp_path):
        config = configure(tmp_path / "run", routing=ROUTING, data={"caption_dropout": 0.5})
        loader = make_loader(prepare(config))
        marked = []
        for step in range(6):
            batch = loader.read(step)
            null = batch.conditioning["null"]
            assert null.tolist() == [length == 1 for length in batch.offsets.diff().tolist()]
            marked += null.tolist()
        assert {*marked} == {True, False}

    def test_it_is_read_so_in_sampling(self, run, feature_store):
        """An empty prompt is the null caption: guidance away from it changes nothing."""
        opened = opened_at_random(run)
        encoder = PromptEncoder(opened.record.features, opened.record.model_source, "cpu")
        captions = encoded_captions(encoder, ["a red cup", "", "a box"])
        assert captions.ids == [1, 0, 3]
        options = {"seed": 0, "batch_size": 2, "progress": False}
        plain, guided = (
            generate(
                *(opened.model, opened.flow, captions.features, captions.ids),
                SamplingConfig(num_steps=2, cfg_scale=scale),
                **options,
            )
            for scale in (1.0, 5.0)
        )
        np.testing.assert_allclose(guided[1], plain[1], rtol=1e-5, atol=1e-5)
        assert not np.allclose(guided[0], plain[0], rtol=1e-3, atol=1e-3)
        # Stored captions, and prompts encoded now, are read alike.
        store = open_features(feature_store)
        texts = store.captions["text"].to_pylist()
        found = encoded_captions(encoder, [texts[3]])
        one, other = (
            generate(
                *(opened.model, opened.flow, features, ids),
                SamplingConfig(num_steps=2, cfg_scale=3.0),
                **options,
            )
            for features, ids in ((store, [3]), (found.features, found.ids))
        )
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)
        # So are rows without ids.
        rows, null = (store.read([n], opened.model.router.layers_read) for n in (3, 0))
        latents = sample(
            *(opened.model, opened.flow, rows.tensor(), torch.from_numpy(rows.offsets)),
            null.tensor(),
            SamplingConfig(num_steps=2, cfg_scale=3.0),
        )
        np.testing.assert_allclose(latents.numpy(), one, rtol=1e-5, atol=1e-5)


class TestExport:
    def test_a_pipeline_draws_the_images_of_sample(self, run, tmp_path):
        pytest.importorskip("diffusers")
        from semroute.trainer.evaluation.diffusers_pipeline import export_pipeline

        opened = opened_at_random(run)
        folder = export_pipeline(opened, tmp_path / "pipeline")
        pipeline = semroute.SemanticRoutingPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        found = pipeline(
            "a red cup",
            negative_prompt="",
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="latent",
        ).images
        encoder = PromptEncoder(opened.record.features, opened.record.model_source, "cpu")
        captions = encoded_captions(encoder, ["a red cup"])
        expected = generate(
            *(opened.model, opened.flow, captions.features, captions.ids),
            SamplingConfig(num_steps=2, cfg_scale=3.0),
            **{"seed": 0, "batch_size": 1, "progress": False},
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def test_there_is_no_router_to_export(self, run, tmp_path):
        with pytest.raises(InputError, match="no mix of layers; export the run as a pipeline"):
            export_router(load_run(run), tmp_path / "router")

    def test_there_are_no_weights_to_swap(self, configure, run, tmp_path):
        with pytest.raises(InputError, match="deep-fusion has no one set of weights"):
            weights_of(load_run(run), 4)
        concat = {"strategy": "concat", "layers": [1, 3]}
        other = train(configure(tmp_path / "concat", routing=concat, steps=1))
        with pytest.raises(InputError, match="concat has no one set of weights"):
            weights_of(load_run(other), 4)

    def test_there_are_no_mixes_to_store(self, run):
        with pytest.raises(InputError, match=r"reads the LLM's own keys and values"):
            load_run(run).routing()


class TestRefusals:
    def test_a_store_without_the_layers(self, configure, tmp_path):
        with pytest.raises(InputError, match=r"would read layers \[0, 3\], of a store that holds"):
            train(configure(tmp_path / "run", routing={"strategy": "deep-fusion"}))
        assert not (tmp_path / "run").exists()

    def test_an_llm_that_is_gone(self, configure, tmp_path):
        routing = ROUTING | {"llm": str(tmp_path / "nowhere")}
        with pytest.raises(InputError, match="nowhere"):
            train(configure(tmp_path / "run", routing=routing))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": {"head_dim": 8}}, "model.head_dim is given, but with deep-fusion heads are"),
            (
                {"model": {"kind": "pretrained", "pretrained": "x"}},
                "replaces the attention of our own network",
            ),
            ({"routing": {"strategy": "depth", "llm": "x"}}, "choose from deep-fusion"),
            ({"routing": ROUTING | {"layers": [-1, 3]}}, "greater than or equal to 0"),
        ],
    )
    def test_keys_that_do_not_fit(self, changes, message):
        document = {"features": "f", "latents": "l", "output": "o", "routing": ROUTING} | changes
        with pytest.raises(ContractError, match=message):
            parse(TrainConfig, document, "run.yaml")
