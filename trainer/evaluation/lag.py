"""Nominal against effective noise level along the trajectories of a run.

Both clocks of :mod:`.clock` are read at every step: the oracle, by where the trajectory ended, and
the estimate from x_t alone. Beside them stands a control: the same final latents with fresh noise
of the nominal t, of which both should read that t. What they read of the control is their own
error on these pictures, and lag is what they read of the trajectory beyond it.

Shapes: B batch, S steps, N captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...pipeline.store.features import FeatureStore
from ...pipeline.style import DPI, FAINT, INK, LINES, Figure, clean
from ...schemas import write_whole
from ...schemas.display import Table
from ..diffusion.noise_level import NoiseLevelEstimator, effective_t, shifted
from ..diffusion.sampling import SamplingConfig
from ..runs.noise_level import open_estimator
from ..runs.run import Run
from .generate import generate

LAG = "lag.parquet"
LAG_SCHEMA = pa.schema(
    [
        pa.field("cfg_scale", pa.float64(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("t", pa.float64(), nullable=False),
        *(
            pa.field(f"{clock}_{name}", pa.float64(), nullable=False)
            for clock in ("oracle", "estimate")
            for name in ("mean", "sd", "control")
        ),
        pa.field("apart", pa.float64(), nullable=False),
        pa.field("outside", pa.float64(), nullable=False),
        pa.field("num_captions", pa.int64(), nullable=False),
    ]
)
"""A row a guidance scale, method and step, after which x has nominal level ``t``. Of both clocks,
mean and standard deviation over captions of what they read, and the mean of what they read of the
control; ``apart``, mean absolute difference between them, each less its control; ``outside``, share
of latents farther from the calibration latents than 99 % of those are."""


@dataclass(frozen=True, eq=False)
class TrajectoryMismatch:
    """What was found: ``table`` is ``LAG_SCHEMA``; ``error`` the mean absolute error of the
    estimate on forward-noised latents that it was not calibrated on."""

    table: pa.Table
    error: float

    def summary(self) -> list[dict[str, Any]]:
        """A row a guidance scale and method: mean lag by the oracle and by the estimate over the
        steps from t = 0.9 down to 0.1, the largest, the fixed shift that fits the oracle best, how
        far apart the clocks are, and the share of latents outside."""
        rows = []
        for cfg_scale, method in dict.fromkeys(
            zip(*(self.table[key].to_pylist() for key in ("cfg_scale", "method")), strict=True)
        ):
            part = self.of(cfg_scale, method)
            inside = (part["t"] >= 0.1) & (part["t"] <= 0.9)
            oracle = (part["oracle_mean"] - part["oracle_control"])[inside]
            estimate = (part["estimate_mean"] - part["estimate_control"])[inside]
            rows.append(
                {
                    "cfg_scale": cfg_scale,
                    "method": method,
                    "oracle": float(oracle.mean()),
                    "estimate": float(estimate.mean()),
                    "largest": float(oracle[np.abs(oracle).argmax()]),
                    "shift": best_shift(part["t"][inside], oracle),
                    "apart": float(part["apart"][inside].mean()),
                    "outside": float(part["outside"][inside].mean()),
                }
            )
        return rows

    def of(self, cfg_scale: float, method: str) -> dict[str, NDArray[np.float64]]:
        """The columns of numbers of one guidance scale and method, each [S]."""
        rows = [
            row
            for row in self.table.to_pylist()
            if (row["cfg_scale"], row["method"]) == (cfg_scale, method)
        ]
        return {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "method"}

    def to_text(self) -> str:
        """The summary as an aligned table."""
        head = ["guidance", "solver", "lag", "largest", "estimated", "as shift", "apart", "outside"]
        rows = [
            [
                f"{row['cfg_scale']:g}",
                row["method"],
                f"{row['oracle']:+.4f}",
                f"{row['largest']:+.4f}",
                f"{row['estimate']:+.4f}",
                f"{row['shift']:.3f}",
                f"{row['apart']:.4f}",
                f"{row['outside']:.1%}",
            ]
            for row in self.summary()
        ]
        return str(Table([head, *rows], num_words=0))

    __repr__ = to_text


def best_shift(t: NDArray[np.float64], lag: NDArray[np.float64]) -> float:
    """The shift K whose t' = K t / (1 + (K - 1) t) is nearest to t + lag, in least squares."""
    candidates = torch.from_numpy(np.geomspace(0.25, 4.0, 401))
    read = torch.from_numpy(t + lag)
    distances = [(shifted(torch.from_numpy(t), float(k)) - read).square().sum() for k in candidates]
    return float(candidates[int(torch.stack(distances).argmin())])


def measure_lag(
    run: Run,
    features: FeatureStore,
    caption_ids: Sequence[int],
    estimator: NoiseLevelEstimator,
    how: SamplingConfig,
    *,
    cfg_scales: Sequence[float],
    methods: Sequence[Literal["euler", "heun"]],
    seed: int,
    batch_size: int,
) -> TrajectoryMismatch:
    """Draw the captions at every guidance scale with every method, and read the clocks on the way.

    Args:
        how: what else holds for sampling; the clock of gates among it.
        seed: of the noise that trajectories begin with; the control's follows from it.
    """
    rows = []
    for method in methods:
        for cfg_scale in cfg_scales:
            reader = TrajectoryProbe(estimator, how.num_steps, seed)
            generate(
                run.model,
                run.flow,
                features,
                caption_ids,
                replace(how, method=method, cfg_scale=cfg_scale),
                seed=seed,
                batch_size=batch_size,
                callback=reader,
            )
            rows += [{"cfg_scale": cfg_scale, "method": method, **row} for row in reader.rows()]
    return TrajectoryMismatch(pa.Table.from_pylist(rows, schema=LAG_SCHEMA), estimator.error)


