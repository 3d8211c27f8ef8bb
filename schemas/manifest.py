"""``manifest.json``: contents of a store, how it was made, and how its bytes are laid out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from .contract import Contract
from .mixes import Mixes

MIN_QUALITY, MAX_QUALITY = 2.0, 8.0
DEFAULT_RANK = 32
"""Largest rank at which a CPU core decodes 0.4 GB/s; see docs/benchmarks/codecs.md."""
Status = Literal["extracting", "complete", "budget"]
"""``budget``: shards come and go within a disk budget, see ``budget.json``."""
FinalNorm = Literal["normed", "raw", "both", "absent"]
CodecName = Literal["bf16", "lossless", "delta", "linear", "predictive"]
Rank = Annotated[int, Field(ge=0)] | Literal["full"]
"""Rank of what predicts a layer from the one below it: 0 is ``delta``, "full" is ``linear``."""
Cleaning = Literal["none", "strip", "lower_strip", "clean_caption", "fix_text", "no_images"]
MASK = "mask"
"""Name of the rows that are a caption's own, beside the tensors of a pipeline."""


class ModelIdentity(Contract):
    """The frozen LLM. Files are compared by content, so their place does not matter."""

    architecture: str
    """Model type of the text tower in transformers, for example ``llama``."""
    num_layers: int = Field(ge=1)
    """Number of blocks of the LLM, stored or not."""
    width: int = Field(ge=1)
    """Width of the hidden states (H)."""
    causal: bool = True
    """True if a token sees only earlier ones; false for encoders, such as T5's."""
    files: dict[str, str]
    """File name -> sha256, for the configuration and the weights."""


class TextProcessing(Contract):
    """What a pipeline of diffusers does to a text, besides the template that it puts it into."""

    preset: str
    """Name of the preset, for people: the other keys say what was done."""
    cleaning: Cleaning
    """``strip``: without spaces around it. ``lower_strip``: that, in lower case.
    ``clean_caption``: as PixArtSigmaPipeline cleans by default, without URLs, file names and
    repeated punctuation, among much else. ``fix_text``: ftfy's fix_text, HTML entities resolved
    twice, runs of white space as one space. ``no_images``: without ``[IMG]``."""
    null_text: str
    """Template of the null caption."""
    null_tokens: list[int] = Field(default_factory=list)
    """Token ids of the null caption where the pipeline fixes them; empty: as the tokenizer
    gives."""
    dropped_rows: tuple[int, int]
    """Rows from the first number to before the second are not stored, counted in the tokens of
    each sequence."""
    null_dropped_rows: tuple[int, int]
    """The same of the null caption."""
    cut: Literal["caption", "sequence"]
    """``caption``: a sequence that is too long loses the caption's last tokens. ``sequence``: it
    loses its own, those of the template's suffix included."""
    suffix_apart: bool
    """True if the suffix is tokenized by itself, not together with the caption."""
    padding: Literal["left", "right"] | None
    """Side on which sequences have padding tokens, up to the maximum length, that the LLM attends
    to; null: padding changes nothing. Rows of padding tokens are not stored."""


class Template(Contract):
    """The text around every caption, and which of its rows are stored."""

    text: str
    """For example ``{bos}{caption}``."""
    prefix_tokens: list[int]
    """Token ids before every caption; their rows are dropped, except the null caption's."""
    suffix_tokens: list[int]
    """Token ids after every caption; always stored."""
    keep_prefix: bool
    """True if the rows of the prefix are stored for every caption."""
    processing: TextProcessing | None = None
    """The rest of what a pipeline of diffusers does, for its preset; null: nothing else is done."""


class CaptionsIdentity(Contract):
    """The unique captions, and the seeded order in which they were assigned to shards."""

    num_captions: int = Field(ge=1)
    """Number of unique captions, including the null caption."""
    fingerprint: str
    """sha256 over the texts of all captions in store order."""
    seed: int
    """Seed of the order."""


