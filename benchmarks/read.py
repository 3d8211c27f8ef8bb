"""Reads captions from feature stores and other formats: one run, interleaved, medians.

    python -m venv peers; peers/bin/pip install torch      (from the index of CPU wheels)
    peers/bin/pip install semroute -r benchmarks/requirements-peers.txt
    semroute extract CAPTIONS features --model LLM --codec bf16
    semroute rewrite features features-delta --codec delta    (and lossless, linear)
    peers/bin/python benchmarks/read.py features features-delta ... --work peers-files

The first store must hold bf16. Peers get the same values, written once into the work folder, each
as its documentation recommends. All run on one core, warm, one after the other in every round. The
values of each are compared with the first store, outside of the timing. A peer that cannot be
imported is skipped, with a message.

Batches hold 64 random captions, or, for readers marked *in order*, the next 64 captions, as a
format without an index reads them. Before that, every reader runs in processes of its own, one at a
time, which import nothing else. They measure the time from the start of Python to the first batch,
and the peak of memory (VmHWM, pages of mapped files included) after all batches.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import numpy as np

BATCH = 64
SHARD_BYTES = 64_000_000

Read = Callable[[np.ndarray], np.ndarray]
"""Caption ids -> packed uint16 [rows, L, H]."""


class Source:
    """The source of peers' files, all captions concatenated in one file, and the work folder.

    Imports nothing if the folder exists.
    """

    def __init__(self, store: Path, work: Path) -> None:
        self.work = work
        if not (work / "source.npz").exists():
            self._write(store)
        with np.load(work / "source.npz") as source:
            self.offsets: list[int] = source["offsets"].tolist()
            self.row: tuple[int, int] = tuple(source["row"].tolist())

    def _write(self, path: Path) -> None:
        from semroute.pipeline.store.open import open_features

        store = open_features(path)
        if store.manifest.codec.name != "bf16":
            raise click.ClickException(f"{path} holds {store.manifest.codec.name}, not bf16")
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "flat.u2").open("wb") as file:
            for first in range(0, len(store), 256):
                store.read(range(first, min(first + 256, len(store)))).bits.tofile(file)
        offsets = np.cumsum([0, *store.captions["num_tokens"].to_pylist()])
        row = (len(store.layers), store.manifest.identity.model.width)
        np.savez(self.work / "source.npz", offsets=offsets, row=row)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> np.ndarray:
        shape = (self.offsets[-1], *self.row)
        return np.memmap(self.work / "flat.u2", "<u2", "r", shape=shape)

    def captions(self) -> Iterator[np.ndarray]:
        return (np.array(self.rows[slice(*self.run(number))]) for number in range(len(self)))

    def run(self, number: int) -> tuple[int, int]:
        return self.offsets[number], self.offsets[number + 1]

    def batch(self, of: Callable[[int, int], np.ndarray]) -> Read:
        """A reader of captions by their first row and the row after the last."""
        return lambda ids: np.concatenate([of(*self.run(number)) for number in ids])

    def decoded(self, of: Callable[[int], bytes]) -> Read:
        """A reader of captions as bytes."""
        return lambda ids: np.concatenate(
            [np.frombuffer(of(number), "<u2").reshape(-1, *self.row) for number in ids.tolist()]
        )

    def buffer(self) -> np.ndarray:
        return np.empty((BATCH * int(np.diff(self.offsets).max()), *self.row), np.uint16)


Write = Callable[[Source, Path], None]
"""Writes all captions to a new file or folder."""
Open = Callable[[Source, Path], Read]


@dataclass
class Reader:
    """A way to read captions.

    Attributes:
        needs: modules that it imports.
        file: the file to read, in the work folder, or a store.
        exact: whether it must give the bits of the first store.
        in_order: whether it reads captions in the order they were written, from the first.
        num_bytes, seconds: totals over all batches; one entry of seconds per round.
        first, peaks: seconds to the first batch and MB, for each of its own processes.
    """

    name: str
    needs: tuple[str, ...]
    file: str
    open: Open
    write: Write | None = None
    exact: bool = True
    in_order: bool = False
    num_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def can_be_imported(self) -> bool:
        try:
            for module in self.needs:
                importlib.import_module(module)
        except Exception as error:  # whatever a broken installation raises
            click.echo(f"skipped: {self.name} ({type(error).__name__}: {error})", err=True)
            return False
        return True

    def path(self, source: Source) -> Path:
        """The file to read, written first if needed."""
        path = source.work / self.file  # a store's path is absolute
        if not path.exists():
            assert self.write is not None
            unfinished = path.with_name(f"unfinished-{path.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            click.echo(f"writing {path.name}", err=True)
            self.write(source, unfinished)
            unfinished.rename(path)
        return path

    def batches(self, source: Source, num_batches: int) -> list[np.ndarray]:
        if self.in_order:
            return [*np.arange(num_batches * BATCH).reshape(num_batches, BATCH)]
        rng = np.random.default_rng(0)
        return [rng.integers(1, len(source), BATCH) for _ in range(num_batches)]


def open_memmap(source: Source, path: Path) -> Read:
    return source.batch(lambda start, stop: source.rows[start:stop])


def open_memmap_buffer(source: Source, path: Path) -> Read:
    rows, buffer = source.rows, source.buffer()

    def read(ids: np.ndarray) -> np.ndarray:
        filled = 0
        for start, stop in map(source.run, ids):
            buffer[filled : filled + stop - start] = rows[start:stop]
            filled += stop - start
        return buffer[:filled]

    return read


def open_own(source: Source, path: Path, reused: bool) -> Read:
    from semroute.pipeline.store.open import open_features

    store = open_features(path)
    store.num_threads = 1
    buffer = source.buffer() if reused else None
    return lambda ids: store.read(ids, out=buffer).bits


def write_zarr(source: Source, path: Path, compressed: bool) -> None:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

    shard = 8 * max(1, SHARD_BYTES // (16 * int(np.prod(source.row))))
    array = zarr.create_array(
        path,
        shape=source.rows.shape,
        chunks=(8, *source.row),
        shards=(shard, *source.row),
        dtype="<u2",
        serializer=BytesCodec(),
        compressors=[*([ZstdCodec(level=1)] if compressed else []), Crc32cCodec()],
        filters=None,
    )
    for first in range(0, len(source.rows), shard):
        array[first : first + shard] = source.rows[first : first + shard]


def open_zarr(source: Source, path: Path, pipeline: str | None = None) -> Read:
    import zarr

    with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
        array = zarr.open_array(path, mode="r")
    return source.batch(lambda start, stop: np.asarray(array[start:stop]))


def open_tensorstore(source: Source, path: Path) -> Read:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    limits = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    context = tensorstore.Context(limits)
    array = tensorstore.open(spec, read=True, context=context).result()

    def read(ids: np.ndarray) -> np.ndarray:
        futures = [array[start:stop].read() for start, stop in map(source.run, ids)]
        return np.concatenate([future.result() for future in futures])

    return read


def write_files(source: Source, path: Path, save: Callable[[Path, np.ndarray], Any]) -> None:
    path.mkdir()
    for number, caption in enumerate(source.captions()):
        save(path / str(number), caption)


def save_safetensors(path: Path, caption: np.ndarray) -> None:
    from safetensors.numpy import save_file

    save_file({"h": caption}, path)


def open_safetensors(source: Source, path: Path) -> Read:
    from safetensors.numpy import load_file

    return lambda ids: np.concatenate([load_file(path / str(number))["h"] for number in ids])


def write_one_tensors(source: Source, path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({str(number): caption for number, caption in enumerate(source.captions())}, path)


def open_one_tensors(source: Source, path: Path) -> Read:
    from safetensors import safe_open

    file = safe_open(path, framework="np")
    return lambda ids: np.concatenate([file.get_tensor(str(number)) for number in ids])


def save_npz(path: Path, caption: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, h=caption)


def open_npz(source: Source, path: Path) -> Read:
    def load(number: int) -> np.ndarray:
        with np.load(path / str(number)) as file:
            return np.asarray(file["h"])

    return lambda ids: np.concatenate([load(number) for number in ids])


def save_pt(path: Path, caption: np.ndarray) -> None:
    import torch

    torch.save(torch.from_numpy(caption), path)


def open_pt(source: Source, path: Path) -> Read:
    import torch

    def load(number: int) -> np.ndarray:
        return torch.load(path / str(number), weights_only=True).numpy()

    return lambda ids: np.concatenate([load(number) for number in ids])


def write_arrow(source: Source, path: Path) -> None:
    import datasets

    def rows() -> Iterator[dict[str, bytes]]:
        return ({"h": caption.tobytes()} for caption in source.captions())

    features = datasets.Features({"h": datasets.Value("binary")})
    cache = str(source.work / "hf-cache")
    table = datasets.Dataset.from_generator(rows, features=features, cache_dir=cache)
    table.save_to_disk(str(path))


def open_arrow(source: Source, path: Path) -> Read:
    import datasets

    table = datasets.load_from_disk(str(path)).with_format("arrow")
    return source.decoded(lambda number: table[number]["h"][0].as_buffer())


def write_mds(source: Source, path: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(columns={"h": "ndarray:uint16"}, out=str(path)) as writer:
        for caption in source.captions():
            writer.write({"h": caption})


def open_mds(source: Source, path: Path) -> Read:
    from streaming import StreamingDataset

    table = StreamingDataset(local=str(path), batch_size=BATCH)
    return lambda ids: np.concatenate([table[number]["h"] for number in ids.tolist()])


def write_litdata(source: Source, path: Path) -> None:
    import litdata

    litdata.optimize(
        partial(caption_of, source),
        [*range(len(source))],
        str(path),
        chunk_bytes=SHARD_BYTES,
        num_workers=1,
        verbose=False,
    )


def caption_of(source: Source, number: int) -> dict[str, np.ndarray]:
    return {"h": np.array(source.rows[slice(*source.run(number))])}


def open_litdata(source: Source, path: Path) -> Read:
    import litdata

    table = litdata.StreamingDataset(str(path))
    return lambda ids: np.concatenate([table[number]["h"] for number in ids.tolist()])


def open_litdata_in_order(source: Source, path: Path) -> Read:
    import litdata

    table = litdata.StreamingDataset(str(path))
    return streamed(lambda: (sample["h"] for sample in table))


def write_webdataset(source: Source, path: Path) -> None:
    from webdataset import ShardWriter

    path.mkdir()
    with ShardWriter(f"{path}/%06d.tar", maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, caption in enumerate(source.captions()):
            writer.write({"__key__": f"{number:08d}", "h.npy": caption})


def open_webdataset(source: Source, path: Path) -> Read:
    from webdataset import WebDataset

    shards = sorted(map(str, path.glob("*.tar")))
    table = WebDataset(shards, shardshuffle=False).decode()
    return streamed(lambda: (sample["h.npy"] for sample in table))


def streamed(captions: Callable[[], Iterator[np.ndarray]]) -> Read:
    """A sequential reader; a request for caption 0 restarts it."""
    state = captions()

    def read(ids: np.ndarray) -> np.ndarray:
        nonlocal state
        if ids[0] == 0:
            state = captions()
        return np.concatenate([next(state) for _ in ids])

    return read


def write_lance(source: Source, path: Path) -> None:
    import lance
    import pyarrow as pa

    schema = pa.schema({"h": pa.large_binary()})
    batches = (
        pa.record_batch([pa.array([caption.tobytes()], pa.large_binary())], schema)
        for caption in source.captions()
    )
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(path))


def open_lance(source: Source, path: Path) -> Read:
    import lance

    table = lance.dataset(str(path))

    def read(ids: np.ndarray) -> np.ndarray:
        column = table.take(ids.tolist())["h"]
        parts = [np.frombuffer(value.as_buffer(), "<u2") for value in column]
        return np.concatenate(parts).reshape(-1, *source.row)

    return read


def codec_of(path: Path) -> tuple[str, str]:
    """Name of a store's codec, and name with quality; imports no reader."""
    codec = json.loads((path / "manifest.json").read_text())["codec"]
    name, quality = codec["name"], codec["quality"]
    return name, name if quality is None else f"{name}, quality {quality:g}"


