import math
from typing import get_args

import pytest
import torch

from semroute.schemas import ContractError, InputError, LlmAttention, RoutingConfig, parse
from semroute.trainer.model import fusion
from semroute.trainer.model.gates import phi
from semroute.trainer.model.router import entropy
from semroute.trainer.model.strategies import make_router

LAYERS = [1, 2, 3, 4, 5]
SOFTMAX = {
    "static": {"strategy": "static"},
    "time": {"strategy": "time"},
    "depth": {"strategy": "depth"},
    "joint": {"strategy": "joint"},
    "token": {"strategy": "token"},
    "depth, rank 2": {"strategy": "depth", "rank": 2},
    "depth, top 2": {"strategy": "depth", "top_k": 2},
    "joint, top 2": {"strategy": "joint", "top_k": 2},
    "token, top 2": {"strategy": "token", "top_k": 2},
}
SIGNED = {
    "static, signed": {"strategy": "static", "weights": "signed"},
    "time, signed": {"strategy": "time", "weights": "signed"},
    "depth, signed": {"strategy": "depth", "weights": "signed"},
    "depth, signed, rank 2, top 2": {
        "strategy": "depth", "weights": "signed", "rank": 2, "top_k": 2
    },
    "token, signed": {"strategy": "token", "weights": "signed"},
}  # fmt: skip
FIXED = {name: {"strategy": name} for name in ("penultimate", "uniform", "one-per-block")}
MIXING = FIXED | SOFTMAX | SIGNED
OTHERS = {name: {"strategy": name} for name in ("concat", "attention")}
OTHERS["deep-fusion"] = {"strategy": "deep-fusion", "layers": [1, 2, 4]}
ATTENTION = LlmAttention(
    layers=[1, 2, 4],
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    eps=1e-6,
    bias=True,
    key_norm=True,
    first_position=1,
)
"""Of the LLM, for ``deep-fusion``."""
EVERY = MIXING | OTHERS
LEARNED = [*SOFTMAX, *SIGNED]
NUM_BLOCKS = 3


def make(name, stored=LAYERS, num_llm_layers=5, num_blocks=NUM_BLOCKS, text_width=48, **config):
    return make_router(
        RoutingConfig(**EVERY[name], **config),
        layers=stored,
        num_llm_layers=num_llm_layers,
        num_blocks=num_blocks,
        text_width=text_width,
        attention=ATTENTION,
    )


def features(rows=37, layers=5, width=48, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 30.0, 5.0, 400.0, 2.0])[:layers, None]
    return (torch.randn(rows, layers, width, generator=generator) * scale + 0.5).to(dtype)


def randomise(module, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def pairs(num_rows, batch=4):
    """Every row read once by each batch item."""
    rows = torch.arange(num_rows).repeat(batch)
    return rows, torch.arange(batch).repeat_interleave(num_rows)


def of(name, *strategies):
    return EVERY[name]["strategy"] in strategies


def read(router, hidden):
    return hidden[:, [LAYERS.index(layer) for layer in router.layers_read]]


def weights_by_token(router, hidden, t):
    """alpha of every token: [B or 1, R, D or 1, L]."""
    if not router.depends_on_content:
        return router.alpha(t)[:, None].expand(-1, len(hidden), -1, -1)
    return torch.stack([router.alpha(t, row[None])[0] for row in hidden])[None]


def fused(router, hidden, t=None):
    if not router.depends_on_t:
        return router(hidden)
    rows, owners = pairs(len(hidden))
    return router(hidden, t, rows=rows, owners=owners)


def test_every_strategy_is_in_the_tables():
    names = {*get_args(RoutingConfig.model_fields["strategy"].annotation)}
    assert {config["strategy"] for config in EVERY.values()} == names - {"mixes"}


class TestLayerNorm:
    def test_follows_the_formula_in_fp32(self):
        h = features()
        x = h.double()
        expected = (x - x.mean(-1, keepdim=True)) / torch.sqrt(
            x.var(-1, correction=0, keepdim=True) + 1e-5
        )
        normed = fusion.layer_norm(h)
        assert normed.dtype == torch.float32
        torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)

    def test_autocast_does_not_lower_it(self):
        h = features()
        with torch.autocast("cpu", torch.bfloat16):
            inside = fusion.layer_norm(h)
        assert torch.equal(inside, fusion.layer_norm(h))


