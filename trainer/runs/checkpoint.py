"""Checkpoints: weights, optimizer states and step, whole or absent."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...schemas import sync

CHECKPOINTS = "checkpoints"


# ---------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: the state after ``step`` steps."""

    path: Path
    step: int

    def model(self) -> dict[str, Tensor]:
        """Weights by parameter name."""
        return load_file(self.path / "model.safetensors")

    def ema(self) -> dict[str, Tensor]:
        """Their exponential moving average, fp32."""
        return load_file(self.path / "ema.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """As :func:`optimizer_tensors` gave it."""
        return load_file(self.path / "optimizer.safetensors")

    def state(self) -> dict[str, Any]:
        """What the loop keeps beside tensors."""
        return json.loads((self.path / "state.json").read_text("utf-8"))


def list_checkpoints(path: Path) -> list[Checkpoint]:
    """All whole checkpoints of a run, oldest first."""
    found = (path / CHECKPOINTS).glob("step-*")
    whole = [Checkpoint(p, int(p.name[5:])) for p in found if p.name[5:].isdigit()]
    return sorted(whole, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(path: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none."""
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

    Until it has its name nothing older is removed. What a killed save left is removed first. A
    step that has a checkpoint keeps it: a run comes to the same state again.
    """
    folder = path / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:08d}"
    if final.exists():
        return Checkpoint(final, step)
    unfinished = final.with_name(f"{final.name}.tmp")
    unfinished.mkdir()
    for name, tensors in (("model", model), ("ema", ema), ("optimizer", optimizer)):
        whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        _save_tensors(whole, unfinished / f"{name}.safetensors")
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
    """The state of all optimizers, flat: ``<parameter>/<key>`` -> tensor.

    Hyperparameters are not in it: they follow from the configuration and the step.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The same whole, where FSDP2 has cut them up among ranks; all of which must call it.

    Args:
        keep: of this rank, on the CPU; the others get nothing. One whole tensor at a time is on a
            device beside the network.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.cpu()
    return found


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor cut up as a parameter of its shape is, or as it is where that is whole."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)


def load_optimizer_tensors(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what :func:`optimizer_tensors` took."""
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


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The number of the operating system's error, a full disk's above all, is in the text only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
