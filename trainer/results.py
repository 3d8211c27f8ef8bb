"""What is drawn and scored with a run: pictures and reports, written as files."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet
import torch
from safetensors.numpy import save_file

from ..pipeline.store import FeatureStore
from ..pipeline.style import DPI
from ..schemas import InputError
from .evaluation import Decode, Features, Report, evaluate, generate
from .plots import sample_grid, save_images
from .run import Run, load_run
from .sampling import Solver
from .shapes import judge
from .world import read_scenes

NUM_JUDGED = 24
"""Images that an evaluation shows."""


def open_run(path: Path, step: int | None, weights: Literal["ema", "model"]) -> Run:
    """A run to sample from, on the GPU where there is one; see :func:`load_run`.

    Of several GPUs it is that of ``LOCAL_RANK``, which torchrun and ``accelerate launch`` set.
    """
    run = load_run(path, step, weights)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    run.model.to(device)
    return run


def plot_run(run: Run, out: str | Path) -> list[Path]:
    """Write the figures of a run as PNG into the folder ``out``; their paths in the order
    written."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = run.figures()
    paths = [out / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def draw(
    run: Run,
    features: Features,
    caption_ids: Sequence[int],
    texts: Sequence[str],
    decode: Decode | None,
    out: Path,
    how: Solver,
    *,
    seed: int,
    batch_size: int,
    shape: tuple[int, int, int] | None = None,
) -> list[Path]:
    """A picture of each caption and a grid of them all, in ``out``; or just their latents.

    Args:
        caption_ids, texts: of the captions, in ``features`` and in words.
        decode: latents -> images. None: write ``latents.safetensors``, with the tensor ``latents``,
            float32 [captions, C, height, width] in the units that the run was trained on, and the
            captions as JSON in its metadata.
        how, seed, batch_size, shape: as for :func:`semroute.trainer.evaluation.generate`.
    """
    latents = generate(
        run.model,
        run.flow,
        features,
        caption_ids,
        how,
        seed=seed,
        batch_size=batch_size,
        shape=shape,
    )
    if decode is None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "latents.safetensors"
        save_file({"latents": latents}, path, {"captions": json.dumps([*texts])})
        return [path]
    images = decode(latents)
    return save_images(out, images, texts, sample_grid(images, texts))


def score_run(
    run: Run,
    store: FeatureStore,
    samples: str,
    decode: Decode,
    how: Solver,
    *,
    cfg_scales: Sequence[float],
    images_per_caption: int,
    seed: int,
    batch_size: int,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Score a run on a world of shapes at several guidance scales.

    Writes ``evaluation.json`` and, into ``figures``, some judged images of each scale.

    Args:
        store: features of the captions to judge by.
        samples: the test.parquet that they were extracted from.
        decode: latents -> images.
        how, seed, batch_size: as for :func:`semroute.trainer.evaluation.generate`; its guidance
            scale is replaced by each of ``cfg_scales``.
        report: takes each scale's table of scores.

    Raises:
        InputError: the file is no world, or its captions are not those of the store.
    """
    try:
        table = pyarrow.parquet.read_table(samples)
    except (OSError, ValueError) as error:
        raise InputError(f"--samples {samples}: {error}") from error
    scenes, splits = read_scenes(table), table["split"].to_pylist()
    ids = [row[0] for row in store.samples["caption_ids"].to_pylist()]
    if store.captions["text"].take(ids).to_pylist() != table["text"].to_pylist():
        raise InputError(f"{store.path} was not extracted from {samples}: the captions differ")
    evaluations, written = {}, []
    for cfg_scale in cfg_scales:
        evaluations[cfg_scale], images = evaluate(
            run.model,
            run.flow,
            store,
            ids * images_per_caption,
            scenes * images_per_caption,
            splits * images_per_caption,
            decode,
            replace(how, cfg_scale=cfg_scale),
            seed=seed,
            batch_size=batch_size,
        )
        report(f"guidance {cfg_scale:g}, {len(images)} images\n{evaluations[cfg_scale]}\n")
        shown = np.linspace(0, len(ids) - 1, min(NUM_JUDGED, len(ids))).astype(int)
        marks = [judge(images[i], scenes[i])["all"] for i in shown]
        texts = table["text"].take(shown).to_pylist()
        path = run.path / "figures" / f"judged-cfg-{cfg_scale:g}.png"
        path.parent.mkdir(exist_ok=True)
        sample_grid(images[shown], texts, marks).savefig(path, dpi=150)
        written.append(path)
    made = Report(
        run.step,
        run.source,
        str(store.path),
        how.num_steps,
        seed,
        evaluations,
        how.cfg_interval,
    )
    return [*written, made.write(run.path)]
