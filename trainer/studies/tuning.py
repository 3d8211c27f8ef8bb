"""Choice of one setting per arm, before a study's runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from ...schemas import InputError, StudyConfig, write_document
from ...schemas.json_file import read_json
from .inputs import check_inputs
from .job import Job, gather_scores, make_job
from .results import ResultsTable

TRIALS = "trials.parquet"
TUNING = "tuning.json"
_SCORES = TypeAdapter(dict[str, dict[str, FiniteFloat]])


def tune(
    study: StudyConfig,
    run: Callable[[Sequence[Job], str, ResultsTable], None],
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Run all trials and choose: arm -> dotted key and chosen value; empty if nothing is tuned.

    Args:
        run: runs the jobs that are not done, under a name, given the stored scores.
        report: takes a line per arm.
    """
    if study.tuning is None:
        return {arm: {} for arm in study.arms}
    trained = [arm for arm in study.arms if study.arm(arm).of is None]
    tunings = {arm: study.tuning_of(arm) for arm in trained if is_tuned(study, arm)}
    for arm in sorted({*trained} - {*tunings}):
        report(f"{arm}: nothing to tune")
    jobs = [
        make_job(study, arm, seed, {tuning.key: value}, value)
        for arm, tuning in tunings.items()
        for value in tuning.values
        for seed in tuning.seeds
    ]
    stored = ResultsTable(Path(study.output) / TRIALS, ("arm", "value", "seed"))
    check_inputs([job for job in jobs if not job.is_done(stored)])
    run(jobs, "tuning", stored)
    done = gather_scores(jobs, stored)
    document: dict[str, dict[str, float]] = {}
    for arm, tuning in tunings.items():
        scores = {}
        for value in tuning.values:
            names = [job.name for job in jobs if (job.arm, job.value) == (arm, value)]
            accuracies = [_accuracy(done[name].table, tuning.skill) for name in names]
            scores[f"{value:g}"] = float(np.mean(accuracies))
        document[arm] = scores
    others = {arm: scores for arm, scores in read_tuning(study).items() if arm not in study.arms}
    everything = json.dumps({**document, **others}, indent=1)
    write_document(Path(study.output) / TUNING, everything + "\n")
    chosen = read_chosen(study)
    for arm, scores in document.items():
        listed = ", ".join(f"{value}: {score:.3f}" for value, score in scores.items())
        for key, value in chosen[arm].items():
            report(f"{arm}: {key} {value:g} of {listed}")
    return chosen


def read_tuning(study: StudyConfig) -> dict[str, dict[str, float]]:
    """``tuning.json``: arm -> value -> mean score, also of arms that the study no longer has.

    Raises:
        InputError: it is damaged.
    """
    path = Path(study.output) / TUNING
    if not path.exists():
        return {}
    try:
        return _SCORES.validate_python(read_json(path, follow=True))
    except ValidationError as error:
        raise InputError(
            f"{path} is damaged: expected mean scores by arm and value. Delete it: rerun the study "
            f"to make it from {TRIALS} again"
        ) from error


def read_chosen(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """Arm -> dotted key and chosen value, according to ``tuning.json``."""
    chosen: dict[str, dict[str, Any]] = {arm: {} for arm in study.arms}
    if study.tuning is None:
        return chosen
    for arm, scores in read_tuning(study).items():
        if arm not in chosen:
            continue
        tuning = study.tuning_of(arm)
        values = {f"{value:g}": value for value in tuning.values}
        tried = {name: score for name, score in scores.items() if name in values}
        if tried:
            chosen[arm] = {tuning.key: values[max(tried, key=lambda name: tried[name])]}
    return chosen


def is_tuned(study: StudyConfig, arm: str) -> bool:
    """Whether trials choose a setting of an arm: not if it gives the value itself, or if it learns
    no routing weights and names no other setting to tune."""
    from ...pipeline.store.order.dataset import open_stores
    from ..runs.record import build_model
    from ..training.setup import make_record

    if study.tuning_of(arm).key in study.arm(arm).train:
        return False
    if "key" in study.arm(arm).tuning:
        return True
    config = make_job(study, arm, study.seeds[0], {}).config
    if config.routing.strategy == "deep-fusion":
        return False  # it learns none, and to build it would take the LLM
    return bool(build_model(make_record(config, open_stores(config))).router_parameters())


def _accuracy(table: pa.Table, skill: str) -> float:
    rows = table.filter(pc.equal(table["skill"], skill))
    if not rows.num_rows:
        known = sorted({*table["skill"].to_pylist()})
        raise InputError(f"tuning.skill {skill!r} is not scored; expected one of {known}")
    return float(np.mean(rows["right"].to_numpy(zero_copy_only=False)))
