"""Comparison of a study's arms, with intervals and their units.

A claim about an arm is a claim about training it again: its unit is the seed, and its interval
Student's t over seeds. A claim about these trained runs on other captions has the caption as its
unit, and as its interval a bootstrap over captions. Both are given for differences, which are
paired: arms of one seed share initial weights, data and noise, and are scored on the same captions
from the same noise.

Shapes: S seeds, C captions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from ...schemas import Scoring
from ...schemas.arrow import ascending, grouped
from ..shapes.judge import SKILLS

NUM_RESAMPLES = 2000
LEVEL = 0.95
MIN_UNITS = 3
"""Number of seeds that a difference needs to be tested: two may agree by chance."""
Interval = tuple[float | None, float | None]
COMPARISON_SCHEMA = pa.schema(
    [
        pa.field("cfg_scale", pa.float64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("skill", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("seeds", pa.list_(pa.float64()), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("difference", pa.float64()),
        pa.field("seeds_low", pa.float64()),
        pa.field("seeds_high", pa.float64()),
        pa.field("captions_low", pa.float64()),
        pa.field("captions_high", pa.float64()),
        pa.field("p", pa.float64()),
        pa.field("stands", pa.bool_()),
        pa.field("num_captions", pa.int64(), nullable=False),
    ]
)
"""One row per guidance scale, split, skill and arm. ``accuracy`` is the mean of ``seeds``, the
accuracies of each seed; ``low`` and ``high`` are its 95 % interval over seeds, null for a single
seed. ``difference`` is the difference to the arm ``reference`` over the seeds that both have, with
intervals over seeds and over captions; null if an arm is compared with none. ``p`` is that of the
paired t-test over seeds, null where there is none, and ``stands`` whether the difference
stands after Holm's correction over all differences of the table."""


def compare_arms(results: pa.Table, references: Mapping[str, str]) -> pa.Table:
    """Summarise ``results.parquet``: ``COMPARISON_SCHEMA``.

    Args:
        references: arm -> the arm that it is compared with; itself, or left out: with none.
    """
    rows = []
    for (cfg_scale, split, skill), part in _groups(results, ["cfg_scale", "split", "skill"]):
        shares = {arm: _shares(table) for (arm,), table in _groups(part, ["arm"])}
        for arm, right in shares.items():
            reference = references.get(arm, arm)
            base = shares.get(reference, {})
            by_seed = np.array([each.mean() for each in right.values()])
            low, high = over_seeds(by_seed)
            row = {
                "cfg_scale": cfg_scale,
                "split": split,
                "skill": skill,
                "arm": arm,
                "accuracy": float(by_seed.mean()),
                "low": low,
                "high": high,
                "seeds": by_seed.tolist(),
                "num_captions": len(next(iter(right.values()))),
            }
            if arm != reference and (both := [seed for seed in right if seed in base]):
                difference = np.stack([right[seed] - base[seed] for seed in both])
                row["reference"] = reference
                row["difference"] = float(difference.mean())
                row["seeds_low"], row["seeds_high"] = over_seeds(difference.mean(1))
                row["captions_low"], row["captions_high"] = over_captions(difference.mean(0))
                row["p"] = paired_p(difference.mean(1))
            rows.append(row)
    tested = [row for row in rows if row.get("p") is not None]
    for row, stands in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["stands"] = stands
    return pa.Table.from_pylist(rows, schema=COMPARISON_SCHEMA)


def over_seeds(values: NDArray[np.float64]) -> Interval:
    """95 % interval of the mean of [S] values by Student's t; none for a single value."""
    if len(values) < 2:
        return None, None
    mean, error = float(values.mean()), float(stats.sem(values))
    margin = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean - margin, mean + margin


def paired_p(differences: NDArray[np.float64]) -> float | None:
    """Two-sided p of the paired t-test of [S] differences; None for fewer than ``MIN_UNITS``, and
    for equal ones, whose error cannot be told."""
    if len(differences) < MIN_UNITS or np.ptp(differences) < 1e-9:
        return None
    mean, error = float(differences.mean()), float(stats.sem(differences))
    return float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def holm(values: Sequence[float]) -> list[bool]:
    """Which of several p values stand at 5 % together, by Holm's step-down procedure (1979): the
    k-th smallest of n, if it and all before it are below 5 % / (n - k + 1)."""
    stands, error = [False] * len(values), round(1 - LEVEL, 9)  # 1 - 0.95 is more than 0.05
    for rank, number in enumerate(np.argsort(values, kind="stable")):
        if values[number] >= error / (len(values) - rank):
            break
        stands[number] = True
    return stands


