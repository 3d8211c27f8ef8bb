"""Threads that compute on a CPU: how they wait, and what is said of them at the start."""

import os

from ...schemas import RunRecord

SPIN_COUNT = "1000"
"""Turns for which a thread of OpenMP that waits stays on its core, beside other work. libgomp's own
default is milliseconds of them: the threads then wait for one that has no core."""
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Beside other work, have threads of OpenMP leave their cores soon when they wait, unless the
    environment says how they wait. Bits do not depend on it. Without effect once torch is imported,
    because libgomp reads it when it is loaded."""
    load, cores = _load()
    if load > cores and not any(name in os.environ for name in _WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def describe_threads(record: RunRecord) -> list[str]:
    """Lines for the start of a run on a CPU: its threads; whether it began with as many, since the
    same bits need them; and whether other work is running."""
    import torch

    num = torch.get_num_threads()
    waiting = "".join(f", {name}={os.environ[name]}" for name in _WAITING if name in os.environ)
    lines = [f"{'1 thread' if num == 1 else f'{num} threads'} on the CPU{waiting}"]
    if record.threads is not None and record.threads != num:
        lines.append(
            f"warning: this run began with OMP_NUM_THREADS={record.threads}: with {num} its bits "
            "are not those of a run that was never stopped"
        )
    load, cores = _load()
    if load > cores:
        text = f"warning: other work is running here: load average {load:.1f} on {cores} cores."
        if num > 1:
            text += " Beside it OMP_NUM_THREADS=1 can be faster."
        lines.append(text)
    return lines


def _load() -> tuple[float, int]:
    """Processes that ran or waited for a core, over the last minute, and number of cores."""
    return os.getloadavg()[0], os.cpu_count() or 1
