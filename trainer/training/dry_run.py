"""What a run will take, from its configuration and stores alone: ``semroute train --dry-run``.

Shapes: R rows (tokens of all captions, packed), U unique captions, L layers, H text width.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...schemas import Report, Summary, TrainConfig
from ...schemas.units import format_bytes
from ..data.batch import on_device
from ..data.loader import PackedLoader
from ..data.sampler import BatchPartition
from ..model.dit import DiT
from .accelerator import make_accelerator
from .optimizers import make_optimizers
from .setup import Setup, prepare
from .trainer import Trainer
from .validation import held_out

NUM_LOOKED_AT = 32
"""Steps whose captions are counted, from the first."""
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Reading:
    """What steps read, on average over some of them.

    Attributes:
        rows, captions: of the largest part that one rank computes at once.
        step_rows: of a step, all ranks together; a caption counts once a rank and part.
        step_bytes: of both stores, as they are on disk.
    """

    rows: int
    captions: int
    step_rows: float
    step_bytes: float


def plan(
    config: TrainConfig,
    *,
    num_ranks: int = 1,
    step_seconds: float | None = None,
    measure_steps: int = 0,
) -> Report:
    """What :func:`semroute.trainer.training.train.train` would do; nothing is written.

    Activations are those that autograd keeps for the backward pass, counted by running the forward
    pass on tensors that have shapes and no numbers, with as many rows as the fullest of the first
    steps has. What a GPU's allocator and its kernels take besides is not in them.

    Args:
        num_ranks: processes of the run.
        step_seconds: what a step takes, to say what the stores must deliver.
        measure_steps: take so many steps on this machine, after one that is not counted, and forget
            them; with one process, whatever ``num_ranks`` says.

    Raises:
        InputError: what training would refuse, but for a batch that one process cannot divide.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    setup = prepare(config, building=mode)
    stream = make_stream(setup, config, num_ranks)
    reading = count_reading(stream)
    memory = count_memory(setup.model, config, reading, mode, num_ranks)
    measured = None
    if measure_steps:
        measured = step_seconds = measure(config, measure_steps)
    details = {
        "steps": {
            "total": config.steps,
            "done": 0 if setup.found is None else setup.found.step,
            "per_epoch": stream.num_samples / config.data.batch_size,
        },
        "parameters": {
            "total": sum(p.numel() for p in setup.model.parameters()),
            "routing": sum(p.numel() for p in setup.model.router_parameters()),
        },
        "ranks": num_ranks,
        "batch": {
            "samples": config.data.batch_size,
            "samples_of_rank": config.data.batch_size // num_ranks,
            "samples_at_once": config.data.batch_size // (num_ranks * config.grad_accum_steps),
            "noise_draws": config.data.noise_draws,
            "rows_at_once": reading.rows,
        },
        "layers_read": list(setup.model.router.layers_read),
        "memory_bytes": memory,
        "checkpoint_bytes": memory["weights"] + memory["average"] + memory["optimizer"],
        "read_bytes_per_step": reading.step_bytes,
        "step_seconds": step_seconds,
        "step_seconds_measured": measured is not None,
    }
    return Report(_facts(config, setup, stream, details), details)


def _facts(
    config: TrainConfig, setup: Setup, stream: PackedLoader, details: Mapping[str, Any]
) -> Summary:
    size, batch, steps = setup.model.size, details["batch"], details["steps"]
    parameters, memory = details["parameters"], details["memory_bytes"]
    layers, stored = details["layers_read"], setup.features.layers
    num_ranks, accumulated = details["ranks"], config.grad_accum_steps
    held = setup.validation
    each = format_bytes(details["read_bytes_per_step"])
    needs = f"{each} a step of all ranks; --step-seconds or --measure says how fast"
    if details["step_seconds"] is not None:
        seconds = details["step_seconds"]
        how = "measured here, one process" if details["step_seconds_measured"] else "given"
        speed = format_bytes(details["read_bytes_per_step"] / seconds)
        needs = f"{each} a step of all ranks: {speed}/s at {seconds:.3g} s a step ({how})"
    kept = ", ".join(
        f"{name.replace('_', ' ')} {'~' if name == 'activations' else ''}{format_bytes(size)}"
        for name, size in memory.items()
        if name != "total"
    )
    parts = f" in {accumulated} parts of {batch['samples_at_once']}" if accumulated > 1 else ""
    items = {
        "network": f"{config.model.size}: {size.depth} blocks of width {size.width}, "
        f"{parameters['total']:,} parameters, {parameters['routing']:,} of them routing",
        "text": f"strategy {config.routing.strategy} reads {_layers(layers)} ({len(layers)} of "
        f"{len(stored)} stored), codec {setup.features.codec.name}",
        "data": f"{stream.num_samples:,} samples, {len(setup.features):,} captions"
        + "".join(f"; {pair.summary()}" for pair in stream.pairs if pair.selection)
        + "".join(f"; {pair.summary()}" for pair in stream.pairs[1:] if not pair.selection)
        + (f"; validated by {len(held.samples):,} others" if held is not None else ""),
        "batch": f"{batch['samples']} samples x {batch['noise_draws']} of t and noise; "
        f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'} of {batch['samples_of_rank']}{parts}",
        "steps": f"{steps['total']:,}, {steps['done']:,} of them done; an epoch is "
        f"{steps['per_epoch']:,.1f}, so {steps['total'] / steps['per_epoch']:,.1f} epochs",
        "memory": f"a rank ~{format_bytes(memory['total'])}: {kept}",
        "reading": needs,
        "disk": f"a checkpoint {format_bytes(details['checkpoint_bytes'])}, "
        f"{config.keep_checkpoints} kept",
    }
    return Summary(f"Plan of {config.output}; nothing is trained", items)


