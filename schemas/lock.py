"""The lock file of the process that writes a store."""

from .contract import Contract

LOCK_FILE = "driver.json"
"""In a store that is being filled."""


class LockOwner(Contract):
    """``driver.json``: the process that is filling a store, or training a run."""

    host: str
    pid: int
    begun: str
    """When the process began, as its machine counts; with the pid it names it for good."""
    started: str
    """When it took the lock, UTC."""
    token: str
    """Random, by which it knows its own file."""
    beats: int = 0
    """In an object store: how often it has put the file anew, to show that it lives."""
