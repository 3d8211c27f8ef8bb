"""Changes after which a store lies, leads outside or would burst; and what must come of them."""

import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tiny_stores import (
    KINDS,
    NUM,
    WIDTH,
    column,
    edit,
    index_of,
    put_chunk,
    put_index,
    read,
    seal,
    shards,
    write,
)

FEATURES = ("bf16", "lossless", "delta", "linear", "predictive", "exact", "mixes")
LATENTS = ("latents", "buckets")
CONDITIONING = ("ragged", "padded")
CAPTIONS = (*FEATURES, *CONDITIONING)
GZIP = {"name": "gzip", "configuration": {"level": 5}}
FITTED = ("lossless", "delta", "linear", "predictive", "exact")


@dataclass(frozen=True)
class Forgery:
    """A change of a store.

    Attributes:
        kinds: of stores that it can be made of.
        file: that messages must name.
        by: steps that must refuse it.
        sealed: whether checksums and receipts agree with it.
    """

    name: str
    change: Callable[[Path], None]
    kinds: tuple[str, ...]
    file: str
    by: tuple[str, ...] = ("read", "verify")
    sealed: bool = True


def table(change, *, file="captions.parquet", kinds=CAPTIONS, name, of, by=("read", "verify")):
    return Forgery(name, lambda store: column(store, file, of, change), kinds, file, by)


def put(place, value):
    def change(values):
        values[place] = value(values[place]) if callable(value) else value

    return change


def swap(values):
    values[2], values[5] = values[5], values[2]


UNREAD = ("verify",)
"""Steps that refuse what reading features never looks at: texts and tokens."""
TABLES = [
    table(put(5, lambda stop: stop - 30), name="rows-backwards", of="row_stop"),
    table(put(0, -8), name="rows-negative", of="row_start"),
    table(put(-1, 10**9), name="rows-beyond", of="row_stop"),
    table(put(-1, 2**63 - 1), name="rows-overflow", of="row_stop"),
    table(put(0, lambda stop: stop + 200), name="rows-across-shards", of="row_stop"),
    table(put(3, lambda start: start - 1), name="rows-overlap", of="row_start"),
    table(put(-1, lambda stop: stop - 1), name="rows-too-few", of="row_stop"),
    table(swap, name="rows-exchanged", of="row_start"),
    table(put(5, 10**6), name="shard-beyond", of="shard"),
    table(put(5, -1), name="shard-negative", of="shard"),
    table(put(5, -(2**31)), name="shard-lowest", of="shard"),
    table(put(0, 1), name="shard-first", of="shard"),
    table(put(-1, lambda shard: shard + 1), name="shard-more", of="shard"),
    table(swap, name="ids-exchanged", of="caption_id"),
    table(put(4, lambda ids: ids * 2), name="tokens-more", of="token_ids", kinds=("ragged",)),
    table(
        put(4, lambda ids: ids * 2),
        **{"name": "tokens-listed", "of": "token_ids", "kinds": FEATURES, "by": UNREAD},
    ),
    table(put(4, lambda num: num + 1), name="tokens-counted", of="num_tokens", kinds=FEATURES),
    table(put(4, -1), name="cut-negative", of="num_cut_tokens", kinds=FEATURES, by=UNREAD),
    *(
        table(put(4, value), name=f"sample-{name}", of=of, kinds=kinds, file="samples.parquet")
        for name, of, value, kinds in (
            ("caption-beyond", "caption_ids", [NUM], CAPTIONS),
            ("caption-negative", "caption_ids", [-1], CAPTIONS),
            ("caption-none", "caption_ids", [], CAPTIONS),
            ("id", "sample_id", 3, KINDS),
            ("row-beyond", "row", 10**9, LATENTS),
            ("row-negative", "row", -1, LATENTS),
            ("row-lowest", "row", -(2**63), LATENTS),
            ("row-twice", "row", 3, LATENTS),
            ("bucket-beyond", "bucket", 7, LATENTS),
            ("bucket-negative", "bucket", -1, LATENTS),
            ("bucket-other", "bucket", 1, ("buckets",)),
        )
    ),
]


