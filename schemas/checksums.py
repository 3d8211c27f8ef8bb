"""``checksums.json``: what the other files of a store were when it was created."""

from .contract import Contract


class Checksums(Contract):
    """Of everything that is written once, before the first shard."""

    manifest: str
    """sha256 of ``manifest.json`` with its status at ``extracting``."""
    files: dict[str, str]
    """Path relative to the store -> sha256: tables, and all of the arrays but their shards."""
