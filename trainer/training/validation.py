"""The loss on samples that are never trained on, by noise level, under noise that never changes.

Which samples, their t and their noise are a function of ``validation.seed`` alone: two runs, of
whatever strategy, seed or number of ranks, are measured by the same numbers.

Shapes: N samples, B samples at once, K bins of t, C channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...pipeline.store.features import FeatureStore
from ...pipeline.store.latents import LatentStore
from ...pipeline.store.open import open_features, open_latents
from ...schemas import InputError, TrainConfig, ValidationConfig, differences, refuse_differences
from ...schemas.seeds import Purpose, numpy_generator, torch_generator
from ..data.batch import Batch
from ..data.dataset import check_joined
from ..diffusion.flow import Flow

NUM_IMAGES = 64
"""Rows of the network's batch. Not the run's: rounding must not depend on ranks."""


def held_out(config: ValidationConfig, ids: np.ndarray) -> np.ndarray:
    """Samples that are not trained on: int64, those of ``ids`` that chance picked first.

    Each sample's chance is a function of (seed, its id), so a store that grows holds out the same
    ones and some of the new.

    Args:
        ids: ascending, int64; samples that have a latent.
    """
    if not config.share:
        return ids[:0]
    generator = numpy_generator(config.seed, Purpose.HELD_OUT)
    drawn = generator.random(int(ids.max(initial=-1)) + 1)[ids]
    picked = np.flatnonzero(drawn < config.share)
    return ids[picked[np.argsort(drawn[picked], kind="stable")]]


@dataclass(frozen=True, eq=False)
class Validation:
    """What a run is measured by.

    Attributes:
        samples: ids in the stores, int64 [N], ascending. Each shows the first of its captions and,
            where latents have a posterior, its mean.
        layers: LLM layers to read.
        num_bins: K; each sample is shown once in each, at a t that it keeps.
        seed: of t and noise, with the sample's id.
    """

    features: FeatureStore
    latents: LatentStore
    samples: np.ndarray
    layers: list[int]
    num_bins: int
    seed: int

    @torch.no_grad()
    def measure(self, model: Any, flow: Flow, accelerator: Any) -> list[float]:
        """Mean loss of each bin of t, from 0 to 1. All ranks must call it; each computes a part,
        and all get the same numbers, whatever their number.

        Args:
            model: called as :meth:`DiT.forward`; perhaps wrapped by accelerate.
            accelerator: of accelerate.
        """
        parts = self._parts(max(1, NUM_IMAGES // self.num_bins))
        losses = torch.zeros(len(self.samples), self.num_bins, device=accelerator.device)
        num_ranks = accelerator.num_processes
        for turn in range(0, len(parts), num_ranks):
            # Wrappers of the model talk to the other ranks: one without a part of its own computes
            # the last part too, and keeps it to itself.
            number = turn + accelerator.process_index
            part = parts[min(number, len(parts) - 1)]
            found = self._losses(model, flow, self.samples[part], accelerator)
            if number < len(parts):
                losses[torch.from_numpy(part).to(losses.device)] = found
        # Each number has one rank that is not at zero, so the sum is exact.
        return accelerator.reduce(losses, "sum").double().mean(0).tolist()

    def _parts(self, size: int) -> list[np.ndarray]:
        """Places in :attr:`samples`, at most ``size`` at a time, whose latents have one shape."""
        buckets = self.latents.buckets[self.samples]
        groups = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        return [g[first : first + size] for g in groups for first in range(0, len(g), size)]

    def _losses(self, model: Any, flow: Flow, samples: np.ndarray, accelerator: Any) -> Tensor:
        """[B, K]."""
        batch = self._read(samples).to(accelerator.device)
        t, noise = self._draw(samples, tuple(batch.latents.shape[1:]))
        t, noise = t.to(accelerator.device), noise.to(accelerator.device)
        x0 = batch.latents.repeat_interleave(self.num_bins, dim=0)  # [B*K, C, h, w]
        caption = batch.caption.repeat_interleave(self.num_bins)  # [B*K]
        x_t = flow.interpolate(x0, noise, t)  # [B*K, C, h, w]
        prediction = model(x_t, t, batch.hidden, batch.offsets, caption)  # [B*K, C, h, w]
        return flow.loss(prediction, x0, noise, t).reshape(-1, self.num_bins)

    def _read(self, samples: np.ndarray) -> Batch:
        lists = self.features.samples["caption_ids"].combine_chunks()
        firsts = lists.values.to_numpy()[lists.offsets.to_numpy()[samples]]
        unique, caption = np.unique(firsts, return_inverse=True)
        rows = self.features.read(unique, self.layers)
        return Batch(
            step=0,
            micro_step=0,
            position=0,
            sample_ids=samples,
            hidden=rows.tensor(),
            offsets=torch.from_numpy(rows.offsets),
            caption=torch.from_numpy(caption),
            latents=torch.from_numpy(self.latents.read(samples, None)),
        )

    def _draw(self, samples: np.ndarray, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """t [B*K], one in each bin, and noise [B*K, *shape]; on the CPU."""
        t, noise = [], []
        for sample in samples.tolist():
            generator = torch_generator(self.seed, Purpose.VALIDATION_NOISE, sample)
            places = torch.arange(self.num_bins) + torch.rand(self.num_bins, generator=generator)
            t.append(places / self.num_bins)
            noise.append(torch.randn(self.num_bins, *shape, generator=generator))
        return torch.cat(t), torch.cat(noise)


def open_validation(
    config: TrainConfig, features: FeatureStore, latents: LatentStore, layers: tuple[int, ...]
) -> Validation | None:
    """What the configuration measures by; None where it names nothing.

    Args:
        features, latents: that are trained on.
        layers: that the router reads.

    Raises:
        InputError: a share that leaves nothing, or a second pair of stores that cannot be read as
            the first; with every key that differs.
    """
    wanted = config.validation
    if wanted.features is not None and wanted.latents is not None:
        first = (features, latents)
        features, latents = open_features(wanted.features), open_latents(wanted.latents)
        check_joined(features, latents)
        _check_alike(first, (features, latents))
        samples = latents.ids[: wanted.num_samples]
    elif wanted.share:
        samples = held_out(wanted, latents.ids)
        if not 0 < len(samples) < len(latents.ids):
            raise InputError(
                f"validation.share {wanted.share:g} holds out {len(samples)} of "
                f"{len(latents.ids)} samples: it must leave some on either side"
            )
        samples = np.sort(samples[: wanted.num_samples])
    else:
        return None
    return Validation(features, latents, samples, list(layers), wanted.num_bins, wanted.seed)


def _check_alike(
    trained: tuple[FeatureStore, LatentStore], given: tuple[FeatureStore, LatentStore]
) -> None:
    free = {"captions", "samples", "max_length", "images", "dropped"}
    identities = (
        (given[0].manifest.identity, trained[0].manifest.identity),
        (given[1].manifest.identity, trained[1].manifest.identity),
    )
    different = [
        difference
        for own, other in identities
        for difference in differences(
            own.model_dump(mode="json", exclude=free), other.model_dump(mode="json", exclude=free)
        )
    ]
    refuse_differences(
        different,
        f"validation: {given[0].path} and {given[1].path} are of another kind than the stores "
        "that are trained on; those given, against these",
        "Make them with the same options.",
    )
