"""Cost of a training step under each strategy, and with the LLM in the loop.

    python benchmarks/step.py strategies [--size small] [--data latents] [--layers 30] [--only ARM]
    python benchmarks/step.py adapters [--only NETWORK] [--train PARTS]
    python benchmarks/step.py online FEATURES --model LLM [--size small]

A step is forward, loss, backward, clipping and AdamW, in fp32. A step of each arm runs beside one
of the first arm, alternately before and after it, so that other load on the machine affects both
alike; the median of the ratio and its middle half are printed. ``strategies`` reads random features
from memory; FLOPs are those of torch.utils.flop_counter, memory is what autograd keeps for the
backward pass. ``adapters`` compares networks of diffusers, with random weights, with the same ones
without us. ``online`` compares reading a store with running the LLM on the same captions at
every step, each in a process of its own.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode

from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import Encoder, load_tokenizer
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.open import open_features
from semroute.pipeline.text.captions import build_captions
from semroute.schemas import LlmAttention, ModelConfig, OptimizerConfig, RoutingConfig
from semroute.trainer.adapters.base import Text as LaidOut
from semroute.trainer.adapters.families import find_family
from semroute.trainer.adapters.routed import Routed
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.model.blocks import SIZES
from semroute.trainer.model.deep_fusion import layers_of_blocks
from semroute.trainer.model.dit import DiT
from semroute.trainer.training.optimizers import make_optimizers

ARMS: dict[str, dict[str, Any]] = {
    **{name: {"strategy": name} for name in ("penultimate", "uniform", "static", "depth")},
    "depth, signed": {"strategy": "depth", "weights": "signed"},
    "depth, rank 2": {"strategy": "depth", "rank": 2},
    "depth, top 4": {"strategy": "depth", "top_k": 4},
    **{name: {"strategy": name} for name in ("time", "joint", "token", "one-per-block")},
    **{name: {"strategy": name} for name in ("concat", "attention", "deep-fusion")},
}
"""The others are compared with the first."""
WORKLOADS: dict[str, dict[str, Any]] = {
    "shapes": {"shape": (3, 18, 18), "patch": 6, "samples": 16, "draws": 4, "tokens": 9},
    "latents": {"shape": (4, 32, 32), "patch": 2, "samples": 8, "draws": 1, "tokens": 32},
}
"""Training data: ``shapes`` as in the demo, ``latents`` of 256 x 256 pixels and with longer
captions. ``samples`` per step, ``draws`` of t for each, ``tokens`` per caption."""
USUAL = {"nano": "shapes", "small": "latents"}

Text = tuple[torch.Tensor, torch.Tensor]


class Arm:
    """A network and its optimizer; ``step`` takes the text of a batch."""

    def __init__(
        self,
        size: str,
        workload: dict[str, Any],
        routing: dict[str, Any],
        layers: list[int],
        num_layers: int,
        width: int,
    ) -> None:
        torch.manual_seed(0)
        self.dit = DiT(
            ModelConfig(size=size, patch_size=workload["patch"]),
            RoutingConfig(**routing),
            latent_shape=workload["shape"],
            layers=layers,
            num_llm_layers=num_layers,
            text_width=width,
            attention=self.attention(size, routing, layers, num_layers, width),
        )  # fmt: skip
        for parameter in self.dit.router.parameters():
            if not parameter.requires_grad:  # of the LLM
                torch.nn.init.normal_(parameter, std=0.02)
        self.layers = self.dit.router.layers_read
        self.optimizers = make_optimizers(self.dit, OptimizerConfig(lr=1e-5, router_lr=1e-3))
        self.flow, self.generator = Flow(), torch.Generator().manual_seed(0)
        self.caption = torch.arange(workload["samples"]).repeat_interleave(workload["draws"])
        self.num = len(self.caption)

    @staticmethod
    def attention(
        size: str, routing: dict[str, Any], layers: list[int], num_layers: int, width: int
    ) -> LlmAttention | None:
        """Keys and values of an LLM like SmolLM2, for deep fusion: heads of 64, a third of them for
        keys and values."""
        if routing["strategy"] != "deep-fusion":
            return None
        chosen = layers_of_blocks(layers, num_layers, SIZES[size].depth, None)
        heads = max(1, width // 192)
        return LlmAttention(
            layers=sorted({*chosen}),
            num_heads=3 * heads,
            num_kv_heads=heads,
            head_dim=64,
            eps=1e-5,
            bias=False,
            key_norm=False,
            first_position=1,
        )

    def loss(self, text: Text) -> torch.Tensor:
        shape = (self.num, *self.dit.latent_shape)
        x0, noise = (torch.randn(shape, generator=self.generator) for _ in range(2))
        t = self.flow.sample_t(self.num, self.generator)
        prediction = self.dit(self.flow.interpolate(x0, noise, t), t, *text, self.caption)
        return self.flow.loss(prediction, x0, noise, t).mean() + self.dit.router.penalty(t)

    def step(self, text: Text) -> None:
        self.loss(text).backward()
        torch.nn.utils.clip_grad_norm_(self.dit.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def flops(self, text: Text) -> int:
        with FlopCounterMode(display=False) as counter:
            self.loss(text).backward()
        self.dit.zero_grad()
        return counter.get_total_flops()

    def kept_bytes(self, text: Text) -> int:
        """Bytes that autograd holds between the passes, without parameters and features."""
        own = {p.untyped_storage().data_ptr() for p in (*self.dit.parameters(), text[0])}
        sizes: dict[int, int] = {}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            self.loss(text).backward()
        self.dit.zero_grad()
        return sum(sizes.values())


def seconds(work: Callable[[], None]) -> float:
    """Time of the processor, in all threads: the clock also counts the work of others."""
    started = time.process_time()
    work()
    return time.process_time() - started


def spread(ratios: list[float]) -> str:
    """Median, with the middle half."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@click.group()
