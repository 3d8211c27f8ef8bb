"""The Accelerate side of training: processes, precision, signals."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ...schemas import InputError, TrainConfig
from ...schemas.interrupts import draining

if TYPE_CHECKING:
    from ..runs.record import Network

REPEAT_SECONDS = 1.0
"""A Ctrl-C that follows another one within this time is the same one, passed on by a launcher."""


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An ``Accelerator`` for this configuration.

    Raises:
        InputError: the launcher asks for sharding that checkpoints cannot hold, or its processes do
            not see one another.
    """
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
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
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


def prepare_model(
    accelerator: Accelerator, network: "Network", *optimizers: torch.optim.Optimizer
) -> tuple[nn.Module, list[Any]]:
    """A network and its optimizers, prepared for the ranks and the precision of the launcher.

    Under FSDP2 Accelerate would cast to bfloat16 whatever enters a module, and all weights of the
    router: t, the logits and rotary positions. Here only products are in bfloat16, as under DDP;
    weights are gathered in their own dtype.
    """
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        network.forward = autocast(network.forward)  # type: ignore[method-assign]
    model, *prepared = accelerator.prepare(network, *optimizers)
    return model, prepared


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets instead of ending the process.

    A second Ctrl-C interrupts at once, unless it repeats the first: the terminal sends Ctrl-C to
    every process, and a launcher passes it on to its own.

    Outside the main thread Python cannot handle signals, and the event is never set.
    """
    stop = threading.Event()
    with draining(stop, signal.SIGTERM, signal.SIGINT, again_seconds=REPEAT_SECONDS):
        yield stop
