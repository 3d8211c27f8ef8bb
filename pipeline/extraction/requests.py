"""Requests to the jobs that write stores: one frozen, validated class per command."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SkipValidation, model_validator

from ...schemas import CodecName, Contract, Rank, Routing

Positive = Annotated[int, Field(ge=1)]


class TextRequest(Contract):
    """Which columns of a source hold captions, and what to do with rows that have none."""

    text_column: str | tuple[str, ...] | None = None
    """Columns of captions, with dots into structs; several may have weights, as in ``caption=1``.
    Default: text, prompt, caption or TEXT."""
    fallback_column: str | None = None
    """Column whose captions stand in where a row has no other."""
    blank: Literal["error", "skip", "null"] = "error"
    """Rows without a caption: refused, left out, or given the null caption."""

    @property
    def text_options(self) -> dict[str, Any]:
        """These fields, as :func:`semroute.pipeline.sources.table.read_samples` takes them."""
        return {name: getattr(self, name) for name in TextRequest.model_fields}


class CaptionsRequest(TextRequest):
    """Captions, and the LLM that is to read them; enough to plan and to estimate."""

    source: str
    """Table of captions, see :func:`semroute.pipeline.sources.table.read_samples`."""
    model: str
    """Hub id, folder or GGUF file, see :func:`semroute.pipeline.models.hub.find_model`."""
    template: str = "bos"
    """Preset or file, see :mod:`semroute.pipeline.text.presets`."""
    layers: str = "all"
    """``all``, ``every:3`` or ``1-10,17``."""
    final_norm: Literal["normed", "raw", "both"] | None = None
    """Outputs of the last block that are stored: layer L after the final norm, layer L + 1 before
    it; default: as the preset's pipeline reads it, or normed."""
    max_length: Positive | None = None
    """Maximum length in tokens, the template included; default: that of the preset, or 512."""
    keep_prefix: bool | None = None
    """Store the template's prefix rows for every caption; default: as the preset's pipeline reads
    them, or False."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the LLM. auto: as the existing store has it; for a new one bfloat16 on a GPU and
    float32 on a CPU."""
    limit: Positive | None = None
    """Only the first samples."""
    seed: int = 0
    """Seed of the order in which captions are dealt to shards."""


class WriteRequest(Contract):
    """Target, shard size and workers of a store to be written."""

    target: SkipValidation[Path]
    """Folder of the store, or its URL in an object store, see
    :func:`semroute.schemas.files.locate`."""
    shard_bytes: Positive = 256_000_000
    """Size of a full shard, uncompressed."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes; default: one per GPU, or one per CPU core up to 4. 0: this one, without Dask."""
    cluster: str = "local"
    """``local``, the address or the file of a Dask scheduler, or a job queue; see
    :func:`semroute.pipeline.executor.connect.connect`."""
    force: bool = False
    """Begin although the target has too little space."""


class ExtractRequest(CaptionsRequest, WriteRequest):
    """Request of :func:`semroute.pipeline.extraction.extract`."""

    codec: CodecName = "delta"
    """Codec of hidden states, see :mod:`semroute.pipeline.codecs`. All but ``bf16`` are
    fitted to a sample of the captions first."""
    quality: float | None = None
    """Quality of ``delta``, ``linear`` and ``predictive``, whose step is 2**-quality of a vector's
    RMS: 4 (the default) gives an error of LN(h) of 1.1e-2; one more halves it and costs one bit per
    value."""
    rank: Rank | None = None
    """Rank of the prediction of ``predictive``: 0 is ``delta``, "full" is ``linear``; default: the
    largest that a CPU decodes at 0.4 GB/s per core, see docs/benchmarks/codecs.md."""
    exact_layers: str | None = None
    """Layers that are also stored exactly beside a codec with loss: ``base`` (those that the
    preset's pipeline reads), ``none`` or numbers; default: as the existing store has it; for a new
    one base with a preset of a pipeline that reads some layers only, and none without."""
    batch_tokens: Positive | None = None
    """Tokens per batch, padding included; default: as the existing store has it; for a new one 512
    on a CPU and 16,384 on a GPU."""
    batching: Literal["auto", "padded", "packed"] = "auto"
    """``padded``: each row of a batch is one caption, padded to the longest. ``packed``: several,
    one after the other, which the LLM must keep apart. auto: as the existing store has it; for a
    new one packed where a trial of the LLM shows that it keeps them apart."""
    budget: Positive | None = None
    """Bytes that the store may take; shards come and go, as ``runs`` read them. Default: the store
    is completed."""
    runs: SkipValidation[tuple[Path, ...]] = ()
    """Runs whose reading is followed: their YAML files or run directories."""
    threads: Positive | None = None
    """CPU threads per worker; default: all cores over all workers; on a cluster, as many as the
    worker with the fewest has. A store that is resumed keeps its number, so that its bytes do not
    depend on the workers."""

    @model_validator(mode="after")
    def _budget_with_runs(self) -> "ExtractRequest":
        if self.budget is not None and not self.runs:
            raise ValueError("--budget needs --for: the runs whose reading extraction follows")
        if self.runs and self.budget is None:
            raise ValueError("--for needs --budget: the bytes that the store may take")
        return self


