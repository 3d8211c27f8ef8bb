"""What all ranks must find alike before they train: stores, configuration, run, step and folder."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ...schemas import LOCK_FILE, InputError, TrainConfig, differences
from ...schemas.json_file import load_json
from ..runs.checkpoint import Checkpoint, DamagedError, list_checkpoints
from ..runs.record import PATHS, RECORD, STORES
from .ranks import Ranks
from .setup import Opening, Setup, prepare

SEE_SECONDS = 10.0
"""Time that a network file system may take to show a file to other nodes."""
From = Literal["newest", "previous"]


def prepare_together(
    ranks: Ranks,
    config: TrainConfig,
    resume_from: From,
    report: Callable[[str], None],
    opening: Opening | None = None,
) -> tuple[Setup, list[Checkpoint]]:
    """Open and check on every rank all that training needs, and that all find the same.

    Only the first rank has weights.

    Args:
        resume_from: ``previous``: go back over damaged checkpoints.
        report: takes one line of text at a time.
        opening: the stores, where another thread opens them.

    Returns:
        The setup, and damaged checkpoints newer than the one to resume from.

    Raises:
        InputError: as :func:`.prepare`; or ranks find different things, with what each found; or
            the newest checkpoint is damaged.
    """
    setup, error = None, ""
    try:
        setup = prepare(config, empty=not ranks.is_main, opening=opening)
    except InputError as problem:
        if ranks.num == 1:
            raise
        error = str(problem)
    errors = ranks.gather(error)
    if len({*errors}) == 1 and error:
        raise InputError(error)
    if any(errors):
        told = [f"finds: {each}" if each else "finds what it needs" for each in errors]
        raise InputError(_of_each(ranks, "the ranks do not find the same", told))
    assert setup is not None
    _compare(ranks, config, setup)
    checkpoint, damaged = _choose(ranks, setup.checkpoint, Path(config.output), resume_from, report)
    return replace(setup, checkpoint=checkpoint), damaged


def _compare(ranks: Ranks, config: TrainConfig, setup: Setup) -> None:
    """Refuse ranks that would train another run, or from another step."""
    path, record = Path(config.output), setup.record
    resumed = (path / RECORD).exists()
    run: dict[str, Any] = {
        "run": (record.id or record.created) if resumed else None,
        "step": 0 if setup.checkpoint is None else setup.checkpoint.step,
    }
    facts = {
        "output": run,
        "configuration": record.config.model_dump(mode="json", exclude=PATHS),
        "stores": record.model_dump(mode="json", include=STORES),
    }
    text = json.dumps(facts, sort_keys=True)
    if len({*ranks.gather(hashlib.sha256(text.encode()).hexdigest())}) == 1:
        return
    all_facts = [load_json(each, "what a rank found") for each in ranks.gather(text)]
    told = []
    for found in all_facts:
        which = found["output"]
        part = f"run {which['run']} at step {which['step']:,}" if which["run"] else "no run"
        other = differences(
            {name: found[name] for name in ("configuration", "stores")},
            {name: all_facts[0][name] for name in ("configuration", "stores")},
        )
        told.append("; ".join([f"finds {part} in {{path}}", *map(str, other)]))
    raise InputError(
        _of_each(ranks, "the ranks do not train the same run", told, path=path)
        + "\nName an output folder that all nodes share, and start all with the same command."
    )


def _of_each(ranks: Ranks, what: str, told: Sequence[str], path: Path | None = None) -> str:
    """What each rank found, one line for ranks of one node that found the same."""
    where = json.dumps({"host": ranks.host, "path": str(path and path.absolute())})
    places = [load_json(each, "the place of a rank") for each in ranks.gather(where)]
    lines: dict[str, list[int]] = {}
    for rank, (place, text) in enumerate(zip(places, told, strict=True)):
        line = f"on {place['host']} {text.replace('{path}', place['path'])}"
        lines.setdefault(line, []).append(rank)
    listed = [
        f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(map(str, numbers))} {line}"
        for line, numbers in lines.items()
    ]
    return "\n  ".join([f"{what}:", *listed])


def _choose(
    ranks: Ranks,
    newest: Checkpoint | None,
    path: Path,
    resume_from: From,
    report: Callable[[str], None],
) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The newest checkpoint if it is whole, checked by all ranks together; or one before it."""
    known = [] if newest is None else [c for c in list_checkpoints(path) if c.step <= newest.step]
    damaged: list[Checkpoint] = []
    for checkpoint in reversed(known):
        fault = ""
        try:
            checkpoint.verify(ranks.rank, ranks.num)
        except DamagedError as error:
            fault = str(error)
        faults = [each for each in ranks.gather(fault) if each]
        if not faults:
            return replace(checkpoint, checked=True), damaged
        earlier = [each.step for each in known if each.step < checkpoint.step]
        before = f"step {earlier[-1]:,}" if earlier else "the start, as there is no other"
        if resume_from == "newest":
            raise DamagedError(
                f"{faults[0]}. To set it aside and resume from {before}, add --from-checkpoint "
                "previous"
            )
        report(f"{faults[0]}; resuming from {before}")
        damaged.append(checkpoint)
    return None, damaged


def check_shared(ranks: Ranks, path: Path) -> None:
    """Refuse a run directory that ranks do not share; the first rank has made it.

    Raises:
        InputError: with what each found.
    """
    if ranks.num == 1:
        return
    # A name that no node has looked for before: file systems remember that a file was missing.
    name = f"{LOCK_FILE}.{uuid.uuid4().hex}"
    if ranks.is_main:
        (path / name).touch()
    (name, *_) = ranks.gather(name)
    deadline = time.monotonic() + SEE_SECONDS
    while not (seen := (path / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    told = ranks.gather(json.dumps({"seen": seen, "holds": _listing(path)}))
    if ranks.is_main:
        (path / name).unlink()
    found: list[Mapping[str, Any]] = [load_json(each, "what a rank sees") for each in told]
    if all(each["seen"] for each in found):
        return
    texts = [
        f"finds {{path}}, {'the folder of rank 0' if each['seen'] else each['holds']}"
        for each in found
    ]
    raise InputError(
        _of_each(ranks, "the ranks do not share the run directory", texts, path=path)
        + "\nName an output folder on a file system that all nodes share."
    )


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "which does not exist"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder with {', '.join(names[:5])}" if names else "an empty folder"
