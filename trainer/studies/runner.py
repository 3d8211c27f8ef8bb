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

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm.auto import tqdm

from ...pipeline.store.open import open_features, open_latents
from ...schemas import InputError, StudyConfig, TrainConfig
from .job import JUDGED, Job, OpenDecoder, list_jobs, read_captions, stored_results
from .results import ResultsTable
from .tuning import read_chosen, tune

RESULTS = "results.parquet"
LOOK_SECONDS = 1.0
"""How often the progress of running runs is read."""


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

    def run(jobs: Sequence[Job], name: str, archive: ResultsTable) -> None:
        left = [job for job in jobs if not job.is_done(archive)]
        report(f"{name}: {len(jobs)} runs, to do: {len(left)}, {num_jobs} at a time")
        run_jobs(left, num_jobs, open_decoder, name)

    jobs = list_jobs(study, tune(study, run, report))
    results = results_of(study)
    run([job for job in jobs if job.name == JUDGED], "study", results)
    if others := [job for job in jobs if job.name != JUDGED]:
        run(others, "judged otherwise", results)


def results_of(study: StudyConfig) -> ResultsTable:
    """All judgements of a study."""
    return ResultsTable(Path(study.output) / RESULTS, ("arm", "seed"))


def check_stores(config: TrainConfig) -> None:
    """Refuse stores that are not there before any run is begun."""
    open_features(config.features)
    open_latents(config.latents)


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
    kept = stored_results(jobs, archive)
    if not kept:
        raise InputError(f"no run of {study.output} is trained and judged yet: run the study first")
    missing: dict[str, list[int]] = {}
    for job in jobs:
        if job.title not in kept:
            missing.setdefault(job.arm, []).append(job.seed)
    return pa.concat_tables([judged.labelled() for judged in kept.values()]), missing
