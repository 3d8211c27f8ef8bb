"""Threads that compute on a CPU: what is said of them when a run starts."""

import os

from ...pipeline.executor.threads import WAITING, machine_load
from ...schemas import RunRecord


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
    load, cores = machine_load()
    if load > cores:
        text = f"warning: other work is running here: load average {load:.1f} on {cores} cores."
        if num > 1:
            text += " Beside it OMP_NUM_THREADS=1 can be faster."
        lines.append(text)
    return lines
