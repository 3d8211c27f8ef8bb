import math

import pytest
import torch

import semroute.trainer.routing as routing
from semroute.schemas import InputError, RoutingConfig

LAYERS = [1, 2, 3, 4, 5]
STRATEGIES = ["penultimate", "uniform", "static", "time", "depth", "joint"]
LEARNED = ["static", "time", "depth", "joint"]
NUM_BLOCKS = 3


def make(strategy, layers=LAYERS, num_llm_layers=5, num_blocks=NUM_BLOCKS, **config):
    return routing.make_router(
        RoutingConfig(strategy=strategy, **config),
        layers=layers,
        num_llm_layers=num_llm_layers,
        num_blocks=num_blocks,
    )


def features(rows=37, layers=5, width=48, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 30.0, 5.0, 400.0, 2.0])[:layers, None]
    return (torch.randn(rows, layers, width, generator=generator) * scale + 0.5).to(dtype)


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def pairs(num_rows, batch=4):
    """Every row read once by each batch item."""
    rows = torch.arange(num_rows).repeat(batch)
    return rows, torch.arange(batch).repeat_interleave(num_rows)


def fused(router, hidden, t=None):
    if not router.depends_on_t:
        return router(hidden)
    rows, owners = pairs(len(hidden))
    return router(hidden, t, rows=rows, owners=owners)


class TestLayerNorm:
    def test_follows_the_formula_in_fp32(self):
        h = features()
        x = h.double()
        expected = (x - x.mean(-1, keepdim=True)) / torch.sqrt(
            x.var(-1, correction=0, keepdim=True) + 1e-5
        )
        normed = routing.layer_norm(h)
        assert normed.dtype == torch.float32
        torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)

    def test_autocast_does_not_lower_it(self):
        h = features()
        with torch.autocast("cpu", torch.bfloat16):
            inside = routing.layer_norm(h)
        assert torch.equal(inside, routing.layer_norm(h))


class TestPhi:
    def test_spans_more_than_one_dimension_only_when_scaled(self):
        t = torch.linspace(0, 1, 512)

        def share_of_first_direction(scale):
            x = routing.phi(t, scale)
            variance = torch.linalg.svdvals(x - x.mean(0)) ** 2
            return float(variance[0] / variance.sum())

        assert share_of_first_direction(1.0) > 0.98
        assert share_of_first_direction(1000.0) < 0.2

    def test_starts_with_cosines_of_frequency_one(self):
        x = routing.phi(torch.tensor([0.25]), 2.0)
        assert x.shape == (1, 128)
        assert float(x[0, 0]) == pytest.approx(math.cos(0.5))
        assert float(x[0, 64]) == pytest.approx(math.sin(0.5))
        assert float(x[0, 65]) == pytest.approx(math.sin(0.5 * 1e4 ** (-1 / 64)), rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestEveryStrategy:
    def test_alpha_is_a_distribution_over_the_stored_layers(self, strategy):
        router = make(strategy)
        randomise(router)
        t = torch.rand(4)
        alpha = router.alpha(t)
        blocks = NUM_BLOCKS if strategy in ("depth", "joint") else 1
        batch = 4 if strategy in ("time", "joint") else 1
        assert alpha.shape == (batch, blocks, 5)
        assert alpha.dtype == torch.float32
        torch.testing.assert_close(alpha.sum(-1), torch.ones(batch, blocks))

    def test_depends_on_t_says_whether_alpha_changes(self, strategy):
        router = make(strategy)
        randomise(router)
        same = torch.equal(router.alpha(torch.tensor([0.2])), router.alpha(torch.tensor([0.9])))
        assert same == (not router.depends_on_t)

    def test_fused_features_are_the_weighted_sum_of_normed_layers(self, strategy):
        router = make(strategy)
        randomise(router)
        hidden, t = features(), torch.rand(4)
        read = [LAYERS.index(layer) for layer in router.layers_read]
        alpha = router.alpha(t)
        expected = torch.einsum("bdl,rlh->brdh", alpha, routing.layer_norm(hidden)).double()
        out = fused(router, hidden[:, read], t)
        assert out.dtype == torch.float32
        if router.depends_on_t:
            out = out.unflatten(0, (4, len(hidden)))
        else:
            out, expected = out[None], expected[:1]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    def test_autocast_does_not_lower_the_mix(self, strategy):
        router = make(strategy)
        randomise(router)
        hidden, t = features(layers=len(router.layers_read)), torch.rand(4)
        expected = fused(router, hidden, t)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(router, hidden, t), expected)

    def test_wrong_number_of_layers_says_what_to_read(self, strategy):
        router = make(strategy)
        with pytest.raises(ValueError, match=r"read layers \["):
            fused(router, features()[:, :2], torch.rand(4))


