"""Delivers shuffled, padded batches in the training process: one run, interleaved, medians.

    python -m venv peers; peers/bin/pip install torch      (from the index of CPU wheels)
    peers/bin/pip install semroute -r benchmarks/requirements-peers.txt
    semroute rewrite features features-bf16 --codec bf16
    peers/bin/python benchmarks/stream.py features-bf16 latents --work peers-files

Peers get the same captions, written once into the work folder, each as its documentation
recommends, and are read through their own shuffle and a ``DataLoader`` without workers and with
two. Batches hold 64 captions, padded to the longest: bfloat16 [B, T, L, H] and a mask. Our reader
also reads the latents of the samples.

In every round, each reader runs in its own process, which imports nothing else. It measures the
time from the start of Python to the first batch; then whole epochs, the first of which is not
timed; and the peak of memory (VmHWM, pages of mapped files included) of the process and its workers
together. GB are of rows that are not padding. A peer that cannot be imported is skipped, with a
message.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from read import (
    BATCH,
    Source,
    Write,
    size_of,
    write_arrow,
    write_litdata,
    write_mds,
    write_webdataset,
)
from read import Reader as File

Batches = Iterator[tuple[Any, Any]]
"""Hidden states bfloat16 [B, T, L, H] and mask [B, T], without end."""


@dataclass
class Reader:
    """A way to deliver batches.

    Attributes:
        open: opens the file to read, given the source and the number of workers.
        file: the file to read, in the work folder; empty for stores.
    """

    name: str
    needs: str
    file: str
    write: Write | None
    open: Callable[[Path, Source, int], Batches]
    workers: int
    speeds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)


class Pad:
    """Pads the captions of a batch into one tensor; a class, so that it can be sent to workers."""

    def __init__(self, row: tuple[int, int]) -> None:
        self.row = row

    def __call__(self, samples: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        captions = [self.array(sample) for sample in samples]
        longest = max(map(len, captions))
        hidden = np.zeros((len(captions), longest, *self.row), np.uint16)
        mask = np.zeros((len(captions), longest), bool)
        for number, caption in enumerate(captions):
            hidden[number, : len(caption)] = caption
            mask[number, : len(caption)] = True
        return torch.from_numpy(hidden).view(torch.bfloat16), torch.from_numpy(mask)

    def array(self, sample: Any) -> np.ndarray:
        if isinstance(sample, dict):
            sample = sample.get("h", sample.get("h.npy"))
        if isinstance(sample, np.ndarray):
            return sample.reshape(-1, *self.row)
        return np.frombuffer(sample, "<u2").reshape(-1, *self.row)


def again(make: Callable[[], Any]) -> Batches:
    while True:
        yield from make()


def loading(table: Any, source: Source, workers: int, kind: Any = None, **options: Any) -> Batches:
    """Batches of a table from torch's loader, or another kind of loader."""
    from torch.utils.data import DataLoader

    loader = (kind or DataLoader)(
        table,
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=Pad(source.row),
        drop_last=True,
        persistent_workers=workers > 0,
        **options,
    )
    return again(lambda: loader)


def open_mds(path: Path, source: Source, workers: int) -> Batches:
    from streaming import StreamingDataset

    table = StreamingDataset(local=str(path), shuffle=True, batch_size=BATCH)
    return loading(table, source, workers)


def open_litdata(path: Path, source: Source, workers: int) -> Batches:
    import litdata

    table = litdata.StreamingDataset(str(path), shuffle=True, drop_last=True)
    return loading(table, source, workers, litdata.StreamingDataLoader)