class TestPhi:
    def test_spans_more_than_one_dimension_only_when_scaled(self):
        t = torch.linspace(0, 1, 512)

        def share_of_first_direction(scale):
            x = phi(t, scale)
            variance = torch.linalg.svdvals(x - x.mean(0)) ** 2
            return float(variance[0] / variance.sum())

        assert share_of_first_direction(1.0) > 0.98
        assert share_of_first_direction(1000.0) < 0.2

    def test_starts_with_cosines_of_frequency_one(self):
        x = phi(torch.tensor([0.25]), 2.0)
        assert x.shape == (1, 128)
        assert float(x[0, 0]) == pytest.approx(math.cos(0.5))
        assert float(x[0, 64]) == pytest.approx(math.sin(0.5))
        assert float(x[0, 65]) == pytest.approx(math.sin(0.5 * 1e4 ** (-1 / 64)), rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
class TestEveryStrategy:
    """The contract of a strategy."""

    def test_alpha_weighs_the_stored_layers(self, name):
        router = make(name)
        randomise(router)
        alpha = router.alpha(torch.rand(4), read(router, features()))
        per_block = ("depth", "joint", "token", "one-per-block", "deep-fusion")
        blocks = NUM_BLOCKS if of(name, *per_block) else 1
        batch = 4 if of(name, "time", "joint") else 1
        assert alpha.shape == (batch, blocks, 5)
        assert alpha.dtype == torch.float32
        unread = [layer not in router.layers_read for layer in LAYERS]
        assert not alpha[..., unread].any()
        if name not in SIGNED and name != "attention":
            assert (alpha >= 0).all()
            torch.testing.assert_close(alpha.sum(-1), torch.ones(batch, blocks))

    def test_depends_on_t_says_whether_alpha_changes(self, name):
        router = make(name)
        randomise(router)
        hidden = read(router, features())
        early, late = (router.alpha(torch.tensor([t]), hidden) for t in (0.2, 0.9))
        assert torch.equal(early, late) == (not router.depends_on_t)

    def test_depends_on_content_says_whether_alpha_does(self, name):
        router = make(name)
        randomise(router)
        t = torch.rand(1)
        one, other = (router.alpha(t, read(router, features(seed=seed))) for seed in (0, 1))
        assert torch.equal(one, other) == (not router.depends_on_content)

    def test_a_token_is_read_alike_in_any_company(self, name):
        router = make(name)
        randomise(router)
        hidden, t = read(router, features()), torch.rand(4)
        out = fused(router, hidden, t).unflatten(0, (-1, len(hidden)))
        alone = fused(router, hidden[5:7], t).unflatten(0, (-1, 2))
        tolerance = 1e-5 * float(out.abs().max().detach())
        torch.testing.assert_close(alone, out[:, 5:7], rtol=1e-5, atol=tolerance)

    def test_every_parameter_learns(self, name):
        router = make(name)
        randomise(router)
        out = fused(router, read(router, features()), torch.rand(4))
        learned = [(n, p) for n, p in router.named_parameters() if p.requires_grad]
        assert out.requires_grad == bool(learned)
        if out.requires_grad:
            out.sin().sum().backward()
        assert [n for n, p in learned if p.grad is None] == []
        groups = [parameter for group, _ in router.parameter_groups() for parameter in group]
        assert {id(p) for p in groups} <= {id(p) for p in router.parameters()}
        assert len({id(p) for p in groups}) == len(groups)

    def test_width_read_is_what_comes_out(self, name):
        router = make(name)
        hidden = read(router, features())
        assert fused(router, hidden, torch.rand(4)).shape[-1] == router.width_read(48)

    def test_wrong_number_of_layers_says_what_to_read(self, name):
        router = make(name)
        hidden = torch.zeros(3, len(router.layers_read) + 1, 48)
        with pytest.raises(ValueError, match=r"read layers \["):
            fused(router, hidden, torch.rand(4))


@pytest.mark.parametrize("name", MIXING)
class TestMixing:
    def test_fused_features_are_the_weighted_sum_of_normed_layers(self, name):
        router = make(name)
        randomise(router)
        hidden, t = features(), torch.rand(4)
        with torch.no_grad():
            alpha = weights_by_token(router, hidden, t)
            expected = torch.einsum("brdl,rlh->brdh", alpha, fusion.layer_norm(hidden)).double()
            out = fused(router, read(router, hidden), t)
        assert out.dtype == torch.float32
        out = out.unflatten(0, (-1, len(hidden)))
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)

    def test_autocast_does_not_lower_the_mix(self, name):
        router = make(name)
        randomise(router)
        hidden, t = read(router, features()), torch.rand(4)
        expected = fused(router, hidden, t)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(router, hidden, t), expected)


