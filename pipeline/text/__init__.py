"""Captions as token sequences, and as batches of an LLM."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batching": ["Batch", "batches"],
        "captions": ["Captions", "StoredRows", "build_captions"],
        "cleaning": ["cleaner"],
        "presets": ["PRESETS", "Preset", "preset_of", "read_template"],
        "templates": ["foreign_markers"],
        "tokenization": ["RaggedTokens"],
    },
)
