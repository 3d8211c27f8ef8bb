"""A run as a diffusers pipeline: text in, images out.

``semroute.SemanticRoutingPipeline.from_pretrained(folder)`` loads a folder that
:func:`export_pipeline` wrote; the folder holds no code. It holds the network and names the LLM and
the VAE, which are looked up where they were, or where the caller says.

Shapes: N images, C channels, h x w latent.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from ...pipeline.extraction.prompts import PromptEncoder
from ...pipeline.models.vae import open_decoder
from ...schemas import InputError, RunRecord, write_document
from ...schemas.atomic import whole_folder
from ...schemas.escaping import code, in_markdown
from ...schemas.tensor_files import make_readable, system_errors
from ..diffusion.flow import Flow
from ..diffusion.sampling import SamplingConfig, SamplingDtype
from ..runs.record import build_model
from .generate import CaptionSet, encoded_captions, generate

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
except ModuleNotFoundError as error:
    raise InputError(f"pipelines need diffusers ({error}): pip install 'semroute[vae]'") from error

if TYPE_CHECKING:
    from ..runs.run import Run

StepCallback = Callable[
    ["SemanticRoutingPipeline", int, float, Mapping[str, torch.Tensor]],
    Mapping[str, torch.Tensor] | None,
]
"""Called after a step, as ``callback_on_step_end`` of pipelines of diffusers."""
_ADDRESSES = ("semroute", "semroute.trainer.diffusion")
"""Modules of :class:`SemanticRoutingTransformer` in exported folders; 0.1.0 wrote the latter."""
_IN_FP32 = frozenset(
    ("router", "context_norm", "self_norm", "mlp_norm", "q_norm", "k_norm", "norm_out", "rotary")
)
"""Modules that compute in float32."""
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
    # As in training, whatever the dtype of the rest.
    _keep_in_fp32_modules: Any = sorted(_IN_FP32)

    @register_to_config
    def __init__(self, record: dict[str, Any], step: int = 0, weights: str = "ema") -> None:
        super().__init__()
        self.dit = build_model(RunRecord.model_validate(record))

    def forward(self, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
        """See :meth:`semroute.trainer.model.dit.DiT.forward`, or ``encode_text`` or ``denoise``,
        which the method may be: what offloads a module acts on calls of it alone."""
        return getattr(self.dit, method)(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights of linear layers; norms and routing are in float32."""
        return self.dit.get_parameter("patch_in.weight").dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Move or cast, as ``torch.nn.Module.to``; norms and routing stay in float32."""
        tensors = (*self.named_parameters(), *self.named_buffers())
        kept = {
            name: each.detach()
            for name, each in tensors
            if not _IN_FP32.isdisjoint(name.split("."))
        }
        super().to(*args, **kwargs)
        for name, each in (*self.named_parameters(), *self.named_buffers()):
            if name in kept and each.dtype != kept[name].dtype:
                each.data = kept[name].to(each.device)
        return self


class _Called:
    """A network whose every use is a call of its module, on which hooks act."""

    def __init__(self, transformer: SemanticRoutingTransformer) -> None:
        self._transformer = transformer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer.dit, name)

    def encode_text(self, *args: Any) -> Any:
        return self._transformer(*args, method="encode_text")

    def denoise(self, *args: Any) -> Any:
        return self._transformer(*args, method="denoise")


class SemanticRoutingPipeline(DiffusionPipeline):
    """Images of prompts, the same as those of ``semroute sample``.

    ``torch_dtype``, ``to`` and offloading work as with pipelines of diffusers; in bfloat16 weights
    of linear layers are rounded, and products are computed as in training.

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
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        method: Literal["euler", "heun"] = "euler",
        num_images_per_prompt: int = 1,
        seed: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = 64,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generate images.

        Args:
            prompt: one prompt, or several.
            negative_prompt: what to guide away from, one for all prompts or one each; by default
                the null caption.
            num_inference_steps: steps of the schedule.
            guidance_scale: guidance scale; 1 is no guidance.
            guidance_interval: lowest and highest t that are guided.
            method: see :class:`semroute.trainer.diffusion.sampling.SamplingConfig`.
            num_images_per_prompt: images per prompt, from different noise; those of a prompt follow
                each other.
            seed: the noise of image i is a function of (seed, i).
            generator: draws the noise instead, as in pipelines of diffusers; or one per image.
            latents: the noise itself, [N, C, h, w].
            batch_size: images sampled at once.
            output_type: ``pil``: Pillow images; ``np``: float32 [N, height, width, 3] from 0 to 1;
                ``pt``: the same as a tensor [N, 3, height, width]; ``latent``: latents, float32
                [N, C, h, w].
            return_dict: return an ``ImagePipelineOutput``; otherwise a tuple of one element.
            callback_on_step_end: called after each step of each batch with the pipeline, the index
                of the step, its t (from 1 to 0) and ``{"latents": ...}``; returns a mapping, whose
                ``latents`` are gone on with.
            callback_on_step_end_tensor_inputs: names in that mapping: only ``latents``.

        Raises:
            InputError: the LLM or VAE was not found, or is not the run's; or arguments that do not
                fit each other.
        """
        record, device = self.record, self._execution_device
        if {*callback_on_step_end_tensor_inputs} - {"latents"}:
            raise InputError(
                f"callback_on_step_end_tensor_inputs is {[*callback_on_step_end_tensor_inputs]}, "
                "expected ['latents']"
            )
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = self._negatives(negative_prompt, len(texts))
        captions = self._encode([*texts, *negatives], device)
        ids = [each for each in captions.ids for _ in range(num_images_per_prompt)]
        num, flow = len(texts) * num_images_per_prompt, Flow.from_config(record.config.flow)
        shape = self.transformer.dit.latent_shape
        levels = flow.at(shape).schedule(num_inference_steps).tolist()

        def step_end(step: int, _t: float, x: torch.Tensor) -> torch.Tensor | None:
            assert callback_on_step_end is not None
            given = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
            back = callback_on_step_end(self, step - 1, levels[step - 1], given)
            return None if back is None else back.get("latents")

        generated = generate(
            _Called(self.transformer),  # type: ignore[arg-type]
            flow,
            captions.features,
            ids[:num],
            SamplingConfig(
                num_inference_steps,
                guidance_scale,
                guidance_interval,
                method,
                dtype=self._products(),
            ),
            seed=seed,
            batch_size=batch_size,
            progress=not getattr(self, "_progress_bar_config", {}).get("disable", False),
            callback=None if callback_on_step_end is None else step_end,
            negative_ids=ids[num:] or None,
            noise=self._noise(generator, latents, (num, *shape)),
            device=device,
        )
        images = self._images(generated, output_type, str(device))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _negatives(self, given: str | Sequence[str] | None, num: int) -> list[str]:
        """One negative prompt per prompt; none if none is given."""
        if given is None:
            return []
        negatives = [given] * num if isinstance(given, str) else list(given)
        if len(negatives) != num:
            raise InputError(
                f"found {len(negatives)} negative prompts for {num} prompts: give one, or one each"
            )
        return negatives

    def _encode(self, texts: list[str], device: torch.device) -> CaptionSet:
        """Prompts, which the LLM encodes when they are read."""
        if self._prompts is None:
            source = self.config.llm or self.record.model_source
            self._prompts = PromptEncoder(self.record.features, source, str(device))
        return encoded_captions(self._prompts, texts)

    def _products(self) -> SamplingDtype:
        """Precision of matrix products."""
        dtype = self.transformer.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(
                f"the network is in {dtype}, whose range hidden states of LLMs exceed: use "
                "torch.bfloat16 or torch.float32"
            )
        return "bfloat16" if dtype == torch.bfloat16 else "float32"

    def _noise(
        self,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        shape: tuple[int, ...],
    ) -> torch.Tensor | None:
        """The noise that a caller gives or has drawn, fp32; None: that of the seed."""
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise InputError(f"latents are of shape {tuple(latents.shape)}, expected {shape}")
            return latents.float()
        if generator is None:
            return None
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise InputError(f"found {len(generator)} generators for {shape[0]} images")
        return randn_tensor(shape, generator, self._execution_device, torch.float32)

    def _images(self, latents: np.ndarray, output_type: str, device: str) -> Any:
        """Latents as images of a type."""
        if output_type == "latent":
            return torch.from_numpy(latents)
        if self._decode is None:
            vae = self.config.vae or self.record.vae_source
            self._decode = open_decoder(self.record.latents, vae, device)
        pixels = self._decode(latents)
        if output_type == "pil":
            return [Image.fromarray(each) for each in pixels]
        values = pixels.astype(np.float32) / 255
        return torch.from_numpy(values).permute(0, 3, 1, 2) if output_type == "pt" else values


def export_pipeline(run: "Run", out: str | os.PathLike[str]) -> Path:
    """Write a run as a folder that :class:`.SemanticRoutingPipeline` loads.

    Raises:
        InputError: the folder exists and is not empty.
    """
    folder, record = Path(out), run.record
    transformer = SemanticRoutingTransformer(
        record=record.model_dump(mode="json"), step=run.step, weights=run.source
    )
    transformer.dit.load_state_dict(run.model.state_dict())
    pipeline = SemanticRoutingPipeline(transformer)
    vae = ""
    if record.latents.vae != "pixels":
        vae = f" Its VAE, {code(record.vae_source)}, is not in it either; pass `vae=` likewise."
    card = CARD.format(
        title=in_markdown(folder.resolve().name),
        strategy=record.config.routing.strategy,
        step=run.step,
        layers=len(run.model.router.layers_read),
        llm=code(record.model_source),
        vae=vae,
    )
    with whole_folder(folder) as unfinished:
        with system_errors(folder):
            pipeline.save_pretrained(unfinished)
        make_readable(unfinished)
        write_document(unfinished / "README.md", card)
    return folder
