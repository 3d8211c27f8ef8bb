"""Shuffled, padded batches from a disk whose cache is empty: one run, interleaved, medians.

    python -m venv peers; peers/bin/pip install torch      (from the index of CPU wheels)
    peers/bin/pip install semroute -r benchmarks/requirements-peers.txt
    peers/bin/pip install --no-deps mosaicml-streaming
    peers/bin/python benchmarks/cold.py scratch

In the scratch folder it writes a store of random hidden states in the shape of SmolLM2-135M (30
layers of width 576), latents, the same as ``delta``, and the files of every peer; a second run
resumes, or uses what is there. Delete the folder afterwards.

Each reader runs in its own process, one after the other in every round. Before it starts, its files
are evicted (``fdatasync``, ``POSIX_FADV_DONTNEED``), which needs no rights; what a hypervisor
caches remains. The first batches are not timed; then one epoch is, or so many seconds of it. *Disk*
is a reader of our own beside them: random requests of a caption's size, O_DIRECT, by 16 threads.

Amplification is what the kernel read for the process and its workers (``read_bytes`` of
``/proc/PID/io``), over the stored size of what was delivered, from the start of reading.
"""

import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from read import BATCH, Source, save_safetensors, size_of, write_files
from stream import Batches, loading, peak
from stream import all_readers as warm_readers

LAYERS, WIDTH = 30, 576
SHARD_BYTES = 64_000_000
UNTIMED = 8
"""Batches before the timed ones: more than any reader has ahead."""


@dataclass
class Reader:
    """A way to deliver batches.

    Attributes:
        folder: what it reads, evicted before it starts.
        write: writes the folder; None: it is a store.
        speeds, amplifications, firsts, peaks: one per round: GB/s of rows that are not padding, and
            seconds to the first batch, and MB.
    """

    name: str
    folder: Path
    open: Callable[[], Batches]
    write: Callable[[Path], None] | None = None
    speeds: list[float] = field(default_factory=list)
    amplifications: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)


