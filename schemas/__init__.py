"""The contracts: what is written to disk and read back, as pydantic models and Arrow schemas."""

from .atomic import PARTIAL, publish, sync, write_document, write_whole
from .checksums import Checksums
from .cluster import JobQueue
from .config import read_config, read_yaml
from .contract import Contract, ContractError, Difference, differences, digest, flat, parse, render
from .display import Report, Summary
from .errors import InputError
from .fingerprint import fingerprint
from .images import BenchmarkName, ImageSetRecord, JudgeRecord, Prompt
from .lock import LOCK_FILE, LockOwner
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
from .mixes import LN_EPS, SAME_WEIGHTS, Mixes, Routing
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
    "LATENT_SAMPLES_SCHEMA",
    "LN_EPS",
    "LOCK_FILE",
    "MAX_QUALITY",
    "MIN_QUALITY",
    "PARTIAL",
    "SAME_WEIGHTS",
    "SAMPLES_SCHEMA",
    "BenchmarkName",
    "Bucket",
    "CaptionsIdentity",
    "Checksums",
    "Codec",
    "Contract",
    "ContractError",
    "DataConfig",
    "Derived",
    "Difference",
    "EMAConfig",
    "FeatureIdentity",
    "FeatureManifest",
    "Fit",
    "FlowConfig",
    "Generation",
    "ImageSetRecord",
    "InputError",
    "JobQueue",
    "JudgeRecord",
    "LatentGeneration",
    "LatentIdentity",
    "LatentManifest",
    "Layout",
    "LockOwner",
    "Mixes",
    "MixtureRecord",
    "ModelConfig",
    "ModelIdentity",
    "OptimizerConfig",
    "Prompt",
    "Provenance",
    "Quarantine",
    "Receipt",
    "Report",
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
    "Summary",
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
