"""Injects random faults into the processes of an extraction, then compares every byte.

    python benchmarks/chaos.py CAPTIONS FOLDER --model LLM --rounds 20

One round is a Dask scheduler, two workers and a driver, each in its own process, that write one
store. Every few seconds one of them is killed with all its children, interrupted, or suspended; it
is then restarted, as a batch system or a person would. When the store is complete its tables and
shards must be those of an undisturbed extraction, and `verify` must find nothing. Exits with 1 if
they differ or the store was not completed in time.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.verify import verify

WORKERS = ("worker-0", "worker-1")
SUSPENDED_SECONDS = 3.0
"""Seconds for which a process is suspended."""


@dataclass
class Machines:
    """A scheduler, workers and a driver, any of which may die.

    Attributes:
        folder: where logs and the scheduler's file are written.
        extract: the driver's command.
    """

    folder: Path
    extract: list[str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)

    def start(self, name: str) -> None:
        """Start the process of this name."""
        file = self.folder / "scheduler.json"
        dask = [sys.executable, "-m", "distributed.cli.dask_" + name.partition("-")[0]]
        quiet = ["--scheduler-file", str(file), "--no-dashboard"]
        if name == "scheduler":
            file.unlink(missing_ok=True)
            command = [*dask, *quiet, "--host", "127.0.0.1", "--port", "0"]
        elif name in WORKERS:
            command = [*dask, *quiet, "--nthreads", "1", "--memory-limit", "0"]
        else:
            command = [*self.extract, "--cluster", str(file)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=os.environ | {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"},
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        self.starts[name] += 1
        while name == "scheduler" and not file.exists():
            time.sleep(0.05)

    def end(self, name: str) -> None:
        """Kill a process and its children."""
        process = self.running[name]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart_dead(self) -> None:
        """Restart dead processes; workers are restarted along with a scheduler that died."""
        if self.running["scheduler"].poll() is not None:
            for name in WORKERS:
                self.end(name)
            self.start("scheduler")
        for name in (*WORKERS, "driver"):
            if self.running[name].poll() is not None:
                self.start(name)

    def stop(self) -> None:
        for name in self.running:
            self.end(name)


def kill(machines: Machines, name: str) -> None:
    machines.end(name)


def kill_child(machines: Machines, name: str) -> None:
    """Kill the worker process under the nanny, which will replace it."""
    process = machines.running[name]
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()


def interrupt(machines: Machines, name: str) -> None:
    machines.running[name].send_signal(signal.SIGINT)


def suspend(machines: Machines, name: str) -> None:
    """Suspend a process for a while, as on a node that swaps."""
    process = machines.running[name]
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(SUSPENDED_SECONDS)
        os.killpg(process.pid, signal.SIGCONT)


FAULTS: dict[str, tuple[Callable[[Machines, str], None], tuple[str, ...]]] = {
    "nanny and worker killed": (kill, WORKERS),
    "worker killed": (kill_child, WORKERS),
    "scheduler killed": (kill, ("scheduler",)),
    "driver killed": (kill, ("driver",)),
    "driver interrupted": (interrupt, ("driver",)),
    "worker suspended": (suspend, WORKERS),
    "driver suspended": (suspend, ("driver",)),
}


def contents(store: Path) -> dict[str, bytes]:
    """Every byte that must not depend on the faults."""
    files = [*store.glob("*.parquet"), *store.glob("hidden.zarr/**/*")]
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file()}


def is_done(store: Path) -> bool:
    return (
        (store / "manifest.json").exists()
        and not (store / "driver.json").exists()
        and (open_features(store, complete=False).is_complete)
    )


def draw_faults(rng: random.Random) -> Iterator[str]:
    """Endless faults, drawn without replacement: each once in random order, then all again."""
    while True:
        yield from rng.sample([*FAULTS], len(FAULTS))


def run_round(
    folder: Path,
    command: list[str],
    upcoming: Iterator[str],
    rng: random.Random,
    every: float,
    limit: float,
) -> tuple[Counter[str], bool]:
    """Write one store under faults; count the faults, and say whether it finished in time."""
    store = folder / "features"
    machines = Machines(folder, [*command[:5], str(store), *command[5:]])
    faults: Counter[str] = Counter()
    deadline = time.monotonic() + limit
    try:
        for name in ("scheduler", *WORKERS, "driver"):
            machines.start(name)
        due = time.monotonic() + rng.uniform(0, 2 * every)
        while not is_done(store):
            if time.monotonic() > deadline:
                return faults, False
            if time.monotonic() > due:
                fault = next(upcoming)
                function, names = FAULTS[fault]
                function(machines, rng.choice(names))
                faults[fault] += 1
                due = time.monotonic() + rng.uniform(0, 2 * every)
            time.sleep(0.1)
            if not is_done(store):
                machines.restart_dead()
    finally:
        machines.stop()
    return faults, True


@click.command()
@click.argument("captions", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True)
@click.option("--rounds", default=10, show_default=True)
@click.option("--every", default=8.0, show_default=True, help="Mean seconds between faults.")
@click.option("--seed", default=0, show_default=True)
@click.option("--limit", default=600.0, show_default=True, help="Seconds that a round may take.")
@click.option("--arguments", default="", help="Other options of semroute extract, as one string.")
def main(
    captions: Path,
    folder: Path,
    model: str,
    rounds: int,
    every: float,
    seed: int,
    limit: float,
    arguments: str,
) -> None:
    """Inject faults at random, and compare."""
    command = [sys.executable, "-m", "semroute.cli", "extract", str(captions.resolve())]
    command += ["--model", model, "--threads", "1", *arguments.split()]
    folder = folder.resolve()
    folder.mkdir(parents=True)
    whole = folder / "undisturbed"
    subprocess.run([*command[:5], str(whole), *command[5:], "--workers", "1"], check=True)
    expected, bad, total = contents(whole), 0, Counter[str]()
    rng = random.Random(seed)
    upcoming = draw_faults(rng)
    for number in range(rounds):
        place = folder / f"round-{number}"
        place.mkdir()
        started = time.monotonic()
        faults, in_time = run_round(place, command, upcoming, rng, every, limit)
        store = place / "features"
        good = (
            in_time and contents(store) == expected and not verify(store, progress=False).problems
        )
        total += faults
        bad += not good
        state = "equal" if good else "DIFFERENT" if in_time else "TIMED OUT"
        shown = ", ".join(f"{num} {fault}" for fault, num in sorted(faults.items()))
        click.echo(f"round {number}: {state} after {time.monotonic() - started:.0f} s: {shown}")
        if good:
            shutil.rmtree(place)
    click.echo(f"{rounds - bad} of {rounds} rounds equal, {total.total()} faults: {dict(total)}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
