"""Effect of codec error on training: the same shapes, learnt from every codec.

    python benchmarks/training.py OUT --model LLM [--seeds 3] [--steps 400]

Everything is made in OUT, and nothing twice: rerun the same command to resume, or with more seeds
or steps to extend the results. Arms of a seed share dataset, order, t, noise and initial weights;
each is trained and scored on stores of its own codec. Tables are printed after each seed.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from semroute.benchmarks.codecs import PEERS
from semroute.pipeline.codecs.base import Coded
from semroute.pipeline.codecs.bf16 import Bf16
from semroute.pipeline.codecs.error import codec_error
from semroute.pipeline.codecs.registry import CODECS
from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.latents import encode_images
from semroute.pipeline.extraction.rewrite import rewrite
from semroute.pipeline.models.vae import latents_to_images
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.open import open_features, open_latents
from semroute.schemas import read_config
from semroute.trainer.diffusion.noise import NoiseSource
from semroute.trainer.diffusion.sampling import SamplingConfig
from semroute.trainer.evaluation.generate import generate
from semroute.trainer.evaluation.shapes import score
from semroute.trainer.runs.run import Run, load_run
from semroute.trainer.shapes.dataset import read_scenes, write_world
from semroute.trainer.training.train import train

SKILLS = ("all", "binding", "count", "shape", "colour")
GUIDANCE = (1.0, 3.0)
LOG_EVERY = 25
LAST = 4
"""Number of last lines of metrics that the training loss averages: the last 100 steps."""
NUM_JUDGED = 400
"""Number of captions, the first of the test file: new ones, of pairs that training shows."""
DRAWS = 4
"""Draws of t and noise for each test image, in the held-out loss."""
HOW: dict[str, Any] = {
    "shard_bytes": 64_000_000, "workers": 0, "report": functools.partial(click.echo, err=True)
}  # fmt: skip

Quantiser = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """A store to train on, and how it is read.

    Attributes:
        quantise: another quantiser, as a round trip of float32; its values are stored in bf16.
        bits: bits per value in that form, computed; None: measured on the store.
    """

    name: str
    codec: str = "bf16"
    quality: float | None = None
    quantise: Quantiser | None = None
    bits: float | None = None
    strategy: str = "depth"

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


def arms(width: int) -> list[Arm]:
    """All arms; the others are compared with the first."""
    graded = itertools.product(("delta", "linear"), (4.0, 3.0, 2.5))
    return [
        Arm("bf16"),
        Arm("lossless", "lossless"),
        *(Arm(f"{codec}, quality {q:g}", codec, q) for codec, q in graded),
        *(Arm(name, quantise=quantise, bits=bits(width)) for name, quantise, bits in PEERS),
        Arm("bf16, penultimate layer", strategy="penultimate"),
    ]


def round_trip(quantise: Quantiser) -> type[Bf16]:
    """A codec that stores hidden states in bfloat16 after a round trip through a quantiser."""

    class RoundTrip(Bf16):
        def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
            return super().encode(layer, quantise(hidden.float()), below)

    return RoundTrip


def make_store(folder: Path, arm: Arm) -> tuple[FeatureStore, Path]:
    """The store of an arm, and the path to read. A CPU decodes linear slowly, so that one is read
    from its decoding in bf16, which is bit for bit what a reader of the store gets."""
    source, out = folder / "bf16", folder / arm.folder
    if arm.quantise is not None:
        with patch.dict(CODECS, bf16=round_trip(arm.quantise)):
            return rewrite(source, out, codec="bf16", **HOW), out
    if arm.codec == "bf16":
        return open_features(source), source
    store = rewrite(source, out, codec=arm.codec, quality=arm.quality, **HOW)
    if arm.codec == "linear":
        out = out.with_name(f"{out.name}-decoded")
        rewrite(store.path, out, codec="bf16", **HOW)
    return store, out


def measure(out: Path, arm: Arm, seed: int, steps: int, config: Path) -> dict[str, float]:
    """Losses and accuracies of one arm under one seed; trains it if needed."""
    path = out / "runs" / f"seed-{seed}" / arm.folder
    found = path / "result.json"
    if found.exists() and (result := json.loads(found.read_text("utf-8")))["steps"] == steps:
        return result
    _, features = make_store(out / "train", arm)
    _, test = make_store(out / "test", arm)
    values = {
        "features": features, "latents": out / "train-latents", "output": path, "seed": seed,
        "steps": steps, "log_every": LOG_EVERY, "checkpoint_every": 100_000, "keep_checkpoints": 1,
        "routing.strategy": arm.strategy, "model.depth": 4,
    }  # fmt: skip
    train(read_config(config, [f"{key}={value}" for key, value in values.items()]))
    run = load_run(path)
    losses = run.metrics()["loss"].to_numpy()[-LAST:]
    result = {"steps": steps, "training loss": float(losses.mean())}
    result |= judge(run, open_features(test), out, seed)
    found.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def judge(run: Run, store: FeatureStore, out: Path, seed: int) -> dict[str, float]:
    """Loss and accuracies on new captions of known colour-shape pairs; noise is seeded."""
    table = pq.read_table(out / "shapes" / "test.parquet")
    scenes, splits = read_scenes(table)[:NUM_JUDGED], ["test"] * NUM_JUDGED
    ids = store.first_captions[:NUM_JUDGED]
    result = {"held-out loss": held_out_loss(run, store, ids, out / "test-latents", seed)}
    identity = run.record.latents
    decode = functools.partial(latents_to_images, scale=identity.scale, shift=identity.shift)
    for scale in GUIDANCE:
        latents = generate(
            run.model, run.flow, store, ids, SamplingConfig(16, scale),
            seed=seed, batch_size=80, progress=False,
        )  # fmt: skip
        found = score(decode(latents), scenes, splits, seed=seed).to_dict()["test"]
        result |= {f"{skill} at {scale:g}": found[skill]["accuracy"] for skill in SKILLS}
    return result


@torch.no_grad()
def held_out_loss(
    run: Run, store: FeatureStore, ids: NDArray[np.int64], latents: Path, seed: int
) -> float:
    """Training loss of the averaged weights on the first test images."""
    images, losses = torch.from_numpy(open_latents(latents).read(np.arange(len(ids)))), []
    for part in torch.arange(len(ids)).split(50):
        first, num = int(part[0]), len(part)
        shape = run.model.latent_shape
        drawn = NoiseSource(run.flow, seed, DRAWS, version=1).draw(first, num, shape)
        t, noise = drawn.t, drawn.noise
        x0, caption = (x.repeat_interleave(DRAWS, 0) for x in (images[part], torch.arange(num)))
        rows = store.read(ids[part.numpy()], run.model.router.layers_read)
        x_t, offsets = run.flow.interpolate(x0, noise, t), torch.from_numpy(rows.offsets)
        prediction = run.model(x_t, t, rows.tensor(), offsets, caption)
        losses.append(run.flow.loss(prediction, x0, noise, t))
    return float(torch.cat(losses).mean())


def compare(results: dict[str, list[dict[str, float]]], key: str) -> Iterator[str]:
    """One cell per arm: its mean over seeds, and the paired difference from the first with 95 %.

    Arms that differ by the error of their features form a randomised block design with seeds as
    blocks, and share one standard deviation. The penultimate layer uses that of its own pairs.
    """
    values = {name: np.array([result[key] for result in found]) for name, found in results.items()}
    first, *names = (name for name in values if not name.startswith(("lossless", "bf16, ")))
    pooled = half_width(np.stack([values[name] for name in (first, *names)]))
    digits = 4 if "loss" in key else 3
    for name, of_seeds in values.items():
        mean, difference = of_seeds.mean(), (of_seeds - values[first]).mean()
        half = pooled if name in names else half_width(np.stack([values[first], of_seeds]))
        against = f" ({difference:+.{digits}f} ± {half:.{digits}f})"
        if results[name] == results[first]:
            against = "" if name == first else " (the same)"
        yield f"{mean:.{digits}f}{against}"


def half_width(block: NDArray[np.float64]) -> float:
    """Half width of the 95 % interval of a difference of two rows of a block, [arms, seeds]; two
    rows alone give a paired t-test."""
    num_arms, num_seeds = block.shape
    freedom = (num_arms - 1) * (num_seeds - 1)
    if not freedom:
        return np.nan
    left = block - block.mean(0) - block.mean(1, keepdims=True) + block.mean()
    t = np.quantile(np.random.default_rng(0).standard_t(freedom, 1_000_000), 0.975)
    return float(t * np.sqrt(np.square(left).sum() / freedom * 2 / num_seeds))


def table(columns: dict[str, list[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    lines = [[*columns], rule, *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(out: Path, tried: list[Arm], results: dict[str, list[dict[str, float]]]) -> None:
    """Print Markdown: size, error beyond the first's own, losses; accuracies by guidance scale."""
    sizes, errors, names = [], [], [arm.name for arm in tried]
    whole = open_features(out / "train" / "bf16")
    for arm in tried:
        store, _ = make_store(out / "train", arm)
        smaller = 16 / arm.bits if arm.bits else whole.num_bytes() / store.num_bytes()
        error = codec_error([*store.receipts().values()])["mean"] if store.manifest.derived else 0
        sizes.append(f"{smaller:.2f}x")
        errors.append(f"{error:.1e}")
    losses = {key: [*compare(results, key)] for key in ("training loss", "held-out loss")}
    print(f"\n{len(results['bf16'])} seeds")
    print(table({"arm": names, "smaller": sizes, "LN(h)": errors, **losses}))
    for scale in GUIDANCE:
        scores = {skill: [*compare(results, f"{skill} at {scale:g}")] for skill in SKILLS}
        print(f"guidance {scale:g}\n{table({'arm': names, **scores})}", flush=True)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The LLM; a small one is enough.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=400, show_default=True)
def main(out: Path, model: str, seeds: int, steps: int) -> None:
    torch.set_num_threads(1)
    world = out / "shapes"
    if not world.exists():
        write_world(world, 16_000, seed=0, num_test=1_600)
    for split in ("train", "test"):
        file = str(world / f"{split}.parquet")
        extract(file, out / split / "bf16", model=model, codec="bf16", threads=1, **HOW)
        encode_images(file, out / f"{split}-latents", **HOW)
    tried = arms(open_features(out / "train" / "bf16").manifest.identity.model.width)
    config = Path(__file__).with_name("demo.yaml")
    results: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in tried}
    for seed in range(seeds):
        for arm in tried:
            results[arm.name].append(measure(out, arm, seed, steps, config))
            print(f"seed {seed}, {arm.name}: {json.dumps(results[arm.name][-1])}", flush=True)
        tables(out, tried, results)


if __name__ == "__main__":
    main()
