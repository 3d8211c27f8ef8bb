import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from semroute.pipeline.store.order.dataset import held_out
from semroute.pipeline.store.order.sampler import BatchPartition
from semroute.schemas import ContractError, InputError, ValidationConfig, parse
from semroute.trainer.data.loader import PackedLoader
from semroute.trainer.runs.metrics import METRICS_SCHEMA, read_metrics
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.accelerator import make_accelerator
from semroute.trainer.training.setup import prepare
from semroute.trainer.training.train import train


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configure(configure, tmp_path):
    usual = {
        "log_every": 4,
        "data": {"batch_size": 8},
        "validation": {"share": 0.1, "every": 2, "num_bins": 4},
    }
    return lambda output="run", **changes: configure(tmp_path / output, **usual | changes)


class TestHeldOut:
    @given(st.floats(0.01, 0.9), st.integers(0, 5), st.integers(50, 400))
    def test_is_about_the_share_and_stays_when_a_store_grows(self, share, seed, num):
        config = ValidationConfig(share=share, seed=seed)
        some, more = held_out(config, np.arange(num)), held_out(config, np.arange(num + 100))
        assert abs(len(some) - share * num) < 5 * math.sqrt(num)
        assert {*some.tolist()} == {i for i in more.tolist() if i < num}

    def test_samples_without_a_latent_change_no_others(self):
        config = ValidationConfig(share=0.3)
        every, some = np.arange(200), np.arange(0, 200, 2)
        assert {*held_out(config, some)} == {i for i in held_out(config, every) if i % 2 == 0}

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_is_never_trained_on(self, configure, world_size):
        setup = prepare(configure())
        out = held_out(setup.record.config.validation, setup.latents.ids)
        assert 5 < len(out) < 40
        seen = set()
        for rank in range(world_size):
            stream = PackedLoader(
                setup.features,
                setup.latents,
                setup.record.config.data,
                seed=0,
                layers=[1],
                held_out=out,
                partition=BatchPartition(rank, world_size),
            )
            for step in range(50):
                seen |= {*stream.read(step).sample_ids.tolist()}
        assert seen == {*setup.latents.ids.tolist()} - {*out.tolist()}
        assert stream.num_samples == len(setup.latents.ids) - len(out)


class TestMeasure:
    def test_does_not_depend_on_the_run(self, configure):
        """Of one network, whatever the run's seed, batch and posterior say."""
        changes = {"seed": 5, "data": {"batch_size": 4, "noise_draws": 3}}
        one, other = prepare(configure()), prepare(configure(**changes))
        accelerator = make_accelerator(configure())
        flow = load_flow(configure())
        found = [s.validation.measure(one.model, flow, accelerator) for s in (one, other)]
        assert found[0] == found[1]
        assert len(found[0]) == 4
        # A network that predicts zero: the loss is |noise - x0|^2, about 1 + mean x0^2 everywhere.
        assert all(1.0 < loss < 2.5 for loss in found[0])

    def test_t_lies_in_its_bin(self, configure):
        validation = prepare(configure()).validation
        t, noise = validation._draw(np.array([3, 9]), (3, 12, 12))
        assert t.reshape(2, 4).mul(4).long().tolist() == [[0, 1, 2, 3]] * 2
        assert noise.shape == (8, 3, 12, 12)
        again, _ = validation._draw(np.array([9]), (3, 12, 12))
        assert again.tolist() == t[4:].tolist()

    @pytest.mark.parametrize("num_ranks", [2, 5])
    def test_ranks_share_the_work_and_get_the_same(self, configure, num_ranks):
        class Rank:
            """What validation asks of accelerate, one rank after the other."""

            device, num_processes = Accelerator(cpu=True).device, num_ranks

            def __init__(self, index):
                self.process_index, self.part = index, None

            def reduce(self, losses, how):
                assert how == "sum"
                self.part = losses
                return losses

        config = configure()
        setup, flow = prepare(config), load_flow(config)
        setup.model.patch_out.weight.data.normal_()
        whole = setup.validation.measure(setup.model, flow, make_accelerator(config))
        ranks = [Rank(index) for index in range(num_ranks)]
        for rank in ranks:
            setup.validation.measure(setup.model, flow, rank)
        total = sum(rank.part for rank in ranks)
        assert total.double().mean(0).tolist() == whole


class TestRun:
    def test_is_logged_drawn_and_the_same_after_a_stop(self, configure):
        whole = train(configure("whole", log_every=3, steps=5))
        train(configure("parts", log_every=3, steps=3))
        parts = train(configure("parts", log_every=3, steps=5))
        lines = [read_metrics(path) for path in (whole, parts)]
        assert [line["step"] for line in lines[0]] == [2, 3, 4, 5]
        measured = [line for line in lines[0] if "validation_loss" in line]
        assert [line["step"] for line in measured] == [2, 4, 5]
        assert len({line["validation_loss"] for line in measured}) == 3
        of_both = [{x["step"]: x.get("validation_by_t") for x in found} for found in lines]
        assert all(of_both[1][step] == of_both[0][step] for step in (2, 4, 5))
        for line in measured:
            mean = sum(line["validation_by_t"]) / 4
            assert line["validation_loss"] == pytest.approx(mean)
        run = load_run(whole)
        table = run.metrics()
        assert table.schema == METRICS_SCHEMA
        assert table["validation_loss"].null_count == 1
        figures = run.figures()
        assert [*figures] == ["loss", "validation", "routing", "routing-over-steps"]
        labels = [line.get_label() for line in figures["validation"].axes[0].lines]
        assert labels[-1] == "mean"
        assert "t 0.75 to 1" in labels

    def test_changes_nothing_else(self, configure):
        """Training with the same order is the same, measured or not."""
        sizes = {"share": 0.1, "num_bins": 2, "num_samples": 3}
        often = train(configure("often", validation={**sizes, "every": 1}, log_every=1))
        never = train(configure("never", validation={**sizes, "every": 100}, log_every=1))
        losses = [[line["loss"] for line in read_metrics(path)] for path in (often, never)]
        assert losses[0] == losses[1]

    def test_a_second_pair_of_stores(self, configure, feature_store, latent_store):
        pair = {"features": str(feature_store), "latents": str(latent_store)}
        path = train(configure(validation={**pair, "num_samples": 5, "num_bins": 2}))
        assert load_run(path).record.validation.num_samples == 200
        assert "validation_loss" in read_metrics(path)[-1]

    def test_refusals(self, configure, random_store, latent_store):
        with pytest.raises(InputError, match="holds out 0 of 200 samples"):
            prepare(configure(validation={"share": 1e-9}))
        pair = {"features": str(random_store("bf16")), "latents": str(latent_store)}
        with pytest.raises(InputError, match=r"another kind.*(?s:.*)tokenizer"):
            prepare(configure(validation=pair))
        with pytest.raises(ContractError, match="give both or neither"):
            parse(ValidationConfig, {"features": "x"}, "x")
        with pytest.raises(ContractError, match="either share or a second pair"):
            parse(ValidationConfig, {"features": "x", "latents": "y", "share": 0.1}, "x")

    def test_another_share_is_another_run(self, configure):
        train(configure(steps=1))
        with pytest.raises(InputError, match=r"validation.share: 0.2 instead of 0.1"):
            prepare(configure(steps=1, validation={"share": 0.2, "every": 2, "num_bins": 4}))
        assert Path(prepare(configure(steps=1)).record.config.output).exists()


def load_flow(config):
    from semroute.trainer.diffusion.flow import Flow

    return Flow.from_config(config.flow)
