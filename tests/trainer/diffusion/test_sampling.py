import pytest
import torch

from semroute.schemas import ModelConfig, RoutingConfig
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise import starting_noise
from semroute.trainer.diffusion.sampling import SamplingConfig, sample, solve
from semroute.trainer.model.dit import DiT

SHAPE = (3, 8, 8)
STRATEGIES = ["uniform", "depth", "time"]


class Towards:
    """A model that knows the answer: the exact prediction for data at ``x0``, by text."""

    latent_shape = SHAPE

    def __init__(self, flow):
        self.flow = flow

    def denoise(self, x_t, t, x0):
        if self.flow.prediction == "x0":
            return x0.expand_as(x_t)
        return (x_t - x0) / t.reshape(-1, 1, 1, 1)


def dit(strategy):
    torch.manual_seed(0)
    model = DiT(
        ModelConfig(size="nano", depth=2, patch_size=4),
        RoutingConfig(strategy=strategy),
        latent_shape=SHAPE,
        layers=[1, 2, 3],
        num_llm_layers=3,
        text_width=16,
    )
    with torch.no_grad():
        for parameter in (*model.router_parameters(), model.patch_out.weight):
            parameter.normal_(std=0.1)
    return model


def captions(lengths=(2, 4, 3)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths), 3, 16, generator=generator)
    return hidden, torch.tensor([0, *lengths]).cumsum(0), torch.randn(2, 3, 16, generator=generator)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
class TestSolve:
    @pytest.mark.parametrize("method", ["euler", "heun"])
    @pytest.mark.parametrize("num_steps", [1, 7])
    def test_reaches_the_data_of_an_exact_model(self, prediction, num_steps, method):
        flow = Flow(prediction, shift=3.0)
        x0 = torch.full((2, *SHAPE), 0.4)
        noise = torch.randn(2, *SHAPE)
        config = SamplingConfig(num_steps, cfg_scale=1.0, method=method)
        out = solve(Towards(flow), flow, lambda t: x0, None, noise, config)
        torch.testing.assert_close(out, x0, rtol=1e-4, atol=1e-4)

    def test_guidance_extrapolates_from_the_null_text(self, prediction):
        flow = Flow(prediction)
        text, null = torch.full((1, *SHAPE), 1.0), torch.full((1, *SHAPE), 0.25)
        config = SamplingConfig(num_steps=1, cfg_scale=3.0)
        noise = torch.randn(1, *SHAPE)
        out = solve(Towards(flow), flow, lambda t: text, lambda t: null, noise, config)
        torch.testing.assert_close(out, null + 3.0 * (text - null), rtol=1e-4, atol=1e-4)

    def test_scale_one_never_computes_the_null_text(self, prediction):
        flow = Flow(prediction)

        def fail(t):
            raise AssertionError("the null text was computed")

        noise = torch.randn(1, *SHAPE)
        x0 = torch.zeros(1, *SHAPE)
        solve(
            Towards(flow),
            flow,
            lambda t: x0,
            fail,
            noise,
            SamplingConfig(num_steps=2, cfg_scale=1.0),
        )

    def test_steps_outside_the_interval_are_not_guided(self, prediction):
        flow = Flow(prediction)
        text, null = torch.full((1, *SHAPE), 1.0), torch.full((1, *SHAPE), 0.25)
        noise = torch.randn(1, *SHAPE)

        def integrate(**options):
            calls = []

            def unguided(t):
                calls.append(t.item())
                return null

            config = SamplingConfig(num_steps=4, **options)
            return solve(Towards(flow), flow, lambda t: text, unguided, noise, config), calls

        plain, _ = integrate(cfg_scale=1.0)
        whole, calls = integrate(cfg_scale=3.0)
        assert calls == pytest.approx([1.0, 0.75, 0.5, 0.25])
        never, calls = integrate(cfg_scale=3.0, cfg_interval=(0.1, 0.2))
        assert calls == []
        assert torch.equal(never, plain)
        # The last step of an exact model decides.
        early, calls = integrate(cfg_scale=3.0, cfg_interval=(0.5, 0.75))
        assert calls == pytest.approx([0.75, 0.5])
        torch.testing.assert_close(early, plain, rtol=1e-4, atol=1e-4)
        late, calls = integrate(cfg_scale=3.0, cfg_interval=(0.2, 0.5))
        assert calls == pytest.approx([0.5, 0.25])
        torch.testing.assert_close(late, whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(late, plain, atol=0.1)

    def test_callback_sees_every_step(self, prediction):
        flow = Flow(prediction)
        seen = []
        x0, noise = torch.zeros(1, *SHAPE), torch.randn(1, *SHAPE)
        out = solve(
            Towards(flow),
            flow,
            lambda t: x0,
            None,
            noise,
            SamplingConfig(num_steps=4, cfg_scale=1.0),
            callback=lambda step, t, x: seen.append((step, t, x)),
        )
        assert [step for step, _, _ in seen] == [1, 2, 3, 4]
        assert [t for _, t, _ in seen] == pytest.approx([0.75, 0.5, 0.25, 0.0])
        assert torch.equal(seen[-1][2], out)

    @pytest.mark.parametrize("method", ["euler", "heun"])
    def test_a_clock_changes_the_t_of_the_text_and_not_of_the_network(self, prediction, method):
        flow = Flow(prediction)
        seen, nominal = [], []
        x0 = torch.zeros(2, *SHAPE)

        class Watched(Towards):
            def denoise(self, x_t, t, text):
                nominal.append(t.tolist())
                return super().denoise(x_t, t, text)

        def text(t):
            seen.append(t.tolist())
            return x0

        def clock(x, t):
            assert x.shape == (2, *SHAPE)
            return t / 2

        config = SamplingConfig(2, cfg_scale=3.0, method=method, clock=clock)
        solve(Watched(flow), flow, text, text, torch.randn(2, *SHAPE), config)
        levels = [1.0, 0.5] if method == "euler" else [1.0, 0.5, 0.5]
        assert nominal == [[t, t] for t in levels for _ in ("text", "null")]
        assert seen == [[t / 2, t / 2] for t in levels for _ in ("text", "null")]


class Curved:
    """A velocity dx/dt = x, whose solution from 1 to 0 divides by e."""

    latent_shape = SHAPE

    def denoise(self, x_t, t, text):
        return x_t


def test_heun_is_of_second_order():
    noise = torch.ones(1, *SHAPE)
    exact = noise / torch.e

    def error(method, num_steps):
        config = SamplingConfig(num_steps, cfg_scale=1.0, method=method)
        found = solve(Curved(), Flow(), lambda t: t, None, noise, config)
        return (found - exact).abs().max().item()

    # The last step is Euler's, whose own error of one step is of second order too.
    assert error("euler", 20) / error("euler", 40) == pytest.approx(2.0, abs=0.2)
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4.0, abs=0.4)
    assert error("heun", 20) < error("euler", 20) / 10


