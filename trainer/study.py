"""Arms x seeds, trained and judged, as many at a time as there are cores or GPUs.

On disk::

    tuning/ARM/VALUE/seed-0/   runs that chose a setting, judged on dev captions
    trials.parquet             every judgement of them
    tuning.json                mean score of each value, by arm
    runs/ARM/seed-0/           a run directory each, and judged.parquet; with judged-OTHER.parquet
                               of an arm that judges these runs otherwise
    results.parquet            every judgement of every run

Nothing else is kept: what remains to do follows from the judgements that are there, beside their
runs or in the two files of all, so the same command continues a study that was stopped, and one
that gained arms or seeds; and runs that were judged may be deleted.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..pipeline.store import open_features, open_latents
from ..schemas import (
    InputError,
    LatentIdentity,
    Scoring,
    StudyConfig,
    TrainConfig,
    write_document,
)
from .checkpoint import METRICS, build_model, latest_checkpoint
from .evaluation import Decode, generate
from .judgements import JUDGED_SCHEMA, Archive, Asked, Judged, name_of, read_judged, write_judged
from .loop import train
from .run import Run, load_run
from .sampling import Solver
from .scenes import Scene
from .selection import open_pairs
from .setup import make_record
from .shapes import EMPTY, judge_cells, read_cells
from .world import read_scenes

JUDGED = "judged.parquet"
RESULTS = "results.parquet"
TRIALS = "trials.parquet"
TUNING = "tuning.json"
OpenDecoder = Callable[[LatentIdentity, str, str], Decode]
"""Whose latents, the name of their VAE and a device -> what makes images of them."""
BATCH = 64
"""Images sampled at once."""
LOOK_SECONDS = 1.0
"""How often the progress of running runs is read."""


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
    def asked(self) -> Asked:
        """What its judgements are to be of."""
        assert self.scoring is not None
        return Asked(self.config, self.scoring)

    @property
    def labels(self) -> dict[str, str | int]:
        """Of its judgements, among those of all."""
        tried = {} if self.value is None else {"value": f"{self.value:g}"}
        return {"arm": self.arm, **tried, "seed": self.seed}

    @property
    def title(self) -> str:
        """The labels as one."""
        return name_of(self.labels)

    def judged(self, archive: Archive) -> pa.Table | None:
        """Its judgements, where it was trained to its end and judged as the study says now: those
        beside the run, or where that is gone, of the archive."""
        beside = read_judged(self.path / self.name, self.asked)
        return archive.find(self.title, self.asked) if beside is None else beside

    def is_done(self, archive: Archive) -> bool:
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
        write_judged(self.path / self.name, table, self.asked)


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
    how = Solver(
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


# ------------------------------------------------------------------------------------- the study


def run_study(
    study: StudyConfig,
    open_decoder: OpenDecoder,
    *,
    num_jobs: int | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Tune, train and judge what is not done yet.

    Args:
        open_decoder: importable by name, so that other processes find it.
        num_jobs: runs at a time. Default: one a GPU, or one a core where there is none.

    Raises:
        InputError: a configuration that is not valid, or runs that failed; the others are kept.
    """
    num_jobs = num_jobs or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    for job in list_jobs(study):
        check_stores(job.config)
        if job.scoring is not None:
            open_features(job.scoring.features)
    if study.scoring is not None:
        read_captions(study.scoring)

    def run(jobs: Sequence[Job], name: str, archive: Archive) -> None:
        left = [job for job in jobs if not job.is_done(archive)]
        report(f"{name}: {len(jobs)} runs, to do: {len(left)}, {num_jobs} at a time")
        run_jobs(left, num_jobs, open_decoder, name)

    jobs = list_jobs(study, tune(study, run, report))
    results = results_of(study)
    run([job for job in jobs if job.name == JUDGED], "study", results)
    if others := [job for job in jobs if job.name != JUDGED]:
        run(others, "judged otherwise", results)


def results_of(study: StudyConfig) -> Archive:
    """All judgements of a study."""
    return Archive(Path(study.output) / RESULTS, ("arm", "seed"))


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
    return [_job(study, arm, seed, chosen.get(trained[arm], {})) for arm, seed in pairs]


def check_stores(config: TrainConfig) -> None:
    """Refuse stores that are not there before any run is begun."""
    open_features(config.features)
    open_latents(config.latents)


def tune(
    study: StudyConfig,
    run: Callable[[Sequence[Job], str, Archive], None],
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
        _job(study, arm, seed, {tuning.key: value}, value)
        for arm in arms
        for value in tuning.values
        for seed in tuning.seeds
    ]
    archive = Archive(Path(study.output) / TRIALS, ("arm", "value", "seed"))
    run(jobs, "tuning", archive)
    tables = _kept(jobs, archive)
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
    config = _job(study, arm, study.seeds[0], {}).config
    stores = open_features(config.features), open_latents(config.latents)
    record = make_record(config, open_pairs(*stores, config.data))
    return any(True for _ in build_model(record).router.parameters())


