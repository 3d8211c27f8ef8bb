"""A tiny LLM with random weights, a table of captioned images, and stores made from both."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

# Before any test imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUM_LAYERS, WIDTH = 4, 32
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("cup", "tree", "car", "bird", "chair", "box", "clock", "small dog")
PLACES = ("", " on a table", " in the snow", " at night, seen from very far above")


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers and width 32 whose tokens are bytes."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {byte: i + 2 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


def write_samples(path: Path, texts: list[str], size: int = 12) -> Path:
    """A parquet of captions with small PNG images, as HF datasets writes them."""
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for number in range(len(texts)):
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{number:06d}.png"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"text": pa.array(texts), "image": pa.array(images, kind)})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """192 captions, and 8 of them a second time."""
    unique = [
        f"a {colour} {thing}{place}"
        for colour, thing, place in itertools.product(COLOURS, THINGS, PLACES)
    ]
    return unique + unique[:8]


@pytest.fixture(scope="session")
def samples_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples") / "samples.parquet", texts)


@pytest.fixture(scope="session")
def feature_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path, samples_file: Path
) -> Path:
    """A complete feature store of several shards; read only."""
    from semroute.pipeline.extraction import extract

    path = tmp_path_factory.mktemp("features") / "store"
    extract(
        str(samples_file), path, model=str(tiny_llm), shard_bytes=300_000, workers=0, report=_silent
    )
    return path


@pytest.fixture(scope="session")
def latent_store(tmp_path_factory: pytest.TempPathFactory, samples_file: Path) -> Path:
    """A complete latent store of the same samples, 3 x 12 x 12 pixels; read only."""
    from semroute.pipeline.imaging import encode_images

    path = tmp_path_factory.mktemp("latents") / "store"
    encode_images(str(samples_file), path, shard_bytes=30_000, workers=0, report=_silent)
    return path


def _silent(_line: str) -> None:
    pass