class TrajectoryProbe:
    """A callback of sampling that reads the clocks: it keeps the latents of a batch until that has
    ended, for the oracle needs to know where."""

    def __init__(self, estimator: NoiseLevelEstimator, num_steps: int, seed: int) -> None:
        self.estimator = estimator
        self.num_steps = num_steps
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.levels: dict[int, float] = {}
        self.kept: list[tuple[int, Tensor]] = []
        self.read: dict[int, list[Tensor]] = {}

    def __call__(self, step: int, t: float, x: Tensor) -> None:
        if step < self.num_steps:
            self.levels[step] = t
            self.kept.append((step, x.cpu()))
            return
        final, estimator = x.cpu().float(), self.estimator
        for number, latents in self.kept:
            level = self.levels[number]
            noise = torch.randn(final.shape, generator=self.generator)
            control = (1 - level) * final + level * noise
            self.read.setdefault(number, []).append(
                torch.stack(
                    [
                        effective_t(latents, final),
                        effective_t(control, final),
                        estimator(latents),
                        estimator(control),
                        estimator.outside(latents).float(),
                    ]
                )
            )
        self.kept = []

    def rows(self) -> list[dict[str, Any]]:
        """A row a step but the last, ``LAG_SCHEMA`` without guidance scale and method."""
        found = []
        for step, parts in self.read.items():
            values = torch.cat(parts, 1).double().numpy()  # [5, N]
            oracle, oracle_control, estimate, estimate_control, outside = values
            lags = (oracle - oracle_control.mean(), estimate - estimate_control.mean())
            found.append(
                {
                    "step": step,
                    "t": self.levels[step],
                    "oracle_mean": oracle.mean(),
                    "oracle_sd": oracle.std(),
                    "oracle_control": oracle_control.mean(),
                    "estimate_mean": estimate.mean(),
                    "estimate_sd": estimate.std(),
                    "estimate_control": estimate_control.mean(),
                    "apart": np.abs(lags[0] - lags[1]).mean(),
                    "outside": outside.mean(),
                    "num_captions": len(oracle),
                }
            )
        return found


def report_lag(
    run: Run,
    features: FeatureStore,
    num: int,
    how: SamplingConfig,
    *,
    cfg_scales: Sequence[float],
    methods: Sequence[Literal["euler", "heun"]],
    seed: int,
    batch_size: int,
) -> list[str]:
    """Measure, and write ``lag.parquet`` and ``figures/lag.png`` into the run: what to print."""
    estimator = open_estimator(run.path, run.record.config.latents)
    rows = features.samples.slice(0, num)["caption_ids"].to_pylist()
    lag = measure_lag(
        run,
        features,
        [row[0] for row in rows],
        estimator,
        how,
        cfg_scales=cfg_scales,
        methods=methods,
        seed=seed,
        batch_size=batch_size,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(lag.table, sink)
    write_whole(run.path / LAG, sink.getvalue())
    picture = run.path / "figures" / "lag.png"
    picture.parent.mkdir(exist_ok=True)
    strategy = run.record.config.routing.strategy
    lag_figure(lag, f"{strategy}: how noisy latents are, beyond their label").savefig(
        picture, dpi=DPI
    )
    return [
        lag.to_text(),
        "lag: effective minus nominal t by the oracle, mean over t from 0.1 to 0.9 and "
        f"{len(rows)} captions; above 0, latents are noisier than their label.",
        f"estimated: the same from x_t alone; its mean error on noised latents is {lag.error:.4f}.",
        str(run.path / LAG),
        str(picture),
    ]


def lag_figure(lag: TrajectoryMismatch, title: str) -> Figure:
    """Lag against nominal t: a panel a method, a colour a guidance scale; the oracle as a line, the
    estimate from x_t alone dashed."""
    methods = list(dict.fromkeys(lag.table["method"].to_pylist()))
    scales = list(dict.fromkeys(lag.table["cfg_scale"].to_pylist()))
    figure = Figure(figsize=(1.8 + 4.0 * len(methods), 3.6), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    figure.suptitle(title, color=INK)
    for place, method in zip(axes, methods, strict=True):
        clean(place)
        place.set_title(method, color=INK, fontsize="small")
        place.set_xlabel("nominal t: noise on the right, pictures on the left", color=INK)
        place.axhline(0.0, color=FAINT, linewidth=1)
        for number, scale in enumerate(scales):
            part, colour = lag.of(scale, method), LINES[number % len(LINES)]
            for clock, style in (("oracle", "-"), ("estimate", "--")):
                place.plot(
                    part["t"],
                    part[f"{clock}_mean"] - part[f"{clock}_control"],
                    style,
                    color=colour,
                    label=f"guidance {scale:g}, {clock}",
                )
    axes[0].set_ylabel("effective minus nominal t", color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
