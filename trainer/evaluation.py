"""Generated images against what their captions ask for, with chance beside every score.

Shapes: N images or captions, C channels, h x w latent, S scenes.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..pipeline.store import Rows
from ..schemas import InputError, Mixes, write_document
from .dit import DiT
from .flow import Flow
from .order import NULL_CAPTION
from .sampling import Callback, Solver, sample
from .scenes import Scene
from .shapes import SKILLS, judge_cells, read_cells, render

EVALUATION = "evaluation.json"
NUM_SHIFTS = 10
"""Permutations that chance is averaged over."""
NUM_RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""
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
"""A row a split and skill; see :class:`Evaluation`."""

Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""Latents [N, C, h, w] -> RGB images [N, height, width, 3]."""


class Features(Protocol):
    """Where captions' hidden states come from: a feature store, or prompts encoded in memory."""

    @property
    def mixes(self) -> Mixes | None: ...

    def read(
        self, ids: Sequence[int] | NDArray[np.int64], layers: Sequence[int] | None = None
    ) -> Rows: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores by split and skill (see ``shapes.judge_cells`` for what a skill means).

    Attributes:
        table: ``EVALUATION_SCHEMA``. ``accuracy`` is the share of the ``num_images`` images whose
            caption asks for the skill that show it; ``low`` and ``high`` are its 95 % bootstrap
            interval over the ``num_scenes`` scenes; ``chance`` is what perfect images of other
            captions reach, null where a split has a single scene.
    """

    table: pa.Table

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """split -> skill -> the other columns; JSON-able."""
        scores: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.table.to_pylist():
            scores.setdefault(row.pop("split"), {})[row.pop("skill")] = row
        return scores

    def to_text(self) -> str:
        """An aligned table; a line a split and skill."""
        return align(self._rows(), num_words=2)

    __str__ = to_text
    __repr__ = to_text

    def _repr_html_(self) -> str:
        return to_html(self._rows())

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
class Report:
    """What ``semroute evaluate`` found of a run, and how; ``evaluation.json`` in its directory.

    Attributes:
        step, weights: the checkpoint, and ``ema`` or ``model``.
        features: the store whose captions were drawn.
        num_steps, seed: of sampling.
        scores: by guidance scale.
        cfg_interval: lowest and highest t that were guided.
    """

    step: int
    weights: str
    features: str
    num_steps: int
    seed: int
    scores: Mapping[float, Evaluation]
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def write(self, run: Path) -> Path:
        """Write the file, whole or not at all."""
        path = run / EVALUATION
        scores = [
            {"cfg_scale": cfg_scale, "scores": evaluation.table.to_pylist()}
            for cfg_scale, evaluation in self.scores.items()
        ]
        document = {f.name: getattr(self, f.name) for f in fields(self)} | {"scores": scores}
        write_document(path, json.dumps(document, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, run: Path) -> "Report | None":
        """What :meth:`write` wrote; None where the run was not evaluated."""
        path = run / EVALUATION
        if not path.exists():
            return None
        document = json.loads(path.read_text("utf-8"))
        scores = {
            entry["cfg_scale"]: Evaluation(
                pa.Table.from_pylist(entry["scores"], schema=EVALUATION_SCHEMA)
            )
            for entry in document["scores"]
        }
        return cls(**document | {"scores": scores})


def score(
    images: NDArray[np.uint8], scenes: Sequence[Scene], splits: Sequence[str], *, seed: int = 0
) -> Evaluation:
    """Judge images and summarise by split and skill.

    Chance is measured, not computed: a true image of every scene of the split is rendered and
    judged against another scene of the same split, over several permutations without a fixed
    point, and weighted as the images are. It is what a generator reaches that draws perfectly and
    ignores its caption; one that draws nothing recognisable stays below it.

    The interval is the percentile bootstrap (Efron 1979) over scenes: all images of a scene, and
    all captions that phrase it, are drawn together, for they are not independent. It has no width
    where every image is right or none is.

    Args:
        images: [N, 18, 18, 3] uint8.
        scenes: what each image should show.
        splits: the split that each image counts for.
        seed: of the renders, the permutations and the resamples.

    Raises:
        InputError: no images, lengths that differ, or images that are not of this world.
    """
    if not len(images) == len(scenes) == len(splits) or not len(images):
        raise InputError(
            f"found {len(images)} images, {len(scenes)} scenes and {len(splits)} splits, expected "
            "the same number of each, and at least one"
        )
    rng = np.random.default_rng(seed)
    cells = read_cells(images)
    rows = []
    for split in dict.fromkeys(splits):
        members = [number for number, name in enumerate(splits) if name == split]
        lucky = chance([scenes[number] for number in members], rng)
        judged: dict[str, dict[Scene, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for number in members:
            for skill, good in judge_cells(cells[number], scenes[number]).items():
                judged[skill][scenes[number]].append(good)
        for skill in SKILLS:
            if skill not in judged:
                continue
            right = np.array([sum(each) for each in judged[skill].values()])
            asked = np.array([len(each) for each in judged[skill].values()])
            low, high = interval(right, asked, rng)
            rows.append(
                {
                    "split": split,
                    "skill": skill,
                    "accuracy": float(right.sum() / asked.sum()),
                    "low": low,
                    "high": high,
                    "chance": lucky.get(skill),
                    "num_images": int(asked.sum()),
                    "num_scenes": len(asked),
                }
            )
    return Evaluation(pa.Table.from_pylist(rows, schema=EVALUATION_SCHEMA))


def generate(
    model: DiT,
    flow: Flow,
    features: Features,
    caption_ids: Sequence[int] | NDArray[np.int64],
    how: Solver,
    *,
    seed: int,
    batch_size: int,
    numbers: Sequence[int] | None = None,
    shape: tuple[int, int, int] | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> NDArray[np.float32]:
    """One latent a caption, float32 [N, C, h, w], in the units that the model was trained on.

    Only the layers that the model reads are read, a batch at a time. The noise of latent i is a
    function of (seed, its number): a latent depends on the batch size only by rounding.

    Args:
        caption_ids: entries of ``features``; repeat one for several latents.
        batch_size: captions sampled at once; guidance runs them a second time.
        numbers: of the latents, by default 0, 1, 2 and so on.
        shape: (C, h, w) of the latents, by default the model's own.
        callback: called after each step of each batch, as :func:`.sampling.solve` does.

    Raises:
        InputError: a batch size below 1, no such caption, or features that are mixes of other
            weights than the model's.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")
    device = next(model.parameters()).device
    shape = model.latent_shape if shape is None else shape
    latents = np.empty((len(caption_ids), *shape), np.float32)
    numbers = range(len(caption_ids)) if numbers is None else numbers
    with (
        model.reading(features.mixes),
        tqdm(total=len(caption_ids), unit="image", disable=not progress) as bar,
    ):
        layers = model.router.layers_read
        null = None
        if how.cfg_scale != 1.0:
            null = features.read([NULL_CAPTION], layers).tensor(device)
        for first in range(0, len(caption_ids), batch_size):
            part = caption_ids[first : first + batch_size]
            rows = features.read(part, layers)
            latents[first : first + len(part)] = sample(
                model,
                flow,
                rows.tensor(device),
                torch.from_numpy(rows.offsets),
                null,
                how,
                seed=seed,
                numbers=numbers[first : first + len(part)],
                shape=shape,
                callback=callback,
            ).numpy(force=True)
            bar.update(len(part))
    return latents


