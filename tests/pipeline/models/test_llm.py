import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import (
    Encoder,
    describe_model,
    load_tokenizer,
    parse_layers,
    tokenizer_digest,
)
from semroute.schemas import InputError

SEQUENCES = [np.array(s, np.int32) for s in ([0, 9, 8, 7, 30, 31], [0, 12], [0, 40, 41, 42])]


@pytest.fixture(scope="module")
def source(tiny_llm):
    return find_model(str(tiny_llm))


def encode(encoder, sequences, kept):
    taken = {}
    encoder.encode(sequences, kept, lambda index, rows: taken.update({index: rows.clone()}))
    return [taken[index] for index in range(len(encoder.layers))]


def expected_states(source, sequences):
    """What transformers itself returns for the same right-padded batch."""
    model = AutoModel.from_pretrained(source.folder, dtype=torch.float32).eval()
    longest = max(map(len, sequences))
    tokens = torch.tensor([[*s.tolist(), *[0] * (longest - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    with torch.inference_mode():
        return model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states


def test_every_layer_equals_what_transformers_returns(source):
    states = expected_states(source, SEQUENCES)
    found = encode(Encoder(source, range(5), "float32", "cpu"), SEQUENCES, [1, 0, 2])
    assert len(states) == len(found) == 5
    for state, rows in zip(states, found, strict=True):
        expected = torch.cat([state[0, 1:6], state[1, 0:2], state[2, 2:4]])
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_blocks_above_the_last_layer_are_not_run(source):
    states = expected_states(source, SEQUENCES)
    encoder = Encoder(source, [1, 3], "float32", "cpu")
    assert len(encoder.tower.blocks) == 3
    found = encode(encoder, SEQUENCES, [0, 0, 0])
    for layer, rows in zip([1, 3], found, strict=True):
        expected = torch.cat([states[layer][i, : len(s)] for i, s in enumerate(SEQUENCES)])
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_padding_does_not_matter_beyond_rounding(source):
    encoder = Encoder(source, [2, 4], "float32", "cpu")
    together = encode(encoder, SEQUENCES, [0, 0, 0])
    alone = [encode(encoder, [sequence], [0]) for sequence in SEQUENCES]
    for index in range(2):
        expected = torch.cat([rows[index] for rows in alone])
        torch.testing.assert_close(together[index], expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_runs_in_bfloat16(source):
    rows = encode(Encoder(source, [4], "bfloat16", "cpu"), SEQUENCES, [0, 0, 0])[0]
    assert rows.dtype == torch.bfloat16


def test_the_model_is_described_by_the_content_of_its_files(source, tiny_llm, tmp_path):
    copy = find_model(str(shutil.copytree(tiny_llm, tmp_path / "elsewhere")))
    identity = describe_model(source)
    assert identity == describe_model(copy)
    assert (identity.architecture, identity.num_layers, identity.width) == ("llama", 4, 32)
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert describe_model(find_model(str(copy.folder))) != identity
    digest = tokenizer_digest(load_tokenizer(source))
    assert digest == tokenizer_digest(load_tokenizer(copy))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [1, 2, 3, 4, 5, 6, 7]),
        ("every:3", [1, 4, 7]),
        ("every:100", [7]),
        ("6,0,2", [0, 2, 6]),
        ("5-7,1,3-3", [1, 3, 5, 6, 7]),
    ],
)
def test_layers_are_chosen(text, layers):
    assert parse_layers(text, 7) == layers


@pytest.mark.parametrize(
    ("text", "final_norm", "layers"),
    [
        ("all", "raw", [1, 2, 3, 4, 5, 6, 8]),
        ("all", "both", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("every:3", "raw", [1, 4, 8]),
        ("every:3", "both", [1, 4, 7, 8]),
        ("6,8", "raw", [6, 8]),
        ("6,7", "raw", [6, 7]),
    ],
)
def test_the_last_block_has_two_layers(text, final_norm, layers):
    assert parse_layers(text, 7, final_norm) == layers
    embedded = [0, *layers] if text == "all" else layers
    assert parse_layers(text, 7, final_norm, embedding=True) == embedded


def test_a_layer_before_the_final_norm_is_asked_for():
    with pytest.raises(InputError, match=r"no layer 8; .*0 to 7; with --final-norm raw or both, 8"):
        parse_layers("8", 7)
    with pytest.raises(InputError, match=r"no layer 9; .*0 to 7, and 8, which is 7 before the f"):
        parse_layers("9", 7, "both")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some", "expected all, every:3, or numbers"),
        ("every:0", "expected all, every:3, or numbers"),
        ("3,8", "no layer 8; the model has layers 0 to 7"),
        ("3,3", "names a layer twice"),
        ("1-4,3", "names a layer twice"),
        ("2-999999999999", "no layer 999999999999; the model has layers 0 to 7"),
        ("4-2", "4-2 ends before it begins; did you mean 2-4"),
        ("2-", "expected all, every:3, or numbers"),
    ],
)
def test_layers_that_do_not_exist_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_layers(text, 7)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder or file, and not a hub id"):
        find_model(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"no config\.json in this folder"):
        find_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match=r"a file must be a \.gguf"):
        find_model(str(tmp_path / "notes.txt"))
    with pytest.raises(InputError, match="not available from the hub"):
        find_model("nobody/no-such-model-of-semroute")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no \.safetensors"):
        find_model(str(tmp_path))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a model that transformers knows"):
        describe_model(find_model(str(tmp_path)))


