"""The contracts: what is written to disk and read back, as pydantic models and Arrow schemas."""

from .checksums import Checksums, digest, render
from .configuration import read_config, read_yaml
from .contract import Contract, ContractError, Difference, differences, flat, parse
from .document import publish, sync, write_document, write_whole
from .errors import InputError
from .facts import Facts, Findings
from .fingerprint import fingerprint
from .jobs import DRIVER, Driver, JobQueue
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
from .pictures import JudgeRecord, LayoutName, PicturesRecord, Prompt
from .receipt import Quarantine, Receipt, WrittenFile
from .router import RouterRecord
from .run import (
    DataConfig,
    EMAConfig,
    FlowConfig,
    ModelConfig,
    OptimizerConfig,
    RoutingConfig,
    RunRecord,
    TrainConfig,
    ValidationConfig,
)
from .study import Scoring, StudyConfig, Tuning
from .tables import CAPTIONS_SCHEMA, LATENT_SAMPLES_SCHEMA, SAMPLES_SCHEMA

__all__ = [
    "CAPTIONS_SCHEMA",
    "DRIVER",
    "LATENT_SAMPLES_SCHEMA",
    "MAX_QUALITY",
    "MIN_QUALITY",
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