def own_readers(path: Path) -> list[Reader]:
    """Our own readers: into a new array for every batch, and into a reused buffer."""
    name, label = codec_of(path)
    own = partial(
        Reader, needs=(), file=str(path.resolve()), write=None, exact=name in ("bf16", "lossless")
    )
    readers = [
        own(f"semroute {label}", open=partial(open_own, reused=False)),
        own(f"semroute {label}, into a buffer", open=partial(open_own, reused=True)),
    ]
    if name == "bf16":
        readers.append(own(f"semroute {label}, in order", open=readers[0].open, in_order=True))
    return readers


def all_readers(stores: Sequence[Path]) -> list[Reader]:
    raw, zstd = (partial(write_zarr, compressed=compressed) for compressed in (False, True))
    rust = partial(open_zarr, pipeline="zarrs.ZarrsCodecPipeline")
    tensors, npz, pt = (partial(write_files, save=s) for s in (save_safetensors, save_npz, save_pt))
    peers: list[tuple[str, str, str, Open, Write]] = [
        ("zarr-python, no compressor", "zarr", "raw.zarr", open_zarr, raw),
        ("zarr-python with zarrs, no compressor", "zarrs", "raw.zarr", rust, raw),
        ("tensorstore, no compressor", "tensorstore", "raw.zarr", open_tensorstore, raw),
        ("zarr-python, zstd", "zarr", "zstd.zarr", open_zarr, zstd),
        ("zarr-python with zarrs, zstd", "zarrs", "zstd.zarr", rust, zstd),
        ("tensorstore, zstd", "tensorstore", "zstd.zarr", open_tensorstore, zstd),
        ("safetensors, one per caption", "safetensors", "safetensors", open_safetensors, tensors),
        ("safetensors, one file", "safetensors", "one", open_one_tensors, write_one_tensors),
        ("npz, one per caption", "numpy", "npz", open_npz, npz),
        ("pt, one per caption", "torch", "pt", open_pt, pt),
        ("HF datasets (Arrow)", "datasets", "arrow", open_arrow, write_arrow),
        ("MDS (mosaicml-streaming)", "streaming", "mds", open_mds, write_mds),
        ("Lance (pylance)", "lance", "lance", open_lance, write_lance),
        ("litdata", "litdata", "litdata", open_litdata, write_litdata),
        ("litdata, in order", "litdata", "litdata", open_litdata_in_order, write_litdata),
        ("webdataset, in order", "webdataset", "webdataset", open_webdataset, write_webdataset),
    ]
    return [
        Reader("np.memmap, copied", (), "flat.u2", open_memmap),
        Reader("np.memmap, into a buffer", (), "flat.u2", open_memmap_buffer),
        *(reader for store in stores for reader in own_readers(store)),
        *(
            Reader(name, (needs,), file, open_, write, in_order=name.endswith("in order"))
            for name, needs, file, open_, write in peers
        ),
    ]


