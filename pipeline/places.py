"""Which cluster ``--cluster`` names: this machine, a scheduler that runs, or a batch system."""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from ..schemas import InputError, JobQueue, parse
from .cluster import NO_PROFILE, TASK, Cluster, num_cpus

CONNECT_SECONDS = 30
"""Within which a scheduler must answer."""
WAIT_SECONDS = 5
"""After which waiting for the first worker is mentioned."""
SHARD_TAKES = "60s"
"""At first, to a job queue's scheduler; then what it sees."""
MOST_WORKERS = 4
"""By default on a machine without GPUs: each holds the model."""


@dataclass(frozen=True)
class Workers:
    """What the workers of a cluster are.

    Attributes:
        have_gpus: each sees at least one.
        threads: CPU threads for each, where nobody says otherwise.
    """

    have_gpus: bool
    threads: int


@dataclass(frozen=True)
class _Answer:
    """What one worker says of itself."""

    gpus: int
    cpus: int
    version: str
    sees_folder: bool
    host: str
    may_stop: bool


def find_cluster(text: str, workers: int | None, gpus: int | None = None) -> Cluster:
    """The cluster of ``--cluster``; nothing is started or reached yet.

    Args:
        text: ``local``; an address, ``tcp://...`` or ``tls://...``; a scheduler file, ``.json``; or
            a YAML of :class:`semroute.schemas.JobQueue`.
        workers: processes, of ``local`` only; default one a GPU, or one a CPU core up to 4.
        gpus: of this machine, where tasks use them; default: count them.

    Raises:
        InputError: none of these, or a number of workers for a cluster that has its own.
    """
    if text == "local":
        if workers is None:
            workers = (_num_gpus() if gpus is None else gpus) or min(num_cpus(), MOST_WORKERS)
        return Cluster(workers)
    if workers is not None:
        raise InputError(
            f"--workers {workers} is of --cluster local; {text} has as many as it has. "
            "Leave it out."
        )
    if re.match(r"[a-z]+://", text):
        return Cluster(None, _address(text), f"at {text}")
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        jobs = _read_jobs(path)
        return Cluster(None, _job_queue(jobs, path), f"of {text}", _num_workers(jobs))
    if path.suffix == ".json":
        return Cluster(None, _scheduler_file(path), f"of {text}")
    raise InputError(
        f"--cluster {text!r}: expected local, an address such as tcp://host:8786, a scheduler file "
        "(.json) or a job queue (.yaml)"
    )


