"""The Accelerate side of training: processes, precision, signals."""

import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import nn

from ...schemas import InputError, TrainConfig
from ...schemas.interrupts import draining
from ...schemas.json_file import load_json
from ..runs.record import is_empty
from .ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from ..runs.record import Network

REPEAT_SECONDS = 1.0
"""A Ctrl-C that follows another one within this time is the same one, passed on by a launcher."""


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An ``Accelerator`` for this configuration.

    Raises:
        InputError: the launcher asks for sharding that checkpoints cannot hold, or its processes do
            not see one another.
    """
    check_tracker(config)
    # A process keeps the settings of its first Accelerator and refuses others, so a notebook that
    # trains twice must drop them. The process group stays.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    # Checked first, because Accelerate would import DeepSpeed, or fail if it is not installed.
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "found DeepSpeed (ACCELERATE_USE_DEEPSPEED is set), expected DDP or FSDP2: launch with "
            "docs/accelerate/ddp.yaml or fsdp2.yaml, see docs/training.md"
        )
    # Qwen-Image's last block computes text that nothing reads.
    unused = config.model.kind == "pretrained" and config.model.train == "full"
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused),
            InitProcessGroupKwargs(timeout=timeout_of(config)),
        ],
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.grad_accum_steps, sync_with_dataloader=False
        ),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started, and Accelerate sees {accelerator.num_processes} "
            "in each. On a CPU set ACCELERATE_USE_CPU=1."
        )
    kind = accelerator.distributed_type.value
    if kind == "MEGATRON_LM" or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise InputError(
            f"{kind} shards optimizer states in a way that checkpoints here cannot hold: use FSDP "
            "with fsdp_version: 2, see docs/accelerate/fsdp2.yaml, or DDP"
        )
    return accelerator


def check_tracker(config: TrainConfig) -> None:
    """Refuse a tracker that is not installed, of which Accelerate would only warn.

    Raises:
        InputError: with the command that installs it.
    """
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        package = config.tracker.replace("_", "-")
        raise InputError(
            f"tracker {config.tracker} is not installed: pip install {package}, or tracker=none"
        )


def timeout_of(config: TrainConfig) -> timedelta:
    """How long ranks wait for one another within a step."""
    return timedelta(minutes=config.timeout_minutes)


def place_network(accelerator: Accelerator, ranks: Ranks, network: "Network") -> None:
    """Move a network to the device, except under FSDP2, which moves one tensor at a time; give a
    network without weights memory for those of the first rank, which :func:`prepare_model` sends.
    """
    # Memory of a CPU that nobody writes to is not taken.
    device = torch.device("cpu") if accelerator.is_fsdp2 else accelerator.device
    dtypes = {name: str(each.dtype).rpartition(".")[2] for name, each in network.named_parameters()}
    first = load_json(ranks.gather(json.dumps(dtypes))[0], "dtypes of the first rank")
    if not is_empty(network):
        network.to(device)
        return
    buffers = {name: buffer.to(device, copy=True) for name, buffer in network.named_buffers()}
    network.to_empty(device=device)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(getattr(torch, first[name]))
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])


def prepare_model(
    accelerator: Accelerator, network: "Network", *optimizers: torch.optim.Optimizer
) -> tuple[nn.Module, list[Any]]:
    """A network and its optimizers, prepared for the ranks and the precision of the launcher; all
    ranks have the weights of the first one.

    Under FSDP2 Accelerate would cast to bfloat16 whatever enters a module, and all weights of the
    router: t, the logits and rotary positions. Here only products are in bfloat16, as under DDP;
    weights are gathered in their own dtype.
    """
    if not accelerator.is_fsdp2:
        model, *prepared = accelerator.prepare(network, *optimizers)
        return model, prepared
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = True  # of the first rank, tensor by tensor
    if accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        network.forward = autocast(network.forward)  # type: ignore[method-assign]
    with _buffers_apart(network):
        model, *prepared = accelerator.prepare(network, *optimizers)
    for buffer in network.buffers():
        torch.distributed.broadcast(buffer, 0)
    return model, prepared


def has_shards(network: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether FSDP2 has sharded a network; see :func:`.is_sharded`."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(network, module.FSDPModule)


@contextmanager
def _buffers_apart(network: nn.Module) -> Iterator[None]:
    """Keep buffers out of the state, all of which Accelerate takes for sharded."""
    changed = []
    for module in network.modules():
        names = module._buffers.keys() - module._non_persistent_buffers_set
        changed.append((module._non_persistent_buffers_set, names))
        module._non_persistent_buffers_set |= names
    yield
    for apart, names in changed:
        apart -= names


def stop_signals(stop: threading.Event) -> AbstractContextManager[None]:
    """SIGTERM and Ctrl-C set an event instead of ending the process.

    A second Ctrl-C interrupts at once, unless it repeats the first: the terminal sends Ctrl-C to
    every process, and a launcher passes it on to its own.

    Outside the main thread Python cannot handle signals, and the event is never set.
    """
    return draining(stop, signal.SIGTERM, signal.SIGINT, again_seconds=REPEAT_SECONDS)
