"""semroute: cache every LLM layer once, then learn which layer each DiT block should read.

``semroute extract`` runs an LLM over captions and writes all layers' hidden states into Zarr;
``semroute train`` streams those stores and learns Semantic Routing weights (arXiv 2602.03510)
without the LLM. In Python, start with :func:`semroute.open_features` and :func:`semroute.load_run`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and where they live. Imported on first use, by absolute name: this file must stay
# importable on its own, and `import semroute` must not cost an import of torch.
_PUBLIC = {
    "ConditioningStore": "semroute.pipeline.store",
    "FeatureStore": "semroute.pipeline.store",
    "LatentStore": "semroute.pipeline.store",
    "attach": "semroute.trainer.evaluation.attach",
    "compare": "semroute.trainer.studies.compare",
    "detach": "semroute.trainer.evaluation.attach",
    "explore": "semroute.trainer.explorer.sides",
    "figures": "semroute.pipeline.inspection",
    "inspect": "semroute.pipeline.inspection",
    "layer_error": "semroute.pipeline.codecs",
    "measure_layers": "semroute.pipeline.inspection.statistics",
    "load_router": "semroute.trainer.runs.export",
    "open_conditioning": "semroute.pipeline.store",
    "open_features": "semroute.pipeline.store",
    "open_latents": "semroute.pipeline.store",
    "load_run": "semroute.trainer.runs.run",
    "read_embeds": "semroute.trainer.evaluation.embed",
    "SemanticRoutingPipeline": "semroute.trainer.evaluation.diffusers_pipeline",
    "SemanticRoutingTransformer": "semroute.trainer.evaluation.diffusers_pipeline",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'semroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
