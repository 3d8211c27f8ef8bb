"""Time and memory of planning an extraction, by the number of captions.

    python benchmarks/plan.py FOLDER --model LLM --num 100000 --num 1000000

Captions are composed of words at random, each caption once, and written to a Parquet file in
FOLDER. A separate process then does the driver's work in `semroute extract` before the LLM runs:
read, check, deduplicate, order, tokenise, fingerprint, pack, and write all tables and the manifest
of a store. Memory is the peak of that process (VmHWM), beyond that of one that plans a single
caption. Another process opens the store: as training does, which reads the columns that it needs;
or all columns, as `semroute inspect` does.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

PARTS = (
    ["a", "one small", "a very large", "an old", "a broken", "a shiny", "a dusty", "half of a"],
    [
        "red",
        "green",
        "blue",
        "white",
        "black",
        "golden",
        "striped",
        "wooden",
        "glass",
        "paper",
        "plastic",
        "stone",
    ],
    [
        "cup",
        "tree",
        "car",
        "bird",
        "chair",
        "box",
        "clock",
        "dog",
        "lamp",
        "boat",
        "house",
        "violin",
        "kettle",
        "fox",
        "ladder",
    ],
    [
        "beside",
        "behind",
        "in front of",
        "far above",
        "under",
        "leaning on",
        "reflected in",
        "painted on",
    ],
    [
        "a",
        "another",
        "the last",
        "an ornate",
        "an unfinished",
        "a half-open",
        "a frozen",
        "a floating",
    ],
    [
        "door",
        "river",
        "table",
        "mirror",
        "window",
        "mountain",
        "piano",
        "garden",
        "bridge",
        "suitcase",
        "wall",
    ],
    ["at dawn", "at night", "in the rain", "in thick fog", "under neon light", "in bright sun"],
    ["as an oil painting", "as a photograph", "in watercolour", "as a pencil sketch", "on film"],
)


def write_captions(path: Path, num: int) -> None:
    """Write unique captions, in no order, 65,536 at a time."""
    most = int(np.prod([len(words) for words in PARTS]))
    if num > most:
        raise click.BadParameter(f"{num}; the words give {most:,} captions")
    step = 15_485_863  # prime, so that every caption occurs once
    schema = pa.schema([("text", pa.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, num, 65_536):
            number = np.arange(first, min(first + 65_536, num)) * step % most
            columns = []
            for words in PARTS:
                columns.append(pa.array(words).take(pa.array(number % len(words))))
                number //= len(words)
            writer.write_table(pa.table([pc.binary_join_element_wise(*columns, " ")], schema))


def plan(captions: Path, store: Path, model: str) -> dict[str, float]:
    """Do all the work before the LLM runs; return seconds by part, and the peak in bytes."""
    from semroute.pipeline.codecs.registry import CODECS
    from semroute.pipeline.extraction.driver import provenance
    from semroute.pipeline.extraction.plan import make_plan
    from semroute.pipeline.extraction.requests import CaptionsRequest
    from semroute.pipeline.store.features import FeatureStore
    from semroute.pipeline.store.layout import pack
    from semroute.schemas import Codec, FeatureManifest

    shutil.rmtree(store, ignore_errors=True)
    found: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        started, cpu = time.perf_counter(), time.process_time()
        yield
        found[part] = time.perf_counter() - started
        found[f"{part} cpu"] = time.process_time() - cpu

    with timed("read, order, tokenise"):
        made = make_plan(CaptionsRequest(source=str(captions), model=model))
    with timed("pack"):
        width = made.identity.model.width
        packing = pack(
            made.captions.num_tokens,
            bytes_per_row=2 * len(made.identity.layers) * width,
            shard_bytes=256_000_000,
            batch_tokens=512,
            aligned=CODECS["delta"].aligned,
        )
    with timed("write tables and manifest"):
        manifest = FeatureManifest(
            status="extracting",
            identity=made.identity,
            layout=packing.layout,
            codec=Codec(name="bf16"),
            provenance=provenance(str(captions), model),
        )
        FeatureStore.create(store, manifest, made.captions_reader(packing), made.samples_table())
    found["captions"] = len(made.captions)
    found["tokens"] = int(made.captions.sequence_lengths.sum())
    found["shards"] = packing.layout.num_shards
    found["peak"] = memory("VmHWM")
    return found


def memory(kind: str) -> int:
    """Resident memory of this process in bytes (VmRSS), or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def open_tables(store: Path, columns: str) -> dict[str, float]:
    """Open a store: seconds, elapsed and of CPU time; bytes at the peak and afterwards, beyond
    those of before."""
    from semroute.pipeline.store.features import FeatureStore

    before, started, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    features = FeatureStore.open(store, complete=False)
    if columns == "all":
        features.check_tables()
    features.row_spans([0])
    _ = features.first_captions
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    held, peak = (memory(kind) - before for kind in ("VmRSS", "VmHWM"))
    return {"seconds": seconds, "cpu": cpu, "held": held, "peak": peak}


def run(store: Path, model: str, *options: str) -> dict[str, float]:
    """A measurement in a process of its own."""
    # A progress bar is not part of the measurement, and would clutter the output.
    done = subprocess.run(
        [sys.executable, __file__, str(store), "--model", model, *options],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True)
@click.option("--num", multiple=True, type=int, default=(100_000, 1_000_000), show_default=True)
@click.option("--one", type=click.Path(path_type=Path), hidden=True)
@click.option("--columns", hidden=True)
def main(
    folder: Path, model: str, num: tuple[int, ...], one: Path | None, columns: str | None
) -> None:
    """Plan once for each number of captions."""
    if one is not None:
        click.echo(json.dumps(plan(one, folder, model)))
        return
    if columns is not None:
        click.echo(json.dumps(open_tables(folder, columns)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows, opened = [], []
    for count in (1, *num):
        captions = folder / f"{count}.parquet"
        write_captions(captions, count)
        store = folder / f"store-{count}"
        rows.append(run(store, model, "--one", str(captions)))
        for columns in ("needed", "all"):
            found = run(store, model, "--columns", columns)
            cells = [f"{count:,}", columns, f"{found['seconds']:.1f}", f"{found['cpu']:.1f}"]
            cells += [f"{found[key] / 1e6:,.0f}" for key in ("held", "peak")]
            opened.append(f"| {' | '.join(cells)} |")
        shutil.rmtree(store)
    bare = rows[0]["peak"]
    parts = [key for key in rows[0] if f"{key} cpu" in rows[0]]
    click.echo("| captions | tokens | " + " | ".join(f"{part}, s" for part in parts), nl=False)
    click.echo(" | CPU, s | memory, MB | bytes per caption |")
    click.echo("| --: " * (len(parts) + 5) + "|")
    for row in rows[1:]:
        beyond = row["peak"] - bare
        cells = [f"{row['captions']:,}", f"{row['tokens']:,}"]
        cells += [f"{row[part]:.1f}" for part in parts]
        cells += [f"{sum(row[f'{part} cpu'] for part in parts):.1f}", f"{beyond / 1e6:,.0f}"]
        click.echo("| " + " | ".join([*cells, f"{beyond / row['captions']:,.0f}"]) + " |")
    click.echo(f"\nWith one caption the process takes {bare / 1e6:,.0f} MB, most of it libraries.")
    click.echo(
        "\n| captions | columns | open, s | CPU, s | held, MB | peak, MB |\n| --: | --- "
        + "| --: " * 4
        + "|"
    )
    click.echo("\n".join(opened[2:]))


if __name__ == "__main__":
    main()
