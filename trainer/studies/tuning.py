"""Tuning of one key per arm, before a study's runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...pipeline.store.open import open_features, open_latents
from ...schemas import InputError, StudyConfig, write_document
from ..data.dataset import open_pairs
from ..runs.record import build_model
from ..training.setup import make_record
from .job import Job, make_job, stored_results
from .results import ResultsTable

TRIALS = "trials.parquet"
TUNING = "tuning.json"


def tune(
    study: StudyConfig,
    run: Callable[[Sequence[Job], str, ResultsTable], None],
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Arm -> dotted key and the value that it chose; nothing where there is nothing to choose."""
    tuning = study.tuning
    if tuning is None:
        return {arm: {} for arm in study.arms}
    training = [arm for arm in study.arms if study.arm(arm).of is None]
    arms = [arm for arm in training if has_router(study, arm)]
    for arm in sorted({*training} - {*arms}):
        report(f"{arm}: nothing to tune, its weights are fixed")
    jobs = [
        make_job(study, arm, seed, {tuning.key: value}, value)
        for arm in arms
        for value in tuning.values
        for seed in tuning.seeds
    ]
    archive = ResultsTable(Path(study.output) / TRIALS, ("arm", "value", "seed"))
    run(jobs, "tuning", archive)
    tables = stored_results(jobs, archive)
    document: dict[str, dict[str, float]] = {}
    for arm in arms:
        scores = {}
        for value in tuning.values:
            names = [job.title for job in jobs if (job.arm, job.value) == (arm, value)]
            shares = [_accuracy(tables[name].table, tuning.skill) for name in names]
            scores[f"{value:g}"] = float(np.mean(shares))
        document[arm] = scores
    others = {k: v for k, v in read_tuning(study).items() if k not in study.arms}
    everything = json.dumps({**document, **others}, indent=1)
    write_document(Path(study.output) / TUNING, everything + "\n")
    chosen = read_chosen(study)
    for arm, scores in document.items():
        listed = ", ".join(f"{value}: {score:.3f}" for value, score in scores.items())
        report(f"{arm}: {tuning.key} {chosen[arm][tuning.key]:g} of {listed}")
    return chosen


def read_tuning(study: StudyConfig) -> dict[str, dict[str, float]]:
    """``tuning.json``: arm -> value -> mean score, also of arms that the study has no more."""
    path = Path(study.output) / TUNING
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def read_chosen(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """Arm -> dotted key and the value that it chose, by ``tuning.json``."""
    chosen: dict[str, dict[str, Any]] = {arm: {} for arm in study.arms}
    if study.tuning is None:
        return chosen
    values = {f"{value:g}": value for value in study.tuning.values}
    for arm, scores in read_tuning(study).items():
        tried = {name: score for name, score in scores.items() if name in values}
        if arm in chosen and tried:
            chosen[arm] = {study.tuning.key: values[max(tried, key=lambda name: tried[name])]}
    return chosen


def has_router(study: StudyConfig, arm: str) -> bool:
    """Whether the weights of an arm are learned."""
    config = make_job(study, arm, study.seeds[0], {}).config
    stores = open_features(config.features), open_latents(config.latents)
    record = make_record(config, open_pairs(*stores, config.data))
    return any(True for _ in build_model(record).router.parameters())


def _accuracy(table: pa.Table, skill: str) -> float:
    chosen = table.filter(pc.equal(table["skill"], skill))
    if not chosen.num_rows:
        known = sorted({*table["skill"].to_pylist()})
        raise InputError(f"tuning.skill {skill!r} is not judged; expected one of {known}")
    return float(np.mean(chosen["right"].to_numpy(zero_copy_only=False)))