def tables_otherwise(change, name, by=("read", "verify")):
    """The same change of the columns of the table of entries, of every kind of store."""

    def apply(store):
        kind = read(store, "manifest.json")["format"]
        file = "samples.parquet" if kind == "semroute.latents" else "captions.parquet"
        pq.write_table(change(pq.read_table(store / file)), store / file)

    return [
        Forgery(name, apply, kinds, file, by)
        for kinds, file in ((CAPTIONS, "captions.parquet"), (LATENTS, "samples.parquet"))
    ]


def with_column(found, place, values):
    return found.set_column(place, found.column_names[place], values)


def missing_value(found):
    values = found.column(0).to_pylist()
    return with_column(found, 0, pa.array([None, *values[1:]], pa.int64()))


TABLES += [
    *tables_otherwise(lambda t: t.slice(1), "rows-fewer"),
    *tables_otherwise(lambda t: pa.concat_tables([t, t.slice(3, 1)]), "rows-more"),
    *tables_otherwise(lambda t: t.drop_columns(t.column_names[0]), "column-gone"),
    *tables_otherwise(lambda t: t.append_column(t.column_names[0], t.column(0)), "column-twice"),
    *tables_otherwise(missing_value, "value-missing"),
    *tables_otherwise(lambda t: with_column(t, 0, t.column(0).cast("float64")), "numbers-float"),
    *tables_otherwise(lambda t: with_column(t, 0, t.column(0).cast("string")), "numbers-text"),
    *tables_otherwise(lambda t: with_column(t, 0, t.column(0).cast("int8")), "numbers-narrow"),
]


def manifest(name, path, value, kinds=KINDS, *, file="manifest.json"):
    return Forgery(name, lambda store: edit(store, "manifest.json", path, value), kinds, file)


MANIFESTS = [
    *(
        manifest(f"{path}-{value:.0e}", f"layout.{path}", value, file="")
        for path, value in product(
            ("num_shards", "rows_per_shard", "rows_per_chunk", "num_rows"),
            (-1, 0, 1, 7, 10**5, 10**12, 2**62, 2**64, 10**30),
        )
    ),
    *(
        manifest(f"captions-{num:.0e}", "identity.captions.num_captions", num, CAPTIONS, file="")
        for num in (1, NUM - 1, 10**12)
    ),
    manifest("samples-many", "identity.samples.num_samples", 10**12, file=""),
    manifest("width-other", "identity.model.width", WIDTH + 8, FEATURES, file="zarr.json"),
    manifest("width-bomb", "identity.model.width", 10**9, FEATURES, file="zarr.json"),
    manifest("layers-fewer", "identity.layers", [1, 2], FEATURES, file=""),
    manifest("layers-descend", "identity.layers", [3, 2, 1], FEATURES),
    manifest("layers-twice", "identity.layers", [1, 2, 2], FEATURES),
    manifest("layers-beyond", "identity.layers", [1, 2, 9], FEATURES),
    manifest("codec-other", "codec.name", "lossless", ("bf16", "mixes", "delta"), file=""),
    manifest("codec-bits", "codec.code_bits", 4, ("delta",), file="zarr.json"),
    manifest("rank-other", "codec.rank", 2, ("predictive",), file="zarr.json"),
    manifest("rank-width", "codec.rank", WIDTH, ("predictive",)),
    manifest("rank-bomb", "codec.rank", 10**12, ("predictive",)),
    manifest("rank-none", "codec.rank", None, ("predictive",)),
    manifest("rank-of-another", "codec.rank", 3, ("delta", "linear", "bf16")),
    manifest("codec-not-fitted", "codec.fit", None, FITTED),
    manifest("exact-beyond", "codec.exact_layers", [9], ("delta", "exact")),
    manifest("exact-none", "codec.exact_layers", [1], ("delta",), file="zarr.json"),
    manifest("mixes-infinite", "identity.mixes.basis.0.0", 1e400, ("mixes",)),
    manifest("scale-nan", "identity.scale", float("nan"), LATENTS),
    manifest("shift-short", "identity.shift", [1.0, 2.0, 3.0], LATENTS),
    manifest("dropped-beyond", "identity.dropped", [NUM], LATENTS),
    manifest("dropped-descend", "identity.dropped", [5, 4], LATENTS),
    manifest("shape-zero", "identity.shape", [2, 0, 4], ("latents",)),
    manifest("shape-other", "identity.shape", [2, 8, 8], ("latents",), file="zarr.json"),
    manifest("shape-bomb", "identity.shape", [2, 2**20, 2**20], ("latents",), file="zarr.json"),
    manifest("dtype-other", "identity.dtype", "uint8", LATENTS, file="zarr.json"),
    manifest("deviation-none", "identity.deviation", True, ("buckets",), file="zarr.json"),
    manifest("tensor-shape", "identity.tensors.0.shape", [2, 9], CONDITIONING, file="zarr.json"),
    manifest("tensor-zero", "identity.tensors.0.shape", [0, 8], CONDITIONING),
    manifest("tensor-dtype", "identity.tensors.0.dtype", "float32", CONDITIONING, file="zarr.json"),
    manifest("tensor-twice", "identity.tensors.0.name", "mask", CONDITIONING),
    manifest("ragged-not", "identity.ragged", False, ("ragged",), file="captions.parquet"),
]


