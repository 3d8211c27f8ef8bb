"""Generated images against what their captions ask for, with chance beside every score.

Shapes: N images or captions, C channels, h x w latent, S scenes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from ...pipeline.store.features import FeatureStore
from ...schemas import InputError
from ..diffusion.flow import Flow
from ..diffusion.sampling import SamplingConfig
from ..model.dit import DiT
from ..plots.images import sample_grid
from ..runs.run import Run
from ..runs.scores import EVALUATION_SCHEMA, Evaluation, EvaluationReport
from ..shapes.dataset import read_scenes
from ..shapes.images import render
from ..shapes.judge import SKILLS, judge, judge_cells, read_cells
from ..shapes.scenes import Scene
from .generate import Decode, Features, generate

NUM_SHIFTS = 10
"""Permutations that chance is averaged over."""
NUM_RESAMPLES = 2000
"""Bootstrap resamples behind an interval."""


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


def evaluate(
    model: DiT,
    flow: Flow,
    features: Features,
    caption_ids: Sequence[int] | NDArray[np.int64],
    scenes: Sequence[Scene],
    splits: Sequence[str],
    decode: Decode,
    how: SamplingConfig,
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


def interval(
    totals: NDArray[Any], counts: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % of a mean over resampled scenes: what the images of each add up to, and how many there
    are, [S]."""
    num = len(totals)
    times = rng.multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)  # (resamples, S)
    low, high = np.percentile((times @ totals) / (times @ counts), [2.5, 97.5])
    return float(low), float(high)


NUM_JUDGED = 24
"""Images that an evaluation shows."""


def score_run(
    run: Run,
    store: FeatureStore,
    samples: str,
    decode: Decode,
    how: SamplingConfig,
    *,
    cfg_scales: Sequence[float],
    images_per_caption: int,
    seed: int,
    batch_size: int,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Score a run on a world of shapes at several guidance scales.

    Writes ``evaluation.json`` and, into ``figures``, some judged images of each scale.

    Args:
        store: features of the captions to judge by.
        samples: the test.parquet that they were extracted from.
        decode: latents -> images.
        how, seed, batch_size: as for :func:`semroute.trainer.evaluation.generate.generate`; its
            guidance scale is replaced by each of ``cfg_scales``.
        report: takes each scale's table of scores.

    Raises:
        InputError: the file is no world, or its captions are not those of the store.
    """
    try:
        table = pyarrow.parquet.read_table(samples)
    except (OSError, ValueError) as error:
        raise InputError(f"--samples {samples}: {error}") from error
    scenes, splits = read_scenes(table), table["split"].to_pylist()
    ids = [row[0] for row in store.samples["caption_ids"].to_pylist()]
    if store.captions["text"].take(ids).to_pylist() != table["text"].to_pylist():
        raise InputError(f"{store.path} was not extracted from {samples}: the captions differ")
    evaluations, written = {}, []
    for cfg_scale in cfg_scales:
        evaluations[cfg_scale], images = evaluate(
            run.model,
            run.flow,
            store,
            ids * images_per_caption,
            scenes * images_per_caption,
            splits * images_per_caption,
            decode,
            replace(how, cfg_scale=cfg_scale),
            seed=seed,
            batch_size=batch_size,
        )
        report(f"guidance {cfg_scale:g}, {len(images)} images\n{evaluations[cfg_scale]}\n")
        shown = np.linspace(0, len(ids) - 1, min(NUM_JUDGED, len(ids))).astype(int)
        marks = [judge(images[i], scenes[i])["all"] for i in shown]
        texts = table["text"].take(shown).to_pylist()
        path = run.path / "figures" / f"judged-cfg-{cfg_scale:g}.png"
        path.parent.mkdir(exist_ok=True)
        sample_grid(images[shown], texts, marks).savefig(path, dpi=150)
        written.append(path)
    made = EvaluationReport(
        run.step,
        run.source,
        str(store.path),
        how.num_steps,
        seed,
        evaluations,
        how.cfg_interval,
    )
    return [*written, made.write(run.path)]
