"""From ``--cluster`` to its executor: this machine, a running scheduler, or a batch system."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...schemas import InputError
from ...schemas.json_file import read_json
from .base import Executor, num_cpus
from .dask import DaskExecutor, connect_client
from .jobqueue import JobQueueClient, max_workers, read_job_queue
from .local import LocalExecutor
from .workers import num_gpus

MOST_WORKERS = 4
"""Default limit on a machine without GPUs: each worker holds the model."""


def connect(text: str, workers: int | None, gpus: int | None = None) -> Executor:
    """Executor for ``--cluster``. Nothing is started or reached yet.

    Args:
        text: ``local``; an address, ``tcp://...`` or ``tls://...``; a scheduler file, ``.json``; or
            a YAML of :class:`semroute.schemas.JobQueue`.
        workers: processes, for ``local`` only; 0: this process, without Dask. Default: one per GPU,
            or one per CPU core up to 4.
        gpus: GPUs of this machine that tasks use; default: all.

    Raises:
        InputError: none of these, or a number of workers for a cluster that has its own.
    """
    if text == "local":
        if workers is None:
            workers = (num_gpus() if gpus is None else gpus) or min(num_cpus(), MOST_WORKERS)
        return LocalExecutor() if workers == 0 else DaskExecutor(workers)
    if workers is not None:
        raise InputError(
            f"--workers {workers} is only for --cluster local; {text} has workers of its own. "
            "Leave it out."
        )
    if re.match(r"[a-z]+://", text):
        return DaskExecutor(connect=_address(text), name=f"at {text}")
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        jobs = read_job_queue(path)
        client = JobQueueClient(jobs, path)
        return DaskExecutor(
            connect=client,
            name=f"of {text}",
            max_workers=max_workers(jobs),
            find_problem=lambda: client.problem,
        )
    if path.suffix == ".json":
        return DaskExecutor(connect=_scheduler_file(path), name=f"of {text}")
    raise InputError(
        f"--cluster {text!r}: expected local, an address such as tcp://host:8786, a scheduler file "
        "(.json) or a job queue (.yaml)"
    )


def _address(address: str) -> Callable[[ExitStack], Any]:
    def open_client(resources: ExitStack) -> Any:
        return connect_client(resources, address, address=address)

    return open_client


def _scheduler_file(path: Path) -> Callable[[ExitStack], Any]:
    try:
        address = read_json(path, follow=True)["address"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--cluster {path}: no scheduler file: {error}. "
            f"`dask scheduler --scheduler-file {path}` writes one."
        ) from error

    def open_client(resources: ExitStack) -> Any:
        return connect_client(resources, f"{address} (of {path})", scheduler_file=str(path))

    return open_client
