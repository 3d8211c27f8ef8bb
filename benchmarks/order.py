"""Randomness of an order by shards against a full permutation. Arithmetic: no store is read.

    python benchmarks/order.py

Samples of one caption each, dealt to shards at random, as extraction does. Every number is a mean
over whole epochs and three seeds.
"""

from collections.abc import Sequence

import click
import numpy as np
from scipy.stats import spearmanr

from semroute.pipeline.store.order.dataset import SampleIndex
from semroute.pipeline.store.order.sampler import MixtureSampler

SEEDS = 3


def make_order(num_samples: int, num_shards: int, window: int | None, seed: int) -> MixtureSampler:
    rng = np.random.default_rng(1000 + seed)
    shards = rng.permutation(num_samples) * num_shards // num_samples
    ids = np.arange(num_samples)
    source = SampleIndex(ids, np.arange(num_samples + 1), ids + 1, shards=shards)
    return MixtureSampler([source], seed=seed, caption_dropout=0, window=window)


def measure(order: MixtureSampler, batch_size: int) -> list[float]:
    """Shards per batch; shares of pairs of batch mates that share a shard and that meet again in
    the next epoch; rank correlation of the positions of samples in two epochs."""
    num = len(order.sources[0]) // batch_size * batch_size
    shards = order.sources[0].shards
    assert shards is not None
    first = order.indices(0, num).sample.reshape(-1, batch_size)
    second = order.indices(len(order.sources[0]), num).sample
    batch_of = np.full(len(order.sources[0]), -1)
    batch_of[second] = np.arange(num) // batch_size
    kinds = [len(np.unique(row)) for row in shards[first]]
    place = np.empty(len(order.sources[0]))
    place[second] = np.arange(num)
    both = np.intersect1d(first, second)
    earlier = np.empty(len(order.sources[0]))
    earlier[first.ravel()] = np.arange(num)
    correlation = spearmanr(earlier[both], place[both]).statistic
    return [float(np.mean(kinds)), pairs(shards[first]), pairs(batch_of[first]), abs(correlation)]


def pairs(values: np.ndarray) -> float:
    """Share of pairs within a row that have the same value."""
    size = values.shape[1]
    alike = [np.square(np.unique(row, return_counts=True)[1]).sum() - size for row in values]
    return float(np.mean(alike)) / (size * (size - 1))


def table(rows: Sequence[tuple[str, list[float]]]) -> str:
    random = rows[-1][1]
    lines = [
        "| order | shards per batch | mates of one shard | x random | mates that meet again "
        "| x random | rank correlation of epochs |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, (kinds, mates, again, correlation) in rows:
        lines.append(
            f"| {name} | {kinds:.1f} | {mates:.2%} | {mates / random[1]:.1f} | {again:.3%} "
            f"| {again / random[2]:.1f} | {correlation:.3f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--num-samples", default=200_000, show_default=True)
@click.option("--num-shards", default=200, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
def main(num_samples: int, num_shards: int, batch_size: int) -> None:
    rows = []
    for window in (1, 2, 4, 8, 16, 32, 64, num_shards, None):
        found = [
            measure(make_order(num_samples, num_shards, window, seed), batch_size)
            for seed in range(SEEDS)
        ]
        name = "random" if window is None else f"shards, window {window}"
        rows.append((name, np.mean(found, axis=0).tolist()))
    print(table(rows))


if __name__ == "__main__":
    main()
