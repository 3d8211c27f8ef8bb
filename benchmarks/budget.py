"""Trains from a store with a disk budget while both sides are killed at random; compares weights.

    python benchmarks/budget.py CAPTIONS FOLDER --model LLM --limit 500

Extracts the captions once without a budget and trains a run from them. Then it does the same with
a budget of an eighth of that store: `semroute extract --budget` and `semroute train` run side by
side, one of them is killed again and again, at random steps of the run, and restarted, and the size
of the store is watched all the time, with files that are removed but still open in a process. The
weights must be those of the first run, bit for bit. Exits with 1 if they are not, or if the budget
was exceeded.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from PIL import Image
from safetensors.numpy import load_file

from semroute.pipeline.extraction.latents import encode_images
from semroute.pipeline.sources.table import read_samples
from semroute.pipeline.store.verify import verify
from semroute.schemas.json_file import read_json

LOOK_SECONDS = 0.02
"""Pause between two looks at the size of the store."""
SEMROUTE = [sys.executable, "-m", "semroute.cli"]


@dataclass
class Watch:
    """Sizes of a store while it is watched, in bytes.

    Attributes:
        most: of its files.
        most_held: of its files and of removed ones that a process still holds.
        processes: that may hold some.
    """

    folder: Path
    most: int = 0
    most_held: int = 0
    num_looks: int = 0
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        end = threading.Event()

        def look() -> None:
            while not end.wait(LOOK_SECONDS):
                files = folder_files(self.folder)
                removed: dict[int, int] = {}
                for process in [*self.processes.values()]:
                    removed |= removed_files(process.pid, self.folder)
                size = sum(files.values())
                # One that was removed since the first look counts once.
                held = sum(n for inode, n in removed.items() if inode not in files)
                self.most = max(self.most, size)
                self.most_held = max(self.most_held, size + held)
                self.num_looks += 1

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield self
        finally:
            end.set()
            thread.join()


def folder_files(folder: Path) -> dict[int, int]:
    """Inodes of the files under a folder that were there at one moment, while others write there ->
    their sizes.

    A file that is there before the moment and after it was there at it. One that comes or goes
    meanwhile may be left out, and never counts beside what replaced it.
    """
    before, after = _sizes(folder), _sizes(folder)
    return {inode: size for (path, inode), size in before.items() if (path, inode) in after}


def _sizes(folder: Path) -> dict[tuple[str, int], int]:
    """Path and inode of every file -> its size."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with suppress(FileNotFoundError):
                status = os.stat(path)
                found[path, status.st_ino] = status.st_size
    return found


def removed_files(pid: int, folder: Path) -> dict[int, int]:
    """Inodes of files of a folder that were removed, and that a process still maps -> bytes."""
    found: dict[int, int] = {}
    with suppress(OSError), open(f"/proc/{pid}/maps") as file:
        for line in file:
            if str(folder) in line and "(deleted)" in line:
                start, _, stop = line.split()[0].partition("-")
                inode = int(line.split(maxsplit=5)[4])
                found[inode] = found.get(inode, 0) + int(stop, 16) - int(start, 16)
    return found


def write_samples(
    captions: str, text_column: str | None, limit: int, max_words: int, path: Path
) -> None:
    """A table of the first short captions, each with an image of noise."""
    found = read_samples(captions, text_column=text_column, need="text").texts().to_pylist()
    texts = [row[0] for row in found if len(row[0].split()) <= max_words][:limit]
    rng, folder = np.random.default_rng(0), path.with_suffix("")
    folder.mkdir()
    names = []
    for number in range(len(texts)):
        names.append(str(folder / f"{number:06d}.png"))
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(names[-1])
    table = pa.table({"text": texts, "image": names})
    pyarrow.parquet.write_table(table, path)