class TestStart:
    @pytest.mark.parametrize(
        ("rows", "layers", "width", "blocks", "threads"),
        [
            (1, 2, 7, 3, 1),
            (37, 30, 576, 6, 1),
            (37, 30, 576, 6, 2),
            (5, 36, 2560, 24, 2),
            (301, 4, 32, 6, 2),
        ],
    )
    @pytest.mark.parametrize("name", LEARNED)
    def test_every_learned_strategy_starts_with_the_bits_of_uniform(
        self, name, rows, layers, width, blocks, threads
    ):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            llm = (range(1, layers + 1), layers, blocks, width)
            hidden = torch.randn(rows, layers, width, generator=torch.Generator().manual_seed(1))
            uniform = make("uniform", *llm)(hidden)
            out = fused(make(name, *llm), hidden, torch.rand(4))
        finally:
            torch.set_num_threads(before)
        if of(name, "time", "joint"):
            uniform = uniform.repeat(4, 1, 1)
        assert torch.equal(out, uniform.expand_as(out))

    @pytest.mark.parametrize("name", LEARNED)
    def test_logits_start_at_zero_and_can_be_learned(self, name):
        router = make(name)
        hidden, t = features(), torch.rand(4)
        assert not router.logits(t).any()
        fused(router, hidden, t).square().sum().backward()
        assert router.logits(t).grad_fn is not None
        reached = [p for p in router.parameters() if p.grad is not None and p.grad.any()]
        assert reached

    def test_attention_starts_as_the_mean_of_its_layers(self):
        router = make("attention")
        hidden = read(router, features())
        assert torch.equal(router(hidden), fusion.fuse(hidden, None))

    def test_sizes_at_the_scale_of_the_paper(self):
        with torch.device("meta"):
            counts = {
                name: sum(p.numel() for p in make(name, range(1, 37), 36, 24, 2560).parameters())
                for name in EVERY
                if name != "deep-fusion"  # of the LLM, and none that learns
            }
        assert counts == {
            **dict.fromkeys(("penultimate", "uniform", "one-per-block", "concat"), 0),
            **dict.fromkeys(("static", "static, signed"), 36),
            **dict.fromkeys(("time", "time, signed"), 84_516),
            **dict.fromkeys(("depth", "depth, top 2", "depth, signed"), 864),
            **dict.fromkeys(("depth, rank 2", "depth, signed, rank 2, top 2"), 2 * (24 + 36)),
            **dict.fromkeys(("joint", "joint, top 2"), 2_028_384),
            **dict.fromkeys(("token", "token, top 2", "token, signed"), 24 * (2560 + 36)),
            "attention": 171_715_084,
        }


