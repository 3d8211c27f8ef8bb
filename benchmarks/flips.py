"""Flips every byte of a small store in turn, and checks verification and reading after each.

    semroute extract CAPTIONS features --model LLM --limit 2 --layers 15,30 --codec delta
    python benchmarks/flips.py features

Each byte of each file is changed in a copy, by a set of bits that varies. Then ``verify`` must find
it, and opening the store anew and reading all of it must either be refused or give the numbers of
the intact store. Exits with 1 if a byte was missed.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.verify import verify
from semroute.schemas import InputError

MASKS = (0x01, 0x80, 0x20, 0xFF)


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Everything that a reader gets: hidden states as bits, and captions."""
    store = open_features(path)
    return store.read(range(len(store))).bits, store.captions["text"].to_pylist()


def try_byte(copy: Path, bits: np.ndarray, texts: list[str]) -> Iterator[str]:
    """Outcomes of verifying and of reading a store with one changed byte."""
    yield "found" if verify(copy).problems else "missed"
    try:
        found, captions = read(copy)
    except InputError:
        yield "refused"
    else:
        yield "same" if captions == texts and np.array_equal(found, bits) else "wrong"


def flip_all(source: Path, copy: Path) -> tuple[Counter[str], list[str]]:
    """Flip every byte of a copy in turn; count the outcomes, and list the bad ones."""
    whole = read(copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file())
    counted, bad = Counter(files=len(files)), []
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="byte", desc=source.name) as bar:
        for file in files:
            content = bytearray(file.read_bytes())
            for place in range(len(content)):
                content[place] ^= MASKS[place % len(MASKS)]
                file.write_bytes(content)
                seen = [*try_byte(copy, *whole)]
                counted.update(["bytes", *seen])
                if {"missed", "wrong"} & {*seen}:
                    bad.append(f"{source.name}/{file.relative_to(copy)}, byte {place}: {seen}")
                content[place] ^= MASKS[place % len(MASKS)]
                bar.update()
            file.write_bytes(content)
    assert verify(copy).problems == []
    return counted, bad


@click.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(stores: tuple[Path, ...]) -> None:
    columns = ("files", "bytes", "found", "missed", "refused", "same", "wrong")
    print("| store | files | bytes flipped | found | missed | read: refused | the same | wrong |")
    print("| --- " + "| --: " * len(columns) + "|")
    listed = []
    for source in stores:
        with tempfile.TemporaryDirectory() as folder:
            counted, bad = flip_all(source, Path(shutil.copytree(source, Path(folder) / "store")))
        print("|", " | ".join([source.name, *(f"{counted[name]:,}" for name in columns)]), "|")
        listed += bad
    print("\n".join(listed))
    raise SystemExit(bool(listed))


if __name__ == "__main__":
    main()
