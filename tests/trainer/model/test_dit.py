import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from semroute.schemas import InputError, ModelConfig, RoutingConfig
from semroute.trainer.model import attention
from semroute.trainer.model.blocks import SIZES, RotaryPositions, Size, resolve_size, rotate
from semroute.trainer.model.dit import DiT

LAYERS = [1, 2, 3, 4]
WIDTH = 32
SHAPE = (3, 12, 12)
STRATEGIES = {
    **{name: {} for name in ("penultimate", "uniform", "static", "time", "depth", "joint")},
    **{name: {} for name in ("token", "one-per-block", "concat", "attention")},
}
STRATEGIES |= {"depth, signed": {"weights": "signed"}, "depth, rank": {"rank": 1, "top_k": 2}}


def make(strategy="depth", conditioning="none", randomised=True, **model):
    """A small DiT; randomised so that nothing that starts at zero hides what is behind it."""
    torch.manual_seed(0)
    config = {"size": "nano", "depth": 2, "width": 24, "mlp_width": 32, "patch_size": 4, **model}
    dit = DiT(
        ModelConfig(conditioning=conditioning, **config),
        RoutingConfig(strategy=strategy.split(",")[0], **STRATEGIES[strategy]),
        latent_shape=SHAPE,
        layers=LAYERS,
        num_llm_layers=4,
        text_width=WIDTH,
    )
    if randomised:
        with torch.no_grad():
            for name, parameter in dit.named_parameters():
                if not parameter.any() and not name.startswith("router"):
                    parameter.normal_(std=0.2)
    return dit


def text(lengths=(3, 5, 1), layers=4, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), layers, WIDTH, generator=generator) * 20
    return hidden.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def images(batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *SHAPE, generator=generator)
    return x, torch.rand(batch, generator=generator) * 0.8 + 0.1


def rows_for(dit, lengths=(3, 5, 1)):
    hidden, offsets = text(lengths)
    return hidden[:, [LAYERS.index(layer) for layer in dit.router.layers_read]], offsets


CAPTION = torch.tensor([1, 0, 2, 1])


class TestSizes:
    def test_paper_has_the_parameters_of_the_paper(self):
        with torch.device("meta"):
            dit = DiT(
                ModelConfig(size="paper"),
                RoutingConfig(strategy="depth"),
                latent_shape=(16, 32, 32),
                layers=range(1, 37),
                num_llm_layers=36,
                text_width=2560,
            )
        count = sum(p.numel() for p in dit.parameters())
        assert count == pytest.approx(2.25e9, rel=0.01)
        assert sum(p.numel() for p in dit.blocks[0].parameters()) == pytest.approx(93.3e6, rel=1e-3)

    def test_nano_fits_a_cpu(self):
        dit = DiT(
            ModelConfig(size="nano", patch_size=6),
            RoutingConfig(),
            latent_shape=(3, 18, 18),
            layers=range(1, 31),
            num_llm_layers=30,
            text_width=576,
        )
        assert 0.8e6 < sum(p.numel() for p in dit.parameters()) < 1.25e6

    @pytest.mark.parametrize("name", SIZES)
    def test_every_named_size_is_possible(self, name):
        assert resolve_size(ModelConfig(size=name)) == SIZES[name]

    @pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Size)])
    def test_any_number_can_be_replaced(self, field):
        value = {"num_kv_heads": 2, "num_heads": 8}.get(field, 16)
        changed = resolve_size(ModelConfig(size="nano", **{field: value}))
        assert changed == dataclasses.replace(SIZES["nano"], **{field: value})

    def test_heads_that_cannot_be_grouped_are_refused(self):
        with pytest.raises(InputError, match=r"num_heads 4 is not a multiple of .* 3"):
            resolve_size(ModelConfig(size="nano", num_kv_heads=3))

    def test_head_dim_must_split_for_rotary_positions(self):
        with pytest.raises(InputError, match="head_dim 10 is not divisible by 4"):
            resolve_size(ModelConfig(size="nano", head_dim=10))

    def test_patches_must_tile_the_latents(self):
        with pytest.raises(InputError, match=r"12 x 12 are not divisible by .* 5.*divides both"):
            make(patch_size=5)


