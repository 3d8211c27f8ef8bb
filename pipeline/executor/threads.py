"""How the threads that compute on a CPU wait for each other."""

import os
from contextlib import AbstractContextManager

SPIN_COUNT = "1000"
"""Turns for which a thread of OpenMP that waits stays on its core. libgomp's own default is
milliseconds of them: beside other work the threads then wait for one that has no core."""
PATIENT = "10000"
"""The same for work that begins on a quiet machine, where it costs a large network 3 %, and 15 %
with ``SPIN_COUNT``; beside three busy processes on two cores it halves the time."""
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables of the environment that say how threads wait."""


def machine_load() -> tuple[float, int]:
    """Processes that ran or waited for a core, over the last minute, and number of cores."""
    return os.getloadavg()[0], os.cpu_count() or 1


def is_busy() -> bool:
    """Whether other work leaves no core free."""
    load, cores = machine_load()
    return load > cores


def wait_briefly(turns: str = SPIN_COUNT) -> None:
    """Have threads of OpenMP leave their cores soon when they wait, here and in processes that
    start from here, unless the environment says how they wait. Bits do not depend on it.

    Without effect once torch is imported, because libgomp reads it when it is loaded. A network
    whose parts take microseconds trains faster without it on a quiet machine.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = turns


def quiet_products() -> AbstractContextManager[object]:
    """While it is open, products of numpy take one thread if other work leaves no core free.

    The threads of its OpenBLAS wait for each other at full speed, and ``GOMP_SPINCOUNT`` is not
    for them.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1 if is_busy() else None, user_api="blas")
