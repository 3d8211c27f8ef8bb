"""Views of stores: facts that a repr shows, and lazy arrays of features for dask and xarray."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas import Summary
from ...schemas.columns import numbers
from ...schemas.units import format_bytes

if TYPE_CHECKING:
    from ...schemas import FeatureIdentity, Template
    from .conditioning import ConditioningStore
    from .features import FeatureStore
    from .latents import LatentStore

_SHOWN = 5  # buckets that are named
DASK_BYTES = 64_000_000
"""Bytes of a block of a lazy array, in float32."""


def summarise_features(store: "FeatureStore") -> Summary:
    """Model, template, layers, captions, codec, size and state."""
    identity, codec, mixes = store.manifest.identity, store.manifest.codec, store.mixes
    num_bytes = store.num_bytes()
    num_cut = int(np.count_nonzero(numbers(store.captions["num_cut_tokens"])))
    items = {
        "model": f"{model_name(store)} ({identity.model.architecture}, "
        f"{identity.model.num_layers} layers of {identity.model.width}, {identity.dtype})",
        "template": _template(identity.template),
        "layers": _ranges(identity.llm_layers) + _final_norm(identity),
    }
    if mixes is not None:
        items["mixes"] = (
            f"{mixes.num_mixes} of these layers, for the blocks of a run with strategy "
            f"{mixes.strategy} (step {mixes.step:,}, {mixes.source}); error of what blocks read "
            f"{mixes.error:.1e}"
        )
    rank = "" if codec.rank is None else f", rank {codec.rank}"
    quality = "" if codec.quality is None else f", quality {codec.quality:g}"
    exact = f"; exact in layers {_ranges(codec.exact_layers)}" if codec.exact_layers else ""
    items |= {
        "captions": f"{len(store):,} unique (the null caption included) of "
        f"{identity.samples.num_samples:,} samples",
        "tokens": f"{store.manifest.layout.num_rows:,}; {num_cut:,} captions cut at "
        f"{identity.max_length} tokens",
        "codec": f"{codec.name}{rank}{quality}{exact}",
        "bytes": format_bytes(num_bytes),
        "state": store.state(),
    }
    if store.is_complete and num_bytes:
        items["bytes"] += f", {store.padded_bytes() / num_bytes:.2f}x less than padded bf16"
    return Summary(f"FeatureStore {store.path}", items)


def summarise_latents(store: "LatentStore") -> Summary:
    """VAE, samples, shapes, size and state."""
    identity = store.manifest.identity
    num_dropped = len(identity.dropped)
    dropped = f", {num_dropped:,} of them dropped: their images could not be read"
    scale, shift = (_number(value) for value in (identity.scale, identity.shift))
    vae: str = identity.vae
    if vae != "pixels":
        vae += f" ({store.manifest.provenance.model})"
    return Summary(
        f"LatentStore {store.path}",
        {
            "vae": vae,
            "samples": f"{len(store):,}" + (dropped if num_dropped else ""),
            "shape": _shapes(store),
            "codes": f"{identity.dtype}{', mean and deviation' * identity.deviation}; "
            f"latent = code * {scale} + {shift}",
            "bytes": format_bytes(store.num_bytes()),
            "state": store.state(),
        },
    )


def summarise_conditioning(store: "ConditioningStore") -> Summary:
    """Pipeline, captions, tensors, size and state."""
    identity = store.manifest.identity
    rows = "each caption's own rows" if identity.ragged else "all rows, padding included"
    items = {
        "pipeline": f"{identity.pipeline} ({model_name(store)}, {identity.dtype})",
        "layers": _ranges(identity.layers),
        "captions": f"{len(store):,} unique (the null caption included) of "
        f"{identity.samples.num_samples:,} samples",
        "rows": f"{store.manifest.layout.num_rows:,}: {rows}, of at most {identity.max_length}",
    }
    items |= {
        tensor.name: f"{tensor.dtype} {' x '.join(map(str, tensor.shape))}"
        for tensor in identity.tensors
    }
    items |= {"bytes": format_bytes(store.num_bytes()), "state": store.state()}
    return Summary(f"ConditioningStore {store.path}", items)


def model_name(store: "FeatureStore | ConditioningStore") -> str:
    """Hub id of the LLM or pipeline, or the last part of a path."""
    return short_name(store.manifest.provenance.model)


def short_name(model: str) -> str:
    """A model as named on a command line: a hub id, or the last part of a path, with the pipeline
    whose text encoder it is."""
    path = Path(model)
    if not path.is_absolute():
        return model
    return f"{path.parent.name}/{path.name}" if path.name.startswith("text_encoder") else path.name


def _template(template: "Template") -> str:
    processing = template.processing
    if processing is None:
        kept = "kept" if template.keep_prefix else "dropped"
        return f"{template.text!r}, prefix {kept} (tokens: {len(template.prefix_tokens)})"
    first, stop = processing.dropped_rows
    dropped = f"rows {first} to {stop - 1} dropped" if stop > first else "all rows kept"
    return f"preset {processing.preset}, {dropped}"


def _final_norm(identity: "FeatureIdentity") -> str:
    last = identity.model.num_layers
    match identity.final_norm:
        case "normed":
            return ", the last after the final norm"
        case "raw":
            return f", {last + 1} being {last} before the final norm"
        case "both":
            return f", {last} after the final norm and {last + 1} before it"
        case _:
            return ""


def _shapes(store: "LatentStore") -> str:
    identity = store.manifest.identity
    if not identity.buckets:
        return " x ".join(map(str, identity.shape))
    counts = [*store.bucket_counts().items()]
    shown = ", ".join(f"{name}: {num:,}" for name, num in counts[:_SHOWN])
    more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
    return f"{len(counts)} of {len(identity.buckets)} buckets have samples: {shown}{more}"


def _number(value: float | Sequence[float]) -> str:
    return "by channel" if isinstance(value, Sequence) else f"{value:.6g}"


def _ranges(numbers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` -> ``"1-3, 7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def to_dask(store: "FeatureStore", layers: Sequence[int] | None = None) -> Any:
    """All rows as a lazy dask array, float32 ``[rows, layers, H]``.

    Rows are those of the captions in store order, without what lies between them; a block is
    the captions of ``DASK_BYTES``, and is read and decoded when it is computed.

    Args:
        layers: LLM layers, default all that are stored.
    """
    import dask.array

    shape = (len(store.layer_positions(layers)), store.manifest.identity.model.width)
    rows = max(1, DASK_BYTES // (4 * shape[0] * shape[1]))
    cuts, counts = _cut(store.num_rows(range(len(store))), rows)

    def read(block: np.ndarray, store: "FeatureStore") -> np.ndarray:
        return store.read(np.arange(*block[0, 0, 0]), layers).numpy()

    ranges = np.stack([cuts[:-1], cuts[1:]], 1)[:, None, None]  # [blocks, 1, 1, 2]
    blocks = dask.array.from_array(ranges, chunks=(1, 1, 1, 2))
    return dask.array.map_blocks(
        read,
        blocks,
        store,
        dtype=np.float32,
        chunks=(tuple(map(int, counts)), *((size,) for size in shape)),
        drop_axis=3,
        meta=np.empty((0, 0, 0), np.float32),
    )


def to_xarray(store: "FeatureStore", layers: Sequence[int] | None = None) -> Any:
    """All rows as a lazy xarray Dataset: ``hidden`` of :meth:`to_dask` with named dimensions.

    Coordinates: ``layer`` (of the LLM), and for each ``row`` its ``caption`` (id), ``token``
    (id) and ``position`` in the caption.

    Args:
        layers: LLM layers, default all that are stored.

    Raises:
        ImportError: xarray is not installed.
    """
    import xarray

    counts = store.num_rows(range(len(store)))
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return xarray.Dataset(
        {"hidden": (("row", "layer", "channel"), to_dask(store, layers))},
        coords={
            "layer": list(store.layers if layers is None else layers),
            "caption": ("row", np.repeat(np.arange(len(store)), counts)),
            "token": ("row", numbers(store.captions["token_ids"].combine_chunks().flatten())),
            "position": ("row", np.arange(len(starts)) - starts),
        },
        attrs={
            "model": model_name(store),
            "template": store.manifest.identity.template.text,
            "codec": store.manifest.codec.name,
        },
    )


def _cut(num_rows: np.ndarray, rows_per_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of whole captions: the captions where they begin and end, and their rows.

    Captions of 3, 2, 4 and 1 tokens in blocks of 5 rows::

        caption   0     1   2       3
        row       0 1 2 3 4 5 6 7 8 9
        cuts      0         2         4    captions
        counts    5         5              rows
    """
    stops = np.cumsum(num_rows)
    bounds = np.arange(0, stops[-1] + rows_per_block, rows_per_block)
    cuts = np.unique([0, *np.searchsorted(stops, bounds, "right"), len(num_rows)])
    return cuts, np.diff(np.concatenate([[0], stops])[cuts])
