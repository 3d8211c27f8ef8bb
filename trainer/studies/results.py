"""Scores of runs on disk: one file beside each run, and one file of all runs of a study.

Both record what the runs were trained on and how they were scored. So scores outlive the runs, and
scores of another training or scoring are never taken for the requested ones.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from ...pipeline.store.checks.parquet import READ_ERRORS, read_table
from ...schemas import InputError, Scoring, TrainConfig, write_whole
from ...schemas.json_file import load_json
from ..evaluation.shapes import IMAGE_SCORES_SCHEMA
from ..shapes.judge import SKILLS

_METADATA_KEY = b"judged"


@dataclass(frozen=True)
class EvaluationKey:
    """How a run is trained and scored; where it lies does not matter.

    Attributes:
        weights: digest of the routing weights that it is scored with; empty: its own.
    """

    config: TrainConfig
    scoring: Scoring
    weights: str = ""

    def document(self) -> dict[str, Any]:
        """The key as plain JSON types."""
        document = {
            "config": self.config.model_dump(mode="json", exclude={"output"}),
            "scoring": self.scoring.model_dump(mode="json"),
        }
        return {**document, "weights": self.weights} if self.weights else document

    def matches(self, document: Any) -> bool:
        """Whether a stored :meth:`document` describes the same evaluation.

        Options added since it was written count as their defaults; but one without
        ``random_version`` is of version 1, which the key need not name.
        """
        try:
            config = {**document["config"], "output": self.config.output}
            if "random_version" not in config and self.config.random_version == 1:
                config["random_version"] = 1
            stored = EvaluationKey(
                TrainConfig.model_validate(config),
                Scoring.model_validate(document["scoring"]),
                document.get("weights", ""),
            )
        except (KeyError, TypeError, ValidationError):
            return False
        return stored == self


@dataclass(frozen=True)
class RunScores:
    """Scores of the images of one run.

    Attributes:
        labels: ``arm`` and ``seed`` of the run, and for a trial the ``value`` that it tried.
        key: how the run was trained and scored, see :meth:`EvaluationKey.document`.
        table: :data:`semroute.trainer.evaluation.shapes.IMAGE_SCORES_SCHEMA`.
    """

    labels: Mapping[str, str | int]
    key: Mapping[str, Any]
    table: pa.Table

    @property
    def name(self) -> str:
        """Name of the run in a :class:`ResultsTable`."""
        return name_of(self.labels)

    def labelled(self) -> pa.Table:
        """The table with the labels as its first columns."""
        return label(self.table, **self.labels)


def name_of(labels: Mapping[str, str | int]) -> str:
    """Name of the run with these labels."""
    return "/".join(map(str, labels.values()))


def label(table: pa.Table, **labels: str | int) -> pa.Table:
    """Scores with labels as their first columns."""
    table = table.replace_schema_metadata(None)
    for position, (name, value) in enumerate(labels.items()):
        kind = pa.string() if isinstance(value, str) else pa.int64()
        column = pa.repeat(pa.scalar(value, kind), table.num_rows)
        table = table.add_column(position, pa.field(name, kind, nullable=False), column)
    return table


def write_scores(path: Path, table: pa.Table, key: EvaluationKey) -> None:
    """Write the scores of one run."""
    _write(path, table, key.document())


def read_scores(path: Path, key: EvaluationKey) -> pa.Table | None:
    """Scores of one run, without metadata; None if there are none for this key.

    Raises:
        InputError: the file holds something else.
    """
    if not path.exists():
        return None
    table, stored = _read(path, IMAGE_SCORES_SCHEMA)
    return table if key.matches(stored) else None


def read_any_scores(path: Path) -> pa.Table:
    """Scores of one run, however it was scored.

    Raises:
        InputError: as :func:`read_scores`.
    """
    return _read(path, IMAGE_SCORES_SCHEMA)[0]


class ResultsTable:
    """Scores of all runs of a study in one file.

    Args:
        path: the Parquet file; it need not exist.
        columns: names of the labels.

    Raises:
        InputError: on first use, the file holds something else.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.columns = columns

    @cached_property
    def runs(self) -> dict[str, RunScores]:
        """Stored scores by name of the run."""
        if not self.path.exists():
            return {}
        labels = [
            pa.field(name, pa.int64() if name == "seed" else pa.string(), nullable=False)
            for name in self.columns
        ]
        table, keys = _read(self.path, pa.schema([*labels, *IMAGE_SCORES_SCHEMA]))
        columns = [table.column(column) for column in self.columns]
        names = pc.binary_join_element_wise(*(each.cast(pa.string()) for each in columns), "/")
        for name in pc.unique(names).to_pylist():
            if not isinstance(keys.get(name), dict):
                raise _refusal(self.path, f"it does not say how {name} was trained and scored")
        rows = table.drop_columns([*self.columns])
        # The rows of a run lie together:
        #   name    a/0 a/0 a/1 a/1 a/1
        #   code     0   0   1   1   1      a run starts where the code changes
        codes = names.combine_chunks().dictionary_encode()
        starts = np.flatnonzero(np.diff(codes.indices.to_numpy(), prepend=-1))
        stops = [*starts[1:].tolist(), len(names)]
        runs = {}
        for start, stop in zip(starts.tolist(), stops, strict=True):
            own = {c: each[start].as_py() for c, each in zip(self.columns, columns, strict=True)}
            name = names[start].as_py()
            runs[name] = RunScores(own, keys[name], rows.slice(start, stop - start))
        return runs

    def find(self, name: str, key: EvaluationKey) -> pa.Table | None:
        """Scores of a run; None if there are none for this key."""
        run = self.runs.get(name)
        return run.table if run is not None and key.matches(run.key) else None

    def add(self, run: RunScores) -> None:
        """Add the scores of a run, in place of those with the same name."""
        self.write({**self.runs, run.name: run}.values())

    def write(self, runs: Iterable[RunScores]) -> None:
        """Replace all stored scores."""
        self.runs = {run.name: run for run in runs}
        table = pa.concat_tables([run.labelled() for run in self.runs.values()])
        _write(self.path, table, {name: dict(run.key) for name, run in self.runs.items()})


def _read(path: Path, schema: pa.Schema) -> tuple[pa.Table, dict[str, Any]]:
    """Scores, and what their metadata say of how they came about."""
    try:
        table = read_table(path, schema)
    except READ_ERRORS as error:
        raise _refusal(path, str(error)) from error
    if unknown := {*pc.unique(table["skill"]).to_pylist()} - {*SKILLS}:
        raise _refusal(path, f"{min(unknown)!r} is not a skill; expected {', '.join(SKILLS)}")
    document = load_json((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"), str(path))
    if not isinstance(document, dict):
        raise _refusal(path, f"its metadata {_METADATA_KEY.decode()} are no object")
    return table.replace_schema_metadata(None), document


def _refusal(path: Path, found: str) -> InputError:
    return InputError(f"{path} does not hold scores of a study: {found}. Move it away")


def _write(path: Path, table: pa.Table, metadata: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue())