class SamplesIdentity(Contract):
    """The rows of the input file, in order; joins features with latents."""

    num_samples: int = Field(ge=1)
    fingerprint: str | None
    """sha256 over the captions of all rows, in input order; null if there are none."""
    blank: Literal["skip", "null"] | None = None
    """What was asked for rows without a caption: left out, or given the null caption; absent:
    there must be none."""
    weights: tuple[float, ...] | None = None
    """Weights of the columns of captions, in their order; absent: there are none."""

    @model_serializer(mode="wrap")
    def _without_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return {k: v for k, v in fields.items() if v is not None or k == "fingerprint"}


class FeatureIdentity(Contract):
    """Everything that decides the stored numbers. Resuming and training require equality."""

    model: ModelIdentity
    tokenizer: str
    """sha256 of the tokenizer's serialized state."""
    template: Template
    layers: list[int] = Field(min_length=1)
    """Stored layers: 0 is the output of the embedding, l that of block l. Of the L blocks of the
    LLM the last has two numbers: L after the final norm, L + 1 before it. If ``mixes`` is given,
    the numbers of the mixes instead, from 1."""
    final_norm: FinalNorm
    """``normed``: of the last block, layer L is stored, after the final norm. ``raw``: layer L + 1,
    before it. ``both``: both. ``absent``: neither."""
    dtype: Literal["float32", "bfloat16"]
    """Dtype in which the LLM ran."""
    attention: str
    """Attention implementation of transformers."""
    max_length: int = Field(ge=1)
    """Longest sequence in tokens, including the template; longer captions were cut at the end."""
    captions: CaptionsIdentity
    samples: SamplesIdentity
    mixes: Mixes | None = None
    """Mixes of layers that are stored instead of layers; null if layers are stored."""
    shuffled: Annotated[int, Field(ge=0)] | None = None
    """Seed by which the layers of each caption were permuted, if they were (a control)."""

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


def final_norm_of(layers: Sequence[int], num_layers: int) -> FinalNorm:
    """Which outputs of the last block are among the layers of an LLM of ``num_layers`` blocks."""
    match num_layers in layers, num_layers + 1 in layers:
        case True, True:
            return "both"
        case True, False:
            return "normed"
        case False, True:
            return "raw"
        case _:
            return "absent"


class Layout(Contract):
    """Division of rows into chunks and shards (see ``pipeline.store.layout``)."""

    num_shards: int = Field(ge=1)
    rows_per_shard: int = Field(ge=1)
    rows_per_chunk: int = Field(ge=1)
    num_rows: int = Field(ge=1)
    """Rows in use; the arrays have ``num_shards * rows_per_shard`` rows."""
    batch_tokens: int = Field(ge=1)
    """Budget of an encoder batch in tokens, including padding (for latents, in images; for
    conditioning, in captions)."""
    line_tokens: int | None = Field(None, ge=1)
    """Tokens per row of a batch in which captions are packed one after the other; null: one row per
    caption, padded to the longest."""
    num_threads: int = Field(ge=1)
    """CPU threads of a worker: another number can change the last bit of results on a CPU."""


class Fit(Contract):
    """The sample to which a codec's parameters were fitted, and the result."""

    num_captions: int = Field(ge=1)
    """Number of captions, the first ones in store order, which is random (seeded)."""
    num_rows: int = Field(ge=1)
    """Number of their tokens."""
    sha256: str
    """sha256 of the fitted arrays in ``hidden.zarr/parameters``, in order of their names."""


class Codec(Contract):
    """The codec of the hidden states (see ``pipeline.codecs``)."""

    name: CodecName
    quality: float | None = Field(None, ge=MIN_QUALITY, le=MAX_QUALITY)
    """delta, linear, predictive: the step is 2**-quality; one more halves the error and costs one
    bit."""
    rank: int | None = Field(None, ge=1)
    """predictive: rank of the prediction; less than the width."""
    code_bits: Literal[4, 8] | None = None
    """delta, linear, predictive: bits per code; larger codes use an escape."""
    fit: Fit | None = None
    """All but bf16: the fit, made before the first shard."""
    exact_layers: tuple[int, ...] = ()
    """delta, linear, predictive: LLM layers that are stored exactly too, in the array ``exact``."""


class Derived(Contract):
    """The codec and error of the store that this one was rewritten from."""

    codec: Codec
    """Codec of the source."""
    codec_error: float | None
    """Mean error of LN(h) in the source; the total is at most its sum with this store's own."""


