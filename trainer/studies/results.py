"""What was judged of runs: a file beside each run, and one of all the runs of a study.

Both say what the runs were trained and judged as, so judgements outlive the runs themselves, and
those that are of anything else than what is asked for now are never taken for it.
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

from ...schemas import InputError, Scoring, TrainConfig, write_whole

JUDGED_SCHEMA = pa.schema(
    [
        pa.field("cfg_scale", pa.float64(), nullable=False),
        pa.field("caption", pa.int32(), nullable=False),
        pa.field("image", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("skill", pa.string(), nullable=False),
        pa.field("right", pa.bool_(), nullable=False),
        pa.field("num_asked", pa.int8(), nullable=False),
        pa.field("num_found", pa.int8(), nullable=False),
    ]
)
"""A row a skill of an image: ``caption`` is a row of the judge's file, ``image`` which of its
images; ``num_asked`` and ``num_found`` are objects in the caption and in the image."""
_META = b"judged"


@dataclass(frozen=True)
class EvaluationKey:
    """What a run is trained and judged as; where it lies does not matter.

    Attributes:
        weights: digest of the routing weights that it is judged under; empty: what it learned.
    """

    config: TrainConfig
    scoring: Scoring
    weights: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        document = {
            "config": self.config.model_dump(mode="json", exclude={"output"}),
            "scoring": self.scoring.model_dump(mode="json"),
        }
        return {**document, "weights": self.weights} if self.weights else document

    def is_said(self, document: Any) -> bool:
        """Whether :meth:`document` was said of the same; options that came since have their
        defaults."""
        try:
            config = {**document["config"], "output": self.config.output}
            said = EvaluationKey(
                TrainConfig.model_validate(config),
                Scoring.model_validate(document["scoring"]),
                document.get("weights", ""),
            )
        except (KeyError, TypeError, ValidationError):
            return False
        return said == self


@dataclass(frozen=True)
class RunScores:
    """Judgements of one run.

    Attributes:
        labels: of the run: ``arm`` and ``seed``, and of a trial the ``value`` that it tried.
        asked: what it was trained and judged as, as JSON has it.
        table: ``JUDGED_SCHEMA``.
    """

    labels: Mapping[str, str | int]
    asked: Mapping[str, Any]
    table: pa.Table

    @property
    def name(self) -> str:
        return name_of(self.labels)

    def labelled(self) -> pa.Table:
        """The table with the labels as its first columns."""
        return label(self.table, **self.labels)


def name_of(labels: Mapping[str, str | int]) -> str:
    """What judgements with these labels are held by."""
    return "/".join(map(str, labels.values()))


def label(table: pa.Table, **labels: str | int) -> pa.Table:
    """Judgements with what they are of as their first columns."""
    table = table.replace_schema_metadata(None)
    for place, (name, value) in enumerate(labels.items()):
        kind = pa.string() if isinstance(value, str) else pa.int64()
        column = pa.repeat(pa.scalar(value, kind), table.num_rows)
        table = table.add_column(place, pa.field(name, kind, nullable=False), column)
    return table


def write_scores(path: Path, table: pa.Table, asked: EvaluationKey) -> None:
    """Judgements of one run, into its folder."""
    _write(path, table, asked.document())


def read_scores(path: Path, asked: EvaluationKey) -> pa.Table | None:
    """Those judgements, where they are there and of what is asked; without metadata."""
    if not path.exists():
        return None
    table = pq.read_table(path)
    said = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
    return table.replace_schema_metadata(None) if asked.is_said(said) else None


class ResultsTable:
    """Judgements of all the runs of a study in one file.

    Args:
        path: of the Parquet file; it need not be there.
        columns: names of the labels.

    Raises:
        InputError: on first use, the file is not one.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path = path
        self.columns = columns

    @cached_property
    def held(self) -> dict[str, RunScores]:
        """By name."""
        if not self.path.exists():
            return {}
        try:
            table = pq.read_table(self.path)
            said = json.loads((table.schema.metadata or {})[_META])
            names = [table.column(column) for column in self.columns]
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.path} does not hold judgements of a study ({error}); put it aside"
            ) from error
        keys = pc.binary_join_element_wise(*(name.cast(pa.string()) for name in names), "/")
        rows = table.drop_columns([*self.columns]).replace_schema_metadata(None)
        found = {}
        codes = keys.combine_chunks().dictionary_encode()
        starts = np.flatnonzero(np.diff(codes.indices.to_numpy(), prepend=-1))
        stops = [*starts[1:].tolist(), len(keys)]
        for start, stop in zip(starts.tolist(), stops, strict=True):
            labels = {c: name[start].as_py() for c, name in zip(self.columns, names, strict=True)}
            key = keys[start].as_py()
            found[key] = RunScores(labels, said[key], rows.slice(start, stop - start))
        return found

    def find(self, name: str, asked: EvaluationKey) -> pa.Table | None:
        """Judgements of a run, where they are held and of what is asked."""
        judged = self.held.get(name)
        return judged.table if judged is not None and asked.is_said(judged.asked) else None

    def add(self, judged: RunScores) -> None:
        """Write these beside what is held, or in place of those of the same name."""
        self.write({**self.held, judged.name: judged}.values())

    def write(self, every: Iterable[RunScores]) -> None:
        """Put these in place of what is held."""
        self.held = {judged.name: judged for judged in every}
        table = pa.concat_tables([judged.labelled() for judged in self.held.values()])
        _write(self.path, table, {name: dict(each.asked) for name, each in self.held.items()})


def _write(path: Path, table: pa.Table, said: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_META: json.dumps(said).encode()})
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue())
