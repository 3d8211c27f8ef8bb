"""A run as a diffusers pipeline: text in, images out.

``semroute.SemanticRoutingPipeline.from_pretrained(folder)`` loads a folder that
:func:`export_pipeline` wrote; the folder holds no code. It holds the network and names the LLM and
the VAE, which are looked up where they were, or where the caller says.

Shapes: N images, C channels, h x w latent.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from ...pipeline.extraction.prompts import PromptEncoder
from ...pipeline.models.vae import open_decoder
from ...schemas import InputError, RunRecord, write_document
from ...schemas.escaping import code, in_markdown
from ...schemas.tensor_files import make_readable
from ..diffusion.flow import Flow
from ..diffusion.sampling import SamplingConfig
from ..runs.record import build_model
from .generate import encoded_captions, generate

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
except ModuleNotFoundError as error:
    raise InputError(f"pipelines need diffusers ({error}): pip install 'semroute[vae]'") from error

if TYPE_CHECKING:
    from ..runs.run import Run

_ADDRESSES = ("semroute", "semroute.trainer.diffusion")
"""Modules of :class:`SemanticRoutingTransformer` in exported folders; 0.1.0 wrote the latter."""
CARD = """# {title}

A diffusion transformer with Semantic Routing ({strategy}), from step {step:,} of a run of semroute.

```python
import semroute

pipeline = semroute.SemanticRoutingPipeline.from_pretrained("path/of/this/folder")
pipeline("two red circles", guidance_scale=3.0, seed=0).images[0].save("image.png")
```

It reads {layers} layers of {llm}, which is not in this folder; if it has moved, pass
`from_pretrained(..., llm="path")`.{vae}
"""


class SemanticRoutingTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The network of a run; ``dit`` is a :class:`semroute.trainer.model.dit.DiT`.

    Args:
        record: the run's ``run.json``.
        step: steps done at the checkpoint.
        weights: ``ema`` or ``model``.
    """

    __module__ = "semroute"  # the address that exported folders hold, wherever this file moves

    @register_to_config
    def __init__(self, record: dict[str, Any], step: int = 0, weights: str = "ema") -> None:
        super().__init__()
        self.dit = build_model(RunRecord.model_validate(record))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See :meth:`semroute.trainer.model.dit.DiT.forward`."""
        return self.dit(*args, **kwargs)


class SemanticRoutingPipeline(DiffusionPipeline):
    """Images of prompts, the same as those of ``semroute sample``.

    Args:
        transformer: a :class:`SemanticRoutingTransformer`.
        llm: where the LLM is, as ``--model`` of ``semroute sample``. By default, where it was when
            the features were extracted. It is loaded at the first call; its files must be the same.
        vae: where the VAE is, likewise. Not needed if latents are pixels.
    """

    model_cpu_offload_seq: Any = "transformer"
    config: Any

    def __init__(
        self,
        transformer: SemanticRoutingTransformer,
        llm: str | None = None,
        vae: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.register_to_config(llm=llm, vae=vae)
        self._prompts: PromptEncoder | None = None
        self._decode: Callable[[np.ndarray], np.ndarray] | None = None

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The content of ``model_index.json``, with the network's module replaced by this one, in
        which diffusers also finds its base classes."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        library, name = config.get("transformer") or (None, None)
        if library in _ADDRESSES:
            config["transformer"] = [__name__, name]
        return loaded

    @property
    def record(self) -> RunRecord:
        """The run's ``run.json``."""
        return RunRecord.model_validate(self.transformer.config.record)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        method: Literal["euler", "heun"] = "euler",
        num_images_per_prompt: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        output_type: Literal["pil", "np", "latent"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate images.

        Args:
            prompt: one prompt, or several.
            num_inference_steps: steps of the schedule.
            guidance_scale: guidance scale; 1 is no guidance.
            guidance_interval: lowest and highest t that are guided.
            method: see :class:`semroute.trainer.diffusion.sampling.SamplingConfig`.
            num_images_per_prompt: images per prompt, from different noise; those of a prompt follow
                each other.
            seed: the noise of image i is a function of (seed, i).
            batch_size: images sampled at once.
            output_type: ``pil``: Pillow images; ``np``: float32 [N, height, width, 3] from 0 to 1;
                ``latent``: latents, float32 [N, C, h, w].
            return_dict: return an ``ImagePipelineOutput``; otherwise a tuple of one element.

        Raises:
            InputError: the LLM or VAE was not found, or is not the run's.
        """
        record = self.record
        device = str(self.transformer.device)
        if self._prompts is None:
            source = self.config.llm or record.model_source
            self._prompts = PromptEncoder(record.features, source, device)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        captions = encoded_captions(self._prompts, texts)
        latents = generate(
            self.transformer.dit,
            Flow.from_config(record.config.flow),
            captions.features,
            [caption_id for caption_id in captions.ids for _ in range(num_images_per_prompt)],
            SamplingConfig(num_inference_steps, guidance_scale, guidance_interval, method),
            seed=seed,
            batch_size=batch_size,
            progress=not getattr(self, "_progress_bar_config", {}).get("disable", False),
        )
        images: Any = torch.from_numpy(latents)
        if output_type != "latent":
            if self._decode is None:
                vae = self.config.vae or record.vae_source
                self._decode = open_decoder(record.latents, vae, device)
            pixels = self._decode(latents)
            images = [Image.fromarray(each) for each in pixels]
            if output_type == "np":
                images = pixels.astype(np.float32) / 255
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def export_pipeline(run: "Run", out: str | os.PathLike[str]) -> Path:
    """Write a run as a folder that :class:`.SemanticRoutingPipeline` loads.

    Raises:
        InputError: the folder exists and is not empty.
    """
    folder, record = Path(out), run.record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: name a new folder")
    transformer = SemanticRoutingTransformer(
        record=record.model_dump(mode="json"), step=run.step, weights=run.source
    )
    transformer.dit.load_state_dict(run.model.state_dict())
    pipeline = SemanticRoutingPipeline(transformer)
    pipeline.save_pretrained(folder)
    make_readable(folder)
    vae = ""
    if record.latents.vae != "pixels":
        vae = f" Its VAE, {code(record.vae_source)}, is not in it either; pass `vae=` likewise."
    card = CARD.format(
        title=in_markdown(folder.name),
        strategy=record.config.routing.strategy,
        step=run.step,
        layers=len(run.model.router.layers_read),
        llm=code(record.model_source),
        vae=vae,
    )
    write_document(folder / "README.md", card)
    return folder
