"""Work of a step on its device: peak memory, and FLOPs against the most that the device can do."""

import resource
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batch import Batch

if TYPE_CHECKING:
    from ..runs.record import Network

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOPs per second in dense bfloat16, from NVIDIA's data sheets, by part of the device's name; of
names that fit, the first counts."""


def peak_flops(name: str, mixed_precision: str) -> float | None:
    """FLOPs per second that a GPU of this name can do in bfloat16; None: not known, or not used."""
    if mixed_precision != "bf16":
        return None
    return next((value for part, value in PEAK_FLOPS.items() if part in name), None)


def device_peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """:func:`peak_flops` of a device."""
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), mixed_precision)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has had: on a GPU of tensors, otherwise in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_flops(model: "Network", batch: Batch, draws: int) -> int:
    """FLOPs of the products of a forward and a backward pass, on tensors without data.

    The backward pass counts as two forward passes; what is recomputed for it does not count.

    Args:
        batch: with t and noise.
        draws: noise draws per sample.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second
    from torch.utils.flop_counter import FlopCounterMode

    assert batch.draws is not None
    assert isinstance(batch.hidden, Tensor)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    t, noise, t_routing = (mode.from_tensor(each) for each in batch.draws.tensors())
    inputs = (noise, t, mode.from_tensor(batch.hidden), batch.offsets)
    extra = {} if batch.conditioning is None else {"conditioning": batch.conditioning}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
        model(*inputs, batch.caption.repeat_interleave(draws), t_routing, **extra)
    return 3 * counter.get_total_flops()
