"""``evaluation.json``: the scores of a run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...schemas import InputError, write_document
from ...schemas.display import Table
from ...schemas.json_file import read_json

EVALUATION = "evaluation.json"
EVALUATION_SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("skill", pa.string(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),
        pa.field("high", pa.float64(), nullable=False),
        pa.field("chance", pa.float64()),
        pa.field("num_images", pa.int64(), nullable=False),
        pa.field("num_scenes", pa.int64(), nullable=False),
    ]
)
"""One row per split and skill; see :class:`Evaluation`."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores by split and skill (skills: see ``shapes.judge_cells``).

    Attributes:
        table: ``EVALUATION_SCHEMA``. Of the ``num_images`` images whose caption asks for the skill,
            ``accuracy`` is the share that shows it; ``low`` and ``high`` are its 95 % bootstrap
            interval over the ``num_scenes`` scenes; ``chance`` is what perfect images of other
            captions reach, null if a split has a single scene.
    """

    table: pa.Table

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """split -> skill -> the other columns; JSON-able."""
        scores: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.table.to_pylist():
            scores.setdefault(row.pop("split"), {})[row.pop("skill")] = row
        return scores

    def to_text(self) -> str:
        """An aligned table with one line per split and skill."""
        return str(Table(self._rows(), num_words=2))

    __str__ = to_text
    __repr__ = to_text

    def _repr_html_(self) -> str:
        return Table(self._rows()).to_html()

    def _rows(self) -> list[list[str]]:
        head = ["split", "skill", "accuracy", "95 % interval", "chance", "images", "scenes"]
        return [
            head,
            *(
                [
                    row["split"],
                    row["skill"],
                    f"{row['accuracy']:.3f}",
                    f"{row['low']:.3f} to {row['high']:.3f}",
                    "-" if row["chance"] is None else f"{row['chance']:.3f}",
                    str(row["num_images"]),
                    str(row["num_scenes"]),
                ]
                for row in self.table.to_pylist()
            ),
        ]


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Results of ``semroute evaluate``, and how they were obtained: ``evaluation.json``.

    Attributes:
        step, weights: the checkpoint, and ``ema`` or ``model``.
        features: the store whose captions images were generated from.
        num_steps, seed: settings of sampling.
        scores: by guidance scale.
        cfg_interval: lowest and highest t with guidance.
    """

    step: int
    weights: str
    features: str
    num_steps: int
    seed: int
    scores: Mapping[float, Evaluation]
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def write(self, run: Path) -> Path:
        """Write the file atomically."""
        path = run / EVALUATION
        scores = [
            {"cfg_scale": cfg_scale, "scores": evaluation.table.to_pylist()}
            for cfg_scale, evaluation in self.scores.items()
        ]
        document = {f.name: getattr(self, f.name) for f in fields(self)} | {"scores": scores}
        write_document(path, json.dumps(document, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, run: Path) -> "EvaluationReport | None":
        """Read what :meth:`write` wrote; None if the run was not evaluated."""
        path = run / EVALUATION
        if not path.exists():
            return None
        document = read_json(path, follow=True)
        try:
            scores = {
                entry["cfg_scale"]: Evaluation(
                    pa.Table.from_pylist(entry["scores"], schema=EVALUATION_SCHEMA)
                )
                for entry in document["scores"]
            }
            return cls(**document | {"scores": scores})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}; evaluate the run again") from error
