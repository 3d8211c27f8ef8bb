"""Forges stores at random, and uses each as its readers do.

    python benchmarks/fuzz.py FOLDER --forgeries 2000 --seed 0
    python benchmarks/fuzz.py FOLDER --every

A forgery flips, truncates, renumbers, relinks or exchanges fields and files of a tiny store of each
kind, of a run, of tables and tars, or of encoded prompts; most then make checksums and receipts
agree. Each is opened, read, inspected and verified in a process of its own. Wrong is a signal, an
error that is not one message, more than 10 s or 1 GB, a file outside that changes, and numbers
other than those that were written from a store whose checksums do not agree with its bytes. FOLDER
keeps a line of JSON per forgery in ``log.jsonl``: rerun the same command to resume. ``--every``
tries each forgery of the tests on each kind of store instead. Exits with 1 if something was wrong.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from attacked import INPUTS, RUN, Attacked
from forged_inputs import make_inputs
from forged_runs import make_run
from forgeries import ALL, find_faults
from random_forgeries import Fuzz
from tiny_stores import KINDS, make_store


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--forgeries", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--kind", multiple=True, type=click.Choice([*KINDS, RUN, *INPUTS]), help="Default: all."
)
@click.option("--every", is_flag=True, help="All forgeries of the tests, none at random.")
def main(folder: Path, forgeries: int, seed: int, kind: tuple[str, ...], every: bool) -> None:
    """Forge stores, and log what came of each."""
    folder.mkdir(parents=True, exist_ok=True)
    if every:
        sys.exit(_try_every(folder, [each for each in kind or KINDS if each in KINDS]))
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {entry["number"]: entry for entry in map(json.loads, lines)}
    kinds, attacked = kind or (*KINDS, RUN, *INPUTS), Attacked()
    with tempfile.TemporaryDirectory() as place, log.open("a") as file:
        stores = {
            each: make_run(Path(place) / each)
            if each == RUN
            else make_inputs(each, Path(place) / each)
            if each in INPUTS
            else make_store(each, Path(place) / each)
            for each in kinds
        }
        fuzz = Fuzz(stores, attacked, Path(place) / "forged")
        for number in range(forgeries):
            if number in done:
                continue
            entry = fuzz.run(number, seed)
            done[number] = entry
            file.write(json.dumps(entry) + "\n")
            file.flush()
            if entry["fault"]:
                click.echo(f"{number}: {entry['kind']}: {entry['what']}: {entry['fault']}")
    attacked.close()
    entries = [done[number] for number in range(forgeries)]
    outcomes = Counter(entry["outcome"] for entry in entries)
    counts = ", ".join(f"{num:,} {name}" for name, num in outcomes.items())
    longest, most = (max(entry[key] for entry in entries) for key in ("seconds", "megabytes"))
    click.echo(f"{len(entries):,} forgeries: {counts}; longest {longest:.1f} s, most {most:.0f} MB")
    sys.exit(1 if any(entry["fault"] for entry in entries) else 0)


def _try_every(folder: Path, kinds: Sequence[str]) -> int:
    """1 if something was wrong."""
    attacked, wrong = Attacked(), 0
    for kind in kinds:
        whole = make_store(kind, folder / f"{kind}-whole")
        faults = find_faults(ALL, kind, whole, attacked, folder / kind)
        num = sum(kind in forgery.kinds for forgery in ALL)
        click.echo(f"{kind}: {num} forgeries, {len(faults)} faults {faults or ''}")
        wrong |= bool(faults)
    attacked.close()
    return wrong


if __name__ == "__main__":
    main()
