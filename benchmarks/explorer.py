"""Times of the explorer's answers, and its picture in README.

    python benchmarks/explorer.py times
    python benchmarks/explorer.py picture demo/run demo/features docs/images/explorer.png

`times` writes a store of 100,000 captions of 30 layers of 576, of which a few shards are there,
into a temporary folder. A time is that of one answer in Python, with its JSON and buffers.
`picture` opens JupyterLab in a headless Chromium.
"""

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

NUM_CAPTIONS, NUM_LAYERS, WIDTH = 100_000, 30, 576
NUM_TIMES = 50


@click.group()
def main() -> None:
    """Times of the explorer's answers, and its picture."""


def make_captions() -> list[str]:
    """Different captions of four words, in random order."""
    words = [f"{a}{b}{c}" for a, b, c in itertools.product("bdfgkl", "aeiou", "nrst")]
    rng = random.Random(0)
    captions: dict[str, None] = {}
    while len(captions) < NUM_CAPTIONS - 1:
        captions[" ".join(rng.choices(words, k=4))] = None
    return [*captions]


def measure(answer: Callable[[], Any]) -> list[float]:
    """Milliseconds of the first answer, and of the median and the slowest of the others."""
    times = []
    for _ in range(NUM_TIMES + 1):
        started = time.perf_counter()
        answer()
        times.append(1000 * (time.perf_counter() - started))
    return [times[0], float(np.median(times[1:])), max(times[1:])]


@main.command()
def times() -> None:
    """Time every question that a widget asks of a large store."""
    from conftest import write_random_store

    from semroute.pipeline.store.open import open_features
    from semroute.trainer.explorer.sides import explore
    from semroute.trainer.explorer.widget import pack_answer

    with tempfile.TemporaryDirectory() as folder:
        samples, path = Path(folder) / "captions.parquet", Path(folder) / "store"
        texts = make_captions()
        images = [{"bytes": b"", "path": "none.png"}] * len(texts)
        pq.write_table(pa.table({"text": texts, "image": images}), samples)
        size = {"num_layers": NUM_LAYERS, "width": WIDTH, "shard_bytes": 256_000_000}
        write_random_store(path, samples, **size, num_shards=3)
        started = time.perf_counter()
        explorer = explore(open_features(path, complete=False))
        opened = time.perf_counter() - started
        (side,) = explorer.sides

        def ask(question: str, **arguments: Any) -> None:
            message, _ = pack_answer(side.answer(question, arguments))
            json.dumps(message)

        ids: Iterator[int] = itertools.cycle(range(1, 400))
        some = itertools.cycle(["bar", "DAN kes", "lit gut fon", "nowhere", ""])
        questions: dict[str, Callable[[], None]] = {
            "search": lambda: ask("search", words=next(some)),
            "find a caption by its text": lambda: ask("find", text=texts[-1 - next(ids)]),
            "tokens by layers": lambda: ask("caption", caption=next(ids)),
            "nearest captions": lambda: ask(
                "nearest", caption=next(ids), layer=1 + next(ids) % NUM_LAYERS, pool="mean"
            ),
            "layers by layers": lambda: ask("similarity"),
        }
        print(f"\n{len(side.features.store):,} captions; opened in {opened:.1f} s\n")
        print(
            "| question | first, ms | median, ms | slowest of 50, ms |\n| --- | --: | --: | --: |"
        )
        for name, answer in questions.items():
            first, median, slowest = measure(answer)
            print(f"| {name} | {first:,.0f} | {median:.1f} | {slowest:.1f} |")


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("features", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def picture(run: Path, features: Path, out: Path) -> None:
    """Show FEATURES beside RUN in JupyterLab, and write the picture OUT."""
    from browser import open_browser, open_page, run_cells, serve_lab, write_notebook
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        places = {"features": features.resolve(), "run": run.resolve()}
        for name, place in places.items():
            (Path(folder) / name).symlink_to(place)
        cells = [
            "import semroute",
            "semroute.explore('features', semroute.load_run('run'), features='features')",
        ]
        write_notebook(Path(folder) / "explorer.ipynb", cells)
        with serve_lab(Path(folder)) as address, open_browser() as browser:
            page = open_page(browser, width=1250)
            run_cells(page, address.format("explorer.ipynb"), len(cells))
            explorer = page.locator(".semroute-explorer")
            explorer.locator("section").nth(1).locator(".cells canvas").wait_for(timeout=120_000)
            explorer.locator("input[type=search]").fill("two blue")
            found = explorer.locator(".list button").first
            found.get_by_text("two blue").wait_for()
            found.click()
            section = explorer.locator("section").nth(1)
            section.locator(".chosen").get_by_text("two blue").wait_for()
            section.get_by_role("tab", name="What a block reads").click()
            section.locator("select").select_option(label="5")
            section.get_by_text("share of what block 5 reads").wait_for()
            explorer.screenshot(path=out)
    image = Image.open(out).convert("RGB").quantize(256)
    image.save(out, optimize=True)
    click.echo(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
