"""Lag: effective minus nominal noise level along the sampling trajectories of a run.

After every step the noise level is estimated from x_t alone, and once more on a control, the
trajectory's final latents with fresh noise of the nominal t. The deviation on the control is the
estimator's own error on these images; lag is the deviation on the trajectory beyond it. For
Gaussian data and the exact probability-flow ODE, whose latents have the nominal level at every t,
lag is zero.

The end of a trajectory is no measure of its noise: it is a function of the noise that the
trajectory began with, so part of that noise lies along it and would count as signal.

Shapes: B batch, S steps, N captions.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...pipeline.style import DPI, FAINT, INK, LINES, Figure, clean
from ...schemas import write_whole
from ...schemas.display import Table
from ..diffusion.noise_level import NoiseLevelEstimator, shifted
from ..diffusion.sampling import SamplingConfig
from .generate import Features, generate, stored_captions

if TYPE_CHECKING:
    from ..runs.run import Run

LAG = "lag.parquet"
LAG_SCHEMA = pa.schema(
    [
        pa.field("cfg_scale", pa.float64(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("t", pa.float64(), nullable=False),
        *(
            pa.field(name, pa.float64(), nullable=False)
            for name in ("estimate_mean", "estimate_sd", "estimate_control", "outside")
        ),
        pa.field("num_captions", pa.int64(), nullable=False),
    ]
)
"""One row per guidance scale, method and step, after which x has nominal level ``t``: mean and
standard deviation of the estimate over captions, and its mean on the control. ``outside``: share of
latents farther from the calibration latents than 99 % of those are."""


@dataclass(frozen=True, eq=False)
class TrajectoryMismatch:
    """Measurements along trajectories.

    Attributes:
        table: ``LAG_SCHEMA``.
        error: mean absolute error of the estimate on forward-noised latents that it was not
            calibrated on.
    """

    table: pa.Table
    error: float

    def summary(self) -> list[dict[str, Any]]:
        """One row per guidance scale and method, over the steps from t = 0.9 down to 0.1.

        Mean and largest lag, the fixed shift that fits it best, and the share of latents outside.
        """
        rows = []
        for cfg_scale, method in dict.fromkeys(
            zip(*(self.table[key].to_pylist() for key in ("cfg_scale", "method")), strict=True)
        ):
            part = self.of(cfg_scale, method)
            inside = (part["t"] >= 0.1) & (part["t"] <= 0.9)
            lag = (part["estimate_mean"] - part["estimate_control"])[inside]
            rows.append(
                {
                    "cfg_scale": cfg_scale,
                    "method": method,
                    "lag": float(lag.mean()),
                    "largest": float(lag[np.abs(lag).argmax()]),
                    "shift": best_shift(part["t"][inside], lag),
                    "outside": float(part["outside"][inside].mean()),
                }
            )
        return rows

    def of(self, cfg_scale: float, method: str) -> dict[str, NDArray[np.float64]]:
        """Numeric columns for one guidance scale and method, each [S]."""
        rows = [
            row
            for row in self.table.to_pylist()
            if (row["cfg_scale"], row["method"]) == (cfg_scale, method)
        ]
        return {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "method"}

    def to_text(self) -> str:
        """The summary as an aligned table."""
        head = ["guidance", "solver", "lag", "largest", "as shift", "outside"]
        rows = [
            [
                f"{row['cfg_scale']:g}",
                row["method"],
                f"{row['lag']:+.4f}",
                f"{row['largest']:+.4f}",
                f"{row['shift']:.3f}",
                f"{row['outside']:.1%}",
            ]
            for row in self.summary()
        ]
        return str(Table([head, *rows], num_words=0))

    __repr__ = to_text


def best_shift(t: NDArray[np.float64], lag: NDArray[np.float64]) -> float:
    """The shift K whose t' = K t / (1 + (K - 1) t) is nearest to t + lag, in least squares."""
    candidates = torch.from_numpy(np.geomspace(0.25, 4.0, 401))
    nominal, effective = torch.from_numpy(t), torch.from_numpy(t + lag)
    distances = [(shifted(nominal, float(k)) - effective).square().sum() for k in candidates]
    return float(candidates[int(torch.stack(distances).argmin())])


def measure_lag(
    run: "Run",
    features: Features,
    caption_ids: Sequence[int],
    estimator: NoiseLevelEstimator,
    sampling: SamplingConfig,
    *,
    cfg_scales: Sequence[float],
    methods: Sequence[Literal["euler", "heun"]],
    seed: int,
    batch_size: int,
) -> TrajectoryMismatch:
    """Generate the captions at every guidance scale with every method, and measure on the way.

    Args:
        sampling: the other settings of sampling, with the clock of the gates.
        seed: seed of the noise that trajectories begin with; the control's follows from it.
    """
    rows = []
    for method in methods:
        for cfg_scale in cfg_scales:
            probe = TrajectoryProbe(estimator, sampling.num_steps, seed)
            generate(
                run.model,
                run.flow,
                features,
                caption_ids,
                replace(sampling, method=method, cfg_scale=cfg_scale),
                seed=seed,
                batch_size=batch_size,
                callback=probe,
            )
            rows += [{"cfg_scale": cfg_scale, "method": method, **row} for row in probe.rows()]
    return TrajectoryMismatch(pa.Table.from_pylist(rows, schema=LAG_SCHEMA), estimator.error)


