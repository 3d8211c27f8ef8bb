"""The user's data: tables, webdataset tars, images, prompts, labels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": [
            "choose_buckets",
            "describe_images",
            "image_to_codes",
            "images_fingerprint",
            "nearest_bucket",
        ],
        "labels": ["Label", "classify", "read_labels"],
        "prompts": ["read_prompts"],
        "table": ["SampleTable", "Unreadable", "column_names", "read_samples", "read_table"],
    },
)