class TestForward:
    @pytest.mark.parametrize("conditioning", ["none", "adaln"])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_gives_a_prediction_and_gradients_to_every_parameter(self, strategy, conditioning):
        dit = make(strategy, conditioning)
        hidden, offsets = rows_for(dit)
        x, t = images()
        out = dit(x, t, hidden, offsets, CAPTION)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        out.square().sum().backward()
        assert [n for n, p in dit.named_parameters() if p.grad is None] == []
        for parameter in dit.router_parameters():
            assert parameter.grad.isfinite().all()

    @pytest.mark.parametrize("conditioning", ["none", "adaln"])
    @pytest.mark.parametrize("strategy", ["depth", "joint", "token"])
    def test_gradient_checkpointing_changes_no_number(self, strategy, conditioning):
        found = []
        for checkpointing in (False, True):
            dit = make(strategy, conditioning)
            dit.gradient_checkpointing = checkpointing
            x, t = images()
            out = dit(x, t, *rows_for(dit), CAPTION)
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad for p in dit.parameters())])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_gradient_checkpointing_keeps_less(self):
        kept = []
        for checkpointing in (False, True):
            dit, numbers = make(depth=4), []
            dit.gradient_checkpointing = checkpointing
            x, t = images()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda saved, numbers=numbers: numbers.append(saved.numel()) or saved,
                lambda saved: saved,
            ):
                dit(x, t, *rows_for(dit), CAPTION)
            kept.append(sum(numbers))
        assert kept[1] < 0.6 * kept[0]

    @pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor:UserWarning"
    )  # dynamo's own
    @pytest.mark.parametrize("conditioning", ["none", "adaln"])
    def test_blocks_compile_whole(self, conditioning):
        """One graph per block, and the same numbers; compiling the graph is up to torch."""
        dit, x, t = make("depth", conditioning), *images()
        hidden, offsets = rows_for(dit)
        expected = dit(x, t, hidden, offsets, CAPTION)
        for block in dit.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        found = dit(x, t, hidden, offsets, CAPTION)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("conditioning", ["none", "adaln"])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_sees_the_noise_level_only_where_asked(self, strategy, conditioning):
        dit = make(strategy, conditioning)
        with torch.no_grad():
            for parameter in dit.router_parameters():
                parameter.normal_()
        hidden, offsets = rows_for(dit)
        x, t = images()
        same = torch.equal(
            dit(x, t, hidden, offsets, CAPTION), dit(x, t * 0.5, hidden, offsets, CAPTION)
        )
        assert same == (conditioning == "none" and not dit.router.depends_on_t)

    def test_starts_by_predicting_zero(self):
        dit = make(randomised=False)
        hidden, offsets = rows_for(dit)
        x, t = images()
        assert not dit(x, t, hidden, offsets, CAPTION).any()

    def test_adaln_starts_with_self_attention_and_mlp_switched_off(self):
        dit = make(conditioning="adaln", randomised=False)
        block = dit.blocks[0]
        with torch.no_grad():
            block.cross_attention.out.weight.zero_()
        x = torch.randn(2, 9, 24)
        conditioning = dit.encode_text(*rows_for(dit), torch.tensor([0, 1]))
        noise = dit.noise_embedder(torch.rand(2))
        out = block(
            x,
            noise,
            dit.rotary(3, 3),
            conditioning.keys[0],
            conditioning.values[0],
            conditioning.mask,
        )
        assert torch.equal(out, x)

    def test_autocast_keeps_fp32_predictions_close(self):
        dit = make()
        hidden, offsets = rows_for(dit)
        x, t = images()
        exact = dit(x, t, hidden, offsets, CAPTION)
        with torch.autocast("cpu", torch.bfloat16):
            out = dit(x, t, hidden, offsets, CAPTION)
        assert out.dtype == torch.float32
        error = (out - exact).detach().norm() / exact.detach().norm()
        assert float(error) < 0.03

    def test_a_shape_does_not_change_weights_nor_another_shape(self):
        dit = make()
        hidden, offsets = rows_for(dit)
        x, t = images()
        before = dit(x, t, hidden, offsets, CAPTION)
        tall = torch.randn(len(x), 3, 20, 8)
        assert dit(tall, t, hidden, offsets, CAPTION).shape == tall.shape
        assert torch.equal(dit(x, t, hidden, offsets, CAPTION), before)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((4, 12, 12), "4 channels, but .* made for 3"),
            ((3, 10, 12), "10 x 12 are not divisible"),
        ],
    )
    def test_latents_that_do_not_fit_are_refused(self, shape, message):
        dit = make()
        hidden, offsets = rows_for(dit)
        with pytest.raises(InputError, match=message):
            dit(torch.zeros(1, *shape), torch.ones(1), hidden, offsets, torch.tensor([0]))

    @pytest.mark.parametrize("shape", [(12, 12), (8, 20)])
    def test_patches_come_back_where_they_were(self, shape):
        x = torch.randn(2, 3, *shape)
        dit = make()
        assert torch.equal(dit._unpatchify(dit._patchify(x), *shape), x)


