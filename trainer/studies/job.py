"""One run of a study: its configuration, training and scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ...schemas import LatentIdentity, Scoring, StudyConfig, TrainConfig
from ..evaluation.generate import Decode
from ..evaluation.shapes import score_each_image
from ..runs.checkpoint import latest_checkpoint
from ..runs.metrics import last_step
from .results import EvaluationKey, ResultsTable, RunScores, name_of, read_scores, write_scores

if TYPE_CHECKING:
    from ..runs.run import Run

SCORES = "judged.parquet"
"""Scores of a run in its directory."""
OpenDecoder = Callable[[LatentIdentity, str, str], Decode]
"""Identity of latents, name of their VAE and a device -> decoder of the latents."""
BATCH_SIZE = 64
"""Images sampled at once."""


@dataclass(frozen=True)
class Job:
    """A run to train and score.

    Attributes:
        arm, seed: of the study.
        config: of training.
        scoring: how to score the run; None: only train it.
        value: value of the tuned setting; None for the study's own runs.
        file: name of the file of its scores.
    """

    arm: str
    seed: int
    config: TrainConfig
    scoring: Scoring | None
    value: Any = None
    file: str = SCORES

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.config.output)

    @property
    def key(self) -> EvaluationKey:
        """How the run is to be trained and scored."""
        assert self.scoring is not None
        return EvaluationKey(self.config, self.scoring)

    @property
    def labels(self) -> dict[str, str | int]:
        """Labels of its scores among those of all runs."""
        tried = {} if self.value is None else {"value": f"{self.value:g}"}
        return {"arm": self.arm, **tried, "seed": self.seed}

    @property
    def name(self) -> str:
        """The labels as one name."""
        return name_of(self.labels)

    def scores(self, stored: ResultsTable) -> pa.Table | None:
        """Its scores, from the file beside the run or else from ``stored``; None if it is not yet
        fully trained, or not scored as the study asks."""
        beside = read_scores(self.path / self.file, self.key)
        return stored.find(self.name, self.key) if beside is None else beside

    def is_done(self, stored: ResultsTable) -> bool:
        """Whether the run is fully trained, and scored if it is to be."""
        if self.scoring is not None:
            return self.scores(stored) is not None
        return self.num_steps_saved() >= self.config.steps

    def num_steps_logged(self) -> int:
        """Number of steps done, according to the metrics."""
        return last_step(self.path)

    def num_steps_saved(self) -> int:
        """Number of steps done at the newest checkpoint."""
        checkpoint = latest_checkpoint(self.path)
        return 0 if checkpoint is None else checkpoint.step

    def run(self, open_decoder: OpenDecoder) -> None:
        """Train the remaining steps, and score; called in a process of its own."""
        from ..runs.run import open_run
        from ..training.train import train

        train(self.config, progress=False)
        if self.scoring is not None:
            run = open_run(self.path, self.scoring.step, "ema")
            table = score_images_of(run, self.scoring, open_decoder)
            write_scores(self.path / self.file, table, self.key)


def score_images_of(run: "Run", scoring: Scoring, open_decoder: OpenDecoder) -> pa.Table:
    """Scores of every image of a run; see :func:`.evaluation.shapes.score_each_image`."""
    device = str(next(run.model.parameters()).device)
    decode = open_decoder(run.record.latents, run.record.vae_source, device)
    return score_each_image(run, scoring, decode, batch_size=BATCH_SIZE)


def list_jobs(study: StudyConfig, chosen: Mapping[str, dict[str, Any]] | None = None) -> list[Job]:
    """All runs, seed by seed, so that a stopped study has compared all arms.

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
    """A run of the study or, with a value, a trial of its tuning."""
    out, tuning, of = Path(study.output), study.tuning, study.arm(arm).of
    if value is None or tuning is None:
        output = str(out / "runs" / (of or arm) / f"seed-{seed}")
        config = study.run(of or arm, seed, output, **chosen)
        file = SCORES if of is None else f"judged-{arm}.parquet"
        return Job(arm, seed, config, study.scoring_of(arm), file=file)
    output = str(out / "tuning" / arm / f"{value:g}" / f"seed-{seed}")
    config = study.run(arm, seed, output, **{**chosen, "steps": tuning.steps})
    return Job(arm, seed, config, study.tuning_of(arm).scoring, value)


def gather_scores(jobs: Sequence[Job], stored: ResultsTable) -> dict[str, RunScores]:
    """Scores of the runs that are done, by name; they are added to ``stored``.

    Scores of arms that the study no longer has stay stored.
    """
    tables = {job.name: (job, job.scores(stored)) for job in jobs}
    done = {
        name: RunScores(job.labels, job.key.document(), table)
        for name, (job, table) in tables.items()
        if table is not None
    }
    arms = {job.arm for job in jobs}
    others = [run for run in stored.runs.values() if run.labels["arm"] not in arms]
    if done:
        stored.write([*done.values(), *others])
    return done
