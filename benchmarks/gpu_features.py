"""Parts of benchmarks/gpu.py about features: extraction, and decoding of every codec.

Shapes: R rows (tokens of all captions, packed), L layers, H text width.
"""

import csv
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract import Captions, total
from gpu_shapes import DEVICE, Row, Shapes, median_seconds, pinned, random_llm, timed

from semroute.pipeline.codecs.base import Codec
from semroute.pipeline.codecs.fit import encode_rows
from semroute.pipeline.codecs.registry import (
    CODECS,
    fitted_arrays,
    open_codec,
    rank_of,
    request_codec,
    settle_rank,
)
from semroute.pipeline.extraction.features import extract


def write_llm(shapes: Shapes, folder: Path) -> None:
    """An LLM with random weights, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {byte: i + 2 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    random_llm(shapes).save_pretrained(folder)


def write_captions(shapes: Shapes, file: Path) -> None:
    letters, rng = np.array(list("abcdefgh ")), np.random.default_rng(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"])
        for number in range(shapes.captions):
            drawn = "".join(rng.choice(letters, shapes.tokens))
            writer.writerow([f"{number} {drawn}"[: shapes.tokens].strip()])


def measure_extraction(shapes: Shapes, folder: Path) -> Iterator[Row]:
    write_llm(shapes, folder / "llm")
    write_captions(shapes, folder / "captions.csv")
    options: dict[str, Any] = {"model": str(folder / "llm"), "template": "bos", "dtype": "bfloat16"}
    options |= {"workers": 0, "shard_bytes": 1_000_000_000}
    run = partial(extract, str(folder / "captions.csv"), **options)
    run(folder / "warm", codec="bf16", limit=8)
    bare: float | None = None
    for codec in ("bf16", "delta"):
        began = 0.0

        def hear(line: str) -> None:
            nonlocal began
            print(line, flush=True)
            if "to do:" in line:  # fitted and tried, so the LLM is loaded and warm
                began = time.perf_counter()

        store = run(folder / codec, codec=codec, report=hear)
        seconds = time.perf_counter() - began
        captions = Captions(folder / codec)
        if bare is None:
            bare = measure_bare(captions)
        parts = total([receipt.seconds for receipt in store.receipts().values()])
        yield {
            "codec": codec,
            "tokens": int(captions.lengths.sum()),
            "bare forward, s": bare,
            "extraction, s": seconds,
            "LLM idle share": 1 - bare / seconds,
            "GB": store.num_bytes() / 1e9,
            **{f"{name}, s": parts[name] for name in ("forward", "code", "write")},
        }


def measure_bare(captions: Captions) -> float:
    """Seconds of the LLM alone, on the batches of a store."""
    planned = [
        {name: value.to(DEVICE) for name, value in inputs.items()}
        for inputs in captions.planned(padded=False)
    ]

    def forward() -> None:
        for inputs in planned:
            captions.forward(inputs)

    forward()
    return timed(forward)


def make_codec(name: str, sample: torch.Tensor) -> Codec:
    """A codec fitted to a sample [R, L, H]; one that multiplies matrices gets unit matrices, whose
    fit would take minutes."""
    kind, (_, layers, width) = CODECS[name], sample.shape
    spec, parameters = settle_rank(request_codec(name), width), {}
    if name == "linear":
        unit = torch.eye(width).bfloat16().view(torch.uint16).numpy()
        for key, (shape, dtype) in fitted_arrays(spec, width).items():
            value = unit if len(shape) == 2 else np.zeros(shape, dtype)
            parameters[key] = np.repeat(value[None], layers, axis=0)
    elif kind.fits:
        parameters = kind.fit(sample, rank_of(spec, width))
    return open_codec(spec, range(1, layers + 1), width, parameters)


def measure_decoding(shapes: Shapes, _folder: Path) -> Iterator[Row]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = (shapes.rows, shapes.layers, shapes.width)
    hidden = torch.randn(size, generator=generator, device=DEVICE).cumsum(1)  # a residual stream
    layers, decoded_bytes = range(shapes.layers), 2 * hidden.numel()
    for name in CODECS:
        codec = make_codec(name, hidden[:256])
        with torch.no_grad():
            arrays = encode_rows(codec, hidden)
        codes = {key: pinned(torch.from_numpy(array)) for key, array in arrays.items()}
        num_bytes = sum(array.nbytes for array in arrays.values())

        def move(codes: dict[str, torch.Tensor] = codes) -> dict[str, torch.Tensor]:
            return {key: value.to(DEVICE, non_blocking=True) for key, value in codes.items()}

        there = move()
        decode = partial(codec.decode_torch, layers=layers)
        yield {
            "codec": name,
            "bytes of codes per value": num_bytes / hidden.numel(),
            "on the device, GB/s": decoded_bytes
            / median_seconds(partial(decode, there), shapes)
            / 1e9,
            "from pinned memory, GB/s": decoded_bytes
            / median_seconds(lambda move=move, decode=decode: decode(move()), shapes)
            / 1e9,
            "copy, GB/s": num_bytes / median_seconds(move, shapes) / 1e9,
        }
