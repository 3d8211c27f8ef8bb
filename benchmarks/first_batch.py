"""How long training on a store of millions of captions takes to begin: medians of a few rounds.

    python benchmarks/first_batch.py scratch

In the scratch folder it writes a store of random hidden states, one layer of width 8, and latents
of 4x4; a second run uses what is there. Delete the folder afterwards. Each round starts three
processes, one after the other: one that imports torch and what its optimizers import; one that
opens the stores and takes a batch from a loader; and ``semroute train``, until its progress bar
shows the first step. Times are from the start of the process; files are in the page cache.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from cold import write_features, write_latents

TORCH = """
import torch
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
"""
BATCH = """
import sys
from semroute.schemas import DataConfig
from semroute.pipeline.store.open import open_followed, open_latents
from semroute.trainer.data.loader import PackedLoader

features, latents = sys.argv[1:]
stores = open_followed(features), open_latents(latents, all_columns=False)
loader = PackedLoader(*stores, DataConfig(batch_size=64), seed=0, layers=[1])
print(next(iter(loader)).num_rows, flush=True)
"""


def until_end(code: str, *arguments: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def until_first_step(config: Path) -> float:
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "semroute.cli", "train", config], stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    seen = b""
    with process:
        while b" 1/1 [" not in seen:
            read = process.stderr.read1()
            if not read:
                raise click.ClickException(f"no step was taken:\n{seen.decode()}")
            seen += read
        seconds = time.perf_counter() - start
        process.communicate()
    return seconds


@click.command()
@click.argument("scratch", type=click.Path(path_type=Path))
@click.option("--captions", default=3_000_000, show_default=True, type=click.IntRange(1000))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(scratch: Path, captions: int, rounds: int) -> None:
    features, latents = scratch / "features", scratch / "latents"
    scratch.mkdir(parents=True, exist_ok=True)
    counts = np.random.default_rng(0).integers(5, 21, captions)
    write_features(features, counts, layers=1, width=8)
    write_latents(latents, captions, shape=(4, 4, 4))

    def first_step(number: int) -> float:
        config = scratch / f"run-{number}-{time.time_ns()}.yaml"
        config.write_text(
            f"features: {features}\nlatents: {latents}\noutput: {config.with_suffix('')}\n"
            "steps: 1\nmixed_precision: 'no'\nmodel: {size: nano, patch_size: 1}\n"
            "routing: {strategy: uniform}\ndata: {batch_size: 64}\n"
        )
        return until_first_step(config)

    rows: dict[str, Callable[[int], float]] = {
        "`import torch`, an optimizer": lambda _: until_end(TORCH),
        "a batch of the loader": lambda _: until_end(BATCH, features, latents),
        "first step of `semroute train`": first_step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):  # the first fills the page cache and writes bytecode
        for name, measure in rows.items():
            seconds[name].append(measure(number))
    print(f"{captions:,} captions, {rounds} rounds\n\n| process | seconds |\n| --- | --: |")
    for name, values in seconds.items():
        values = sorted(values[1:])
        print(f"| {name} | {statistics.median(values):.1f} ({values[0]:.1f}-{values[-1]:.1f}) |")


if __name__ == "__main__":
    main()