def _layers(layers: Sequence[int]) -> str:
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    if len(layers) == 1:
        return f"layer {layers[0]}"
    listed = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
    return f"layers {listed}"


def make_stream(setup: Setup, config: TrainConfig, num_ranks: int) -> PackedLoader:
    """Rank 0's of so many.

    Raises:
        InputError: a batch that they do not divide.
    """
    return PackedLoader(
        setup.features,
        setup.latents,
        config.data,
        seed=config.seed,
        layers=setup.model.router.layers_read,
        partition=BatchPartition(0, num_ranks, config.grad_accum_steps),
        held_out=held_out(config.validation, setup.latents.ids),
        start_step=0 if setup.found is None else setup.found.step,
        pairs=setup.pairs,
    )


def count_reading(stream: PackedLoader) -> Reading:
    """Count, without reading, what the first steps read."""
    data = stream.data
    tokens = [pair.features.captions["num_tokens"].to_numpy() for pair in stream.pairs]
    parts, size = stream.partition.num_parts, stream.num_positions
    fullest, most, rows = 0, 0, []
    for step in range(NUM_LOOKED_AT):
        rows.append(0)
        for part in range(parts):
            captions = stream.captions(step * data.batch_size + part * size, size)
            own = sum(int(t[c].sum()) for t, c in zip(tokens, captions, strict=True))
            rows[-1] += own
            if own > fullest:
                fullest, most = own, sum(map(len, captions))
    step_rows = statistics.fmean(rows)
    step_bytes = stream.stored_bytes(step_rows, data.batch_size)
    return Reading(fullest, most, step_rows, step_bytes)


def count_memory(
    model: DiT, config: TrainConfig, reading: Reading, mode: FakeTensorMode, num_ranks: int
) -> dict[str, float]:
    """Bytes that a rank needs on its device, by what they are for."""
    numbers = sum(p.numel() for p in model.parameters())
    states = 0
    for optimizer in make_optimizers(model, config.optimizer):
        copies = 1 if isinstance(optimizer, torch.optim.Muon) else 2
        states += copies * sum(
            p.numel() for group in optimizer.param_groups for p in group["params"]
        )
    parts = num_ranks * config.grad_accum_steps
    hidden = reading.rows * len(model.router.layers_read) * model.context.out_features
    memory = {
        "weights": FP32 * numbers,
        # Accelerate's DDP reduces gradients in buckets, a second copy of them.
        "gradients": FP32 * numbers * (2 if num_ranks > 1 else 1),
        "optimizer": FP32 * states,
        "average": FP32 * numbers,
        "hidden_states": 2 * BF16 * hidden,  # the next batch's are there already
        "activations": count_activations(
            model, config, reading, config.data.batch_size // parts, mode
        ),
    }
    return {**memory, "total": sum(memory.values())}


def count_activations(
    model: DiT, config: TrainConfig, reading: Reading, num_samples: int, mode: FakeTensorMode
) -> int:
    """Bytes that autograd keeps of one accumulation step, parameters and features left out."""
    layers, width = len(model.router.layers_read), model.context.out_features
    num = num_samples * config.data.noise_draws
    # Rows are dealt evenly to captions, the rest to the last.
    each, rest = divmod(reading.rows, reading.captions)
    lengths = torch.tensor([each] * (reading.captions - 1) + [each + rest])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    caption = torch.arange(num) % reading.captions
    with mode:
        hidden = torch.empty(reading.rows, layers, width, dtype=torch.bfloat16)
        x_t, t = torch.empty(num, *model.latent_shape), torch.empty(num)

    def forward() -> int:
        own = {_storage(tensor) for tensor in (*model.parameters(), hidden)}
        sizes: dict[int, int] = {}
        alive = []

        def pack(saved: torch.Tensor) -> torch.Tensor:
            if _storage(saved) not in own:
                sizes[_storage(saved)] = saved.untyped_storage().nbytes()
                alive.append(saved)
            return saved

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        ):
            model(x_t, t, hidden, offsets, caption)
        return sum(sizes.values())

    model.gradient_checkpointing = False
    everything = forward()
    if not config.gradient_checkpointing:
        return everything
    model.gradient_checkpointing = True
    kept = forward()
    # In the backward pass one block at a time is whole again.
    return kept + (everything - kept) // model.size.depth


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure(config: TrainConfig, num_steps: int) -> float:
    """Median seconds of a step here, of a network that is then forgotten; nothing is written.

    Raises:
        InputError: what training with one process would refuse.
    """
    setup = prepare(config)
    accelerator = make_accelerator(config.model_copy(update={"tracker": "none"}))
    stream = make_stream(setup, config, accelerator.num_processes)
    trainer = Trainer(config, accelerator, setup.model)
    seconds = []
    with closing(iter(stream)) as read:
        batches = on_device(read, accelerator.device)
        for _ in range(num_steps + 1):
            began = time.perf_counter()
            trainer.take_step(batches, stop=False)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