class LatentsRequest(TextRequest, WriteRequest):
    """Request of :func:`semroute.pipeline.extraction.encode_images`."""

    source: str
    """The table that the features were made from, with an image column."""
    vae: str = "pixels"
    """``pixels``: the image itself, scaled to [-1, 1]; or a VAE of diffusers, see
    :func:`semroute.pipeline.models.vae.find_vae`."""
    image_column: str | None = None
    """Column of images; default: image, or the only one of jpg, png, file_name, image_path and
    image_binary."""
    image_folder: str | None = None
    """Folder that paths of images are relative to; default: that of the table."""
    size: Positive | None = None
    """Height and width in pixels: the shorter side is resized, then the centre is cropped. Default:
    all images have one size already."""
    buckets: Positive | None = None
    """With ``size``: bring each image to the nearest of several shapes of about that area instead,
    whose sides are multiples of this many pixels; see
    :func:`semroute.pipeline.sources.images.choose_buckets`."""
    limit: Positive | None = None
    """Only the first samples."""
    broken: Literal["error", "skip"] = "error"
    """``skip``: complete the store although images are missing or cannot be read; training leaves
    their samples out."""


class ConditioningRequest(TextRequest, WriteRequest):
    """Request of :func:`semroute.pipeline.extraction.encode_captions`."""

    source: str
    """Table of captions, see :func:`semroute.pipeline.sources.table.read_samples`."""
    pipeline: str
    """Pipeline of diffusers: a folder or a hub id, see
    :func:`semroute.pipeline.models.text_pipelines.find_text_pipeline`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the text encoders. auto: as the existing store has it; for a new one bfloat16 on
    a GPU and float32 on a CPU."""
    limit: Positive | None = None
    """Only the first samples."""
    seed: int = 0
    """Seed of the order in which captions are dealt to shards: that of the features, so that a
    caption has the same number in both stores."""
    threads: Positive | None = None
    """CPU threads per worker, as for extraction."""


class RewriteRequest(TextRequest, WriteRequest):
    """Request of :func:`semroute.pipeline.extraction.rewrite.rewrite`."""

    features: SkipValidation[str | Path]
    """The store to rewrite."""
    codec: CodecName | None = None
    """As for extraction; default: the codec of the source."""
    quality: float | None = None
    """As for extraction; default: that of the source, where the codec is its own."""
    exact_layers: str | None = None
    """As for extraction, of layers that the source holds exactly; default: those of the source, if
    its codec has loss."""
    layers: str = "all"
    """``all`` of the source, ``every:3`` or ``1-10,17``, all of which it must hold."""
    routing: Routing | None = None
    """Store only mixes of the layers, enough of them for what its blocks read. The caller checks
    that the source is of the run's LLM."""
    rank: Rank | None = None
    """With ``routing``, the number of mixes; default: the fewest whose mean error is under 1e-2.
    Otherwise as for extraction."""
    shuffle_layers: Annotated[int, Field(ge=0)] | None = None
    """Seed: within each caption its layers change places at random, so that no layer can be told
    from another. A control: what routing still gains on such features does not come from choosing
    layers. For codec ``bf16``."""
    captions: str | None = None
    """Table of captions, all of which the source must hold; default: all of them. Its rows are the
    samples of the new store."""

    @property
    def num_mixes(self) -> int | None:
        """Number of mixes that is asked for."""
        return self.rank if self.routing is not None and isinstance(self.rank, int) else None

    @property
    def codec_rank(self) -> Rank | None:
        """Rank of the codec that is asked for."""
        return self.rank if self.routing is None else None
