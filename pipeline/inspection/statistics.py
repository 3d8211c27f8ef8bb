"""What the layers of a feature store look like: norms, massive activations, similarity.

Shapes: R rows (tokens) of a sample, S of them for similarity, L stored layers, H width.
"""

from dataclasses import dataclass

import numpy as np

from ...schemas import LN_EPS
from ..store.features import FeatureStore

NUM_ROWS = 4_096
"""Tokens that statistics are taken over."""
NUM_SIMILAR = 1_024
"""Tokens that layers are compared on, each with each other."""
MASSIVE_LEAST, MASSIVE_TIMES = 100.0, 1_000.0
"""An activation is massive that exceeds 100 and is 1,000 times the median of its vector (Sun et
al., arXiv 2402.17762, section 2)."""
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class LayerStatistics:
    """Of a sample of a store's tokens, layer by layer.

    Attributes:
        layers: LLM layers.
        num_rows, num_captions: in the sample.
        norms: L2 norms: 5 %, median, 95 % and largest over rows, float32 ``[L, 4]``.
        largest: of each layer the largest activation, in magnitude, over the median magnitude of
            its vector: median over rows and largest, float32 ``[L, 2]``.
        massive_rows: share of rows with a massive activation, float32 ``[L]``.
        massive_channels: channels in which massive activations stand, the most frequent first, at
            most five a layer.
        top3_energy: share of a vector's squares, about its mean, that its three largest channels
            have: mean over rows, float32 ``[L]``.
        cka: linear CKA of LN(h) between layers, unbiased, float32 ``[L, L]``; NaN where there are
            too few rows.
        cosine: cosine between LN(h) of the same token in two layers, mean, float32 ``[L, L]``.
    """

    layers: list[int]
    num_rows: int
    num_captions: int
    norms: np.ndarray
    largest: np.ndarray
    massive_rows: np.ndarray
    massive_channels: list[list[int]]
    top3_energy: np.ndarray
    cka: np.ndarray
    cosine: np.ndarray


def measure_layers(
    store: FeatureStore, *, num_rows: int = NUM_ROWS, num_similar: int = NUM_SIMILAR
) -> LayerStatistics:
    """Read a sample of a store and measure its layers.

    The sample is the first captions in store order, which is random, without the null caption.

    Args:
        num_rows: tokens, about; R.
        num_similar: tokens, spread over the sample, on which layers are compared; S.

    Raises:
        InputError: a shard of the sample is not written.
    """
    counts = store.captions["num_tokens"].to_numpy()
    num = int(np.searchsorted(np.cumsum(counts[1:]), num_rows)) + 1
    ids = np.arange(1, min(len(store), num + 1))
    hidden = store.read(ids if len(ids) else [0])
    norms, largest, massive_rows, massive_channels, energy = [], [], [], [], []
    similar = np.unique(np.linspace(0, len(hidden.bits) - 1, num_similar).astype(int))
    normed = np.empty((len(store.layers), len(similar), hidden.bits.shape[2]), np.float32)
    for index in range(len(store.layers)):
        layer = (hidden.bits[:, index].astype(np.uint32) << 16).view(np.float32)  # [R, H]
        norm = np.linalg.norm(layer, axis=1)
        norms.append([*np.quantile(norm, QUANTILES), norm.max()])
        magnitude = np.abs(layer)
        median = np.median(magnitude, axis=1, keepdims=True)
        peak = magnitude.max(1) / np.maximum(median[:, 0], 1e-12)
        largest.append([np.median(peak), peak.max()])
        massive = (magnitude > MASSIVE_LEAST) & (magnitude > MASSIVE_TIMES * median)
        massive_rows.append(massive.any(1).mean())
        times = massive.sum(0)
        most = np.argsort(-times, kind="stable")[:5]
        massive_channels.append([int(channel) for channel in most if times[channel]])
        squares = np.square(layer - layer.mean(1, keepdims=True))
        top3 = np.partition(squares, -3, axis=1)[:, -3:] if squares.shape[1] > 3 else squares
        energy.append(float(np.mean(top3.sum(1) / np.maximum(squares.sum(1), 1e-30))))
        normed[index] = _layer_norm(layer[similar])
    return LayerStatistics(
        layers=store.layers,
        num_rows=len(hidden.bits),
        num_captions=len(ids),
        norms=np.array(norms, np.float32),
        largest=np.array(largest, np.float32),
        massive_rows=np.array(massive_rows, np.float32),
        massive_channels=massive_channels,
        top3_energy=np.array(energy, np.float32),
        cka=linear_cka(normed),
        cosine=_cosine(normed),
    )


def linear_cka(features: np.ndarray) -> np.ndarray:
    """Linear CKA between every two of several representations of the same rows.

    CKA is HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of the Gram matrices (Kornblith et al.,
    arXiv 1905.00414), with the unbiased estimate of HSIC (Song et al., JMLR 13, 2012, eq. 4), as
    the biased one tends to 1 where rows are few against channels.

    Args:
        features: float ``[L, S, H]``.

    Returns:
        float32 ``[L, L]``; NaN where S is below 4.
    """
    num_layers, num = features.shape[:2]
    if num < 4:
        return np.full((num_layers, num_layers), np.nan, np.float32)
    grams = np.empty((num_layers, num, num), np.float32)
    for gram, layer in zip(grams, features.astype(np.float32), strict=True):
        centred = layer - layer.mean(0)
        np.matmul(centred, centred.T, out=gram)
        gram /= max(float(np.trace(gram)) / num, 1e-30)  # CKA does not depend on scale
        np.fill_diagonal(gram, 0)
    flat = grams.reshape(num_layers, -1)
    sums = grams.sum(2, dtype=np.float64)  # [L, S]
    totals = sums.sum(1)
    hsic = (
        (flat @ flat.T).astype(np.float64)
        + np.outer(totals, totals) / ((num - 1) * (num - 2))
        - 2 / (num - 2) * (sums @ sums.T)
    ) / (num * (num - 3))
    own = np.sqrt(np.maximum(np.diag(hsic), 1e-30))
    return (hsic / np.outer(own, own)).astype(np.float32)


def _cosine(normed: np.ndarray) -> np.ndarray:
    """Mean over rows of the cosine of the same row in two layers, ``[L, S, H]`` -> ``[L, L]``."""
    unit = normed / np.maximum(np.linalg.norm(normed, axis=2, keepdims=True), 1e-12)
    flat = unit.reshape(len(unit), -1)
    result: np.ndarray = flat @ flat.T / normed.shape[1]
    return result


def _layer_norm(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(1, keepdims=True)
    result: np.ndarray = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + LN_EPS)
    return result
