"""The lock file of the process that writes a store or run."""

from .contract import Contract

LOCK_FILE = "driver.json"
"""Name of the lock file in a store or run."""


class LockOwner(Contract):
    """``driver.json``: the process that is filling a store, or training a run."""

    host: str
    pid: int
    begun: str
    """Start of the process by its machine's clock; together with the pid it identifies it."""
    namespace: str = ""
    """Where the pid and that clock hold: boot of the machine, and the namespaces of processes and
    time. Containers may share a host name, but not these."""
    started: str
    """Time at which it took the lock, UTC."""
    token: str
    """Random text by which it recognises its own file."""
    beats: int = 0
    """In an object store: number of times it has put the file again, to show that it is alive."""