def look_at_workers(cluster: Cluster, store: str, report: Callable[[str], None]) -> Workers:
    """Wait for the first worker of a Dask cluster, and check all that are there.

    Of this machine's own workers nothing need be asked, and none is started.

    Args:
        store: path or URL that they will write to.

    Raises:
        InputError: no scheduler there; or workers of another version of semroute, or that do not
            see the folder of the store.
    """
    if cluster.connect is None:
        return Workers(_num_gpus() > 0, max(1, num_cpus() // max(1, cluster.workers or 1)))
    waited = time.monotonic()
    said = False
    with cluster.wanted():
        while not cluster.threads():
            if not said and time.monotonic() - waited > WAIT_SECONDS:
                report(f"waiting for the first worker {cluster.name}")
                said = True
            time.sleep(0.2)
    folder = "" if "://" in store else str(Path(store).resolve().parent)
    answers = cluster.ask(_answer, folder)
    _check(answers, cluster.threads(), folder, report)
    gpus = sum(answer.gpus > 0 for answer in answers.values())
    hosts = len({answer.host for answer in answers.values()})
    report(f"{len(answers)} workers {cluster.name} on {hosts} hosts, {gpus} of them with a GPU")
    return Workers(gpus == len(answers), min(answer.cpus for answer in answers.values()))


def _check(
    answers: dict[str, _Answer],
    threads: dict[str, int],
    folder: str,
    report: Callable[[str], None],
) -> None:
    from .. import __version__

    others = {a: f"semroute {w.version}" for a, w in answers.items() if w.version != __version__}
    blind = {a: w.host for a, w in answers.items() if not w.sees_folder}
    if others:
        raise InputError(
            f"{len(others)} of {len(answers)} workers have another version than this command, "
            f"semroute {__version__}: {_some(others)}. Install the same one everywhere."
        )
    if blind:
        raise InputError(
            f"{len(blind)} of {len(answers)} workers do not see the folder {folder}: "
            f"{_some(blind)}. Name a folder on a file system that all nodes share."
        )
    stopping = {a: w.host for a, w in answers.items() if w.may_stop}
    if stopping:
        report(
            f"warning: {len(stopping)} workers ({_some(stopping)}) run Python 3.11 with Dask's "
            "profiler, which may stop them for ever (dask/distributed#8616); start them with "
            f"{_as_variable()}"
        )
    shared = {a: f"{num} threads" for a, num in threads.items() if num > 1}
    if shared:
        report(
            f"warning: {len(shared)} workers have several threads ({_some(shared)}), but a model "
            "serves one task at a time; start them with --nthreads 1"
        )


def _some(found: dict[str, str]) -> str:
    listed = ", ".join(f"{address}: {what}" for address, what in [*found.items()][:3])
    return listed + (" and more" if len(found) > 3 else "")


def _answer(folder: str) -> _Answer:
    """Runs in a worker."""
    import socket

    from dask.config import get

    from .. import __version__

    sees = not folder or os.path.isdir(folder)  # no, too, where it may not look
    may_stop = sys.version_info < (3, 12) and any(get(key, False) for key in NO_PROFILE)
    return _Answer(_num_gpus(), num_cpus(), __version__, sees, socket.gethostname(), may_stop)


def _as_variable() -> str:
    """The setting as a variable of the environment (dask.config)."""
    ((key, value),) = NO_PROFILE.items()
    return f"DASK_{key.upper().replace('.', '__')}={value}"


def _num_gpus() -> int:
    """None where torch is not installed, which pixels do not need."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def own_device() -> str:
    """The worker's own GPU where there are GPUs (workers of a LocalCluster are named 0, 1, ...)."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    from distributed import get_worker

    try:
        return f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"
    except ValueError:  # no worker: this is the driver's own process
        return "cuda:0"


def _address(address: str) -> Callable[[ExitStack], Any]:
    def connect(resources: ExitStack) -> Any:
        return _client(resources, address, address=address)

    return connect


def _scheduler_file(path: Path) -> Callable[[ExitStack], Any]:
    try:
        address = json.loads(path.read_text("utf-8"))["address"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--cluster {path}: no scheduler file: {error}. "
            f"`dask scheduler --scheduler-file {path}` writes one."
        ) from error

    def connect(resources: ExitStack) -> Any:
        return _client(resources, f"{address} (of {path})", scheduler_file=str(path))

    return connect


def _client(resources: ExitStack, name: str, **where: Any) -> Any:
    from distributed import Client

    # Its errors are raised, or told in other words, and need no traceback besides.
    logger = logging.getLogger("distributed.client")
    resources.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.CRITICAL)
    try:
        return resources.enter_context(
            Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
        )
    except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: TLS without keys
        raise InputError(
            f"no Dask scheduler answers at {name}: {error}. Is it running, is the port open, and "
            "are TLS keys in Dask's configuration?"
        ) from error


def _read_jobs(path: Path) -> JobQueue:
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--cluster {path}: cannot be read: {error}") from error
    return parse(JobQueue, document, str(path))


def _num_workers(jobs: JobQueue) -> int:
    """Workers at most."""
    processes = jobs.options.get("processes", 1)
    return jobs.maximum_jobs * (processes if isinstance(processes, int) else 1)


def _job_queue(jobs: JobQueue, path: Path) -> Callable[[ExitStack], Any]:
    # Dask would start several workers a job, each with a model, and give each as many tasks at a
    # time as the job has cores.
    options = {"processes": 1} | with_lifetime(jobs.options, jobs.lifetime_margin_minutes)
    words = list(options.get("worker_extra_args", []))
    if "--nthreads" not in " ".join(map(str, words)):
        options["worker_extra_args"] = [*words, "--nthreads", "1"]
    prologue = options.get("job_script_prologue") or []
    # Of jobs on this machine the script is no shell's: its words are those of one command.
    word = "env" if jobs.kind == "local" else "export"
    options = options | {"job_script_prologue": [f"{word} {_as_variable()}", *prologue]}

    def connect(resources: ExitStack) -> Any:
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
        if "dashboard_address" not in scheduler:  # which would be port 8787, open to all the world
            scheduler = scheduler | {"dashboard_address": "127.0.0.1:0"}
            link = {"distributed.dashboard.link": "http://127.0.0.1:{port}/status"}
            resources.enter_context(dask.config.set(link))
        # Or until the first shard is done Dask takes half a second for it, and one job for enough.
        known = dask.config.get("distributed.scheduler.default-task-durations")
        durations = {"distributed.scheduler.default-task-durations": {TASK: SHARD_TAKES, **known}}
        resources.enter_context(dask.config.set(durations))
        try:
            cluster = resources.enter_context(kind(**options | {"scheduler_options": scheduler}))
            cluster.adapt(minimum_jobs=jobs.minimum_jobs, maximum_jobs=jobs.maximum_jobs)
        except (TypeError, ValueError, OSError) as error:
            raise InputError(f"--cluster {path}: dask-jobqueue refuses it: {error}") from error
        return _client(resources, f"the job queue of {path}", address=cluster)

    return connect


def with_lifetime(options: dict[str, Any], margin_minutes: float) -> dict[str, Any]:
    """Options by which workers close before the batch system kills them: ``--lifetime``.

    Args:
        options: of a dask-jobqueue cluster; unchanged where they have no walltime, or a lifetime of
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
    stagger = min(300, int(left.total_seconds() / 10))
    arguments += ["--lifetime", f"{int(left.total_seconds()) - stagger}s"]
    return options | {
        "worker_extra_args": [*arguments, "--lifetime-stagger", f"{stagger}s"],
    }
