"""Threads that train on a CPU: how many, and what is said of them when a run starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...pipeline.executor.base import num_cpus
from ...pipeline.executor.threads import WAITING, is_busy, machine_load
from ...schemas import RunRecord
from .record import RECORD, read_record

NUMBER = "OMP_NUM_THREADS"


@contextmanager
def chosen_threads(run: Path) -> Iterator[None]:
    """Train on a CPU with as many threads as suit the run and the machine, unless
    ``OMP_NUM_THREADS`` gives their number: those with which the run began, which the same bits
    need; for a new run beside other work, those that its fair share of the cores can keep busy.

    Args:
        run: directory of the run, if there is one.

    Raises:
        InputError: ``run.json`` is damaged.
    """
    import torch

    before = torch.get_num_threads()
    if NUMBER not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(_choose(run, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose(run: Path, most: int) -> int:
    if (run / RECORD).exists():
        return min(most, read_record(run).threads or most)
    if not is_busy():
        return most
    load, cores = machine_load()
    return max(1, round(most * cores / (cores + load)))


def describe_threads(record: RunRecord) -> list[str]:
    """Lines for the start of a run on a CPU: its threads; whether it began with as many, since the
    same bits need them; and whether other work is running."""
    import torch

    num = torch.get_num_threads()
    waiting = "".join(f", {name}={os.environ[name]}" for name in WAITING if name in os.environ)
    lines = [f"{'1 thread' if num == 1 else f'{num} threads'} on the CPU{waiting}"]
    if record.threads is not None and record.threads != num:
        lines.append(
            f"warning: this run began with OMP_NUM_THREADS={record.threads}: with {num} its bits "
            "are not those of a run that was never stopped"
        )
    elif num < num_cpus() and NUMBER not in os.environ:
        lines[0] += f"; the run keeps this number when it is resumed, unless {NUMBER} is set"
    if is_busy():
        load, cores = machine_load()
        text = f"warning: other work is running here: load average {load:.1f} on {cores} cores."
        if num > 1:
            text += f" Beside it {NUMBER}=1 can be faster."
        lines.append(text)
    return lines
