"""A run as a pipeline of diffusers: text in, pictures out.

A folder that :func:`export_pipeline` wrote is loaded by
``semroute.SemanticRoutingPipeline.from_pretrained(folder)``; no code comes with it. The network is
in it, the LLM and the VAE are named: they are looked for where they were, or where the caller says.

Shapes: N pictures, C channels, h x w latent.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ...pipeline.extraction.prompts import PromptEncoder
from ...pipeline.models.vae import open_decoder
from ...schemas import InputError, RunRecord, write_document
from ..diffusion.flow import Flow
from ..diffusion.sampling import SamplingConfig
from ..runs.record import build_model
from ..runs.run import Run
from .generate import generate

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
except ModuleNotFoundError as error:
    raise InputError(f"pipelines need diffusers ({error}): pip install 'semroute[vae]'") from error

_ADDRESSES = ("semroute", "semroute.trainer.diffusion")
"""Of :class:`SemanticRoutingTransformer` in exported folders; 0.1.0 wrote the latter."""
CARD = """# {title}

A diffusion transformer with Semantic Routing ({strategy}), from step {step:,} of a run of semroute.

```python
import semroute

pipeline = semroute.SemanticRoutingPipeline.from_pretrained("path/of/this/folder")
pipeline("two red circles", guidance_scale=3.0, seed=0).images[0].save("picture.png")
```

It reads {layers} layers of {llm}, which is not in this folder: `from_pretrained(..., llm="path")`
where it is elsewhere by now.{vae}
"""


class SemanticRoutingTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The network of a run; ``dit`` is :class:`semroute.trainer.model.dit.DiT`.

    Args:
        record: the run's ``run.json``.
        step, weights: which checkpoint, and ``ema`` or ``model``.
    """

    __module__ = "semroute"  # the address that exported folders hold, wherever this file moves

    @register_to_config
    def __init__(self, record: dict[str, Any], step: int = 0, weights: str = "ema") -> None:
        super().__init__()
        self.dit = build_model(RunRecord.model_validate(record))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As :meth:`semroute.trainer.model.dit.DiT.forward`."""
        return self.dit(*args, **kwargs)


class SemanticRoutingPipeline(DiffusionPipeline):
    """Pictures of prompts, the same as those of ``semroute sample``.

    Args:
        transformer: a :class:`SemanticRoutingTransformer`.
        llm: where the LLM is, as ``--model`` of ``semroute sample``. Default: where it was when the
            features were extracted. It is loaded at the first call, and must be the same files.
        vae: where the VAE is, likewise. Not needed where latents are pixels.
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
        """The content of ``model_index.json``, with the address of the network replaced by this
        module, where diffusers finds its base classes, too."""
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
        """Draw prompts.

        Args:
            prompt: one, or several.
            num_inference_steps: of the schedule.
            guidance_scale: 1 is none.
            guidance_interval: lowest and highest t that are guided.
            method: of the solver, see :class:`semroute.trainer.diffusion.sampling.SamplingConfig`.
            num_images_per_prompt: from different noise; those of a prompt follow each other.
            seed: the noise of picture i is a function of (seed, i).
            batch_size: pictures sampled at once.
            output_type: images of Pillow, float32 [N, height, width, 3] from 0 to 1, or latents
                float32 [N, C, h, w].
            return_dict: an ``ImagePipelineOutput``, or a tuple of one.

        Raises:
            InputError: no LLM or VAE where they are looked for, or others than the run's.
        """
        record = self.record
        device = str(self.transformer.device)
        if self._prompts is None:
            source = self.config.llm or record.model_source
            self._prompts = PromptEncoder(record.features, source, device)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = [number + 1 for number in range(len(texts)) for _ in range(num_images_per_prompt)]
        latents = generate(
            self.transformer.dit,
            Flow.from_config(record.config.flow),
            self._prompts(texts),
            ids,
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


def export_pipeline(run: Run, out: str | os.PathLike[str]) -> Path:
    """Write a run as a folder that :class:`SemanticRoutingPipeline` loads.

    Raises:
        InputError: the folder is there and not empty.
    """
    folder, record = Path(out), run.record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not empty: name a new folder")
    transformer = SemanticRoutingTransformer(
        record=record.model_dump(mode="json"), step=run.step, weights=run.source
    )
    transformer.dit.load_state_dict(run.model.state_dict())
    pipeline = SemanticRoutingPipeline(transformer)
    pipeline.save_pretrained(folder)
    vae = record.latents.vae
    said = "" if vae == "pixels" else f" So with its VAE, {record.vae_source}, and `vae=`."
    card = CARD.format(
        title=folder.name,
        strategy=record.config.routing.strategy,
        step=run.step,
        layers=len(run.model.router.layers_read),
        llm=record.model_source,
        vae=said,
    )
    write_document(folder / "README.md", card)
    return folder
