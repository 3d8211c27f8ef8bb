"""Open every array of feature stores with other Zarr implementations, and compare what they read.

    pip install tensorstore xarray zarrs
    npm install --prefix node zarrita
    python benchmarks/interop.py --zarrita node features features-delta ...

A reader that is not installed is listed as such. Exits with 1 if one differs.
"""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import zarr

ROWS = 64
SCRIPT = """
import * as zarr from "zarrita";
import { FileSystemStore } from "@zarrita/storage";
import { createHash } from "node:crypto";
const [folder, rows] = process.argv.slice(2);
const array = await zarr.open(new FileSystemStore(folder), { kind: "array" });
const all = array.shape.slice(1).map(() => null);
const range = zarr.slice(0, Math.min(Number(rows), array.shape[0]));
const { data, shape, stride } = await zarr.get(array, [range, ...all]);
const rowMajor = new data.constructor(data.length);
let place = 0;
const walk = (axis, offset) => {
  if (axis === shape.length) rowMajor[place++] = data[offset];
  else for (let i = 0; i < shape[axis]; i++) walk(axis + 1, offset + i * stride[axis]);
};
walk(0, 0);
const bytes = new Uint8Array(rowMajor.buffer);
console.log(createHash("sha256").update(bytes).digest("hex"));
"""


def read_zarrs(array: Path) -> np.ndarray:
    """zarr-python with the codecs of the zarrs crate."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(array, mode="r")[:ROWS])


def read_tensorstore(array: Path) -> np.ndarray:
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
    opened = tensorstore.open(spec, read=True).result()
    return np.asarray(opened[: min(ROWS, opened.shape[0])].read().result())


def read_xarray(array: Path) -> np.ndarray:
    import xarray

    group = xarray.open_zarr(array.parent, consolidated=False)
    return np.asarray(group[array.name][:ROWS].values)


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def read_zarrita(folder: Path, array: Path) -> str:
    """sha256 of the values that zarrita reads in Node."""
    script = folder / "semroute-interop.mjs"
    script.write_text(SCRIPT)
    command = ["node", str(script), str(array.resolve()), str(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@click.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--zarrita", type=click.Path(exists=True, path_type=Path), help="Folder of npm.")
def main(stores: tuple[Path, ...], zarrita: Path | None) -> None:
    python = {"zarrs": read_zarrs, "tensorstore": read_tensorstore, "xarray": read_xarray}
    print(f"{'array':<40}" + "".join(f"{name:>15}" for name in [*python, "zarrita"]))
    wrong = 0
    for store in stores:
        root = store / "hidden.zarr"
        members = zarr.open_group(root, mode="r").members(max_depth=None)
        for name, array in sorted(members):
            if not isinstance(array, zarr.Array):
                continue
            path, expected = root / name, digest(array[:ROWS])
            row = []
            for library, read in python.items():
                there = importlib.util.find_spec(library) is not None
                row.append(digest(read(path)) if there else None)
            row.append(read_zarrita(zarrita, path) if zarrita else None)
            wrong += sum(found not in (None, expected) for found in row)
            words = {None: "not installed", expected: "equal"}
            line = "".join(f"{words.get(found, 'DIFFERS'):>15}" for found in row)
            print(f"{store.name + '/' + name:<40}{line}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
