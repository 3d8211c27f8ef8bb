"""Several runs side by side: settings, outcomes and curves.

Runs may be unfinished, or belong to a study. Nothing is trained or sampled.
"""

import base64
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.style import Figure
from ...schemas import InputError, RunRecord, flat, write_document
from ...schemas.arrow import grouped
from ...schemas.display import Table
from ..plots.runs import curves_of_runs, loss_by_t, routing_of_runs
from ..runs.checkpoint import list_checkpoints
from ..runs.metrics import METRICS, METRICS_SCHEMA, read_metrics
from ..runs.record import FREE, read_record
from ..runs.scores import EvaluationReport
from .job import SCORES
from .results import read_any_scores

ALL = "all"
"""The skill that is compared: everything that a caption asks for is right."""
STRATEGY = "routing.strategy"
_STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem;color:#1f2933}"
    "table{border-collapse:collapse}td,th{padding:.25rem .75rem;text-align:right;"
    "border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}"
)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Runs side by side, see :func:`semroute.compare`.

    Attributes:
        paths: run directories.
        names: the paths without the folders that all of them share.
        records: the runs' ``run.json``.
        table: one row per run: ``run``, ``strategy``, each setting that differs by its dotted key,
            ``step``, ``loss`` (mean over the last tenth of the lines), ``validation`` (the last one
            measured), one column per split and guidance scale with the share of fully correct
            images, ``entropy`` of the routing weights (last logged, 1 is uniform) and ``samples/s``
            (median). Null if a run has none.
    """

    paths: list[Path]
    names: list[str]
    records: list[RunRecord]
    table: pa.Table

    @cached_property
    def metrics(self) -> list[pa.Table]:
        """Metrics of each run, as :meth:`semroute.trainer.runs.run.Run.metrics`."""
        lines = [read_metrics(path) for path in self.paths]
        return [pa.Table.from_pylist(each, schema=METRICS_SCHEMA) for each in lines]

    def figures(self) -> dict[str, Figure]:
        """Name -> figure, for all data that some run has.

        ``curves``: loss, loss on held-out samples and entropy over the steps; ``by-t``: the last
        loss on held-out samples by noise level; ``routing``: the weights of each run at its newest
        checkpoint.
        """
        from ..runs.run import load_run

        figures: dict[str, Figure] = {}
        if any(metrics.num_rows for metrics in self.metrics):
            figures["curves"] = curves_of_runs(self.metrics, self.names)
        if any(_validated(metrics).num_rows for metrics in self.metrics):
            last = {
                name: _validated(metrics)["validation_by_t"][-1].as_py()
                for name, metrics in zip(self.names, self.metrics, strict=True)
                if _validated(metrics).num_rows
            }
            figures["by-t"] = loss_by_t(last)
        weights = {}
        for name, path in zip(self.names, self.paths, strict=True):
            if list_checkpoints(path):
                run = load_run(path)
                weights[name] = (run.weights().mean(0), run.layers)
        if weights:
            figures["routing"] = routing_of_runs(weights)
        return figures

    def to_text(self) -> str:
        """The table as aligned text."""
        return str(Table(self._rows()))

    __str__ = to_text
    __repr__ = to_text

    def _repr_html_(self) -> str:
        return Table(self._rows()).to_html()

    def write_html(self, out: str | os.PathLike[str]) -> Path:
        """Write the table and the figures as one self-contained page."""
        images = []
        for name, figure in self.figures().items():
            code = base64.b64encode(figure._repr_png_()[0]).decode()
            images.append(f"<h2>{name}</h2><img alt='{name}' src='data:image/png;base64,{code}'>")
        out = Path(out)
        write_document(
            out,
            f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Runs</title>"
            f"<style>{_STYLE}</style><h1>{len(self.paths)} runs</h1>{self._repr_html_()}"
            f"{''.join(images)}</html>\n",
        )
        return out

    def to_json(self) -> str:
        """The table as JSON, a list of rows."""
        return json.dumps(self.table.to_pylist(), indent=1)

    def _rows(self) -> list[list[str]]:
        names = self.table.column_names
        body = [[_cell(name, row[name]) for name in names] for row in self.table.to_pylist()]
        return [names, *body]


def compare(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Compare runs, finished or not.

    Raises:
        InputError: no runs, a run given twice, or a path without a run.
    """
    folders = [Path(path) for path in paths]
    if not folders or len({*folders}) < len(folders):
        raise InputError(
            f"found {len(folders)} runs, {len({*folders})} of them different: name each once"
        )
    records = [read_record(path) for path in folders]
    settings = [_settings(record) for record in records]
    keys = list(dict.fromkeys(key for each in settings for key in each if key != STRATEGY))
    differing = [key for key in keys if len({json.dumps(s.get(key)) for s in settings}) > 1]
    names = _short_names(folders)
    rows = []
    for path, name, own in zip(folders, names, settings, strict=True):
        rows.append(
            {
                "run": name,
                "strategy": own[STRATEGY],
                **{key: own.get(key) for key in differing},
                **_read_outcome(path),
            }
        )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda column: column in ("entropy", "samples/s"))  # last, after the scores
    arrays = {column: _array([row.get(column) for row in rows]) for column in columns}
    return Comparison(folders, names, records, pa.table(arrays))


