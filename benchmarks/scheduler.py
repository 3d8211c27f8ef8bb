"""How many workers one driver and one scheduler of Dask can keep at work.

    python benchmarks/scheduler.py --workers 1,10,100,1000 --seconds 10

The driver is the real one (``pipeline.cluster``), the scheduler is Dask's, each a process; workers
are Dask's too, many to a process, and what they do is sleep: for so many seconds a shard, in some
batches after each of which they tell how far they are, and then for the time that writing takes, in
which the next shard may begin. Tasks carry as many captions, and receipts say as much, as those of
an extraction. A share of 1 of a core, of the driver or of the scheduler, is where it saturates.
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

from semroute.pipeline.cluster import NO_PROFILE, Cluster, Writing, report_progress
from semroute.schemas import Receipt

A_PROCESS = 250
"""Workers of one process."""
START_SECONDS = 300
CALM = {
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.disk": False,
}
"""Settings of workers that share two cores: each looks after itself every 20 ms otherwise, which
nobody notices in a process of its own and which takes whole cores of hundreds in one."""


def sleep(
    shard: int, texts: list[str], tokens: np.ndarray, seconds: float, num: int
) -> Writing[Receipt]:
    """A shard: batches, then writing, which is a tenth of it."""
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

    return Writing(write)


async def host(address: str, num: int) -> None:
    """So many workers in this process, until it is killed."""
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
        for first in range(0, num, A_PROCESS):
            here = min(A_PROCESS, num - first)
            self._start([sys.executable, __file__, f"--host={file}", f"--workers={here}"])

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        self.resources.callback(process.wait)
        self.resources.callback(process.kill)
        return process


def measure(num: int, seconds: float, shards: int, captions: int, tokens: int, told: int) -> None:
    """One line of the table."""
    with ExitStack() as resources:
        machines = Machines(num, resources)

        def connect(held: ExitStack) -> Any:
            from distributed import Client

            return held.enter_context(Client(scheduler_file=str(machines.file)))

        cluster = resources.enter_context(Cluster(None, connect))
        cluster.client.wait_for_workers(num, timeout=START_SECONDS)
        texts = [f"{number} {'x' * 4 * (tokens // captions)}" for number in range(captions)]
        ids = np.zeros(tokens, np.int32)
        scheduler = sum(machines.scheduler.cpu_times()[:2])
        driver, began = time.process_time(), time.perf_counter()
        outcomes = cluster.run(
            range(num * shards),
            sleep,
            lambda shard: (shard, texts, ids, seconds, told),
            on_progress=lambda _shard, _done: None,
        )
        done = sum(isinstance(receipt, Receipt) for _, receipt in outcomes)
        took = time.perf_counter() - began
        driver = time.process_time() - driver
        scheduler = sum(machines.scheduler.cpu_times()[:2]) - scheduler
    assert done == num * shards
    # The first shard of a worker whole, of the others all but what the one before writes meanwhile.
    ideal = (0.9 * shards + 0.1) * seconds
    click.echo(
        f"| {num:,} | {done:,} | {ideal:.1f} | {took:.1f} | {ideal / took:.2f} | {done / took:.1f} "
        f"| {driver / took:.2f} | {1000 * driver / done:.1f} "
        f"| {scheduler / took:.2f} | {1000 * scheduler / done:.1f} |"
    )


@click.command()
@click.option("--workers", default="1,10,100,1000", show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="A shard takes.")
@click.option("--shards", default=3, show_default=True, help="A worker.")
@click.option("--captions", default=250, show_default=True, help="A shard.")
@click.option("--tokens", default=7_000, show_default=True, help="A shard.")
@click.option("--batches", default=4, show_default=True, help="A shard.")
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
    """Measure, by the number of workers."""
    import dask

    dask.config.set(NO_PROFILE)
    if file is not None:
        dask.config.set(CALM)
        address = json.loads(file.read_text())["address"]
        asyncio.run(host(address, int(workers)))
        return
    click.echo(
        "| workers | shards | s at best | s | of best | shards/s | driver, cores | ms a shard "
        "| scheduler, cores | ms a shard |"
    )
    click.echo("| --: " * 10 + "|")
    for num in workers.split(","):
        measure(int(num), seconds, shards, captions, tokens, batches)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