class TestWeights:
    def test_signed_weights_are_linear_in_the_logits(self):
        router = make("depth, signed")
        randomise(router)
        alpha = router.alpha()
        torch.testing.assert_close(alpha, (1 + router.weight[None]) / 5)
        assert (alpha < 0).any()

    def test_signed_is_softmax_to_first_order_but_for_the_scale(self):
        signed, softmax = make("depth, signed"), make("depth")
        with torch.no_grad():
            signed.weight.copy_(
                1e-3 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
            )
        softmax.load_state_dict(signed.state_dict())
        one, other = signed.alpha(), softmax.alpha()
        torch.testing.assert_close(one / one.sum(-1, keepdim=True), other, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        "name", ["depth, top 2", "joint, top 2", "depth, signed, rank 2, top 2"]
    )
    def test_top_k_keeps_the_largest_and_reaches_all(self, name):
        router = make(name)
        randomise(router, scale=0.1)
        t = torch.rand(4)
        alpha = router.alpha(t)
        assert ((alpha != 0).sum(-1) == 2).all()
        dense = router.logits(t).detach()
        size = (1 + dense).abs() if name in SIGNED else dense
        kept = size.topk(2).indices.sort(-1).values
        assert torch.equal(alpha.abs().topk(2).indices.sort(-1).values, kept)
        logits = router.logits(t).detach().requires_grad_()
        router.weigh(logits)[..., 0].sum().backward()
        assert logits.grad.any(-1).all()  # also where layer 0 is out

    def test_more_than_there_is_is_refused(self):
        with pytest.raises(InputError, match="top_k is 6, but the store holds 5 layers"):
            make("depth", top_k=6)
        with pytest.raises(InputError, match=r"rank is 4, but logits of 3 blocks .* rank 3"):
            make("depth", rank=4)

    def test_low_rank_logits_have_that_rank(self):
        router = make("depth, rank 2", num_blocks=6)
        randomise(router)
        assert torch.linalg.matrix_rank(router.logits()[0]) == 2

    def test_tokens_weigh_layers_by_what_they_are(self):
        router = make("token")
        with torch.no_grad():
            router.query[:, 3] = 5.0  # looks for layers whose channel 3 is high
        hidden = features()
        for row in hidden:
            highest = fusion.layer_norm(row)[:, 3].argmax()
            assert (router.alpha(hidden=row[None])[0].argmax(-1) == highest).all()
        with pytest.raises(ValueError, match=r"pass hidden .* found None"):
            router.alpha()


class TestPenalty:
    @pytest.mark.parametrize("name", EVERY)
    def test_is_nothing_unless_asked_for(self, name):
        assert make(name).penalty(torch.rand(4)) == 0.0

    @pytest.mark.parametrize("name", ["static", "time", "depth", "joint", "depth, signed"])
    def test_toward_uniform_is_the_chi_square_distance(self, name):
        router = make(name, uniform_penalty=0.5)
        t = torch.rand(4)
        assert not router.penalty(t).any()
        randomise(router)
        expected = 0.5 * ((5 * router.alpha(t) - 1) ** 2).mean()
        torch.testing.assert_close(router.penalty(t), expected)
        router.penalty(t).backward()
        assert any(p.grad.any() for p in router.parameters())

    @pytest.mark.parametrize("name", ["depth", "joint"])
    def test_smooth_is_the_distance_of_neighbouring_blocks(self, name):
        router = make(name, smooth_penalty=2.0)
        t = torch.rand(4)
        randomise(router)
        first, second, third = router.alpha(t).unbind(1)
        steps = (second - first).square().sum(-1) + (third - second).square().sum(-1)
        torch.testing.assert_close(router.penalty(t), 2.0 * 5 * steps.mean() / 2)
        assert make(name, num_blocks=1, smooth_penalty=2.0).penalty(t) == 0.0


class TestOfUse:
    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"strategy": "time", "rank": 2}, "rank is 2, which strategy time does not use"),
            ({"strategy": "uniform", "top_k": 2}, "choose from static, time, depth, joint, token"),
            ({"strategy": "depth", "phi_scale": 1.0}, "phi_scale is 1.0.* choose from time, joint"),
            ({"strategy": "static", "smooth_penalty": 1.0}, "choose from depth, joint"),
            ({"strategy": "depth", "layers": [1]}, "choose from one-per-block, concat, attention"),
        ],
    )  # fmt: skip
    def test_a_key_that_would_do_nothing_is_an_error(self, document, message):
        with pytest.raises(ContractError, match=message):
            parse(RoutingConfig, document, "routing")


