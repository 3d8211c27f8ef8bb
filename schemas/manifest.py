"""``manifest.json``: what a store holds, how it was made, and how its bytes are laid out."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator

from .contract import Contract
from .mixes import Mixes

MIN_QUALITY, MAX_QUALITY = 2.0, 8.0
Status = Literal["extracting", "complete"]


class ModelIdentity(Contract):
    """The frozen LLM. Files are compared by content, so the same weights elsewhere are the same."""

    architecture: str
    """Model type of the text tower in transformers, for example ``llama``."""
    num_layers: int = Field(ge=1)
    """Number of blocks of the LLM, whether or not all of them are stored."""
    width: int = Field(ge=1)
    """Width of the hidden states (H)."""
    causal: bool = True
    """Whether a token sees only those before it; false for encoders, such as T5's."""
    files: dict[str, str]
    """File name -> sha256, for the configuration and the weights."""


class Template(Contract):
    """The text around every caption, and which of its rows are stored."""

    text: str
    """For example ``{bos}{caption}``."""
    prefix_tokens: list[int]
    """Token ids in front of every caption; their rows are dropped but for the null caption's."""
    suffix_tokens: list[int]
    """Token ids after every caption; always stored."""
    keep_prefix: bool
    """Whether the prefix rows are stored for every caption."""


class CaptionsIdentity(Contract):
    """The unique captions, and the seeded order in which they were dealt to shards."""

    num_captions: int = Field(ge=1)
    """Unique captions, the null caption included."""
    fingerprint: str
    """sha256 over the texts of all captions in store order."""
    seed: int
    """Seed of the order."""


class SamplesIdentity(Contract):
    """The rows of the input file, in its order; joins features with latents."""

    num_samples: int = Field(ge=1)
    fingerprint: str | None
    """sha256 over the captions of every row, in input order; null where there are none."""


class FeatureIdentity(Contract):
    """Everything that decides the stored numbers. Resume and training demand equality."""

    model: ModelIdentity
    tokenizer: str
    """sha256 of the tokenizer's serialised state."""
    template: Template
    layers: list[int] = Field(min_length=1)
    """Stored layers: 0 is the embedding output, l the output of block l. Where ``mixes`` is given
    their numbers instead, from 1."""
    final_norm: Literal["normed", "absent"]
    """``normed``: the last layer is stored, after the final norm. ``absent``: it is not stored."""
    dtype: Literal["float32", "bfloat16"]
    """In which the LLM ran."""
    attention: str
    """Attention implementation of transformers."""
    max_length: int = Field(ge=1)
    """Longest sequence, template included, in tokens; longer captions were cut at their end."""
    captions: CaptionsIdentity
    samples: SamplesIdentity
    mixes: Mixes | None = None
    """What is stored in place of layers, where it is mixes of them."""
    shuffled: Annotated[int, Field(ge=0)] | None = None
    """Seed by which each caption's layers changed places, where they did (a control)."""

    @model_validator(mode="after")
    def _numbered(self) -> "FeatureIdentity":
        if self.mixes is not None and self.layers != [*range(1, self.mixes.num_mixes + 1)]:
            raise ValueError(
                f"layers is {self.layers}; expected 1 to {self.mixes.num_mixes}, the numbers of "
                "the mixes"
            )
        return self

    @property
    def llm_layers(self) -> list[int]:
        """LLM layers that are stored, or that were mixed."""
        return self.layers if self.mixes is None else self.mixes.layers


class Layout(Contract):
    """How rows become chunks and shards (see ``pipeline.layout``)."""

    num_shards: int = Field(ge=1)
    rows_per_shard: int = Field(ge=1)
    rows_per_chunk: int = Field(ge=1)
    num_rows: int = Field(ge=1)
    """Rows in use; the arrays are ``num_shards * rows_per_shard`` long."""
    batch_tokens: int = Field(ge=1)
    """Budget of a batch of the encoder, padding included, in tokens (images for latents)."""
    line_tokens: int | None = Field(None, ge=1)
    """Tokens of a line of a batch in which captions stand one after the other; null: a line a
    caption, padded to the longest."""
    num_threads: int = Field(ge=1)
    """CPU threads of a worker: another number can change the last bit of what a CPU computes."""


class Fit(Contract):
    """The sample on which a codec's parameters were fitted, and what came out."""

    num_captions: int = Field(ge=1)
    """The first so many in store order, which is a seeded random one."""
    num_rows: int = Field(ge=1)
    """Their tokens."""
    sha256: str
    """Of the fitted arrays in ``hidden.zarr/parameters``, by name."""


class Codec(Contract):
    """What the stored codes mean (see ``pipeline.codecs``)."""

    name: Literal["bf16", "lossless", "delta", "linear"]
    quality: float | None = Field(None, ge=MIN_QUALITY, le=MAX_QUALITY)
    """delta, linear: the step is 2**-quality; one more halves the error and costs a bit."""
    code_bits: Literal[4, 8] | None = None
    """delta, linear: of a code; larger ones have an escape."""
    fit: Fit | None = None
    """lossless, delta, linear: fitted before the first shard."""


class Derived(Contract):
    """Of a store that was rewritten from another: what had been lost before."""

    codec: Codec
    """Of the store it was rewritten from."""
    codec_error: float | None
    """Mean error of LN(h) that was made there; it and this store's own add up at most."""


