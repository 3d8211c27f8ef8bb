"""Scores of images generated from captions of the shapes dataset, with chance beside every score.

Shapes: N images or captions, C channels, h x w latent, S scenes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...pipeline.store.checks.parquet import READ_ERRORS, read_table
from ...pipeline.style import DPI
from ...schemas import InputError, Scoring
from ...schemas.files import locate
from ..diffusion.sampling import SamplingConfig
from ..plots.images import sample_grid
from ..runs.scores import EVALUATION_SCHEMA, Evaluation, EvaluationReport
from ..shapes.dataset import read_scenes
from ..shapes.images import render
from ..shapes.judge import EMPTY, SKILLS, judge, judge_cells, read_cells
from ..shapes.scenes import Scene
from .generate import CaptionSet, Decode, captions_of_file, generate

if TYPE_CHECKING:
    from ..runs.run import Run

IMAGE_SCORES_SCHEMA = pa.schema(
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
"""One row per image and skill: ``caption`` is a row of the dataset's file, ``image`` the number of
the image among those of its caption; ``num_asked`` and ``num_found`` are the objects in the caption
and in the image."""
_SAMPLES_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("text", "scene", "split")]
)
NUM_SHIFTS = 10
"""Number of permutations that chance is averaged over."""
NUM_RESAMPLES = 2000
"""Number of bootstrap resamples behind an interval."""
NUM_SHOWN = 24
"""Number of images in the figure of an evaluation."""


@dataclass(frozen=True)
class ShapesCaptions:
    """Captions of a file of the shapes dataset, and what each asks for.

    Attributes:
        texts: in words.
        scenes: what an image of each should show.
        splits: the split that each counts for.
    """

    texts: list[str]
    scenes: list[Scene]
    splits: list[str]


def read_captions(samples: str) -> ShapesCaptions:
    """Captions of ``dev.parquet`` or ``test.parquet``.

    Raises:
        InputError: no such file, or not one of the shapes dataset.
    """
    try:
        table = read_table(locate(samples), _SAMPLES_SCHEMA)
        scenes = read_scenes(table)
    except READ_ERRORS as error:
        raise InputError(
            f"samples {samples}: {error}; expected dev.parquet or test.parquet of semroute shapes"
        ) from error
    return ShapesCaptions(table["text"].to_pylist(), scenes, table["split"].to_pylist())


def open_captions(run: "Run", scoring: Scoring) -> tuple[ShapesCaptions, CaptionSet]:
    """Captions that a run is scored on: what they ask for, and their features.

    Raises:
        InputError: as :func:`read_captions`, features that the run cannot read, or features that
            were extracted from another file.
    """
    asked = read_captions(scoring.samples)
    return asked, captions_of_file(run, scoring.features, scoring.samples, asked.texts)


def images_by_scale(
    run: "Run",
    captions: CaptionSet,
    scoring: Scoring,
    decode: Decode,
    *,
    batch_size: int,
    progress: bool = True,
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Guidance scales in turn, each with ``scoring.images_per_caption`` images of every caption.

    Image i shows caption ``i % len(captions)``.

    Args:
        decode: latents -> images.
        batch_size: images sampled at once.
        progress: show a bar.
    """
    sampling = SamplingConfig(
        scoring.num_steps,
        cfg_interval=scoring.cfg_interval,
        method=scoring.solver,
        clock=run.clock(scoring.clock),
        dtype=run.sampling_dtype(scoring.dtype),
    )
    for cfg_scale in scoring.cfg_scales:
        latents = generate(
            run.model,
            run.flow,
            captions.features,
            captions.ids * scoring.images_per_caption,
            replace(sampling, cfg_scale=cfg_scale),
            seed=scoring.seed,
            batch_size=batch_size,
            progress=progress,
        )
        yield cfg_scale, decode(latents)


