"""Images while a run trains: the same captions from the same noise, every so many steps.

Shapes: N captions, C channels, h x w latent, B batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from ...pipeline.store.features import NULL_CAPTION, Rows
from ...schemas import InputError, Mixes, Scoring
from ..diffusion.ddpm import Ddpm
from ..diffusion.flow import Flow
from ..diffusion.sampling import SamplingConfig
from ..runs.run import Run
from .metrics import log_images

if TYPE_CHECKING:
    from ..evaluation.generate import Decode, Features
    from ..runs.record import Network
    from .setup import Setup

FOLDER = "previews"
"""Folder of the images in a run directory."""
BATCH_SIZE = 16
"""Images that a rank samples at once."""


@dataclass(frozen=True)
class HeldFeatures:
    """Hidden states of some captions in memory, read as a feature store is.

    Attributes:
        layers: LLM layers that are held.
        rows: caption id -> bfloat16 bits, uint16 [T, L, H].
    """

    layers: Sequence[int]
    rows: Mapping[int, NDArray[np.uint16]]
    mixes: Mixes | None

    def read(
        self, ids: Sequence[int] | NDArray[np.int64], layers: Sequence[int] | None = None
    ) -> Rows:
        """As :meth:`semroute.pipeline.store.features.FeatureStore.read`."""
        wanted = [self.layers.index(layer) for layer in (layers or self.layers)]
        parts = [self.rows[int(number)][:, wanted] for number in ids]
        return Rows(np.concatenate(parts), np.cumsum([0, *map(len, parts)]).astype(np.int64))


def held(features: "Features", ids: Sequence[int], layers: Sequence[int]) -> "Features":
    """The features of these captions and of the null caption, read now; with what the pipeline of a
    pretrained network gives it for them, if it needs that."""
    from ..evaluation.generate import Conditioned

    every = [NULL_CAPTION, *ids]
    rows = {number: features.read([number], layers).bits for number in every}
    kept = HeldFeatures([*layers], rows, features.mixes)
    if not isinstance(features, Conditioned):
        return kept
    given = features.given(every)
    place = {number: n for n, number in enumerate(every)}

    def find(wanted: Sequence[int]) -> dict[str, Tensor]:
        index = torch.tensor([place[number] for number in wanted])
        return {name: value[index.to(value.device)] for name, value in given.items()}

    return Conditioned(kept, find)


class Forwarding:
    """A network whose ``denoise`` is the whole ``forward`` of its wrapper.

    Wrappers of several ranks, and autocast, act on ``forward`` alone. So text is encoded at every
    step.
    """

    def __init__(self, network: "Network", model: Any) -> None:
        self._network, self._model = network, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def encode_text(
        self,
        hidden: Tensor,
        offsets: Tensor,
        caption: Tensor,
        t: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, dict[str, Any]]:
        """Its own arguments, which :meth:`denoise` takes."""
        extra = {} if conditioning is None else {"conditioning": conditioning}
        return (hidden, offsets, caption), t, extra

    def denoise(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor:
        """The prediction: [B, C, h, w], [B] -> fp32 [B, C, h, w]."""
        packed, t_routing, extra = text
        prediction: Tensor = self._model(x_t, t, *packed, t_routing, **extra)
        return prediction


@dataclass(frozen=True)
class Previews:
    """Captions to generate from while a run trains, and where their images go.

    Attributes:
        folder: of the images: one grid for each time.
        features: of the captions; no LLM is kept for them.
        ids: entry of each caption in ``features``.
        texts: each caption in words.
        decode: latents -> images.
        scenes: what each image should show, if that can be scored.
        sampling, seed: of the images.
    """

    folder: Path
    features: "Features"
    ids: list[int]
    texts: list[str]
    decode: "Decode"
    scenes: Sequence[Any] | None
    sampling: SamplingConfig
    seed: int

    def draw(
        self, model: Forwarding, flow: Flow | Ddpm, accelerator: Accelerator, step: int
    ) -> float | None:
        """Generate and write the images of a step, and send them to the tracker.

        All ranks must call it; each generates a part, and the first one writes.

        Returns:
            Share of the images that show their caption, on the first rank, if they are scored.
        """
        from ..evaluation.generate import generate

        # 5 images on 2 ranks: each generates 3, and the last is left out.
        num, ranks = len(self.ids), accelerator.num_processes
        size = -(-num // ranks)
        numbers = np.minimum(np.arange(size) + size * accelerator.process_index, num - 1)
        model.eval()
        latents = generate(
            model,  # type: ignore[arg-type]
            flow,
            self.features,
            [self.ids[number] for number in numbers],
            self.sampling,
            seed=self.seed,
            batch_size=BATCH_SIZE,
            numbers=numbers.tolist(),
            progress=False,
        )
        model.train()
        every = accelerator.gather(torch.from_numpy(latents).to(accelerator.device))[:num]
        if not accelerator.is_main_process:
            return None
        return self._write(self.decode(every.cpu().numpy()), accelerator, step)

    def _write(
        self, images: NDArray[np.uint8], accelerator: Accelerator, step: int
    ) -> float | None:
        from ...pipeline.style import DPI
        from ..plots.images import sample_grid
        from ..shapes.judge import judge

        right = None
        if self.scenes is not None:
            pairs = zip(images, self.scenes, strict=True)
            right = [judge(image, scene)["all"] for image, scene in pairs]
        self.folder.mkdir(parents=True, exist_ok=True)
        grid = sample_grid(images, self.texts, right)
        grid.savefig(self.folder / f"step-{step:08d}.png", dpi=DPI)
        log_images(accelerator, images, step)
        return None if right is None else float(np.mean(right))


def open_previews(setup: "Setup", device: torch.device) -> Previews:
    """The captions and the decoder that ``config.sampling`` names; prompts are encoded now.

    Raises:
        InputError: no such store, LLM or VAE, or not those of the run.
    """
    from ...pipeline.models.vae import open_decoder
    from ..evaluation.generate import encoded_captions, stored_captions
    from ..evaluation.shapes import open_captions

    record, config = setup.record, setup.record.config.sampling
    if config.vae is not None and record.latents.vae == "pixels":
        raise InputError("sampling.vae is given, but these latents are pixels: leave it out")
    run = Run(Path(record.config.output), record, 0, "ema", setup.model)
    scenes = None
    if config.prompts is not None:
        from ...pipeline.extraction.prompts import PromptEncoder

        encoder = PromptEncoder(record.features, config.llm or record.model_source, str(device))
        captions = encoded_captions(encoder, config.prompts[: config.captions], run)
    elif config.samples is not None:
        assert config.features is not None
        scoring = Scoring(
            features=config.features, samples=config.samples, cfg_scales=[config.cfg_scale]
        )
        asked, captions = open_captions(run, scoring)
        scenes = asked.scenes[: config.captions]
    else:
        captions = stored_captions(run, config.features or record.config.features, config.captions)
    ids, layers = captions.ids[: config.captions], run.model.router.layers_read
    return Previews(
        run.path / FOLDER,
        held(captions.features, ids, layers),
        ids,
        captions.texts[: config.captions],
        open_decoder(record.latents, config.vae or record.vae_source, str(device)),
        scenes,
        SamplingConfig(config.num_steps, config.cfg_scale),
        config.seed,
    )
