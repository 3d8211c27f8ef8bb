"""``checksums.json``, and ``receipts/`` and ``quarantine/``: one small file per shard."""

from pydantic import Field

from .contract import Contract


class Checksums(Contract):
    """Of everything that is written once, before the first shard."""

    manifest: str
    """sha256 of ``manifest.json`` with its status at ``extracting``."""
    files: dict[str, str]
    """Path relative to the store -> sha256: tables, and all of the arrays but their shards."""


class WrittenFile(Contract):
    """One file of a shard, as it was on disk when the receipt was written."""

    num_bytes: int
    sha256: str


class Receipt(Contract):
    """The proof that a shard is whole; work that remains is what has no receipt."""

    shard: int
    num_rows: int
    num_entries: int
    """Captions (or samples) in the shard."""
    files: dict[str, WrittenFile]
    """Path relative to the store -> what was written."""
    codec_error: dict[str, float]
    """Relative L2 error of LN(h) made by the codec, over the shard: mean, max, and both without the
    three largest channels. In a store of mixes: of what blocks read, that of the rank included.
    Empty where nothing was coded."""
    layer_error: dict[str, float] = Field(default_factory=dict)
    """LLM layer -> the mean of that error. In a store of mixes: block, from 0 -> the mean."""
    broken: dict[int, str] = Field(default_factory=dict)
    """sample_id -> why its image could not be read; its row is not to be used."""
    warnings: list[str]
    seconds: dict[str, float]
    """Where the time went: load (of the model), forward, code (of hidden states), write; encode
    where forward and code are one. While a shard is written the next is at work."""
    worker: str
    sha256: str = ""
    """Of the receipt as it is written, with this key empty. Empty in stores of early versions."""


class Quarantine(Contract):
    """A shard that could not be written, or the images that are missing from it, and why."""

    shard: int
    entries: list[int]
    """caption_id (or sample_id) of everything in the shard; of a shard that is written but for
    images that could not be read, those."""
    reason: str
    traceback: str