def score_run(
    run: "Run",
    scoring: Scoring,
    decode: Decode,
    *,
    batch_size: int,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Score a run on captions of the shapes dataset at several guidance scales.

    Writes ``evaluation.json`` and, into ``figures``, some scored images of each scale.

    Args:
        decode: latents -> images.
        batch_size: images sampled at once.
        report: takes each scale's table of scores.

    Raises:
        InputError: as :func:`open_captions`.
    """
    asked, captions = open_captions(run, scoring)
    num = scoring.images_per_caption
    shown = np.linspace(0, len(captions) - 1, min(NUM_SHOWN, len(captions))).astype(int)
    evaluations, written = {}, []
    for cfg_scale, images in images_by_scale(run, captions, scoring, decode, batch_size=batch_size):
        evaluation = score(images, asked.scenes * num, asked.splits * num, seed=scoring.seed)
        evaluations[cfg_scale] = evaluation
        report(f"guidance {cfg_scale:g}, {len(images)} images\n{evaluation}\n")
        figure = sample_grid(
            images[shown],
            [asked.texts[i] for i in shown],
            [judge(images[i], asked.scenes[i])["all"] for i in shown],
        )
        path = run.path / "figures" / f"judged-cfg-{cfg_scale:g}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=DPI)
        written.append(path)
    result = EvaluationReport(
        run.step,
        run.source,
        captions.path,
        scoring.num_steps,
        scoring.seed,
        evaluations,
        scoring.cfg_interval,
    )
    return [*written, result.write(run.path)]


def score_each_image(run: "Run", scoring: Scoring, decode: Decode, *, batch_size: int) -> pa.Table:
    """Scores of every image of a run, at every guidance scale: ``IMAGE_SCORES_SCHEMA``.

    Raises:
        InputError: as :func:`open_captions`.
    """
    asked, captions = open_captions(run, scoring)
    rows = []
    for cfg_scale, images in images_by_scale(
        run, captions, scoring, decode, batch_size=batch_size, progress=False
    ):
        for number, cells in enumerate(read_cells(images)):
            image, caption = divmod(number, len(captions))
            scene = asked.scenes[caption]
            counts = (scene.num_objects, int((cells != EMPTY).sum()))
            rows += [
                (cfg_scale, caption, image, asked.splits[caption], skill, right, *counts)
                for skill, right in judge_cells(cells, scene).items()
            ]
    columns = zip(*rows, strict=True)
    return pa.table([[*column] for column in columns], schema=IMAGE_SCORES_SCHEMA)


def score(
    images: NDArray[np.uint8], scenes: Sequence[Scene], splits: Sequence[str], *, seed: int = 0
) -> Evaluation:
    """Score images and summarise by split and skill.

    Chance is measured, not computed: a true image of every scene of the split is rendered and
    scored against another scene of the same split, over several permutations without a fixed
    point, and weighted as the images are. A generator that makes perfect images and ignores its
    caption reaches this score; one whose images show nothing recognisable stays below it.

    The interval is the percentile bootstrap (Efron 1979) over scenes: all images of a scene, and
    all captions that phrase it, are resampled together, because they are not independent. Its width
    is zero if every image is right or none is.

    Args:
        images: [N, 18, 18, 3] uint8.
        scenes: what each image should show.
        splits: the split that each image counts for.
        seed: seed of the renders, the permutations and the resamples.

    Raises:
        InputError: no images, lengths that differ, or images of another size or dtype.
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
        chance_levels = chance([scenes[number] for number in members], rng)
        # skill -> scene -> whether each of its images is right
        results: dict[str, dict[Scene, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for number in members:
            for skill, right in judge_cells(cells[number], scenes[number]).items():
                results[skill][scenes[number]].append(right)
        for skill in SKILLS:
            if skill not in results:
                continue
            num_right = np.array([sum(each) for each in results[skill].values()])
            num_images = np.array([len(each) for each in results[skill].values()])
            low, high = interval(num_right, num_images, rng)
            rows.append(
                {
                    "split": split,
                    "skill": skill,
                    "accuracy": float(num_right.sum() / num_images.sum()),
                    "low": low,
                    "high": high,
                    "chance": chance_levels.get(skill),
                    "num_images": int(num_images.sum()),
                    "num_scenes": len(num_images),
                }
            )
    return Evaluation(pa.Table.from_pylist(rows, schema=EVALUATION_SCHEMA))


def chance(scenes: Sequence[Scene], rng: np.random.Generator) -> Mapping[str, float]:
    """Skill -> accuracy of true images of other scenes; empty if all scenes are the same.

    See :func:`score`.
    """
    weights = Counter(scenes)
    unique = list(weights)
    cells = read_cells(np.stack([render(scene, rng) for scene in unique]))
    num = len(unique)
    num_right: Counter[str] = Counter()
    num_images: Counter[str] = Counter()
    # Scenes on a random circle, of which each is shown the image of the one `shift` before it.
    # With shifts from 1 to num - 1 no scene is shown its own image:
    #   circle           c a b
    #   shifted by 1     b c a
    #   shifted by 2     a b c
    circle = rng.permutation(num)
    for shift in rng.permutation(np.arange(1, num))[:NUM_SHIFTS]:
        for own, other in zip(circle, np.roll(circle, shift), strict=True):
            weight = weights[unique[own]]
            for skill, right in judge_cells(cells[other], unique[own]).items():
                num_images[skill] += weight
                num_right[skill] += weight * right
    return {skill: num_right[skill] / num_images[skill] for skill in num_images}


def interval(
    totals: NDArray[Any], counts: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over images, by resampling groups of images.

    Groups are the S scenes, or captions: images of a group are not independent.

    Args:
        totals: sum over the images of each group, [S].
        counts: number of images of each group, [S].
    """
    num = len(totals)
    times = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)  # (resamples, S)
    low, high = np.percentile((times @ totals) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)
