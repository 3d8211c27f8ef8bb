"""The contracts: what is written to disk and read back, as pydantic models and Arrow schemas."""

from .atomic import PARTIAL, publish, sync, write_document, write_whole
from .checksums import Checksums
from .cluster import JobQueue
from .config import read_config, read_yaml
from .contract import Contract, ContractError, Difference, differences, digest, flat, parse, render
from .display import Facts, Findings
from .errors import InputError
from .fingerprint import fingerprint
from .images import JudgeRecord, LayoutName, PicturesRecord, Prompt
from .lock import DRIVER, Driver
from .manifest import (
    MAX_QUALITY,
    MIN_QUALITY,
    Bucket,
    CaptionsIdentity,
    Codec,
    Derived,
    FeatureIdentity,
    FeatureManifest,
    Fit,
    Generation,
    LatentGeneration,
    LatentIdentity,
    LatentManifest,
    Layout,
    ModelIdentity,
    Provenance,
    SamplesIdentity,
    Template,
)
from .mixes import SAME_WEIGHTS, Mixes, Routing
from .receipt import Quarantine, Receipt, WrittenFile
from .router import RouterRecord
from .run import MixtureRecord, RunRecord, SelectionRecord
from .study import Scoring, StudyConfig, Tuning
from .tables import CAPTIONS_SCHEMA, LATENT_SAMPLES_SCHEMA, SAMPLES_SCHEMA
from .train import (
    DataConfig,
    EMAConfig,
    FlowConfig,
    ModelConfig,
    OptimizerConfig,
    RoutingConfig,
    SelectionConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CAPTIONS_SCHEMA",
    "DRIVER",
    "LATENT_SAMPLES_SCHEMA",
    "MAX_QUALITY",
    "MIN_QUALITY",
    "PARTIAL",
    "SAME_WEIGHTS",
    "SAMPLES_SCHEMA",
    "Bucket",
    "CaptionsIdentity",
    "Checksums",
    "Codec",
    "Contract",
    "ContractError",
    "DataConfig",
    "Derived",
    "Difference",
    "Driver",
    "EMAConfig",
    "Facts",
    "FeatureIdentity",
    "FeatureManifest",
    "Findings",
    "Fit",
    "FlowConfig",
    "Generation",
    "InputError",
    "JobQueue",
    "JudgeRecord",
    "LatentGeneration",
    "LatentIdentity",
    "LatentManifest",
    "Layout",
    "LayoutName",
    "Mixes",
    "MixtureRecord",
    "ModelConfig",
    "ModelIdentity",
    "OptimizerConfig",
    "PicturesRecord",
    "Prompt",
    "Provenance",
    "Quarantine",
    "Receipt",
    "RouterRecord",
    "Routing",
    "RoutingConfig",
    "RunRecord",
    "SamplesIdentity",
    "Scoring",
    "SelectionConfig",
    "SelectionRecord",
    "SourceConfig",
    "StudyConfig",
    "Template",
    "TrainConfig",
    "Tuning",
    "ValidationConfig",
    "WrittenFile",
    "differences",
    "digest",
    "fingerprint",
    "flat",
    "parse",
    "publish",
    "read_config",
    "read_yaml",
    "render",
    "sync",
    "write_document",
    "write_whole",
]