def arrays_of(store):
    group = next(store.glob("*.zarr"))
    return [p for p in sorted(group.iterdir()) if (p / "c").exists() and p.name != "layer"]


def metadata(name, path, value, kinds=KINDS):
    def change(store):
        file = (arrays_of(store)[0] / "zarr.json").relative_to(store).as_posix()
        edit(store, file, path, value)

    return Forgery(name, change, kinds, "zarr.json")


ARRAYS = [
    metadata("array-longer", "shape.0", 10**15),
    metadata("array-shorter", "shape.0", 8),
    metadata("array-wider", "shape.1", 1000),
    metadata("array-axes", "shape", [64]),
    metadata("array-negative", "shape.0", -64),
    metadata("array-dtype", "data_type", "float64"),
    metadata("array-dtype-known", "data_type", "float32", (*FEATURES, *LATENTS)),
    metadata("array-fill", "fill_value", 1),
    metadata("array-grid", "chunk_grid.configuration.chunk_shape.0", 24),
    metadata("array-chunks", "codecs.0.configuration.chunk_shape.0", 1),
    metadata("array-chunks-wide", "codecs.0.configuration.chunk_shape.1", 10**9),
    metadata("array-gzip", "codecs.0.configuration.codecs.0", GZIP),
    metadata("array-index", "codecs.0.configuration.index_location", "start"),
    metadata("array-no-codecs", "codecs", []),
    metadata("array-keys", "chunk_key_encoding.configuration.separator", "."),
]


def index(name, change):
    def apply(store):
        file = shards(store)[0]
        found = index_of(store, file)
        stored = np.flatnonzero(found[:, 0] < 2**63)
        change(found, stored)
        put_index(store, file, found)

    return Forgery(name, apply, KINDS, "/c/")


def put_size(size):
    def change(found, stored):
        found[stored[0], 1] = size

    return change


def put_offset(offset):
    def change(found, stored):
        found[stored[0], 0] = offset

    return change


def overlap(found, stored):
    found[stored[1], 0] = found[stored[0], 0] + 1


