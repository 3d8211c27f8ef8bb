"""What is drawn and scored with a run: pictures and reports, written as files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from ...pipeline.store.features import NULL_CAPTION, Rows
from ...schemas import InputError, Mixes
from ..diffusion.flow import Flow
from ..diffusion.sampling import Callback, SamplingConfig, sample
from ..model.dit import DiT
from ..plots.images import sample_grid, save_images
from ..runs.run import Run

Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""Latents [N, C, h, w] -> RGB images [N, height, width, 3]."""


class Features(Protocol):
    """Where captions' hidden states come from: a feature store, or prompts encoded in memory."""

    @property
    def mixes(self) -> Mixes | None: ...

    def read(
        self, ids: Sequence[int] | NDArray[np.int64], layers: Sequence[int] | None = None
    ) -> Rows: ...


def generate(
    model: DiT,
    flow: Flow,
    features: Features,
    caption_ids: Sequence[int] | NDArray[np.int64],
    how: SamplingConfig,
    *,
    seed: int,
    batch_size: int,
    numbers: Sequence[int] | None = None,
    shape: tuple[int, int, int] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> NDArray[np.float32]:
    """One latent a caption, float32 [N, C, h, w], in the units that the model was trained on.

    Only the layers that the model reads are read, a batch at a time. The noise of latent i is a
    function of (seed, its number): a latent depends on the batch size only by rounding.

    Args:
        caption_ids: entries of ``features``; repeat one for several latents.
        batch_size: captions sampled at once; guidance runs them a second time.
        numbers: of the latents, by default 0, 1, 2 and so on.
        shape: (C, h, w) of the latents, by default the model's own.
        callback: called after each step of each batch, as :func:`.sampling.solve` does.

    Raises:
        InputError: a batch size below 1, no such caption, or features that are mixes of other
            weights than the model's.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")
    device = next(model.parameters()).device
    shape = model.latent_shape if shape is None else shape
    latents = np.empty((len(caption_ids), *shape), np.float32)
    numbers = range(len(caption_ids)) if numbers is None else numbers
    with (
        model.reading(features.mixes),
        tqdm(total=len(caption_ids), unit="image", disable=not progress) as bar,
    ):
        layers = model.router.layers_read
        null = None
        if how.cfg_scale != 1.0:
            null = features.read([NULL_CAPTION], layers).tensor(device)
        for first in range(0, len(caption_ids), batch_size):
            part = caption_ids[first : first + batch_size]
            rows = features.read(part, layers)
            latents[first : first + len(part)] = sample(
                model,
                flow,
                rows.tensor(device),
                torch.from_numpy(rows.offsets),
                null,
                how,
                seed=seed,
                numbers=numbers[first : first + len(part)],
                shape=shape,
                callback=callback,
            ).numpy(force=True)
            bar.update(len(part))
    return latents


def generate_samples(
    run: Run,
    features: Features,
    caption_ids: Sequence[int],
    texts: Sequence[str],
    decode: Decode | None,
    out: Path,
    how: SamplingConfig,
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
        how, seed, batch_size, shape: as for :func:`semroute.trainer.evaluation.generate.generate`.
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
