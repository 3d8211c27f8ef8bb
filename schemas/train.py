"""The configuration of a training run.

The defaults are the recipe of arXiv 2602.03510 and its reference code, except phi_scale (1
reproduces the reference), the router's own learning rate and no weight decay on the router. Two
more differences are not settings: gates start at zero, as in the paper's text but not in its code,
and the average of the weights starts gently (see :class:`EMAConfig`).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .contract import Fraction, Positive, Settings, Size
from .data import DataConfig

MAX_SEED = 2**63 - 1
"""Largest seed: tables of results hold seeds as signed numbers of 64 bits."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
MAX_MODE_SCALE = 2 / (math.pi - 2)
"""Largest scale with which the map of a uniform number to t is monotone."""
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
"""Trackers that Accelerate supports, by the name of their package."""


class RoutingConfig(Settings):
    """The mix of LLM layers that a block reads: weights alpha from logits z(t, d).

    A key that the strategy does not use is an error.
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
        "deep-fusion",
        "mixes",
    ] = "depth"
    """One layer, the plain mean, one learned mix, or a mix by noise level, by block, by both, or by
    token; one layer per block, layers side by side, or attention over layers, as in deployed
    models; ``deep-fusion``, joint attention with the LLM's own keys and values; or ``mixes``, from
    a store that holds the mixes of another run."""
    phi_scale: float = Field(1000.0, gt=0)
    """Factor of t in the sinusoids of phi(t); 1 reproduces the reference code. For ``time`` and
    ``joint``."""
    t_jitter: float = Field(0.0, ge=0)
    """Standard deviation of noise on the t that gates see in training, clipped to [0, 1]. For
    ``time`` and ``joint``."""
    weights: Literal["softmax", "signed"] = "softmax"
    """Weights from learned logits z: softmax(z), or (1 + z) / L, which can be negative. The default
    of a pretrained network is ``signed``."""
    top_k: Positive | None = None
    """Keep only the k largest learned weights; gradients still reach all."""
    rank: Positive | None = None
    """For ``depth``: logits are a product of rank r, so blocks share r patterns of layers."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """For ``one-per-block`` and ``deep-fusion``, one layer per block; for ``concat`` and
    ``attention``, the layers that are read. By default those of the deployed model, scaled to this
    LLM."""
    llm: str | None = None
    """Where the LLM is, for ``deep-fusion``, which copies weights of it when a run starts; by
    default where it was when features were extracted."""
    uniform_penalty: float = Field(0.0, ge=0)
    """Factor of the chi-square distance of the weights from uniform, added to the loss."""
    smooth_penalty: float = Field(0.0, ge=0)
    """Factor of the same distance between neighbouring blocks, added to the loss. For ``depth`` and
    ``joint``."""
    where: Literal["input", "blocks", "taps"] = "blocks"
    """Where a pretrained network is routed: at its input, which all blocks share; at each block; or
    at each of the layers that it reads itself (FLUX.2, Krea 2, HiDream)."""

    @model_validator(mode="after")
    def _no_unused_keys(self) -> "RoutingConfig":
        useful = _ROUTING_KEYS.get(self.strategy, set())
        for name, field in type(self).model_fields.items():
            if name in {"strategy", "where", *useful} or getattr(self, name) == field.default:
                continue
            having = [strategy for strategy, keys in _ROUTING_KEYS.items() if name in keys]
            raise ValueError(
                f"{name} is {getattr(self, name)!r}, which strategy {self.strategy} does not use: "
                f"leave it out, or choose from {', '.join(having)}"
            )
        return self


_ROUTED = ("router", "router+lora", "router+projection", "full")
"""Values of ``model.train`` with a router."""
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
    "deep-fusion": {"layers", "llm"},
}
_HEADS = ("num_heads", "num_kv_heads", "head_dim")


class LoraConfig(Settings):
    """Low-rank adapters of a pretrained network's linear layers (arXiv 2106.09685)."""

    rank: Positive = 8
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapter's output is scaled by alpha / rank; by default alpha is the rank."""
    targets: list[str] | None = None
    """Ends of the names of linear layers; by default those of the attention that reads text."""