INDEXES = [
    *(
        index(f"offset-{offset:.0e}", put_offset(offset))
        for offset in (2**20, 2**40, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
    ),
    *(
        index(f"size-{size:.0e}", put_size(size))
        for size in (0, 3, 4, 2**20, 2**40, 2**63, 2**64 - 2, 2**64 - 1)
    ),
    index("chunks-overlap", overlap),
]


def chunk(name, make):
    def apply(store):
        put_chunk(store, shards(store)[0], make(store))

    return Forgery(name, apply, KINDS, "/c/")


def zstd_of(num, *, declared=True):
    def make(_store):
        compressor = zstandard.ZstdCompressor(write_content_size=declared)
        if declared:
            return compressor.compress(bytes(num))
        stream = compressor.compressobj()
        return stream.compress(bytes(num)) + stream.flush()

    return make


def declares(size):
    """A frame whose header declares a size, with a few bytes in it."""

    def make(_store):
        return struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + struct.pack("<I", 0x41)[:3] + b"x" * 8

    return make


CHUNKS = [
    chunk("chunk-empty", lambda _store: b""),
    chunk("chunk-noise", lambda _store: bytes(range(256)) * 40),
    chunk("chunk-short", zstd_of(7)),
    chunk("chunk-bomb", zstd_of(400_000_000)),
    chunk("chunk-bomb-quiet", zstd_of(400_000_000, declared=False)),
    chunk("chunk-declares", declares(2**40)),
]


def shard_file(name, change, file="/c/"):
    return Forgery(name, lambda store: change(shards(store)[0]), KINDS, file)


SHARD_FILES = [
    shard_file("shard-gone", Path.unlink),
    shard_file("shard-empty", lambda file: file.write_bytes(b""), file=""),
    shard_file("shard-cut", lambda file: file.write_bytes(file.read_bytes()[:-7])),
    shard_file("shard-sparse", lambda file: os.truncate(file, 2**40)),
]


def outside(store):
    folder = store.parent / "outside"
    folder.mkdir(exist_ok=True)
    return folder


def link(part):
    def change(store):
        place = part(store)
        target = outside(store) / "target"
        place.rename(target)
        place.symlink_to(target)

    return change


def pipe(part):
    def change(store):
        place = part(store)
        place.unlink()
        os.mkfifo(place)

    return change


def folder_there(part):
    def change(store):
        place = part(store)
        place.unlink()
        place.mkdir()

    return change


def zeros(part):
    def change(store):
        place = part(store)
        place.unlink()
        place.symlink_to("/dev/zero")

    return change


def named(name):
    return lambda store: store / name


def first_array(name=""):
    return lambda store: arrays_of(store)[0] / name if name else arrays_of(store)[0]


def entries_table(store):
    is_latent = read(store, "manifest.json")["format"] == "semroute.latents"
    return store / ("samples.parquet" if is_latent else "captions.parquet")


PARTS = {
    "manifest": (named("manifest.json"), ("read", "verify")),
    "checksums": (named("checksums.json"), ("read", "verify")),
    "table": (entries_table, ("read", "verify")),
    "metadata": (first_array("zarr.json"), ("read", "verify")),
    "shard": (lambda store: shards(store)[0], ("read", "verify")),
    "receipt": (named("receipts/shard-000000.json"), ("inspect", "verify")),
}
FOLDERS = {
    "receipts": (named("receipts"), ("inspect", "verify")),
    "group": (lambda store: next(store.glob("*.zarr")), ("read", "verify")),
    "array": (first_array(), ("read", "verify")),
    "shards": (first_array("c"), ("read", "verify")),
    "one-shard": (lambda store: shards(store)[0].parents[1], ("read", "verify")),
}
PLACES = [
    # A folder in the place of a receipt is none, and the shard counts as not written.
    Forgery(f"{what}-{name}", make(part), KINDS, "", by[-1:] if what == "folder" else by, False)
    for name, (part, by) in PARTS.items()
    for what, make in (
        ("link", link),
        ("pipe", pipe),
        ("folder", folder_there),
        ("zeros", zeros),
    )
] + [
    Forgery(f"link-{name}", link(part), KINDS, "", by, sealed=False)
    for name, (part, by) in FOLDERS.items()
]


def checksum_of(name):
    def change(store):
        document = read(store, "checksums.json")
        document["files"][name] = "0" * 64
        write(store, "checksums.json", document)

    return change


def lose_checksums(store):
    (store / "checksums.json").unlink()
    pq.write_table(pq.read_table(store / "samples.parquet"), store / "samples.parquet")


def receipt(name, change):
    def apply(store):
        file = "receipts/shard-000000.json"
        document = read(store, file)
        change(document)
        write(store, file, document)

    return Forgery(name, apply, KINDS, "shard-000000.json", ("inspect", "verify"))


def with_file(name):
    def change(document):
        document["files"][name] = {"num_bytes": 1, "sha256": "0" * 64}

    return change


def rename_file(document):
    document["files"] = {
        name.replace("/c/0/", "/c/1/"): entry for name, entry in document["files"].items()
    }


def set_key(**changes):
    return lambda document: document.update(changes)


DOCUMENTS = [
    *(
        Forgery(f"checksum-of-{number}", checksum_of(name), KINDS, "checksums.json", ("verify",))
        for number, name in enumerate(
            ("../outside/x", "/etc/passwd", "hidden.zarr/parameters/../../../../dev/zero", "mine")
        )
    ),
    Forgery("checksums-lost", lose_checksums, KINDS, "checksums.json"),
    receipt("receipt-outside", with_file("../outside/x")),
    receipt("receipt-absolute", with_file("/etc/passwd")),
    receipt("receipt-unknown", with_file("notes.txt")),
    receipt("receipt-of-another", rename_file),
    receipt("receipt-number", set_key(shard=1)),
    receipt("receipt-none", set_key(files={})),
    receipt("receipt-rows", set_key(num_rows=-1)),
    receipt("receipt-rows-many", set_key(num_rows=2**63)),
    receipt("receipt-entries", set_key(num_entries=0)),
    receipt("receipt-errors", set_key(codec_error={"mean": 0.1})),
    receipt("receipt-layers", set_key(layer_error={"x": 0.1})),
]


def text(name, make):
    """A manifest that is read before anything else."""

    def change(store):
        (store / "manifest.json").write_text(make((store / "manifest.json").read_text()))

    return Forgery(name, change, KINDS, "manifest.json", ("read", "inspect", "verify"))


JSON = [
    text("json-deep", lambda _text: "[" * 200_000),
    text("json-deep-inside", lambda t: t.replace("{", f'{{"x": {"[" * 60}{"]" * 60},', 1)),
    text("json-large", lambda t: t + " " * 33_000_000),
    text("json-lists", lambda _text: "[" + "[]," * 9_000_000 + "[]]"),
    text("json-twice", lambda t: t.replace('"status"', '"status": "complete", "status"')),
    text("json-digits", lambda t: t.replace('"num_rows": ', f'"num_rows": {"9" * 5000}', 1)),
    text("json-cut", lambda t: t[:-9]),
    text("json-surrogate", lambda t: t.replace('"source": "', '"source": "\\ud800', 1)),
]


def parameter(name, change):
    def apply(store):
        folder = next((store / "hidden.zarr" / "parameters").glob("[a-z]*/"))
        change(store, folder)

    return Forgery(name, apply, FITTED, "parameters")


def edit_parameter(path, value):
    def change(store, folder):
        edit(store, (folder / "zarr.json").relative_to(store).as_posix(), path, value)

    return change


def first_chunk(make):
    def change(_store, folder):
        file = sorted(f for f in folder.rglob("c/**/*") if f.is_file())[0]
        file.write_bytes(make(file.read_bytes()))

    return change


PARAMETERS = [
    parameter("fitted-shape", edit_parameter("shape.0", 10**9)),
    parameter("fitted-dtype", edit_parameter("data_type", "float64")),
    parameter("fitted-chunks", edit_parameter("chunk_grid.configuration.chunk_shape.1", 1)),
    parameter("fitted-codecs", edit_parameter("codecs", [GZIP])),
    parameter("fitted-cut", first_chunk(lambda content: content[:-5])),
    parameter("fitted-flipped", first_chunk(lambda content: bytes([content[0] ^ 1]) + content[1:])),
    parameter("fitted-long", first_chunk(lambda content: content * 100_000)),
    Forgery(
        "layer-bomb",
        lambda store: (store / "hidden.zarr/layer/c/0").write_bytes(
            zstandard.ZstdCompressor().compress(bytes(400_000_000))
        ),
        FEATURES,
        "layer",
        ("verify",),
    ),
]


def burst_texts(store):
    """Many captions of a text that is stored once."""
    found = pq.read_table(store / "captions.parquet")
    texts = pa.array(["x" * 12_000_000] * len(found))
    place = found.schema.get_field_index("text")
    pq.write_table(found.set_column(place, "text", texts), store / "captions.parquet")


def burst_tokens(store):
    """A caption of more tokens than fit into memory, all alike."""
    found = pq.read_table(store / "captions.parquet")
    counts = np.zeros(len(found), np.int64)
    counts[3] = 100_000_000
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(counts.sum(), np.int32)))
    place = found.schema.get_field_index("token_ids")
    pq.write_table(found.set_column(place, "token_ids", lists), store / "captions.parquet")


