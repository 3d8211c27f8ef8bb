"""Disturbs extractions on a Slurm cluster of this machine, then compares every byte.

    BIN=.venv/bin bash benchmarks/slurm.sh OUT    # which starts the cluster, and this

Each row is one store, written by jobs of Slurm while something happens to them, to the node or to
the driver. Where walltimes run out there is one job at a time, and each has half of what all
captions took without Slurm, in whole minutes. A driver that ended is started again, as a person
would. The store must hold the bytes of one written without Slurm, and `verify` must find nothing. A
training job of two tasks follows.
Prints a table, also into OUT/slurm.md; exits with 1 if a store differs or a job fails.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import click
import yaml
from chaos import contents

from semroute.pipeline.store.verify import verify

LIMIT_SECONDS = 900.0
"""Time that one store may take."""
TRAINING = """\
steps: 200
log_every: 5
checkpoint_every: 20
mixed_precision: "no"
routing: {strategy: depth}
model: {size: nano, patch_size: 6}
flow: {prediction: x0}
data: {batch_size: 8}
"""


def slurm(*command: str) -> list[str]:
    """Lines that a command of Slurm prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def states() -> dict[str, str]:
    """State of every job so far, by number."""
    return dict(line.split() for line in slurm("squeue", "-h", "--states=all", "--format=%A %T"))


def jobs_in(state: str) -> list[str]:
    return [job for job, found in states().items() if found == state]


