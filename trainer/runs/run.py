"""A run that is opened at a checkpoint: to inspect, sample from or plot.

Shapes: T noise levels, D blocks, L layers.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ...schemas import FeatureIdentity, InputError, Routing, RunRecord, Summary
from ..adapters.paths import make_path
from ..diffusion.sampling import SamplingDtype
from .compatibility import check_features, check_llm
from .metrics import METRICS, METRICS_SCHEMA, WEIGHTS, read_metrics
from .noise_level import make_clock
from .record import (
    build_model,
    choose_checkpoint,
    load_trained,
    put_llm_weights,
    read_llm_weights,
    read_record,
)

if TYPE_CHECKING:
    from ...pipeline.style import Figure
    from ..diffusion.sampling import NoiseLevelMap
    from ..model.router import Router
    from .record import Network


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

    def __init__(
        self, path: Path, record: RunRecord, step: int, source: str, model: "Network"
    ) -> None:
        self.path = path
        self.record = record
        self.step = step
        self.source = source
        self.model = model
        self.flow = make_path(record.config.flow, record.pretrained)

    @property
    def router(self) -> "Router":
        """The router of the model."""
        return self.model.router

    @property
    def num_blocks(self) -> int:
        """Number of mixes that the router makes (D)."""
        return self.model.num_blocks

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
            t: noise levels. Default: 21 of them from 0 to 1 if alpha depends on t, otherwise one
                (any).
            hidden: tokens to average over, [R, L, H], if each token has its own weights. Default:
                the first 64 captions of the store that the run was trained on.

        Raises:
            InputError: that store is needed, but it is missing or has changed since.
        """
        router = self.router
        if t is None:
            t = np.linspace(0, 1, 21) if router.depends_on_t else [1.0]
        levels = torch.as_tensor(np.asarray(t, np.float32))
        device = next(self.model.parameters()).device
        if hidden is None and router.depends_on_content:
            from ...pipeline.store.open import open_features

            features = open_features(self.record.config.features)
            self.check_features(features.manifest.identity)
            ids = range(min(len(features), 64))
            hidden = features.read(ids, router.layers_read).tensor()
        read = None if hidden is None else hidden.to(device)
        return router.table(levels.to(device), self.num_blocks, read).numpy()

    def to_xarray(self, t: Sequence[float] | np.ndarray | None = None) -> Any:
        """:meth:`weights` as an xarray DataArray with the dimensions ``block`` (from 1), ``layer``
        (of the LLM) and ``t``.

        Args:
            t: as for :meth:`weights`; if they do not depend on it, its one value is 1.0.

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
        """The weights that its blocks read with, to mix features by.

        Args:
            identity: features to check against those of the run.

        Raises:
            InputError: the weights depend on t, or the features are of another LLM or template.
        """
        if identity is not None:
            check_llm(self, identity)
        mixes = self.record.features.mixes
        if mixes is not None:
            return Routing(**mixes.model_dump(include=set(Routing.model_fields)))
        layers, weights = self.model.router.fixed_weights()
        values = {"step": self.step, "source": self.source, "layers": layers}
        strategy = self.record.config.routing.strategy
        return Routing.model_validate(values | {"strategy": strategy, "weights": weights.tolist()})

    def check_features(self, identity: FeatureIdentity) -> None:
        """Refuse features that this run cannot read.

        They must come from the same LLM, template, layers and dtype, or be mixes of its layers with
        its weights. The captions may differ.

        Raises:
            InputError: with every key that differs, and both values.
        """
        check_features(self, identity)

    def clock(self, name: str) -> "NoiseLevelMap | None":
        """The noise level that routing reads instead of the nominal t; see
        :func:`.noise_level.make_clock`.

        Raises:
            InputError: routing does not depend on t, the name is unknown, or a store is missing
                that is needed for calibration.
        """
        config = self.record.config
        if name != "nominal" and not self.model.router.depends_on_t:
            raise InputError(
                f"{self.path}: strategy {config.routing.strategy} does not depend on t, so clock "
                f"{name} would change nothing: omit it"
            )
        return make_clock(name, self.path, config.latents)

    def sampling_dtype(self, name: Literal["auto", "float32", "bfloat16"]) -> SamplingDtype:
        """Precision of matrix products in sampling; ``auto``: bfloat16 on a GPU if the run was
        trained so, otherwise float32."""
        if name != "auto":
            return name
        on_gpu = next(self.model.parameters()).device.type == "cuda"
        trained = self.record.config.mixed_precision == "bf16"
        return "bfloat16" if on_gpu and trained else "float32"

    def latent_shape(self, size: str | None) -> tuple[int, int, int] | None:
        """Latent shape of images of a size that the run was trained on.

        Args:
            size: ``HEIGHTxWIDTH`` in pixels. None: the run's default.

        Returns:
            None for the default.

        Raises:
            InputError: the run was not trained on this size.
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
        """``metrics.jsonl`` as a table (:data:`METRICS_SCHEMA`), also beyond the checkpoint."""
        try:
            return pa.Table.from_pylist(read_metrics(self.path), schema=METRICS_SCHEMA)
        except pa.ArrowException as error:
            raise InputError(f"{self.path / METRICS} is damaged: {error}") from error

    def history(self) -> tuple[np.ndarray, list[float], np.ndarray]:
        """Routing weights over the whole training, also after the checkpoint; computed from the
        weights themselves, not from their average.

        Returns:
            Steps int64 [S], noise levels (one, any, if weights do not depend on t), and alpha
            float32 [S, T, D, L]. S is 0 if weights are not learned.
        """
        lines = read_metrics(self.path, WEIGHTS)
        levels = lines[0]["t"] if lines else [1.0]
        shape = (len(lines), len(levels), self.model.num_blocks, len(self.layers))
        weights = np.empty(shape, np.float32)
        for number, line in enumerate(lines):
            weights[number] = np.asarray(line["weights"], np.float32)
        return np.array([line["step"] for line in lines], np.int64), levels, weights

    def figures(self) -> "dict[str, Figure]":
        """Name -> figure: ``loss`` once anything is logged, ``validation`` if it was measured,
        ``routing``, for strategies that depend on t ``routing-over-time``, for learned weights
        ``routing-over-steps``, and after an evaluation ``accuracy-cfg-S`` for each guidance scale
        S."""
        from .figures import make_figures

        return make_figures(self)

    def facts(self) -> Summary:
        """Summary of this run, for its repr."""
        config, features, model = self.record.config, self.record.features, self.model
        layers, buckets = self.layers, self.record.latents.buckets
        shape = " x ".join(map(str, self.record.latents.shape))
        others = f" and other shapes of {len(buckets)} buckets" if buckets else ""
        num_parameters = sum(p.numel() for p in model.parameters())
        num_routing = sum(p.numel() for p in model.router_parameters())
        items = {
            "strategy": f"{config.routing.strategy}, over layers {layers[0]} to {layers[-1]} "
            f"({len(layers)} of {features.model.num_layers})",
            "model": f"{model.describe()}, {num_parameters:,} parameters, {num_routing:,} of them "
            "routing",
            "latents": f"{shape}{others}, {config.flow.prediction} prediction, "
            f"shift {config.flow.shift:g}",
            "step": f"{self.step:,} of {config.steps:,}, weights: {self.source}",
            "text": self.record.model_source,
        }
        if lines := read_metrics(self.path):
            items["loss"] = f"{lines[-1]['loss']:.5g} at step {lines[-1]['step']:,}"
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
    """Open a run to inspect, sample from or plot.

    Args:
        step: step of the checkpoint. Default: the newest.
        weights: the exponential moving average, or the weights themselves.

    Raises:
        InputError: there is no run, no such checkpoint, or no such weights.
    """
    if weights not in ("ema", "model"):
        raise InputError(f"weights is {weights!r}; expected 'ema' or 'model'")
    path = Path(path)
    record = read_record(path)
    checkpoint = choose_checkpoint(path, record, step)
    model = build_model(record)
    if record.llm_attention is not None:
        put_llm_weights(model, read_llm_weights(path, record))
    load_trained(model, checkpoint.ema() if weights == "ema" else checkpoint.model())
    return Run(path, record, checkpoint.step, weights, model.eval().requires_grad_(False))


def open_run(path: Path, step: int | None, weights: Literal["ema", "model"]) -> Run:
    """Open a run to sample from, on the GPU if there is one; see :func:`load_run`.

    With several GPUs ``LOCAL_RANK`` chooses, which torchrun and ``accelerate launch`` set.
    """
    run = load_run(path, step, weights)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    run.model.to(device)
    return run