class TrajectoryProbe:
    """A callback of sampling that measures noise levels.

    It keeps the latents of a batch until its trajectories end, whose final latents make the
    control.

    Args:
        estimator: the estimate from x_t alone.
        num_steps: steps of the solver.
        seed: seed of sampling.
    """

    def __init__(self, estimator: NoiseLevelEstimator, num_steps: int, seed: int) -> None:
        self._estimator = estimator
        self._num_steps = num_steps
        self._generator = torch.Generator().manual_seed(seed + 1)
        self._levels: dict[int, float] = {}
        self._batch: list[tuple[int, Tensor]] = []
        self._measured: dict[int, list[Tensor]] = {}

    def __call__(self, step: int, t: float, x: Tensor) -> None:
        """Keep the latents after a step; after the last one, measure those of all steps."""
        if step < self._num_steps:
            self._levels[step] = t
            self._batch.append((step, x.cpu()))
            return
        final, estimator = x.cpu().float(), self._estimator
        for number, latents in self._batch:
            level = self._levels[number]
            noise = torch.randn(final.shape, generator=self._generator)
            control = (1 - level) * final + level * noise
            self._measured.setdefault(number, []).append(
                torch.stack(
                    [
                        estimator(latents),
                        estimator(control),
                        estimator.outside(latents).float(),
                    ]
                )
            )
        self._batch = []

    def rows(self) -> list[dict[str, Any]]:
        """One row per step but the last: ``LAG_SCHEMA`` without guidance scale and method."""
        rows = []
        for step, batches in self._measured.items():
            estimate, control, outside = torch.cat(batches, 1).double().numpy()  # [N] each
            rows.append(
                {
                    "step": step,
                    "t": self._levels[step],
                    "estimate_mean": estimate.mean(),
                    "estimate_sd": estimate.std(),
                    "estimate_control": control.mean(),
                    "outside": outside.mean(),
                    "num_captions": len(estimate),
                }
            )
        return rows


def report_lag(
    run: "Run",
    features: str | os.PathLike[str],
    num: int,
    sampling: SamplingConfig,
    *,
    cfg_scales: Sequence[float],
    methods: Sequence[Literal["euler", "heun"]],
    seed: int,
    batch_size: int,
) -> list[str]:
    """Measure lag on the first captions of a feature store, and write ``lag.parquet`` and
    ``figures/lag.png`` into the run.

    Args:
        num: number of captions.

    Returns:
        Lines to print.
    """
    from ..runs.noise_level import open_estimator

    captions = stored_captions(run, features, num)
    estimator = open_estimator(run.path, run.record.config.latents)
    lag = measure_lag(
        run,
        captions.features,
        captions.ids,
        estimator,
        sampling,
        cfg_scales=cfg_scales,
        methods=methods,
        seed=seed,
        batch_size=batch_size,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(lag.table, sink)
    write_whole(run.path / LAG, sink.getvalue())
    path = run.path / "figures" / "lag.png"
    path.parent.mkdir(exist_ok=True)
    strategy = run.record.config.routing.strategy
    title = f"{strategy}: how noisy latents are, beyond their label"
    lag_figure(lag, title).savefig(path, dpi=DPI)
    return [
        lag.to_text(),
        "lag: effective minus nominal t, estimated from x_t alone, mean over t from 0.1 to 0.9 and "
        f"{len(captions)} captions; above 0, latents are noisier than their label.",
        f"The estimate's mean error for one latent is {lag.error:.4f}, on noised latents.",
        str(run.path / LAG),
        str(path),
    ]


def lag_figure(lag: TrajectoryMismatch, title: str) -> Figure:
    """Lag against nominal t: one panel per method, one line per guidance scale."""
    methods = list(dict.fromkeys(lag.table["method"].to_pylist()))
    scales = list(dict.fromkeys(lag.table["cfg_scale"].to_pylist()))
    figure = Figure(figsize=(1.8 + 4.0 * len(methods), 3.6), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    figure.suptitle(title, color=INK)
    for axes, method in zip(panels, methods, strict=True):
        clean(axes)
        axes.set_title(method, color=INK, fontsize="small")
        axes.set_xlabel("nominal t: noise on the right, images on the left", color=INK)
        axes.axhline(0.0, color=FAINT, linewidth=1)
        for number, scale in enumerate(scales):
            columns = lag.of(scale, method)
            axes.plot(
                columns["t"],
                columns["estimate_mean"] - columns["estimate_control"],
                color=LINES[number % len(LINES)],
                label=f"guidance {scale:g}",
            )
    panels[0].set_ylabel("effective minus nominal t", color=INK)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
