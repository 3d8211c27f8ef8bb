"""Stores on disk: created, written, read, locked and verified."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Store", "check_unchanged"],
        "conditioning": ["ConditioningStore"],
        "documents": ["StoreError", "render_table", "commit", "passed_against", "write_contract"],
        "features": ["Caption", "Codes", "FeatureStore", "Rows"],
        "latents": ["LatentStore", "array_shapes"],
        "layout": ["Packing", "pack", "rows_of"],
        "lock": ["Lock", "LockedError", "is_dead", "locked", "read_driver"],
        "open": [
            "open_conditioning",
            "open_features",
            "open_followed",
            "open_latents",
            "open_store",
        ],
    },
)
