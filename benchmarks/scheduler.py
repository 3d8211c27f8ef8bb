"""Number of workers that one driver and one Dask scheduler can keep busy.

    python benchmarks/scheduler.py --workers 1,10,100,1000 --seconds 10

The driver is the real one (``pipeline.executor``) and the scheduler is Dask's, each in its own
process. Workers are Dask's too, many per process, and only sleep: a given number of seconds per
shard, in batches with a progress report after each, and then for the time that writing takes, in
which the next shard may start. Tasks carry as many captions, and receipts as much data, as those of
an extraction. The driver or the scheduler saturates when it uses a full core.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

from semroute.pipeline.executor.base import Deferred, report_progress
from semroute.pipeline.executor.dask import NO_PROFILE, DaskExecutor
from semroute.schemas import Receipt

WORKERS_PER_PROCESS = 250
"""Workers per process."""
START_SECONDS = 300
CALM = {
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.disk": False,
}
"""Settings of workers that share two cores. By default each checks itself every 20 ms, which is
unnoticed in a process of its own but takes whole cores with hundreds in one process."""


def sleep(
    shard: int, texts: list[str], tokens: np.ndarray, seconds: float, num: int
) -> Deferred[Receipt]:
    """Simulate a shard: batches, then writing, which is a tenth of it."""
    for batch in range(num):
        time.sleep(0.9 * seconds / num)
        report_progress(shard, len(texts) * (batch + 1) // num)

    def write() -> Receipt:
        time.sleep(0.1 * seconds)
        return Receipt(
            shard=shard,
            num_rows=len(tokens),
            num_entries=len(texts),
            files={},
            codec_error={"mean": 0.01},
            layer_error={str(layer): 0.01 for layer in range(1, 37)},
            warnings=[],
            seconds={"load": 0.0, "forward": seconds, "code": 0.1, "write": 0.1},
            worker="host:1",
        )

    return Deferred(write)


async def host(address: str, num: int) -> None:
    """Run a number of workers in this process, until it is killed."""
    from distributed import Worker

    workers = [Worker(address, nthreads=1, memory_limit=0, dashboard=False) for _ in range(num)]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


class Machines:
    """A scheduler and workers."""

    def __init__(self, num: int, resources: ExitStack) -> None:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "scheduler.json"
        self.resources, self.folder = resources, folder
        dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
        dask += ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
        self.scheduler = psutil.Process(self._start(dask).pid)
        while not file.exists():
            time.sleep(0.05)
        self.file = file
        for first in range(0, num, WORKERS_PER_PROCESS):
            here = min(WORKERS_PER_PROCESS, num - first)
            self._start([sys.executable, __file__, f"--host={file}", f"--workers={here}"])

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        self.resources.callback(process.wait)
        self.resources.callback(process.kill)
        return process


def measure(num: int, seconds: float, shards: int, captions: int, tokens: int, steps: int) -> None:
    """Measure and print one row of the table."""
    with ExitStack() as resources:
        machines = Machines(num, resources)

        def connect(held: ExitStack) -> Any:
            from distributed import Client

            return held.enter_context(Client(scheduler_file=str(machines.file)))

        executor = resources.enter_context(DaskExecutor(connect=connect))
        executor.client.wait_for_workers(num, timeout=START_SECONDS)
        texts = [f"{number} {'x' * 4 * (tokens // captions)}" for number in range(captions)]
        ids = np.zeros(tokens, np.int32)
        scheduler = sum(machines.scheduler.cpu_times()[:2])
        driver, began = time.process_time(), time.perf_counter()
        outcomes = executor.run(
            range(num * shards),
            sleep,
            lambda shard: (shard, texts, ids, seconds, steps),
            on_progress=lambda _shard, _done: None,
        )
        done = sum(isinstance(receipt, Receipt) for _, receipt in outcomes)
        took = time.perf_counter() - began
        driver = time.process_time() - driver
        scheduler = sum(machines.scheduler.cpu_times()[:2]) - scheduler
    assert done == num * shards
    # A whole first shard per worker; the others start while the one before is being written.
    ideal = (0.9 * shards + 0.1) * seconds
    click.echo(
        f"| {num:,} | {done:,} | {ideal:.1f} | {took:.1f} | {ideal / took:.2f} | {done / took:.1f} "
        f"| {driver / took:.2f} | {1000 * driver / done:.1f} "
        f"| {scheduler / took:.2f} | {1000 * scheduler / done:.1f} |"
    )


@click.command()
@click.option("--workers", default="1,10,100,1000", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Seconds per shard.")
@click.option("--shards", default=3, show_default=True, help="Shards per worker.")
@click.option("--captions", default=250, show_default=True, help="Per shard.")
@click.option("--tokens", default=7_000, show_default=True, help="Per shard.")
@click.option("--batches", default=4, show_default=True, help="Per shard.")
@click.option("--host", "file", type=click.Path(path_type=Path), hidden=True)
def main(
    workers: str,
    seconds: float,
    shards: int,
    captions: int,
    tokens: int,
    batches: int,
    file: Path | None,
) -> None:
    """Measure for each number of workers."""
    import dask

    dask.config.set(NO_PROFILE)
    if file is not None:
        dask.config.set(CALM)
        address = json.loads(file.read_text())["address"]
        asyncio.run(host(address, int(workers)))
        return
    click.echo(
        "| workers | shards | s at best | s | of best | shards/s | driver, cores | ms per shard "
        "| scheduler, cores | ms per shard |"
    )
    click.echo("| --: " * 10 + "|")
    for num in workers.split(","):
        measure(int(num), seconds, shards, captions, tokens, batches)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
