"""Shuffled, padded batches from an object store behind a slow line: interleaved, medians.

    python -m venv peers; peers/bin/pip install torch      (from the index of CPU wheels)
    peers/bin/pip install 'semroute[s3]' -r benchmarks/requirements-peers.txt
    peers/bin/pip install --no-deps mosaicml-streaming
    peers/bin/python benchmarks/object_store.py scratch

The store is a folder that benchmarks/slow_store.py shows as S3 on loopback: every answer is delayed
by 20 ms, and all share 200 MB/s. Stores and peers' files are those of benchmarks/cold.py, made in
the scratch folder by the first run. Ours reads features and latents, peers features alone.

Each reader has a process of its own, one after the other in every round, and an empty folder for
what it keeps. One epoch is timed, or so many seconds of it, from the first request for captions on.
MB are as they are stored, of what was delivered. *Ranges alone* are of a caption's size, 64 at a
time, by either library; nothing is done with them. Sent over delivered counts what was requested
ahead and not delivered any more, too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import click
import numpy as np
from cold import build, importable, spread, write_delta
from read import BATCH, Source, size_of, write_litdata, write_mds, write_webdataset
from stream import Batches, Pad, again, loading

BUCKET = "bucket"


@dataclass
class Reader:
    """A way to deliver batches from the object store.

    Attributes:
        files: folders in the bucket that it reads.
        open: opens them, given the server's address and an empty folder.
        needs: a module; empty: always there.
        write: writes the folder; None: it is a store.
        speeds, cpu, sent, firsts: one per round: MB/s, CPU seconds per GB of the process and its
            workers, bytes sent over delivered, and seconds from the start of Python to the first
            batch.
    """

    name: str
    files: tuple[str, ...]
    open: Callable[[str, Path], Batches]
    needs: str = ""
    write: Callable[[Path], None] | None = None
    speeds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


def open_own(codec: str, order: str, workers: int, cached: bool, _url: str, kept: Path) -> Batches:
    from semroute.pipeline.store.open import open_features, open_latents
    from semroute.schemas import DataConfig
    from semroute.trainer.data.loader import PaddedLoader

    features = open_features(f"s3://{BUCKET}/{codec}")
    latents = open_latents(f"s3://{BUCKET}/latents")
    features.read([0])  # loads and compiles what decodes
    cache = {"folder": str(kept / "cache"), "size": "20GB"} if cached else None
    data = DataConfig(
        batch_size=BATCH, workers=workers, caption_dropout=0, order=order, window=4, cache=cache
    )
    stream = PaddedLoader(features, latents, data, seed=0, layers=features.layers)
    return ((batch.hidden, batch.mask) for batch in stream)


def open_mds(source: Source, url: str, kept: Path) -> Batches:
    from streaming import StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = url
    table = StreamingDataset(
        remote=f"s3://{BUCKET}/mds", local=str(kept / "mds"), shuffle=True, batch_size=BATCH
    )
    return loading(table, source, 2)


def open_litdata(source: Source, url: str, kept: Path) -> Batches:
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # without which it wants TLS
    table = litdata.StreamingDataset(
        f"s3://{BUCKET}/litdata",
        cache_dir=str(kept / "litdata"),
        storage_options={"endpoint_url": url},
        shuffle=True,
        drop_last=True,
    )
    return loading(table, source, 2, litdata.StreamingDataLoader)


def open_webdataset(source: Source, names: list[str], url: str, _kept: Path) -> Batches:
    from torch.utils.data import DataLoader
    from webdataset import WebDataset

    shards = [f"{url}/{BUCKET}/webdataset/{name}" for name in names]
    table = WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(256).decode()
    table = table.batched(BATCH, collation_fn=Pad(source.row), partial=False)
    loader = DataLoader(table, batch_size=None, num_workers=2, persistent_workers=True)
    return again(lambda: loader)


def all_readers(scratch: Path, source: Source) -> list[Reader]:
    own = [
        Reader(
            f"semroute {codec}, {order}{', cache' * cached}, {n} thread{'s' * (n > 1)}",
            (codec, "latents"),
            partial(open_own, codec, order, n, cached),
        )
        for codec in ("bf16", "delta")
        for order, cached in (("random", False), ("shards", False), ("shards", True))
        for n in (1, 2)
    ]
    tars = sorted(path.name for path in (scratch / BUCKET / "webdataset").glob("*.tar"))
    peers = {
        "MDS": ("mds", "streaming", partial(open_mds, source), write_mds),
        "litdata": ("litdata", "litdata", partial(open_litdata, source), write_litdata),
        "webdataset": (
            *("webdataset", "webdataset"),
            *(partial(open_webdataset, source, tars), write_webdataset),
        ),
    }
    return own + [
        Reader(f"{name}, 2 workers", (file,), open_, needs, partial(write, source))
        for name, (file, needs, open_, write) in peers.items()
    ]


def run_alone(reader: Reader, url: str, num: int, seconds: float, kept: Path) -> None:
    """The process of one reader; prints the moment of its first batch, captions, seconds from its
    first request for them, bytes sent and CPU seconds since."""
    batches = reader.open(url, kept)
    counts(url)
    before = cpu_seconds()
    delivered = len(next(batches)[0])
    first = time.monotonic()
    for _ in range(num // BATCH - 1):
        delivered += len(next(batches)[0])
        if time.monotonic() > first + seconds:
            break
    end, sent = time.monotonic(), counts(url)
    found = [first, delivered, end - sent["began"], sent["bytes"], cpu_seconds() - before]
    print(f"\n{json.dumps(found)}", flush=True)
    os._exit(0)  # some readers leave threads and processes that take seconds to stop


def cpu_seconds() -> float:
    """Of this process and those that it started."""
    own, ticks = os.getpid(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            values = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if own in (int(process.name), int(values[1])):
            ticks += int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Line:
    """Ranges of a caption's size, 64 at a time, by either library; nothing is done with them."""

    def __init__(self, scratch: Path, size: int) -> None:
        folder = scratch / BUCKET
        found = folder.glob("bf16/hidden.zarr/hidden/c/*/*/*")
        files = [(str(path.relative_to(folder)), path.stat().st_size) for path in found]
        self.files = [(name, num) for name, num in files if num > size]
        self.size = size

    def place(self, rng: np.random.Generator) -> tuple[str, int]:
        name, num = self.files[rng.integers(len(self.files))]
        return name, int(rng.integers(0, num - self.size))

    def by_obstore(self, seconds: float) -> float:
        """MB/s."""
        import obstore
        from obstore.store import S3Store

        options = {"endpoint": os.environ["AWS_ENDPOINT_URL"], "region": "us-east-1"}
        store = S3Store(BUCKET, **options, client_options={"allow_http": True})  # type: ignore[arg-type]
        end = time.perf_counter() + seconds

        def fetch(seed: int) -> int:
            rng, total = np.random.default_rng(seed), 0
            while time.perf_counter() < end:
                name, start = self.place(rng)
                found = obstore.get_range(store, name, start=start, length=self.size)
                total += len(memoryview(found))
            return total

        began = time.perf_counter()
        with ThreadPoolExecutor(64) as pool:
            total = sum(pool.map(fetch, range(64)))
        return total / (time.perf_counter() - began) / 1e6

    def by_s3fs(self, seconds: float) -> float:
        """MB/s."""
        import fsspec

        system = fsspec.filesystem("s3", config_kwargs={"max_pool_connections": 64})
        rng, total, began = np.random.default_rng(0), 0, 0.0
        for number in range(1_000):
            places = [self.place(rng) for _ in range(256 if number else 64)]
            names, starts = [f"{BUCKET}/{name}" for name, _ in places], [s for _, s in places]
            parts = system.cat_ranges(names, starts, [start + self.size for start in starts])
            if not number:  # connections are made
                began = time.perf_counter()
                continue
            total += sum(map(len, parts))
            if time.perf_counter() > began + seconds:
                break
        return total / (time.perf_counter() - began) / 1e6


