"""The configuration of a training run, and the record that a run directory keeps of itself.

The defaults are the recipe of arXiv 2602.03510 and its reference code, but for these: phi_scale (1
reproduces the reference), the router's own learning rate and no weight decay on the router. And two
things that are no setting: gates start at zero, as the paper's text and not its code has it, and
the average of the weights starts gently (see :class:`EMAConfig`).
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .contract import Contract

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Tracker = Literal[
    "none",
    "tensorboard",
    "wandb",
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "trackio",
]
"""Those that Accelerate knows, by the name of their package."""


class RoutingConfig(Contract):
    """Which mix of LLM layers a block reads (design: weights alpha from logits z(t, d)).

    A key that the strategy has no use for is an error.
    """

    strategy: Literal[
        "penultimate",
        "uniform",
        "static",
        "time",
        "depth",
        "joint",
        "token",
        "one-per-block",
        "concat",
        "attention",
        "mixes",
    ] = "depth"
    """One layer, the plain mean, one learned mix, or a mix by noise level, by block, by both, or by
    token; a layer a block, layers side by side, or attention over layers, as deployed models do; or
    ``mixes``, from a store that holds those of another run."""
    phi_scale: float = Field(1000.0, gt=0)
    """Multiplies t before the sinusoids of phi(t); 1 reproduces the reference code. Of ``time`` and
    ``joint``."""
    t_jitter: float = Field(0.0, ge=0)
    """Standard deviation of the noise on the t that gates are told in training, clipped to [0, 1].
    Of ``time`` and ``joint``."""
    weights: Literal["softmax", "signed"] = "softmax"
    """Of learned logits z: softmax(z), or (1 + z) / L, which can be negative."""
    top_k: Positive | None = None
    """Keep only the k largest of learned weights; gradients still reach all."""
    rank: Positive | None = None
    """Of ``depth``: logits are a product of rank r, so blocks share r patterns of layers."""
    layers: list[Positive] | None = None
    """Of ``one-per-block``, one a block; of ``concat`` and ``attention``, those that are read. By
    default what the deployed model does, scaled to this LLM."""
    uniform_penalty: float = Field(0.0, ge=0)
    """Added to the loss, times the chi-square distance of the weights from uniform."""
    smooth_penalty: float = Field(0.0, ge=0)
    """Added to the loss, times the same distance of neighbouring blocks. Of ``depth`` and
    ``joint``."""

    @model_validator(mode="after")
    def _of_use(self) -> "RoutingConfig":
        useful = _ROUTING_KEYS.get(self.strategy, set())
        for name, field in type(self).model_fields.items():
            if name in {"strategy", *useful} or getattr(self, name) == field.default:
                continue
            having = [strategy for strategy, keys in _ROUTING_KEYS.items() if name in keys]
            raise ValueError(
                f"{name} is {getattr(self, name)!r}, which strategy {self.strategy} has no use "
                f"for: leave it out, or choose of {', '.join(having)}"
            )
        return self


_ROUTING_KEYS = {
    "static": {"weights", "top_k", "uniform_penalty"},
    "time": {"phi_scale", "t_jitter", "weights", "top_k", "uniform_penalty"},
    "depth": {"weights", "top_k", "rank", "uniform_penalty", "smooth_penalty"},
    "joint": {
        *("phi_scale", "t_jitter", "weights", "top_k"),
        *("uniform_penalty", "smooth_penalty"),
    },
    "token": {"weights", "top_k"},
    "one-per-block": {"layers"},
    "concat": {"layers"},
    "attention": {"layers"},
}


class ModelConfig(Contract):
    """The DiT. A named size, of which single numbers may be replaced."""

    size: Literal["nano", "small", "base", "paper"] = "paper"
    """From 1.2 million to 2.25 billion parameters; ``paper``: 24 blocks of width 2048."""
    depth: Positive | None = None
    """Number of blocks (D)."""
    width: Positive | None = None
    """Of the residual stream."""
    num_heads: Positive | None = None
    """Of attention."""
    num_kv_heads: Positive | None = None
    """Grouped-query attention: divides num_heads."""
    head_dim: Positive | None = None
    """Divisible by 4, for 2D RoPE."""
    mlp_width: Positive | None = None
    """Hidden width of SwiGLU."""
    patch_size: Positive = 2
    """Side of a patch, in latent pixels; divides the latent's height and width."""
    conditioning: Literal["none", "adaln"] = "none"
    """How blocks see the noise level: not at all, as in the paper, or by adaLN."""


class FlowConfig(Contract):
    """Rectified flow x_t = (1 - t) x_0 + t noise, t in [0, 1], 1 = pure noise."""

    prediction: Literal["velocity", "x0"] = "velocity"
    """What the network gives: the velocity noise - x_0, or x_0 (with the velocity's loss)."""
    t_mean: float = 0.0
    """Mean of the logit of t, which is normal, before the shift."""
    t_std: float = Field(1.0, gt=0)
    """Its standard deviation."""
    shift: float = Field(6.0, gt=0)
    """t <- shift t / (1 + (shift - 1) t), in training and in sampling."""


class OptimizerConfig(Contract):
    """Two learning rates that matter, the router's apart."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: torch.optim.Muon for the matrices of the blocks, AdamW for everything else."""
    lr: float = Field(1e-4, gt=0)
    """Of AdamW."""
    muon_lr: float = Field(0.015, gt=0)
    """Of the matrices, where name is ``muon``."""
    router_lr: float = Field(1e-2, gt=0)
    """Adam moves a logit by about this much a step, so at 1e-4 a short run stays uniform."""
    router_scaling: Literal["fan_in", "none"] = "fan_in"
    """``fan_in``: matrices of gates learn at router_lr / fan-in, so that the line above is true of
    every strategy. ``none``: as in the reference, all at router_lr; at 1e-2 a gate then collapses
    onto one layer within a few steps."""
    weight_decay: float = Field(1e-4, ge=0)
    """Not applied to the router."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Of AdamW: decay of the mean of gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Of AdamW: decay of the mean of squared gradients."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger norm, over all parameters, are scaled down to it."""
    warmup_steps: int = Field(0, ge=0)
    """Linear: step s of the warm-up, counted from 1, has s / (warmup_steps + 1) of the rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up; cosine and linear fall to 0 at the last step."""


