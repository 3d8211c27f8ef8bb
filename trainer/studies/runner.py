"""Arms x seeds, trained and scored, as many at a time as there are cores or GPUs.

On disk::

    tuning/ARM/VALUE/seed-0/   runs that choose a setting, scored on dev captions
    trials.parquet             scores of all their images
    tuning.json                mean score of each value, by arm
    runs/ARM/seed-0/           a run directory, and judged.parquet; with judged-OTHER.parquet of an
                               arm that scores these runs differently
    results.parquet            scores of all images of all runs

Nothing else is stored: what remains to do follows from the scores, beside their runs or in the two
files of all runs. So rerunning the command resumes a study that was stopped or gained arms or
seeds, and runs may be deleted once they are scored.
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

from ...schemas import InputError, StudyConfig
from ...schemas.verbosity import progress_bar
from .inputs import check_inputs
from .job import SCORES, Job, OpenDecoder, gather_scores, list_jobs
from .results import ResultsTable
from .tuning import read_chosen, tune

RESULTS = "results.parquet"
POLL_SECONDS = 1.0
"""Time between looks at the progress of running runs."""
PRELOADED = [
    __name__,
    "semroute.trainer.training.train",
    "semroute.trainer.runs.run",
    "torch._dynamo",  # whatever makes its first optimizer imports it, which takes seconds
]
"""Modules that runs need, imported once for all processes."""


def run_study(
    study: StudyConfig,
    open_decoder: OpenDecoder,
    *,
    num_jobs: int | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Tune, train and score what is not done yet.

    Args:
        open_decoder: importable by name, so that other processes find it.
        num_jobs: runs at a time. By default one per GPU, or one per core if there is no GPU.
        report: takes lines about the progress.

    Raises:
        InputError: an invalid configuration, or runs that failed, after all others are done.
    """
    num_jobs = num_jobs or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    check_inputs(list_jobs(study))

    def run(jobs: Sequence[Job], name: str, stored: ResultsTable) -> None:
        remaining = [job for job in jobs if not job.is_done(stored)]
        report(f"{name}: {len(jobs)} runs, to do: {len(remaining)}, {num_jobs} at a time")
        run_jobs(remaining, num_jobs, open_decoder, name)

    jobs = list_jobs(study, tune(study, run, report))
    results = open_results(study)
    run([job for job in jobs if job.file == SCORES], "study", results)
    if others := [job for job in jobs if job.file != SCORES]:
        run(others, "scored differently", results)


def open_results(study: StudyConfig) -> ResultsTable:
    """Scores of all runs of a study."""
    return ResultsTable(Path(study.output) / RESULTS, ("arm", "seed"))


def run_jobs(jobs: Sequence[Job], num_jobs: int, open_decoder: OpenDecoder, name: str) -> None:
    """Run jobs, ``num_jobs`` at a time.

    A bar counts steps; or runs, if all of them are trained and only to be scored.

    Raises:
        InputError: some failed, after all others are done.
    """
    failed: list[str] = []
    saved, total = sum(job.num_steps_saved() for job in jobs), sum(job.config.steps for job in jobs)
    training = saved < total
    with (
        progress_bar(
            total=total if training else len(jobs),
            initial=saved if training else 0,
            unit="step" if training else "run",
            desc=name,
            disable=not jobs,
        ) as bar,
        _pool(num_jobs) as pool,
    ):
        futures = {pool.submit(job.run, open_decoder): job for job in jobs}
        try:
            for future in _as_completed(futures, bar):
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
            f"{len(failed)} of {len(jobs)} runs failed; the others are done:\n  {listed}\n"
            "Rerun the command to try these again."
        )


def _as_completed(futures: dict[Future[None], Job], bar: tqdm) -> Iterator[Future[None]]:
    """Futures as they end; the bar is updated in between."""
    waiting = {*futures}
    while waiting:
        done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
        num_done = len(futures) - len(waiting)
        steps = sum(min(job.num_steps_logged(), job.config.steps) for job in futures.values())
        # Not by update(): a resumed run goes back to its checkpoint.
        bar.n = steps if bar.unit == "step" else num_done
        bar.set_postfix({"runs done": f"{num_done}/{len(futures)}"})
        yield from done


def _pool(num_jobs: int) -> ProcessPoolExecutor:
    """Processes with their share of the cores, and a GPU each if there are any.

    They are forked from a server that has imported what they need, and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    numbers = context.Queue()
    for number in range(num_jobs):
        numbers.put(number)
    threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    arguments = (numbers, visible_gpus(), threads)
    return ProcessPoolExecutor(
        num_jobs, mp_context=context, initializer=_start_process, initargs=arguments
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them: by number, UUID
    or MIG instance."""
    num = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(num)] if named is None else named.split(",")
    return [name.strip() for name in names[:num]]


def _start_process(numbers: Any, gpus: Sequence[str], threads: int) -> None:
    """Take a number, and with it a GPU and a share of the cores; called first in a new process."""
    number = numbers.get()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    """End this process when the driver ends, so that a run does not go on beside the next driver's
    run of the same job."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def collect(study: StudyConfig) -> tuple[pa.Table, dict[str, list[int]]]:
    """Write ``results.parquet``: all scores, with the columns ``arm`` and ``seed`` first.

    Returns:
        That table, and the runs that are not done yet: arm -> seeds.

    Raises:
        InputError: no run is done, or the study has no scoring.
    """
    if study.scoring is None:
        raise InputError(f"the study of {study.output} has no scoring, so there is no report of it")
    results, jobs = open_results(study), list_jobs(study, read_chosen(study))
    done = gather_scores(jobs, results)
    if not done:
        raise InputError(f"no run of {study.output} is trained and scored yet: run the study first")
    missing: dict[str, list[int]] = {}
    for job in jobs:
        if job.name not in done:
            missing.setdefault(job.arm, []).append(job.seed)
    return pa.concat_tables([run.labelled() for run in done.values()]), missing