def over_captions(values: NDArray[np.float64], seed: int = 0) -> Interval:
    """95 % percentile bootstrap interval of the mean of [C] values (Efron 1979)."""
    num = len(values)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)  # [resamples, C]
    low, high = np.percentile(times @ values / num, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def counting(results: pa.Table) -> pa.Table:
    """Number of objects generated, by arm, guidance scale, split and number of objects requested.

    Columns arm, cfg_scale, split, num_asked, and ``num_found``, the mean over images and seeds.
    """
    images = results.filter(pc.equal(results["skill"], "total"))  # a skill that every image has
    keys = ["arm", "cfg_scale", "split", "num_asked"]
    table = grouped(images, keys).aggregate([("num_found", "mean")])
    return ascending(table.rename_columns([*keys, "num_found"]), keys)


def count_bias(results: pa.Table) -> pa.Table:
    """Objects generated minus objects requested, by arm and guidance scale.

    Columns arm, cfg_scale, ``objects``, the mean over images and then seeds, and ``low`` and
    ``high``, its 95 % interval over seeds, null for a single seed.
    """
    images = results.filter(pc.equal(results["skill"], "total"))  # a skill that every image has
    asked, found = (images[name].cast(pa.float64()) for name in ("num_asked", "num_found"))
    table = images.append_column("surplus", pc.subtract(found, asked))
    means = grouped(table, ["arm", "cfg_scale", "seed"]).aggregate([("surplus", "mean")])
    rows = []
    for (arm, cfg_scale), part in _groups(means, ["arm", "cfg_scale"]):
        values = part["surplus_mean"].to_numpy()
        low, high = over_seeds(values)
        rows.append((arm, cfg_scale, float(values.mean()), low, high))
    names = ("arm", "cfg_scale", "objects", "low", "high")
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _shares(table: pa.Table) -> dict[int, NDArray[np.float64]]:
    """Seed -> share of right images of each caption, [C]."""
    means = grouped(table, ["seed", "caption"]).aggregate([("right", "mean")])
    means = ascending(means, ["seed", "caption"])
    return {seed: part["right_mean"].to_numpy() for (seed,), part in _groups(means, ["seed"])}


def _groups(table: pa.Table, keys: Sequence[str]) -> Iterator[tuple[tuple, pa.Table]]:
    """Combinations of values in order of appearance, each with its rows."""
    for values in grouped(table, keys).aggregate([]).to_pylist():
        masks = [pc.equal(table[key], values[key]) for key in keys]
        mask = masks[0]
        for other in masks[1:]:
            mask = pc.and_(mask, other)
        yield tuple(values[key] for key in keys), table.filter(mask)


ChanceLevels = Mapping[str, Mapping[str, float]]
"""Split -> skill -> accuracy of true images of other captions."""


@dataclass(frozen=True)
class ComparisonDesign:
    """Arms of a report and how they are compared.

    Attributes:
        title: title of the report.
        arms: names, in the order of the report.
        references: arm -> the arm that it is compared with.
        scoring: how runs were scored.
        num_units: number of units per arm.
        unit: name of the unit: ``seeds``, or ``runs`` if the arms are other weights in the same
            runs.
        notes: further lines of the report.
        along: arm -> step -> the arm that has its scores at that step; the last are its own.
    """

    title: str
    arms: Sequence[str]
    references: Mapping[str, str]
    scoring: Scoring
    num_units: int
    unit: str = "seeds"
    notes: Sequence[str] = ()
    along: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @property
    def drawn(self) -> Sequence[str]:
        """Arms in the figures: those scored at the end of training."""
        before = {name for steps in self.along.values() for name in steps.values()}
        before -= {*self.along}
        return [arm for arm in self.arms if arm not in before]


def comparison_rows(comparison: pa.Table, split: str, cfg_scale: float) -> Sequence[dict[str, Any]]:
    """Rows of ``COMPARISON_SCHEMA`` by skill, in the order of ``SKILLS``; arms in their order."""
    mask = pc.and_(
        pc.equal(comparison["split"], split), pc.equal(comparison["cfg_scale"], cfg_scale)
    )
    rows = comparison.filter(mask).to_pylist()
    return sorted(rows, key=lambda row: SKILLS.index(row["skill"]))
