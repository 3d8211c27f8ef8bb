"""Memory, reads and disk space of a run, from its configuration: ``semroute train --dry-run``.

Shapes: R rows (tokens of all captions, packed), U unique captions, L layers, H text width.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...schemas import Report, Summary, TrainConfig
from ...schemas.storage import StorageSpeed, measure_storage
from ...schemas.units import format_bytes
from ..adapters.paths import make_path
from ..data.batch import on_device
from ..data.loader import PackedLoader
from ..data.remote import plan_fetching
from ..runs.record import learning
from .accelerator import make_accelerator
from .optimizers import make_optimizers
from .previews import open_previews
from .setup import Setup, make_loader, prepare
from .trainer import Trainer

if TYPE_CHECKING:
    from ..runs.record import Network

NUM_COUNTED_STEPS = 32
"""Number of first steps whose captions are counted."""
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Reading:
    """Data that a step reads.

    Attributes:
        rows, captions: size of the largest part that one rank computes at once.
        step_rows: mean over steps, all ranks together; a caption counts once per rank and part.
        step_bytes: bytes on disk of these rows, and of the latents.
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
    """Plan what :func:`semroute.trainer.training.train.train` would do, and write nothing.

    Activations are those that autograd keeps for the backward pass. They are counted by a forward
    pass on tensors without data, with the largest number of rows of the first steps. What a GPU's
    allocator and kernels need besides is not included.

    Args:
        num_ranks: processes of the run.
        step_seconds: duration of a step, to compute the read speed that the stores must deliver.
        measure_steps: measure so many steps on this machine after a first one, then discard them;
            always with one process, regardless of ``num_ranks``.

    Raises:
        InputError: whatever training would refuse, except a batch that does not divide among
            processes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    setup = prepare(config, building=mode)
    if config.sampling.every is not None:
        open_previews(setup, torch.device("cpu"))
    loader = make_loader(setup, num_ranks=num_ranks)
    reading = count_reading(loader)
    memory = count_memory(setup.model, config, reading, mode, num_ranks)
    measured = None
    if measure_steps:
        measured = step_seconds = measure(config, measure_steps)
    fetching = plan_fetching(loader.pairs, config.data)
    details = {
        "steps": {
            "total": config.steps,
            "done": 0 if setup.checkpoint is None else setup.checkpoint.step,
            "per_epoch": loader.num_samples / config.data.batch_size,
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
        "checkpoint_bytes": 2 * memory["average"] + memory["optimizer"],
        "read_bytes_per_step": reading.step_bytes,
        "storage": _measure_storage(setup, loader),
        "fetching": fetching.describe() if fetching else None,
        "step_seconds": step_seconds,
        "step_seconds_measured": measured is not None,
    }
    return Report(_facts(config, setup, loader, details), details)


def _measure_storage(setup: Setup, loader: PackedLoader) -> dict[str, float] | None:
    """What the disk delivers at the size of a caption; None where it cannot be measured."""
    layout = setup.features.manifest.layout
    caption_rows = layout.num_rows / len(setup.features)
    size = caption_rows * loader.pairs[0].row_bytes(loader.layers)
    found = measure_storage(setup.features.path, math.ceil(size))
    return None if found is None else asdict(found)


def _facts(
    config: TrainConfig, setup: Setup, loader: PackedLoader, details: Mapping[str, Any]
) -> Summary:
    batch, steps = details["batch"], details["steps"]
    parameters, memory = details["parameters"], details["memory_bytes"]
    layers, stored = details["layers_read"], setup.features.layers
    num_ranks, accumulated = details["ranks"], config.grad_accum_steps
    validation = setup.validation
    each = format_bytes(details["read_bytes_per_step"])
    needs = f"{each} per step of all ranks; --step-seconds or --measure gives the speed"
    if details["step_seconds"] is not None:
        seconds = details["step_seconds"]
        how = "measured here, one process" if details["step_seconds_measured"] else "given"
        speed = format_bytes(details["read_bytes_per_step"] / seconds)
        needs = f"{each} per step of all ranks: {speed}/s at {seconds:.3g} s per step ({how})"
    needed = details["read_bytes_per_step"] / (details["step_seconds"] or math.inf)
    storage = details["storage"]
    parts_of_memory = ", ".join(
        f"{name.replace('_', ' ')} {'~' if name == 'activations' else ''}{format_bytes(size)}"
        for name, size in memory.items()
        if name != "total"
    )
    parts = f" in {accumulated} parts of {batch['samples_at_once']}" if accumulated > 1 else ""
    items = {
        "network": f"{setup.model.describe()}, {parameters['total']:,} parameters, "
        f"{parameters['routing']:,} of them routing",
        "text": f"strategy {config.routing.strategy} reads {_layers(layers)} ({len(layers)} of "
        f"{len(stored)} stored), codec {setup.features.manifest.codec.name}",
        "data": f"{loader.num_samples:,} samples, {len(setup.features):,} captions"
        + "".join(f"; {pair.summary()}" for pair in loader.pairs if pair.selection)
        + "".join(f"; {pair.summary()}" for pair in loader.pairs[1:] if not pair.selection)
        + (f"; validated by {len(validation.samples):,} others" if validation is not None else ""),
        "batch": f"{batch['samples']} samples x {batch['noise_draws']} of t and noise; "
        f"{num_ranks} {'rank' if num_ranks == 1 else 'ranks'} of {batch['samples_of_rank']}{parts}",
        "steps": f"{steps['total']:,}, {steps['done']:,} of them done; an epoch is "
        f"{steps['per_epoch']:,.1f}, so {steps['total'] / steps['per_epoch']:,.1f} epochs",
        "memory": f"~{format_bytes(memory['total'])} per rank: {parts_of_memory}",
        "reading": needs,
        **({"storage": StorageSpeed(**storage).compare(needed or None)} if storage else {}),
        **({"fetching": details["fetching"]} if details["fetching"] else {}),
        "disk": f"{format_bytes(details['checkpoint_bytes'])} per checkpoint, "
        f"{config.keep_checkpoints} kept",
    }
    return Summary(f"Plan of {config.output}; nothing is trained", items)


def _layers(layers: Sequence[int]) -> str:
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1))
    if len(layers) == 1:
        return f"layer {layers[0]}"
    listed = f"{layers[0]} to {layers[-1]}" if consecutive else ", ".join(map(str, layers))
    return f"layers {listed}"


def count_reading(loader: PackedLoader) -> Reading:
    """Count what the first steps read, without reading it."""
    data = loader.data
    tokens = [pair.features.num_rows(np.arange(len(pair.features))) for pair in loader.pairs]
    parts, size = loader.partition.num_parts, loader.num_positions
    most_rows, most_captions, rows = 0, 0, []
    for step in range(NUM_COUNTED_STEPS):
        rows.append(0)
        for part in range(parts):
            captions = loader.captions(step * data.batch_size + part * size, size)
            part_rows = sum(int(t[c].sum()) for t, c in zip(tokens, captions, strict=True))
            rows[-1] += part_rows
            if part_rows > most_rows:
                most_rows, most_captions = part_rows, sum(map(len, captions))
    step_rows = statistics.fmean(rows)
    step_bytes = loader.stored_bytes(step_rows, data.batch_size)
    return Reading(most_rows, most_captions, step_rows, step_bytes)


def count_memory(
    model: "Network", config: TrainConfig, reading: Reading, mode: FakeTensorMode, num_ranks: int
) -> dict[str, float]:
    """Bytes that a rank needs on its device, by use."""
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    numbers = sum(parameter.numel() for _, parameter in learning(model))
    states = 0
    for optimizer in make_optimizers(model, config.optimizer):
        copies = 1 if isinstance(optimizer, torch.optim.Muon) else 2
        states += copies * sum(
            p.numel() for group in optimizer.param_groups for p in group["params"]
        )
    parts = num_ranks * config.grad_accum_steps
    hidden = reading.rows * len(model.router.layers_read) * model.text_width
    memory = {
        "weights": stored,
        # DDP reduces gradients in buckets, which are a second copy.
        "gradients": FP32 * numbers * (2 if num_ranks > 1 else 1),
        "optimizer": FP32 * states,
        "average": FP32 * numbers,
        "hidden_states": 2 * BF16 * hidden,  # this batch and the next
        "activations": count_activations(
            model, config, reading, config.data.batch_size // parts, mode
        ),
    }
    return {**memory, "total": sum(memory.values())}


def count_activations(
    model: "Network", config: TrainConfig, reading: Reading, num_samples: int, mode: FakeTensorMode
) -> int:
    """Bytes that autograd keeps of one accumulation step, without parameters and features."""
    layers, width = len(model.router.layers_read), model.text_width
    num = num_samples * config.data.noise_draws
    # Captions have equal lengths, and the last one the remainder too.
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
    checkpointed = forward()
    # The backward pass computes one block at a time again.
    return checkpointed + (everything - checkpointed) // model.depth


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def measure(config: TrainConfig, num_steps: int) -> float:
    """Median seconds of a step on this machine, from steps that are then discarded.

    Raises:
        InputError: whatever training with one process would refuse.
    """
    setup = prepare(config)
    accelerator = make_accelerator(config.model_copy(update={"tracker": "none"}))
    loader = make_loader(setup, num_ranks=accelerator.num_processes)
    path = make_path(setup.record.config.flow, setup.record.pretrained)
    trainer = Trainer(config, accelerator, setup.model, flow=path)
    seconds = []
    with closing(iter(loader)) as read:
        batches = on_device(read, accelerator.device)
        for _ in range(num_steps + 1):
            start = time.perf_counter()
            trainer.take_step(batches, stop=False)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