def open_webdataset(path: Path, source: Source, workers: int) -> Batches:
    from torch.utils.data import DataLoader
    from webdataset import WebDataset

    shards = sorted(map(str, path.glob("*.tar")))
    table = WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(256).decode()
    table = table.batched(BATCH, collation_fn=Pad(source.row), partial=False)
    loader = DataLoader(table, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return again(lambda: loader)


def open_arrow(path: Path, source: Source, workers: int) -> Batches:
    import datasets

    return loading(datasets.load_from_disk(str(path)), source, workers, shuffle=True)


def open_own(paths: tuple[Path, Path]) -> Callable[[Path, Source, int], Batches]:
    def batches(_path: Path, _source: Source, workers: int) -> Batches:
        from semroute.pipeline.store.open import open_features, open_latents
        from semroute.schemas import DataConfig
        from semroute.trainer.data.loader import PaddedLoader

        features, latents = open_features(paths[0]), open_latents(paths[1])
        data = DataConfig(batch_size=BATCH, workers=workers, caption_dropout=0)
        stream = PaddedLoader(features, latents, data, seed=0, layers=features.layers)
        return ((batch.hidden, batch.mask) for batch in stream)

    return batches


def all_readers(stores: tuple[Path, Path]) -> list[Reader]:
    peers: list[tuple[str, str, str, Write, Callable[[Path, Source, int], Batches]]] = [
        ("HF datasets (Arrow)", "datasets", "arrow", write_arrow, open_arrow),
        ("MDS (mosaicml-streaming)", "streaming", "mds", write_mds, open_mds),
        ("litdata", "litdata", "litdata", write_litdata, open_litdata),
        ("webdataset", "webdataset", "webdataset", write_webdataset, open_webdataset),
    ]
    own = open_own(stores)
    return [
        *(
            Reader(f"semroute, {n} thread{'s' * (n > 1)}", "semroute", "", None, own, n)
            for n in (1, 2)
        ),
        *(
            Reader(f"{name}, {n or 'no'} workers", needs, file, write, open_, n)
            for name, needs, file, write, open_ in peers
            for n in (0, 2)
        ),
    ]


def path_of(reader: Reader, source: Source) -> Path:
    """The file to read, written first if needed."""
    if reader.write is None:
        return Path()
    return File(reader.name, (), reader.file, lambda *_: None, reader.write).path(source)  # type: ignore[arg-type, return-value]


def run_alone(reader: Reader, source: Source, num_batches: int, epochs: int) -> None:
    """The process of one reader; prints the time of the first batch, bytes per second and MB."""
    batches = iter(reader.open(path_of(reader, source), source, reader.workers))
    next(batches)
    first = time.monotonic()
    for _ in range(num_batches - 1):
        next(batches)
    num_rows, began = 0, time.perf_counter()
    for _ in range(num_batches * epochs):
        hidden, mask = next(batches)
        num_rows += int(mask.sum())
    seconds = time.perf_counter() - began
    assert hidden.shape[0] == BATCH
    assert str(hidden.dtype) == "torch.bfloat16"
    num_bytes = num_rows * 2 * int(np.prod(source.row))
    print(f"\n{first} {num_bytes / seconds} {peak()}")
    sys.stdout.flush()
    os._exit(0)  # some readers leave threads and processes that take seconds to stop


def peak() -> float:
    """Peak MB of this process and its children."""
    own = os.getpid()
    total = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "status").read_text()
        except OSError:
            continue
        if int(process.name) == own or f"PPid:\t{own}\n" in status:
            found = status.split("VmHWM:")
            total += int(found[1].split()[0]) * 1024 / 1e6 if len(found) > 1 else 0
    return total


@click.command()
@click.argument("features", type=click.Path(exists=True, path_type=Path))
@click.argument("latents", type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Peers' files.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--epochs", default=5, show_default=True, help="Timed epochs, after one.")
@click.option("--alone", hidden=True, help="One reader by name, timed by the process above.")
def main(
    features: Path, latents: Path, work: Path, rounds: int, epochs: int, alone: str | None
) -> None:
    source, readers = Source(features, work), all_readers((features, latents))
    num_batches = (len(source) - 1) // BATCH
    if alone is not None:
        run_alone(next(r for r in readers if r.name == alone), source, num_batches, epochs)
    readers = [r for r in readers if File(r.name, (r.needs,), "", None).can_be_imported()]  # type: ignore[arg-type]
    for reader in readers:
        path_of(reader, source)
    arguments = [str(features), str(latents), f"--work={work}", f"--epochs={epochs}"]
    for _ in range(rounds):
        for reader in readers:
            began = time.monotonic()
            command = [sys.executable, __file__, *arguments, f"--alone={reader.name}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            first, speed, memory = map(float, out.splitlines()[-1].split())
            reader.first.append(first - began)
            reader.speeds.append(speed)
            reader.peaks.append(memory)
    best = max(np.median(r.speeds) for r in readers if r.file)
    print("| reader | GB/s | x best peer | MB on disk | first batch, s | peak, MB |")
    print("| --- | --: | --: | --: | --: | --: |")
    for reader in readers:
        speed = float(np.median(reader.speeds))
        size = size_of(path_of(reader, source) if reader.file else features) / 1e6
        print(
            f"| {reader.name} | {speed / 1e9:.2f} | {speed / best:.2f} | {size:,.0f} "
            f"| {np.median(reader.first):.1f} | {np.median(reader.peaks):,.0f} |"
        )


if __name__ == "__main__":
    main()