def _accuracy(table: pa.Table, skill: str) -> float:
    chosen = table.filter(pc.equal(table["skill"], skill))
    if not chosen.num_rows:
        known = sorted({*table["skill"].to_pylist()})
        raise InputError(f"tuning.skill {skill!r} is not judged; expected one of {known}")
    return float(np.mean(chosen["right"].to_numpy(zero_copy_only=False)))


def _job(study: StudyConfig, arm: str, seed: int, chosen: dict[str, Any], value: Any = None) -> Job:
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


def run_jobs(left: Sequence[Job], num_jobs: int, open_decoder: OpenDecoder, name: str) -> None:
    """Run them, so many at a time; a bar counts steps, or where all are trained and only to be
    judged, runs.

    Raises:
        InputError: some failed; all others were run to their end first.
    """
    failed: list[str] = []
    kept, total = sum(job.num_kept() for job in left), sum(job.config.steps for job in left)
    training = kept < total
    with (
        tqdm(
            total=total if training else len(left),
            initial=kept if training else 0,
            unit="step" if training else "run",
            desc=name,
            disable=not left,
        ) as bar,
        _pool(num_jobs) as pool,
    ):
        futures = {pool.submit(job.run, open_decoder): job for job in left}
        try:
            for future in _completed(futures, bar):
                error = future.exception()
                if error is not None:
                    job = futures[future]
                    failed.append(f"{job.path}: {type(error).__name__}: {error}")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failed:
        listed = "\n  ".join(failed)
        raise InputError(
            f"{len(failed)} of {len(left)} runs failed; the others are done:\n  {listed}\n"
            "The same command tries these again."
        )


def _completed(futures: dict[Future[None], Job], bar: tqdm) -> Iterator[Future[None]]:
    """Futures as they end; between them the bar is brought up to date."""
    waiting = {*futures}
    while waiting:
        done, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
        num_done = len(futures) - len(waiting)
        steps = sum(min(job.num_steps(), job.config.steps) for job in futures.values())
        # Not by update(): a run that is continued goes back to its checkpoint.
        bar.n = steps if bar.unit == "step" else num_done
        bar.set_postfix({"runs done": f"{num_done}/{len(futures)}"})
        yield from done


def _pool(num_jobs: int) -> ProcessPoolExecutor:
    """Processes with their share of the cores, and a GPU each where there are some.

    They are forked from a server that has imported what they need, and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    # Whatever makes its first optimiser imports torch._dynamo, which takes seconds.
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    places = context.Queue()
    for place in range(num_jobs):
        places.put(place)
    threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    arguments = (places, torch.cuda.device_count(), threads)
    return ProcessPoolExecutor(
        num_jobs, mp_context=context, initializer=_settle, initargs=arguments
    )


def _settle(places: Any, num_gpus: int, threads: int) -> None:
    """Of a new process: its GPU and its share of the cores."""
    place = places.get()
    if num_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % num_gpus)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    """A driver that was killed leaves no run behind that the next driver would begin beside."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def collect(study: StudyConfig) -> tuple[pa.Table, dict[str, list[int]]]:
    """Write ``results.parquet``: all judgements there are, with the columns ``arm`` and ``seed``
    before them.

    Returns:
        That table, and the runs that are not done yet: arm -> seeds.

    Raises:
        InputError: none is done, or the study judges nothing.
    """
    if study.scoring is None:
        raise InputError(f"the study of {study.output} has no scoring, so there is no report of it")
    archive, jobs = results_of(study), list_jobs(study, read_chosen(study))
    kept = _kept(jobs, archive)
    if not kept:
        raise InputError(f"no run of {study.output} is trained and judged yet: run the study first")
    missing: dict[str, list[int]] = {}
    for job in jobs:
        if job.title not in kept:
            missing.setdefault(job.arm, []).append(job.seed)
    return pa.concat_tables([judged.labelled() for judged in kept.values()]), missing


def _kept(jobs: Sequence[Job], archive: Archive) -> dict[str, Judged]:
    """Judgements of the runs that are done, by title. They go into the archive, which keeps those
    of arms that the study has no more."""
    found = {job.title: (job, job.judged(archive)) for job in jobs}
    kept = {
        title: Judged(job.labels, job.asked.document(), table)
        for title, (job, table) in found.items()
        if table is not None
    }
    arms = {job.arm for job in jobs}
    others = {k: v for k, v in archive.held.items() if v.labels["arm"] not in arms}
    if kept:
        archive.write([*kept.values(), *others.values()])
    return kept