def evaluate(
    model: DiT,
    flow: Flow,
    features: Features,
    caption_ids: Sequence[int] | NDArray[np.int64],
    scenes: Sequence[Scene],
    splits: Sequence[str],
    decode: Decode,
    how: Solver,
    *,
    seed: int,
    batch_size: int,
    progress: bool = True,
) -> tuple[Evaluation, NDArray[np.uint8]]:
    """Generate an image of every caption and score them: the scores, and the images judged.

    Args:
        scenes, splits: of each caption, as in :func:`score`.
        decode: latents -> images.
        how, seed, batch_size: as in :func:`generate`.
    """
    latents = generate(
        model,
        flow,
        features,
        caption_ids,
        how,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    images = decode(latents)
    return score(images, scenes, splits, seed=seed), images


def chance(scenes: Sequence[Scene], rng: np.random.Generator) -> Mapping[str, float]:
    """Skill -> accuracy of true images of other scenes; empty where there is no other scene.

    See :func:`score`.
    """
    weights = Counter(scenes)
    unique = list(weights)
    cells = read_cells(np.stack([render(scene, rng) for scene in unique]))
    num = len(unique)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    # A shift of a random circle by 1 to num - 1 places is a permutation without a fixed point.
    circle = rng.permutation(num)
    for shift in rng.permutation(np.arange(1, num))[:NUM_SHIFTS]:
        for own, other in zip(circle, np.roll(circle, shift), strict=True):
            weight = weights[unique[own]]
            for skill, good in judge_cells(cells[other], unique[own]).items():
                asked[skill] += weight
                right[skill] += weight * good
    return {skill: right[skill] / asked[skill] for skill in asked}


def align(rows: Sequence[Sequence[str]], num_words: int) -> str:
    """A table as text: the first columns, of words, to the left, and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < num_words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def to_html(rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML, the first row being the head; every cell is escaped."""
    lines = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    ]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def interval(
    totals: NDArray[Any], counts: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % of a mean over resampled scenes: what the images of each add up to, and how many there
    are, [S]."""
    num = len(totals)
    times = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)  # (resamples, S)
    low, high = np.percentile((times @ totals) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)
