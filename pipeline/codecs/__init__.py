"""Hidden states to arrays of integers and back: arithmetic, no storage."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["ArraySpec", "Codec", "Coded", "Lossy", "allocate", "digest_parameters", "insert"],
        "bf16": ["Bf16"],
        "chunks": ["choose_rows_per_chunk", "compress", "decompress"],
        "error": ["CodecError", "codec_error", "layer_error", "layer_errors"],
        "fit": [
            "bits_per_value",
            "encode_rows",
            "fit_codec",
            "fit_rows",
            "fitted_spec",
        ],
        "kernels": ["copy_runs"],
        "mixes": ["combine", "find_mixes", "mix"],
        "registry": ["is_lossy", "open_codec", "request_codec", "with_exact_layers"],
    },
)