class TestFuse:
    @pytest.mark.parametrize("name", [name for name in LEARNED if not of(name, "token")])
    def test_gradients_match_autograd(self, name, monkeypatch):
        monkeypatch.setitem(fusion._CHUNK_ELEMENTS, "cpu", 5 * 48 * 4)  # four rows a chunk
        router = make(name)
        randomise(router)
        hidden, t = features(rows=11), torch.rand(4)
        alpha = router.alpha(t)
        (expected,) = torch.autograd.grad(
            torch.einsum("bdl,rlh->brdh", alpha, fusion.layer_norm(hidden)).sin().sum(),
            alpha,
            retain_graph=True,
        )
        rows, owners = pairs(11) if router.depends_on_t else (None, None)
        out = fusion.fuse(hidden, alpha, rows=rows, owners=owners)
        (found,) = torch.autograd.grad(out.sin().sum(), alpha)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)

    def test_gradients_of_what_tokens_weigh_match_autograd(self, monkeypatch):
        monkeypatch.setitem(fusion._CHUNK_ELEMENTS, "cpu", 5 * 48 * 4)
        router, hidden = make("token"), features(rows=11)
        randomise(router)
        with torch.no_grad():
            router.query /= 10
        normed = fusion.layer_norm(hidden)
        alpha = (torch.einsum("rlh,dh->rdl", normed, router.query) + router.bias).softmax(-1)
        parameters = list(router.parameters())
        expected = torch.autograd.grad((alpha @ normed).sin().sum(), parameters)
        found = torch.autograd.grad(router(hidden).sin().sum(), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)

    def test_pairs_read_the_rows_they_name_with_their_own_alpha(self):
        hidden = features(rows=4)
        alpha = torch.eye(5)[None, :2].expand(2, 2, 5).contiguous()
        alpha[1] = torch.eye(5)[3:5]
        out = fusion.fuse(
            hidden, alpha, rows=torch.tensor([3, 0, 3]), owners=torch.tensor([0, 1, 1])
        )
        normed = fusion.layer_norm(hidden)
        expected = torch.stack([normed[3, :2], normed[0, 3:], normed[3, 3:]])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    def test_alpha_over_other_layers_is_refused(self):
        with pytest.raises(ValueError, match="hold 5 layers but alpha weighs 4"):
            fusion.fuse(features(), torch.full((1, 1, 4), 0.25))


class TestPenultimate:
    def test_reads_only_the_layer_before_the_last_of_the_llm(self):
        router = make("penultimate", stored=[1, 2, 4], num_llm_layers=5)
        assert router.layers_read == (4,)
        assert router.alpha().flatten().tolist() == [0.0, 0.0, 1.0]
        hidden = features()[:, 3:4]
        assert torch.equal(router(hidden)[:, 0], fusion.layer_norm(hidden)[:, 0])

    def test_is_refused_where_that_layer_is_not_stored(self):
        with pytest.raises(InputError, match=r"layer 4 of 5, but the store holds layers \[2, 5\]"):
            make("penultimate", stored=[2, 5])


class TestGated:
    @pytest.mark.parametrize("strategy", ["time", "joint"])
    def test_needs_t(self, strategy):
        with pytest.raises(ValueError, match=f"{strategy} needs t"):
            make(strategy).alpha()

    def test_joint_gates_equal_one_gate_per_block(self):
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
        assert float(entropy(make("uniform").alpha())) == pytest.approx(1.0)
        assert float(entropy(make("penultimate").alpha())) == 0.0

    def test_of_a_single_stored_layer_is_zero(self):
        assert float(entropy(torch.ones(1, 1, 1))) == 0.0


