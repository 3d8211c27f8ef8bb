"""``report.md`` of a study, and its figures beside it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...pipeline.style import DPI, Figure
from ...schemas import Scoring, StudyConfig, write_document
from ...schemas.display import Table
from ..evaluation.shapes import chance
from .figures import counting_panels, guidance_panels, score_panels
from .job import read_captions
from .runner import RESULTS, collect
from .statistics import Chance, Outline, compare_arms, comparison_rows, count_bias, counting
from .tuning import read_tuning

REPORT = "report.md"
MIN_UNITS = 3
"""Seeds that a difference needs to be marked: two may agree by chance."""
SUMMARY = ("all", "binding", "count")
"""Skills that a report begins with."""


def write_report(study: StudyConfig) -> list[Path]:
    """Tables and figures of the runs that are done, into the folder of the study.

    Raises:
        InputError: none is done.
    """
    out = Path(study.output)
    results, missing = collect(study)
    assert study.scoring is not None
    notes = []
    if missing:
        notes += [f"Not done yet, and left out: {_seeds(missing)}.", ""]
    fewer = {arm: study.seeds_of(arm) for arm in study.arms if study.arm(arm).seeds is not None}
    if fewer:
        listed = _seeds(fewer)
        notes += [f"Arms that have fewer seeds, of which differences are paired: {listed}.", ""]
    judged = {arm: study.arm(arm) for arm in study.arms if study.arm(arm).of is not None}
    if judged:
        listed = "; ".join(
            f"`{name}`: {arm.of} with " + ", ".join(f"{k} {v}" for k, v in arm.scoring.items())
            for name, arm in judged.items()
        )
        notes += [f"Runs of one arm, judged otherwise: {listed}.", ""]
    tuned = {arm: scores for arm, scores in read_tuning(study).items() if arm in study.arms}
    if study.tuning is not None and tuned:
        notes += [f"Mean dev accuracy (*{study.tuning.skill}*) by `{study.tuning.key}`:", ""]
        notes += [
            f"- {arm}: {', '.join(f'{value}: {score:.3f}' for value, score in scores.items())}"
            for arm, scores in tuned.items()
        ]
    outline = Outline(
        out.name,
        [*study.arms],
        {arm: study.reference_of(arm) for arm in study.arms},
        study.scoring,
        len(study.seeds),
        notes=notes,
    )
    return [out / RESULTS, *write_comparison(results, outline, out)]


def _seeds(by_arm: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"`{arm}`: {', '.join(map(str, each))}" for arm, each in by_arm.items())


def write_comparison(
    results: pa.Table,
    outline: Outline,
    out: Path,
    more: Mapping[str, Callable[[pa.Table], Figure]] | None = None,
) -> list[Path]:
    """Write ``report.md`` and the figures of judgements by arm and seed into a folder.

    Args:
        more: further figures by name, drawn of the claims.
    """
    claims = compare_arms(results, outline.references)
    lucky = chances(outline.scoring)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in {
        "scores": score_panels(claims, lucky, outline),
        "guidance": guidance_panels(claims, lucky, outline),
        "counting": counting_panels(counting(results), outline),
        **{name: draw(claims) for name, draw in (more or {}).items()},
    }.items():
        path = out / "figures" / f"{name}.png"
        figure.savefig(path, dpi=DPI)
        written.append(path)
    lines = to_markdown(claims, lucky, outline) + _inflation(count_bias(results), outline)
    write_document(out / REPORT, "\n".join(lines) + "\n")
    return [out / REPORT, *written]


def chances(scoring: Scoring) -> Chance:
    """What pictures of other captions would score, by split and skill."""
    table, scenes = read_captions(scoring)
    splits = table["split"].to_pylist()
    return {
        split: chance(
            [scene for scene, own in zip(scenes, splits, strict=True) if own == split],
            np.random.default_rng(scoring.seed),
        )
        for split in dict.fromkeys(splits)
    }


def to_markdown(claims: pa.Table, lucky: Chance, outline: Outline) -> list[str]:
    """A table a skill that matters: arms by guidance scales; then one a split and guidance scale:
    arms by skills, and differences to what each is compared with."""
    unit = outline.unit
    lines = [
        f"# {outline.title}",
        "",
        f"{len(outline.arms)} arms x {outline.num_units} {unit}. Accuracy is the mean over {unit}, "
        f"with its 95 % interval over {unit} (Student's t). A difference is to "
        f"the arm named *to*, paired by {unit} and captions; *{unit}* is its interval over "
        f"{unit}, *captions* a bootstrap over captions of these runs. **Bold**: the interval over "
        f"{unit} excludes zero, of at least {MIN_UNITS}. *Chance* is what true pictures of other "
        "captions score.",
    ]
    if outline.notes:
        lines += ["", *outline.notes]
    for split in lucky:
        for skill in SUMMARY:
            lines += _summary(claims, lucky, outline, split, skill)
    head = ["skill", "asked", "chance", "arm", "accuracy", "to", "difference", unit, "captions"]
    for split in lucky:
        for cfg_scale in outline.scoring.cfg_scales:
            lines += ["", f"## {split}, guidance {cfg_scale:g}", ""]
            rows = [head]
            for row in comparison_rows(claims, split, cfg_scale):
                base = lucky[split].get(row["skill"])
                cells = [
                    row["skill"],
                    str(row["num_captions"]),
                    "-" if base is None else f"{base:.3f}",
                    row["arm"],
                    f"{row['accuracy']:.3f} {_interval(row['low'], row['high'])}",
                    row["reference"] or "",
                    *_contrast(row),
                ]
                rows.append(cells)
            lines += Table(rows).to_markdown()
    return lines


def _inflation(table: pa.Table, outline: Outline) -> list[str]:
    """How many objects too many, arms by guidance scales."""
    found = {(row["arm"], row["cfg_scale"]): row for row in table.to_pylist()}
    scales = outline.scoring.cfg_scales
    table_rows = [["arm", *(f"guidance {scale:g}" for scale in scales)]]
    for arm in outline.arms:
        rows = [found[arm, scale] for scale in scales if (arm, scale) in found]
        cells = [f"{r['objects']:+.2f} {_interval(r['low'], r['high'], 2)}" for r in rows]
        if cells:
            table_rows.append([arm, *cells])
    title = "## Objects drawn, less objects asked for"
    return ["", title, "", *Table(table_rows).to_markdown()]


def _summary(
    claims: pa.Table, lucky: Chance, outline: Outline, split: str, skill: str
) -> list[str]:
    """Arms by guidance scales, each with its difference and the interval over seeds."""
    scales = outline.scoring.cfg_scales
    found = {
        (row["arm"], row["cfg_scale"]): row
        for scale in scales
        for row in comparison_rows(claims, split, scale)
        if row["skill"] == skill
    }
    if not found:
        return []
    num = next(iter(found.values()))["num_captions"]
    base = lucky[split].get(skill)
    chance = "" if base is None else f", chance {base:.3f}"
    head = [
        "arm",
        "to",
        *(text for scale in scales for text in (f"guidance {scale:g}", "difference")),
    ]
    table_rows = [head]
    for arm in outline.arms:
        rows = [found.get((arm, scale)) for scale in scales]
        if not any(rows):
            continue
        to = outline.references.get(arm, arm)
        cells = [arm, "" if to == arm else to]
        for row in rows:
            difference, interval = ("", "") if row is None else _contrast(row)[:2]
            cells += ["" if row is None else f"{row['accuracy']:.3f}", f"{difference} {interval}"]
        table_rows.append(cells)
    title = f"## {split}, {skill}: {num} captions{chance}"
    return ["", title, "", *Table(table_rows).to_markdown()]


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"({low:.{digits}f} to {high:.{digits}f})"


def _contrast(row: Mapping[str, Any]) -> tuple[str, str, str]:
    if row["difference"] is None:
        return "", "", ""
    text = f"{row['difference']:+.3f}"
    low, high = row["seeds_low"], row["seeds_high"]
    if low is not None and len(row["seeds"]) >= MIN_UNITS and (low > 0 or high < 0):
        text = f"**{text}**"
    over_captions = _interval(row["captions_low"], row["captions_high"])
    return text, _interval(low, high), over_captions
