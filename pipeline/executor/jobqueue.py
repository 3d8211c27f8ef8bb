"""Workers as jobs of a batch system, through dask-jobqueue."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...schemas import InputError, JobQueue, parse, read_yaml
from .dask import TASK, connect_client, no_profile_variable

SHARD_DURATION = "60s"
"""Duration of a shard that the scheduler of a job queue assumes until it has seen one."""


def read_job_queue(path: Path) -> JobQueue:
    """Read the YAML of ``--cluster``.

    Raises:
        InputError: it cannot be read, or is not valid.
    """
    return parse(JobQueue, read_yaml(path), str(path))


def max_workers(jobs: JobQueue) -> int:
    """Maximum number of workers."""
    processes = jobs.options.get("processes", 1)
    return jobs.maximum_jobs * (processes if isinstance(processes, int) else 1)


def job_queue(jobs: JobQueue, path: Path) -> Callable[[ExitStack], Any]:
    """What makes the client of a job queue.

    Args:
        path: of the YAML, for messages.

    Raises:
        InputError: the walltime is not valid, see :func:`with_lifetime`.
    """
    options = _worker_options(jobs)

    def open_client(resources: ExitStack) -> Any:
        try:
            import dask
            import dask_jobqueue
            from dask_jobqueue.local import LocalCluster
        except ImportError as error:
            raise InputError(
                f"--cluster {path} needs dask-jobqueue: pip install 'semroute[slurm]'"
            ) from error
        names = {name.lower(): name for name in dir(dask_jobqueue) if name.endswith("Cluster")}
        kind = (
            LocalCluster
            if jobs.kind == "local"
            else getattr(dask_jobqueue, names[f"{jobs.kind}cluster"])
        )
        configured = f"jobqueue.{options.get('config_name', jobs.kind)}.scheduler-options"
        scheduler = options.get("scheduler_options") or dask.config.get(configured, None) or {}
        if "dashboard_address" not in scheduler:  # its default, port 8787, is open to everyone
            scheduler = scheduler | {"dashboard_address": "127.0.0.1:0"}
            link = {"distributed.dashboard.link": "http://127.0.0.1:{port}/status"}
            resources.enter_context(dask.config.set(link))
        # Dask would assume half a second until the first shard is done, and start one job for all.
        key = "distributed.scheduler.default-task-durations"
        durations = {TASK: SHARD_DURATION, **dask.config.get(key)}
        resources.enter_context(dask.config.set({key: durations}))
        try:
            cluster = resources.enter_context(kind(**options | {"scheduler_options": scheduler}))
            cluster.adapt(minimum_jobs=jobs.minimum_jobs, maximum_jobs=jobs.maximum_jobs)
        except (TypeError, ValueError, OSError) as error:
            raise InputError(f"--cluster {path}: dask-jobqueue refuses it: {error}") from error
        return connect_client(resources, f"the job queue of {path}", address=cluster)

    return open_client


def _worker_options(jobs: JobQueue) -> dict[str, Any]:
    """Options of dask-jobqueue's cluster: one worker per job, one thread per worker."""
    # Dask would start several workers per job, each with a model, and give each as many tasks at a
    # time as the job has cores.
    options = {"processes": 1} | with_lifetime(jobs.options, jobs.lifetime_margin_minutes)
    words = list(options.get("worker_extra_args", []))
    if "--nthreads" not in " ".join(map(str, words)):
        options["worker_extra_args"] = [*words, "--nthreads", "1"]
    prologue = options.get("job_script_prologue") or []
    # The script of a job on this machine is not run by a shell: its words are those of one command.
    word = "env" if jobs.kind == "local" else "export"
    return options | {"job_script_prologue": [f"{word} {no_profile_variable()}", *prologue]}


def with_lifetime(options: dict[str, Any], margin_minutes: float) -> dict[str, Any]:
    """Options that let workers end before the batch system kills them: ``--lifetime``.

    Args:
        options: of a dask-jobqueue cluster; unchanged without a walltime, or with a lifetime of
            their own.
        margin_minutes: between the end of a worker and that of its job.

    Raises:
        InputError: the walltime is not ``[days-]hours:minutes[:seconds]``, or too short.
    """
    arguments = list(options.get("worker_extra_args", []))
    walltime = options.get("walltime")
    if isinstance(walltime, int):  # YAML reads 12:00:00 without quotes as a number of seconds
        minutes, seconds = divmod(walltime, 60)
        walltime = f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
        options = options | {"walltime": walltime}
    if walltime is None or "--lifetime" in " ".join(arguments):
        return options
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?", str(walltime))
    if not match:
        raise InputError(f"walltime {walltime!r}: expected hours:minutes:seconds, such as 04:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    whole = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    left = whole - timedelta(minutes=margin_minutes)
    if left <= timedelta(0):
        raise InputError(
            f"walltime {walltime} is not longer than lifetime_margin_minutes {margin_minutes:g}"
        )
    # Dask changes each lifetime at random by up to the stagger: lifetime + stagger = left.
    stagger = min(300, int(left.total_seconds() / 10))
    arguments += ["--lifetime", f"{int(left.total_seconds()) - stagger}s"]
    return options | {
        "worker_extra_args": [*arguments, "--lifetime-stagger", f"{stagger}s"],
    }