def run(
    readers: Sequence[Reader], source: Source, first: Path, num_batches: int, rounds: int
) -> None:
    """Check the values of every reader, then time every reader once per round."""
    expected = open_own(source, first, False)
    opened = []
    for reader in readers:  # warm up and check
        batches = reader.batches(source, num_batches)
        read = reader.open(source, reader.path(source))
        for ids in batches:
            found = read(ids)
            assert not reader.exact or np.array_equal(found, expected(ids)), reader.name
            reader.num_bytes += found.nbytes
        opened.append((reader, read, batches))
    for _ in range(rounds):
        for reader, read, batches in opened:
            began = time.perf_counter()
            for ids in batches:
                read(ids)
            reader.seconds.append(time.perf_counter() - began)


def run_alone(reader: Reader | None, source: Source, num_batches: int) -> None:
    """The process that :func:`processes` starts; prints when its first batch came, and its peak."""
    began = time.monotonic()
    if reader:
        read = reader.open(source, reader.path(source))
        for number, ids in enumerate(reader.batches(source, num_batches)):
            read(ids)
            if number == 0:
                began = time.monotonic()
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    click.echo(f"\n{began} {peak}", nl=False)
    sys.stdout.flush()
    os._exit(0)  # some readers leave threads that take seconds to stop