class Provenance(Contract):
    """Recorded for people; never compared."""

    source: str
    """The captions or samples as named by the user."""
    model: str
    """The LLM (hub id, folder or file) or the VAE, as the user would name it again."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Library -> version."""


G = TypeVar("G", bound=Contract)


class _Manifest(Contract, Generic[G]):
    """How a store grew, which both kinds of manifest record alike.

    Fields are declared in each kind, since their order is that of the keys on disk.
    """

    if TYPE_CHECKING:
        identity: Any
        layout: Layout
        provenance: Provenance
        grown_from: list[G]

    generation: ClassVar[type[Any]]
    """G: what growth changes of the identity, ``num_shards`` and ``num_rows`` of the layout, and
    the provenance."""
    until_complete: ClassVar[dict[str, Any]] = {}
    """Keys of the identity that completion sets, and their values until then."""

    @property
    def generations(self) -> list[G]:
        """The store each time before it grew, and as it is now."""
        now = dict(self.identity) | dict(self.layout) | {"provenance": self.provenance}
        keys = self.generation.model_fields
        return [*self.grown_from, self.generation(**{key: now[key] for key in keys})]

    def before_growth(self) -> Self:
        """The manifest of the store before it last grew."""
        *earlier, last = self.grown_from
        identity = dict(last) | self.until_complete
        layout = {key: identity.pop(key) for key in ("num_shards", "num_rows")}
        provenance = identity.pop("provenance")
        return self.model_copy(
            update={
                "identity": self.identity.model_copy(update=identity),
                "layout": self.layout.model_copy(update=layout),
                "provenance": provenance,
                "grown_from": earlier,
            }
        )

    def unfinished(self) -> Self:
        """The manifest until the store is complete."""
        update: dict[str, Any] = {"status": "extracting"}
        # Only what differs: a key that an early version did not write stays unset.
        identity = {
            key: value
            for key, value in self.until_complete.items()
            if getattr(self.identity, key) != value
        }
        if identity:
            update["identity"] = self.identity.model_copy(update=identity)
        return self.model_copy(update=update)


class Generation(Contract):
    """What a store was before it grew."""

    captions: CaptionsIdentity
    samples: SamplesIdentity
    num_shards: int = Field(ge=1)
    """The next generation begins with the shard of this number."""
    num_rows: int = Field(ge=1)
    provenance: Provenance


class FeatureManifest(_Manifest[Generation]):
    """``manifest.json`` of a feature store."""

    generation = Generation

    format: Literal["semroute.features"] = "semroute.features"
    format_version: Literal[1] = 1
    status: Status
    identity: FeatureIdentity
    layout: Layout
    codec: Codec
    derived: Derived | None = None
    provenance: Provenance
    grown_from: list[Generation] = Field(default_factory=list)
    """What the store was each time before it grew, oldest first; empty where it never did."""


class Bucket(Contract):
    """A shape that images were brought to."""

    height: int = Field(ge=1)
    """In pixels."""
    width: int = Field(ge=1)
    shape: tuple[int, int, int]
    """Channels, height, width of one latent."""


class LatentIdentity(Contract):
    """Everything that decides the stored latents."""

    vae: Literal[
        "pixels",
        "AutoencoderKL",
        "AutoencoderDC",
        "AutoencoderTiny",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
    ]
    """``pixels``: the image itself. Otherwise a class of diffusers."""
    files: dict[str, str] = Field(default_factory=dict)
    """File name -> sha256, for the configuration and the weights of the VAE."""
    shape: tuple[int, int, int]
    """Channels, height, width of one latent; where there are buckets, of the first of them."""
    buckets: list[Bucket] = Field(default_factory=list)
    """Shapes of latents where there are several, the square one first; empty where all have one."""
    dtype: Literal["uint8", "float16"]
    """Of the stored codes."""
    scale: float | list[float]
    """Latent = code * scale + shift, in the units that the model is trained on; a number, or one a
    channel."""
    shift: float | list[float]
    deviation: bool = False
    """Whether the deviation of the VAE's posterior is stored beside its mean; in a latent it is
    deviation * scale."""
    images: str
    """sha256 over the sha256 of every encoded image file in input order; 32 zero bytes stand for a
    file that was not there."""
    dropped: list[int] = Field(default_factory=list)
    """Samples that have no latent, for their images could not be read: left out of training. Empty
    until the store is complete."""
    samples: SamplesIdentity


class LatentGeneration(Contract):
    """What a latent store was before it grew."""

    images: str
    samples: SamplesIdentity
    num_shards: int = Field(ge=1)
    """The next generation begins with the shard of this number."""
    num_rows: int = Field(ge=1)
    provenance: Provenance


class LatentManifest(_Manifest[LatentGeneration]):
    """``manifest.json`` of a latent store."""

    generation = LatentGeneration
    until_complete: ClassVar[dict[str, Any]] = {"dropped": []}

    format: Literal["semroute.latents"] = "semroute.latents"
    format_version: Literal[1] = 1
    status: Status
    identity: LatentIdentity
    layout: Layout
    provenance: Provenance
    grown_from: list[LatentGeneration] = Field(default_factory=list)
    """What the store was each time before it grew, oldest first; empty where it never did."""
