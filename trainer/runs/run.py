"""A run opened to look at, to sample from, or to start another one from.

Shapes: T noise levels, D blocks, L layers.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ...pipeline.store.open import open_features
from ...pipeline.style import DPI
from ...schemas import (
    SAME_WEIGHTS,
    FeatureIdentity,
    InputError,
    Mixes,
    Routing,
    RunRecord,
    Summary,
    differences,
    refuse_differences,
)
from ..diffusion.flow import Flow
from ..diffusion.sampling import NoiseLevelMap
from ..model.dit import DiT
from .checkpoint import list_checkpoints
from .metrics import METRICS_SCHEMA, WEIGHTS, read_metrics
from .noise_level import make_clock
from .record import build_model, read_record
from .scores import EvaluationReport

if TYPE_CHECKING:
    from ...pipeline.style import Figure


NUM_T = 65
"""Noise levels at which figures show weights that depend on t."""


class Run:
    """A training run, opened at one checkpoint: ``run.model``, ``run.flow``, ``run.weights()``.

    Attributes:
        path: the run directory.
        record: its ``run.json``.
        step: steps done at this checkpoint.
        source: which weights the model has, ``ema`` or ``model``.
        model: in evaluation mode, on the CPU.
        flow: for :func:`semroute.trainer.diffusion.sampling.sample`.
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

    def to_xarray(self, t: Sequence[float] | np.ndarray | None = None) -> Any:
        """:meth:`weights` as an xarray DataArray with the dimensions ``block`` (from 1), ``layer``
        (of the LLM) and ``t``.

        Args:
            t: as for :meth:`weights`; where they do not depend on it there is one, 1.0.

        Raises:
            ImportError: xarray is not installed.
        """
        import xarray

        if t is None:
            t = np.linspace(0, 1, 21) if self.model.router.depends_on_t else [1.0]
        alpha = self.weights(t)  # [T, D, L]
        return xarray.DataArray(
            alpha.transpose(1, 2, 0),
            name="alpha",
            dims=("block", "layer", "t"),
            coords={
                "block": np.arange(1, alpha.shape[1] + 1),
                "layer": self.layers,
                "t": np.asarray(t, np.float64),
            },
            attrs={
                "strategy": self.record.config.routing.strategy,
                "step": self.step,
                "weights": self.source,
            },
        )

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
        refuse_differences(
            different,
            f"{self.path} was trained on other features; those given, against its own",
            "Extract the captions with the run's model and options.",
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
        refuse_differences(
            lines,
            f"the features are mixes for another run, or for other weights of {self.path}; those "
            "given, against its own",
            f"Rewrite the features with --routing {self.path}, or give those with all layers.",
        )

    def clock(self, name: str) -> NoiseLevelMap | None:
        """What gates are told in place of the nominal t; see :func:`.clock.make_clock`.

        Raises:
            InputError: a clock where routing does not depend on t, an unknown name, or a store that
                is needed to calibrate it and is not there.
        """
        config = self.record.config
        if name != "nominal" and not self.model.router.depends_on_t:
            raise InputError(
                f"{self.path}: strategy {config.routing.strategy} does not depend on t, so clock "
                f"{name} would change nothing: leave it out"
            )
        return make_clock(name, self.path, config.latents)

    def latent_shape(self, size: str | None) -> tuple[int, int, int] | None:
        """Shape of the latents of pictures of a size, one of those that were trained on.

        Args:
            size: ``HEIGHTxWIDTH`` in pixels. None: the run's usual one.

        Raises:
            InputError: no such size.
        """
        if size is None:
            return None
        stores = [self.record.latents, *(other.latents for other in self.record.mixture)]
        known = {f"{b.height}x{b.width}": b.shape for store in stores for b in store.buckets}
        if size not in known:
            listed = ", ".join(known) if known else "none: all its latents have one shape"
            raise InputError(f"{self.path} was not trained on {size}; its sizes are {listed}")
        return known[size]

    def metrics(self) -> pa.Table:
        """The lines of ``metrics.jsonl`` (:data:`METRICS_SCHEMA`), whatever the checkpoint."""
        return pa.Table.from_pylist(read_metrics(self.path), schema=METRICS_SCHEMA)

    def history(self) -> tuple[np.ndarray, list[float], np.ndarray]:
        """Routing weights while they were learned, whatever the checkpoint; of the weights
        themselves, not of their average.

        Returns:
            Steps int64 [S], noise levels (one, any, where weights do not depend on t), and alpha
            float32 [S, T, D, L]. S is 0 where weights are not learned.
        """
        lines = read_metrics(self.path, WEIGHTS)
        levels = lines[0]["t"] if lines else [1.0]
        shape = (len(lines), len(levels), self.model.size.depth, len(self.layers))
        weights = np.empty(shape, np.float32)
        for number, line in enumerate(lines):
            weights[number] = np.asarray(line["weights"], np.float32)
        return np.array([line["step"] for line in lines], np.int64), levels, weights

    def figures(self) -> "dict[str, Figure]":
        """Name -> figure: ``loss`` once anything is logged, ``validation`` where it was measured,
        ``routing``, for strategies that depend on t ``routing-over-time``, where weights are
        learned ``routing-over-steps``, and once it was evaluated ``accuracy-cfg-S`` for each
        guidance scale S."""
        from ..plots.routing import routing_heatmap, routing_over_steps, routing_over_time
        from ..plots.scores import accuracy_bars
        from ..plots.training import loss_curve, validation_curves

        strategy = self.record.config.routing.strategy
        figures: dict[str, Figure] = {}
        metrics = self.metrics()
        if metrics.num_rows:
            figures["loss"] = loss_curve(metrics, f"Training loss, {strategy}")
        if metrics["validation_loss"].null_count < metrics.num_rows:
            title = f"Loss on held-out samples, {strategy}"
            figures["validation"] = validation_curves(metrics, title)
        title = f"Routing weights, {strategy}"
        if self.model.router.depends_on_t:
            t = np.linspace(0, 1, NUM_T)
            weights = self.weights(t)
            mean = f"{title}, mean over t"
            figures["routing"] = routing_heatmap(weights.mean(0), self.layers, mean)
            over = f"Routing weights over the noise level, {strategy}"
            figures["routing-over-time"] = routing_over_time(weights, t, self.layers, over)
        else:
            figures["routing"] = routing_heatmap(self.weights()[0], self.layers, title)
        steps, _, weights = self.history()
        if len(steps) > 1:
            over = f"Routing weights over the steps, {strategy}"
            figures["routing-over-steps"] = routing_over_steps(
                weights.mean(1), steps, self.layers, over
            )
        report = EvaluationReport.read(self.path)
        for cfg_scale, evaluation in ({} if report is None else report.scores).items():
            assert report is not None
            title = f"Accuracy by skill, {strategy}, step {report.step:,}, guidance {cfg_scale:g}"
            figures[f"accuracy-cfg-{cfg_scale:g}"] = accuracy_bars(evaluation.table, title)
        return figures

    def facts(self) -> Summary:
        """What this run is, for a repr."""
        config, model = self.record.config, self.model
        last = next(reversed(read_metrics(self.path)), None)
        size, buckets = model.size, self.record.latents.buckets
        items = {
            "strategy": f"{config.routing.strategy}, over layers {self.layers[0]} to "
            f"{self.layers[-1]} ({len(self.layers)} of {self.record.features.model.num_layers})",
            "model": f"{config.model.size}: {size.depth} blocks of width {size.width}, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{sum(p.numel() for p in model.router_parameters()):,} of them routing",
            "latents": " x ".join(map(str, self.record.latents.shape))
            + (f" and other shapes of {len(buckets)} buckets" if buckets else "")
            + f", {config.flow.prediction} prediction, shift {config.flow.shift:g}",
            "step": f"{self.step:,} of {config.steps:,}, weights: {self.source}",
            "text": self.record.model_source,
        }
        if last is not None:
            items["loss"] = f"{last['loss']:.5g} at step {last['step']:,}"
        return Summary(f"Run {self.path}", items)

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


def open_start(model: DiT, record: RunRecord) -> Run | None:
    """The run that ``config.start`` names, its moving average; None where it names none.

    Args:
        model: the network that is to start from it; only its numbers are looked at.

    Raises:
        InputError: no run with a checkpoint there, one that cannot read these features, or one of
            another architecture; with every key that differs.
    """
    if record.config.start is None:
        return None
    start = load_run(record.config.start)
    start.check_features(record.features)
    refuse_differences(
        differences(_network(record, model), _network(start.record, start.model)),
        f"start: {start.path} is another network; this one, against it",
        "Train with its numbers, or leave start out.",
    )
    return start


def start_from(model: DiT, record: RunRecord, start: Run) -> None:
    """Give a new network the weights of :func:`open_start`'s; the router's where it is alike."""
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


def open_run(path: Path, step: int | None, weights: Literal["ema", "model"]) -> Run:
    """A run to sample from, on the GPU where there is one; see :func:`load_run`.

    Of several GPUs it is that of ``LOCAL_RANK``, which torchrun and ``accelerate launch`` set.
    """
    run = load_run(path, step, weights)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    run.model.to(device)
    return run


def plot_run(run: Run, out: str | Path) -> list[Path]:
    """Write the figures of a run as PNG into the folder ``out``; their paths in the order
    written."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = run.figures()
    paths = [out / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths
