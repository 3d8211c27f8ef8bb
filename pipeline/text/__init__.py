"""Captions as token sequences, and as batches of an LLM."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batching": ["Batch", "batches"],
        "captions": ["Captions", "build_captions"],
        "templates": ["foreign_markers", "read_template"],
        "tokenization": ["RaggedTokens"],
    },
)