class Files:
    """One safetensors file per caption, as a dataset of torch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num = folder, len(os.listdir(folder))

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, number: int) -> np.ndarray:
        from safetensors.numpy import load_file

        return load_file(self.folder / str(number))["h"]


# ------------------------------------------------------------------------------------- what is read


def build(scratch: Path, num: int, tokens: tuple[int, int]) -> None:
    """Write features and latents; what is complete is kept."""
    rng = np.random.default_rng(0)
    counts = rng.integers(tokens[0], tokens[1] + 1, num)
    write_features(scratch / "bf16", counts)
    write_latents(scratch / "latents", num)


def write_delta(scratch: Path) -> None:
    """The same features as delta, unless they are there."""
    command = ["rewrite", str(scratch / "bf16"), str(scratch / "delta"), "--codec", "delta"]
    options = ["--shard-size", "64MB", "--workers", "2"]
    manifest = scratch / "delta" / "manifest.json"
    if not manifest.exists() or json.loads(manifest.read_text())["status"] != "complete":
        subprocess.run([sys.executable, "-m", "semroute.cli", *command, *options], check=True)


def write_features(
    path: Path, counts: np.ndarray, layers: int = LAYERS, width: int = WIDTH
) -> None:
    from semroute.pipeline.store.features import FeatureStore
    from semroute.pipeline.store.layout import pack
    from semroute.schemas import CAPTIONS_SCHEMA, SAMPLES_SCHEMA

    num = len(counts)
    packing = pack(
        counts, bytes_per_row=2 * layers * width, shard_bytes=SHARD_BYTES, batch_tokens=64
    )
    if not (path / "manifest.json").exists():
        identity = {
            "model": {"architecture": "llama", "num_layers": layers, "width": width, "files": {}},
            "tokenizer": "bytes",
            "template": {"text": "{caption}", "prefix_tokens": [], "suffix_tokens": []},
            "layers": [*range(1, layers + 1)],
            "final_norm": "normed",
            "dtype": "float32",
            "attention": "sdpa",
            "max_length": 1024,
            "captions": {"num_captions": num, "fingerprint": "0" * 64, "seed": 0},
            "samples": {"num_samples": num, "fingerprint": "0" * 64},
        }
        identity["template"]["keep_prefix"] = False
        manifest = manifest_of(FeatureStore, identity, packing, codec={"name": "bf16"})
        captions = {
            "caption_id": range(num),
            "text": [str(number) for number in range(num)],
            "token_ids": [[0] * count for count in counts],
            "num_tokens": counts,
            "num_cut_tokens": np.zeros(num, int),
            "shard": packing.shard,
            "row_start": packing.row_start,
            "row_stop": packing.row_start + packing.num_rows,
        }
        samples = [range(num), [[number] for number in range(num)], [None] * num]
        table = table_of(CAPTIONS_SCHEMA, [captions[name] for name in CAPTIONS_SCHEMA.names])
        FeatureStore.create(path, manifest, table, table_of(SAMPLES_SCHEMA, samples))

    def rows(shard: int, num_rows: int) -> dict[str, np.ndarray]:
        noise = np.random.default_rng(shard).standard_normal((num_rows, layers, width), np.float32)
        return {"hidden": (noise.cumsum(1).view(np.uint32) >> 16).astype(np.uint16)}

    fill(FeatureStore.open(path, complete=False), packing, rows)


def write_latents(path: Path, num: int, shape: tuple[int, int, int] = (4, 32, 32)) -> None:
    from semroute.pipeline.store.latents import LatentStore
    from semroute.pipeline.store.layout import pack
    from semroute.schemas import LATENT_SAMPLES_SCHEMA

    packing = pack(
        np.ones(num, np.int64),
        bytes_per_row=2 * math.prod(shape),
        shard_bytes=SHARD_BYTES,
        batch_tokens=64,
        rows_per_chunk=2,
    )
    if not (path / "manifest.json").exists():
        samples = {"num_samples": num, "fingerprint": "0" * 64}
        identity = {"vae": "AutoencoderKL", "shape": shape, "dtype": "float16", "scale": 1.0}
        identity |= {"shift": 0.0, "images": "images", "samples": samples}
        columns = [range(num), [None] * num, ["0" * 64] * num, packing.row_start, [0] * num]
        table = table_of(LATENT_SAMPLES_SCHEMA, columns)
        LatentStore.create(path, manifest_of(LatentStore, identity, packing), table)

    def rows(shard: int, num_rows: int) -> dict[str, np.ndarray]:
        values = np.random.default_rng(shard).standard_normal((num_rows, *shape), np.float32)
        return {"mean": values.astype(np.float16)}

    fill(LatentStore.open(path, complete=False), packing, rows)


def manifest_of(kind: Any, identity: dict[str, Any], packing: Any, **more: Any) -> Any:
    provenance = {"source": "random", "model": "random", "created": "now", "versions": {}}
    document = {"status": "extracting", "identity": identity, "provenance": provenance, **more}
    return kind.manifest_type.model_validate({**document, "layout": packing.layout.model_dump()})


def table_of(schema: Any, columns: list[Any]) -> Any:
    import pyarrow as pa

    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def fill(store: Any, packing: Any, rows: Callable[[int, int], dict[str, np.ndarray]]) -> None:
    """Write the remaining shards. Args: rows: rows of a shard by array."""
    from semroute.schemas import Receipt

    layout = packing.layout
    for shard in store.remaining():
        entries = packing.entries(shard)
        used = int(packing.num_rows[entries.start : entries.stop].sum())
        codes = {}
        for name, values in rows(shard, used).items():
            codes[name] = np.zeros((layout.rows_per_shard, *values.shape[1:]), values.dtype)
            codes[name][:used] = values
        receipt = Receipt(
            shard=shard,
            num_rows=used,
            num_entries=len(entries),
            files=store.write_shard(shard, codes),
            codec_error={},
            warnings=[],
            seconds={},
            worker="none",
        )
        store.write_receipt(receipt)
    if not store.is_complete:
        store.finish()


# ------------------------------------------------------------------------------------------ readers


def open_own(features: Path, latents: Path, order: str, workers: int) -> Batches:
    from semroute.pipeline.store.open import open_features, open_latents
    from semroute.schemas import DataConfig
    from semroute.trainer.data.loader import PaddedLoader

    store = open_features(features)
    data = DataConfig(batch_size=BATCH, workers=workers, caption_dropout=0, order=order)
    stream = PaddedLoader(store, open_latents(latents), data, seed=0, layers=store.layers)
    return ((batch.hidden, batch.mask) for batch in stream)


def all_readers(scratch: Path, alone: str | None) -> list[Reader]:
    """Ours, then those peers whose packages are installed; for the process of one, unchecked."""
    own = [
        Reader(
            f"semroute {codec}, {order}, {n} thread{'s' * (n > 1)}",
            scratch / codec,
            partial(open_own, scratch / codec, scratch / "latents", order, n),
        )
        for codec in ("bf16", "delta")
        for order in ("random", "shards")
        for n in (1, 2)
    ]
    work = scratch / "peers"
    found = []
    source = Source(scratch / "bf16", work)
    for peer in warm_readers((scratch / "bf16", scratch / "latents")):
        if peer.write is None or (alone is None and not importable(peer.needs)):
            continue
        path, write = work / peer.file, partial(peer.write, source)
        found.append(Reader(peer.name, path, partial(peer.open, path, source, peer.workers), write))
    for workers in (0, 2):
        name = f"safetensors, one per caption, {workers or 'no'} workers"
        opened = partial(open_files, work / "files", source, workers)
        write = partial(write_files, source, save=save_safetensors)
        found.append(Reader(name, work / "files", opened, write))
    return [*own, *found]


def open_files(folder: Path, source: Source, workers: int) -> Batches:
    return loading(Files(folder), source, workers, shuffle=True)


def importable(module: str) -> bool:
    try:
        __import__(module)
    except Exception as error:  # whatever a broken installation raises
        click.echo(f"skipped: {module} ({type(error).__name__}: {error})", err=True)
        return False
    return True


def write_once(reader: Reader) -> None:
    path = reader.folder
    if reader.write is not None and not path.exists():
        click.echo(f"writing {path.name}", err=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        reader.write(unfinished)
        unfinished.rename(path)


# ------------------------------------------------------------------------------------------- timing


def evict(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bytes_read() -> int:
    """Bytes that the disk read for this process and those that it started."""
    own, total = os.getpid(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) == own or f"PPid:\t{own}\n" in (process / "status").read_text():
                total += int((process / "io").read_text().split("\nread_bytes: ")[1].split()[0])
        except OSError:
            continue
    return total


def run_alone(reader: Reader, source: Source, seconds: float) -> None:
    """The process of one reader: prints the moment of the first batch, GB/s, amplification, MB."""
    row = 2 * int(np.prod(source.row))
    before = bytes_read()
    batches = reader.open()
    _, mask = next(batches)
    first, rows = time.monotonic(), int(mask.sum())
    for _ in range(UNTIMED - 1):
        rows += int(next(batches)[1].sum())
    timed, began, taken = 0, time.perf_counter(), 0.0
    for _ in range(len(source) // BATCH - UNTIMED):
        hidden, mask = next(batches)
        timed += int(mask.sum())
        taken = time.perf_counter() - began
        if taken > seconds:
            break
    assert str(hidden.dtype) == "torch.bfloat16"
    stored = (rows + timed) * row * size_of(reader.folder) / (source.offsets[-1] * row)
    read = (bytes_read() - before) / stored
    print(f"\n{json.dumps([first, timed * row / taken / 1e9, read, peak()])}", flush=True)
    os._exit(0)  # some readers leave threads and processes that take seconds to stop


def disk_speed(folder: Path, size: int, seconds: float, threads: int = 16) -> float:
    """GB/s of random requests with O_DIRECT, each of a whole number of 4 KB blocks."""
    size = -(-size // 4096) * 4096
    files = [(path, path.stat().st_size) for path in folder.rglob("*") if path.is_file()]
    places = [(os.open(p, os.O_RDONLY | os.O_DIRECT), num) for p, num in files if num > 2 * size]

    def read(seed: int) -> int:
        rng, buffer, total = np.random.default_rng(seed), mmap.mmap(-1, size), 0
        while time.perf_counter() < end:
            descriptor, num = places[rng.integers(len(places))]
            at = int(rng.integers(0, (num - size) // 4096)) * 4096
            total += os.preadv(descriptor, [buffer], at)
        return total

    began = time.perf_counter()
    end = began + seconds
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(threads)))
    speed = total / (time.perf_counter() - began) / 1e9
    for descriptor, _ in places:
        os.close(descriptor)
    return speed


def run_round(
    readers: list[Reader], scratch: Path, arguments: list[str], disk: list[float], size: int
) -> None:
    evict(scratch / "bf16")
    disk.append(disk_speed(scratch / "bf16", size, 1.5))
    click.echo(f"disk: {disk[-1]:.3f} GB/s", err=True)
    for reader in readers:
        evict(reader.folder)
        evict(scratch / "latents")
        began = time.monotonic()
        command = [sys.executable, __file__, *arguments, f"--alone={reader.name}"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        first, speed, amplification, memory = json.loads(out.splitlines()[-1])
        reader.firsts.append(first - began)
        reader.speeds.append(speed)
        reader.amplifications.append(amplification)
        reader.peaks.append(memory)
        click.echo(f"{reader.name}: {speed:.3f} GB/s, amplification {amplification:.2f}", err=True)


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and least to most."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


@click.command()
@click.argument("scratch", type=click.Path(path_type=Path))
@click.option("--captions", default=2_400, show_default=True)
@click.option("--tokens", nargs=2, default=(8, 16), show_default=True, help="Fewest and most.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="At most, for each reader.")
@click.option("--only", default="", help="Only readers whose name matches.")
@click.option("--alone", hidden=True, help="One reader by name, timed by the process above.")
def main(
    scratch: Path,
    captions: int,
    tokens: tuple[int, int],
    rounds: int,
    seconds: float,
    only: str,
    alone: str | None,
) -> None:
    if alone is None:
        build(scratch, captions, tokens)
        write_delta(scratch)
    source, readers = Source(scratch / "bf16", scratch / "peers"), all_readers(scratch, alone)
    if alone is not None:
        run_alone(next(r for r in readers if r.name == alone), source, seconds)
    readers = [reader for reader in readers if re.search(only, reader.name)]
    for reader in readers:
        write_once(reader)
    mean = source.offsets[-1] / len(source)
    size = int(mean * 2 * np.prod(source.row))
    disk: list[float] = []
    for _ in range(rounds):
        run_round(readers, scratch, [str(scratch), f"--seconds={seconds}"], disk, size)
    print(
        f"{len(source):,} captions of {mean:.1f} tokens, {size / 1e3:,.0f} KB each; {rounds} rounds"
    )
    print(f"disk, O_DIRECT at this size: {spread(disk)} GB/s\n")
    print("| reader | GB/s | x disk | amplification | first batch, s | peak, MB |")
    print("| --- | --: | --: | --: | --: | --: |")
    for reader in readers:
        shares = [speed / limit for speed, limit in zip(reader.speeds, disk, strict=True)]
        print(
            f"| {reader.name} | {spread(reader.speeds)} | {spread(shares)} "
            f"| {np.median(reader.amplifications):.2f} | {np.median(reader.firsts):.1f} "
            f"| {np.median(reader.peaks):,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
