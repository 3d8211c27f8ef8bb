"""Jobs of a batch system: those that end before their worker connects, those that it does not take,
and those whose time is over.

Dask replaces workers that it lost, but dask-jobqueue never asks what became of a job. One that is
cancelled while it waits, or whose script or node fails first, would be waited for without end, and
so would one that was refused.
"""

import os
import subprocess
import time
from asyncio import sleep, to_thread
from typing import Any

from distributed import Status, Worker
from distributed.deploy.adaptive import Adaptive
from distributed.deploy.spec import ProcessInterface

LOOK_SECONDS = 20.0
"""Interval at which the batch system is asked for its jobs, and at which lost ones are replaced."""
MOST_LOST = 3
"""How often in a row jobs are replaced while no worker is connected."""
FETCH_SECONDS = 30.0
"""Time within which the driver must fetch the last results of a worker that ends."""
LISTING = {"slurm": ("squeue", "--noheader", "--states=all", "--format=%A %T")}
"""Commands that print number and state of a user's jobs, by batch system."""
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
}
"""States of a Slurm job that will not run any more."""


class PatientWorker(Worker):
    """Dask's worker in a job. At the end of its lifetime it takes no more tasks, and ends those at
    work before it closes, and waits until their results are fetched. Dask's own drops them, so that
    a shard that takes longer than a lifetime has left is lost each time."""

    async def close_gracefully(
        self, restart: bool | None = None, reason: str = "worker-close-gracefully"
    ) -> None:
        """Leave the cluster."""
        if reason == "worker-lifetime-reached":
            self.memory_manager.memory_pause_fraction = False  # or it would resume the worker
            self.status = Status.paused
            while self.state.all_running_tasks:
                await sleep(0.1)
            until = time.monotonic() + FETCH_SECONDS
            while self.data and time.monotonic() < until:
                await sleep(0.1)
        await super().close_gracefully(restart, reason)


class WatchedJob:
    """Job of dask-jobqueue, in front of its class, that says why it was not taken.

    Attributes:
        refusal: of the batch system; empty if it took the job.
        connected: whether its worker was seen.
        listed: whether the batch system listed the job.
    """

    job_id: str | None
    refusal = ""
    connected = False
    listed = False

    async def start(self) -> None:
        """Submit the job."""
        try:
            await super().start()  # type: ignore[misc]
        except Exception as error:  # whatever a command of the batch system may do
            self.job_id = None
            self.refusal = _last_words(error)
            await ProcessInterface.start(self)  # type: ignore[arg-type]

    async def close(self) -> None:
        """Cancel the job, if there is one."""
        if self.job_id:
            await super().close()  # type: ignore[misc]


def _last_words(error: Exception) -> str:
    """What a command that failed said last: dask-jobqueue prints all of its output."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[-2:]) or type(error).__name__


class WatchingAdaptive(Adaptive):
    """Adapts the number of jobs to the work, and replaces those that were lost.

    Attributes:
        problem: why no job will run; empty if there is no reason.
    """

    cluster: Any

    def __init__(self, cluster: Any, **options: Any) -> None:
        self.problem = ""
        self._was_connected = False
        self._num_lost = 0
        self._due = 0.0
        super().__init__(cluster, **options)

    async def adapt(self) -> None:
        """Called about once per second."""
        waiting = self._find_waiting()
        refused = [job.refusal for job in waiting.values() if job.refusal]
        if refused and not self._was_connected:
            self.problem = f"the batch system does not take a job: {refused[-1]}"
        elif time.monotonic() > self._due:
            self._due = time.monotonic() + LOOK_SECONDS
            await self._replace_lost(waiting)
        if not self.problem:
            await super().adapt()

    def _find_waiting(self) -> dict[Any, Any]:
        """Jobs without a worker so far."""
        connected = {str(name) for name in self.observed}
        if connected:
            self._was_connected, self._num_lost = True, 0
        waiting = {}
        for name, job in self.cluster.workers.items():
            # A job of several workers has one name with suffixes.
            job.connected |= any(c == str(name) or c.startswith(f"{name}-") for c in connected)
            if not job.connected:
                waiting[name] = job
        return waiting

    async def _replace_lost(self, waiting: dict[Any, Any]) -> None:
        """Forget lost jobs: the next adaptation submits others for them."""
        states = await _list_states(self.cluster.job_cls.config_name) if waiting else None
        lost = {}
        for name, job in waiting.items():
            if job.refusal:
                lost[name] = f"one was not taken: {job.refusal}"
            elif states is not None and job.job_id:
                state = states.get(job.job_id)
                job.listed |= state is not None
                if state in ENDED or (state is None and job.listed):
                    lost[name] = f"one, job {job.job_id}, ended ({state or 'not listed'})"
        if not lost:
            return
        self._num_lost += 1
        if self._num_lost >= MOST_LOST and not self.observed:
            self.problem = (
                f"{MOST_LOST} times in a row jobs were lost before a worker connected; the last "
                f"{[*lost.values()][-1]}"
            )
            return
        for name in lost:
            if name in self.cluster.workers:
                await self.cluster.workers.pop(name).close()


async def _list_states(system: str) -> dict[str, str] | None:
    """States of this user's jobs by number; None if they cannot be listed."""
    if system not in LISTING:
        return None
    return await to_thread(_ask, [*LISTING[system], f"--user={os.getuid()}"])


def _ask(command: list[str]) -> dict[str, str] | None:
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split() for line in shown.stdout.splitlines()]
    return {words[0]: words[1] for words in lines if len(words) == 2}
