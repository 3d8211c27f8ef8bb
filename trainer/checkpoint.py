"""The run directory: what a training run leaves, and how to come back to it.

On disk::

    run.json           configuration, identity of the stores, versions
    metrics.jsonl      a line every log_every steps
    checkpoints/       step-00001000/: model, ema and optimizer as safetensors, state.json

A checkpoint is written beside and renamed, so one that has its name is whole. Nothing is pickled.

Shapes: D blocks, L layers.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..pipeline.store import open_features
from ..schemas import (
    SAME_WEIGHTS,
    Facts,
    FeatureIdentity,
    InputError,
    Mixes,
    Routing,
    RunRecord,
    TrainConfig,
    differences,
    parse,
    sync,
    write_document,
)
from .dit import DiT
from .flow import Flow

RECORD = "run.json"
METRICS = "metrics.jsonl"
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
    ]
)
"""A line of ``metrics.jsonl``: after ``step`` steps. Loss and grad_norm (before clipping) are means
since the line before; data_wait_share is the share of that time spent waiting for data; and
routing_entropy is in nats over log L, so 1 is uniform."""

_STORES = {"features", "codec", "latents"}  # keys of a record that say what it was trained on
# Keys of a configuration that may change when a run continues: where things are (the stores are
# compared by identity), and what is kept and shown. None of them changes a weight.
_FREE: Any = {
    "features": True,
    "latents": True,
    "output": True,
    "steps": True,
    "log_every": True,
    "checkpoint_every": True,
    "keep_checkpoints": True,
    "gradient_checkpointing": True,
    "tracker": True,
    "data": {"prefetch"},
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


def start_from(model: DiT, record: RunRecord) -> None:
    """Give a new network the weights of the run that ``config.start`` names.

    Raises:
        InputError: no run with a checkpoint there, one that cannot read these features, or one of
            another architecture; with every key that differs.
    """
    assert record.config.start is not None
    start = load_run(record.config.start)
    start.check_features(record.features)
    different = differences(_network(record, model), _network(start.record, start.model))
    if different:
        listed = "\n  ".join(map(str, different))
        raise InputError(
            f"start: {start.path} is another network; this one, against it:\n  {listed}\n"
            "Train with its numbers, or leave start out."
        )
    own, other = record.config.routing, start.record.config.routing
    kept = all(getattr(own, key) == getattr(other, key) for key in ("strategy", "rank", "layers"))
    weights = start.model.state_dict()
    names = [name for name in model.state_dict() if kept or not name.startswith("router.")]
    model.load_state_dict({name: weights[name] for name in names}, strict=False)


def _network(record: RunRecord, model: DiT) -> dict[str, Any]:
    """What weights must agree in to be those of one network, but for its router."""
    return {
        **asdict(model.size),
        "width_read": model.context.in_features,
        "patch_size": model.patch_size,
        "conditioning": record.config.model.conditioning,
        "prediction": record.config.flow.prediction,
        "latents": [*record.latents.shape],
    }


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
            number: by_name[names[parameter]]
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
        foreign = sorted(present - {f"{RECORD}.tmp"})
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
    return config.model_dump(mode="json", exclude=_FREE)


# -------------------------------------------------------------------------------------- metrics


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; a last line that was cut off by a kill is left out."""
    file = path / METRICS
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def trim_metrics(path: Path, step: int) -> None:
    """Remove lines after ``step``: a run that continues there writes them again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_document(path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


# -------------------------------------------------------------------------------------- reading


class Run:
    """A training run, opened at one checkpoint: ``run.model``, ``run.flow``, ``run.weights()``.

    Attributes:
        path: the run directory.
        record: its ``run.json``.
        step: steps done at this checkpoint.
        source: which weights the model has, ``ema`` or ``model``.
        model: in evaluation mode, on the CPU.
        flow: for :func:`semroute.trainer.sampling.sample`.
    """

    def __init__(self, path: Path, record: RunRecord, step: int, source: str, model: DiT) -> None:
        self.path = path
        self.record = record
        self.step = step
        self.source = source
        self.model = model
        self.flow = Flow.from_config(record.config.flow)

    @property
    def layers(self) -> list[int]:
        """LLM layers that alpha weighs, in its order."""
        return list(self.model.router.layers)

    def weights(
        self,
        t: Sequence[float] | np.ndarray | None = None,
        hidden: torch.Tensor | None = None,
    ) -> np.ndarray:
        """The routing weights alpha: float32 [len(t), D, L], each row of L summing to 1 unless
        weights are signed.

        Args:
            t: noise levels. By default 21 of them from 0 to 1 where alpha depends on t, and
                otherwise one (any).
            hidden: where tokens weigh layers each for itself, the tokens to take the mean over,
                [R, L, H]. By default the first 64 captions of the store that the run was trained
                on.

        Raises:
            InputError: that store is needed, and is not there or another by now.
        """
        router = self.model.router
        if t is None:
            t = np.linspace(0, 1, 21) if router.depends_on_t else [1.0]
        levels = torch.as_tensor(np.asarray(t, np.float32))
        device = next(self.model.parameters()).device
        if hidden is None and router.depends_on_content:
            features = open_features(self.record.config.features)
            self.check_features(features.manifest.identity)
            ids = range(min(len(features), 64))
            hidden = features.read(ids, router.layers_read).tensor()
        with torch.no_grad():
            alpha = router.alpha(levels.to(device), None if hidden is None else hidden.to(device))
        shape = (len(levels), self.model.size.depth, len(self.layers))
        return alpha.expand(shape).cpu().numpy().copy()

    def routing(self, identity: FeatureIdentity | None = None) -> Routing:
        """The weights that all of its blocks read with, to mix features by.

        Args:
            identity: of these features, if they are to be checked.

        Raises:
            InputError: the weights depend on t, or the features are of another LLM or template.
        """
        if identity is not None:
            self._check_identity(identity, {"layers", "final_norm", "mixes"})
        mixes = self.record.features.mixes
        if mixes is not None:
            return Routing(**mixes.model_dump(include=set(Routing.model_fields)))
        layers, weights = self.model.router.fixed_weights()
        values = {"step": self.step, "source": self.source, "layers": layers}
        strategy = self.record.config.routing.strategy
        return Routing.model_validate(values | {"strategy": strategy, "weights": weights.tolist()})

    def check_features(self, identity: FeatureIdentity) -> None:
        """Refuse features that this run cannot read: they must come from the same LLM, template,
        layers and dtype, or be mixes of its layers with its weights; the captions may be others.

        Raises:
            InputError: with every key that differs, and both values.
        """
        if identity.mixes is not None:
            self._check_identity(identity, {"layers", "final_norm", "mixes"})
            self._check_mixes(identity.mixes)
        elif self.record.features.mixes is not None:
            raise InputError(
                f"{self.path} was trained on mixes of layers, but these features hold layers: mix "
                f"them with semroute rewrite --routing {self.path}"
            )
        else:
            self._check_identity(identity, set())

    def _check_identity(self, identity: FeatureIdentity, free: set[str]) -> None:
        free = free | {"captions", "samples", "max_length"}
        different = differences(
            identity.model_dump(mode="json", exclude=free),
            self.record.features.model_dump(mode="json", exclude=free),
        )
        if different:
            listed = "\n  ".join(map(str, different))
            raise InputError(
                f"{self.path} was trained on other features; those given, against its own:"
                f"\n  {listed}\nExtract the captions with the run's model and options."
            )

    def _check_mixes(self, mixes: Mixes) -> None:
        own = self.routing()
        distance = mixes.distance(own.layers, own.weights)
        if distance <= SAME_WEIGHTS:
            return
        keys = {"strategy", "step", "source", "layers"}
        different = differences(mixes.model_dump(include=keys), own.model_dump(include=keys))
        apart = f"up to {distance:.1e} apart"
        if math.isinf(distance):
            apart = f"{len(mixes.weights)} blocks over {len(mixes.layers)} layers instead of "
            apart += f"{len(own.weights)} over {len(own.layers)}"
        lines = [*(f"mixes.{difference}" for difference in different), f"mixes.weights: {apart}"]
        listed = "\n  ".join(lines)
        raise InputError(
            f"the features are mixes for another run, or for other weights of {self.path}; those "
            f"given, against its own:\n  {listed}\n"
            f"Rewrite the features with --routing {self.path}, or give those with all layers."
        )

    def metrics(self) -> pa.Table:
        """The lines of ``metrics.jsonl`` (:data:`METRICS_SCHEMA`), whatever the checkpoint."""
        return pa.Table.from_pylist(read_metrics(self.path), schema=METRICS_SCHEMA)

    def facts(self) -> Facts:
        """What this run is, for a repr."""
        config, model = self.record.config, self.model
        last = next(reversed(read_metrics(self.path)), None)
        size = model.size
        items = {
            "strategy": f"{config.routing.strategy}, over layers {self.layers[0]} to "
            f"{self.layers[-1]} ({len(self.layers)} of {self.record.features.model.num_layers})",
            "model": f"{config.model.size}: {size.depth} blocks of width {size.width}, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{sum(p.numel() for p in model.router_parameters()):,} of them routing",
            "latents": " x ".join(map(str, self.record.latents.shape))
            + f", {config.flow.prediction} prediction, shift {config.flow.shift:g}",
            "step": f"{self.step:,} of {config.steps:,}, weights: {self.source}",
            "text": self.record.model_source,
        }
        if last is not None:
            items["loss"] = f"{last['loss']:.5g} at step {last['step']:,}"
        return Facts(f"Run {self.path}", items)

    def __repr__(self) -> str:
        return str(self.facts())

    def _repr_html_(self) -> str:
        return self.facts()._repr_html_()


def load_run(
    path: str | os.PathLike[str],
    step: int | None = None,
    weights: Literal["ema", "model"] = "ema",
) -> Run:
    """Open a run to look at, sample from or plot.

    Args:
        step: which checkpoint, by default the newest.
        weights: the exponential moving average, or the weights themselves.

    Raises:
        InputError: no run there, no such checkpoint, or no such weights.
    """
    if weights not in ("ema", "model"):
        raise InputError(f"weights is {weights!r}; expected 'ema' or 'model'")
    path = Path(path)
    record = read_record(path)
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(path)}
    if not found:
        raise InputError(
            f"{path} has no checkpoint yet: the first is written after "
            f"{min(record.config.checkpoint_every, record.config.steps):,} steps"
        )
    if step is not None and step not in found:
        raise InputError(f"{path} has no checkpoint of step {step}; it has {sorted(found)}")
    checkpoint = found[max(found) if step is None else step]
    model = build_model(record)
    model.load_state_dict(checkpoint.ema() if weights == "ema" else checkpoint.model())
    return Run(path, record, checkpoint.step, weights, model.eval().requires_grad_(False))


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        # The number of the operating system's error, a full disk's above all, is in the text only.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
