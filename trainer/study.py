"""Arms x seeds, trained and judged, as many at a time as there are cores or GPUs.

On disk::

    tuning/ARM/VALUE/seed-0/   runs that chose a setting, judged on dev captions
    tuning.json                mean score of each value, by arm
    runs/ARM/seed-0/           a run directory each, and judged.parquet; with judged-OTHER.parquet
                               of an arm that judges these runs otherwise
    results.parquet            every judgement of every run

Nothing else is kept: what remains to do follows from the runs and judgements that are there, so the
same command continues a study that was stopped, and one that gained arms or seeds.
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
from pydantic import ValidationError
from tqdm.auto import tqdm

from ..pipeline.store import open_features, open_latents
from ..schemas import (
    InputError,
    LatentIdentity,
    Scoring,
    StudyConfig,
    TrainConfig,
    write_document,
    write_whole,
)
from .checkpoint import METRICS, build_model, latest_checkpoint
from .evaluation import Decode, generate
from .loop import make_record, train
from .run import Run, load_run
from .sampling import Solver
from .scenes import Scene
from .selection import open_pairs
from .shapes import EMPTY, judge_cells, read_cells
from .world import read_scenes

JUDGED = "judged.parquet"
RESULTS = "results.parquet"
TUNING = "tuning.json"
OpenDecoder = Callable[[LatentIdentity, str, str], Decode]
"""Whose latents, the name of their VAE and a device -> what makes images of them."""
BATCH = 64
"""Images sampled at once."""
LOOK_SECONDS = 1.0
"""How often the progress of running runs is read."""
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

    def judged(self) -> pa.Table | None:
        """Its judgements, where it was trained to its end and judged as the study says now."""
        path = self.path / self.name
        if not path.exists():
            return None
        table = pq.read_table(path)
        return table if _said(table) == (self.config.steps, self.scoring) else None

    def is_done(self) -> bool:
        """Whether it is trained to its end, and judged where it is to be."""
        if self.scoring is not None:
            return self.judged() is not None
        checkpoint = latest_checkpoint(self.path) if self.path.exists() else None
        return checkpoint is not None and checkpoint.step >= self.config.steps

    def num_steps(self) -> int:
        """Steps of it that are done, as far as its metrics say."""
        path = self.path / METRICS
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def run(self, open_decoder: OpenDecoder) -> None:
        """Train what is left, and judge; called in a process of its own."""
        train(self.config, progress=False)
        if self.scoring is None:
            return
        table = judge_run(load_run(self.path), self.scoring, open_decoder)
        said = {"steps": self.config.steps, **self.scoring.model_dump(mode="json")}
        saying = {b"judged": json.dumps(said).encode()}
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(saying), sink)
        write_whole(self.path / self.name, sink.getvalue())


def _said(table: pa.Table) -> tuple[int, Scoring] | None:
    """Steps and scoring that judgements are of; None where they do not say."""
    said = json.loads((table.schema.metadata or {}).get(b"judged", b"{}"))
    steps = said.pop("steps", None)
    try:
        return steps, Scoring.model_validate(said)
    except ValidationError:
        return None


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

    def run(jobs: Sequence[Job], name: str) -> None:
        run_jobs(jobs, num_jobs, open_decoder, name, report)

    jobs = list_jobs(study, tune(study, run, report))
    run([job for job in jobs if job.name == JUDGED], "study")
    if others := [job for job in jobs if job.name != JUDGED]:
        run(others, "judged otherwise")


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
    study: StudyConfig, run: Callable[[Sequence[Job], str], None], report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Arm -> dotted key and the value that it chose; nothing where there is nothing to choose."""
    tuning = study.tuning
    chosen: dict[str, dict[str, Any]] = {arm: {} for arm in study.arms}
    if tuning is None:
        return chosen
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
    run(jobs, "tuning")
    document: dict[str, dict[str, float]] = {}
    for arm in arms:
        scores = {}
        for value in tuning.values:
            tables = [j.judged() for j in jobs if (j.arm, j.value) == (arm, value)]
            shares = [_accuracy(table, tuning.skill) for table in tables if table is not None]
            scores[value] = float(np.mean(shares))
        document[arm] = {f"{value:g}": score for value, score in scores.items()}
        best = max(scores, key=lambda value: scores[value])
        chosen[arm] = {tuning.key: best}
        listed = ", ".join(f"{value:g}: {score:.3f}" for value, score in scores.items())
        report(f"{arm}: {tuning.key} {best:g} of {listed}")
    write_document(Path(study.output) / TUNING, json.dumps(document, indent=1) + "\n")
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


def run_jobs(
    jobs: Sequence[Job],
    num_jobs: int,
    open_decoder: OpenDecoder,
    name: str,
    report: Callable[[str], None],
) -> None:
    """Run those that are not done, so many at a time; a bar counts steps, or where all are trained
    and only to be judged, runs.

    Raises:
        InputError: some failed; all others were run to their end first.
    """
    left = [job for job in jobs if not job.is_done()]
    report(f"{name}: {len(jobs)} runs, to do: {len(left)}, {num_jobs} at a time")
    failed: list[str] = []
    steps = [(job.num_steps(), job.config.steps) for job in left]
    training = any(done < total for done, total in steps)
    with (
        tqdm(
            total=sum(total for _, total in steps) if training else len(left),
            initial=sum(min(pair) for pair in steps) if training else 0,
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
        bar.update((steps if bar.unit == "step" else num_done) - bar.n)
        bar.set_postfix({"runs done": f"{num_done}/{len(futures)}"})
        yield from done


def _pool(num_jobs: int) -> ProcessPoolExecutor:
    """Processes with their share of the cores, and a GPU each where there are some."""
    context = multiprocessing.get_context("forkserver")
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


def collect(study: StudyConfig) -> tuple[pa.Table, list[str]]:
    """Write ``results.parquet``: all judgements there are, with the columns ``arm`` and ``seed``
    before them.

    Returns:
        That table, and the runs that are not done yet.

    Raises:
        InputError: none is done, or the study judges nothing.
    """
    if study.scoring is None:
        raise InputError(f"the study of {study.output} has no scoring, so there is no report of it")
    tables, missing = [], []
    for job in list_jobs(study):
        table = job.judged()
        if table is None:
            missing.append(f"{job.arm}, seed {job.seed}")
            continue
        tables.append(label(table, job.arm, job.seed))
    if not tables:
        raise InputError(f"no run of {study.output} is trained and judged yet: run the study first")
    results = pa.concat_tables(tables)
    sink = pa.BufferOutputStream()
    pq.write_table(results, sink)
    write_whole(Path(study.output) / RESULTS, sink.getvalue())
    return results, missing


def label(table: pa.Table, arm: str, seed: int) -> pa.Table:
    """Judgements with the columns ``arm`` and ``seed`` before them."""
    names = pa.array([arm] * table.num_rows, pa.string())
    seeds = pa.array(np.full(table.num_rows, seed))
    table = table.replace_schema_metadata(None)
    return table.add_column(0, "seed", seeds).add_column(0, "arm", names)
