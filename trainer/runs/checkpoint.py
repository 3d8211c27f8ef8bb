"""Checkpoints: weights, optimizer states and step, complete or absent."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...schemas import sync
from ...schemas.json_file import read_json
from ...schemas.tensor_files import save_tensors
from .metrics import refuse_gone

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: the state after ``step`` steps."""

    path: Path
    step: int

    def model(self) -> dict[str, Tensor]:
        """Weights by parameter name."""
        return load_file(self.path / "model.safetensors")

    def ema(self) -> dict[str, Tensor]:
        """Exponential moving average of the weights, fp32."""
        return load_file(self.path / "ema.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """States of the optimizers, named as in :func:`optimizer_tensors`."""
        return load_file(self.path / "optimizer.safetensors")

    def state(self) -> dict[str, Any]:
        """State of the training loop besides tensors."""
        return read_json(self.path / "state.json", follow=True)


def list_checkpoints(path: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first."""
    folders = (path / CHECKPOINTS).glob("step-*")
    complete = [Checkpoint(p, int(p.name[5:])) for p in folders if p.name[5:].isdigit()]
    return sorted(complete, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(path: Path) -> Checkpoint | None:
    """The newest complete checkpoint, if any."""
    return next(reversed(list_checkpoints(path)), None)


def save_checkpoint(
    path: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Write a checkpoint, then remove all but the newest ``keep``.

    Older ones are removed only after the new one has its final name, and leftovers of a killed save
    before it is written. An existing checkpoint of this step is kept: its state is the same.

    Raises:
        InputError: the run's directory is gone.
    """
    refuse_gone(path)
    folder = path / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:08d}"
    if final.exists():
        return Checkpoint(final, step)
    unfinished = final.with_name(f"{final.name}.tmp")
    unfinished.mkdir()
    for name, tensors in (("model", model), ("ema", ema), ("optimizer", optimizer)):
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_tensors(whole, unfinished / f"{name}.safetensors")
    (unfinished / "state.json").write_text(json.dumps({**state, "step": step}) + "\n", "utf-8")
    for file in (*unfinished.iterdir(), unfinished):
        sync(file)
    unfinished.rename(final)
    sync(folder)
    for old in list_checkpoints(path)[:-keep]:
        shutil.rmtree(old.path)
    return Checkpoint(final, step)


def optimizer_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """States of all optimizers, flat: ``<parameter>/<key>`` -> tensor.

    Hyperparameters are left out: they follow from the configuration and the step.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, from the parts that ranks have under FSDP2. All ranks must call it.

    A device holds one whole tensor at a time besides the network.

    Args:
        keep: return them on this rank; otherwise it only takes part, and returns nothing.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = whole.cpu()
    return gathered


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor like a parameter of its shape, if FSDP2 shards that parameter."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)


def load_optimizer_tensors(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restore optimizers from what :func:`optimizer_tensors` returned."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        by_name.setdefault(name, {})[field] = value
    for optimizer in optimizers:
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {k: cut_like(v, parameter) for k, v in by_name[names[parameter]].items()}
            for number, parameter in enumerate(ordered)
            if names[parameter] in by_name
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
