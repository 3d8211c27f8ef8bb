"""Read random captions from feature stores and by other means: one run, interleaved, medians.

    pip install -r benchmarks/requirements-peers.txt
    semroute extract CAPTIONS features --model LLM
    semroute rewrite features features-delta --codec delta    (and lossless, linear)
    python benchmarks/read.py features features-delta ... --work /tmp/peers

The first store must hold bf16. Peers get the same values, written once into the work folder. All
run on one core, warm, one after the other in every round; a reader that is not installed is listed
as such. What each reads is compared with the first store, outside of the timing.
"""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import zarr
from tqdm import tqdm
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from semroute.pipeline.store import FeatureStore, open_features

Read = Callable[[np.ndarray], np.ndarray]
"""Caption ids -> packed uint16 [rows, L, H]."""


@dataclass
class Reader:
    """Something that reads captions.

    Attributes:
        exact: whether it must give the bits of the first store.
    """

    name: str
    read: Read | None
    num_bytes: int = 0
    exact: bool = True
    seconds: list[float] = field(default_factory=list)


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def packed(runs: Sequence[tuple[int, int]], get: Callable[[int, int], np.ndarray]) -> np.ndarray:
    return np.concatenate([get(start, stop) for start, stop in runs])


class Peers:
    """The same hidden states, packed in caption order, in other formats."""

    def __init__(self, source: FeatureStore, work: Path) -> None:
        self.source, self.work = source, work
        num_tokens = source.captions["num_tokens"].to_numpy()
        self.offsets = np.concatenate([[0], np.cumsum(num_tokens)])
        self.row = (len(source.layers), source.manifest.identity.model.width)
        work.mkdir(parents=True, exist_ok=True)
        self.flat = work / "flat.u2"
        if not self.flat.exists():
            unfinished = np.memmap(work / "tmp", "<u2", "w+", shape=(self.offsets[-1], *self.row))
            for first in tqdm(range(0, len(source), 256), desc="memmap"):
                ids = range(first, min(first + 256, len(source)))
                rows = slice(self.offsets[ids.start], self.offsets[ids.stop])
                unfinished[rows] = source.read(ids).bits
            unfinished.flush()
            (work / "tmp").rename(self.flat)
        self.rows = np.memmap(self.flat, "<u2", "r", shape=(self.offsets[-1], *self.row))

    def runs(self, ids: np.ndarray) -> list[tuple[int, int]]:
        return [(int(self.offsets[i]), int(self.offsets[i + 1])) for i in ids]

    def write(self, name: str, write: Callable[[Path], None]) -> Path:
        """A folder or file of the work folder, written once."""
        path, unfinished = self.work / name, self.work / f"{name}.tmp"
        if not path.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            write(unfinished)
            unfinished.rename(path)
        return path

    def caption(self, number: int) -> np.ndarray:
        return np.asarray(self.rows[self.offsets[number] : self.offsets[number + 1]])

    def memmap(self) -> Reader:
        def read(ids: np.ndarray) -> np.ndarray:
            return packed(self.runs(ids), lambda a, b: self.rows[a:b])

        return Reader("np.memmap, copied", read, size_of(self.flat))

    def memmap_reused(self) -> Reader:
        buffer = np.empty((64 * int(np.diff(self.offsets).max()), *self.row), np.uint16)

        def read(ids: np.ndarray) -> np.ndarray:
            filled = 0
            for start, stop in self.runs(ids):
                buffer[filled : filled + stop - start] = self.rows[start:stop]
                filled += stop - start
            return buffer[:filled]

        return Reader("np.memmap, into a buffer", read, size_of(self.flat))

    def zarr_array(self, compressed: bool) -> Path:
        def write(path: Path) -> None:
            shard = 8 * max(1, 64_000_000 // (16 * int(np.prod(self.row))))
            array = zarr.create_array(
                path,
                shape=self.rows.shape,
                chunks=(8, *self.row),
                shards=(shard, *self.row),
                dtype="<u2",
                serializer=BytesCodec(),
                compressors=[*([ZstdCodec(level=1)] if compressed else []), Crc32cCodec()],
                filters=None,
            )
            for first in tqdm(range(0, len(self.rows), shard), desc=path.name):
                array[first : first + shard] = self.rows[first : first + shard]

        return self.write("zstd.zarr" if compressed else "raw.zarr", write)

    def zarr_readers(self, compressed: bool) -> list[Reader]:
        path, kind = self.zarr_array(compressed), "zstd" if compressed else "no compressor"
        array = zarr.open_array(path, mode="r")
        readers = [
            Reader(
                f"zarr-python, {kind}",
                lambda ids: packed(self.runs(ids), lambda a, b: np.asarray(array[a:b])),
                size_of(path),
            )
        ]
        if importlib.util.find_spec("zarrs"):
            with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
                rust = zarr.open_array(path, mode="r")
            readers.append(
                Reader(
                    f"zarr-python with zarrs, {kind}",
                    lambda ids: packed(self.runs(ids), lambda a, b: np.asarray(rust[a:b])),
                    size_of(path),
                )
            )
        else:
            readers.append(Reader(f"zarr-python with zarrs, {kind}", None))
        if importlib.util.find_spec("tensorstore"):
            import tensorstore

            context = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            opened = tensorstore.open(
                spec, read=True, context=tensorstore.Context(context)
            ).result()

            def read(ids: np.ndarray) -> np.ndarray:
                futures = [opened[a:b].read() for a, b in self.runs(ids)]
                return np.concatenate([future.result() for future in futures])

            readers.append(Reader(f"tensorstore, {kind}", read, size_of(path)))
        return readers

    def safetensors_files(self) -> Reader:
        from safetensors.numpy import load_file, save_file

        def write(path: Path) -> None:
            path.mkdir()
            for number in tqdm(range(len(self.source)), desc="safetensors"):
                save_file({"h": self.caption(number)}, path / f"{number}.safetensors")

        path = self.write("safetensors", write)

        def read(ids: np.ndarray) -> np.ndarray:
            return np.concatenate([load_file(path / f"{i}.safetensors")["h"] for i in ids])

        return Reader("safetensors, a file a caption", read, size_of(path))

    def npz_files(self) -> Reader:
        def write(path: Path) -> None:
            path.mkdir()
            for number in tqdm(range(len(self.source)), desc="npz"):
                np.savez(path / f"{number}.npz", h=self.caption(number))

        path = self.write("npz", write)

        def read(ids: np.ndarray) -> np.ndarray:
            parts = []
            for i in ids:
                with np.load(path / f"{i}.npz") as file:
                    parts.append(file["h"])
            return np.concatenate(parts)

        return Reader("npz, a file a caption", read, size_of(path))

    def pt_files(self) -> Reader:
        import torch

        def write(path: Path) -> None:
            path.mkdir()
            for number in tqdm(range(len(self.source)), desc="pt"):
                torch.save(torch.from_numpy(self.caption(number)), path / f"{number}.pt")

        path = self.write("pt", write)

        def read(ids: np.ndarray) -> np.ndarray:
            parts = [torch.load(path / f"{i}.pt", weights_only=True).numpy() for i in ids]
            return np.concatenate(parts)

        return Reader("pt, a file a caption", read, size_of(path))

    def arrow(self) -> Reader:
        if not importlib.util.find_spec("datasets"):
            return Reader("HF datasets (Arrow)", None)
        import datasets

        def write(path: Path) -> None:
            def rows() -> object:
                for number in range(len(self.source)):
                    yield {"h": self.caption(number).tobytes()}

            features = datasets.Features({"h": datasets.Value("binary")})
            table = datasets.Dataset.from_generator(
                rows, features=features, cache_dir=str(self.work / "hf-cache")
            )
            table.save_to_disk(str(path))

        path = self.write("arrow", write)
        table = datasets.load_from_disk(str(path)).with_format("arrow")

        def read(ids: np.ndarray) -> np.ndarray:
            parts = [table[int(i)]["h"][0].as_buffer() for i in ids]
            return np.concatenate([np.frombuffer(p, "<u2").reshape(-1, *self.row) for p in parts])

        return Reader("HF datasets (Arrow)", read, size_of(path))


def own(store: FeatureStore) -> list[Reader]:
    """Ours: a fresh array for every batch, and a buffer that is used again."""
    store.num_threads = 1
    codec, num_bytes = store.manifest.codec, store.num_bytes()
    label = codec.name if codec.quality is None else f"{codec.name}, quality {codec.quality:g}"
    exact = codec.name in ("bf16", "lossless")
    longest = int(store.captions["num_tokens"].to_numpy().max())
    width = store.manifest.identity.model.width
    buffer = np.empty((64 * longest, len(store.layers), width), np.uint16)
    return [
        Reader(f"semroute {label}", lambda ids: store.read(ids).bits, num_bytes, exact),
        Reader(
            f"semroute {label}, into a buffer",
            lambda ids: store.read(ids, out=buffer).bits,
            num_bytes,
            exact,
        ),
    ]


def run(readers: list[Reader], batches: list[np.ndarray], expected: Read, rounds: int) -> int:
    """Time every reader once a round; returns the bytes of a round."""
    for reader in readers:
        for ids in batches if reader.read else []:  # warm, and right
            assert reader.read is not None
            found = reader.read(ids)
            assert not reader.exact or np.array_equal(found, expected(ids)), reader.name
    num_bytes = sum(expected(ids).nbytes for ids in batches)
    for _ in tqdm(range(rounds), desc="rounds"):
        for reader in readers:
            if reader.read is None:
                continue
            began = time.perf_counter()
            for ids in batches:
                reader.read(ids)
            reader.seconds.append(time.perf_counter() - began)
    return num_bytes


@click.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Peers' files.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--num-batches", default=8, show_default=True, help="Of 64 captions.")
def main(stores: tuple[Path, ...], work: Path, rounds: int, num_batches: int) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    opened = [open_features(path) for path in stores]
    first = opened[0]
    if first.manifest.codec.name != "bf16":
        raise click.ClickException(f"{stores[0]} holds {first.manifest.codec.name}, not bf16")
    peers = Peers(first, work)
    readers = [peers.memmap(), peers.memmap_reused()]
    readers += [reader for store in opened for reader in own(store)]
    readers += [*peers.zarr_readers(False), *peers.zarr_readers(True)]
    readers += [peers.safetensors_files(), peers.npz_files(), peers.pt_files(), peers.arrow()]
    rng = np.random.default_rng(0)
    batches = [rng.integers(1, len(first), 64) for _ in range(num_batches)]
    num_bytes = run(readers, batches, lambda ids: first.read(ids).bits, rounds)
    ceiling = float(np.median(readers[0].seconds))
    raw = peers.rows.nbytes
    print(
        "| reader | GB/s | x memmap | captions/s | bytes, x bf16 |\n| --- | --: | --: | --: | --: |"
    )
    for reader in readers:
        if reader.read is None:
            print(f"| {reader.name} | not installed | | | |")
            continue
        seconds = float(np.median(reader.seconds))
        print(
            f"| {reader.name} | {num_bytes / seconds / 1e9:.2f} | {ceiling / seconds:.2f} "
            f"| {64 * num_batches / seconds:,.0f} | {raw / reader.num_bytes:.2f} |"
        )
    print("\n| store | all layers, GB/s | 1 layer, time of all |\n| --- | --: | --: |")
    for store in opened:
        middle = [store.layers[len(store.layers) // 2]]
        everything, one = (
            float(np.median([timed(store, batches, layers) for _ in range(5)]))
            for layers in (None, middle)
        )
        print(f"| {store.manifest.codec.name} | {num_bytes / everything / 1e9:.2f} | "
              f"{one / everything:.2f} |")  # fmt: skip


def timed(store: FeatureStore, batches: list[np.ndarray], layers: list[int] | None) -> float:
    began = time.perf_counter()
    for ids in batches:
        store.read(ids, layers)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
