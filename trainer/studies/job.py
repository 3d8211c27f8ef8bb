"""One run of a study: its configuration, training and scores."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ...pipeline.store.open import open_features
from ...schemas import InputError, LatentIdentity, Scoring, StudyConfig, TrainConfig
from ..diffusion.sampling import SamplingConfig
from ..evaluation.generate import Decode, generate
from ..runs.checkpoint import latest_checkpoint
from ..runs.metrics import METRICS
from ..runs.run import Run, load_run
from ..shapes.dataset import read_scenes
from ..shapes.judge import EMPTY, judge_cells, read_cells
from ..shapes.scenes import Scene
from ..training.train import train
from .results import (
    JUDGED_SCHEMA,
    EvaluationKey,
    ResultsTable,
    RunScores,
    name_of,
    read_scores,
    write_scores,
)

JUDGED = "judged.parquet"
OpenDecoder = Callable[[LatentIdentity, str, str], Decode]
"""Whose latents, the name of their VAE and a device -> what makes images of them."""
BATCH = 64
"""Images sampled at once."""


@dataclass(frozen=True)
class Job:
    """A run to train and judge.

    Attributes:
        arm, seed: which.
        value: of the setting that is tuned; None where the study's own runs are meant.
        scoring: None where it is only trained.
        name: of the file of its judgements.
    """

    arm: str
    seed: int
    config: TrainConfig
    scoring: Scoring | None
    value: Any = None
    name: str = JUDGED

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.config.output)

    @property
    def asked(self) -> EvaluationKey:
        """What its judgements are to be of."""
        assert self.scoring is not None
        return EvaluationKey(self.config, self.scoring)

    @property
    def labels(self) -> dict[str, str | int]:
        """Of its judgements, among those of all."""
        tried = {} if self.value is None else {"value": f"{self.value:g}"}
        return {"arm": self.arm, **tried, "seed": self.seed}

    @property
    def title(self) -> str:
        """The labels as one."""
        return name_of(self.labels)

    def judged(self, archive: ResultsTable) -> pa.Table | None:
        """Its judgements, where it was trained to its end and judged as the study says now: those
        beside the run, or where that is gone, of the archive."""
        beside = read_scores(self.path / self.name, self.asked)
        return archive.find(self.title, self.asked) if beside is None else beside

    def is_done(self, archive: ResultsTable) -> bool:
        """Whether it is trained to its end, and judged where it is to be."""
        if self.scoring is not None:
            return self.judged(archive) is not None
        checkpoint = latest_checkpoint(self.path)
        return checkpoint is not None and checkpoint.step >= self.config.steps

    def num_steps(self) -> int:
        """Steps of it that are done, as far as its metrics say."""
        path = self.path / METRICS
        text = path.read_text("utf-8") if path.exists() else ""
        lines = text.rpartition("\n")[0].splitlines()  # the last may be half written
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def num_kept(self) -> int:
        """Steps of it that need not be done again."""
        checkpoint = latest_checkpoint(self.path)
        return 0 if checkpoint is None else checkpoint.step

    def run(self, open_decoder: OpenDecoder) -> None:
        """Train what is left, and judge; called in a process of its own."""
        train(self.config, progress=False)
        if self.scoring is None:
            return
        table = judge_run(load_run(self.path), self.scoring, open_decoder)
        write_scores(self.path / self.name, table, self.asked)


def judge_run(run: Run, scoring: Scoring, open_decoder: OpenDecoder) -> pa.Table:
    """Draw a picture of every caption at every guidance scale and judge each: ``JUDGED_SCHEMA``.

    Raises:
        InputError: captions that the run cannot read, or that are no scenes of the world.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run.model.to(device)
    store = open_features(scoring.features)
    run.check_features(store.manifest.identity)
    table, scenes = read_captions(scoring)
    ids = [row[0] for row in store.samples["caption_ids"].to_pylist()]
    if store.captions["text"].take(ids).to_pylist() != table["text"].to_pylist():
        raise InputError(f"{scoring.features} was not extracted from {scoring.samples}")
    decode = open_decoder(run.record.latents, run.record.vae_source, device)
    how = SamplingConfig(
        scoring.num_steps,
        cfg_interval=scoring.cfg_interval,
        method=scoring.solver,
        clock=run.clock(scoring.clock),
    )
    splits, num = table["split"].to_pylist(), scoring.images_per_caption
    rows = []
    for cfg_scale in scoring.cfg_scales:
        latents = generate(
            run.model,
            run.flow,
            store,
            ids * num,
            replace(how, cfg_scale=cfg_scale),
            seed=scoring.seed,
            batch_size=BATCH,
            progress=False,
        )
        for place, cells in enumerate(read_cells(decode(latents))):
            image, caption = divmod(place, len(ids))
            scene = scenes[caption]
            counts = (scene.num_objects, int((cells != EMPTY).sum()))
            rows += [
                (cfg_scale, caption, image, splits[caption], skill, right, *counts)
                for skill, right in judge_cells(cells, scene).items()
            ]
    columns = zip(*rows, strict=True)
    return pa.table([[*column] for column in columns], schema=JUDGED_SCHEMA)


def read_captions(scoring: Scoring) -> tuple[pa.Table, list[Scene]]:
    """The file that runs are judged by, and its scenes.

    Raises:
        InputError: no such file, or not one of a world of shapes.
    """
    try:
        table = pq.read_table(scoring.samples, columns=["text", "scene", "split"])
    except (OSError, ValueError) as error:
        raise InputError(f"samples {scoring.samples}: {error}") from error
    return table, read_scenes(table)


def list_jobs(study: StudyConfig, chosen: Mapping[str, dict[str, Any]] | None = None) -> list[Job]:
    """All runs, seed by seed, so that a study that is stopped has compared all arms.

    Args:
        chosen: arm -> dotted key and value that tuning chose.
    """
    pairs = [
        (arm, seed) for seed in study.seeds for arm in study.arms if seed in study.seeds_of(arm)
    ]
    chosen = chosen or {}
    trained = {arm: study.arm(arm).of or arm for arm in study.arms}
    return [make_job(study, arm, seed, chosen.get(trained[arm], {})) for arm, seed in pairs]


def make_job(
    study: StudyConfig, arm: str, seed: int, chosen: dict[str, Any], value: Any = None
) -> Job:
    """A run of the study, or with a value one of its tuning."""
    out, tuning, of = Path(study.output), study.tuning, study.arm(arm).of
    if value is None or tuning is None:
        output = str(out / "runs" / (of or arm) / f"seed-{seed}")
        config = study.run(of or arm, seed, output, **chosen)
        name = JUDGED if of is None else f"judged-{arm}.parquet"
        return Job(arm, seed, config, study.scoring_of(arm), name=name)
    output = str(out / "tuning" / arm / f"{value:g}" / f"seed-{seed}")
    config = study.run(arm, seed, output, **{**chosen, "steps": tuning.steps})
    return Job(arm, seed, config, study.trials_of(arm), value)


def stored_results(jobs: Sequence[Job], archive: ResultsTable) -> dict[str, RunScores]:
    """Judgements of the runs that are done, by title. They go into the archive, which keeps those
    of arms that the study has no more."""
    found = {job.title: (job, job.judged(archive)) for job in jobs}
    kept = {
        title: RunScores(job.labels, job.asked.document(), table)
        for title, (job, table) in found.items()
        if table is not None
    }
    arms = {job.arm for job in jobs}
    others = {k: v for k, v in archive.held.items() if v.labels["arm"] not in arms}
    if kept:
        archive.write([*kept.values(), *others.values()])
    return kept
