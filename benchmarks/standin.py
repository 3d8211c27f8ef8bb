"""A small Sana, pretrained on shapes: a stranger's model for studies of adapters to adapt.

    python benchmarks/standin.py pretrain FEATURES LATENTS OUT [--steps 2500] [--seed 0]
    python benchmarks/standin.py evaluate OUT FEATURES SAMPLES [--cfg-scale 3]

No weights of a real diffusion transformer can be had offline. ``pretrain`` trains diffusers'
``SanaTransformer2DModel`` from random weights as Sana was trained: rectified flow, the velocity as
target, logit-normal t with the scheduler's shift, 10 % of captions replaced by the null caption,
and a moving average of the weights. It reads the last layer of the LLM, as published pipelines do,
and pixels. OUT becomes a pipeline folder of diffusers, without text encoder and VAE; checkpoints
and losses are in the folder OUT-training beside it. Rerun the same command to resume.

``evaluate`` samples an image for every caption of ``test.parquet`` and scores it with the judge of
the shapes dataset, from the same noise as ``semroute evaluate``.
"""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from semroute.pipeline.models.vae import latents_to_images, pixel_codec
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.open import open_features, open_latents
from semroute.schemas import DataConfig
from semroute.trainer.data.loader import PackedLoader
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise import NoiseSource
from semroute.trainer.diffusion.sampling import SamplingConfig
from semroute.trainer.evaluation.generate import generate
from semroute.trainer.evaluation.shapes import read_captions, score
from semroute.trainer.runs.checkpoint import (
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)

SHIFT = 3.0
"""Shift of t, in training and in the scheduler, as in Sana's published pipelines."""
NUM_TRAIN_TIMESTEPS = 1000
"""The network is told t times this."""
WARMUP = 200
LOG_EVERY = 50
CHECKPOINT_EVERY = 500

README = """\
A Sana of {millions:.1f} M parameters, pretrained from random weights for {steps:,} steps on
{samples:,} images of shapes: pixels from -1 to 1, which it generates without a VAE. It stands in
for a published model; benchmarks/standin.py of semroute made it.

- LLM: {llm}
- text: the last layer, {layer}, after the final norm, of {text}
- negative prompt: the empty caption, as semroute stores it

SanaPipeline cannot load that LLM from here, and there is no VAE: tokenizer, text_encoder and vae in
model_index.json are [null, null]. So pass None for each:

    SanaPipeline.from_pretrained(FOLDER, tokenizer=None, text_encoder=None, vae=None)
"""


