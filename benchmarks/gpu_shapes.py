"""Sizes of benchmarks/gpu.py, and how it measures a device."""

import gc
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Row = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STRATEGIES = (
    *("joint", "token", "uniform", "static", "time"),
    *("one-per-block", "concat", "attention"),
)
"""Besides ``penultimate`` and ``depth``, which come first."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of everything that is measured.

    Attributes:
        llm: of transformers' configuration of Qwen3.
        captions, tokens: of what is extracted; tokens per caption, there and in training.
        rows: that codecs decode.
        batches: samples of a step, by the size of the network.
        stream_captions, stream_steps: captions of the store that is streamed, and steps from it.
        model: keys of the networks' configuration.
        solver_steps: of sampling.
        repeats: timed runs, of which the median counts, after ``untimed`` ones.
    """

    llm: dict[str, int]
    captions: int
    tokens: int
    rows: int
    batches: dict[str, int]
    stream_captions: int
    stream_steps: int
    solver_steps: int
    strategies: tuple[str, ...] = STRATEGIES
    model: dict[str, int] = field(default_factory=dict)
    repeats: int = 5
    untimed: int = 2

    @property
    def layers(self) -> int:
        return self.llm["num_hidden_layers"]

    @property
    def width(self) -> int:
        return self.llm["hidden_size"]


FULL = Shapes(
    llm={
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    captions=512,
    tokens=64,
    rows=2048,
    batches={"small": 64, "base": 64, "paper": 32},
    stream_captions=256,
    stream_steps=40,
    solver_steps=20,
)
TINY = Shapes(
    llm={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    captions=24,
    tokens=8,
    rows=64,
    batches={"small": 2, "base": 2, "paper": 2},
    stream_captions=80,
    stream_steps=2,
    solver_steps=2,
    strategies=("joint",),
    model={"depth": 2, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    | {"mlp_width": 64, "patch_size": 8},
    repeats=2,
    untimed=1,
)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the device has done the work."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def median_seconds(work: Callable[[], Any], shapes: Shapes) -> float:
    took = [timed(work) for _ in range(shapes.untimed + shapes.repeats)]
    return statistics.median(took[shapes.untimed :])


def forget_memory() -> None:
    """Begin to measure the peak of memory anew."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attention_kernels(work: Callable[[], Any]) -> str:
    """Kernels of ``scaled_dot_product_attention`` that the work calls, and how often."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
        synchronize()
    start = "aten::_scaled_dot_product_"
    names = [event.name for event in profiler.events()]
    found = Counter(n.removeprefix(start) for n in names if n.startswith(start))
    forward = {n.removesuffix("_attention"): c for n, c in found.items() if "backward" not in n}
    return ", ".join(f"{name} {count}" for name, count in sorted(forward.items())) or "none"


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if DEVICE.type == "cuda" else tensor


def random_llm(shapes: Shapes) -> Any:
    """Text tower in bfloat16 with random weights, on the device."""
    from transformers import AutoModel, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=258, max_position_embeddings=1024, **shapes.llm)
    with DEVICE:
        return AutoModel.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def machine() -> dict[str, Any]:
    """What is measured."""
    found: dict[str, Any] = {"device": platform.processor() or "CPU", "cores": os.cpu_count()}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {"device": properties.name, "GB": properties.total_memory / 1e9}
        found |= {"CUDA": torch.version.cuda, "GPUs": torch.cuda.device_count()}
    return {**found, "torch": torch.__version__, "python": platform.python_version()}