class TestOnePerBlock:
    def chosen(self, num_layers, num_blocks, **config):
        router = make("one-per-block", range(1, num_layers + 1), num_layers, num_blocks, **config)
        return [router.layers[int(row.argmax())] for row in router.alpha()[0]]

    def test_is_hidreams_where_blocks_outnumber_layers(self):
        """``llama_layers`` of HiDream-I1 counts from 0: 0 to 31, then 31 another 16 times."""
        llama_layers = [*range(32), *[31] * 16]
        assert self.chosen(32, 48) == [layer + 1 for layer in llama_layers]

    def test_spreads_more_layers_than_blocks_evenly(self):
        assert self.chosen(31, 6) == [1, 7, 13, 19, 25, 31]
        assert self.chosen(30, 1) == [1]

    def test_layers_can_be_named(self):
        assert self.chosen(5, 3, layers=[2, 4, 2]) == [2, 4, 2]
        with pytest.raises(InputError, match="names 2 layers for 3 blocks"):
            self.chosen(5, 3, layers=[2, 4])
        with pytest.raises(InputError, match=r"read layers \[2, 6\], of a store that holds"):
            self.chosen(5, 3, layers=[2, 6, 2])

    def test_blocks_read_their_layer_and_no_other_is_read(self):
        router = make("one-per-block", num_blocks=3, num_llm_layers=5)
        assert router.layers_read == (1, 3, 5)
        hidden = features()
        out = router(hidden[:, [0, 2, 4]])
        assert torch.equal(out, fusion.layer_norm(hidden[:, [0, 2, 4]]))


class TestConcat:
    @pytest.mark.parametrize(
        ("num_layers", "expected"), [(40, (10, 20, 30)), (36, (9, 18, 27)), (30, (8, 15, 22))]
    )
    def test_reads_what_flux2_reads(self, num_layers, expected):
        router = make("concat", range(1, num_layers + 1), num_layers)
        assert router.layers_read == expected

    def test_stands_side_by_side(self):
        router = make("concat")
        hidden = read(router, features())
        out = router(hidden)
        assert out.shape == (37, 1, len(router.layers_read) * 48)
        assert torch.equal(out.unflatten(-1, (-1, 48))[:, 0], fusion.layer_norm(hidden))

    def test_layers_that_are_not_stored_are_refused(self):
        with pytest.raises(InputError, match=r"strategy concat would read layers \[1, 2, 4\]"):
            make("concat", stored=[1, 2, 3])


class TestLayerAttention:
    def test_reads_what_krea2_reads(self):
        router = make("attention", range(1, 37), 36)
        assert router.layers_read == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)

    def test_is_the_layerwise_part_of_krea2(self):
        """Against diffusers: the same parameters give the same numbers, on normalised layers."""
        krea2 = pytest.importorskip("diffusers.models.transformers.transformer_krea2")
        router = make("attention")
        randomise(router)
        num_layers = len(router.layers_read)
        peer = krea2.Krea2TextFusion(num_layers, 48, 3, 3, 27 * 48 // 10, 2, 0, 1e-5)
        names = {
            "to_q": "q", "to_k": "k", "to_v": "v", "to_gate": "gate", "to_out.0": "out",
            "norm_q": "q_norm", "norm_k": "k_norm", "ff.gate": "mlp_gate", "ff.up": "mlp_value",
            "ff.down": "mlp_out", "norm1": "attention_norm", "norm2": "mlp_norm",
        }  # fmt: skip
        own, state = router.state_dict(), {}
        for key in peer.state_dict():
            if key == "projector.weight":
                state[key] = (1 + own["deviation"])[None] / num_layers
                continue
            _, number, name = key.removesuffix(".weight").split(".", 2)
            value = own[f"blocks.{number}.{names[name.removeprefix('attn.')]}.weight"]
            state[key] = value - 1 if "norm" in name else value  # theirs are offsets from one
        peer.load_state_dict(state)
        assert sum(p.numel() for p in peer.parameters()) == sum(
            p.numel() for p in router.parameters()
        )
        hidden = read(router, features(rows=7))
        expected = peer(fusion.layer_norm(hidden)[None])[0]
        torch.testing.assert_close(router(hidden)[:, 0], expected, rtol=1e-4, atol=1e-3)


class TestFixedWeights:
    @pytest.mark.parametrize("name", ["time", "joint", "token", "concat", "attention"])
    def test_what_is_no_fixed_mix_is_refused(self, name):
        with pytest.raises(
            InputError, match=f"strategy {name} .* few fixed mixes .* keep the layers"
        ):
            make(name).fixed_weights()
