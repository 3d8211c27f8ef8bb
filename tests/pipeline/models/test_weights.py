"""Files of models that are not as they should be, and what a model cannot read."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.plan import make_plan
from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.extraction.requests import CaptionsRequest
from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import Encoder, describe_model
from semroute.pipeline.models.packing import supports_packing
from semroute.pipeline.models.vae import Autoencoder, find_vae
from semroute.pipeline.models.weights import refuse_misread
from semroute.schemas import InputError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'b' * 64}\nsize 4000000\n"
SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
T5 = {"vocab_size": 258, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.fixture
def model(tiny_llm, tmp_path):
    """A copy of the tiny LLM."""
    return shutil.copytree(tiny_llm, tmp_path / "model")


def save(model, folder, tiny_llm):
    """A model beside the tokenizer of the tiny LLM."""
    unwanted = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(tiny_llm, folder, ignore=unwanted)
    model.save_pretrained(folder)
    return folder


def change(folder, change, name="model.safetensors"):
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, {"format": "pt"})


def configure(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def plan(tmp_path, model, *texts, **options):
    (tmp_path / "captions.txt").write_text("\n".join(texts or ["a red cup"]))
    request = {"source": str(tmp_path / "captions.txt"), "model": str(model), **options}
    return make_plan(CaptionsRequest(**request))


Q = "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "added",
    [
        f"{Q}.weight_scale_inv",
        f"{Q}.bias",
        f"{Q}.lora_A.default.weight",
        "model.layers.3.self_attn.k_scale",
        "model.embed_tokens.weight.absmax",
        "layers.4.mlp.up_proj.weight",  # a block more than config.json has
        "norm.bias",
    ],
)
def test_weights_that_are_not_used_are_named(model, tmp_path, added):
    change(model, lambda weights: weights.update({added: torch.ones(1)}))
    with pytest.raises(InputError, match=rf"1 weights .* not used, .* {added}: LlamaModel has no"):
        plan(tmp_path, model)


def test_what_other_parts_of_a_model_use_is_left_out(model, tmp_path):
    others = ("lm_head.weight", "vision_tower.layers.0.self_attn.q_proj.scale", "mtp.norm.weight")
    constants = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.4.enorm.weight")
    change(model, lambda weights: weights.update({n: torch.ones(1) for n in others + constants}))
    configure(model, num_nextn_predict_layers=1)
    assert plan(tmp_path, model).identity.model.num_layers == 4


def test_scales_of_an_encoder_are_named_and_its_decoder_is_not(tiny_llm, tmp_path):
    folder = save(
        transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)), tmp_path / "t5", tiny_llm
    )
    lost = "decoder.block.0.layer.0.SelfAttention.q.weight"
    change(folder, lambda weights: weights.update({lost: torch.ones(1)}))
    assert describe_model(find_model(str(folder))).num_layers == 2
    scale = "encoder.block.0.layer.0.SelfAttention.q.scale_weight"
    change(folder, lambda weights: weights.update({scale: torch.ones(1)}))
    with pytest.raises(InputError, match=rf"1 weights .* the first is {scale}"):
        describe_model(find_model(str(folder)))


def test_weights_that_are_missing_of_another_shape_or_integers_are_named(model, tmp_path):
    whole = shutil.copy(model / "model.safetensors", tmp_path / "whole")
    change(model, lambda weights: weights.pop(f"{Q}.weight"))
    with pytest.raises(InputError, match=rf"1 weights of LlamaModel are not in .* {Q}\.weight"):
        plan(tmp_path, model)
    shutil.copy(whole, model / "model.safetensors")
    change(model, lambda weights: weights.update({"norm.weight": torch.ones(33)}))
    with pytest.raises(InputError, match=r"norm\.weight: found \[33\], expected \[32\]"):
        plan(tmp_path, model)
    shutil.copy(whole, model / "model.safetensors")
    change(model, lambda w: w.update({f"{Q}.weight": (w[f"{Q}.weight"] * 99).to(torch.int8)}))
    with pytest.raises(InputError, match=rf"{Q}\.weight in model\.safetensors is I8; expected fl"):
        plan(tmp_path, model)


def test_an_unknown_method_of_quantisation_is_refused(model, tmp_path):
    configure(model, quantization_config={"quant_method": "mx_none"})
    with pytest.raises(InputError, match="quantised by 'mx_none', which transformers does not kn"):
        plan(tmp_path, model)
    change(model, lambda weights: weights.update({f"{Q}.input_scale": torch.ones(1)}))
    with pytest.raises(InputError, match=rf"{Q}\.input_scale: .*\(config\.json: quantised by 'mx"):
        plan(tmp_path, model)


def test_the_weights_of_a_vae_must_fit(tiny_vae, tmp_path):
    folder = shutil.copytree(tiny_vae("kl"), tmp_path / "vae")
    name = "diffusion_pytorch_model.safetensors"
    change(folder, lambda w: w.update({"decoder.conv_in.weight_scale": torch.ones(1)}), name)
    with pytest.raises(InputError, match=r"1 weights .* not used, .* decoder\.conv_in\.weight_sc"):
        _ = Autoencoder(find_vae(str(folder))).model
    (folder / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{name} is a Git LFS pointer"):
        find_vae(str(folder))


def test_a_head_matters_to_a_judge_and_not_to_an_encoder():
    loaded = {"missing_keys": ["lm_head.weight"], "mismatched_keys": [], "unexpected_keys": []}
    refuse_misread("it", torch.nn.Linear(1, 1), loaded, heads=False)
    with pytest.raises(InputError, match=r"it: 1 weights of Linear are not in .* lm_head\.weight"):
        refuse_misread("it", torch.nn.Linear(1, 1), loaded)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def as_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", as_pipe, "is a named pipe"),
        ("model.safetensors", as_pipe, "is a named pipe"),
        ("model.safetensors.index.json", as_pipe, "is a named pipe"),
        ("tokenizer.json", lambda path: path.write_text(POINTER), "is a Git LFS pointer"),
        ("model.safetensors", lambda path: path.write_text(POINTER), "is a Git LFS pointer"),
        ("model.safetensors", cut, "is cut off: it has [0-9,]+ bytes; expected [0-9,]+"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:99]), "is cut off"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "is cut off"),
        ("model.safetensors", lambda path: path.write_text("<!DOCTYPE html>"), "is no safetensors"),
        (
            "model.safetensors",
            lambda path: path.write_bytes(path.read_bytes() + b"x"),
            "has bytes behind its last tensor",
        ),
        (
            "model.safetensors",
            lambda path: path.write_bytes(b"\x04\0\0\0\0\0\0\0{[]}"),
            "header of .* is damaged|is damaged",
        ),
    ],
)
def test_files_that_are_not_whole_are_named(model, name, damage, message):
    damage(model / name)
    with pytest.raises(InputError, match=message) as raised:
        find_model(str(model))
    assert str(model / name) in str(raised.value)


def test_files_that_are_missing_are_named(model):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(weights, model / "model-00002-of-00002.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 files .* missing, .* model-00001-of-00002\.safetens"):
        find_model(str(model))
    index = {"weight_map": dict.fromkeys(weights, "other.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"the first is other\.safetensors; download"):
        find_model(str(model))


def test_an_adapter_is_not_taken_for_its_base_model(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(InputError, match="holds an adapter"):
        find_model(str(model))


def test_tokens_beyond_the_embedding_are_found_while_planning(model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=r"token 259, '<two>', of the caption 'b <two>', .* 258 r"):
        plan(tmp_path, model, "a", "b <two>", "c")
    identity = plan(tmp_path, model, "a").identity
    with pytest.raises(InputError, match=r"token 258, '<one>', of the caption '<one>'"):
        PromptEncoder(identity, str(model), "cpu")(["a", "<one>"])


def test_positions_beyond_the_model_are_found_while_planning(tiny_llm, tmp_path):
    config = transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=48)
    folder = save(transformers.GPT2Model(config), tmp_path / "gpt2", tiny_llm)
    long = "x" * 60
    with pytest.raises(InputError, match=r"48 positions, and the caption 'xx.* has 61 tokens .*48"):
        plan(tmp_path, folder, "a", long)
    # In rows of 128 tokens, padding too must have positions.
    plan(tmp_path, folder, "a", long, "b" * 45, max_length=48)
    options = {"model": str(folder), "workers": 0, "codec": "bf16", "report": [].append}
    store = extract(str(tmp_path / "captions.txt"), tmp_path / "f", max_length=48, **options)
    assert store.manifest.layout.line_tokens is not None
    identity = store.manifest.identity
    longer = identity.model_copy(update={"max_length": 512})
    with pytest.raises(InputError, match="has 48 positions"):
        PromptEncoder(longer, str(folder), "cpu")([long])


def test_more_tokens_than_rotary_positions_were_made_for_are_warned_of(model, tmp_path):
    configure(model, max_position_embeddings=32)
    lines: list[str] = []
    plan(tmp_path, model, "a", "y" * 40).report_warnings(lines.append)
    assert "1 captions have more tokens than the 32 positions that LlamaModel" in "\n".join(lines)


def gemma3n(num_streams):
    return transformers.Gemma3nTextModel(
        transformers.Gemma3nTextConfig(
            **SIZES | {"head_dim": 8, "num_hidden_layers": 3, "num_kv_shared_layers": 0},
            vocab_size_per_layer_input=258,
            hidden_size_per_layer_input=8,
            altup_num_inputs=num_streams,
            laurel_rank=4,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            sliding_window=16,
            activation_sparsity_pattern=[0.0] * 3,
        )
    )


def test_several_streams_are_found_while_planning(tiny_llm, tmp_path, monkeypatch):
    folder = save(gemma3n(2), tmp_path / "gemma", tiny_llm)
    for layers in ("all", "1", "2-3"):
        with pytest.raises(InputError, match=r"gemma3n_text keeps 2 streams .*: --layers 3; or"):
            plan(tmp_path, folder, layers=layers)
    assert plan(tmp_path, folder, layers="3").identity.layers == [3]
    # A model that does not say so in its configuration is found when it is run, before any shard.
    monkeypatch.setattr("semroute.pipeline.models.limits._STREAMS", ())
    options = {"model": str(folder), "workers": 0, "codec": "bf16", "report": [].append}
    source, message = str(tmp_path / "captions.txt"), r"layer 1 .* is \[2, 1, \d+, 32\] for"
    for batching in ("auto", "padded"):
        with pytest.raises(InputError, match=message):
            extract(source, tmp_path / "f", batching=batching, **options)
    assert not (tmp_path / "f").exists()


def stretched(kind):
    """A model whose rotary positions depend on the length of a sequence from 16 tokens on."""
    common = SIZES | {"num_hidden_layers": 2}
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config = transformers.Qwen2Config(
            **common, max_position_embeddings=16, rope_parameters=rope
        )
        return transformers.Qwen2Model(config)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    }
    config = transformers.LlamaConfig(**common, max_position_embeddings=128, rope_parameters=rope)
    return transformers.LlamaModel(config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_that_of_a_caption_alone(kind, tiny_llm, tmp_path):
    torch.manual_seed(0)
    model = stretched(kind)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.15)
    folder = save(model, tmp_path / kind, tiny_llm)
    encoder = Encoder(find_model(str(folder)), [0, 1, 2], "float32", "cpu")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, 258, n).astype(np.int32) for n in (40, 16, 5, 17, 33)]

    def alone(sequence):
        """By a model that has read nothing else: dynamic scaling remembers what came before."""
        fresh = transformers.AutoModel.from_pretrained(folder).eval()
        ids = torch.from_numpy(sequence).long()[None]
        with torch.inference_mode():
            return torch.cat(fresh(ids, output_hidden_states=True).hidden_states)

    expected = torch.cat([alone(sequence) for sequence in sequences], 1)
    with torch.inference_mode():
        batch = torch.zeros(2, 40, dtype=torch.long)
        batch[0], batch[1, :16] = torch.from_numpy(sequences[0]), torch.from_numpy(sequences[1])
        seen = model.eval()(batch, output_hidden_states=True).hidden_states[2][1, :16]
    assert (seen - expected[2, 40:56]).abs().max() > 1e-2  # what transformers gives in a batch
    for row in (None, [0, 0, 0, 1, 1], [0, 1, 1, 1, 2]):
        found: list[torch.Tensor] = []
        encoder.encode(sequences, [0] * 5, lambda _, rows, to=found: to.append(rows.clone()), row)
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4)
    assert supports_packing(encoder, sequences)


def test_rotary_positions_of_three_axes_are_those_of_a_row_alone():
    """As Qwen's vision-language models have them; no length is given but by positions."""
    from semroute.pipeline.models.rope import separate_captions

    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = transformers.Qwen2_5_VLTextConfig(
        **SIZES | {"num_hidden_layers": 1},
        max_position_embeddings=16,
        rope_parameters=parameters | {"mrope_section": [2, 1, 1]},
    )
    model = transformers.Qwen2_5_VLTextModel(config)
    (rope,) = separate_captions(model)
    hidden = torch.zeros(2, 40, 32)
    positions = torch.arange(40).expand(3, 2, 40).clone()
    positions[:, 1] = positions[:, 1] % 12
    cos, _ = rope(hidden, positions)
    alone, _ = transformers.Qwen2_5_VLTextModel(config).rotary_emb(hidden[1:], positions[:, 1:])
    torch.testing.assert_close(cos[..., 1:, :, :], alone)
    together, _ = transformers.Qwen2_5_VLTextModel(config).rotary_emb(hidden, positions)
    assert (together[..., 1:, :, :] - alone).abs().max() > 1e-3