def main() -> None:
    """Cost of a training step."""


@main.command()
@click.option("--size", type=click.Choice([*USUAL]), default="small", show_default=True)
@click.option("--data", type=click.Choice([*WORKLOADS]), help="Default: the usual for the size.")
@click.option("--layers", default=30, show_default=True)
@click.option("--width", default=576, show_default=True)
@click.option("--turns", default=7, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([*ARMS]), help="Besides the first arm.")
def strategies(
    size: str,
    data: str | None,
    layers: int,
    width: int,
    turns: int,
    threads: int,
    only: tuple[str, ...],
) -> None:
    """Print a table of all strategies at one size and number of layers."""
    torch.set_num_threads(threads)
    workload = WORKLOADS[data or USUAL[size]]
    rows = workload["samples"] * workload["tokens"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, layers, width, generator=generator).bfloat16()
    offsets = torch.arange(workload["samples"] + 1) * workload["tokens"]
    first = next(iter(ARMS))
    chosen = {name: ARMS[name] for name in ARMS if not only or name in (first, *only)}
    every = list(range(1, layers + 1))
    arms = {
        name: Arm(size, workload, routing, every, layers, width) for name, routing in chosen.items()
    }
    texts = {
        name: (hidden[:, [layer - 1 for layer in arm.layers]].contiguous(), offsets)
        for name, arm in arms.items()
    }
    for name, arm in arms.items():
        arm.step(texts[name])
    took: dict[str, list[float]] = {name: [] for name in arms}
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns):
        for name in arms:
            pair = {}
            for number in ((first, name), (name, first))[turn % 2]:
                pair[number] = seconds(lambda number=number: arms[number].step(texts[number]))
            took[name].append(pair[first])
            ratios[name].append(pair[name] / pair[first])
    print(
        f"{size}: {workload['samples']} samples x {workload['draws']} draws, {rows} rows of "
        f"{layers} layers of {width}, {turns} turns, {threads} threads, torch "
        f"{torch.__version__}; a step of {first}: {statistics.median(took[first]):.3f} s\n"
    )
    print("| strategy | learned | step | GFLOP | kept MB |\n| --- | --: | --: | --: | --: |")
    for name, arm in arms.items():
        learned = sum(p.numel() for p in arm.dit.router_parameters())
        flops, kept = arm.flops(texts[name]) / 1e9, arm.kept_bytes(texts[name]) / 1e6
        print(f"| {name} | {learned:,} | {spread(ratios[name])} | {flops:.2f} | {kept:.1f} |")


_SIZE = {"num_attention_heads": 6, "attention_head_dim": 64}
_FLUX2 = {
    **_SIZE,
    "in_channels": 16,
    "num_layers": 4,
    "num_single_layers": 4,
    "joint_attention_dim": 3 * 320,
    "axes_dims_rope": (16, 16, 16, 16),
    "guidance_embeds": False,
}
NETWORKS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "PixArt": (
        "PixArtTransformer2DModel",
        {
            **_SIZE,
            "num_layers": 8,
            "cross_attention_dim": 384,
            "sample_size": 64,
            "caption_channels": 1365,
            "use_additional_conditions": False,
        },
        "blocks",
        1365,
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {
            **_SIZE,
            "num_layers": 8,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 448,
            "axes_dims_rope": (16, 24, 24),
        },
        "blocks",
        448,
    ),
    "FLUX.2": ("Flux2Transformer2DModel", _FLUX2, "taps", 320),
    "FLUX.2, by block": ("Flux2Transformer2DModel", _FLUX2, "blocks", 320),
}
"""Class of diffusers, and its configuration, with 8 blocks of width 384; where it is routed; and
the LLM's width: to 384 what the published model's LLM is to the width of that model."""