class ModelConfig(Settings):
    """The network: our DiT of a named size, of which single numbers may be replaced; or a
    pretrained transformer of diffusers.

    A key of the other kind is an error.
    """

    kind: Literal["dit", "pretrained"] = "dit"
    """``dit``: our own network, from random weights. ``pretrained``: somebody's, see
    docs/adapters.md."""
    size: Literal["nano", "small", "base", "paper"] = "paper"
    """From 1.2 million to 2.25 billion parameters; ``paper``: 24 blocks of width 2048."""
    depth: Size | None = None
    """Number of blocks (D)."""
    width: Size | None = None
    """Width of the residual stream."""
    num_heads: Size | None = None
    """Attention heads."""
    num_kv_heads: Size | None = None
    """Heads of keys and values (grouped-query attention): divides num_heads."""
    head_dim: Size | None = None
    """Width of a head: divisible by 4, for 2D RoPE."""
    mlp_width: Size | None = None
    """Hidden width of SwiGLU."""
    patch_size: Size = 2
    """Side of a patch in latent pixels; divides the latent's height and width."""
    conditioning: Literal["none", "adaln"] = "none"
    """Conditioning of blocks on the noise level: none, as in the paper, or adaLN."""
    pretrained: str | None = None
    """A pipeline of diffusers: its folder, or ``ORG/NAME@REVISION`` on the Hub."""
    train: Literal[
        "fusion", "router", "gain", "lora", "router+lora", "router+projection", "full"
    ] = "router"
    """What of a pretrained network learns: ``fusion``, its own weights of its layers; ``router``;
    ``gain``, one number per block that makes text louder, and ``lora``, which are controls; a
    router with LoRA or with the projection of text; or ``full``, router and all weights."""
    lora: LoraConfig | None = None
    """LoRA, if ``train`` names it; by default of rank 8."""
    base_layers: list[Positive] | None = None
    """LLM layers that the pretrained network was trained with; by default as its pipeline says."""
    guidance: float = Field(3.5, ge=0)
    """Guidance scale that a guidance-distilled network (FLUX.2) is told in training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the pretrained weights in memory. ``auto``: bfloat16 on a GPU where they are frozen,
    otherwise float32. What learns is in float32."""

    @model_validator(mode="after")
    def _no_unused_keys(self) -> "ModelConfig":
        foreign = _DIT_KEYS if self.kind == "pretrained" else _PRETRAINED_KEYS
        for name in foreign:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                other = "dit" if self.kind == "pretrained" else "pretrained"
                raise ValueError(
                    f"{name} is {value!r}, which model.kind {self.kind} does not use: leave it "
                    "out, "
                    f"or set model.kind={other}"
                )
        if self.kind == "pretrained" and self.pretrained is None:
            raise ValueError("kind is pretrained, but pretrained names no pipeline of diffusers")
        if self.lora is not None and "lora" not in self.train:
            raise ValueError(
                f"lora is given, but train is {self.train}: use lora or router+lora, or leave "
                "it out"
            )
        return self


