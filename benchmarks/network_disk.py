"""Cold batches from a mounted file system that a program provides over a network (FUSE), such as a
mounted bucket: medians of a few rounds.

    python benchmarks/network_disk.py scratch      (needs libfuse, and mfusepy from PyPI)

In the scratch folder it writes a store of random hidden states (30 layers of width 576) and
latents, and mounts the folder read-only through a server of its own, whose every answer takes 2 ms,
all together at most 400 MB/s. *Positioned reads* is a reader of our own beside it: random requests
of a caption's size by 16 threads. *Mapped* reads the store as one on a local disk is read. Each
reader has its own process, and files are evicted before it starts. Delete the folder afterwards.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from cold import build, evict, open_own

SECONDS = 5.0
CAPTION_BYTES = 415_000
MOUNTED = "mounted"


def serve(folder: Path, mount: Path, delay: float, rate: float) -> None:
    """Serve a folder until it is unmounted."""
    import mfusepy

    class Slow(mfusepy.Operations):  # type: ignore[misc]
        def __init__(self) -> None:
            self.mutex, self.free = threading.Lock(), 0.0

        def getattr(self, path: str, _file: Any = None) -> dict[str, Any]:
            try:
                state = os.lstat(f"{folder}{path}")
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno) from error
            names = ("mode", "nlink", "uid", "gid", "size", "atime", "mtime", "ctime")
            return {f"st_{name}": getattr(state, f"st_{name}") for name in names}

        def readdir(self, path: str, _file: int) -> list[str]:
            return [".", "..", *os.listdir(f"{folder}{path}")]

        def open(self, path: str, _flags: int) -> int:
            return os.open(f"{folder}{path}", os.O_RDONLY)

        def release(self, _path: str, file: int) -> int:
            os.close(file)
            return 0

        def read(self, _path: str, size: int, offset: int, file: int) -> bytes:
            with self.mutex:
                now = time.perf_counter()
                self.free = max(self.free, now) + size / rate
                until = max(now + delay, self.free)
            time.sleep(max(0.0, until - time.perf_counter()))
            return os.pread(file, size, offset)

    mfusepy.FUSE(Slow(), str(mount), foreground=True, ro=True, max_background=64)


def read_positions(mount: Path) -> float:
    """GB/s of a reader of our own."""
    files = [path for path in (mount / "bf16").rglob("c/**/*") if path.is_file()]
    opened = [os.open(path, os.O_RDONLY) for path in files]
    places = [
        (file, place)
        for file in opened
        for place in range(0, os.fstat(file).st_size - CAPTION_BYTES, CAPTION_BYTES)
    ]
    random.Random(0).shuffle(places)
    for file in opened:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    start = time.perf_counter()

    def read(place: tuple[int, int]) -> int:
        late = time.perf_counter() - start > SECONDS
        return 0 if late else len(os.pread(place[0], CAPTION_BYTES, place[1]))

    with ThreadPoolExecutor(16) as pool:
        num_bytes = sum(pool.map(read, places))
    return num_bytes / (time.perf_counter() - start) / 1e9


def read_store(mount: Path, order: str, *, mapped: bool = False) -> float:
    """GB/s of rows that are not padding."""
    if mapped:
        from semroute.trainer.data import remote

        remote.on_fuse = lambda _path: False  # type: ignore[attr-defined]
    batches = open_own(mount / "bf16", mount / "latents", order, 1)
    next(batches)
    start, rows = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        hidden, mask = next(batches)
        rows += int(mask.sum())
    row_bytes = 2 * hidden.shape[-1] * hidden.shape[-2]
    return rows * row_bytes / (time.perf_counter() - start) / 1e9


READERS: dict[str, Callable[[Path], float]] = {
    "positioned reads, 16 threads": read_positions,
    "semroute bf16, random": lambda mount: read_store(mount, "random"),
    "semroute bf16, shards": lambda mount: read_store(mount, "shards"),
    "semroute bf16, random, mapped": lambda mount: read_store(mount, "random", mapped=True),
}


@click.command()
@click.argument("scratch", type=click.Path(path_type=Path))
@click.option("--captions", default=6000, show_default=True, type=click.IntRange(1000))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--delay", default=0.002, show_default=True, help="Seconds per request.")
@click.option("--rate", default=400e6, show_default=True, help="Bytes per second.")
@click.option("--alone", hidden=True)
@click.option("--serving", is_flag=True, hidden=True)
def main(
    scratch: Path,
    captions: int,
    rounds: int,
    delay: float,
    rate: float,
    alone: str | None,
    serving: bool,
) -> None:
    folder, mount = (scratch / "stores").absolute(), (scratch / MOUNTED).absolute()
    if serving:
        serve(folder, mount, delay, rate)
        return
    if alone is not None:
        print(json.dumps(READERS[alone](mount)), flush=True)
        os._exit(0)
    for path in (folder, mount):
        path.mkdir(parents=True, exist_ok=True)
    build(folder, captions, (10, 14))
    command = [sys.executable, __file__, str(scratch), f"--delay={delay}", f"--rate={rate}"]
    speeds: dict[str, list[float]] = {name: [] for name in READERS}
    with subprocess.Popen([*command, "--serving"]) as server:
        try:
            while not (mount / "bf16").exists():
                if server.poll() is not None:
                    raise click.ClickException("the folder could not be mounted")
                time.sleep(0.1)
            for _ in range(rounds):
                for name, found in speeds.items():
                    evict(mount)
                    done = subprocess.run(
                        [*command, "--alone", name], check=True, capture_output=True
                    )
                    found.append(json.loads(done.stdout.splitlines()[-1]))
        finally:
            subprocess.run(["fusermount", "-u", mount], check=False)
    print("| reader | GB/s |\n| --- | --: |")
    for name, found in speeds.items():
        low, *_, high = sorted([*found, *found])
        print(f"| {name} | {statistics.median(found):.3f} ({low:.3f}-{high:.3f}) |")


if __name__ == "__main__":
    main()