class TestStart:
    @pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "concat"])
    def test_the_rest_of_the_network_starts_with_the_same_weights(self, strategy):
        uniform, other = (
            make(name, randomised=False).state_dict() for name in ("uniform", strategy)
        )
        assert [name for name in {*uniform} ^ {*other} if not name.startswith("router.")] == []
        assert all(torch.equal(uniform[name], other[name]) for name in uniform)

    @pytest.mark.parametrize(
        "strategy", ["static", "time", "depth", "joint", "token", "depth, signed", "depth, rank"]
    )
    def test_learned_strategies_start_as_uniform(self, strategy):
        uniform, other = make("uniform"), make(strategy)
        hidden, offsets = rows_for(uniform)
        x, t = images()
        expected = uniform(x, t, hidden, offsets, CAPTION)
        found = other(x, t, hidden, offsets, CAPTION)
        if other.router.depends_on_t:
            # Projected once a batch item instead of once a caption: other shapes, other rounding.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "strategy", ["uniform", "depth", "time", "joint", "token", "one-per-block", "concat"]
)
class TestText:
    def make(self, strategy):
        dit = make(strategy)
        with torch.no_grad():
            for parameter in dit.router_parameters():
                parameter.normal_()
        return dit

    def test_many_rows_are_projected_as_few_are(self, strategy):
        """Past 2 G E rows matrices are multiplied with each other first: other rounding only."""
        dit = self.make(strategy)
        hidden, offsets = rows_for(dit, (60, 40))
        assert len(hidden) > 2 * dit.size.num_kv_heads * dit.size.head_dim > 40
        t = torch.tensor([0.3, 0.3])
        many = dit.encode_text(hidden, offsets, torch.tensor([0, 1]), t)
        few = dit.encode_text(hidden[60:], torch.tensor([0, 40]), torch.tensor([0]), t[:1])
        for one, other in zip(many.keys + many.values, few.keys + few.values, strict=True):
            torch.testing.assert_close(one[1:, :, :40], other, rtol=1e-4, atol=1e-5)

    def test_unused_and_shared_captions_do_not_change_the_others(self, strategy):
        dit = self.make(strategy)
        hidden, offsets = rows_for(dit, (3, 5, 1))
        x, t = images(2)
        expected = dit(x, t, hidden, offsets, torch.tensor([1, 1]))
        alone = dit(x, t, hidden[3:8], torch.tensor([0, 5]), torch.tensor([0, 0]))
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)

    def test_a_longer_caption_in_the_batch_changes_nothing(self, strategy):
        dit = self.make(strategy)
        hidden, offsets = rows_for(dit, (3, 5, 40))
        x, t = images(3)
        short = dit(x[:2], t[:2], hidden[:8], offsets[:3], torch.tensor([0, 1]))
        long = dit(x, t, hidden, offsets, torch.tensor([0, 1, 2]))
        torch.testing.assert_close(long[:2], short, rtol=1e-5, atol=1e-5)

    def test_what_stands_in_the_padding_is_never_seen(self, strategy):
        dit = self.make(strategy)
        hidden, offsets = rows_for(dit, (3, 7))
        x, t = images(2)
        with torch.no_grad():
            conditioning = dit.encode_text(hidden, offsets, torch.tensor([0, 1]), t)
            expected = dit.denoise(x, t, conditioning)
            for tensor in (*conditioning.keys, *conditioning.values):
                tensor[0, :, 3:] = 1e3
            assert torch.equal(dit.denoise(x, t, conditioning), expected)

    def test_the_mask_covers_each_caption_exactly(self, strategy):
        dit = self.make(strategy)
        hidden, offsets = rows_for(dit, (3, 5, 1))
        conditioning = dit.encode_text(hidden, offsets, CAPTION, torch.rand(4))
        assert conditioning.mask.shape == (4, 1, 1, 5)
        assert conditioning.mask.flatten(1).sum(1).tolist() == [5, 3, 1, 5]
        assert conditioning.keys[0].shape == (4, 1, 5, 24)

    def test_text_encoded_once_serves_every_step(self, strategy):
        dit = self.make(strategy)
        hidden, offsets = rows_for(dit)
        x, t = images()
        conditioning = dit.encode_text(hidden, offsets, CAPTION, t)
        torch.testing.assert_close(
            dit.denoise(x, t, conditioning), dit(x, t, hidden, offsets, CAPTION), rtol=0, atol=0
        )