_DIT_KEYS = (
    *("size", "depth", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width"),
    *("patch_size", "conditioning"),
)
_PRETRAINED_KEYS = ("pretrained", "train", "lora", "base_layers", "guidance", "dtype")


def _refuse_unused(config: Settings, needs: Mapping[str, tuple[str, str]]) -> None:
    """Refuse keys that are given and have no effect.

    Args:
        needs: key -> another key, and the value of it with which the first has an effect.
    """
    for name, (other, value) in needs.items():
        found = getattr(config, name)
        if found != type(config).model_fields[name].default and getattr(config, other) != value:
            raise ValueError(
                f"{name} is {found!r}, which {other} {getattr(config, other)} does not use: leave "
                f"it out, or set {other}={value}"
            )


class FlowConfig(Settings):
    """Rectified flow x_t = (1 - t) x_0 + t noise, t in [0, 1], 1 = pure noise."""

    prediction: Literal["velocity", "x0"] = "velocity"
    """Output of the network: the velocity noise - x_0, or x_0 (with the velocity's loss)."""
    t_density: Literal["logit-normal", "uniform", "mode", "cosine"] = "logit-normal"
    """Density of t in training, before the shift: those of arXiv 2403.03206, section 3.1;
    ``cosine`` is its CosMap."""
    t_mean: float = 0.0
    """Mean of the logit of t. For ``logit-normal``."""
    t_std: float = Field(1.0, gt=0)
    """Standard deviation of the logit of t. For ``logit-normal``."""
    mode_scale: float = Field(1.29, ge=-1, le=MAX_MODE_SCALE)
    """Above 0 more of the middle of t is trained, below 0 more of its ends. For ``mode``."""
    shift: float = Field(6.0, gt=0)
    """t <- shift t / (1 + (shift - 1) t), in training and in sampling."""
    shift_area: Positive | None = None
    """Latent pixels, height times width, of the shape that ``shift`` is for; that of another shape
    is shift sqrt(pixels / shift_area). By default all shapes have the same."""
    loss_weight: Literal["none", "min-snr"] = "none"
    """Weight of each sample's loss in training, by t: none, or min(SNR, min_snr_gamma) for the
    error of x_0 (arXiv 2303.09556). Validation has no weights."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Largest weight. For ``min-snr``."""

    @model_validator(mode="after")
    def _no_unused_keys(self) -> "FlowConfig":
        needs = {
            "t_mean": ("t_density", "logit-normal"),
            "t_std": ("t_density", "logit-normal"),
            "mode_scale": ("t_density", "mode"),
            "min_snr_gamma": ("loss_weight", "min-snr"),
        }
        _refuse_unused(self, needs)
        return self


class OptimizerConfig(Settings):
    """Optimizer, learning rates (the router has its own) and schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: torch.optim.Muon for the matrices of the blocks, AdamW for everything else."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW."""
    muon_lr: float = Field(0.015, gt=0)
    """Learning rate of the matrices, if name is ``muon``."""
    router_lr: float = Field(1e-2, gt=0)
    """Learning rate of the router. Adam moves a logit by about this much per step, so at 1e-4 a
    short run stays uniform."""
    router_scaling: Literal["fan_in", "none"] = "fan_in"
    """``fan_in``: matrices of gates learn at router_lr / fan-in, so that logits move by about
    router_lr per step in every strategy. ``none``: as in the reference, all at router_lr; at 1e-2 a
    gate then collapses onto one layer within a few steps."""
    weight_decay: float = Field(1e-4, ge=0)
    """Not applied to the router."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW: decay of the mean of gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW: decay of the mean of squared gradients."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger norm, over all parameters, are scaled down to it."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up: step s, counted from 1, has s / (warmup_steps + 1) of the rate."""
    schedule: Literal["constant", "cosine", "linear", "cosine-restarts", "wsd"] = "constant"
    """After the warm-up; all but ``constant`` fall to 0 at the last step. ``cosine-restarts``
    falls ``num_cycles`` times; ``wsd`` (warm-up, stable, decay) is constant up to the last
    ``decay_steps``."""
    num_cycles: int = Field(4, ge=2)
    """Number of cycles. For ``cosine-restarts``."""
    decay_steps: Positive = 1_000
    """Steps of the decay. For ``wsd``."""
    decay_shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"
    """Shape of the decay. For ``wsd``."""
    decayed: Literal["all", "matrices"] = "all"
    """Parameters with weight decay: all but the router's, or of these only matrices, not the
    weights of norms and biases."""

    @model_validator(mode="after")
    def _no_unused_keys(self) -> "OptimizerConfig":
        needs = {
            "num_cycles": ("schedule", "cosine-restarts"),
            "decay_steps": ("schedule", "wsd"),
            "decay_shape": ("schedule", "wsd"),
        }
        _refuse_unused(self, needs)
        return self


class EMAConfig(Settings):
    """Exponential moving average of the weights, kept in fp32."""

    decay: Fraction = 0.99
    """Decay per update; at update n at most (1 + n) / (10 + n), so that the average of a short run
    is not dominated by its start."""
    every: Positive = 100
    """Steps between updates."""


class ValidationConfig(Settings):
    """Held-out data to measure the loss on: a share of the samples, or a second pair of stores. By
    default none."""

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that are held out; other images of their captions are not."""
    features: str | None = None
    """A second feature store to use instead, of the same LLM, template and layers."""
    latents: str | None = None
    """Its latent store."""
    conditioning: str | None = None
    """Its conditioning store, if ``data.conditioning`` is given."""
    every: Positive = 500
    """Steps between measurements; there is one at the end in any case."""
    num_samples: Positive = 256
    """Upper limit of the number of samples used."""
    num_bins: Positive = 8
    """Number of equal parts of t from 0 to 1; each sample is used once in each, at its own t."""
    seed: Seed = 0
    """Seed of the choice of samples, their t and noise. Runs are comparable if it is the same."""

    @model_validator(mode="after")
    def _one_way(self) -> "ValidationConfig":
        if (self.features is None) != (self.latents is None):
            raise ValueError("features and latents belong together: give both or neither")
        if self.conditioning is not None and self.features is None:
            raise ValueError("conditioning is given, but no second pair of stores: leave it out")
        if self.features is not None and self.share:
            raise ValueError("give either share or a second pair of stores")
        return self


class PreviewConfig(Settings):
    """Images while the run trains, from the moving average, with the same noise each time."""

    every: Positive | None = None
    """Steps between sets of images; there is one at the end too. By default none."""
    captions: Positive = 12
    """Number of captions, the first of the store; or the first of ``prompts``."""
    features: str | None = None
    """Feature store of the captions; by default the run's own."""
    samples: str | None = None
    """The dev.parquet or test.parquet of the shapes that ``features`` were extracted from: images
    are scored too."""
    prompts: list[str] | None = None
    """Texts instead of stored captions; the run's LLM encodes them before training."""
    llm: str | None = None
    """Where the LLM is, for ``prompts``; by default where it was when features were extracted."""
    vae: str | None = None
    """Where the VAE is; by default where it was when latents were made."""
    cfg_scale: float = 3.0
    """Guidance scale; 1 means none."""
    num_steps: Positive = 20
    """Steps of the solver."""
    seed: Seed = 0
    """Seed of the noise."""

    @model_validator(mode="after")
    def _one_source(self) -> "PreviewConfig":
        if self.prompts == []:
            raise ValueError("prompts is an empty list: name some, or leave it out")
        if self.prompts is not None and (self.features or self.samples):
            raise ValueError("give either prompts or features")
        if self.llm is not None and self.prompts is None:
            raise ValueError("llm is given without prompts, which it is for: leave it out")
        if self.samples is not None and self.features is None:
            raise ValueError("samples is given without features, which were extracted from it")
        return self


class TrainConfig(Settings):
    """Configuration of ``semroute train``."""

    features: str
    """A complete feature store."""
    latents: str
    """A complete latent store, made from the same samples."""
    output: str
    """The run directory."""
    start: str | None = None
    """A run whose moving average, at its newest checkpoint, initializes the weights of this one;
    the router's too if the strategy is the same. By default weights are random."""
    random_version: Literal[1, 2] | None = None
    """Version of the arithmetic of noise, t, and turns in mixtures. By default a new run takes 2,
    and a run that is resumed keeps its own. Runs whose ``run.json`` lacks this key have 1; set it
    to repeat one in the same bits."""
    seed: Seed = 0
    """Seed of the weights and, together with a position, of order, caption dropout, t and noise."""
    steps: Positive = 500_000
    """Steps of the optimizer; may grow when a run is resumed, under schedule ``constant``, or under
    ``wsd`` before the decay."""
    grad_accum_steps: Positive = 1
    """Number of parts in which a rank's share of a batch is computed; divides batch_size."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Autocast for matrix products; weights, residual stream and routing stay in fp32."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    checkpoint_every: Positive = 5_000
    """Steps between checkpoints; there is one at the end in any case."""
    keep_checkpoints: Positive = 3
    """Number of newest checkpoints that are kept."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block, and recompute the rest in the backward pass: less memory
    for about a third more work, the same numbers."""
    compile: bool = False
    """Compile the blocks with ``torch.compile``: slow first steps, and different rounding."""
    timeout_minutes: float = Field(30.0, gt=0, le=525_600)
    """Minutes that processes wait for one another within a step, before the run ends. Starting,
    validation and checkpoints may take longer."""
    tracker: Tracker = "none"
    """Also receives all metrics, through Accelerate. ``metrics.jsonl`` is always written."""
    routing: RoutingConfig = RoutingConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    ema: EMAConfig = EMAConfig()
    validation: ValidationConfig = ValidationConfig()
    sampling: PreviewConfig = PreviewConfig()

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: object) -> object:
        if value == "fp16":
            raise ValueError(
                "fp16 ends at 65,504, which hidden states of LLMs exceed, and needs a loss scaler, "
                "which would skip steps: use bf16, or no"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_pretrained(cls, values: Any) -> Any:
        """Signed weights, and LoRA of the default rank, where a pretrained network has them."""
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            return values
        model = values["model"]
        if model.get("kind") != "pretrained":
            return values
        train = model.get("train", "router")
        if isinstance(train, str) and "lora" in train and model.get("lora") is None:
            model = {**model, "lora": {}}
        routing = values.get("routing", {})
        if isinstance(routing, dict) and train in _ROUTED and "weights" not in routing:
            strategy = routing.get("strategy", RoutingConfig.model_fields["strategy"].default)
            if "weights" in _ROUTING_KEYS.get(strategy, set()):
                routing = {**routing, "weights": "signed"}
        return {**values, "model": model, "routing": routing}

    @model_validator(mode="after")
    def _fits_kind(self) -> "TrainConfig":
        pretrained = self.model.kind == "pretrained"
        if not pretrained and self.routing.where != "blocks":
            raise ValueError(
                f"routing.where is {self.routing.where}, which is for model.kind=pretrained: "
                "our own "
                "network is routed at each block"
            )
        if pretrained and self.model.train not in _ROUTED:
            plain = RoutingConfig(
                where=self.routing.where if self.model.train == "gain" else "blocks"
            )
            different = [
                name
                for name in type(plain).model_fields
                if getattr(plain, name) != getattr(self.routing, name)
            ]
            if different:
                raise ValueError(
                    f"routing.{different[0]} is given, but model.train={self.model.train} has no "
                    f"router: leave it out, or choose from {', '.join(_ROUTED)}"
                )
        self._fits_deep_fusion()
        if pretrained and self.flow.prediction != "velocity":
            raise ValueError(
                "flow.prediction is x0, but a pretrained network predicts what it was trained for: "
                "leave it out"
            )
        return self

    def _fits_deep_fusion(self) -> None:
        if self.routing.strategy != "deep-fusion":
            return
        if self.model.kind == "pretrained":
            raise ValueError(
                "routing.strategy is deep-fusion, which replaces the attention of our own network: "
                "choose a strategy that mixes layers, or model.kind=dit"
            )
        given = [name for name in _HEADS if getattr(self.model, name) is not None]
        if given:
            raise ValueError(
                f"model.{given[0]} is given, but with deep-fusion heads are the LLM's: leave it out"
            )

    @model_validator(mode="after")
    def _decay_fits(self) -> "TrainConfig":
        longest = self.steps - self.optimizer.warmup_steps
        if self.optimizer.schedule == "wsd" and self.optimizer.decay_steps > longest:
            raise ValueError(
                f"optimizer.decay_steps is {self.optimizer.decay_steps}, but after the warm-up "
                f"there are {longest} steps: give fewer"
            )
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.data.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of grad_accum_steps "
                f"{self.grad_accum_steps}"
            )
        return self
