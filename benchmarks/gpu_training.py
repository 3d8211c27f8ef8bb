"""Parts of benchmarks/gpu.py about networks: steps, streams, sampling, and what scales a run.

Shapes: R rows (tokens of all captions, packed), L layers, H text width.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import cold
import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from gpu_shapes import (
    DEVICE,
    Row,
    Shapes,
    attention_kernels,
    forget_memory,
    median_seconds,
    pinned,
    random_llm,
    timed,
)

from semroute.pipeline.extraction.rewrite import rewrite
from semroute.schemas import TrainConfig
from semroute.trainer.data.batch import Batch
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise import NoiseSource
from semroute.trainer.diffusion.sampling import SamplingConfig, sample
from semroute.trainer.model.dit import DiT
from semroute.trainer.runs.metrics import read_metrics
from semroute.trainer.training.accelerator import make_accelerator
from semroute.trainer.training.throughput import peak_memory_bytes
from semroute.trainer.training.train import train
from semroute.trainer.training.trainer import Trainer

LATENT = (4, 32, 32)
"""Latents of 256 x 256 pixels."""


def make_config(shapes: Shapes, folder: Path, size: str, strategy: str, **keys: Any) -> TrainConfig:
    document: dict[str, Any] = {
        "features": str(folder / "features"),
        "latents": str(folder / "latents"),
        "output": str(folder / f"run-{size}-{strategy}"),
        "steps": 1_000_000,
        "log_every": 1_000_000,
        "mixed_precision": "bf16",
        "model": {"size": size, **shapes.model},
        "routing": {"strategy": strategy},
        "data": {"batch_size": shapes.batches[size], "caption_dropout": 0},
    }
    return TrainConfig.model_validate(document | keys)


def make_network(shapes: Shapes, config: TrainConfig) -> DiT:
    torch.manual_seed(0)
    with DEVICE:
        return DiT(
            config.model,
            config.routing,
            latent_shape=LATENT,
            layers=range(1, shapes.layers + 1),
            num_llm_layers=shapes.layers,
            text_width=shapes.width,
        )


def make_batch(shapes: Shapes, config: TrainConfig, num_layers: int) -> Batch:
    """Random training data with its features on the device, and all else in pinned memory."""
    num, generator = config.data.batch_size, torch.Generator(DEVICE).manual_seed(0)
    rng = np.random.default_rng(0)
    lengths = torch.from_numpy(rng.integers(shapes.tokens // 2, shapes.tokens + 1, num))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    size = (int(offsets[-1]), num_layers, shapes.width)
    hidden = torch.randn(size, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    return Batch(
        step=0,
        micro_step=0,
        position=0,
        sample_ids=np.arange(num),
        hidden=hidden,
        offsets=offsets,
        caption=torch.arange(num),
        latents=pinned(torch.randn((num, *LATENT))),
        draws=NoiseSource(Flow.from_config(config.flow), 0).draw(
            0, num, LATENT, lambda shape, dtype: pinned(torch.empty(shape, dtype=dtype))
        ),
    )


def make_trainer(shapes: Shapes, config: TrainConfig, accelerator: Any = None) -> Trainer:
    forget_memory()
    return Trainer(config, accelerator or make_accelerator(config), make_network(shapes, config))


def step_row(name: str, trainer: Trainer, batches: Iterator[Batch], shapes: Shapes) -> Row:
    """Time, memory and kernels of a training step."""
    forget_memory()
    seconds = median_seconds(lambda: trainer.take_step(batches, False), shapes)
    return {
        "strategy": name,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "ms": 1000 * seconds,
        "samples/s": trainer.config.data.batch_size / seconds,
        "peak GB": peak_memory_bytes(DEVICE) / 1e9,
        "attention": attention_kernels(lambda: trainer.take_step(batches, False)),
    }


def measure_step(shapes: Shapes, folder: Path, size: str) -> Iterator[Row]:
    first = measure_strategy(shapes, folder, size, "penultimate")
    yield {**first, "x penultimate": 1.0}
    others = (measure_strategy(shapes, folder, size, name) for name in shapes.strategies)
    for row in chain(measure_sources(shapes, folder, size), others):
        yield {**row, "x penultimate": row["ms"] / first["ms"]}


def measure_strategy(shapes: Shapes, folder: Path, size: str, strategy: str) -> Row:
    config = make_config(shapes, folder, size, strategy)
    trainer = make_trainer(shapes, config)
    batch = make_batch(shapes, config, len(trainer.network.router.layers_read)).to(DEVICE)
    return step_row(strategy, trainer, repeat(batch), shapes)


def measure_sources(shapes: Shapes, folder: Path, size: str) -> Iterator[Row]:
    """Strategy ``depth``, its features from three places."""
    config = make_config(shapes, folder, size, "depth")
    trainer = make_trainer(shapes, config)
    batch = make_batch(shapes, config, shapes.layers)
    assert isinstance(batch.hidden, torch.Tensor)
    stored = replace(batch, hidden=pinned(batch.hidden.cpu()))
    for name, batches in (
        ("depth", repeat(batch.to(DEVICE))),
        ("depth, features from pinned memory", (stored.to(DEVICE) for _ in repeat(None))),
        ("depth, features by the LLM online", online(shapes, batch)),
    ):
        yield step_row(name, trainer, batches, shapes)


def online(shapes: Shapes, batch: Batch) -> Iterator[Batch]:
    """Batches whose features the LLM computes, on captions padded to one length."""
    llm, lengths = random_llm(shapes), batch.offsets.diff()
    tokens = torch.randint(2, 258, (len(lengths), shapes.tokens), device=DEVICE)
    mask = (torch.arange(shapes.tokens) < lengths[:, None]).to(DEVICE)
    rows = mask.flatten().nonzero()[:, 0]
    batch = replace(batch, hidden=torch.empty(0)).to(DEVICE)
    inputs = {"input_ids": tokens, "attention_mask": mask.long()}
    while True:
        with torch.no_grad():
            states = llm(**inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]
            hidden = torch.stack([state.flatten(0, 1)[rows] for state in states], 1)  # [R, L, H]
        yield replace(batch, hidden=hidden)


def measure_stream(shapes: Shapes, folder: Path) -> Iterator[Row]:
    counts = np.full(shapes.stream_captions, shapes.tokens // 2)
    cold.write_features(folder / "bf16", counts, shapes.layers, shapes.width)
    cold.write_latents(folder / "latents", len(counts))
    rewrite(folder / "bf16", folder / "delta", codec="delta", workers=0)
    for codec in ("bf16", "delta"):
        for threads in (1, 4):
            keys = {
                "features": str(folder / codec),
                "output": str(folder / f"run-{codec}-{threads}"),
                "steps": 2 * shapes.stream_steps,
                "log_every": shapes.stream_steps,
                "checkpoint_every": 1_000_000,
                "data": {"batch_size": shapes.batches["base"], "workers": threads},
            }
            forget_memory()
            path = train(make_config(shapes, folder, "base", "depth", **keys), progress=False)
            line = read_metrics(path)[-1]
            row_bytes = 2 * shapes.layers * shapes.width * shapes.tokens // 2
            yield {
                "codec": codec,
                "threads": threads,
                "samples/s": line["samples_per_second"],
                "GB/s of features": line["samples_per_second"] * row_bytes / 1e9,
                "data wait": line["data_wait_share"],
                "peak GB": line["peak_memory_bytes"] / 1e9,
            }


def measure_sampling(shapes: Shapes, folder: Path) -> Iterator[Row]:
    for size in ("base", "paper"):
        for strategy in ("depth", "joint"):
            config = make_config(shapes, folder, size, strategy)
            network = make_network(shapes, config).eval()
            torch.nn.init.normal_(network.patch_out.weight, std=0.02)  # zeros, before training
            batch = make_batch(shapes, config, shapes.layers).to(DEVICE)
            latents = {}
            for dtype in ("float32", "bfloat16"):
                solve = partial(
                    sample,
                    network,
                    Flow.from_config(config.flow),
                    batch.hidden,
                    batch.offsets,
                    batch.hidden[:1],
                    SamplingConfig(shapes.solver_steps, cfg_scale=3.0, dtype=dtype),
                )
                forget_memory()
                kernels = attention_kernels(lambda solve=solve: latents.update({dtype: solve()}))  # noqa: B023
                seconds = timed(solve)
                apart = latents[dtype] - latents["float32"]
                yield {
                    "network": size,
                    "strategy": strategy,
                    "dtype": dtype,
                    "images/s": len(batch.caption) / seconds,
                    "ms per solver step": 1000 * seconds / shapes.solver_steps,
                    "peak GB": peak_memory_bytes(DEVICE) / 1e9,
                    "apart": float(apart.norm() / latents["float32"].norm()),
                    "attention": kernels,
                }


def measure_scaling(shapes: Shapes, folder: Path) -> Iterator[Row]:
    for name in ("plain", "compile", "FSDP2"):
        yield {"setting": name, **measure_setting(shapes, folder / name, name)}
    torch.distributed.destroy_process_group()


def measure_setting(shapes: Shapes, output: Path, name: str) -> Row:
    output.mkdir()
    keys = {"output": str(output), "compile": name == "compile", "keep_checkpoints": 1}
    config = make_config(shapes, output, "base", "depth", **keys)
    accelerator = sharding_accelerator(config) if name == "FSDP2" else None
    eager = name == "compile" and DEVICE.type == "cpu"  # compiling for a CPU takes a minute
    with torch.compiler.set_stance("force_eager") if eager else nullcontext():
        trainer = make_trainer(shapes, config, accelerator)
        batch = make_batch(shapes, config, shapes.layers).to(DEVICE)
        first = timed(lambda: trainer.take_step(repeat(batch), False))
        row = step_row(name, trainer, repeat(batch), shapes)
        pauses, written = [], []
        for _ in range(2):  # the second one reuses the memory of the first
            trainer.take_step(repeat(batch), False)
            pauses.append(timed(trainer.save))
            written.append(timed(trainer.saver.wait))
    num_bytes = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    del row["strategy"]
    return {
        **row,
        "first step, s": first,
        "first pause, s": pauses[0],
        "pause, s": pauses[1],
        "writing meanwhile, s": written[1],
        "checkpoint, GB": num_bytes / 1e9,
    }


def sharding_accelerator(config: TrainConfig) -> Any:
    """An Accelerator as `accelerate launch` with docs/accelerate/fsdp2.yaml makes it, of one rank.

    On a CPU Accelerate does not begin to shard by itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    os.environ |= {"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ |= {"FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    PartialState._reset_state()  # of the settings before, which had no ranks
    if DEVICE.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "1"
    accelerator = make_accelerator(config)
    if not accelerator.is_fsdp2 and DEVICE.type == "cpu":
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
    if not accelerator.is_fsdp2:
        raise RuntimeError("Accelerate does not shard")
    return accelerator
