"""VAEs of diffusers: images -> mean and deviation of the posterior, and latents -> images.

The output of a VAE is its codes; models are trained on latents, ``code * scale + shift``.

Shapes: n images, C channels of a latent, H x W pixels, h x w latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ...schemas import InputError, LatentIdentity, differences, refuse_differences
from ...schemas.json_file import read_json
from .hub import ModelFiles, download, hash_file, hub_name, is_hub_id
from .weights import SAFETENSORS, check_files, refuse_misread

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PixelCodec:
    """Latent = code * scale + shift; code is uint8, latent in [-1, 1]."""

    scale: float
    shift: float


def pixel_codec() -> PixelCodec:
    """The codec of pixels: 0 -> -1, 255 -> 1."""
    return PixelCodec(scale=2 / 255, shift=-1.0)


def latents_to_images(latents: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """Pixel latents float ``[n, 3, H, W]`` -> images uint8 ``[n, H, W, 3]``, clipped."""
    codes = np.rint((latents - shift) / scale).clip(0, 255).astype(np.uint8)
    return codes.transpose(0, 2, 3, 1)


CLASSES = [n for n in get_args(LatentIdentity.model_fields["vae"].annotation) if n != "pixels"]
"""Classes of diffusers whose conventions are known."""
_VIDEO = ("AutoencoderKLQwenImage", "AutoencoderKLWan")  # an image is a video of one frame
_PATCHED = ("AutoencoderKLFlux2",)
"""Classes whose pipelines fold patches of 2 x 2 latent pixels into channels, and normalise these by
the VAE's own batch statistics."""
_PATCH_FIRST = ("Ideogram4Pipeline",)
"""Pipelines that count pixels of a patch before channels of the VAE; others, channels first."""
_INDEX = "model_index.json"
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_FILES = [_CONFIG, f"{_WEIGHTS}.safetensors*", f"{_WEIGHTS}-*-of-*.safetensors"]
_PROBE = 512
"""Side of the image, without data, from which the shape of latents is read."""


