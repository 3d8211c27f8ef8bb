"""Size, error and speed of each codec on real hidden states, beside other quantisers.

    semroute extract CAPTIONS features --model LLM --codec bf16
    python benchmarks/codecs.py features [--markdown]

Codecs are fitted on captions that are not measured. Sizes are those of real zstd chunks of 8 full
rows, without what a store holds only once (slopes, matrices). Speeds are for one thread, in GB of
decoded bfloat16 per second, without zstd and without reading.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from semroute.pipeline.codecs.base import layer_norm
from semroute.pipeline.codecs.error import CodecError
from semroute.pipeline.codecs.fit import bits_per_value, fit_codec
from semroute.pipeline.store.open import open_features

ARMS = [
    ("bf16", None),
    ("lossless", None),
    *(("delta", quality) for quality in (7.0, 5.0, 4.0, 3.0, 2.5)),
    *(("linear", quality) for quality in (7.0, 5.0, 4.0, 3.0, 2.5)),
]
NUM_MIXES = 16


@dataclass(frozen=True)
class Row:
    """A row of the table: bits per value, relative errors of LN(h), GB/s of bfloat16."""

    name: str
    bits: float
    error: dict[str, float]
    mixed: float
    encode: float | None
    decode: float | None
    decode_torch: float | None


def fp8(hidden: torch.Tensor) -> torch.Tensor:
    """e4m3 with one scale per vector: a plain cast overflows at 448, which hidden states exceed."""
    scale = hidden.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return (hidden / scale).to(torch.float8_e4m3fn).float() * scale


def int8(hidden: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """Symmetric, scaled by the largest value of a vector or of a group of its channels."""
    parts = hidden if group is None else hidden.unflatten(-1, (-1, group))
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((parts / scale).round() * scale).reshape(hidden.shape)


# Name, values as a reader gets them, bits per value with scales in float32 (float16 in groups).
PEERS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], Callable[[int], float]]] = [
    ("fp8 e4m3, one scale per vector", fp8, lambda width: 8 + 32 / width),
    ("int8, one scale per vector", int8, lambda width: 8 + 32 / width),
    ("int8, groups of 32", lambda hidden: int8(hidden, 32), lambda width: 8 + 16 / 32),
]


def errors(hidden: torch.Tensor, found: torch.Tensor) -> tuple[dict[str, float], float]:
    """Errors of LN(h), and of random softmax mixes of it over layers (mean of ``NUM_MIXES``)."""
    error = CodecError(range(hidden.shape[1]))
    for layer in range(hidden.shape[1]):
        error.add(layer, hidden[:, layer], found[:, layer].clone())
    logits = torch.randn(NUM_MIXES, hidden.shape[1], generator=torch.Generator().manual_seed(0))
    weights = logits.softmax(-1)
    expected, got = (torch.einsum("kl,rlh->rkh", weights, layer_norm(h)) for h in (hidden, found))
    mixed = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.to_dict(), float(mixed.mean())


def measure_codec(
    name: str, quality: float | None, sample: torch.Tensor, hidden: torch.Tensor
) -> Row:
    codec, _ = fit_codec(name, sample, quality)
    num_layers = hidden.shape[1]
    gigabytes = 2 * hidden.numel() / 1e9
    parts: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in codec.arrays}
    coded, seconds = None, 0.0
    for layer in range(num_layers):
        one = hidden[:, layer].contiguous()
        began = time.perf_counter()
        coded = codec.encode(layer, one, coded)
        seconds += time.perf_counter() - began
        for array, codes in coded.codes.items():
            parts[array].append(codes)
    tensors = {array: torch.stack(codes, 1) for array, codes in parts.items()}
    arrays = {array: codes.numpy() for array, codes in tensors.items()}
    out = np.empty(hidden.shape, np.uint16)
    layers, rows = range(num_layers), np.arange(len(out))
    decode = best_of(lambda: codec.decode(arrays, layers, rows, out))
    decode_torch = best_of(lambda: codec.decode_torch(tensors, layers))
    error, mixed = errors(hidden, torch.from_numpy(out).view(torch.bfloat16))
    label = name if quality is None else f"{name}, quality {quality:g}"
    bits = bits_per_value(codec, hidden)
    speeds = (gigabytes / seconds, gigabytes / decode, gigabytes / decode_torch)
    return Row(label, bits, error, mixed, *speeds)


def best_of(call: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of several calls, after a first one that compiles."""
    call()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def measure(sample: torch.Tensor, hidden: torch.Tensor) -> Iterator[Row]:
    for name, quality in tqdm(ARMS, desc="codecs"):
        yield measure_codec(name, quality, sample, hidden)
    for name, quantise, bits in PEERS:
        error, mixed = errors(hidden, quantise(hidden.float()))
        yield Row(name, bits(hidden.shape[-1]), error, mixed, None, None, None)


@click.command()
@click.argument("features", type=click.Path(exists=True, path_type=Path))
@click.option("--fit-rows", default=8_192, show_default=True, help="Tokens to fit on.")
@click.option("--rows", default=3_000, show_default=True, help="Other tokens, to measure.")
@click.option("--markdown", is_flag=True)
def main(features: Path, fit_rows: int, rows: int, markdown: bool) -> None:
    torch.set_num_threads(1)
    store = open_features(features)
    if store.manifest.codec.name != "bf16":
        raise click.ClickException(f"{features} holds {store.manifest.codec.name}, not bf16")
    stops = np.cumsum(store.captions["num_tokens"].to_numpy())
    first, last = np.searchsorted(stops, [fit_rows, fit_rows + rows])
    sample = store.read(range(int(first))).tensor()
    hidden = store.read(range(int(first), int(last))).tensor()
    print(
        f"fitted on {len(sample):,} tokens, measured on {len(hidden):,} others of {features.name}"
    )
    heads = ["codec", "bits", "smaller", "LN(h) mean", "max", "max bare", "mixed", "encode",
             "decode", "torch"]  # fmt: skip
    table = [heads]
    for row in measure(sample, hidden):
        speeds = (row.encode, row.decode, row.decode_torch)
        table.append(
            [
                row.name,
                f"{row.bits:.2f}",
                f"{16 / row.bits:.2f}x",
                *(f"{row.error[key]:.1e}" for key in ("mean", "max", "max_without_top3")),
                f"{row.mixed:.1e}",
                *("" if speed is None else f"{speed:.2f}" for speed in speeds),
            ]
        )
    if markdown:
        table.insert(1, ["---"] + ["--:"] * (len(heads) - 1))
        print("\n".join("| " + " | ".join(line) + " |" for line in table))
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print(line[0].ljust(widths[0]), *numbers)


if __name__ == "__main__":
    main()