class Provenance(Contract):
    """Origin of a store, recorded for people and never compared."""

    source: str
    """The captions or samples, as named by the user."""
    model: str
    """The LLM (hub id, folder or file) or the VAE, as the user would name it again."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Library -> version."""


G = TypeVar("G", bound=Contract)


class _Manifest(Contract, Generic[G]):
    """Growth of a store, which both kinds of manifest record alike.

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
    """A store of captions before it grew."""

    captions: CaptionsIdentity
    samples: SamplesIdentity
    num_shards: int = Field(ge=1)
    """Number of shards; the next generation begins with the shard of this number."""
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
    """The store each time before it grew, oldest first; empty if it never did."""


class Bucket(Contract):
    """A shape to which images were resized."""

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
        "AutoencoderKLFlux2",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
    ]
    """``pixels``: the image itself; otherwise a class of diffusers."""
    files: dict[str, str] = Field(default_factory=dict)
    """File name -> sha256, for the configuration and the weights of the VAE."""
    shape: tuple[int, int, int]
    """Channels, height, width of one latent; with buckets, of the first one's."""
    buckets: list[Bucket] = Field(default_factory=list)
    """Shapes of latents if there are several, the square one first; empty if all have one shape."""
    dtype: Literal["uint8", "float16"]
    """Dtype of the stored codes."""
    scale: float | list[float]
    """Latent = code * scale + shift, in the units that the model is trained on; one number, or one
    per channel."""
    shift: float | list[float]
    deviation: bool = False
    """True if the deviation of the VAE's posterior is stored beside its mean; in a latent it is
    deviation * scale."""
    images: str
    """sha256 over the sha256 of every encoded image file in input order, with 32 zero bytes for a
    missing file."""
    dropped: list[int] = Field(default_factory=list)
    """Samples without a latent, because their images could not be read: left out of training. Empty
    until the store is complete."""
    samples: SamplesIdentity


class LatentGeneration(Contract):
    """A latent store before it grew."""

    images: str
    samples: SamplesIdentity
    num_shards: int = Field(ge=1)
    """Number of shards; the next generation begins with the shard of this number."""
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
    """The store each time before it grew, oldest first; empty if it never did."""


class ConditioningTensor(Contract):
    """One of the tensors that a pipeline gives its transformer for a caption."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """As the pipeline names it; ``mask``: the rows that are the caption's own."""
    shape: list[int]
    """Of one caption; if the store is ragged, of one row of a caption."""
    dtype: Literal["bfloat16", "float16", "float32", "uint8"]
    """bfloat16 is stored as its bits, in uint16."""


class ConditioningIdentity(Contract):
    """Everything that decides the stored tensors."""

    pipeline: str
    """Class of diffusers."""
    files: dict[str, str]
    """File -> sha256, of the text encoders; tokenizer -> sha256 of its state."""
    cleaners: list[str]
    """Optional packages with which the pipeline cleans captions, as far as they are installed."""
    dtype: Literal["float32", "bfloat16"]
    """Dtype in which the text encoders ran."""
    max_length: int = Field(ge=1)
    """Rows that the pipeline pads captions to, or cuts them at."""
    layers: list[int] = Field(min_length=1)
    """LLM layers that ``rows`` holds, in the order of the transformer's taps: 0 is the output of
    the embedding, L that of the final norm, L + 1 that of block L."""
    rows: str
    """Name of the tensor with the rows of these layers."""
    ragged: bool
    """True if only a caption's own rows are stored, since the transformer reads no others but
    zeros. Otherwise a caption has one row of the arrays, padding included."""
    tensors: list[ConditioningTensor] = Field(min_length=1)
    captions: CaptionsIdentity
    samples: SamplesIdentity


class ConditioningManifest(_Manifest[Generation]):
    """``manifest.json`` of a conditioning store."""

    generation = Generation

    format: Literal["semroute.conditioning"] = "semroute.conditioning"
    format_version: Literal[1] = 1
    status: Status
    identity: ConditioningIdentity
    layout: Layout
    provenance: Provenance
    grown_from: list[Generation] = Field(default_factory=list)
    """The store each time before it grew, oldest first; empty if it never did."""


AnyManifest = FeatureManifest | LatentManifest | ConditioningManifest