def _settings(record: RunRecord) -> dict[str, Any]:
    """Settings that can change the result, by key; not paths, nor what is logged or saved."""
    codec = record.codec
    return {
        "LLM": record.model_source.rstrip("/").rpartition("/")[2],
        "codec": codec.name if codec.quality is None else f"{codec.name} {codec.quality:g}",
        "layers": record.features.layers,
        "samples": record.features.samples.num_samples,
        "steps": record.config.steps,
        **flat(record.config.model_dump(mode="json", exclude=FREE)),
    }


def _read_outcome(path: Path) -> dict[str, Any]:
    try:
        return _outcome(path)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path / METRICS} is damaged: a line lacks a number ({error}). Put it back from a "
            "copy."
        ) from error


def _outcome(path: Path) -> dict[str, Any]:
    """Result columns of a run, from its files."""
    lines = read_metrics(path)
    last_tenth = lines[-max(1, len(lines) // 10) :]
    measured = [line for line in lines if line.get("validation_loss") is not None]
    return {
        "step": lines[-1]["step"] if lines else 0,
        "loss": statistics.fmean(line["loss"] for line in last_tenth) if lines else None,
        **({"validation": measured[-1]["validation_loss"]} if measured else {}),
        **_scores(path),
        "entropy": lines[-1]["routing_entropy"] if lines else None,
        "samples/s": statistics.median(line["samples_per_second"] for line in lines)
        if lines
        else None,
    }


def _scores(path: Path) -> dict[str, float]:
    """Split and guidance scale -> share of fully correct images, from ``semroute evaluate`` or a
    study."""
    report = EvaluationReport.read(path)
    if report is not None:
        return {
            f"{split} at {scale:g}": skills[ALL]["accuracy"]
            for scale, evaluation in report.scores.items()
            for split, skills in evaluation.to_dict().items()
            if ALL in skills
        }
    if not (path / SCORES).exists():
        return {}
    table = read_any_scores(path / SCORES)
    table = table.filter(pc.equal(table["skill"], ALL))
    right = pc.cast(table["right"], pa.float64())
    groups = grouped(table.append_column("share", right), ["split", "cfg_scale"])
    rows = groups.aggregate([("share", "mean")]).to_pylist()
    rows.sort(key=lambda row: (row["cfg_scale"], row["split"] == "held-out"))
    return {f"{row['split']} at {row['cfg_scale']:g}": row["share_mean"] for row in rows}


def _validated(metrics: pa.Table) -> pa.Table:
    return metrics.filter(pc.is_valid(metrics["validation_loss"]))


def _array(values: list[Any]) -> pa.Array:
    """Values as an array; as JSON if they have several types."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and not kinds & {list, dict}):
        return pa.array(values)
    return pa.array([None if value is None else json.dumps(value) for value in values])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "step":
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Paths without the folders that all of them share."""
    absolute = [path.absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(shared).as_posix() for path in absolute]