def write_run(folder: Path, name: str, features: Path, steps: int, batch: int) -> Path:
    """The YAML file of a run of two epochs."""
    file = folder / f"{name}.yaml"
    document = {
        **{"features": str(features), "latents": str(folder / "latents")},
        **{"output": str(folder / name), "steps": steps, "mixed_precision": "no"},
        **{"log_every": 5, "checkpoint_every": 5},
        "model": {"size": "nano", "patch_size": 4},
        "data": {"batch_size": batch, "order": "shards", "window": 4, "prefetch": 2},
    }
    file.write_text(yaml.safe_dump(document))
    return file


def read_numbers(path: Path) -> dict[str, float]:
    """A small JSON document; empty while there is none."""
    with suppress(OSError, ValueError):
        return dict(read_json(path))
    return {}


@dataclass
class Sides:
    """Extraction and training, which are killed and restarted.

    Attributes:
        commands: of each side.
        signs: the document that shows that a side is at work.
        waited: seconds that processes of each side waited for the other, by number of the process.
    """

    commands: dict[str, list[str]]
    signs: dict[str, Path]
    log: Path
    watch: Watch
    waited: dict[tuple[str, int], float] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def start(self, side: str) -> None:
        with (self.log / f"{side}.log").open("ab") as log:
            self.watch.processes[side] = subprocess.Popen(
                self.commands[side], stdout=log, stderr=log
            )
        self.starts[side] = self.starts.get(side, 0) + 1

    def note_waits(self) -> None:
        for side, sign in self.signs.items():
            if "waited_seconds" in (found := read_numbers(sign)):
                self.waited[side, self.starts.get(side, 0)] = found["waited_seconds"]

    def is_done(self) -> bool:
        """Whether both sides have ended well; one that ended otherwise is restarted."""
        codes = {side: process.poll() for side, process in self.watch.processes.items()}
        for side, code in codes.items():
            if code not in (None, 0):
                self.start(side)
        return all(code == 0 for code in codes.values())

    def progress(self, side: str) -> int:
        """A number that grows as a side does its work."""
        if side == "train":
            return int(read_numbers(self.signs[side]).get("step", 0))
        with suppress(FileNotFoundError):  # the folder in which shards come and go
            return (self.watch.folder / "hidden.zarr" / "code" / "c").stat().st_mtime_ns
        return 0

    def kill(self, side: str) -> bool:
        """Kill a side and restart it; False if it has ended already."""
        process = self.watch.processes[side]
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        self.start(side)
        return True


class Killer:
    """Kills a side whenever training has come to one of some random steps, each as often as the
    other.

    Whoever was restarted works first, then a random moment is waited for.

    Attributes:
        killed: how often each side was.
    """

    def __init__(
        self, sides: Sides, rng: random.Random, kills: int, steps: int, within: float
    ) -> None:
        self.sides, self.rng, self.within = sides, rng, within
        self.killed = {"extract": 0, "train": 0}
        names = ([*self.killed] * kills)[:kills]
        places = sorted((rng.uniform(0, 0.9 * steps) for _ in names), reverse=True)
        self._planned = list(zip(places, rng.sample(names, kills), strict=True))
        self._before: dict[str, int] = {}
        self._due: float | None = None

    def look(self) -> str | None:
        """The side that was killed, if one was."""
        worked = {side: self._has_worked(side) for side in self.killed}
        if not self._planned:
            return None
        place, side = self._planned[-1]
        if self._due is None and worked[side] and self.sides.progress("train") >= place:
            self._due = time.monotonic() + self.rng.uniform(0, self.within)
        if self._due is None or time.monotonic() < self._due:
            return None
        self._due = None
        self._planned.pop()
        if not self.sides.kill(side):
            return None
        self.killed[side] += 1
        del self._before[side]
        return side

    def _has_worked(self, side: str) -> bool:
        """Whether a side has made progress since it was started."""
        progress = self.sides.progress(side)
        if progress < self._before.setdefault(side, progress):
            self._before[side] = progress  # back at a checkpoint
        return progress > self._before[side]