class SelectionConfig(Contract):
    """Which samples and captions of a pair of stores take part, and how often. By default all,
    alike."""

    filter: str | None = None
    """Only captions of which this is true, such as ``num_tokens <= 64 and style in ["photo"]``;
    samples without one are left out."""
    caption_weights: list[Annotated[float, Field(ge=0)]] | str | None = None
    """How often each caption of a sample is shown against its others: numbers by their place, or a
    column of them. 0 is never."""
    columns: str | None = None
    """A parquet, csv or jsonl file with more columns: the table that the stores were made of, or
    one with ``sample_id``."""


class SourceConfig(Contract):
    """Another pair of stores to train on."""

    features: str
    """A complete feature store, of the same model, template and layers."""
    latents: str
    """Its latent store."""
    proportion: Annotated[float, Field(gt=0, lt=1)]
    """Share of all samples that come from here; the run's own stores have what is left."""
    select: SelectionConfig = SelectionConfig()


class DataConfig(Contract):
    """What a step reads."""

    batch_size: Positive = 512
    """Samples a step, over all ranks and accumulation steps."""
    noise_draws: Positive = 1
    """Pairs of t and noise drawn for each sample read; each is a row of the DiT's batch."""
    caption_dropout: Fraction = 0.1
    """Share of samples whose caption becomes the null caption."""
    posterior: Literal["sample", "mean"] = "sample"
    """Of latents that are stored with a deviation: a new draw each time that a sample is shown, or
    always the mean."""
    prefetch: Positive = 4
    """Batches read ahead."""
    workers: Positive = 1
    """Threads that read them, each a batch of its own. More help where a disk or a network must
    wait, or a codec decodes on several cores."""
    order: Literal["random", "shards"] = "random"
    """``random``: any sample may follow any other; ``shards``: shard by shard, for stores that are
    not held in memory."""
    window: Positive = 16
    """Of order ``shards``: how many shards are mixed at any time."""
    select: SelectionConfig = SelectionConfig()
    mixture: list[SourceConfig] = Field(default_factory=list)
    """Other pairs of stores, each with its ``features``, ``latents``, ``proportion`` and perhaps
    ``select``."""


class EMAConfig(Contract):
    """Exponential moving average of the weights, kept in fp32."""

    decay: Fraction = 0.99
    """Of update n at most (1 + n) / (10 + n), so that a short run's average is not its start."""
    every: Positive = 100
    """Steps between updates."""


class ValidationConfig(Contract):
    """What is never trained on, and measured by: a share of the samples, or a second pair of
    stores. By default nothing is."""

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that are held out. Other images of their captions are not."""
    features: str | None = None
    """A second feature store to measure by instead, of the same LLM, template and layers."""
    latents: str | None = None
    """Its latent store."""
    every: Positive = 500
    """Steps between measurements; there is one at the end in any case."""
    num_samples: Positive = 256
    """At most so many samples are measured by."""
    num_bins: Positive = 8
    """Equal parts of t from 0 to 1; each sample is shown once in each, at a t of its own."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice of samples, their t and their noise. Runs compare where it is the same."""

    @model_validator(mode="after")
    def _one_way(self) -> "ValidationConfig":
        if (self.features is None) != (self.latents is None):
            raise ValueError("features and latents belong together: give both or neither")
        if self.features is not None and self.share:
            raise ValueError("give either share or a second pair of stores")
        return self


class TrainConfig(Contract):
    """Everything that ``semroute train`` needs."""

    features: str
    """A complete feature store."""
    latents: str
    """A complete latent store, made from the same samples."""
    output: str
    """The run directory."""
    start: str | None = None
    """A run whose moving average, at its newest checkpoint, is what this one's weights start from;
    the router's too where the strategy is the same. By default weights are fresh."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the weights, and with a position of the order, caption dropout, t and noise."""
    steps: Positive = 500_000
    """Of the optimizer. May grow when a run is continued, under a constant schedule."""
    grad_accum_steps: Positive = 1
    """Parts that a rank's share of a batch is computed in; divides batch_size."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Autocast of matrix products; weights, residual stream and routing stay in fp32."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    checkpoint_every: Positive = 5_000
    """Steps between checkpoints; there is one at the end in any case."""
    keep_checkpoints: Positive = 3
    """The newest that are kept."""
    gradient_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest again in the backward pass: less
    memory for about a third more work, the same numbers."""
    compile: bool = False
    """Compile the blocks with ``torch.compile``: slow first steps, and other rounding."""
    tracker: Tracker = "none"
    """Gets every line of metrics too, through Accelerate. ``metrics.jsonl`` is always written."""
    routing: RoutingConfig = RoutingConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    ema: EMAConfig = EMAConfig()
    validation: ValidationConfig = ValidationConfig()

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: object) -> object:
        if value == "fp16":
            raise ValueError(
                "fp16 ends at 65,504, which hidden states of LLMs exceed, and needs a loss scaler, "
                "which would make steps that are skipped: use bf16, or no"
            )
        return value

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.data.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of grad_accum_steps "
                f"{self.grad_accum_steps}"
            )
        return self