def test_a_model_that_is_no_transformer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"ResNetEncoder.* lacks embed_tokens, layers, norm"):
        describe_model(find_model(str(tmp_path)))


def test_a_gguf_is_converted_once(tmp_path, monkeypatch):
    """A tiny GGUF written here stands for any: after the first time no conversion happens."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    _write_gguf(gguf, file)
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    source = find_model(str(file))
    assert list(source.files) == ["tiny.gguf"]
    config = source.folder / "config.json"
    written = config.stat().st_mtime_ns
    assert find_model(str(file)).folder == source.folder
    assert config.stat().st_mtime_ns == written
    assert describe_model(source).num_layers == 2
    rows = encode(Encoder(source, [1, 2], "float32", "cpu"), [np.array([1, 3, 4], np.int32)], [0])
    assert rows[0].shape == (3, 64)
    assert [entry.name for entry in source.folder.parent.iterdir()] == [source.folder.name]


@pytest.mark.parametrize("place", ["/proc/self/none", "file", "no-home"])
def test_a_cache_that_cannot_be_written_is_named(place, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    _write_gguf(gguf, tmp_path / "tiny.gguf")
    if place == "no-home":
        for name in ("SEMROUTE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/proc/self/none")
    else:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / place))
    with pytest.raises(InputError, match=r"cannot be written: .* Set SEMROUTE_CACHE to a folder"):
        find_model(str(tmp_path / "tiny.gguf"))


def test_a_gguf_that_is_not_whole_is_named(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("SEMROUTE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    _write_gguf(gguf, file)
    whole = file.read_bytes()
    for content, message in (
        (whole[:5000], "cannot read it, or it is cut off"),
        (whole[: len(whole) - 4096], "cannot read it, or it is cut off"),
        (b"PK\x03\x04 a zip", "is no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            find_model(str(file))
    for extra, message in (
        ("rope_freqs.weight", r"does not use its rope_freqs\.weight"),
        ("", r"1 weights of LlamaModel are not in .* layers\.1\.mlp\.up_proj\.weight"),
    ):
        _write_gguf(gguf, file, extra, lost=() if extra else ("blk.1.ffn_up.weight",))
        with pytest.raises(InputError, match=message):
            find_model(str(file))
    assert not [*(tmp_path / "cache" / "gguf").iterdir()]


def _write_gguf(gguf, file, extra="", lost=()):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "Ġ", "d"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name, *shape):
        if name in lost:
            return
        writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd.weight", 8, 64)
    add("output_norm.weight", 64)
    for block in range(2):
        add(f"blk.{block}.attn_norm.weight", 64)
        add(f"blk.{block}.ffn_norm.weight", 64)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", 64, 64)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{block}.{name}.weight", 96, 64)
        add(f"blk.{block}.ffn_down.weight", 64, 96)
    if extra:
        add(extra, 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_text_encoder_of_a_pipeline_has_its_tokenizer_beside_it(tiny_llm, tmp_path):
    pipeline = tmp_path / "pipeline"
    for name in ("text_encoder_2", "tokenizer_2"):
        (pipeline / name).mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    for file in tiny_llm.iterdir():
        part = "tokenizer_2" if "token" in file.name else "text_encoder_2"
        shutil.copy(file, pipeline / part / file.name)
    found, expected = find_model(str(pipeline / "text_encoder_2")), find_model(str(tiny_llm))
    assert found.files == expected.files
    digests = [tokenizer_digest(load_tokenizer(model)) for model in (found, expected)]
    assert digests[0] == digests[1]
    with pytest.raises(InputError, match=r"is a pipeline of diffusers; name its text encoder, .*_"):
        find_model(str(pipeline))
    shutil.rmtree(pipeline / "tokenizer_2")
    with pytest.raises(InputError, match=r"expected a folder tokenizer_2 or processor_2 beside"):
        find_model(str(pipeline / "text_encoder_2"))
