"""The workers of a cluster: their versions, GPUs, threads and folders."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...schemas import InputError
from .base import NO_PROFILE, Cluster, num_cpus

WAIT_SECONDS = 5
"""After which waiting for the first worker is mentioned."""


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


def inspect_workers(cluster: Cluster, store: str, report: Callable[[str], None]) -> Workers:
    """Wait for the first worker of a Dask cluster, and check all that are there.

    Of this machine's own workers nothing need be asked, and none is started.

    Args:
        store: path or URL that they will write to.

    Raises:
        InputError: no scheduler there; or workers of another version of semroute, or that do not
            see the folder of the store.
    """
    if cluster.connect is None:
        return Workers(num_gpus() > 0, max(1, num_cpus() // max(1, cluster.workers or 1)))
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
    from ... import __version__

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
            f"{as_variable()}"
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

    from ... import __version__

    sees = not folder or os.path.isdir(folder)  # no, too, where it may not look
    may_stop = sys.version_info < (3, 12) and any(get(key, False) for key in NO_PROFILE)
    return _Answer(num_gpus(), num_cpus(), __version__, sees, socket.gethostname(), may_stop)


def as_variable() -> str:
    """The setting as a variable of the environment (dask.config)."""
    ((key, value),) = NO_PROFILE.items()
    return f"DASK_{key.upper().replace('.', '__')}={value}"


def num_gpus() -> int:
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