@dataclass
class Extraction:
    """One store, and the driver that writes it.

    Attributes:
        folder: of the store, the driver's and the jobs' logs.
        command: of the driver, without the store and the cluster.
        options: of the cluster, in place of the usual ones.
        maximum_jobs: at a time.
    """

    folder: Path
    command: list[str]
    options: dict[str, object] = field(default_factory=dict)
    maximum_jobs: int = 2
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.store = self.folder / "features"
        options: dict[str, object] = {"cores": 1, "memory": "2GB", "walltime": "00:30:00"}
        options |= {"python": sys.executable, "log_directory": str(self.folder / "jobs")}
        jobs: dict[str, object] = {"kind": "slurm", "maximum_jobs": self.maximum_jobs}
        jobs |= {"lifetime_margin_minutes": 0.4}
        jobs |= {"options": options | self.options}
        (self.folder / "slurm.yaml").write_text(yaml.safe_dump(jobs))

    def start(self) -> None:
        """Start the driver."""
        self.starts += 1
        words = [*self.command[:5], str(self.store), *self.command[5:]]
        with (self.folder / "driver.log").open("ab") as log:
            self.driver = subprocess.Popen(
                [*words, "--cluster", "slurm.yaml"], stdout=log, stderr=log, cwd=self.folder
            )

    def num_done(self) -> int:
        """Shards with a receipt."""
        return len([*self.store.glob("receipts/*.json")])

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Wait until something is so, or the driver has ended; say whether it is."""
        until = time.monotonic() + LIMIT_SECONDS
        while self.driver.poll() is None and time.monotonic() < until:
            if ready():
                return True
            time.sleep(0.5)
        return False

    def wait_for_shards(self, more: int = 1) -> bool:
        before = self.num_done()
        return self.wait(lambda: self.num_done() >= before + more)


def undisturbed(_run: Extraction) -> None:
    """Nothing."""


def cancel_running(run: Extraction) -> None:
    """Three times, a job at work is cancelled."""
    for _ in range(3):
        if run.wait_for_shards(4) and run.wait(lambda: bool(jobs_in("RUNNING"))):
            slurm("scancel", jobs_in("RUNNING")[-1])


def drain(run: Extraction) -> None:
    """The node is drained, its jobs and one that waits are cancelled, and it is resumed."""
    run.wait_for_shards(4)
    update_node("state=drain", "reason=test")
    slurm("scancel", *jobs_in("RUNNING"))
    if run.wait(lambda: bool(jobs_in("PENDING"))):
        slurm("scancel", *jobs_in("PENDING"))
    time.sleep(20)
    update_node("state=resume")


def fail_node(run: Extraction) -> None:
    """The node goes down under its jobs, and comes back."""
    run.wait_for_shards(4)
    update_node("state=down", "reason=test")
    time.sleep(20)
    update_node("state=resume")


def kill_driver(run: Extraction) -> None:
    """The driver is killed; its jobs are left to themselves."""
    run.wait_for_shards(4)
    run.driver.kill()
    run.driver.wait()


def interrupt_driver(run: Extraction) -> None:
    """Ctrl-C."""
    run.wait_for_shards(4)
    run.driver.send_signal(signal.SIGINT)
    run.driver.wait()


def update_node(*changes: str) -> None:
    (node,) = slurm("sinfo", "--noheader", "--format=%n")
    slurm("scontrol", "update", f"nodename={node}", *changes)


MINDED, OVERRUN = "short walltime, which workers mind", "short walltime, which workers overrun"
SCENARIOS: dict[str, Callable[[Extraction], None]] = {
    "nothing": undisturbed,
    "`scancel` of a job at work, three times": cancel_running,
    MINDED: undisturbed,
    OVERRUN: undisturbed,
    "node drained, jobs cancelled at work and in the queue, node resumed": drain,
    "node down under its jobs, and resumed": fail_node,
    "driver killed, and started again": kill_driver,
    "driver interrupted, and started again": interrupt_driver,
}


def run_scenario(
    name: str, folder: Path, command: list[str], expected: dict[str, bytes], minutes: int
) -> tuple[str, bool]:
    """Write one store, and compare it: a row of the table, and whether the store is equal.

    Args:
        minutes: of a short walltime.
    """
    options: dict[str, object] = {}
    if name in (MINDED, OVERRUN):
        options["walltime"] = f"00:{minutes:02}:00"
    if name == OVERRUN:
        options["worker_extra_args"] = ["--lifetime", "1h"]
    run = Extraction(folder, command, options, 1 if options else 2)
    before, started = set(states()), time.monotonic()
    run.start()
    SCENARIOS[name](run)
    while run.driver.wait(LIMIT_SECONDS) and run.starts < 4:
        run.start()
    seconds = time.monotonic() - started
    good = run.driver.returncode == 0 and contents(run.store) == expected
    good = good and not verify(run.store, progress=False).problems
    until = time.monotonic() + 120  # those of a killed driver end by themselves
    while set(states().values()) & {"RUNNING", "PENDING", "COMPLETING"}:
        if time.monotonic() > until:
            raise SystemExit(f"{name}: jobs do not end: {states()}")
        time.sleep(0.5)
    left = time.monotonic() - started - seconds
    ended = Counter(state for job, state in states().items() if job not in before)
    shown = ", ".join(f"{num} {state.lower()}" for state, num in sorted(ended.items()))
    state = "equal" if good else "DIFFERENT"
    row = [name, run.starts, f"{seconds:.0f}", f"{ended.total()}: {shown}", f"{left:.0f}", state]
    return f"| {' | '.join(map(str, row))} |", good


def refuse(folder: Path, command: list[str], options: dict[str, object]) -> tuple[float, str]:
    """Give Slurm what it cannot run: seconds until the driver ends, and its message."""
    run, started = Extraction(folder, command, options), time.monotonic()
    run.start()
    code = run.driver.wait(LIMIT_SECONDS)
    last = (folder / "driver.log").read_text().strip().splitlines()[-1]
    if code == 0 or not last.startswith("Error: "):
        raise SystemExit(f"{options} ended with {code}: {last}")
    return time.monotonic() - started, last


def train(folder: Path, captions: Path, features: Path) -> Iterable[str]:
    """Train with two tasks, stop the job after a checkpoint, resume it: what was seen."""
    semroute = [sys.executable, "-m", "semroute.cli"]
    latents = ["latents", str(captions), str(folder / "latents"), "--vae", "pixels"]
    subprocess.run([*semroute, *latents], check=True)
    stores = f"features: {features}\nlatents: {folder / 'latents'}\noutput: {folder / 'run'}\n"
    (folder / "run.yaml").write_text(stores + TRAINING)
    script = Path(__file__).parents[1] / "docs" / "accelerate" / "train.sbatch"
    size = ["--nodes=1", "--ntasks=2", "--ntasks-per-node=2", "--cpus-per-task=1"]
    size += ["--gpus-per-node=0", "--time=10", "--signal=TERM@60"]
    os.environ["ACCELERATE_USE_CPU"] = "1"
    for stop in (True, False):
        job = slurm("sbatch", "--parsable", *size, f"--chdir={folder}", str(script), "run.yaml")[0]
        while states()[job] in ("PENDING", "RUNNING", "COMPLETING"):
            if stop and [*folder.glob("run/checkpoints/step-*")]:
                slurm("scancel", "--signal=TERM", job)
                stop = False
            time.sleep(0.5)
        log = (folder / f"semroute-train-{job}.log").read_text()
        told = re.findall(r"^.*(?: is trained|Rerun the same command).*", log, re.M)
        if not told:
            raise SystemExit(f"job {job} failed:\n{log}")
        yield f"training job {job}, {states()[job].lower()}: {told[0].strip()}"


@click.command()
@click.argument("captions", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", required=True)
@click.option("--only", multiple=True, help="Words in the names of the rows to run.")
@click.option("--arguments", default="--codec bf16 --shard-size 1MB", show_default=True)
def main(captions: Path, out: Path, model: str, only: tuple[str, ...], arguments: str) -> None:
    """Disturb extractions on Slurm, and compare."""
    captions, folder = captions.resolve(), out.resolve() / "stores"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "semroute.cli", "extract", str(captions)]
    command += ["--model", model, "--threads", "1", *arguments.split()]
    whole, started = folder / "undisturbed", time.monotonic()
    subprocess.run([*command[:5], str(whole), *command[5:], "--workers", "1"], check=True)
    minutes = max(1, round((time.monotonic() - started) / 120))
    expected, bad, lines = contents(whole), 0, []

    def say(line: str) -> None:
        click.echo(line)
        lines.append(line)

    say(f"A short walltime has {minutes} min.\n")
    say("| what happened | drivers | seconds | jobs, and how they ended | last job | store |")
    say("| --- | --: | --: | --- | --: | --- |")
    for number, name in enumerate(SCENARIOS):
        if not only or any(word in name for word in only):
            row, good = run_scenario(name, folder / str(number), command, expected, minutes)
            say(row)
            bad += not good
    say("")
    for name, options in (("queue", {"queue": "missing"}), ("job", {"python": "/missing/python"})):
        if not only or "refused" in only:
            seconds, message = refuse(folder / name, command, options)
            say(f"- {options}: after {seconds:.0f} s, {message}")
    if not only or "train" in only:
        place = out.resolve() / "training"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for line in train(place, captions, whole):
            say(f"- {line}")
    (out / "slurm.md").write_text("\n".join(lines) + "\n")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
