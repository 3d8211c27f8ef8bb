"""The run directory: what a training run leaves, and how to come back to it.

On disk::

    run.json           configuration, identity of the stores, versions
    driver.json        while it is trained: the process that does
    metrics.jsonl      a line every log_every steps
    routing.jsonl      the weights of layers, about 200 times a run
    checkpoints/       step-00001000/: model, ema and optimizer as safetensors, state.json

A checkpoint is written beside and renamed, so one that has its name is whole. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..schemas import (
    DRIVER,
    InputError,
    RunRecord,
    TrainConfig,
    differences,
    parse,
    sync,
    write_document,
)
from .dit import DiT

RECORD = "run.json"
METRICS = "metrics.jsonl"
WEIGHTS = "routing.jsonl"
CHECKPOINTS = "checkpoints"
METRICS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("grad_norm", pa.float64(), nullable=False),
        pa.field("lr", pa.float64(), nullable=False),
        pa.field("samples_per_second", pa.float64(), nullable=False),
        pa.field("data_wait_share", pa.float64(), nullable=False),
        pa.field("routing_entropy", pa.float64(), nullable=False),
        pa.field("validation_loss", pa.float64()),
        pa.field("validation_by_t", pa.list_(pa.float64())),
    ]
)
"""A line of ``metrics.jsonl``: after ``step`` steps. Loss and grad_norm (before clipping) are means
since the line before; data_wait_share is the share of that time spent waiting for data; and
routing_entropy is in nats over log L, so 1 is uniform. Where it was measured, validation_by_t is
the loss on held-out samples in equal parts of t from 0 to 1, and validation_loss their mean."""

# Keys of a record that say what it was trained on, and measured by.
_STORES = {"features", "codec", "latents", "validation", "selection", "mixture"}
# Keys of a configuration that may change when a run continues: where things are (the stores are
# compared by identity), and what is kept and shown. None of them changes a weight.
FREE: Any = {
    "features": True,
    "latents": True,
    "output": True,
    "steps": True,
    "log_every": True,
    "checkpoint_every": True,
    "keep_checkpoints": True,
    "gradient_checkpointing": True,
    "tracker": True,
    "data": {
        "prefetch": True,
        "workers": True,
        "select": {"columns"},
        "mixture": {"__all__": {"features": True, "latents": True, "select": {"columns"}}},
    },
    "validation": {"every", "features", "latents"},
}


# ------------------------------------------------------------------------------------- run.json


def build_model(record: RunRecord) -> DiT:
    """The network that a record describes, its fresh weights a function of ``config.seed``."""
    llm = record.features.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.config.seed)
        return DiT(
            record.config.model,
            record.config.routing,
            latent_shape=record.latents.shape,
            layers=record.features.layers,
            num_llm_layers=llm.num_layers,
            text_width=llm.width,
            mixes=record.features.mixes,
        )


def write_record(path: Path, record: RunRecord) -> None:
    """Write ``run.json``, whole or not at all."""
    write_document(path / RECORD, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        InputError: it is not there, or damaged.
    """
    file = path / RECORD
    try:
        document = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is no run: it has no {RECORD}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    return parse(RunRecord, document, str(file))


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


def find_run(path: Path, record: RunRecord) -> tuple[RunRecord, Checkpoint | None]:
    """The run to continue in a directory, or a new one.

    Returns:
        The record to write, and the checkpoint to continue from (None: from the start).

    Raises:
        InputError: the directory holds something else, or a run that this is not.
    """
    if not (path / RECORD).exists():
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; expected a new folder for the run")
        present = {p.name for p in path.iterdir()} if path.exists() else set()
        foreign = sorted(present - {f"{RECORD}.tmp", DRIVER})
        if foreign:
            raise InputError(
                f"{path} is not empty and no run: it holds {', '.join(foreign[:5])} but no "
                f"{RECORD}. Name a new folder."
            )
        return record, None
    before = read_record(path)
    stores = differences(
        record.model_dump(mode="json", include=_STORES),
        before.model_dump(mode="json", include=_STORES),
    )
    changed = differences(_fixed(record.config), _fixed(before.config))
    if record.config.steps < before.config.steps or (
        record.config.steps > before.config.steps and record.config.optimizer.schedule != "constant"
    ):
        changed += differences({"steps": record.config.steps}, {"steps": before.config.steps})
    if stores or changed:
        listed = "\n  ".join(map(str, (*stores, *changed)))
        raise InputError(
            f"{path} is another run; what you asked for now, against what it has:\n  {listed}\n"
            "Run the command as it was, or name a new folder. (steps may grow, where "
            "optimizer.schedule is constant.)"
        )
    kept = before.model_copy(update={"config": record.config, "versions": record.versions})
    return kept, latest_checkpoint(path)


def _fixed(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=FREE)


# -------------------------------------------------------------------------------------- metrics


def read_metrics(path: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``, or of ``routing.jsonl``; a last line that was cut off by a kill
    is left out."""
    file = path / name
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def add_line(path: Path, name: str, line: Mapping[str, Any]) -> None:
    """Append a line to ``metrics.jsonl`` or ``routing.jsonl``."""
    with (path / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def trim_metrics(path: Path, step: int) -> None:
    """Remove lines after ``step``: a run that continues there writes them again."""
    for name in (METRICS, WEIGHTS):
        if name == METRICS or (path / name).exists():
            kept = [line for line in read_metrics(path, name) if line["step"] <= step]
            write_document(path / name, "".join(json.dumps(line) + "\n" for line in kept))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The number of the operating system's error, a full disk's above all, is in the text only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