def test_of_a_pipeline_the_weights_and_tokens_are_checked(tiny_pipeline, tmp_path):
    pytest.importorskip("diffusers")
    from semroute.pipeline.extraction.conditioning import encode_captions
    from semroute.pipeline.models.text_pipelines import find_text_pipeline, open_text_pipeline

    folder = shutil.copytree(tiny_pipeline("pixart"), tmp_path / "pipeline")
    key = "encoder.block.1.layer.0.SelfAttention.v.weight_scale"
    file = next((folder / "text_encoder").glob("*.safetensors"))
    change(file.parent, lambda weights: weights.update({key: torch.ones(1)}), file.name)
    with pytest.raises(InputError, match=rf"text_encoder: 1 weights .* the first is {key}"):
        open_text_pipeline(str(folder)).encode(["a cup"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save_pretrained(folder / "tokenizer")
    pa.parquet.write_table(pa.table({"text": ["a", "b zyzzyva"]}), tmp_path / "captions.parquet")
    options = {"pipeline": str(folder), "workers": 0, "report": [].append}
    with pytest.raises(
        InputError, match=r"'zyzzyva', of the caption 'b zyzzyva', and the embedding"
    ):
        encode_captions(str(tmp_path / "captions.parquet"), tmp_path / "c", **options)
    file.write_text(POINTER)
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        find_text_pipeline(str(folder))
