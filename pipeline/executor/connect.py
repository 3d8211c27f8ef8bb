"""Which cluster ``--cluster`` names: this machine, a scheduler that runs, or a batch system."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...schemas import InputError
from .base import Cluster, connect_client, num_cpus
from .jobqueue import job_queue, max_workers, read_job_queue
from .workers import num_gpus

MOST_WORKERS = 4
"""By default on a machine without GPUs: each holds the model."""


def connect(text: str, workers: int | None, gpus: int | None = None) -> Cluster:
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
            workers = (num_gpus() if gpus is None else gpus) or min(num_cpus(), MOST_WORKERS)
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
        jobs = read_job_queue(path)
        return Cluster(None, job_queue(jobs, path), f"of {text}", max_workers(jobs))
    if path.suffix == ".json":
        return Cluster(None, _scheduler_file(path), f"of {text}")
    raise InputError(
        f"--cluster {text!r}: expected local, an address such as tcp://host:8786, a scheduler file "
        "(.json) or a job queue (.yaml)"
    )


def _address(address: str) -> Callable[[ExitStack], Any]:
    def connect(resources: ExitStack) -> Any:
        return connect_client(resources, address, address=address)

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
        return connect_client(resources, f"{address} (of {path})", scheduler_file=str(path))

    return connect
