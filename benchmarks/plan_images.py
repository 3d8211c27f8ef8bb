"""Memory and time of planning over Parquet files that hold images.

    python benchmarks/plan_images.py FOLDER --model LLM --num 3000000

Writes ten files of 20 x 20 JPEG and PNG images of noise with captions, as Hugging Face datasets
does, with row groups of 1,000. Separate processes then plan what `semroute extract` and `semroute
latents --vae pixels` would store, without writing tables. Memory is the peak of the process
(VmHWM), beyond that of one that plans over the first row.
"""

import io
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from PIL import Image
from plan import PARTS, memory

NUM_FILES, NUM_DISTINCT, GROUP = 10, 200, 1_000
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("image", IMAGE), ("caption", pa.string())])


def write_images(folder: Path, num: int) -> None:
    """Write rows of an image and a caption, each caption once, and images from a few."""
    rng = np.random.default_rng(0)
    pool = []
    for number in range(NUM_DISTINCT):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(file, ("JPEG", "PNG")[number % 2])
        pool.append(file.getvalue())
    images = pa.array(pool, pa.binary())
    folder.mkdir(parents=True)
    bounds = np.linspace(0, num, NUM_FILES + 1).astype(int)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        path = folder / f"train-{number:05d}-of-{NUM_FILES:05d}.parquet"
        options = {"use_dictionary": False, "compression": "none"}
        with pyarrow.parquet.ParquetWriter(path, SCHEMA, **options) as writer:
            for first in range(start, stop, GROUP):
                rows = np.arange(first, min(first + GROUP, stop))
                names = pa.array(rows).cast(pa.string())
                words = [
                    pa.array(part).take(pa.array(rng.integers(0, len(part), len(rows))))
                    for part in PARTS[:3]
                ]
                image = pa.StructArray.from_arrays(
                    [
                        images.take(pa.array(rows % NUM_DISTINCT)),
                        pc.binary_join_element_wise(names, "png", "."),
                    ],
                    fields=[*IMAGE],
                )
                caption = pc.binary_join_element_wise(*words, "number", names, " ")
                writer.write_table(pa.table([image, caption], SCHEMA))


def plan_captions(source: str, model: str, limit: int | None) -> int:
    """Plan an extraction; the number of samples."""
    from semroute.pipeline.extraction.plan import make_plan
    from semroute.pipeline.extraction.requests import CaptionsRequest

    return len(make_plan(CaptionsRequest(source=source, model=model, limit=limit)).samples)


def plan_images(source: str, _model: str, limit: int | None) -> int:
    """Plan a store of latents; the number of samples."""
    from semroute.pipeline.executor.workers import Workers
    from semroute.pipeline.extraction.latents import plan_latents
    from semroute.pipeline.extraction.requests import LatentsRequest

    request = LatentsRequest(source=source, target=Path("none"), vae="pixels", limit=limit)
    return len(plan_latents(request, None, Workers(have_gpus=False, threads=1), click.echo).samples)


PLANS = {"extract": plan_captions, "latents": plan_images}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True)
@click.option("--num", type=int, default=3_000_000, show_default=True)
@click.option("--only", type=click.Choice([*PLANS]), multiple=True, default=[*PLANS])
@click.option("--one", type=int, hidden=True)
def main(folder: Path, model: str, num: int, only: tuple[str, ...], one: int | None) -> None:
    """Plan both stores."""
    place = folder / str(num)
    if one is not None:
        cpu, started = time.process_time(), time.perf_counter()
        count = PLANS[only[0]](str(place), model, one or None)
        found = [count, memory("VmHWM"), time.process_time() - cpu, time.perf_counter() - started]
        click.echo(json.dumps(found))
        return
    if not place.exists():
        write_images(place, num)
    size = sum(path.stat().st_size for path in place.iterdir())
    click.echo(f"{num:,} images and captions in {NUM_FILES} files, {size / 1e9:.1f} GB\n")
    click.echo("| plan of | samples | memory, MB | bytes per sample | CPU, s | elapsed, s |")
    click.echo("| --- " + "| --: " * 5 + "|")
    for name in only:
        found = []
        for limit in (1, 0):
            command = [sys.executable, __file__, str(folder), "--model", model, "--num", str(num)]
            done = subprocess.run(
                [*command, "--only", name, "--one", str(limit)],
                stdout=subprocess.PIPE,
                check=True,
                env={**os.environ, "TQDM_DISABLE": "1"},
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
        (_, bare, *_), (count, peak, cpu, elapsed) = found
        cells = [name, f"{count:,}", f"{(peak - bare) / 1e6:,.0f}"]
        cells += [f"{(peak - bare) / count:,.0f}", f"{cpu:,.0f}", f"{elapsed:,.0f}"]
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