def find_vae(name: str) -> ModelFiles:
    """Locate a VAE: its folder, a folder that holds it as ``vae``, or a hub id of either kind.

    Only the VAE's configuration and safetensors of a hub model are downloaded.

    Raises:
        InputError: no such VAE, or one whose conventions are not known.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        source = str(folder)
    elif is_hub_id(name):
        folder = download(name, [_INDEX, *_FILES, *(f"vae/{file}" for file in _FILES)], "--vae")
        source = hub_name(name, folder)
    else:
        raise InputError(
            f"--vae {name}: no such folder, and not a hub id (org/name); expected one, or pixels"
        )
    if not (folder / _CONFIG).exists() and (folder / "vae" / _CONFIG).exists():
        folder = folder / "vae"
    _class_name(folder, name)
    files = sorted(
        file
        for file in folder.iterdir()
        if file.name in (_CONFIG, f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.safetensors.index.json")
        or file.match(f"{_WEIGHTS}-*-of-*.safetensors")
    )
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError(f"--vae {name}: no {_WEIGHTS}.safetensors in {folder}")
    check_files(folder, [file for file in files if file.suffix == SAFETENSORS], f"--vae {name}")
    return ModelFiles(source, folder, {file.name: hash_file(file) for file in files})


class Autoencoder:
    """A VAE by its configuration; the weights are loaded when first needed.

    Args:
        source: from :func:`find_vae`.
        device: to run on, in float32: the VAE of SDXL overflows float16.

    Raises:
        InputError: diffusers is not installed, or too old.
    """

    def __init__(self, source: ModelFiles, device: str = "cpu") -> None:
        self.source = source
        self.device = device
        self.name = _class_name(source.folder, source.name)
        try:
            import diffusers
        except ImportError as error:
            raise InputError(
                f"--vae {source.name}: {self.name} is a class of diffusers, which is not "
                "installed: pip install 'semroute[vae]'"
            ) from error
        try:
            self._class: Any = getattr(diffusers, self.name)
        except AttributeError as error:
            raise InputError(
                f"--vae {source.name}: diffusers {diffusers.__version__} has no {self.name}; "
                "expected a later version"
            ) from error
        self.config: dict[str, Any] = self._class.load_config(source.folder)

    @cached_property
    def model(self) -> Any:
        """The network, in evaluation mode.

        Raises:
            InputError: weights are missing in its files, or are there and not used.
        """
        from diffusers.utils import logging

        logging.disable_progress_bar()
        try:
            model, loaded = self._class.from_pretrained(
                self.source.folder, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--vae {self.source.name}: diffusers cannot load it: {error}"
            ) from error
        refuse_misread(f"--vae {self.source.name}", model, loaded)
        return model.float().eval().requires_grad_(False).to(self.device)

    @cached_property
    def _patch_first(self) -> bool:
        """Whether its pipeline counts pixels of a patch before channels; True needs a pipeline."""
        index = self.source.folder.parent / _INDEX
        return index.exists() and read_json(index, follow=True).get("_class_name") in _PATCH_FIRST

    @cached_property
    def _probe(self) -> tuple[int, int, bool]:
        """Channels, image pixels per latent pixel, and True if there is a posterior; no weights."""
        import torch

        with torch.device("meta"), torch.inference_mode():
            model = self._class.from_config(self.config).eval()
            codes, deviation = self._encode(model, torch.zeros(1, 3, _PROBE, _PROBE))
        return codes.shape[1], _PROBE // codes.shape[-1], deviation is not None

    @property
    def has_deviation(self) -> bool:
        """True if the VAE gives a distribution and not only a latent."""
        return self._probe[2]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the latent of an image of so many pixels: C, h, w.

        Raises:
            InputError: the image is not a whole number of latent pixels.
        """
        channels, factor, _ = self._probe
        if height % factor or width % factor:
            raise InputError(
                f"--vae {self.source.name} makes one latent pixel of {factor} x {factor} pixels, "
                f"and images are {height} x {width}; expected multiples of {factor}. Name a size "
                "with --size."
            )
        return channels, height // factor, width // factor

    @cached_property
    def scale(self) -> list[float]:
        """Scale by channel, in latent = code * scale + shift.

        ``(code - mean) / std * scaling_factor``, where mean is ``latents_mean`` or, for all
        channels, ``shift_factor``, as in the pipelines of diffusers; where a configuration lacks
        them, mean is 0, std 1 and scaling_factor 1. For the VAE of FLUX.2, mean and std are the
        statistics of its ``bn``.
        """
        if self.name in _PATCHED:
            variance = self.model.bn.running_var + self.config["batch_norm_eps"]
            return [1.0 / std for std in variance.double().sqrt().tolist()]
        factor = self.config.get("scaling_factor")
        factor = 1.0 if factor is None else float(factor)
        return [factor / std for std in self._by_channel("latents_std", 1.0)]

    @cached_property
    def shift(self) -> list[float]:
        """Shift by channel, see :attr:`scale`."""
        if self.name in _PATCHED:
            means = self.model.bn.running_mean.double().tolist()
            return [0.0 - mean * scale for mean, scale in zip(means, self.scale, strict=True)]
        means = self._by_channel("latents_mean", self.config.get("shift_factor") or 0.0)
        return [0.0 - mean * scale for mean, scale in zip(means, self.scale, strict=True)]

    def _by_channel(self, key: str, default: float) -> list[float]:
        values = self.config.get(key)
        return [default] * self._probe[0] if values is None else [*map(float, values)]

    def encode(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and deviation of the posterior; for a VAE without one, its latent and None.

        Args:
            images: RGB uint8 ``[n, 3, H, W]``.

        Returns:
            Codes, float32 ``[n, C, h, w]`` each.
        """
        import torch

        codec = pixel_codec()
        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(self.device) * codec.scale + codec.shift
            mean, deviation = self._encode(self.model, pixels)
            return mean.cpu().numpy(), None if deviation is None else deviation.cpu().numpy()

    def _encode(
        self, model: Any, pixels: "torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        output = model.encode(pixels.unsqueeze(2) if self.name in _VIDEO else pixels)
        if "latent_dist" not in output:
            return output["latents" if "latents" in output else "latent"], None
        mean, deviation = output.latent_dist.mean, output.latent_dist.std
        if self.name in _VIDEO:
            mean, deviation = mean.squeeze(2), deviation.squeeze(2)
        if self.name in _PATCHED:
            mean, deviation = (_fold(each, self._patch_first) for each in (mean, deviation))
        return mean, deviation

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, RGB uint8 ``[n, H, W, 3]``, from latents float32 ``[n, C, h, w]``.

        One at a time, so that an image does not depend on others.
        """
        import torch

        scale, shift = (
            torch.tensor(value, device=self.device).reshape(-1, 1, 1)
            for value in (self.scale, self.shift)
        )
        codec, images = pixel_codec(), []
        with torch.inference_mode():
            for latent in latents:
                code = (torch.from_numpy(latent).to(self.device) - shift) / scale
                code = code[None, :, None] if self.name in _VIDEO else code[None]
                code = _unfold(code, self._patch_first) if self.name in _PATCHED else code
                image = self.model.decode(code).sample.reshape(3, *self._image_size(latent.shape))
                images.append(image.cpu().numpy())
        return latents_to_images(np.stack(images), codec.scale, codec.shift)

    def _image_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        factor = self._probe[1]
        return shape[1] * factor, shape[2] * factor


def _fold(latents: "torch.Tensor", patch_first: bool) -> "torch.Tensor":
    """Patches of 2 x 2 as channels: ``[n, C, h, w]`` -> ``[n, 4 C, h / 2, w / 2]``."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [n, C, h/2, 2, w/2, 2]
    order = (0, 3, 5, 1, 2, 4) if patch_first else (0, 1, 3, 5, 2, 4)
    return patches.permute(order).flatten(1, 3)


def _unfold(latents: "torch.Tensor", patch_first: bool) -> "torch.Tensor":
    """The inverse of :func:`_fold`."""
    patches = latents.unflatten(1, (2, 2, -1) if patch_first else (-1, 2, 2))
    order = (0, 3, 4, 1, 5, 2) if patch_first else (0, 1, 4, 2, 5, 3)
    return patches.permute(order).flatten(4, 5).flatten(2, 3)  # of [n, C, h/2, 2, w/2, 2]


def open_decoder(
    identity: LatentIdentity, vae: str, device: str = "cpu"
) -> Callable[[np.ndarray], np.ndarray]:
    """Open a decoder: latents float32 ``[n, C, h, w]`` -> images uint8 ``[n, H, W, 3]``.

    Args:
        identity: of the latent store that a model was trained on.
        vae: its VAE, see :func:`find_vae`; not needed where latents are pixels.

    Raises:
        InputError: no such VAE, or not the one of the identity.
    """
    if identity.vae == "pixels":
        codec = pixel_codec()
        return lambda latents: latents_to_images(latents, codec.scale, codec.shift)
    source = find_vae(vae)
    refuse_differences(
        differences(source.files, identity.files, "files"),
        f"--vae {vae} is not the VAE of these latents",
        "Name that VAE.",
    )
    return Autoencoder(source, device).decode


def _class_name(folder: Path, name: str) -> str:
    """The class of diffusers that a VAE's configuration names."""
    try:
        config = read_json(folder / _CONFIG, follow=True)
    except FileNotFoundError as error:
        raise InputError(f"--vae {name}: no {_CONFIG} in this folder, nor in vae/") from error
    except ValueError as error:
        raise InputError(f"--vae {name}: {folder / _CONFIG} is not JSON: {error}") from error
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if class_name not in CLASSES:
        raise InputError(
            f"--vae {name}: {_CONFIG} names the class {class_name!r}; expected one of "
            f"{', '.join(CLASSES)}"
        )
    return str(class_name)
