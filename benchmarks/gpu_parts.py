"""The parts of benchmarks/gpu.py: what each runs, in a process of its own.

    python benchmarks/gpu_parts.py PART FOLDER [--tiny]

Each row goes to FOLDER/rows.jsonl as soon as it is measured. Each part imports what it needs and no
more, as there are many.

Shapes: R rows (tokens of all captions, packed), L layers, H text width.
"""

import csv
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from extract import Captions

    from semroute.pipeline.codecs.base import Codec
    from semroute.schemas import TrainConfig
    from semroute.trainer.data.batch import Batch
    from semroute.trainer.model.dit import DiT
    from semroute.trainer.training.trainer import Trainer

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LATENT = (4, 32, 32)
"""Latents of 256 x 256 pixels."""
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


# ------------------------------------------------------------------------------------------- timing


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


# -------------------------------------------------------------------------------- tests, extraction


def run_tests(_shapes: Shapes, folder: Path) -> Iterator[Row]:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text("utf-8")]
    found = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--junitxml={found}", *map(str, files)], cwd=ROOT)
    for case in ElementTree.parse(found).iter("testcase"):
        result = next((child.tag for child in case), "passed")
        yield {"test": case.get("name"), "result": result, "s": float(case.get("time", 0))}
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


def write_llm(shapes: Shapes, folder: Path) -> None:
    """An LLM with random weights, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {byte: i + 2 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    random_llm(shapes).save_pretrained(folder)


def random_llm(shapes: Shapes) -> Any:
    """Text tower in bfloat16 with random weights, on the device."""
    from transformers import AutoModel, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=258, max_position_embeddings=1024, **shapes.llm)
    with DEVICE:
        return AutoModel.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def write_captions(shapes: Shapes, file: Path) -> None:
    letters, rng = np.array(list("abcdefgh ")), np.random.default_rng(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"])
        for number in range(shapes.captions):
            drawn = "".join(rng.choice(letters, shapes.tokens))
            writer.writerow([f"{number} {drawn}"[: shapes.tokens].strip()])


def measure_extraction(shapes: Shapes, folder: Path) -> Iterator[Row]:
    from extract import Captions, Setting, total

    from semroute.pipeline.store.open import open_features

    write_llm(shapes, folder / "llm")
    write_captions(shapes, folder / "captions.csv")
    options = {"source": str(folder / "captions.csv"), "model": str(folder / "llm")}
    options |= {"template": "bos", "dtype": "bfloat16"}
    setting = Setting(folder, {**options, "shard_bytes": 1_000_000_000}, 0)
    bare: float | None = None
    for codec in ("bf16", "delta"):
        began = 0.0

        def hear(line: str) -> None:
            nonlocal began
            print(line, flush=True)
            if "to do:" in line:  # fitted and tried, so the LLM is loaded and warm
                began = time.perf_counter()

        setting.run(codec, hear)
        seconds = time.perf_counter() - began
        captions = Captions(setting.store(codec))
        if bare is None:
            bare = measure_bare(captions)
        store = open_features(setting.store(codec))
        parts = total([receipt.seconds for receipt in store.receipts().values()])
        yield {
            "codec": codec,
            "tokens": int(captions.lengths.sum()),
            "bare forward, s": bare,
            "extraction, s": seconds,
            "LLM idle share": 1 - bare / seconds,
            "GB": store.num_bytes() / 1e9,
            **{f"{name}, s": parts[name] for name in ("forward", "code", "write")},
        }


def measure_bare(captions: "Captions") -> float:
    """Seconds of the LLM alone, on the batches of a store."""
    planned = [
        {name: value.to(DEVICE) for name, value in inputs.items()}
        for inputs in captions.planned(padded=False)
    ]

    def forward() -> None:
        for inputs in planned:
            captions.forward(inputs)

    forward()
    return timed(forward)


# ----------------------------------------------------------------------------------------- decoding


def make_codec(name: str, sample: torch.Tensor) -> "Codec":
    """A codec fitted to a sample [R, L, H]; one that multiplies matrices gets unit matrices, whose
    fit would take minutes."""
    from semroute.pipeline.codecs.predictive import Predictive
    from semroute.pipeline.codecs.registry import CODECS, DEFAULT_QUALITY

    kind, (_, layers, width) = CODECS[name], sample.shape
    parameters = {}
    if kind.matrices:
        unit = torch.eye(width).bfloat16().view(torch.uint16).numpy()
        for key, (shape, dtype) in kind.fitted(width).items():
            value = unit if len(shape) == 2 else np.zeros(shape, dtype)
            parameters[key] = np.repeat(value[None], layers, axis=0)
    elif kind.fits:
        parameters = kind.fit(sample)
    quality = DEFAULT_QUALITY if issubclass(kind, Predictive) else None
    return kind(layers, width, parameters, quality)


def measure_decoding(shapes: Shapes, _folder: Path) -> Iterator[Row]:
    from semroute.pipeline.codecs.fit import encode_rows
    from semroute.pipeline.codecs.registry import CODECS

    generator = torch.Generator(DEVICE).manual_seed(0)
    size = (shapes.rows, shapes.layers, shapes.width)
    hidden = torch.randn(size, generator=generator, device=DEVICE).cumsum(1)  # a residual stream
    layers, decoded_bytes = range(shapes.layers), 2 * hidden.numel()
    for name in CODECS:
        codec = make_codec(name, hidden[:256])
        with torch.no_grad():
            arrays = encode_rows(codec, hidden)
        codes = {key: pinned(torch.from_numpy(array)) for key, array in arrays.items()}
        num_bytes = sum(array.nbytes for array in arrays.values())

        def move(codes: dict[str, torch.Tensor] = codes) -> dict[str, torch.Tensor]:
            return {key: value.to(DEVICE, non_blocking=True) for key, value in codes.items()}

        there = move()
        decode = partial(codec.decode_torch, layers=layers)
        yield {
            "codec": name,
            "bytes of codes per value": num_bytes / hidden.numel(),
            "on the device, GB/s": decoded_bytes
            / median_seconds(partial(decode, there), shapes)
            / 1e9,
            "from pinned memory, GB/s": decoded_bytes
            / median_seconds(lambda move=move, decode=decode: decode(move()), shapes)
            / 1e9,
            "copy, GB/s": num_bytes / median_seconds(move, shapes) / 1e9,
        }


# ----------------------------------------------------------------------------------------- training


def make_config(
    shapes: Shapes, folder: Path, size: str, strategy: str, **keys: Any
) -> "TrainConfig":
    from semroute.schemas import TrainConfig

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


def make_network(shapes: Shapes, config: "TrainConfig") -> "DiT":
    from semroute.trainer.model.dit import DiT

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


def make_batch(shapes: Shapes, config: "TrainConfig", num_layers: int) -> "Batch":
    """Random training data with its features on the device, and all else in pinned memory."""
    from semroute.trainer.data.batch import Batch
    from semroute.trainer.diffusion.flow import Flow
    from semroute.trainer.diffusion.noise import NoiseSource

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


def make_trainer(shapes: Shapes, config: "TrainConfig", accelerator: Any = None) -> "Trainer":
    from semroute.trainer.training.accelerator import make_accelerator
    from semroute.trainer.training.trainer import Trainer

    forget_memory()
    return Trainer(config, accelerator or make_accelerator(config), make_network(shapes, config))


def step_row(name: str, trainer: "Trainer", batches: Iterator["Batch"], shapes: Shapes) -> Row:
    """Time, memory and kernels of a training step."""
    from semroute.trainer.training.throughput import peak_memory_bytes

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


def measure_steps(shapes: Shapes, folder: Path, size: str) -> Iterator[Row]:
    first = measure_strategy(shapes, folder, size, "penultimate")
    yield first
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


def online(shapes: Shapes, batch: "Batch") -> Iterator["Batch"]:
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


# ------------------------------------------------------------------------------------------- stream


def measure_stream(shapes: Shapes, folder: Path) -> Iterator[Row]:
    import cold

    from semroute.pipeline.extraction.rewrite import rewrite
    from semroute.trainer.runs.metrics import read_metrics
    from semroute.trainer.training.train import train

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


# ----------------------------------------------------------------------------------------- sampling


def measure_sampling(shapes: Shapes, folder: Path) -> Iterator[Row]:
    from semroute.trainer.diffusion.flow import Flow
    from semroute.trainer.diffusion.sampling import SamplingConfig, sample
    from semroute.trainer.training.throughput import peak_memory_bytes

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


# ------------------------------------------------------------------------------------------ scaling


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
    pause = timed(trainer.save)
    num_bytes = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    del row["strategy"]
    return {**row, "first step, s": first, "pause, s": pause, "checkpoint, GB": num_bytes / 1e9}


def sharding_accelerator(config: "TrainConfig") -> Any:
    """An Accelerator as `accelerate launch` with docs/accelerate/fsdp2.yaml makes it, of one rank.

    On a CPU Accelerate does not begin to shard by itself.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from semroute.trainer.training.accelerator import make_accelerator

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
    from accelerate.state import PartialState

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