BURSTS = [
    Forgery("burst-texts", burst_texts, ("bf16", "ragged"), "captions.parquet"),
    Forgery("burst-tokens", burst_tokens, ("ragged",), "captions.parquet"),
    Forgery("burst-tokens-unread", burst_tokens, ("bf16",), "captions.parquet", UNREAD),
]

ALL = [
    forgery
    for group in (
        *(TABLES, MANIFESTS, ARRAYS, INDEXES, CHUNKS, SHARD_FILES, PLACES),
        *(DOCUMENTS, JSON, PARAMETERS, BURSTS),
    )
    for forgery in group
]


def forge(forgery, store):
    forgery.change(store)
    if forgery.sealed:
        seal(store)


def check(forgery, outcome):
    """What is wrong with the outcome of using a forged store."""
    if "died" in outcome:
        return f"died of {outcome['died']}"
    for step in ("read", "inspect", "verify"):
        error = outcome[step].get("error", "InputError")
        if error != "InputError":
            return f"{step}: {error}: {outcome[step]['message']}"
    for step in forgery.by:
        said = outcome[step].get("message") or (outcome[step]["found"] if step == "verify" else "")
        if not said:
            return f"{step} refused nothing"
        if forgery.file not in said:
            return f"{step} does not name {forgery.file}: {said}"
    if outcome["megabytes"] > 1000 or outcome["seconds"] > 10:
        return f"{outcome['megabytes']:.0f} MB, {outcome['seconds']:.1f} s"
    return None


def find_faults(forgeries, kind, whole, attacked, folder):
    """Name of a forgery -> what is wrong with what comes of it.

    Args:
        whole: a store, which stays as it is.
        folder: for forged ones.
    """
    found = attacked.use(kind, whole)
    assert "error" not in found["read"], found
    assert found["verify"]["found"] == ""
    faults = {}
    for forgery in forgeries:
        if kind not in forgery.kinds:
            continue
        place = folder / forgery.name
        store = shutil.copytree(whole, place / "store")
        (outside(store) / "precious.txt").write_text("mine")
        forge(forgery, store)
        before = snapshot(outside(store))
        fault = check(forgery, attacked.use(kind, store))
        if snapshot(outside(store)) != before:
            fault = f"{fault}; files outside changed"
        if fault:
            faults[forgery.name] = fault
        shutil.rmtree(place)
    return faults


def snapshot(folder):
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
