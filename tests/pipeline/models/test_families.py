"""A small random model of every family: what is cached equals what transformers gives online."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.plan import make_plan
from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.extraction.requests import CaptionsRequest
from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import (
    MODULE_NAMES,
    Encoder,
    attention_of,
    describe_model,
    find_tower,
)
from semroute.pipeline.models.packing import PackingError, check_packing, supports_packing
from semroute.schemas import InputError

NUM_LAYERS, WIDTH, WINDOW = 3, 32, 4
TEXTS = ["a", "a red cup", "a blue tree in the snow at night", "x" * 40, "two clocks and a dog"]
DECODER = {
    "vocab_size": 258,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
T5 = {"vocab_size": 258, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": NUM_LAYERS} | {
    "num_heads": 4,
    "tie_word_embeddings": False,
}
VISION = {"hidden_size": 16, "intermediate_size": 16} | {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2} | {
    "out_hidden_size": WIDTH
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
SLIDING = {"sliding_window": WINDOW}
NEOX = {key: value for key, value in DECODER.items() if not key.startswith(("num_key", "head"))}
GPT2 = {"vocab_size": 258, "n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": 4} | {
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Family:
    """A model as it is published: with its heads, vision part or decoder.

    Attributes:
        model, config: classes of transformers.
        options: of the configuration.
        tower: class of the text tower.
        architecture: as the manifest names it.
    """

    model: str
    config: str
    options: dict[str, Any]
    tower: str
    architecture: str
    causal: bool = True
    attention: str = "sdpa"


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", DECODER, "LlamaModel", "llama"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", DECODER, "Qwen3Model", "qwen3"),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", DECODER | SLIDING, "MistralModel", "mistral"
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER | SLIDING,
        "Gemma2Model",
        "gemma2",
        attention="eager",
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        DECODER | SLIDING | {"sliding_window_pattern": 2},
        "Gemma3TextModel",
        "gemma3_text",
    ),
    "embeddinggemma": Family(
        "Gemma3TextModel",
        "Gemma3TextConfig",
        DECODER | SLIDING | {"use_bidirectional_attention": True},
        "Gemma3TextModel",
        "gemma3_text",
        causal=False,
    ),
    "gemma3 with vision": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": DECODER | SLIDING, "vision_config": VISION},
        "Gemma3TextModel",
        "gemma3_text",
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": DECODER | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral"},
        },
        "MistralModel",
        "mistral",
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": DECODER | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0]},
        },
        "Qwen2_5_VLTextModel",
        "qwen2_5_vl_text",
    ),
    "qwen3-vl": Family(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": DECODER | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]},
        },
        "Qwen3VLTextModel",
        "qwen3_vl_text",
    ),
    "gpt-neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, "GPTNeoXModel", "gpt_neox"),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT2, "GPT2Model", "gpt2"),
    "t5": Family("T5ForConditionalGeneration", "T5Config", T5, "T5Stack", "t5", causal=False),
    "t5 without decoder": Family("T5EncoderModel", "T5Config", T5, "T5Stack", "t5", causal=False),
    "mt5": Family("MT5ForConditionalGeneration", "MT5Config", T5, "MT5Stack", "mt5", causal=False),
    "umt5": Family("UMT5EncoderModel", "UMT5Config", T5, "UMT5Stack", "umt5", causal=False),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {"encoder": DECODER | SLIDING, "decoder": DECODER | SLIDING, "vocab_size": 258},
        "T5GemmaEncoder",
        "t5_gemma_module",
        causal=False,
        attention="eager",
    ),
}
MIXING = {"T5Stack", "MT5Stack", "UMT5Stack", "T5GemmaEncoder", "Qwen2_5_VLTextModel"}
"""Towers that take no positions, or make no masks of them."""
Made = tuple[Family, Any, str]


@pytest.fixture(scope="module")
def make(tiny_llm, tmp_path_factory) -> Callable[[str], Made]:
    """Name -> the family, its model as transformers runs it, and its folder."""
    made: dict[str, Made] = {}

    def build(name: str) -> Made:
        if name not in made:
            family = FAMILIES[name]
            config = getattr(transformers, family.config)(**family.options)
            model = getattr(transformers, family.model)(config).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():  # norms and attention too must matter
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            folder = tmp_path_factory.mktemp("family") / "model"
            shutil.copytree(
                tiny_llm, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors")
            )
            model.save_pretrained(folder)
            made[name] = family, model, str(folder)
        return made[name]

    return build


@pytest.fixture(params=FAMILIES)
def family(make, request) -> Made:
    return make(request.param)


@torch.inference_mode()
def online(model, tokens) -> torch.Tensor:
    """All hidden states of one sequence from the published model alone, ``[T, L + 1, H]``."""
    ids = torch.tensor([list(map(int, tokens))])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    if model.config.is_encoder_decoder and model.can_generate():
        states = model(ids, decoder_input_ids=ids[:, :1], **options).encoder_hidden_states
    else:
        states = model(ids, **options).hidden_states
    return torch.cat(states).transpose(0, 1)


def encode(encoder, sequences) -> torch.Tensor:
    layers: list[torch.Tensor] = []
    encoder.encode(sequences, [0] * len(sequences), lambda _, rows: layers.append(rows.clone()))
    return torch.stack(layers, 1)


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 258, length).astype(np.int32) for length in (3, 20, 1, 11)]


def test_what_is_cached_equals_what_transformers_gives_online(family, tmp_path):
    made, model, folder = family
    pa.parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "captions.parquet")
    store = extract(
        str(tmp_path / "captions.parquet"),
        tmp_path / "features",
        model=folder,
        template="bos" if made.causal else "eos",
        layers=",".join(map(str, range(NUM_LAYERS + 1))),
        codec="bf16",
        workers=0,
        report=lambda _: None,
    )
    assert len(store) == 1 + len(TEXTS)
    prefix = store.manifest.identity.template.prefix_tokens
    assert len(prefix) == made.causal
    for caption in store:
        dropped = prefix if caption.caption_id else []
        expected = online(model, [*dropped, *caption.tokens])[len(dropped) :]
        assert caption.hidden.shape == expected.shape == (len(caption.tokens), NUM_LAYERS + 1, 32)
        # Half a step of bfloat16 is 2**-8 at most; padding and batches round in the 6th digit.
        torch.testing.assert_close(
            torch.from_numpy(caption.hidden), expected, rtol=1.01 * 2**-8, atol=1e-5
        )
    prompts = PromptEncoder(store.manifest.identity, folder)(TEXTS[1:2])
    (stored,) = (caption.hidden for caption in store if caption.text == TEXTS[1])
    np.testing.assert_allclose(prompts.read([1]).numpy(), stored, rtol=1.01 * 2**-7, atol=1e-5)


def test_neither_padding_nor_fewer_blocks_change_a_layer(family):
    _, model, folder = family
    source = find_model(folder)
    expected = torch.cat([online(model, sequence) for sequence in sequences()])
    every = encode(Encoder(source, range(NUM_LAYERS + 1), "float32", "cpu"), sequences())
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(every, expected, rtol=0, atol=tolerance)
    for last in range(NUM_LAYERS):
        encoder = Encoder(source, range(last + 1), "float32", "cpu")
        assert len(encoder.tower.blocks) == max(1, last)
        assert torch.equal(encode(encoder, sequences()), every[:, : last + 1])


def test_the_last_layer_before_the_final_norm_is_what_the_norm_is_given(family):
    _, model, folder = family
    source, layers = find_model(folder), [NUM_LAYERS - 1, NUM_LAYERS, NUM_LAYERS + 1]
    encoder = Encoder(source, layers, "float32", "cpu")
    rows = encode(encoder, sequences())
    expected = torch.cat([online(model, sequence) for sequence in sequences()])
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(rows[:, :2], expected[:, -2:], rtol=0, atol=tolerance)
    raw = encode(Encoder(source, [NUM_LAYERS + 1], "float32", "cpu"), sequences())
    assert torch.equal(raw[:, 0], rows[:, 2])
    normed = encoder.tower.norm(rows[:, 2])
    torch.testing.assert_close(normed, expected[:, -1], rtol=0, atol=tolerance)
    assert (rows[:, 2] - rows[:, 1]).abs().max() > 1e-2


def test_captions_in_one_row_are_kept_apart_or_the_trial_says_not(family, tmp_path):
    made, model, folder = family
    encoder = Encoder(find_model(folder), range(NUM_LAYERS + 1), "float32", "cpu")
    apart = supports_packing(encoder, sequences()[:3])
    assert apart == (made.tower not in MIXING)
    if not apart:
        with pytest.raises(PackingError, match="--batching padded"):
            check_packing(encoder, sequences())
        captions = tmp_path / "captions.txt"
        captions.write_text("\n".join(TEXTS))
        template = "bos" if made.causal else "eos"
        options = {"model": folder, "template": template, "workers": 0, "report": [].append}
        with pytest.raises(InputError, match="packed: the LLM does not keep captions apart"):
            extract(str(captions), tmp_path / "features", batching="packed", **options)
        assert not (tmp_path / "features").exists()
        lines: list[str] = []
        store = extract(str(captions), tmp_path / "features", **options | {"report": lines.append})
        assert store.manifest.layout.line_tokens is None
        assert lines[0].startswith("batches are padded: the LLM does not keep captions apart")
        return
    check_packing(encoder, sequences())
    expected = torch.cat([online(model, sequence) for sequence in sequences()])
    layers: list[torch.Tensor] = []
    kept, line = [0] * len(sequences()), [0, 0, 1, 1]
    encoder.encode(sequences(), kept, lambda _, rows: layers.append(rows.clone()), line)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(torch.stack(layers, 1), expected, rtol=0, atol=tolerance)


def test_in_bfloat16_it_is_what_transformers_gives_in_bfloat16(family):
    _, model, folder = family
    encoder = Encoder(find_model(folder), range(NUM_LAYERS + 1), "bfloat16", "cpu")
    found = encode(encoder, sequences()[1:2])
    assert found.dtype == torch.bfloat16
    published = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert torch.equal(found, online(published, sequences()[1]))


def test_the_text_tower_is_described_without_weights(family, tmp_path):
    made, _, folder = family
    source = find_model(folder)
    identity = describe_model(source)
    found = (identity.architecture, identity.num_layers, identity.width, identity.causal)
    assert found == (made.architecture, NUM_LAYERS, WIDTH, made.causal)
    assert attention_of(source) == made.attention
    encoder = Encoder(source, [1], "float32", "cpu")
    assert type(encoder.tower.module).__name__ == made.tower


def test_every_set_of_module_names_has_a_family():
    """Names added without a model to try them on fail here."""
    names = set()
    for family in FAMILIES.values():
        config = getattr(transformers, family.config)(**family.options)
        names.add(find_tower(getattr(transformers, family.model)(config), family.model).names)
    assert names == {*MODULE_NAMES}


def test_the_window_of_the_tests_matters(make):
    """Otherwise the sliding window of Gemma and Mistral would not be tested above."""
    _, model, _ = make("mistral")
    tokens = sequences()[1]
    changed = tokens.copy()
    changed[0] = (changed[0] + 1) % 250 + 2
    same = (online(model, tokens) == online(model, changed)).all(-1)  # [T, L + 1]
    for layer in range(NUM_LAYERS + 1):
        reach = 1 + min(layer, NUM_LAYERS) * (WINDOW - 1)
        assert not same[:reach, layer].any()
        assert same[reach:, layer].all()


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("qwen3-vl", "model.language_model.norm.weight"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.k.weight"),
        ("t5 without decoder", "shared.weight"),
    ],
)
def test_a_model_whose_files_lack_a_weight_is_refused(make, name, lost, tmp_path):
    _, _, folder = make(name)
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights[lost]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    message = rf"1 weights of \w+ are not in its files, the first is .*{lost.split('.')[-2]}"
    with pytest.raises(InputError, match=message.replace("shared", "embed_tokens")):
        Encoder(find_model(str(copy)), [1], "float32", "cpu")


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        (
            "BertConfig",
            "BertEncoder, the text tower of BertModel.*lacks embed_tokens, layers, norm",
        ),
        ("CLIPTextConfig", "lacks embed_tokens, norm"),
        ("ViTConfig", "lacks embed_tokens"),
        ("WhisperConfig", "WhisperEncoder.*lacks"),
    ],
)
def test_a_model_of_an_unknown_form_is_refused(config, lacking, tmp_path):
    getattr(transformers, config)().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=lacking):
        describe_model(find_model(str(tmp_path)))


def test_a_template_of_another_llm_is_warned_of(samples_file, tiny_llm):
    lines: list[str] = []
    for template in ("bos", "lumina2", "flux2"):
        make_plan(
            CaptionsRequest(source=str(samples_file), model=str(tiny_llm), template=template)
        ).report_warnings(lines.append)
    (line,) = (line for line in lines if "another LLM" in line)
    markers = r"\[SYSTEM_PROMPT\], \[/SYSTEM_PROMPT\], \[INST\], \[/INST\]"
    assert re.search(rf"warning: the template has {markers}, which .* made for another LLM", line)


def test_the_vision_part_is_let_go(make):
    _, model, folder = make("qwen3-vl")
    encoder = Encoder(find_model(folder), [NUM_LAYERS], "float32", "cpu")
    names = [name for name, _ in encoder.tower.module.named_parameters()]
    assert len(names) == sum("language_model" in name for name, _ in model.named_parameters())
    assert find_tower(model.model, "it").name == "language_model"
