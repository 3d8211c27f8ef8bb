"""What a study found, as figures and as ``report.md`` beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.ticker import PercentFormatter

from ..pipeline.style import DPI, FAINT, INK, LINES, Figure, clean
from ..schemas import Scoring, StudyConfig, write_document
from .claims import counting, inflation, make_claims
from .evaluation import chance
from .shapes import SKILLS
from .study import RESULTS, collect, read_captions, read_tuning

REPORT = "report.md"
MIN_UNITS = 3
"""Seeds that a difference needs to be marked: two may agree by chance."""
SUMMARY = ("all", "binding", "count")
"""Skills that a report begins with."""
LEFT_OUT = ("all", "count", "colour", "shape", "binding")
"""Skills of which it is shown what each layer is worth."""
Chance = Mapping[str, Mapping[str, float]]
"""Split -> skill -> accuracy of true images of other captions."""


@dataclass(frozen=True)
class Outline:
    """What is compared.

    Attributes:
        title: of the report.
        references: arm -> the one that it is compared with.
        unit: what a seed is called: ``seeds``, or ``runs`` where weights are swapped in them.
        num_units: how many there are of an arm.
        notes: further lines.
    """

    title: str
    arms: Sequence[str]
    references: Mapping[str, str]
    scoring: Scoring
    num_units: int
    unit: str = "seeds"
    notes: Sequence[str] = ()


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
    claims = make_claims(results, outline.references)
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
    lines = to_markdown(claims, lucky, outline) + _inflation(inflation(results), outline)
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
    head = ("skill", "asked", "chance", "arm", "accuracy", "to", "difference", unit, "captions")
    for split in lucky:
        for cfg_scale in outline.scoring.cfg_scales:
            lines += ["", f"## {split}, guidance {cfg_scale:g}", ""]
            lines += [f"| {' | '.join(head)} |", f"{'| --- ' * len(head)}|"]
            for row in _rows(claims, split, cfg_scale):
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
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _inflation(table: pa.Table, outline: Outline) -> list[str]:
    """How many objects too many, arms by guidance scales."""
    found = {(row["arm"], row["cfg_scale"]): row for row in table.to_pylist()}
    scales = outline.scoring.cfg_scales
    head = ["arm", *(f"guidance {scale:g}" for scale in scales)]
    lines = ["", "## Objects drawn, less objects asked for", "", f"| {' | '.join(head)} |"]
    lines.append(f"{'| --- ' * len(head)}|")
    for arm in outline.arms:
        rows = [found[arm, scale] for scale in scales if (arm, scale) in found]
        cells = [f"{r['objects']:+.2f} {_interval(r['low'], r['high'], 2)}" for r in rows]
        if cells:
            lines.append(f"| {' | '.join([arm, *cells])} |")
    return lines


def _summary(
    claims: pa.Table, lucky: Chance, outline: Outline, split: str, skill: str
) -> list[str]:
    """Arms by guidance scales, each with its difference and the interval over seeds."""
    scales = outline.scoring.cfg_scales
    found = {
        (row["arm"], row["cfg_scale"]): row
        for scale in scales
        for row in _rows(claims, split, scale)
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
    lines = ["", f"## {split}, {skill}: {num} captions{chance}", "", f"| {' | '.join(head)} |"]
    lines.append(f"{'| --- ' * len(head)}|")
    for arm in outline.arms:
        rows = [found.get((arm, scale)) for scale in scales]
        if not any(rows):
            continue
        to = outline.references.get(arm, arm)
        cells = [arm, "" if to == arm else to]
        for row in rows:
            difference, interval = ("", "") if row is None else _contrast(row)[:2]
            cells += ["" if row is None else f"{row['accuracy']:.3f}", f"{difference} {interval}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def score_panels(claims: pa.Table, lucky: Chance, outline: Outline) -> Figure:
    """Accuracy of every arm at the last guidance scale: a panel a split and skill."""
    cfg_scale = outline.scoring.cfg_scales[-1]
    skills = [skill for skill in SKILLS if skill in {*claims["skill"].to_pylist()}]
    arms = [*outline.arms]
    size = (1.2 + 1.75 * len(skills), 0.8 + len(lucky) * (0.7 + 0.24 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lucky), len(skills), sharey=True, squeeze=False)
    title = f"Accuracy at guidance {cfg_scale:g}, mean and 95 % over {outline.unit}"
    figure.suptitle(title, color=INK)
    for line, split in zip(axes, lucky, strict=True):
        rows = _rows(claims, split, cfg_scale)
        for place, skill in zip(line, skills, strict=True):
            clean(place)
            place.set_title(f"{split}: {skill}", color=INK, fontsize="small")
            for row in (row for row in rows if row["skill"] == skill):
                height = arms.index(row["arm"])
                colour = _colour(height, len(arms))
                num = len(row["seeds"])
                place.plot(row["seeds"], [height] * num, ".", color=colour, alpha=0.4)
                if row["low"] is not None:
                    place.plot([row["low"], row["high"]], [height] * 2, color=colour)
                place.plot(row["accuracy"], height, "o", color=colour)
            if (base := lucky[split].get(skill)) is not None:
                place.axvline(base, color=FAINT, linestyle="--", linewidth=1)
            place.xaxis.set_major_formatter(PercentFormatter(1.0))
            place.tick_params(labelsize="x-small")
        line[0].set_yticks(range(len(arms)), arms, fontsize="small")
        line[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def guidance_panels(claims: pa.Table, lucky: Chance, outline: Outline) -> Figure:
    """Accuracy against the guidance scale: a line an arm, a panel a split and skill."""
    skills = [s for s in ("count", "binding", "all") if s in {*claims["skill"].to_pylist()}]
    size = (1.5 + 3.0 * len(skills), 0.8 + 2.4 * len(lucky))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lucky), len(skills), sharex=True, squeeze=False)
    for line, split in zip(axes, lucky, strict=True):
        for place, skill in zip(line, skills, strict=True):
            clean(place)
            place.set_title(f"{split}: {skill}", color=INK, fontsize="small")
            for number, arm in enumerate(outline.arms):
                rows = [
                    row
                    for scale in outline.scoring.cfg_scales
                    for row in _rows(claims, split, scale)
                    if (row["skill"], row["arm"]) == (skill, arm)
                ]
                place.plot(
                    [row["cfg_scale"] for row in rows],
                    [row["accuracy"] for row in rows],
                    **_line(number, len(outline.arms)),
                    label=arm,
                )
            if (base := lucky[split].get(skill)) is not None:
                place.axhline(base, color=FAINT, linestyle="--", linewidth=1)
            place.yaxis.set_major_formatter(PercentFormatter(1.0))
    for place in axes[-1]:
        place.set_xlabel("guidance scale", color=INK)
    _add_legend(figure, axes[0, 0])
    return figure


def counting_panels(table: pa.Table, outline: Outline) -> Figure:
    """Objects drawn against objects asked for: a panel a guidance scale, a line an arm."""
    scales = outline.scoring.cfg_scales
    figure = Figure(figsize=(1.5 + 2.8 * len(scales), 3.4), layout="constrained")
    axes = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    table = table.group_by(["arm", "cfg_scale", "num_asked"]).aggregate([("num_found", "mean")])
    table = table.sort_by("num_asked")
    for place, scale in zip(axes, scales, strict=True):
        clean(place)
        place.set_title(f"guidance {scale:g}", color=INK, fontsize="small")
        place.set_xlabel("objects asked for", color=INK)
        for number, arm in enumerate(outline.arms):
            mask = pc.and_(pc.equal(table["arm"], arm), pc.equal(table["cfg_scale"], scale))
            part = table.filter(mask)
            asked, found = part["num_asked"].to_numpy(), part["num_found_mean"].to_numpy()
            place.plot(asked, found, **_line(number, len(outline.arms)), label=arm)
        place.axline((1, 1), slope=1, color=FAINT, linestyle="--", linewidth=1)
    axes[0].set_ylabel("objects drawn", color=INK)
    _add_legend(figure, axes[0])
    return figure


def left_out_panels(
    claims: pa.Table, arms: Mapping[int, str], weights: np.ndarray, outline: Outline
) -> Figure:
    """What leaving out a layer does to accuracy at the last guidance scale, a panel a skill; and
    the weight that the layer has.

    Args:
        arms: each of the L layers -> what the arm without it is called, if there is one.
        weights: as trained, mean over runs, ``[D, L]``.
    """
    cfg_scale, layers = outline.scoring.cfg_scales[-1], [*arms]
    splits = [*dict.fromkeys(claims["split"].to_pylist())]
    skills = [skill for skill in LEFT_OUT if skill in {*claims["skill"].to_pylist()}]
    size = (2.8 + 0.24 * len(layers), 0.8 + 1.8 * (len(skills) + 1))
    figure = Figure(figsize=size, layout="constrained")
    title = f"Without a layer, guidance {cfg_scale:g}: difference and 95 % over {outline.unit}"
    figure.suptitle(title, color=INK)
    axes = figure.subplots(len(skills) + 1, 1, sharex=True)
    for place, skill in zip(axes, skills, strict=False):
        clean(place)
        place.set_title(skill, color=INK, fontsize="small")
        place.axhline(0.0, color=FAINT, linestyle="--", linewidth=1)
        for number, split in enumerate(splits):
            rows = {
                row["arm"]: row for row in _rows(claims, split, cfg_scale) if row["skill"] == skill
            }
            found = [(n, rows[arm]) for n, arm in arms.items() if arm in rows]
            shift, colour = 0.4 * (number / len(splits) - 0.25), _colour(number, len(splits))
            at, values = [n + shift for n, _ in found], [row["difference"] for _, row in found]
            place.plot(at, values, "o", markersize=4, color=colour, label=split)
            for x, (_, row) in zip(at, found, strict=True):
                if row["seeds_low"] is not None:
                    place.plot([x, x], [row["seeds_low"], row["seeds_high"]], color=colour)
    last = axes[-1]
    clean(last)
    last.set_title("weight: mean over blocks, and least to most", color=INK, fontsize="small")
    last.axhline(1 / len(layers), color=FAINT, linestyle="--", linewidth=1)
    last.vlines(layers, weights.min(0), weights.max(0), color=LINES[0], alpha=0.5)
    last.plot(layers, weights.mean(0), "o", markersize=4, color=LINES[0])
    last.set_xlabel("LLM layer", color=INK)
    _add_legend(figure, axes[0])
    return figure


def _colour(number: int, num_arms: int) -> Any:
    """Of an arm: all differ, up to ten."""
    return LINES[number] if num_arms <= len(LINES) else colormaps["tab10"](number % 10)


def _line(number: int, num_arms: int) -> dict[str, Any]:
    """How the line of an arm is drawn: all differ, up to forty."""
    marker, dashes = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))[number // 10 % 4]
    return {"color": _colour(number, num_arms), "marker": marker, "linestyle": dashes}


def _add_legend(figure: Figure, axes: Any) -> None:
    """Beside the panels; the figure grows where there are many arms."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 0.4 + 0.2 * len(labels)))
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.4
    )


def _rows(claims: pa.Table, split: str, cfg_scale: float) -> Sequence[dict[str, Any]]:
    """By skill in the order of ``SKILLS``, then by arm as they came."""
    mask = pc.and_(pc.equal(claims["split"], split), pc.equal(claims["cfg_scale"], cfg_scale))
    return sorted(claims.filter(mask).to_pylist(), key=lambda row: SKILLS.index(row["skill"]))


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
