"""Tiny complete stores of every kind, of random numbers, written with numpy alone; and forgeries.

A forgery changes a file of a store; :func:`seal` then makes its checksums and receipts agree, as a
stranger could.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semroute.pipeline.codecs.base import digest_parameters
from semroute.pipeline.codecs.registry import CODECS, fitted_arrays, open_codec
from semroute.pipeline.store.base import Store
from semroute.pipeline.store.conditioning import ConditioningStore
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.latents import LatentStore
from semroute.pipeline.store.layout import Packing, pack
from semroute.schemas import (
    CAPTIONS_SCHEMA,
    CONDITIONING_CAPTIONS_SCHEMA,
    LATENT_SAMPLES_SCHEMA,
    SAMPLES_SCHEMA,
    Codec,
    ConditioningManifest,
    FeatureManifest,
    LatentManifest,
    Receipt,
    digest,
    fingerprint,
)

NUM, LAYERS, WIDTH, RANK = 40, 3, 8, 3
KINDS = (
    *("bf16", "lossless", "delta", "linear", "predictive", "exact", "mixes"),
    *("latents", "buckets", "ragged", "padded"),
)
TEXTS = ["", *(f"caption {number} of some" for number in range(1, NUM))]
LENGTHS = np.array([1 + number * 7 % 9 for number in range(NUM)])
_LARGEST = 100_000_000  # bytes of a file that is sealed; nobody comes to read more


def make_store(kind: str, path: Path) -> Path:
    """A complete store; ``exact`` is delta with an exact layer, ``ragged`` and ``padded`` are
    conditioning."""
    if kind in ("latents", "buckets"):
        _make_latents(path, with_buckets=kind == "buckets")
    elif kind in ("ragged", "padded"):
        _make_conditioning(path, ragged=kind == "ragged")
    else:
        _make_features(path, kind)
    return path


def _make_features(path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    name = {"exact": "delta", "mixes": "bf16"}.get(kind, kind)
    packing = _pack(LENGTHS, aligned=CODECS[name].aligned)
    codec = {"name": name}
    if name in ("delta", "linear", "predictive"):
        codec |= {"quality": 3.0, "code_bits": 4 if name == "linear" else 8}
    if name == "predictive":
        codec["rank"] = RANK
    parameters = {
        fitted: _random(rng, (LAYERS, *shape), dtype)
        for fitted, (shape, dtype) in fitted_arrays(Codec(**codec), WIDTH).items()
    }
    fit = {"num_captions": 1, "num_rows": 1, "sha256": digest_parameters(parameters)}
    codec["fit"] = fit if parameters else None
    if kind == "exact":
        codec["exact_layers"] = [2]
    identity = {
        "model": {"architecture": "llama", "num_layers": LAYERS, "width": WIDTH, "files": {}},
        "tokenizer": "bytes",
        "template": {
            **{"text": "{bos}{caption}", "prefix_tokens": [0]},
            **{"suffix_tokens": [], "keep_prefix": False},
        },
        "layers": [1, 2, 3],
        "final_norm": "normed",
        "dtype": "float32",
        "attention": "sdpa",
        "max_length": 64,
        **_texts_identity(),
    }
    if kind == "mixes":
        rows = np.eye(LAYERS).tolist()
        identity["mixes"] = {
            **{"strategy": "depth", "step": 1, "source": "ema", "layers": [1, 2, 3]},
            **{"weights": rows, "basis": rows, "coefficients": rows},
            **{"errors": [0.2, 0.1, 0.0], "tolerance": None},
        }
    manifest = _manifest(FeatureStore, identity, packing, codec=codec)
    captions = _captions(CAPTIONS_SCHEMA, packing)
    store = FeatureStore.create(path, manifest, captions, _samples(), parameters)
    stored = open_codec(manifest.codec, identity["layers"], WIDTH, parameters)
    shapes = {spec.name: (spec.num_layers(LAYERS), spec.size, spec.dtype) for spec in stored.arrays}
    _fill(store, packing, lambda _shard: shapes, rng)


def _make_conditioning(path: Path, *, ragged: bool) -> None:
    packing = _pack(LENGTHS if ragged else np.ones(NUM, np.int64), aligned=False)
    tensors = [
        {"name": "prompt_embeds", "shape": [2, WIDTH], "dtype": "bfloat16"},
        {"name": "mask", "shape": [5], "dtype": "uint8"},
    ]
    identity = {
        **{"pipeline": "P", "files": {}, "cleaners": [], "dtype": "float32", "max_length": 64},
        **{"layers": [1, 2], "rows": "prompt_embeds", "ragged": ragged, "tensors": tensors},
        **_texts_identity(),
    }
    manifest = _manifest(ConditioningStore, identity, packing)
    captions = _captions(CONDITIONING_CAPTIONS_SCHEMA, packing)
    store = ConditioningStore.create(path, manifest, captions, _samples())
    shapes = {"prompt_embeds": (2, WIDTH, np.dtype("<u2")), "mask": (5, np.dtype("u1"))}
    _fill(store, packing, lambda _shard: shapes, np.random.default_rng(0))


def _make_latents(path: Path, *, with_buckets: bool) -> None:
    bucket = (np.arange(NUM) * 2 // NUM if with_buckets else np.zeros(NUM)).astype(np.int32)
    packing = _pack(np.ones(NUM, np.int64), aligned=False, breaks=[NUM // 2] * with_buckets)
    shapes = [(2, 4, 4), (2, 2, 8)]
    buckets = [{"height": h * 8, "width": w * 8, "shape": [c, h, w]} for c, h, w in shapes]
    identity = {
        **{"vae": "AutoencoderKL", "files": {}, "shape": shapes[0], "dtype": "float16"},
        **{"buckets": buckets if with_buckets else [], "scale": 0.5, "shift": [0.1, 0.2]},
        **{"deviation": not with_buckets, "images": "images", "samples": _samples_identity()},
    }
    manifest = _manifest(LatentStore, identity, packing)
    columns = [range(NUM), [None] * NUM, ["0" * 64] * NUM, packing.row_start, bucket]
    store = LatentStore.create(path, manifest, _table(LATENT_SAMPLES_SCHEMA, columns))

    def arrays(shard: int) -> dict[str, tuple[Any, ...]]:
        number = int(bucket[packing.entries(shard).start])
        return {name: (*shapes[number], np.dtype("<f2")) for name in store.names(number)}

    _fill(store, packing, arrays, np.random.default_rng(0))


def _pack(num_rows: np.ndarray, *, aligned: bool, breaks: Any = ()) -> Packing:
    return pack(
        num_rows,
        bytes_per_row=16,
        shard_bytes=1024 if num_rows.max() > 1 else 256,
        batch_tokens=64,
        rows_per_chunk=8,
        aligned=aligned,
        breaks=breaks,
    )


def _manifest(kind: type[Store[Any]], identity: Any, packing: Packing, **more: Any) -> Any:
    provenance = {"source": "captions.csv", "model": "tiny", "created": "now", "versions": {}}
    document = {"status": "extracting", "identity": identity, "provenance": provenance, **more}
    return kind.manifest_type.model_validate({**document, "layout": packing.layout.model_dump()})


def _texts_identity() -> dict[str, Any]:
    captions = {"num_captions": NUM, "fingerprint": fingerprint(TEXTS), "seed": 0}
    return {"captions": captions, "samples": _samples_identity()}


def _samples_identity() -> dict[str, Any]:
    return {"num_samples": NUM, "fingerprint": fingerprint([[text] for text in TEXTS[::-1]])}


def _table(schema: pa.Schema, columns: Any) -> pa.Table:
    arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _captions(schema: pa.Schema, packing: Packing) -> pa.Table:
    columns = {
        "caption_id": range(NUM),
        "text": TEXTS,
        "token_ids": [list(range(num)) for num in LENGTHS],
        "num_tokens": LENGTHS,
        "num_cut_tokens": np.zeros(NUM, int),
        "shard": packing.shard,
        "row_start": packing.row_start,
        "row_stop": packing.row_start + packing.num_rows,
    }
    return _table(schema, [columns[name] for name in schema.names])


def _samples() -> pa.Table:
    ids = [[number] for number in reversed(range(NUM))]
    return _table(SAMPLES_SCHEMA, [range(NUM), ids, [None] * NUM])


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return rng.uniform(0.5, 1, shape).astype(dtype)
    largest = {"u1": 256, "i1": 128}.get(dtype.str[1:], 0x3F00)
    return rng.integers(1, largest, shape).astype(dtype)


def _fill(
    store: Any,
    packing: Packing,
    arrays: Callable[[int], Mapping[str, tuple[Any, ...]]],
    rng: np.random.Generator,
) -> None:
    """Write random numbers into all shards. Args: arrays: shard -> shape of a row, and dtype."""
    layout = store.manifest.layout
    for shard in range(layout.num_shards):
        entries = packing.entries(shard)
        part = slice(entries.start, entries.stop)
        rows = [
            np.arange(start, start + num)
            for start, num in zip(packing.row_start[part], packing.num_rows[part], strict=True)
        ]
        used = np.concatenate(rows) - shard * layout.rows_per_shard
        codes = {}
        for name, (*shape, dtype) in arrays(shard).items():
            codes[name] = np.zeros((layout.rows_per_shard, *shape), dtype)
            codes[name][used] = _random(rng, (len(used), *shape), dtype)
        receipt = Receipt(
            shard=shard,
            num_rows=len(used),
            num_entries=len(entries),
            files=store.write_shard(shard, codes),
            codec_error={},
            warnings=[],
            seconds={},
            worker="none",
        )
        store.write_receipt(receipt)
    store.finish()


# ------------------------------------------------------------------------------------------ forging


def seal(store: Path) -> None:
    """Make checksums and receipts agree with the files that are there, as far as they can be
    read."""
    digests = {}
    for file in store.rglob("*"):
        if file.is_file() and not file.is_symlink():
            name = file.relative_to(store).as_posix()
            size = file.stat().st_size
            content = b"" if size > _LARGEST else file.read_bytes()
            digests[name] = (size, hashlib.sha256(content).hexdigest())
    document = read(store, "checksums.json")
    if isinstance(document, dict) and isinstance(document.get("files"), dict):
        document["manifest"] = _digest_manifest(store)
        document["files"] |= {n: digests[n][1] for n in document["files"] if n in digests}
        write(store, "checksums.json", document)
    for file in (store / "receipts").glob("*.json"):
        name = file.relative_to(store).as_posix()
        receipt = read(store, name)
        if not isinstance(receipt, dict) or not isinstance(receipt.get("files"), dict):
            continue
        for each, entry in receipt["files"].items():
            if each in digests and isinstance(entry, dict):
                entry["num_bytes"], entry["sha256"] = digests[each]
        receipt["sha256"] = ""
        receipt["sha256"] = hashlib.sha256(_render(receipt).encode()).hexdigest()
        write(store, name, receipt)


def _digest_manifest(store: Path) -> str:
    document = read(store, "manifest.json")
    for kind in (FeatureManifest, LatentManifest, ConditioningManifest):
        try:
            return digest(kind.model_validate(document).unfinished(), early=True)
        except (ValueError, AttributeError):
            continue
    return "0"


def read(store: Path, name: str) -> Any:
    """A JSON document; None if it cannot be read."""
    file = store / name
    try:
        return json.loads(file.read_text()) if file.is_file() else None  # a pipe would wait
    except (OSError, ValueError, RecursionError):
        return None


def _render(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def write(store: Path, name: str, document: Any) -> None:
    """Write a JSON document as semroute does."""
    (store / name).write_text(_render(document))


def edit(store: Path, name: str, path: str, value: Any) -> None:
    """Set a value of a JSON document by its dotted key; list places are numbers."""
    document = read(store, name)
    place = document
    *parents, last = path.split(".")
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[int(last) if isinstance(place, list) else last] = value
    write(store, name, document)


def column(store: Path, table: str, name: str, change: Callable[[list[Any]], None]) -> None:
    """Change the values of a column in place."""
    found = pq.read_table(store / table)
    values = found[name].to_pylist()
    change(values)
    index = found.schema.get_field_index(name)
    field = found.schema.field(name)
    pq.write_table(found.set_column(index, field, pa.array(values, field.type)), store / table)


def shards(store: Path) -> list[Path]:
    """Files of shards."""
    found = store.glob("*.zarr/*/c/*/**/0")
    return sorted(f for f in found if f.is_file() and not {"parameters", "layer"} & {*f.parts})


def num_chunks(store: Path) -> int:
    """Chunks of a shard, as the layout says."""
    layout = read(store, "manifest.json")["layout"]
    return int(layout["rows_per_shard"] // layout["rows_per_chunk"])


def index_of(store: Path, file: Path) -> np.ndarray:
    """The index of a shard, uint64 ``[chunks, 2]``: offset and size."""
    content = file.read_bytes()[-16 * num_chunks(store) - 4 : -4]
    return np.frombuffer(content, "<u8").reshape(-1, 2).copy()


def put_index(store: Path, file: Path, index: np.ndarray, chunks: bytes | None = None) -> None:
    """Replace the index of a shard, and perhaps its chunks, with the right checksum."""
    content = index.astype("<u8").tobytes()
    crc = struct.pack("<I", google_crc32c.value(content))
    before = file.read_bytes()[: -16 * num_chunks(store) - 4] if chunks is None else chunks
    file.write_bytes(before + content + crc)


def put_chunk(store: Path, file: Path, coded: bytes) -> None:
    """Replace the first stored chunk of a shard, with the right checksums."""
    index = index_of(store, file)
    chunks = file.read_bytes()[: -16 * len(index) - 4]
    number = int(np.flatnonzero(index[:, 0] < 2**63)[0])
    index[number] = len(chunks), len(coded) + 4
    put_index(store, file, index, chunks + coded + struct.pack("<I", google_crc32c.value(coded)))
