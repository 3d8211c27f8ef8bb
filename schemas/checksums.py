"""``checksums.json``: what the other files of a store were when it was created."""

import hashlib

from .contract import Contract


class Checksums(Contract):
    """Of everything that is written once, before the first shard."""

    manifest: str
    """sha256 of ``manifest.json`` with its status at ``extracting``."""
    files: dict[str, str]
    """Path relative to the store -> sha256: tables, and all of the arrays but their shards."""


def render(contract: Contract, *, early: bool = False) -> str:
    """The one way in which a contract is written: JSON, a key a line; ``early`` as below."""
    return contract.model_dump_json(indent=1, exclude_unset=early) + "\n"


def digest(contract: Contract, *, early: bool = False) -> str:
    """sha256 of a contract as it is written.

    Args:
        early: it was read, maybe from what an early version wrote: leave out keys that were not in
            the file.
    """
    return hashlib.sha256(render(contract, early=early).encode()).hexdigest()
