"""``checksums.json``; ``receipts/`` and ``quarantine/``, which hold one small file per shard."""

from pydantic import Field

from .contract import Contract


class Checksums(Contract):
    """``checksums.json``: sha256 of everything that is written once, before the first shard."""

    manifest: str
    """sha256 of ``manifest.json`` with status ``extracting``."""
    files: dict[str, str]
    """Path relative to the store -> sha256: tables, and the arrays' files except shards."""


class WrittenFile(Contract):
    """A file of a shard as it was when the receipt was written."""

    num_bytes: int
    sha256: str


class Receipt(Contract):
    """Proof that a shard is whole; shards without a receipt remain to be written."""

    shard: int
    num_rows: int
    num_entries: int
    """Captions (or samples) in the shard."""
    files: dict[str, WrittenFile]
    """Path relative to the store -> size and sha256."""
    codec_error: dict[str, float]
    """Relative L2 error of LN(h) made by the codec, over the shard: mean, max, and both without the
    three largest channels. In a store of mixes: error of what blocks read, including that of the
    rank. Empty if nothing was coded."""
    layer_error: dict[str, float] = Field(default_factory=dict)
    """LLM layer -> mean of that error. In a store of mixes: block, from 0 -> mean."""
    broken: dict[int, str] = Field(default_factory=dict)
    """sample_id -> reason why its image could not be read; its row must not be used."""
    warnings: list[str]
    seconds: dict[str, float]
    """Time spent: load (of the model), forward, code (of hidden states), write; or encode, where
    forward and code are one. While a shard is written, the next one is computed."""
    worker: str
    sha256: str = ""
    """sha256 of the receipt itself with this key empty. Empty in stores of early versions."""


class Quarantine(Contract):
    """A shard that could not be written, or images that are missing from it, with the reason."""

    shard: int
    entries: list[int]
    """caption_id (or sample_id) of everything in the shard; if it is written except for images that
    could not be read, those of the images."""
    reason: str
    traceback: str