class Adapted:
    """A network of diffusers that is trained, with us or without."""

    def __init__(self, name: str, train: str, ours: bool, layers: int, side: int) -> None:
        kind, options, where, width = NETWORKS[name]
        torch.manual_seed(0)
        transformer = getattr(diffusers, kind)(**options)
        self.family = find_family(kind, name)
        channels = self.family.latents(transformer.config)[0]
        pixels = side if kind.startswith("Flux2") else 2 * side  # in patches of 2 x 2
        self.shape = (channels, pixels, pixels)
        base = [8, 16, 24] if kind.startswith("Flux2") else [24]
        self.ours, self.train = ours, train
        self.network = Routed(
            transformer,
            self.family,
            ModelConfig(kind="pretrained", pretrained="none", train=train),
            RoutingConfig(strategy="depth", weights="signed", where=where),
            layers=range(1, layers + 1),
            base_layers=base,
            num_llm_layers=layers,
            text_width=width,
            latent_shape=self.shape,
        )
        if not ours:
            self.network.sockets.remove()
        config = OptimizerConfig(lr=1e-5, router_lr=1e-3)
        self.optimizers = make_optimizers(self.network, config) if ours or train == "full" else []
        self.generator = torch.Generator().manual_seed(0)

    def step(self, hidden: torch.Tensor, offsets: torch.Tensor) -> None:
        num = len(offsets) - 1
        x0, noise = (torch.randn(num, *self.shape, generator=self.generator) for _ in range(2))
        t = torch.rand(num, generator=self.generator)
        path = Flow()
        x_t, caption = path.interpolate(x0, noise, t), torch.arange(num)
        given = None
        if self.family.needs_conditioning:
            base = self.network.base_layers
            rows = hidden.unflatten(0, (num, -1))[:, :, [layer - 1 for layer in base]]
            mask = torch.ones(rows.shape[:2], dtype=torch.bool)
            given = {"prompt_embeds": rows.flatten(2), "mask": mask}
        if self.ours:
            prediction = self.network(x_t, t, hidden, offsets, caption, conditioning=given)
        else:
            prediction = self.plain(x_t, t, hidden, offsets, given)
        path.loss(prediction, x0, noise, t).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def plain(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        hidden: torch.Tensor,
        offsets: torch.Tensor,
        given: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The network alone; where its weights are frozen, gradients go to its text."""
        num = len(x_t)
        if given is None:
            rows = hidden[:, [layer - 1 for layer in self.network.base_layers]]
            mask = torch.ones(num, len(rows) // num, dtype=torch.bool)
            text = LaidOut(rows.unflatten(0, (num, -1)).float(), mask)
        else:
            text = self.family.read_conditioning(
                given, self.network.transformer.config, torch.float32
            )
        text = replace(text, lengths=offsets.diff().tolist())
        text.base.requires_grad_(self.train != "full")
        return self.family.call(self.network.transformer, x_t, t, text)


@main.command()
@click.option("--layers", default=24, show_default=True)
@click.option("--samples", default=1, show_default=True)
@click.option("--side", default=32, show_default=True, help="Image tokens in a row; 32: 512 px.")
@click.option("--turns", default=7, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([*NETWORKS]))
@click.option("--train", multiple=True, type=click.Choice(["full", "router"]))
def adapters(
    layers: int, samples: int, side: int, turns: int, only: tuple[str, ...], train: tuple[str, ...]
) -> None:
    """Compare steps of networks of diffusers with us and without, where all or the router learns.

    Without us, and frozen, gradients still go through the network to its text. One thread, and the
    time is that of its processor.
    """
    torch.set_num_threads(1)
    tokens = WORKLOADS["latents"]["tokens"]
    print(
        f"{samples} samples of {side**2} image tokens, {samples * tokens} rows of {layers} layers, "
        f"{turns} turns, 1 thread, torch {torch.__version__}\n"
    )
    print("| network | LLM | trained | mixes | step without | with, to without |")
    print("| --- | --: | --- | --: | --: | --: |")
    for name in only or NETWORKS:
        width = NETWORKS[name][-1]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(samples * tokens, layers, width, generator=generator).bfloat16()
        text = (hidden, torch.arange(samples + 1) * tokens)
        for parts in train or ("full", "router"):
            plain, ours = (Adapted(name, parts, each, layers, side) for each in (False, True))
            for each in (plain, ours):
                each.step(*text)
            took, ratios = [], []
            for turn in range(turns):
                pair = {}
                for each in ((plain, ours), (ours, plain))[turn % 2]:
                    started = time.process_time()
                    each.step(*text)
                    pair[each] = time.process_time() - started
                took.append(pair[plain])
                ratios.append(pair[ours] / pair[plain])
            middle, mixes = statistics.median(took), ours.network.num_blocks
            row = (name, width, parts, mixes, f"{middle:.2f} s", spread(ratios))
            print(f"| {' | '.join(map(str, row))} |", flush=True)


@main.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The LLM of the features.")
@click.option("--size", type=click.Choice([*USUAL]), default="small", show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--steps", default=4, show_default=True, help="Steps per turn.")
@click.option("--threads", default=1, show_default=True)
@click.option("--arm", type=click.Choice(["cached", "online"]), hidden=True)
def online(
    features: Path, model: str, size: str, turns: int, steps: int, threads: int, arm: str | None
) -> None:
    """Compare strategy ``depth`` from a store with running the LLM at every step."""
    if arm is not None:
        torch.set_num_threads(threads)
        print(json.dumps(measure(arm, features, model, size, steps)))
        return
    found: dict[str, list[dict[str, float]]] = {"cached": [], "online": []}
    for _ in range(turns):
        for name, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(output.stdout))
    store = open_features(features)
    print(
        f"{size}, {store.manifest.codec.name} store of {len(store.layers)} layers, "
        f"{len(store):,} captions of {store.captions['num_tokens'].to_numpy().mean():.1f} tokens, "
        f"{turns} turns of {steps} steps, {threads} threads, torch {torch.__version__}\n"
    )
    print("| features | samples/s | text, share of a step | peak memory, MB |")
    print("| --- | --: | --: | --: |")
    for name, results in found.items():
        speed, text, memory = (
            statistics.median(result[key] for result in results)
            for key in ("samples_per_second", "text_share", "peak_mb")
        )
        print(f"| {name} | {speed:.2f} | {text:.1%} | {memory:,.0f} |")
    ratios = [
        one["samples_per_second"] / other["samples_per_second"]
        for one, other in zip(*found.values(), strict=True)
    ]
    print(f"\ncached to online: {spread(ratios)}")


def measure(name: str, features: Path, model: str, size: str, steps: int) -> dict[str, float]:
    """Measure some steps of one arm, after a first one that is not counted."""
    store = open_features(features)
    workload = WORKLOADS[USUAL[size]]
    num = workload["samples"]
    identity = store.manifest.identity
    order = np.random.default_rng(0).permutation(np.arange(1, len(store)))
    batches = cycle(order[first : first + num] for first in range(0, len(order) - num + 1, num))
    layers, width = identity.model.num_layers, identity.model.width
    arm = Arm(size, workload, ARMS["depth"], store.layers, layers, width)
    texts = from_store(store, batches) if name == "cached" else from_llm(store, model, batches)
    arm.step(next(texts))
    waited = total = 0.0
    for _ in range(steps):
        started = time.perf_counter()
        text = next(texts)
        waited += time.perf_counter() - started
        arm.step(text)
        total += time.perf_counter() - started
    return {
        "samples_per_second": steps * num / total,
        "text_share": waited / total,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def from_store(store: FeatureStore, batches: Iterator[np.ndarray]) -> Iterator[Text]:
    """Features read on demand; training itself reads ahead, in a thread."""
    for ids in batches:
        rows = store.read(ids, store.layers)
        yield rows.tensor(), torch.from_numpy(rows.offsets)


def from_llm(store: FeatureStore, model: str, batches: Iterator[np.ndarray]) -> Iterator[Text]:
    """Features of the same captions, tokenised beforehand, from the LLM in one padded batch."""
    identity, source = store.manifest.identity, find_model(model)
    encoder = Encoder(source, store.layers, identity.dtype, "cpu")
    captions = build_captions(
        pa.array([[text] for text in store.captions["text"].to_pylist()[1:]]),
        load_tokenizer(source),
        template=identity.template.text,
        max_length=identity.max_length,
        keep_prefix=identity.template.keep_prefix,
        processing=identity.template.processing,
        causal=identity.model.causal,
    )
    entries = [0, *(ids[0] for ids in captions.caption_ids.to_pylist())]
    layers: list[torch.Tensor] = [torch.empty(0)] * len(store.layers)

    def sink(index: int, hidden: torch.Tensor) -> None:
        layers[index] = hidden.bfloat16()

    for ids in batches:
        chosen = [entries[number] for number in ids]
        sequences = [captions.sequences[entry] for entry in chosen]
        encoder.encode(sequences, captions.rows.of(chosen), sink)
        offsets = np.append(0, captions.num_tokens[chosen].cumsum())
        yield torch.stack(layers, dim=1), torch.from_numpy(offsets)


if __name__ == "__main__":
    main()