class TestStartingNoise:
    def test_is_a_function_of_seed_and_number(self):
        together = starting_noise(SHAPE, seed=3, numbers=range(6))
        parts = [starting_noise(SHAPE, seed=3, numbers=(i, i + 1)) for i in (0, 2, 4)]
        assert torch.equal(together, torch.cat(parts))

    def test_seeds_and_numbers_do_not_share_noise(self):
        noise = torch.cat([starting_noise(SHAPE, seed=seed, numbers=range(8)) for seed in range(4)])
        assert len(noise.flatten(1).unique(dim=0)) == 32


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestSample:
    def test_batches_do_not_change_an_image(self, strategy):
        model, flow = dit(strategy), Flow()
        hidden, offsets, null = captions()
        together = sample(model, flow, hidden, offsets, null, SamplingConfig(3, 2.0), seed=5)
        assert together.shape == (3, *SHAPE)
        alone = sample(
            model,
            flow,
            hidden[2:6],
            torch.tensor([0, 4]),
            null,
            SamplingConfig(3, 2.0),
            seed=5,
            numbers=[1],
        )
        torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)

    def test_text_is_encoded_once_where_it_does_not_depend_on_t(self, strategy):
        model, flow = dit(strategy), Flow()
        hidden, offsets, null = captions()
        calls = []
        model.context.register_forward_hook(lambda *_: calls.append(1))
        sample(model, flow, hidden, offsets, null, SamplingConfig(5, 2.0))
        passes = {"uniform": 2, "depth": 2 * 2, "time": 2 * 5}
        assert len(calls) == passes[strategy]

    def test_bfloat16_is_of_products_alone(self, strategy):
        model, flow = dit(strategy), Flow()
        hidden, offsets, null = captions()
        seen = []
        model.patch_in.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        exact, half = (
            sample(model, flow, hidden, offsets, null, SamplingConfig(3, 2.0, dtype=dtype))
            for dtype in ("float32", "bfloat16")
        )
        assert {*seen[: len(seen) // 2]} == {torch.float32}
        assert {*seen[len(seen) // 2 :]} == {torch.bfloat16}
        assert exact.dtype == half.dtype == torch.float32
        assert not torch.equal(exact, half)
        assert float((exact - half).norm() / exact.norm()) < 0.02

    def test_guidance_without_the_null_caption_is_refused(self, strategy):
        hidden, offsets, _ = captions()
        with pytest.raises(ValueError, match=r"cfg_scale is 6.0 but there is no null text"):
            sample(dit(strategy), Flow(), hidden, offsets, config=SamplingConfig(2))

    def test_needs_no_null_caption_without_guidance(self, strategy):
        model, flow = dit(strategy), Flow()
        hidden, offsets, null = captions()
        config = SamplingConfig(num_steps=2, cfg_scale=1.0)
        without = sample(model, flow, hidden, offsets, config=config)
        assert torch.equal(without, sample(model, flow, hidden, offsets, null, config))
