"""Size, error and speed of each codec on real hidden states, beside other quantisers.

    semroute extract CAPTIONS features --model LLM --codec bf16
    python benchmarks/codecs.py features [--ranks 0,16,full] [--markdown]

Codecs are fitted on captions that are not measured. Sizes are those of real zstd chunks of 8 full
rows, without what a store holds only once (slopes, matrices). Speeds are for one thread, in GB of
decoded bfloat16 per second of its CPU time, without zstd and without reading: medians of rounds
that take one codec after the other.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from tqdm import tqdm

from semroute.pipeline.codecs.base import Codec, layer_norm
from semroute.pipeline.codecs.error import CodecError
from semroute.pipeline.codecs.fit import bits_per_value, encode_rows, fit_codec
from semroute.pipeline.codecs.registry import fitted_arrays, request_codec, settle_rank
from semroute.pipeline.store.open import open_features
from semroute.schemas import Rank

QUALITIES = (7.0, 5.0, 4.0, 3.0, 2.5)
ARMS: list[tuple[str, float | None, Rank | None]] = [
    ("bf16", None, None),
    ("lossless", None, None),
    *(("delta", quality, None) for quality in QUALITIES),
    *(("linear", quality, None) for quality in QUALITIES),
]
NUM_MIXES = 16
TIMED_ROWS, ROUNDS = 256, 7


@dataclass(frozen=True)
class Row:
    """A row of the table: bits per value, bytes of matrices, relative errors of LN(h), and GB/s of
    bfloat16 by what was done."""

    name: str
    bits: float
    error: dict[str, float]
    mixed: float
    once: int
    speeds: dict[str, float]


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


@dataclass(frozen=True)
class Arm:
    """A fitted codec, and what it is timed on.

    Attributes:
        label: in the table.
        once: bytes of its matrices in a store.
        codes: of the timed rows.
    """

    label: str
    codec: Codec
    once: int
    codes: dict[str, np.ndarray]

    def jobs(self, hidden: torch.Tensor) -> dict[str, Callable[[], object]]:
        """What is timed, on hidden states ``[R, L, H]``."""
        layers, rows = range(hidden.shape[1]), np.arange(len(hidden))
        out = np.empty(hidden.shape, np.uint16)
        tensors = {name: torch.from_numpy(codes) for name, codes in self.codes.items()}
        return {
            "encode": lambda: encode_rows(self.codec, hidden),
            "decode": lambda: self.codec.decode(self.codes, layers, rows, out),
            "torch": lambda: self.codec.decode_torch(tensors, layers),
        }


def fit_arm(
    name: str, quality: float | None, rank: Rank | None, sample: torch.Tensor, timed: torch.Tensor
) -> Arm:
    spec = settle_rank(request_codec(name, quality, rank), sample.shape[2])
    codec, _ = fit_codec(spec, sample, range(sample.shape[1]))
    parts = [name] if quality is None else [name, f"quality {quality:g}"]
    parts += [] if rank is None else [f"rank {rank}"]
    fitted = fitted_arrays(spec, sample.shape[2]).values()
    once = sum(np.prod(shape) * dtype.itemsize for shape, dtype in fitted if len(shape) > 1)
    once = int(once) * sample.shape[1]
    return Arm(", ".join(parts), codec, once, encode_rows(codec, timed))


def time_arms(arms: list[Arm], timed: torch.Tensor) -> list[dict[str, float]]:
    """GB/s of each arm; every round takes all of them."""
    jobs = [arm.jobs(timed) for arm in arms]
    seconds: list[dict[str, list[float]]] = [{job: [] for job in each} for each in jobs]
    for number in tqdm(range(1 + ROUNDS), desc="rounds"):  # the first compiles
        for each, spent in zip(jobs, seconds, strict=True):
            for job, call in each.items():
                began = time.thread_time()
                call()
                if number:
                    spent[job].append(time.thread_time() - began)
    gigabytes = 2 * timed.numel() / 1e9
    return [{job: gigabytes / median(spent) for job, spent in each.items()} for each in seconds]


def measure(
    arms: list[tuple[str, float | None, Rank | None]], sample: torch.Tensor, hidden: torch.Tensor
) -> Iterator[Row]:
    timed = hidden[:TIMED_ROWS].contiguous()
    fitted = [fit_arm(*arm, sample, timed) for arm in tqdm(arms, desc="fits")]
    for arm, speeds in zip(fitted, time_arms(fitted, timed), strict=True):
        found = np.empty(hidden.shape, np.uint16)
        arm.codec.decode(
            encode_rows(arm.codec, hidden), range(hidden.shape[1]), np.arange(len(hidden)), found
        )
        error, mixed = errors(hidden, torch.from_numpy(found).view(torch.bfloat16))
        bits = bits_per_value(arm.codec, hidden)
        yield Row(arm.label, bits, error, mixed, arm.once, speeds)
    for name, quantise, bits_of in PEERS:
        error, mixed = errors(hidden, quantise(hidden.float()))
        yield Row(name, bits_of(hidden.shape[-1]), error, mixed, 0, {})


@click.command()
@click.argument("features", type=click.Path(exists=True, path_type=Path))
@click.option("--fit-rows", default=8_192, show_default=True, help="Tokens to fit on.")
@click.option("--rows", default=3_000, show_default=True, help="Other tokens, to measure.")
@click.option("--ranks", help="Only predictive of these ranks, such as 0,16,full.")
@click.option("--markdown", is_flag=True)
def main(features: Path, fit_rows: int, rows: int, ranks: str | None, markdown: bool) -> None:
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
    arms = ARMS
    if ranks is not None:
        chosen = ["full" if rank == "full" else int(rank) for rank in ranks.split(",")]
        arms = [ARMS[0], *(("predictive", 4.0, rank) for rank in chosen)]
    heads = ["codec", "bits", "smaller", "matrices", "LN(h) mean", "max", "max bare", "mixed",
             "encode", "decode", "torch"]  # fmt: skip
    table = [heads]
    for row in measure(arms, sample, hidden):
        table.append(
            [
                row.name,
                f"{row.bits:.2f}",
                f"{16 / row.bits:.2f}x",
                f"{row.once / 1e6:.1f} MB" if row.once else "",
                *(f"{row.error[key]:.1e}" for key in ("mean", "max", "max_without_top3")),
                f"{row.mixed:.1e}",
                *(f"{row.speeds[job]:.2f}" if row.speeds else "" for job in heads[-3:]),
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