@click.command()
@click.argument("captions")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True)
@click.option("--text-column")
@click.option("--limit", default=500, show_default=True, help="Captions.")
@click.option("--max-words", default=12, show_default=True, help="Words of a caption.")
@click.option("--batch", default=4, show_default=True, help="Samples per step.")
@click.option("--shard-size", default="1MB", show_default=True)
@click.option("--share", default=8.0, show_default=True, help="Size of the store over the budget.")
@click.option("--kills", default=10, show_default=True)
@click.option("--within", default=2.0, show_default=True, help="Seconds from its step to a kill.")
@click.option("--seed", default=0, show_default=True)
def main(
    captions: str,
    folder: Path,
    model: str,
    text_column: str | None,
    limit: int,
    max_words: int,
    batch: int,
    shard_size: str,
    share: float,
    kills: int,
    within: float,
    seed: int,
) -> None:
    """Train from a store with a budget under kills, and compare."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    samples, whole, features = folder / "samples.parquet", folder / "whole", folder / "features"
    if not samples.exists():  # of an earlier call
        write_samples(captions, text_column, limit, max_words, samples)
    num = pyarrow.parquet.read_metadata(samples).num_rows
    encode_images(str(samples), folder / "latents", workers=0, report=lambda _line: None)
    steps = 2 * num // batch
    extract = [*SEMROUTE, "extract", str(samples)]
    options = ["--model", model, "--shard-size", shard_size, "--workers", "0", "--threads", "1"]

    subprocess.run([*extract, str(whole), *options], check=True)
    full = write_run(folder, "full", whole, steps, batch)
    subprocess.run([*SEMROUTE, "train", str(full)], check=True)
    size = sum(folder_files(whole).values())
    budget = int(size / share)
    click.echo(f"{num} captions, {steps} steps: {size:,} bytes without a budget, {budget:,} with")
    run = write_run(folder, "budget", features, steps, batch)
    watch = Watch(features)
    sides = Sides(
        {
            "extract": [
                *extract, str(features), *options, "--budget", str(budget), "--for", str(run)
            ],
            "train": [*SEMROUTE, "train", str(run)],
        },
        {"extract": features / "budget.json", "train": folder / "budget" / "position.json"},
        folder,
        watch,
    )  # fmt: skip
    started = time.monotonic()
    with watch.watching():
        sides.start("extract")
        while not read_numbers(sides.signs["extract"]).get("runs"):
            if watch.processes["extract"].poll() is not None:
                raise click.ClickException(f"see {folder / 'extract.log'}")
            time.sleep(0.05)
        sides.start("train")
        killer = Killer(sides, random.Random(seed), kills, steps, within)
        while not sides.is_done():
            sides.note_waits()
            step = sides.progress("train")
            if (side := killer.look()) is not None:
                click.echo(f"{time.monotonic() - started:6.1f} s: {side} killed at step {step}")
            time.sleep(0.02)
    seconds = time.monotonic() - started
    equal = same_weights(folder / "full", folder / "budget", steps)
    problems = verify(features).problems
    waits = {s: sum(t for (side, _), t in sides.waited.items() if side == s) for s in sides.signs}
    result = {
        "captions": num,
        "steps": steps,
        "full_bytes": size,
        "budget_bytes": budget,
        "most_bytes": watch.most,
        "most_bytes_with_removed_files_that_are_open": watch.most_held,
        "looks": watch.num_looks,
        "kills": killer.killed,
        "weights_equal": equal,
        "problems": len(problems),
        "seconds": round(seconds, 1),
        "training_waited_seconds": round(waits["train"], 1),
        "extraction_waited_seconds": round(waits["extract"], 1),
    }
    click.echo(json.dumps(result, indent=1))
    shutil.rmtree(features)
    sys.exit(not equal or watch.most > budget or bool(problems))


def same_weights(first: Path, second: Path, step: int) -> bool:
    """Whether the last checkpoints of two runs hold the same bits."""
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-{step:08d}/{name}.safetensors"
        one, other = load_file(first / file), load_file(second / file)
        if one.keys() != other.keys():
            return False
        if any(one[key].tobytes() != other[key].tobytes() for key in one):
            return False
    return True


if __name__ == "__main__":
    main()
