"""Random forgeries of stores: fields and files flipped, cut, renumbered, exchanged, relinked."""

import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from attacked import INPUTS, RUN, Attacked
from tiny_stores import index_of, put_chunk, put_index, read, seal, shards, write

NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 8, 100, 10**6, 10**12, 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 10**30, -(2**31), -(2**63), 0.5, -0.0, 1e300, float("nan")),
    float("inf"),
)
VALUES = (
    *("", "x", "../../outside/precious.txt", "/etc/passwd", "\x1b[31m", "a" * 10_000, "0" * 64),
    *(None, True, False, [], {}, [[]], [None], {"": ""}, "uint8", "float32", "lossless", "bf16"),
)
Change = Callable[[random.Random, Path], str]


def flip(rng: random.Random, store: Path) -> str:
    """Flip a bit of a file."""
    file, content = _content(rng, store)
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"byte {place} of {_name(store, file)}"


def cut(rng: random.Random, store: Path) -> str:
    """Cut a file, or write more to its end."""
    file, content = _content(rng, store)
    size = rng.choice((0, 1, len(content) // 2, len(content) - 1, len(content) + 1, 2**20))
    file.write_bytes(bytes(content[:size]).ljust(size, b"\0"))
    return f"{size} of {len(content)} bytes of {_name(store, file)}"


def exchange(rng: random.Random, store: Path) -> str:
    """Put a file in the place of another."""
    (file, _), (other, content) = _content(rng, store), _content(rng, store)
    file.write_bytes(content)
    return f"{_name(store, other)} in the place of {_name(store, file)}"


def relink(rng: random.Random, store: Path) -> str:
    """Put something else in the place of a file or folder, or add it."""
    places = [place for place in sorted(store.rglob("*")) if place.exists()]
    place = rng.choice(places)
    what = rng.choice(("gone", "link", "link-in", "zeros", "pipe", "folder", "dangling", "more"))
    target = store.parent / "outside" / "target"
    if what == "more":
        place = place.with_name(
            rng.choice(("x.partial", "manifest.json.tmp", "growing", "\x1b[0m"))
        )
        place.symlink_to(store.parent / "outside" / "precious.txt")
        return f"a link {place.name!r} beside"
    name = _name(store, place)
    if what.startswith("link"):
        place.rename(target if what == "link" else store / "moved")
        place.symlink_to(target if what == "link" else store / "moved")
    else:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        if what == "pipe":
            os.mkfifo(place)
        elif what == "folder":
            place.mkdir()
        elif what != "gone":
            place.symlink_to("/dev/zero" if what == "zeros" else store.parent / "nothing")
    return f"{what} in the place of {name}"


def renumber(rng: random.Random, store: Path) -> str:
    """Change, add or remove a value of a JSON document."""
    documents = [_name(store, f) for f in sorted(store.rglob("*.json")) if _is_plain(f)]
    name = rng.choice(documents)
    document = read(store, name)
    places = [*_leaves(document, ())]
    if not places:
        return "nothing"
    path, parent, key = rng.choice(places)
    before = parent[key]
    what = rng.choice(("number", "number", "near", "value", "gone"))
    if what == "gone":
        del parent[key]
    elif what == "near" and isinstance(before, (int, float)):
        parent[key] = before + rng.choice((-2, -1, 1, 2, before))
    else:
        parent[key] = rng.choice(NUMBERS if what == "number" else VALUES)
    write(store, name, document)
    after = "nothing" if what == "gone" else parent[key]
    return f"{name}: {'.'.join(map(str, path))}: {str(before)[:40]!r} is {str(after)[:40]!r}"


def retable(rng: random.Random, store: Path) -> str:
    """Change values, type or place of a column, or the rows of a table."""
    name = rng.choice([_name(store, f) for f in sorted(store.glob("*.parquet")) if _is_plain(f)])
    table = pq.read_table(store / name)
    place = rng.randrange(table.num_columns)
    column = table.column_names[place]
    what = rng.choice(
        ("value", "value", "value", "two", "type", "gone", "rows", "null", "shuffled")
    )
    values = table.column(place).to_pylist()
    if what == "gone":
        table = table.drop_columns(column)
    elif what == "rows":
        table = rng.choice((table.slice(1), table.slice(0, 0), pa.concat_tables([table, table])))
    elif what == "type":
        kind = rng.choice((pa.int8(), pa.float64(), pa.string(), pa.large_string(), pa.binary()))
        table = table.set_column(place, column, _cast(table.column(place), kind))
    else:
        row = rng.randrange(len(values))
        if what == "null":
            values[row] = None
        elif what == "shuffled":
            rng.shuffle(values)
        else:
            for _ in range(2 if what == "two" else 1):
                row = rng.randrange(len(values))
                values[row] = _value(rng, values[row])
        table = table.set_column(place, column, _array(values, table.schema.field(place).type))
    pq.write_table(table, store / name)
    return f"{name}: {column} {what}"


def reindex(rng: random.Random, store: Path) -> str:
    """Change where a chunk is said to lie, or its bytes, with the right checksums."""
    files = [file for file in shards(store) if _is_plain(file)]
    file = rng.choice(files)
    if rng.random() < 0.3:
        content = rng.choice(
            (
                bytes(rng.randrange(200)),
                zstandard.ZstdCompressor().compress(bytes(rng.choice((0, 1, 100, 10**6, 10**8)))),
                rng.randbytes(rng.randrange(1, 2000)),
            )
        )
        put_chunk(store, file, content)
        return f"a chunk of {len(content)} bytes in {_name(store, file)}"
    index = index_of(store, file)
    place = rng.randrange(index.size)
    before = int(index.flat[place])
    near = [(before + step) % 2**64 for step in (-1, 1, 4, 100, before, 2**32, 2**63)]
    index.flat[place] = rng.choice([*near, 0, 2**64 - 1, 2**64 - 2, 2**63, 2**40])
    what = f"index of {_name(store, file)}: {before} is {index.flat[place]}"
    if rng.random() < 0.2:
        np.random.default_rng(rng.randrange(1000)).shuffle(index)
        what += ", and its chunks are in the place of others"
    put_index(store, file, index)
    return what


CHANGES: tuple[Change, ...] = (flip, cut, exchange, relink, renumber, retable, reindex)
WEIGHTS = (2, 1, 1, 2, 5, 4, 3)


def _change(rng: random.Random, store: Path) -> str:
    change = rng.choices(CHANGES, WEIGHTS)[0]
    try:
        return change(rng, store)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, pa.ArrowException):
        return f"no {change.__name__}"  # an earlier change left nothing to change


class Fuzz:
    """Forges stores and uses them.

    Args:
        stores: by kind; not to be changed.
        attacked: uses them.
        folder: to forge in.
    """

    def __init__(self, stores: Mapping[str, Path], attacked: Attacked, folder: Path) -> None:
        self.stores, self.attacked, self.folder = stores, attacked, folder
        self.whole = {  # the first of a kind imports what it needs
            kind: attacked.use(kind, path, 600.0)["read"] for kind, path in stores.items()
        }

    def run(self, number: int, seed: int) -> dict[str, Any]:
        """One forgery: ``fault`` says what went wrong, if something did."""
        rng = random.Random(f"{seed} {number}")
        kind = rng.choice([*self.stores])
        shutil.rmtree(self.folder, ignore_errors=True)
        store = shutil.copytree(self.stores[kind], self.folder / "store")
        outside = self.folder / "outside"
        outside.mkdir()
        (outside / "precious.txt").write_text("mine")
        what = [_change(rng, store) for _ in range(rng.choice((1, 1, 1, 2)))]
        sealed = rng.random() < 0.8
        if sealed and kind not in INPUTS:
            seal(store)
        before = _snapshot(outside)
        outcome = self.attacked.use(kind, store)
        changed = _snapshot(store) != _snapshot(self.stores[kind])
        exchanged = any("/c/" in each and " in the place of " in each for each in what)
        fault = judge(
            outcome,
            self.whole[kind],
            unsealed=changed and not sealed and kind not in (RUN, *INPUTS),
            exchanged=exchanged,
        )
        if _snapshot(outside) != before:
            fault = f"{fault or ''} files outside changed"
        refused = "error" in outcome.get("read", {})
        shutil.rmtree(self.folder, ignore_errors=True)
        return {
            **{"number": number, "kind": kind, "what": what, "sealed": sealed, "fault": fault},
            "outcome": "faulty" if fault else "refused" if refused else "read",
            "message": outcome.get("read", {}).get("message", ""),
            "seconds": outcome.get("seconds", 0.0),
            "megabytes": outcome.get("megabytes", 0.0),
        }


def judge(
    outcome: Mapping[str, Any], whole: Mapping[str, Any], *, unsealed: bool, exchanged: bool = False
) -> str | None:
    """What is wrong with what came of a forgery.

    Args:
        whole: what reading the store gave before it was forged.
        unsealed: bytes are not those of the checksums, which must be noticed. Of others, the
            numbers are whatever is stored.
        exchanged: a whole shard may be in the place of another, or a chunk in that of another of
            its shard. Chunks agree with their own checksums, so only verify must notice.
    """
    if "died" in outcome:
        return f"died of {outcome['died']}"
    for step in ("read", "inspect", "verify"):
        if outcome[step].get("error", "InputError") != "InputError":
            return f"{step}: {outcome[step]['error']}: {outcome[step]['message']}"
    if outcome["megabytes"] > 1000 or outcome["seconds"] > 10:
        return f"{outcome['megabytes']:.0f} MB, {outcome['seconds']:.1f} s"
    numbers = outcome["read"].get("found", whole["found"])
    if unsealed and not exchanged and numbers != whole["found"]:
        return "read other numbers than were written"
    if unsealed and not outcome["verify"].get("found", "an error"):
        return "verify finds nothing"
    return None


def _content(rng: random.Random, store: Path) -> tuple[Path, bytearray]:
    files = [file for file in sorted(store.rglob("*")) if _is_plain(file) and file.stat().st_size]
    file = rng.choice(files)
    return file, bytearray(file.read_bytes())


def _is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


def _name(store: Path, file: Path) -> str:
    return file.relative_to(store).as_posix()


def _leaves(document: Any, path: tuple[Any, ...]) -> Any:
    """Path of every value, and the object or list with its key there."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield (*path, key), document, key
        yield from _leaves(value, (*path, key))


def _value(rng: random.Random, before: Any) -> Any:
    if isinstance(before, list):
        return rng.choice(([], before * 2, before[1:], [-1], [2**31 - 1]))
    if isinstance(before, int):
        return rng.choice((before + 1, before - 1, before * 2, -before, *(-1, 0, 2**31 - 1, 10**6)))
    return rng.choice(("", "x", "\x1b[31m", "../x"))


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, OverflowError):
        return pa.array([None] * len(values), kind)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(kind, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(column), kind)


def _snapshot(folder: Path) -> dict[str, Any]:
    """All that is under a folder, by relative path: bytes of files, kinds of others."""
    return {
        _name(folder, file): file.read_bytes() if _is_plain(file) else file.lstat().st_mode
        for file in sorted(folder.rglob("*"))
        if file.is_symlink() or not file.is_dir()
    }
