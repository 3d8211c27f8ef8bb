"""The loss on held-out samples, by noise level, under noise that never changes.

The samples, their t and their noise are functions of ``validation.seed`` alone, so runs of any
strategy, seed or number of ranks are measured by the same numbers.

Shapes: N samples, B samples at once, K bins of t, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...pipeline.store.order.dataset import check_joined, open_joined, validation_samples
from ...schemas import NULL, TrainConfig, differences, refuse_differences
from ...schemas.seeds import Purpose, torch_generator
from ..data.batch import Batch
from ..diffusion.ddpm import Ddpm
from ..diffusion.flow import Flow

if TYPE_CHECKING:
    from ...pipeline.store.conditioning import ConditioningStore
    from ...pipeline.store.features import FeatureStore
    from ...pipeline.store.latents import LatentStore
    from ..model.router import Router

NUM_IMAGES = 64
"""Images in a batch. Not the run's batch size: rounding must not depend on ranks."""


@dataclass(frozen=True, eq=False)
class Validation:
    """Held-out samples, and the noise that a run is measured with.

    Attributes:
        samples: ids in the stores, int64 [N], ascending. Each is used with the first of its
            captions and, if latents have a posterior, its mean.
        layers: LLM layers to read.
        num_bins: K; each sample is used once in each bin, at a t that never changes.
        seed: determines t and noise, together with the sample's id.
        conditioning: what the pipeline of a pretrained network gives it for the captions.
        marks_null: say which captions are the null caption.
    """

    features: "FeatureStore"
    latents: "LatentStore"
    samples: np.ndarray
    layers: list[int]
    num_bins: int
    seed: int
    conditioning: "ConditioningStore | None" = None
    marks_null: bool = False

    @torch.no_grad()
    def measure(
        self,
        model: Any,
        flow: Flow | Ddpm,
        accelerator: Any,
        wait: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """Mean loss of each bin of t, from 0 to 1.

        All ranks must call it. Each computes a part, and all get the same numbers, which do not
        depend on the number of ranks.

        Args:
            model: called as :meth:`DiT.forward`; may be wrapped by Accelerate.
            accelerator: an ``accelerate.Accelerator``.
            wait: waits until all ranks have called it.
        """
        parts = self._parts(max(1, NUM_IMAGES // self.num_bins))
        losses = torch.zeros(len(self.samples), self.num_bins, device=accelerator.device)
        num_ranks = accelerator.num_processes
        for turn in range(0, len(parts), num_ranks):
            # Wrappers of the model communicate between ranks, so each rank must compute something:
            #
            #   3 ranks, 5 parts      rank 0   rank 1   rank 2
            #     turn 0              part 0   part 1   part 2
            #     turn 3              part 3   part 4   part 4, not recorded
            number = turn + accelerator.process_index
            part = parts[min(number, len(parts) - 1)]
            computed = self._losses(model, flow, self.samples[part], accelerator)
            if number < len(parts):
                losses[torch.from_numpy(part).to(losses.device)] = computed
        wait()
        # Each loss is zero on all ranks but one, so the sum is exact.
        return accelerator.reduce(losses, "sum").double().mean(0).tolist()

    def _parts(self, size: int) -> list[np.ndarray]:
        """Indices into :attr:`samples`: parts of at most ``size`` latents of one shape."""
        buckets = self.latents.buckets[self.samples]
        groups = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        return [g[first : first + size] for g in groups for first in range(0, len(g), size)]

    def _losses(
        self, model: Any, flow: Flow | Ddpm, samples: np.ndarray, accelerator: Any
    ) -> Tensor:
        """[B, K]."""
        batch = self._read(samples).to(accelerator.device)
        t, noise = self._draw(samples, tuple(batch.latents.shape[1:]))
        t, noise = t.to(accelerator.device), noise.to(accelerator.device)
        x0 = batch.latents.repeat_interleave(self.num_bins, dim=0)  # [B*K, C, h, w]
        caption = batch.caption.repeat_interleave(self.num_bins)  # [B*K]
        x_t = flow.interpolate(x0, noise, t)  # [B*K, C, h, w]
        extra = {} if batch.conditioning is None else {"conditioning": batch.conditioning}
        prediction = model(x_t, t, batch.hidden, batch.offsets, caption, **extra)  # [B*K, C, h, w]
        return flow.loss(prediction, x0, noise, t).reshape(-1, self.num_bins)

    def _read(self, samples: np.ndarray) -> Batch:
        firsts = self.features.first_captions[samples]
        unique, caption = np.unique(firsts, return_inverse=True)
        rows = self.features.read(unique, self.layers)
        given = None if self.conditioning is None else self.conditioning.tensors(unique)
        if self.marks_null:
            from ...pipeline.store.features import NULL_CAPTION

            given = {NULL: torch.from_numpy(unique == NULL_CAPTION)}
        return Batch(
            step=0,
            micro_step=0,
            position=0,
            sample_ids=samples,
            hidden=rows.tensor(),
            offsets=torch.from_numpy(rows.offsets),
            caption=torch.from_numpy(caption),
            latents=torch.from_numpy(self.latents.read(samples, None)),
            conditioning=given,
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
    config: TrainConfig, features: "FeatureStore", latents: "LatentStore", router: "Router"
) -> Validation | None:
    """The validation that is configured, if any.

    Args:
        features, latents: stores to train on.
        router: whose layers are read.

    Raises:
        InputError: the share leaves no samples on one side, or a second pair of stores differs in
            kind from the first; with every key that differs.
    """
    wanted = config.validation
    given = config.data.conditioning
    if wanted.features is not None and wanted.latents is not None:
        from ...pipeline.store.open import open_features, open_latents

        first = (features, latents)
        features = open_features(wanted.features, all_columns=False)
        latents = open_latents(wanted.latents, all_columns=False)
        given = wanted.conditioning
        check_joined(features, latents)
        _check_alike(first, (features, latents))
        samples = latents.ids[: wanted.num_samples]
    elif wanted.share:
        samples = validation_samples(wanted, latents.ids)
    else:
        return None
    return Validation(
        features,
        latents,
        samples,
        list(router.layers_read),
        wanted.num_bins,
        wanted.seed,
        open_joined(given, features),
        router.needs_positions,
    )


def _check_alike(
    trained: "tuple[FeatureStore, LatentStore]", given: "tuple[FeatureStore, LatentStore]"
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
        f"validation: {given[0].path} and {given[1].path} are of another kind than the stores to "
        "train on; those given, against these",
        "Make them with the same options.",
    )
