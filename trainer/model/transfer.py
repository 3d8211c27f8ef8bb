"""Small tensors on their way to a device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for the device.

    A GPU copies from pageable memory only after all that it has to do before; so the tensor goes
    through pinned memory, of torch's own allocator, which does not reuse it before the copy.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))
