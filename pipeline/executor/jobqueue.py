"""Workers as jobs of a batch system, through dask-jobqueue."""

import os
import re
import shutil
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ...schemas import InputError, JobQueue, parse, read_yaml
from .dask import TASK, connect_client, dashboard_link, no_profile_variable

SHARD_DURATION = "60s"
"""Duration of a shard that the scheduler of a job queue assumes until it has seen one."""

WORKER_CLASS = "semroute.pipeline.executor.jobs.PatientWorker"
"""Worker of jobs, as ``dask worker --worker-class`` names it."""

OURS = ("security", "protocol", "scheduler_cls")
"""Arguments of dask-jobqueue's cluster that are not the user's."""


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


class JobQueueClient:
    """Makes the client of a job queue when it is called.

    Args:
        path: of the YAML, for messages.

    Raises:
        InputError: the walltime is not valid, see :func:`with_lifetime`; or options would take the
            place of the run's own keys.
    """

    def __init__(self, jobs: JobQueue, path: Path) -> None:
        for name in OURS:
            if name in jobs.options:
                raise InputError(
                    f"--cluster {path}: options.{name} is set by semroute, whose schedulers and "
                    "workers speak TLS with keys made for the run: leave it out"
                )
        self.jobs, self.path = jobs, path
        self.options = _worker_options(jobs)
        self._adaptive: Any = None

    @property
    def problem(self) -> str:
        """Reason why no job will run; empty if there is none."""
        return self._adaptive.problem if self._adaptive else ""

    def __call__(self, resources: ExitStack) -> Any:
        try:
            import dask
            import dask_jobqueue
            from dask_jobqueue.local import LocalCluster
        except ImportError as error:
            raise InputError(
                f"--cluster {self.path} needs dask-jobqueue: pip install 'semroute[slurm]'"
            ) from error
        from .jobs import WatchedJob, WatchingAdaptive

        names = {name.lower(): name for name in dir(dask_jobqueue) if name.endswith("Cluster")}
        kind = (
            LocalCluster
            if self.jobs.kind == "local"
            else getattr(dask_jobqueue, names[f"{self.jobs.kind}cluster"])
        )
        job = type("WatchedJob", (WatchedJob, kind.job_cls), {})
        options = self.options | self._private_options(resources) | {"job_cls": job}
        # Dask would assume half a second until the first shard is done, and start one job for all.
        key = "distributed.scheduler.default-task-durations"
        durations = {TASK: SHARD_DURATION, **dask.config.get(key)}
        resources.enter_context(dask.config.set({key: durations}))
        limits = {"minimum_jobs": self.jobs.minimum_jobs, "maximum_jobs": self.jobs.maximum_jobs}
        try:
            cluster = resources.enter_context(kind(**options))
            self._adaptive = cluster.adapt(Adaptive=WatchingAdaptive, **limits)
        except (TypeError, ValueError, OSError) as error:
            raise InputError(f"--cluster {self.path}: dask-jobqueue refuses it: {error}") from error
        return connect_client(resources, f"the job queue of {self.path}", address=cluster)

    def _private_options(self, resources: ExitStack) -> dict[str, Any]:
        """Options with the keys of the run, and a dashboard that others do not find."""
        import dask

        from .private import PrivateScheduler, has_dashboard, make_prefix

        configured = f"jobqueue.{self.options.get('config_name', self.jobs.kind)}."
        scheduler = self.options.get("scheduler_options")
        scheduler = scheduler or dask.config.get(f"{configured}scheduler-options", None) or {}
        host = "{host}"
        if "dashboard_address" not in scheduler:  # its default, port 8787, is open to everyone
            host, scheduler = "127.0.0.1", scheduler | {"dashboard_address": "127.0.0.1:0"}
        prefix = make_prefix()
        link = dashboard_link(f"{host}:{{port}}{prefix}")
        resources.enter_context(dask.config.set(link))
        folder = self.options.get("shared_temp_directory")
        folder = folder or dask.config.get(f"{configured}shared-temp-directory", None)
        keys = _key_files(resources, Path(folder or Path.cwd()), self.path)
        pages = {"http_prefix": prefix, "dashboard": has_dashboard()}
        own = {"scheduler_cls": PrivateScheduler, "scheduler_options": scheduler | keys | pages}
        return keys | own


def _key_files(resources: ExitStack, folder: Path, path: Path) -> dict[str, Any]:
    """Options of dask-jobqueue's cluster with keys of this run. Jobs read theirs from files that
    only their user may read, and that are removed with ``resources``.

    Args:
        folder: seen by all nodes.
        path: of the YAML, for messages.

    Raises:
        InputError: no such folder, or its name cannot be in a job's command.
    """
    from .private import write_keys

    folder = Path(os.path.expandvars(folder)).expanduser().resolve()
    if re.search(r"[^\w./+,:=@%-]", str(folder)):  # dask-jobqueue does not quote it
        raise InputError(
            f"--cluster {path}: the keys of the run would be written to {str(folder)!r}, whose "
            "name has spaces or signs that a job's command cannot have. Name another folder that "
            "all nodes see: shared_temp_directory in options."
        )
    try:
        place = Path(mkdtemp(prefix=".semroute-keys-", dir=folder))  # with mode 700
    except OSError as error:
        raise InputError(
            f"--cluster {path}: the keys of the run cannot be written to {folder}: "
            f"{error.strerror}. Name a folder that all nodes see: shared_temp_directory in options."
        ) from error
    resources.callback(shutil.rmtree, place, ignore_errors=True)
    return {"protocol": "tls://", "security": write_keys(place)}


def _worker_options(jobs: JobQueue) -> dict[str, Any]:
    """Options of dask-jobqueue's cluster: one worker per job, one thread per worker."""
    # Dask would start several workers per job, each with a model, and give each as many tasks at a
    # time as the job has cores.
    options = {"processes": 1} | with_lifetime(jobs.options, jobs.lifetime_margin_minutes)
    words = list(options.get("worker_extra_args", []))
    given = " ".join(map(str, words))
    if "--worker-class" not in given:
        words += ["--worker-class", WORKER_CLASS]
    if "--nthreads" not in given:
        words += ["--nthreads", "1"]
    if "--dashboard" not in given:  # or its pages are open to everyone who reaches the node
        words += ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    options["worker_extra_args"] = words
    prologue = options.get("job_script_prologue") or []
    # The script of a job on this machine is not run by a shell: its words are those of one command.
    word = "env" if jobs.kind == "local" else "export"
    return options | {"job_script_prologue": [f"{word} {no_profile_variable()}", *prologue]}


def with_lifetime(options: dict[str, Any], margin_minutes: float) -> dict[str, Any]:
    """Options that let workers end before the batch system kills them: ``--lifetime``. From then
    on a worker takes no more shards, and has the margin for those at work.

    Args:
        options: of a dask-jobqueue cluster; unchanged without a walltime, or with a lifetime of
            their own.
        margin_minutes: between the end of a worker's lifetime and that of its job.

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