class Sana(nn.Module):
    """The transformer with the interface that sampling expects of a network."""

    def __init__(self, transformer: nn.Module, layer: int) -> None:
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.router = SimpleNamespace(depends_on_t=False, layers_read=[layer])

    def reading(self, mixes: object) -> contextlib.AbstractContextManager[None]:
        """Nothing to change: the store holds layers."""
        assert mixes is None
        return contextlib.nullcontext()

    def encode_text(
        self,
        hidden: Tensor,
        offsets: Tensor,
        caption: Tensor,
        t: Tensor | None = None,
        conditioning: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Padded rows [B, T, H] and mask [B, T] of packed rows [R, 1, H]."""
        lengths = offsets.diff()
        rows = hidden[:, 0].float().split(lengths.tolist())
        padded = pad_sequence(list(rows), batch_first=True)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return padded[caption], mask[caption].long()

    def denoise(self, x_t: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity [B, C, h, w]."""
        return self.transformer(
            x_t,
            encoder_hidden_states=text[0],
            timestep=t * NUM_TRAIN_TIMESTEPS,
            encoder_attention_mask=text[1],
            return_dict=False,
        )[0]


@click.group()
def main() -> None:
    """Pretrain and score a stand-in for a published model."""


@main.command()
@click.argument("features")
@click.argument("latents")
@click.argument("out", type=Path)
@click.option("--steps", default=2500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Samples per step.")
@click.option("--noise-draws", default=4, show_default=True, help="t and noise for each sample.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--ema", default=0.995, show_default=True, help="Decay of the moving average.")
@click.option("--width", default=160, show_default=True, help="A multiple of 32.")
@click.option("--depth", default=6, show_default=True)
@click.option("--patch-size", default=6, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
def pretrain(features: str, latents: str, out: Path, **given: Any) -> None:
    """Train on the last layer of FEATURES and on LATENTS, which are pixels; write OUT."""
    if (out / "model_index.json").exists():
        raise click.UsageError(f"{out} is there already")
    work = out.with_name(out.name + "-training")
    work.mkdir(parents=True, exist_ok=True)
    settings = work / "settings.json"
    document = {"features": features, "latents": latents, **given}
    if settings.exists() and json.loads(settings.read_text("utf-8")) != document:
        raise click.UsageError(f"{settings} has other settings: resume with them or delete {work}")
    settings.write_text(json.dumps(document, indent=2) + "\n", "utf-8")

    captions, images = open_features(features), open_latents(latents)
    layer = captions.manifest.identity.layers[-1]
    torch.manual_seed(given["seed"])
    transformer = make_transformer(
        captions.manifest.identity.model.width,
        images.manifest.identity.shape,
        given["width"],
        given["depth"],
        given["patch_size"],
    )
    average = train(Sana(transformer, layer), captions, images, work, given)
    save_pipeline(average.module.transformer, out, captions, layer, given["steps"], len(images))
    click.echo(f"{out}: a pipeline folder")


def make_transformer(
    text_width: int, shape: tuple[int, int, int], width: int, depth: int, patch_size: int
) -> nn.Module:
    """A Sana of random weights, for latents of a shape (C, h, w)."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=shape[0],
        out_channels=shape[0],
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=depth,
        num_cross_attention_heads=width // 32,
        cross_attention_head_dim=32,
        cross_attention_dim=width,
        caption_channels=text_width,
        sample_size=shape[1],
        patch_size=patch_size,
        interpolation_scale=1.0,
    )


def train(
    sana: Sana, features: FeatureStore, latents: Any, work: Path, given: dict[str, Any]
) -> AveragedModel:
    """Train to the end, from the last checkpoint if there is one; the average of the weights."""
    steps, draws, seed = given["steps"], given["noise_draws"], given["seed"]
    flow = Flow(shift=SHIFT)
    optimizer = torch.optim.AdamW(sana.parameters(), lr=given["lr"], weight_decay=0.0)
    average = AveragedModel(sana, multi_avg_fn=get_ema_multi_avg_fn(given["ema"]))
    start = 0
    if checkpoint := latest_checkpoint(work):
        sana.load_state_dict(checkpoint.model())
        average.load_state_dict(checkpoint.ema())
        load_optimizer_tensors(sana, [optimizer], checkpoint.optimizer())
        start = checkpoint.step
    data = DataConfig(batch_size=given["batch_size"])
    layers = sana.router.layers_read
    noise = NoiseSource(flow, seed, draws, version=1)  # that of the published numbers
    options = {"seed": seed, "layers": layers, "start_step": start, "noise": noise}
    loader = PackedLoader(features, latents, data, **options)
    batches = iter(loader)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=given["dtype"] == "bfloat16")
    losses, began = [], time.perf_counter()
    for step in range(start + 1, steps + 1):
        batch = next(batches)
        t, noise, _ = batch.draws.tensors()
        x0 = batch.latents.repeat_interleave(draws, 0)
        caption = batch.caption.repeat_interleave(draws)
        with precision:
            text = sana.encode_text(batch.hidden, batch.offsets, caption)
            velocity = sana.denoise(flow.interpolate(x0, noise, t), t, text)
        loss = flow.loss(velocity, x0, noise, t).mean()
        for group in optimizer.param_groups:
            group["lr"] = given["lr"] * rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(sana.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(sana)
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            line = {
                "step": step,
                "loss": sum(losses) / len(losses),
                "seconds_per_step": (time.perf_counter() - began) / len(losses),
            }
            click.echo(json.dumps(line))
            with (work / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            losses, began = [], time.perf_counter()
        if step % CHECKPOINT_EVERY == 0 or step == steps:
            save_checkpoint(
                work,
                step,
                model=sana.state_dict(),
                ema=average.state_dict(),
                optimizer=optimizer_tensors(sana, [optimizer]),
                state={},
                keep=1,
            )
    batches.close()
    return average


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step, counted from 1: it rises linearly at first, and falls
    to zero linearly over the second half."""
    return min(step / WARMUP, 1.0, 2.0 * (1.0 - (step - 1) / steps))


def save_pipeline(
    transformer: nn.Module, out: Path, features: FeatureStore, layer: int, steps: int, samples: int
) -> None:
    """Write the folder that ``SanaPipeline.save_pretrained`` would, as far as there are parts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, __version__

    transformer.save_pretrained(out / "transformer")
    FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=SHIFT
    ).save_pretrained(out / "scheduler")
    identity = features.manifest.identity
    text = README.format(
        millions=sum(parameter.numel() for parameter in transformer.parameters()) / 1e6,
        steps=steps,
        samples=samples,
        layer=layer,
        llm=features.manifest.provenance.model.rpartition("/")[2],
        text=identity.template.text,
    )
    (out / "README.md").write_text(text, "utf-8")
    absent = [None, None]
    index = {
        "_class_name": "SanaPipeline",
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": absent,
        "tokenizer": absent,
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": absent,
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


@main.command()
@click.argument("out", type=Path)
@click.argument("features")
@click.argument("samples")
@click.option("--cfg-scale", "cfg_scales", multiple=True, default=[1.0, 3.0], show_default=True)
@click.option("--num-steps", default=16, show_default=True)
@click.option("--batch-size", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
def evaluate(
    out: Path, features: str, samples: str, cfg_scales: list[float], num_steps: int, **given: Any
) -> None:
    """Score images of the captions of SAMPLES, whose stored features are FEATURES."""
    from diffusers import SanaTransformer2DModel

    store = open_features(features)
    asked = read_captions(samples)
    store.check_source(samples, asked.texts)
    transformer = SanaTransformer2DModel.from_pretrained(out, subfolder="transformer")
    sana = Sana(transformer, store.manifest.identity.layers[-1]).eval()
    ids = store.first_captions[: len(asked.texts)].tolist()
    pixels = pixel_codec()
    for cfg_scale in cfg_scales:
        config = SamplingConfig(num_steps, cfg_scale)
        latents = generate(sana, Flow(shift=SHIFT), store, ids, config, progress=False, **given)
        images = latents_to_images(latents, pixels.scale, pixels.shift)
        result = score(images, asked.scenes, asked.splits, seed=given["seed"])
        click.echo(f"guidance {cfg_scale:g}, {len(images)} images\n{result}\n")


if __name__ == "__main__":
    main()