MEASURES: dict[str, Callable[[Shapes, Path], Iterator[Row]]] = {
    "tests": run_tests,
    "extraction": measure_extraction,
    "decoding": measure_decoding,
    **{f"step-{size}": partial(measure_steps, size=size) for size in FULL.batches},
    "stream": measure_stream,
    "sampling": measure_sampling,
    "scaling": measure_scaling,
}


def machine() -> dict[str, Any]:
    from semroute.trainer.training.throughput import device_peak_flops

    found: dict[str, Any] = {"device": platform.processor() or "CPU", "cores": os.cpu_count()}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        found |= {"device": properties.name, "GB": properties.total_memory / 1e9}
        found |= {"CUDA": torch.version.cuda, "GPUs": torch.cuda.device_count()}
        peak = device_peak_flops(DEVICE, "bf16")
        found |= {} if peak is None else {"peak TFLOPs in bf16": peak / 1e12}
    return {**found, "torch": torch.__version__, "python": platform.python_version()}


@click.command()
@click.argument("part", type=click.Choice([*MEASURES]))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tiny", is_flag=True)
def main(part: str, folder: Path, tiny: bool) -> None:
    (folder / "machine.json").write_text(json.dumps(machine()), "utf-8")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for row in MEASURES[part](TINY if tiny else FULL, folder):
            rows.write(json.dumps(row) + "\n")
            rows.flush()


if __name__ == "__main__":
    main()
