"""Facts about workers: their versions, GPUs, threads and folders."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...schemas import InputError
from .base import Executor, num_cpus
from .dask import NO_PROFILE, DaskExecutor, no_profile_variable

WAIT_SECONDS = 5
"""Waiting for the first worker is reported after this time."""


@dataclass(frozen=True)
class Workers:
    """Properties that all workers share.

    Attributes:
        have_gpus: each sees at least one.
        threads: default number of CPU threads for each.
    """

    have_gpus: bool
    threads: int


@dataclass(frozen=True)
class _WorkerFacts:
    """Facts about one worker."""

    gpus: int
    cpus: int
    version: str
    sees_folder: bool
    host: str
    may_hang: bool


def inspect_workers(executor: Executor, store: str, report: Callable[[str], None]) -> Workers:
    """Wait for the first worker of a cluster, and check all that are there.

    Workers on this machine need no check, and are not started for it.

    Args:
        store: path or URL that they will write to.

    Raises:
        InputError: no scheduler answers; or workers have another version of semroute, or do not
            see the folder of the store.
    """
    if not isinstance(executor, DaskExecutor) or executor.workers is not None:
        return Workers(num_gpus() > 0, max(1, num_cpus() // max(1, executor.workers or 1)))
    started = time.monotonic()
    reported = False
    with executor.waiting_task():
        while not executor.threads():
            executor.check()
            if not reported and time.monotonic() - started > WAIT_SECONDS:
                report(f"waiting for the first worker {executor}")
                reported = True
            time.sleep(0.2)
    folder = "" if "://" in store else str(Path(store).resolve().parent)
    workers = executor.ask(_describe_worker, folder)
    _check(workers, executor.threads(), folder, report)
    num_with_gpu = sum(worker.gpus > 0 for worker in workers.values())
    num_hosts = len({worker.host for worker in workers.values()})
    report(
        f"{len(workers)} workers {executor} on {num_hosts} hosts, {num_with_gpu} of them with a GPU"
    )
    return Workers(num_with_gpu == len(workers), min(worker.cpus for worker in workers.values()))


def _check(
    workers: dict[str, _WorkerFacts],
    threads: dict[str, int],
    folder: str,
    report: Callable[[str], None],
) -> None:
    from ... import __version__

    others = {a: f"semroute {w.version}" for a, w in workers.items() if w.version != __version__}
    blind = {a: w.host for a, w in workers.items() if not w.sees_folder}
    if others:
        raise InputError(
            f"{len(others)} of {len(workers)} workers have another version than this command, "
            f"semroute {__version__}: {_list_some(others)}. Install the same one everywhere."
        )
    if blind:
        raise InputError(
            f"{len(blind)} of {len(workers)} workers do not see the folder {folder}: "
            f"{_list_some(blind)}. Name a folder on a file system that all nodes share."
        )
    may_hang = {a: w.host for a, w in workers.items() if w.may_hang}
    if may_hang:
        report(
            f"warning: {len(may_hang)} workers ({_list_some(may_hang)}) run Python 3.11 with "
            "Dask's profiler, which may stop them for ever (dask/distributed#8616); start them "
            f"with {no_profile_variable()}"
        )
    shared = {a: f"{num} threads" for a, num in threads.items() if num > 1}
    if shared:
        report(
            f"warning: {len(shared)} workers have several threads ({_list_some(shared)}), but a "
            "model serves one task at a time; start them with --nthreads 1"
        )


def _list_some(facts: dict[str, str]) -> str:
    listed = ", ".join(f"{address}: {fact}" for address, fact in [*facts.items()][:3])
    return listed + (" and more" if len(facts) > 3 else "")


def _describe_worker(folder: str) -> _WorkerFacts:
    """Describe the worker in which this is called."""
    import socket

    from dask.config import get

    from ... import __version__

    sees_folder = not folder or os.path.isdir(folder)  # False also without permission to look
    may_hang = sys.version_info < (3, 12) and any(get(key, False) for key in NO_PROFILE)
    return _WorkerFacts(
        num_gpus(), num_cpus(), __version__, sees_folder, socket.gethostname(), may_hang
    )


def num_gpus() -> int:
    """GPUs that this process sees; 0 without torch, which ``pixels`` does not need."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def own_device() -> str:
    """Device of this worker: a GPU of its own where there are GPUs, chosen by the worker's name (0,
    1, ... in a LocalCluster)."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    from distributed import get_worker

    try:
        return f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"
    except ValueError:  # not in a worker: this is the process of the driver
        return "cuda:0"