class TestParameters:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_router_and_block_matrices_do_not_overlap(self, strategy):
        dit = make(strategy, "adaln")
        router = {id(p) for p in dit.router_parameters()}
        matrices = {id(p) for p in dit.block_matrices()}
        assert not router & matrices
        assert all(p.ndim == 2 for p in dit.block_matrices())
        assert len(matrices) == 2 * (4 + 4 + 3 + 1)
        expected = {id(p) for n, p in dit.named_parameters() if n.startswith("router.")}
        assert router == expected

    def test_initialising_again_leaves_the_router_alone(self):
        dit = make("joint")
        before = {name: value.clone() for name, value in dit.router.state_dict().items()}
        dit.initialize_weights()
        for name, value in dit.router.state_dict().items():
            assert torch.equal(value, before[name])

    def test_a_seed_gives_the_same_weights(self):
        first, second = make(), make()
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name])


class TestRotaryPositions:
    def test_attention_depends_on_relative_places_only(self):
        rotary = RotaryPositions(8)(4, 5)
        q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
        scores = (
            rotate(q.expand(1, 1, 20, 8), rotary) @ rotate(k.expand(1, 1, 20, 8), rotary).mT
        )  # [1, 1, N, N]
        score = scores[0, 0].reshape(4, 5, 4, 5)
        torch.testing.assert_close(score[0, 1, 2, 2], score[1, 3, 3, 4], rtol=1e-4, atol=1e-4)
        assert not math.isclose(float(score[0, 1, 2, 2]), float(score[0, 1, 1, 3]), rel_tol=1e-3)

    def test_keeps_lengths(self):
        x = torch.randn(2, 3, 20, 8)
        turned = rotate(x, RotaryPositions(8)(4, 5))
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


class TestAttention:
    """What a GPU's kernels take, which a CPU cannot run: the arguments that they get."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """Arguments of attention as on a GPU, which is computed here."""
        groups, attend, calls = attention.groups_heads, F.scaled_dot_product_attention, []

        def record(q, k, v, attn_mask=None, enable_gqa=False):
            calls.append((q.dtype, q.shape[1] == k.shape[1], attn_mask is not None))
            return attend(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa)

        def on_gpu(device, dtype, masked):
            return groups(torch.device("cuda"), dtype, masked)

        monkeypatch.setattr(F, "scaled_dot_product_attention", record)
        monkeypatch.setattr(attention, "groups_heads", on_gpu)
        return calls

    @pytest.mark.parametrize("half", [True, False])
    @pytest.mark.parametrize("lengths", [(3, 5, 1), (4, 4, 4)])
    def test_no_call_falls_to_the_plain_kernel(self, calls, half, lengths):
        dit = make(num_heads=4, num_kv_heads=1, head_dim=8).requires_grad_(False)
        inputs = (*images(), *rows_for(dit, lengths), CAPTION)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = dit(*inputs)
        assert len(calls) == 4  # two blocks: self-attention, cross-attention
        for dtype, alone, masked in calls:
            flash = dtype == torch.bfloat16 and not masked
            assert flash or alone  # flash attention groups heads; memory-efficient does not
        masks = [masked for *_, masked in calls]
        assert masks == [False, lengths != (4, 4, 4)] * 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "groups_heads", lambda *_: True)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                assert torch.equal(dit(*inputs), found)