class TestStart:
    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize(
        ("rows", "layers", "width", "blocks"),
        [(1, 2, 7, 3), (37, 30, 576, 6), (5, 36, 2560, 24), (301, 4, 32, 6)],
    )
    @pytest.mark.parametrize("strategy", LEARNED)
    def test_every_learned_strategy_starts_with_the_bits_of_uniform(
        self, strategy, rows, layers, width, blocks, threads
    ):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            names = range(1, layers + 1)
            hidden = torch.randn(rows, layers, width, generator=torch.Generator().manual_seed(1))
            uniform = make("uniform", names, layers, blocks)(hidden)
            out = fused(make(strategy, names, layers, blocks), hidden, torch.rand(4))
        finally:
            torch.set_num_threads(before)
        if strategy in ("time", "joint"):
            uniform = uniform.repeat(4, 1, 1)
        assert torch.equal(out, uniform.expand_as(out))

    @pytest.mark.parametrize("strategy", LEARNED)
    def test_logits_start_at_zero_and_can_be_learned(self, strategy):
        router = make(strategy)
        hidden, t = features(), torch.rand(4)
        assert not router.logits(t).any()
        fused(router, hidden, t).square().sum().backward()
        assert router.logits(t).grad_fn is not None
        reached = [p for p in router.parameters() if p.grad is not None and p.grad.any()]
        assert reached

    def test_sizes_at_the_scale_of_the_paper(self):
        counts = {
            name: sum(p.numel() for p in make(name, range(1, 37), 36, 24).parameters())
            for name in STRATEGIES
        }
        assert counts == {
            "penultimate": 0,
            "uniform": 0,
            "static": 36,
            "time": 84_516,
            "depth": 864,
            "joint": 2_028_384,
        }


class TestFuse:
    @pytest.mark.parametrize("strategy", LEARNED)
    def test_gradients_match_autograd(self, strategy, monkeypatch):
        monkeypatch.setitem(routing._CHUNK_ELEMENTS, "cpu", 5 * 48 * 4)  # four rows a chunk
        router = make(strategy)
        randomise(router)
        hidden, t = features(rows=11), torch.rand(4)
        alpha = router.alpha(t)
        (expected,) = torch.autograd.grad(
            torch.einsum("bdl,rlh->brdh", alpha, routing.layer_norm(hidden)).sin().sum(),
            alpha,
            retain_graph=True,
        )
        rows, owners = pairs(11) if router.depends_on_t else (None, None)
        out = routing.fuse(hidden, alpha, rows=rows, owners=owners)
        (found,) = torch.autograd.grad(out.sin().sum(), alpha)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)

    def test_pairs_read_the_rows_they_name_with_their_own_alpha(self):
        hidden = features(rows=4)
        alpha = torch.eye(5)[None, :2].expand(2, 2, 5).contiguous()
        alpha[1] = torch.eye(5)[3:5]
        out = routing.fuse(
            hidden, alpha, rows=torch.tensor([3, 0, 3]), owners=torch.tensor([0, 1, 1])
        )
        normed = routing.layer_norm(hidden)
        expected = torch.stack([normed[3, :2], normed[0, 3:], normed[3, 3:]])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    def test_alpha_over_other_layers_is_refused(self):
        with pytest.raises(ValueError, match="hold 5 layers but alpha weighs 4"):
            routing.fuse(features(), torch.full((1, 1, 4), 0.25))


class TestPenultimate:
    def test_reads_only_the_layer_before_the_last_of_the_llm(self):
        router = make("penultimate", layers=[1, 2, 4], num_llm_layers=5)
        assert router.layers_read == (4,)
        assert router.alpha().flatten().tolist() == [0.0, 0.0, 1.0]
        hidden = features()[:, 3:4]
        assert torch.equal(router(hidden)[:, 0], routing.layer_norm(hidden)[:, 0])

    def test_is_refused_where_that_layer_is_not_stored(self):
        with pytest.raises(InputError, match=r"layer 4 of 5, but the store holds layers \[2, 5\]"):
            make("penultimate", layers=[2, 5])


class TestGated:
    @pytest.mark.parametrize("strategy", ["time", "joint"])
    def test_needs_t(self, strategy):
        with pytest.raises(ValueError, match=f"{strategy} needs t"):
            make(strategy).alpha()

    def test_joint_gates_equal_one_gate_a_block(self):
        router = make("joint")
        randomise(router)
        t = torch.rand(4)
        gates = router.gates
        for block in range(NUM_BLOCKS):
            single = make("time")
            single.load_state_dict(
                {f"gates.{name}": p[block : block + 1] for name, p in gates.named_parameters()}
            )
            torch.testing.assert_close(
                router.logits(t)[:, block], single.logits(t)[:, 0], rtol=1e-4, atol=1e-4
            )


class TestEntropy:
    def test_is_one_for_uniform_and_zero_for_one_layer(self):
        assert float(routing.entropy(make("uniform").alpha())) == pytest.approx(1.0)
        assert float(routing.entropy(make("penultimate").alpha())) == 0.0

    def test_of_a_single_stored_layer_is_zero(self):
        assert float(routing.entropy(torch.ones(1, 1, 1))) == 0.0