@contextmanager
def serving(scratch: Path, delay: float, rate: float) -> Iterator[str]:
    """The server in a process of its own; this process and its children read from it."""
    server = str(Path(__file__).with_name("slow_store.py"))
    command = [sys.executable, server, str(scratch), "--port=0", f"--delay={delay}"]
    with subprocess.Popen(
        [*command, f"--rate={rate}"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        os.environ |= {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            yield url
        finally:
            process.terminate()


def counts(url: str) -> dict[str, float]:
    """Requests and bytes since this was last called."""
    with urlopen(f"{url}/-/counts", timeout=60) as answer:
        found: dict[str, float] = json.load(answer)
    return found


def run_round(
    readers: list[Reader], scratch: Path, url: str, num: int, arguments: list[str]
) -> None:
    for reader in readers:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=scratch) as kept:
            command = [sys.executable, __file__, *arguments, f"--alone={reader.name}"]
            command.append(f"--kept={kept}")
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            click.echo(f"{reader.name}: failed", err=True)
            continue
        first, delivered, seconds, sent, cpu = json.loads(done.stdout.splitlines()[-1])
        each = sum(size_of(scratch / BUCKET / name) for name in reader.files) / num
        reader.firsts.append(first - began)
        reader.speeds.append(delivered * each / seconds / 1e6)
        reader.cpu.append(cpu / (delivered * each / 1e9))
        reader.sent.append(sent / (delivered * each))
        click.echo(f"{reader.name}: {reader.speeds[-1]:.0f} MB/s", err=True)


def print_table(readers: list[Reader], line: dict[str, list[float]], rate: float) -> None:
    print("| reader | MB/s | x rate | CPU, s/GB | sent / delivered | first batch, s |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, speeds in line.items():
        print(
            f"| ranges alone, {name} | {spread(speeds, 0)} | {np.median(speeds) / rate:.2f} | | | |"
        )
    for reader in readers:
        if not reader.speeds:
            print(f"| {reader.name} | failed | | | | |")
            continue
        share, cpu = np.median(reader.speeds) / rate, np.median(reader.cpu)
        more = f"{np.median(reader.sent):.2f} | {np.median(reader.firsts):.1f}"
        print(f"| {reader.name} | {spread(reader.speeds, 0)} | {share:.2f} | {cpu:.1f} | {more} |")


@click.command()
@click.argument("scratch", type=click.Path(path_type=Path))
@click.option("--captions", default=2_400, show_default=True)
@click.option("--tokens", nargs=2, default=(8, 16), show_default=True, help="Fewest and most.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=6.0, show_default=True, help="At most, for each reader.")
@click.option("--delay", default=20.0, show_default=True, help="Milliseconds.")
@click.option("--rate", default=200.0, show_default=True, help="MB/s.")
@click.option("--only", default="", help="Only readers whose name matches.")
@click.option("--alone", hidden=True, help="One reader by name, timed by the process above.")
@click.option("--kept", hidden=True, type=click.Path(path_type=Path), help="Its empty folder.")
def main(
    scratch: Path,
    captions: int,
    tokens: tuple[int, int],
    rounds: int,
    seconds: float,
    delay: float,
    rate: float,
    only: str,
    alone: str | None,
    kept: Path | None,
) -> None:
    if alone is None:
        build(scratch / BUCKET, captions, tokens)
    source = Source(scratch / BUCKET / "bf16", scratch / "source")
    readers = all_readers(scratch, source)
    if alone is not None:
        assert kept is not None
        reader = next(reader for reader in readers if reader.name == alone)
        run_alone(reader, os.environ["AWS_ENDPOINT_URL"], len(source), seconds, kept)
    readers = [reader for reader in readers if re.search(only, reader.name)]
    readers = [reader for reader in readers if not reader.needs or importable(reader.needs)]
    if any("delta" in reader.files for reader in readers):
        write_delta(scratch / BUCKET)
    for reader in readers:
        path = scratch / BUCKET / reader.files[0]
        if reader.write is not None and not path.exists():
            unfinished = path.with_name(f"unfinished-{path.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            reader.write(unfinished)
            unfinished.rename(path)
    mean = source.offsets[-1] / len(source)
    size = int(mean * 2 * np.prod(source.row))
    with serving(scratch, delay, rate) as url:
        line = Line(scratch, size)
        speeds: dict[str, list[float]] = {"obstore": [], "s3fs": []}
        for _ in range(rounds):
            speeds["obstore"].append(line.by_obstore(min(2.0, seconds)))
            speeds["s3fs"].append(line.by_s3fs(min(2.0, seconds)))
            click.echo(
                " ".join(f"{name}: {s[-1]:.0f} MB/s" for name, s in speeds.items()), err=True
            )
            run_round(readers, scratch, url, len(source), [str(scratch), f"--seconds={seconds}"])
    print(f"{len(source):,} captions of {mean:.1f} tokens; {delay:g} ms, {rate:g} MB/s\n")
    print_table(readers, speeds, rate)


if __name__ == "__main__":
    main()
