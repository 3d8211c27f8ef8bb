"""Statistics of the layers of a feature store: norms, massive activations, similarity.

Shapes: R rows (tokens) of a sample, S of them for similarity, L stored layers, H width.
"""

from dataclasses import dataclass

import numpy as np

from ...schemas import LN_EPS
from ...schemas.columns import numbers
from ..store.features import FeatureStore, Rows

NUM_ROWS = 4_096
"""Number of tokens in a sample."""
NUM_SIMILAR = 1_024
"""Number of tokens on which layers are compared with each other."""
MASSIVE_LEAST, MASSIVE_TIMES = 100.0, 1_000.0
"""An activation is massive if it exceeds 100 and is 1,000 times the median of its vector (Sun et
al., arXiv 2402.17762, section 2)."""
NUM_MASSIVE_CHANNELS = 5
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a sample of a store's tokens, layer by layer.

    Attributes:
        layers: LLM layers.
        num_rows: tokens of the sample.
        num_captions: captions of the sample.
        norms: L2 norms: 5 %, median, 95 % and largest over rows, float32 ``[L, 4]``.
        largest: the largest activation of a vector, in magnitude, over the median magnitude of the
            vector: median over rows and largest, float32 ``[L, 2]``.
        massive_rows: share of rows with a massive activation, float32 ``[L]``.
        massive_channels: channels of massive activations, the most frequent first, at most five
            per layer.
        top3_energy: share of the three largest channels in a vector's squares about its mean: mean
            over rows, float32 ``[L]``.
        cka: linear CKA of LN(h) between layers, unbiased, float32 ``[L, L]``; NaN if there are too
            few rows.
        cosine: mean cosine between LN(h) of the same token in two layers, float32 ``[L, L]``.
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


@dataclass(frozen=True)
class CaptionLayers:
    """How a caption changes from layer to layer. All are float32 ``[T, L]``.

    Attributes:
        norm: L2 norms of hidden states.
        change: distance between LN(h) of a layer and of the stored layer below, over the norm of
            the latter; NaN in the lowest layer.
        similarity: cosine between LN(h) of a layer and of the last stored layer.
    """

    norm: np.ndarray
    change: np.ndarray
    similarity: np.ndarray


def measure_caption(hidden: np.ndarray) -> CaptionLayers:
    """Measure every token of a caption in every layer.

    Args:
        hidden: float32 ``[T, L, H]``, as :attr:`.Caption.hidden`.
    """
    normed = normed_layers(hidden)
    lengths = np.maximum(np.linalg.norm(normed, axis=2), 1e-12)
    change = np.full(lengths.shape, np.nan, np.float32)
    change[:, 1:] = np.linalg.norm(np.diff(normed, axis=1), axis=2) / lengths[:, :-1]
    products = np.einsum("tlh,th->tl", normed, normed[:, -1])
    similarity = products / (lengths * lengths[:, -1:])
    return CaptionLayers(np.linalg.norm(hidden, axis=2), change, similarity)


def normed_layers(hidden: np.ndarray) -> np.ndarray:
    """LN(h) of every token in every layer: ``[T, L, H]``."""
    return layer_norm(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)


def measure_layers(
    store: FeatureStore, *, num_rows: int = NUM_ROWS, num_similar: int = NUM_SIMILAR
) -> LayerStatistics:
    """Read a sample of a store and measure its layers.

    The sample is the first captions in store order, which is random, without the null caption.

    Args:
        num_rows: approximate number of tokens, R.
        num_similar: number of tokens, spread over the sample, on which layers are compared; S.

    Raises:
        InputError: a shard of the sample is not written.
    """
    counts = numbers(store.captions["num_tokens"])
    num = int(np.searchsorted(np.cumsum(counts[1:]), num_rows)) + 1
    ids = np.arange(1, min(len(store), num + 1))
    rows = store.read(ids if len(ids) else [0])
    similar = np.unique(np.linspace(0, len(rows.bits) - 1, num_similar).astype(int))
    normed = np.empty((len(store.layers), len(similar), rows.bits.shape[2]), np.float32)
    measured = []
    for position in range(len(store.layers)):
        hidden = layer_of(rows, position)
        measured.append(_measure(hidden))
        normed[position] = layer_norm(hidden[similar])
    norms, largest, massive_rows, massive_channels, energy = zip(*measured, strict=True)
    return LayerStatistics(
        layers=store.layers,
        num_rows=len(rows.bits),
        num_captions=len(ids),
        norms=np.array(norms, np.float32),
        largest=np.array(largest, np.float32),
        massive_rows=np.array(massive_rows, np.float32),
        massive_channels=list(massive_channels),
        top3_energy=np.array(energy, np.float32),
        cka=linear_cka(normed),
        cosine=_cosine(normed),
    )


def layer_of(rows: Rows, position: int) -> np.ndarray:
    """One layer of packed hidden states, float32 ``[R, H]``."""
    return (rows.bits[:, position].astype(np.uint32) << 16).view(np.float32)


def layer_norm(hidden: np.ndarray) -> np.ndarray:
    """LN(h), without parameters: ``[R, H]``."""
    centred = hidden - hidden.mean(1, keepdims=True)
    result: np.ndarray = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + LN_EPS)
    return result


def _measure(
    hidden: np.ndarray,
) -> tuple[list[float], list[float], float, list[int], float]:
    """Norms, largest activations, massive rows, massive channels and top-3 energy of a layer.

    Args:
        hidden: ``[R, H]``.
    """
    norm = np.linalg.norm(hidden, axis=1)
    magnitude = np.abs(hidden)
    median = np.median(magnitude, axis=1, keepdims=True)
    peak = magnitude.max(1) / np.maximum(median[:, 0], 1e-12)
    massive = (magnitude > MASSIVE_LEAST) & (magnitude > MASSIVE_TIMES * median)
    counts = massive.sum(0)
    frequent = np.argsort(-counts, kind="stable")[:NUM_MASSIVE_CHANNELS]
    squares = np.square(hidden - hidden.mean(1, keepdims=True))
    top3 = np.partition(squares, -3, axis=1)[:, -3:] if squares.shape[1] > 3 else squares
    return (
        [*np.quantile(norm, QUANTILES), norm.max()],
        [np.median(peak), peak.max()],
        massive.any(1).mean(),
        [int(channel) for channel in frequent if counts[channel]],
        float(np.mean(top3.sum(1) / np.maximum(squares.sum(1), 1e-30))),
    )


def linear_cka(features: np.ndarray) -> np.ndarray:
    """Linear CKA between every two of several representations of the same rows.

    CKA is HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of the Gram matrices (Kornblith et al.,
    arXiv 1905.00414), with the unbiased estimate of HSIC (Song et al., JMLR 13, 2012, eq. 4); the
    biased one tends to 1 if there are few rows per channel.

    Args:
        features: float ``[L, S, H]``.

    Returns:
        float32 ``[L, L]``; NaN if S is below 4.
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
