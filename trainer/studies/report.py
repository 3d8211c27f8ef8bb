"""``report.md`` of a study, and its figures beside it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...pipeline.style import DPI, Figure
from ...schemas import Scoring, StudyConfig, write_document
from ...schemas.display import Table
from ..evaluation.shapes import chance, read_captions
from .figures import counting_figure, guidance_figure, score_figure, training_figure
from .runner import RESULTS, collect
from .statistics import (
    LEVEL,
    MIN_UNITS,
    ChanceLevels,
    ComparisonDesign,
    compare_arms,
    comparison_rows,
    count_bias,
    counting,
)
from .tuning import read_tuning

REPORT = "report.md"
SUMMARY = ("all", "binding", "count")
"""Skills in the first tables of a report."""


def write_report(study: StudyConfig) -> list[Path]:
    """Write tables and figures of the runs that are done into the folder of the study.

    Raises:
        InputError: no run is done.
    """
    out = Path(study.output)
    results, missing = collect(study)
    assert study.scoring is not None
    notes = []
    if missing:
        notes += [f"Not done yet and left out: {_seeds(missing)}.", ""]
    fewer = {arm: study.seeds_of(arm) for arm in study.arms if study.arm(arm).seeds is not None}
    if fewer:
        listed = _seeds(fewer)
        notes += [f"Arms with fewer seeds, over which their differences are paired: {listed}.", ""]
    derived = {arm: study.arm(arm) for arm in study.arms if study.arm(arm).of is not None}
    if derived:
        listed = "; ".join(
            f"`{name}`: {arm.of} with " + ", ".join(f"{k} {v}" for k, v in arm.scoring.items())
            for name, arm in derived.items()
        )
        notes += [f"Runs of another arm, scored differently: {listed}.", ""]
    tuned = {arm: scores for arm, scores in read_tuning(study).items() if arm in study.arms}
    if study.tuning is not None and tuned:
        for key in dict.fromkeys(study.tuning_of(arm).key for arm in tuned):
            if notes and notes[-1]:
                notes.append("")
            notes += [f"Mean dev accuracy (*{study.tuning.skill}*) by `{key}`:", ""]
            notes += [
                f"- {arm}: {', '.join(f'{value}: {score:.3f}' for value, score in scores.items())}"
                for arm, scores in tuned.items()
                if study.tuning_of(arm).key == key
            ]
    design = ComparisonDesign(
        out.name,
        [*study.arms],
        {arm: study.reference_of(arm) for arm in study.arms},
        study.scoring,
        len(study.seeds),
        notes=notes,
        along=_steps(study),
    )
    return [out / RESULTS, *write_comparison(results, design, out)]


def _steps(study: StudyConfig) -> dict[str, dict[int, str]]:
    """Arms that are scored before their end, too -> step -> the arm that has these scores."""
    return {
        arm: {**steps, study.run(arm, study.seeds_of(arm)[0], study.output).steps: arm}
        for arm in study.arms
        if (steps := study.steps_of(arm))
    }


def _seeds(by_arm: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"`{arm}`: {', '.join(map(str, each))}" for arm, each in by_arm.items())


def write_comparison(
    results: pa.Table,
    design: ComparisonDesign,
    out: Path,
    more: Mapping[str, Callable[[pa.Table], Figure]] | None = None,
) -> list[Path]:
    """Write ``report.md`` and the figures of a comparison into a folder.

    Args:
        results: scores of all images, with the columns ``arm`` and ``seed`` first.
        more: further figures by name, made from the ``COMPARISON_SCHEMA`` table.
    """
    comparison = compare_arms(results, design.references)
    chance_levels = measure_chance(design.scoring)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in {
        "scores": score_figure(comparison, chance_levels, design),
        "guidance": guidance_figure(comparison, chance_levels, design),
        "counting": counting_figure(counting(results), design),
        **({"training": training_figure(comparison, design)} if design.along else {}),
        **{name: plot(comparison) for name, plot in (more or {}).items()},
    }.items():
        path = out / "figures" / f"{name}.png"
        figure.savefig(path, dpi=DPI)
        written.append(path)
    lines = to_markdown(comparison, chance_levels, design) + _surplus(count_bias(results), design)
    write_document(out / REPORT, "\n".join(lines) + "\n")
    return [out / REPORT, *written]


def measure_chance(scoring: Scoring) -> ChanceLevels:
    """Scores of true images of other captions, by split and skill."""
    captions = read_captions(scoring.samples)
    return {
        split: chance(
            [
                scene
                for scene, own in zip(captions.scenes, captions.splits, strict=True)
                if own == split
            ],
            np.random.default_rng(scoring.seed),
        )
        for split in dict.fromkeys(captions.splits)
    }


def to_markdown(
    comparison: pa.Table, chance_levels: ChanceLevels, design: ComparisonDesign
) -> list[str]:
    """Lines of a report.

    First one table per split and skill of ``SUMMARY``, arms by guidance scales; then one per split
    and guidance scale, arms by skills, with differences to the reference.
    """
    unit = design.unit
    lines = [
        f"# {design.title}",
        "",
        f"{len(design.arms)} arms x {design.num_units} {unit}. Accuracy is the mean over {unit}, "
        f"with its 95 % interval over {unit} (Student's t). A difference is to the arm in column "
        f"*to*, paired by {unit} and captions. Column *{unit}* is its interval over {unit}, column "
        f"*captions* a bootstrap over the captions of these runs. **Bold**: the interval over at "
        f"least {MIN_UNITS} {unit} excludes zero. An asterisk: so it does after Holm's correction "
        "for all differences of this report. *Chance* is the score of true images of other "
        "captions.",
        *_by_chance(comparison, unit),
    ]
    if design.notes:
        lines += ["", *design.notes]
    for split in chance_levels:
        for skill in SUMMARY:
            lines += _summary(comparison, chance_levels, design, split, skill)
    head = ["skill", "asked", "chance", "arm", "accuracy", "to", "difference", unit, "captions"]
    for split in chance_levels:
        for cfg_scale in design.scoring.cfg_scales:
            lines += ["", f"## {split}, guidance {cfg_scale:g}", ""]
            rows = [head]
            for row in comparison_rows(comparison, split, cfg_scale):
                level = chance_levels[split].get(row["skill"])
                cells = [
                    row["skill"],
                    str(row["num_captions"]),
                    "-" if level is None else f"{level:.3f}",
                    row["arm"],
                    f"{row['accuracy']:.3f} {_interval(row['low'], row['high'])}",
                    row["reference"] or "",
                    *_difference(row),
                ]
                rows.append(cells)
            lines += Table(rows).to_markdown()
    return lines


def _by_chance(comparison: pa.Table, unit: str) -> list[str]:
    """How many intervals exclude zero, and how many would by chance alone."""
    tested = [row for row in comparison.to_pylist() if row["p"] is not None]
    if not tested:
        return []
    found = sum(row["p"] < 1 - LEVEL for row in tested)
    stands = sum(row["stands"] for row in tested)
    return [
        "",
        f"Of {len(tested)} differences, {found} have an interval over {unit} that excludes zero; "
        f"about {len(tested) * (1 - LEVEL):.0f} would by chance alone if no arms differed. "
        f"After Holm's correction {stands} of them {'stands' if stands == 1 else 'stand'}.",
    ]


def _surplus(table: pa.Table, design: ComparisonDesign) -> list[str]:
    """Table of surplus objects, arms by guidance scales."""
    by_arm = {(row["arm"], row["cfg_scale"]): row for row in table.to_pylist()}
    scales = design.scoring.cfg_scales
    table_rows = [["arm", *(f"guidance {scale:g}" for scale in scales)]]
    for arm in design.arms:
        rows = [by_arm[arm, scale] for scale in scales if (arm, scale) in by_arm]
        cells = [f"{r['objects']:+.2f} {_interval(r['low'], r['high'], 2)}" for r in rows]
        if cells:
            table_rows.append([arm, *cells])
    title = "## Objects generated minus objects requested"
    return ["", title, "", *Table(table_rows).to_markdown()]


def _summary(
    comparison: pa.Table,
    chance_levels: ChanceLevels,
    design: ComparisonDesign,
    split: str,
    skill: str,
) -> list[str]:
    """Table of one skill: arms by guidance scales, with differences and intervals over seeds."""
    scales = design.scoring.cfg_scales
    by_arm = {
        (row["arm"], row["cfg_scale"]): row
        for scale in scales
        for row in comparison_rows(comparison, split, scale)
        if row["skill"] == skill
    }
    if not by_arm:
        return []
    num = next(iter(by_arm.values()))["num_captions"]
    level = chance_levels[split].get(skill)
    heading = f"## {split}, {skill}: {num} captions"
    heading += "" if level is None else f", chance {level:.3f}"
    head = [
        "arm",
        "to",
        *(text for scale in scales for text in (f"guidance {scale:g}", "difference")),
    ]
    table_rows = [head]
    for arm in design.arms:
        rows = [by_arm.get((arm, scale)) for scale in scales]
        if not any(rows):
            continue
        reference = design.references.get(arm, arm)
        cells = [arm, "" if reference == arm else reference]
        for row in rows:
            difference, interval = ("", "") if row is None else _difference(row)[:2]
            cells += ["" if row is None else f"{row['accuracy']:.3f}", f"{difference} {interval}"]
        table_rows.append(cells)
    return ["", heading, "", *Table(table_rows).to_markdown()]


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"({low:.{digits}f} to {high:.{digits}f})"


def _difference(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """A difference, its interval over seeds and that over captions; empty without a reference."""
    if row["difference"] is None:
        return "", "", ""
    text = f"{row['difference']:+.3f}"
    low, high = row["seeds_low"], row["seeds_high"]
    if row["p"] is not None and row["p"] < 1 - LEVEL:
        text = f"**{text}**" + r"\*" * bool(row["stands"])
    over_captions = _interval(row["captions_low"], row["captions_high"])
    return text, _interval(low, high), over_captions