def processes(readers: Sequence[Reader], arguments: Sequence[str], rounds: int) -> float:
    """Run each reader in processes of its own, once per round; return the peak without a reader.

    Not ``ru_maxrss``: a process inherits it from its parent.
    """
    bare = Reader("", (), "", open_memmap)
    for _ in range(rounds):
        for reader in [bare, *readers]:
            began = time.monotonic()
            command = [sys.executable, __file__, *arguments, f"--alone={reader.name}"]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            at, peak = map(float, out.splitlines()[-1].split())
            reader.first.append(at - began)
            reader.peaks.append(peak)
    for reader in readers:
        reader.peaks = [peak - median(bare.peaks) for peak in reader.peaks]
    return median(bare.peaks)


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


@click.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Peers' files.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--num-batches", default=8, show_default=True, help="Batches of 64 captions.")
@click.option("--processes", "num_processes", default=3, show_default=True, help="Per reader.")
@click.option("--alone", hidden=True, help="One reader by name, timed by the process above.")
def main(
    stores: tuple[Path, ...],
    work: Path,
    rounds: int,
    num_batches: int,
    num_processes: int,
    alone: str | None,
) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:  # restart on one: numpy counted cores when it was imported
        os.sched_setaffinity(0, {max(cores)})
        os.execv(sys.executable, [sys.executable, *sys.argv])
    source, readers = Source(stores[0], work), all_readers(stores)
    if alone is not None:
        run_alone(next((r for r in readers if r.name == alone), None), source, num_batches)
    readers = [reader for reader in readers if reader.can_be_imported()]
    for reader in readers:
        reader.path(source)
    arguments = [*map(str, stores), f"--work={work}", f"--num-batches={num_batches}"]
    bare = processes(readers, arguments, num_processes)  # first: MDS locks others out of its folder
    run(readers, source, stores[0], num_batches, rounds)
    ceiling = median(readers[0].seconds) / readers[0].num_bytes
    print("| reader | GB/s | x memmap | MB on disk | first batch, s | peak, MB |")
    print("| --- | --: | --: | --: | --: | --: |")
    for reader in readers:
        seconds = median(reader.seconds) / reader.num_bytes
        print(
            f"| {reader.name} | {1e-9 / seconds:.2f} | {ceiling / seconds:.2f} "
            f"| {size_of(reader.path(source)) / 1e6:,.0f} | {median(reader.first):.2f} "
            f"| {median(reader.peaks):,.0f} |"
        )
    print(f"\nPeaks are beyond the {bare:.0f} MB of a process that reads nothing.\n")
    print_layers(stores, readers[0].batches(source, num_batches))


def print_layers(stores: Sequence[Path], batches: Sequence[np.ndarray]) -> None:
    """Print the time to read one layer in the middle."""
    from semroute.pipeline.store.open import open_features

    print("| store | all layers, GB/s | 1 layer, share of time |\n| --- | --: | --: |")
    for path in stores:
        store = open_features(path)
        store.num_threads = 1
        middle = [store.layers[len(store.layers) // 2]]
        everything, one, num_bytes = [], [], 0
        for _ in range(5):
            for layers, seconds in ((None, everything), (middle, one)):
                began = time.perf_counter()
                found = [store.read(ids, layers).bits.nbytes for ids in batches]
                seconds.append(time.perf_counter() - began)
                num_bytes = max(num_bytes, sum(found))
        print(
            f"| {codec_of(path)[1]} | {num_bytes / median(everything) / 1e9:.2f} "
            f"| {median(one) / median(everything):.2f} |"
        )


if __name__ == "__main__":
    main()
