"""The part of a training configuration that says what data a step reads."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from .contract import Fraction, Settings, Size
from .units import parse_bytes


class SelectionConfig(Settings):
    """Selection of samples and captions of a pair of stores, and their weights. By default all take
    part equally."""

    filter: str | None = None
    """Only captions for which this is true, such as ``num_tokens <= 64 and style in ["photo"]``;
    samples without such a caption are left out."""
    caption_weights: list[Annotated[float, Field(ge=0)]] | str | None = None
    """Relative frequency of each caption of a sample: numbers in order of the captions, or a column
    of such lists. 0 means never."""
    columns: str | None = None
    """A parquet, csv or jsonl file with more columns: the table that the stores were made from, or
    one with ``sample_id``."""


class SourceConfig(Settings):
    """A further pair of stores to train on."""

    features: str
    """A complete feature store, of the same model, template and layers."""
    latents: str
    """Its latent store."""
    proportion: Annotated[float, Field(gt=0, lt=1)]
    """Share of all samples that come from here; the rest come from the run's own stores."""
    select: SelectionConfig = SelectionConfig()
    conditioning: str | None = None
    """Its conditioning store, if the run's own stores have one."""


class CacheConfig(Settings):
    """A cache of what is read from the stores, on a disk of this machine. All processes of a
    machine may share one, of any number of runs."""

    folder: str
    """A new or empty folder, or that of another cache; files in it are removed at will."""
    size: str
    """Most that its files take on the disk, such as 200GB."""

    @field_validator("size")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_bytes(value)
        return value


class DataConfig(Settings):
    """The data that a step reads."""

    batch_size: Annotated[int, Field(ge=1, le=2**20)] = 512
    """Samples per step, over all ranks and accumulation steps."""
    noise_draws: Size = 1
    """Pairs of t and noise for each sample read; each pair is a row of the DiT's batch."""
    caption_dropout: Fraction = 0.1
    """Share of samples whose caption is replaced by the null caption."""
    posterior: Literal["sample", "mean"] = "sample"
    """For latents that are stored with a deviation: a new sample of the posterior each time, or
    always the mean."""
    prefetch: Size = 4
    """Batches read ahead."""
    workers: Size = 1
    """Threads that read batches, one batch each. More threads help with a slow disk or network, or
    if a codec decodes on several cores."""
    order: Literal["random", "shards"] = "random"
    """``random``: any sample may follow any other; ``shards``: shard by shard, for stores larger
    than memory."""
    window: Size = 16
    """For order ``shards``: number of shards that are mixed at any time."""
    cache: CacheConfig | None = None
    """Keep on a local disk what is read, for stores behind a URL or on a slow disk: ``folder`` and
    ``size``. By default nothing is kept."""
    select: SelectionConfig = SelectionConfig()
    conditioning: str | None = None
    """A conditioning store of the same captions, which semroute conditioning made: text as the
    pipeline of a pretrained network gives it to the network."""
    unverified: bool = False
    """Train a pretrained network on stores that semroute verify --against has not compared with its
    pipeline."""
    mixture: list[SourceConfig] = Field(default_factory=list)
    """Further pairs of stores, each with its ``features``, ``latents``, ``proportion`` and perhaps
    ``select``."""
