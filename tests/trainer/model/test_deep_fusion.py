import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from semroute.pipeline.models.attention import FAMILIES, find_attention, read_attention
from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import Encoder, describe_model
from semroute.schemas import (
    NULL,
    CaptionsIdentity,
    FeatureIdentity,
    InputError,
    LlmAttention,
    ModelConfig,
    RoutingConfig,
    SamplesIdentity,
    Template,
    TextProcessing,
)
from semroute.trainer.model.blocks import JointAttention, Size, rotate
from semroute.trainer.model.deep_fusion import DeepFusion, layers_of_blocks
from semroute.trainer.model.dit import DiT

NUM_LAYERS, WIDTH, PREFIX = 4, 32, 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLMS = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True}),
    "llama, long": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"rope_parameters": YARN}),
    "qwen3_vl_text": (
        "Qwen3VLText",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "query_pre_attn_scalar": 8,
        },
    ),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Name in :data:`LLMS` -> the folder of a tiny LLM, all of whose weights are random."""

    @functools.cache
    def make(name, **changes):
        kind, options = LLMS[name]
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            **options | changes,
        )
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path_factory.mktemp("llm") / "model"
        model.save_pretrained(folder)
        return folder

    return make


def identity(folder, **changes):
    values = {
        "model": describe_model(find_model(str(folder))),
        "tokenizer": "",
        "template": Template(
            text="", prefix_tokens=[*range(PREFIX)], suffix_tokens=[], keep_prefix=False
        ),
        "layers": [*range(NUM_LAYERS)],
        "final_norm": "absent",
        "dtype": "float32",
        "attention": "sdpa",
        "max_length": 64,
        "captions": CaptionsIdentity(num_captions=1, fingerprint="", seed=0),
        "samples": SamplesIdentity(num_samples=1, fingerprint=None),
    }
    return FeatureIdentity(**values | changes)


def make_router(folder, chosen=(0, 1, 2, 3), **changes):
    features = identity(folder, **changes)
    layers = sorted({*chosen})
    source, attention = find_attention(features, layers, str(folder))
    router = DeepFusion(features.layers, attention, NUM_LAYERS, len(chosen), chosen, WIDTH)
    router.load_state_dict(read_attention(source, attention, features))
    return router


def sequences_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 64, PREFIX + length) for length in lengths]


@functools.cache
def make_encoder(folder):
    return Encoder(find_model(str(folder)), [*range(NUM_LAYERS)], "float32", "cpu")


@functools.cache
def make_model(folder):
    return AutoModel.from_pretrained(folder).eval()


def stored(folder, sequences, first):
    """Hidden states as extraction stores them, [R, L, H], and offsets."""
    encoder = make_encoder(folder)
    rows = [None] * len(encoder.layers)
    encoder.encode(sequences, first, rows.__setitem__)
    lengths = [len(sequence) - start for sequence, start in zip(sequences, first, strict=True)]
    return torch.stack(rows, 1), torch.tensor([0, *lengths]).cumsum(0)


@torch.no_grad()
def online(folder, sequences, first):
    """Keys and values of all layers, from the cache of the LLM: [R, L, 2*G*E]."""
    model = make_model(folder)
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    found = []
    for layer in cache.layers:
        both = [kind.transpose(1, 2).flatten(2) for kind in (layer.keys, layer.values)]
        both = torch.cat(both, -1)  # [B, T, 2*G*E]
        rows = [r[start : len(s)] for r, s, start in zip(both, sequences, first, strict=True)]
        found.append(torch.cat(rows))
    return torch.stack(found, 1)


class TestKeysAndValues:
    def test_every_family_is_tested(self):
        assert {name.partition(",")[0] for name in LLMS} == {*FAMILIES}

    @pytest.mark.parametrize("name", LLMS)
    def test_are_those_of_the_llm(self, llm, name):
        folder = llm(name)
        sequences, first = sequences_of([5, 9, 1, 9]), [PREFIX] * 4
        sequences.append(sequences[0][:PREFIX])  # the null caption
        first.append(0)
        hidden, offsets = stored(folder, sequences, first)
        router = make_router(folder)
        null = torch.tensor([False] * 4 + [True])
        found = router.keys_and_values(hidden, router.positions(offsets, null))
        expected = online(folder, sequences, first)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        # Not because nothing depends on positions.
        moved = router.keys_and_values(hidden, router.positions(offsets, null) + 1)
        assert not torch.allclose(moved, expected, atol=1e-2)

    @settings(max_examples=20, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
        chosen=st.lists(st.integers(0, NUM_LAYERS - 1), min_size=1, max_size=6),
        seed=st.integers(0, 99),
    )
    def test_of_any_captions_and_blocks(self, llm, lengths, chosen, seed):
        folder, sequences = llm("llama"), sequences_of(lengths, seed)
        first = [PREFIX] * len(lengths)
        layers = sorted({*chosen})
        hidden, offsets = stored(folder, sequences, first)
        hidden = hidden[:, layers]
        router = make_router(folder, tuple(chosen))
        found = router.keys_and_values(hidden, router.positions(offsets, None))
        expected = online(folder, sequences, first)[:, chosen]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)

    def test_a_kept_prefix_begins_at_zero(self, llm):
        template = Template(text="", prefix_tokens=[1], suffix_tokens=[], keep_prefix=True)
        router = make_router(llm("llama"), template=template)
        assert router.positions(torch.tensor([0, 2, 5]), None).tolist() == [0, 1, 0, 1, 2]

    def test_in_bfloat16_the_weights_are_those_that_ran(self, llm):
        folder = llm("llama")
        source, attention = find_attention(identity(folder), [1], str(folder))
        exact = read_attention(source, attention, identity(folder))
        lower = read_attention(source, attention, identity(folder, dtype="bfloat16"))
        assert torch.equal(lower["weight"], exact["weight"].bfloat16())

    def test_weights_of_the_llm_do_not_learn(self, llm):
        router = make_router(llm("qwen3"))
        assert not any(parameter.requires_grad for parameter in router.parameters())
        assert router.parameter_groups() == []


class TestRefusals:
    def refuse(self, folder, message, layers=(0, 1), model=None, **changes):
        with pytest.raises(InputError, match=message):
            find_attention(identity(folder, **changes), layers, str(model or folder))

    def test_another_family(self, tmp_path):
        config = transformers.GPTNeoXConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
        )
        transformers.GPTNeoXModel(config).save_pretrained(tmp_path)
        self.refuse(tmp_path, r"family gpt_neox, whose keys .* expected one of llama, mistral")

    def test_rotary_positions_that_depend_on_the_length(self, llm):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        LLMS["llama, dynamic"] = ("Llama", {"rope_parameters": rope})
        try:
            self.refuse(llm("llama, dynamic"), "depend on the length of a text")
        finally:
            del LLMS["llama, dynamic"]

    def test_another_llm(self, llm):
        self.refuse(llm("llama"), r"is not the LLM of the features", model=llm("qwen2"))

    def test_layers_in_random_order(self, llm):
        self.refuse(llm("llama"), "layers in random order, a control", shuffled=0)

    def test_a_preset(self, llm):
        processing = TextProcessing(
            preset="sana",
            cleaning="none",
            null_text="{caption}",
            dropped_rows=(0, 0),
            null_dropped_rows=(0, 0),
            cut="caption",
            suffix_apart=False,
            padding=None,
        )
        template = identity(llm("llama")).template.model_copy(update={"processing": processing})
        self.refuse(llm("llama"), r"preset sana, which drops and pads tokens", template=template)


class TestLayers:
    @pytest.mark.parametrize(
        ("num_llm_layers", "num_blocks", "expected"),
        [
            (36, 24, range(6, 30)),  # the paper's
            (30, 6, [5, 9, 13, 16, 20, 24]),
            (4, 4, range(4)),
            (4, 2, [0, 3]),
            (4, 6, [0, 1, 1, 2, 2, 3]),
            (18, 1, [3]),
        ],
    )
    def test_of_blocks(self, num_llm_layers, num_blocks, expected):
        found = layers_of_blocks(range(num_llm_layers), num_llm_layers, num_blocks, None)
        assert found == [*expected]

    @pytest.mark.parametrize(
        ("stored", "chosen", "message"),
        [
            (
                [1, 2, 3, 4],
                None,
                r"would read layers \[0, 3\], of a store that holds \[1, 2, 3, 4\]",
            ),
            ([0, 1, 2, 3, 4], [1, 4], r"layer 4, which no block of an LLM of 4 .* 0 to 3"),
            ([0, 1, 2, 3], [1], "1 layers for 2 blocks"),
            ([0, 3], [0, 2], r"layers \[0, 2\], of a store that holds \[0, 3\]"),
        ],
    )
    def test_that_are_refused(self, stored, chosen, message):
        with pytest.raises(InputError, match=message):
            layers_of_blocks(stored, 4, 2, chosen)


ATTENTION = LlmAttention(
    layers=[0, 3],
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    eps=1e-6,
    bias=False,
    key_norm=False,
    first_position=1,
)


def make_dit(conditioning="none", attention=ATTENTION, **model):
    torch.manual_seed(0)
    config = {"size": "nano", "depth": 2, "width": 24, "mlp_width": 32, "patch_size": 4, **model}
    dit = DiT(
        ModelConfig(conditioning=conditioning, **config),
        RoutingConfig(strategy="deep-fusion"),
        latent_shape=(3, 12, 12),
        layers=range(4),
        num_llm_layers=4,
        text_width=WIDTH,
        attention=attention,
    )
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return dit


def batch(lengths=(3, 5, 1)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths), 2, WIDTH, generator=generator) * 20
    x = torch.randn(4, 3, 12, 12, generator=generator)
    t = torch.rand(4, generator=generator)
    return x, t, hidden, torch.tensor([0, *lengths]).cumsum(0), torch.tensor([1, 0, 2, 1])


class TestJointAttention:
    @pytest.mark.parametrize("masked", [True, False])
    def test_is_one_softmax_over_text_and_image(self, masked):
        torch.manual_seed(0)
        size = Size(depth=1, width=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=32)
        attention = JointAttention(size)
        x = torch.randn(2, 9, 24)
        k, v = (torch.randn(2, 2, 5, 8) for _ in range(2))
        angles = torch.rand(9, 4) * 6
        rotary = angles.cos(), angles.sin()
        lengths = [5, 3] if masked else [5, 5]
        mask = (torch.arange(5) < torch.tensor(lengths)[:, None])[:, None, None]
        found = attention(x, rotary, k, v, mask if masked else None)
        for item, length in enumerate(lengths):
            outputs = []
            queries, own_keys, own_values = (
                projection(x[item]).unflatten(-1, (-1, 8)).transpose(0, 1)
                for projection in (attention.q, attention.k, attention.v)
            )  # [A or G, N, 8]
            for head in range(4):
                group = head // 2
                q = rotate(attention.q_norm(queries[head]), rotary)
                own_k = rotate(attention.k_norm(own_keys[group]), rotary)
                keys = torch.cat([k[item, group, :length], own_k])
                values = torch.cat([v[item, group, :length], own_values[group]])
                outputs.append((q @ keys.T / 8**0.5).softmax(-1) @ values)
            expected = attention.out(torch.cat(outputs, -1))
            torch.testing.assert_close(found[item], expected, rtol=1e-5, atol=1e-6)


class TestNetwork:
    @pytest.mark.parametrize("conditioning", ["none", "adaln"])
    def test_everything_but_the_llm_learns(self, conditioning):
        dit = make_dit(conditioning)
        dit(*batch()).square().sum().backward()
        without = [name for name, each in dit.named_parameters() if each.grad is None]
        assert without == [f"router.{n}" for n in ("norm", "weight", "frequencies", "scale")]
        assert dit.router_parameters() == []

    def test_heads_are_those_of_the_llm(self):
        dit = make_dit(width=20)
        assert (dit.size.num_heads, dit.size.num_kv_heads, dit.size.head_dim) == (4, 2, 8)
        assert dit.blocks[0].attention.q.weight.shape == (32, 20)
        with pytest.raises(InputError, match="head_dim 6 is not divisible by 4"):
            make_dit(attention=ATTENTION.model_copy(update={"head_dim": 6}))

    def test_captions_do_not_change_each_other(self):
        dit = make_dit()
        x, t, hidden, offsets, caption = batch()
        every = dit(x, t, hidden, offsets, caption)
        alone = dit(x[:1], t[:1], hidden[3:8], torch.tensor([0, 5]), torch.tensor([0]))
        torch.testing.assert_close(alone, every[:1], rtol=1e-5, atol=1e-5)

    def test_padding_is_never_seen(self):
        dit = make_dit()
        x, t, *packed = batch()
        with torch.no_grad():
            text = dit.encode_text(*packed)
            expected = dit.denoise(x, t, text)
            for tensor in (*text.keys, *text.values):
                tensor[1, :, 3:] = 1e3
            assert torch.equal(dit.denoise(x, t, text), expected)

    def test_the_null_caption_has_positions_of_its_own(self):
        dit = make_dit()
        null = torch.tensor([False, False, True])
        given = dit.encode_text(*batch()[2:], conditioning={NULL: null})
        plain = dit.encode_text(*batch()[2:])
        same = [torch.equal(a, b) for a, b in zip(given.keys[0], plain.keys[0], strict=True)]
        assert same == [True, True, False, True]
        assert all(torch.equal(a, b) for a, b in zip(given.values, plain.values, strict=True))

    def test_gradient_checkpointing_and_compiling_change_no_number(self):
        found = []
        for checkpointing in (False, True):
            dit = make_dit("adaln")
            dit.gradient_checkpointing = checkpointing
            out = dit(*batch())
            out.square().sum().backward()
            found.append([out.detach(), *(p.grad for p in dit.parameters() if p.requires_grad)])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_autocast_keeps_predictions_close(self):
        dit = make_dit()
        exact = dit(*batch()).detach()
        with torch.autocast("cpu", torch.bfloat16):
            out = dit(*batch()).detach()
        assert out.dtype == torch.float32
        assert float((out - exact).norm() / exact.norm()) < 0.03

    def test_forward_of_the_router_is_without_positions(self):
        """At position 0 nothing is rotated."""
        dit = make_dit()
        with torch.no_grad():
            dit.router.scale.fill_(1.0)
        hidden = batch()[2]
        zero = torch.zeros(len(hidden), dtype=torch.int64)
        torch.testing.assert_close(dit.router(hidden), dit.router.keys_and_values(hidden, zero))
        keys, values = dit.router(hidden)[:, 1].chunk(2, -1)
        normed = F.rms_norm(hidden[:, 1], (WIDTH,), dit.router.norm[1], 1e-6)
        torch.testing.assert_close(torch.cat([keys, values], -1), normed @ dit.router.weight[1].T)
