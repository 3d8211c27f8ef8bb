"""Which layer knows what: linear probes on cached hidden states, solved in closed form.

A probe is a ridge regression from what a layer holds to the classes of a label, one-hot; the class
with the largest output is its answer. No iteration, no initial weights: the same store and labels
give the same numbers (Alain and Bengio, arXiv 1610.01644, for the idea of a probe a layer).

Shapes: N captions, R tokens, L stored layers, H width, C classes.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from ...schemas import LN_EPS, InputError, Summary
from ..sources.labels import Label, classify, read_labels
from ..store.features import FeatureStore
from ..store.open import open_features

Pool = Literal["mean", "last"]
NUM_CAPTIONS = 5_000
SHARES = (0.6, 0.2)
"""Of the captions, to fit and to choose the penalty; the others are judged."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the ridge regression, in units of the number of captions fitted to: channels are scaled to a
variance of 1."""
WORD_CLASSES = 50
"""Tokens that are told apart: the most frequent."""
Z_95 = 1.959964
_CAPTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class LinearProbe:
    """How well a label is read from each layer, on captions that the probe was not fitted to.

    Attributes:
        label: its name.
        num_classes: C.
        num_fitted, num_judged: captions.
        chance: accuracy of the class that is most frequent among the fitted.
        accuracy: share of the judged captions that are right, of each layer ``[L]``.
        low, high: 95 % interval of it over captions (Wilson, J. Am. Stat. Assoc. 22, 1927).
        penalty: chosen for each layer, in units of ``num_fitted`` ``[L]``.
    """

    label: str
    num_classes: int
    num_fitted: int
    num_judged: int
    chance: float
    accuracy: list[float]
    low: list[float]
    high: list[float]
    penalty: list[float]

    @property
    def best(self) -> int:
        """Position of the layer with the highest accuracy, the first of equals."""
        return int(np.argmax(self.accuracy))


@dataclass(frozen=True, repr=False)
class ProbeResults:
    """What the layers of a store know.

    Attributes:
        layers: LLM layers.
        pool: how the tokens of a caption became one vector.
        probes: one a label.
        skipped: why other labels were not probed for.
    """

    layers: list[int]
    pool: Pool
    probes: list[LinearProbe]
    skipped: list[str]

    def __repr__(self) -> str:
        return str(self._facts())

    def _repr_html_(self) -> str:
        return self._facts()._repr_html_()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def _facts(self) -> Summary:
        items = {probe.label: self._line(probe) for probe in self.probes}
        items |= {f"not probed {number}": why for number, why in enumerate(self.skipped, 1)}
        first, last = self.layers[0], self.layers[-1]
        return Summary(f"Linear probes of layers {first} to {last}, {self.pool} over tokens", items)

    def _line(self, probe: LinearProbe) -> str:
        best = probe.best
        return (
            f"best in layer {self.layers[best]}: {probe.accuracy[best]:.1%} "
            f"({probe.low[best]:.1%} to {probe.high[best]:.1%}); first {probe.accuracy[0]:.1%}, "
            f"last {probe.accuracy[-1]:.1%}, chance {probe.chance:.1%} of {probe.num_classes} "
            f"classes; {probe.num_judged:,} captions judged"
        )


def probe_layers(
    path: str | os.PathLike[str],
    source: str,
    *,
    text_column: str | None = None,
    labels: Sequence[str] = (),
    pool: Pool = "mean",
    num_captions: int = NUM_CAPTIONS,
    progress: bool = True,
) -> ProbeResults:
    """Probe every stored layer for labels of captions, and for which word a token is.

    Layers are compared on LN(h), as routing mixes them; a caption's label on the mean (or the last)
    of its tokens. Two labels need no table: ``word``, which of the ``WORD_CLASSES`` most frequent
    tokens one token of the caption is, read from that token; and ``word before``, which token stood
    before it, read from the same: what a layer has gathered from its context.

    The captions are the first in store order, which is random; of them ``SHARES`` are fitted to and
    chosen on, the others judged. Memory: ``8 N L H`` bytes.

    Args:
        source: a table with captions and labels, see
            :func:`semroute.pipeline.sources.labels.read_labels`.
        text_column: of it. Default: text, prompt or caption.
        labels: wanted. Default: all with few enough classes.
        pool: of tokens: their mean, or the last.
        num_captions: of the store at most, N.

    Raises:
        InputError: as ``read_labels``; a shard is not written; a store of mixes.
    """
    from tqdm.auto import tqdm  # in a notebook without widgets it warns where it is imported

    store = open_features(path)
    if store.mixes is not None:
        raise InputError(f"{path} holds mixes of layers; expected a store of layers, its source")
    if len(store) < 2:
        raise InputError(f"{path} holds no caption besides the null caption")
    ids = np.arange(1, min(len(store), num_captions + 1))
    table = store.captions.slice(1, len(ids))
    found, skipped = read_labels(
        source, table["text"].to_pylist(), text_column=text_column, names=labels
    )
    tokens, places = _pick_tokens(table["token_ids"].to_pylist())
    bar = tqdm(
        total=len(ids) + len(store.layers),
        desc="probing",
        disable=not progress,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} < {remaining}",
    )
    with bar:
        pooled, picked = _read(store, ids, places, pool, bar.update)
        words = [classify(name, values) for name, values in tokens.items()]
        subjects = [(label, pooled) for label in found]
        subjects += [(label, picked) for label in words if label is not None]
        skipped += [
            f"{name}: too few captions with frequent tokens"
            for name, label in zip(tokens, words, strict=True)
            if label is None
        ]
        results: list[list[tuple[float, float]]] = [[] for _ in subjects]
        for layer in range(len(store.layers)):
            for result, (label, features) in zip(results, subjects, strict=True):
                result.append(_accuracy(features[layer], label))
            bar.update()
    probes = [_summary(label, result) for (label, _), result in zip(subjects, results, strict=True)]
    return ProbeResults(store.layers, pool, probes, [*skipped, *_left_out(found)])


def _left_out(labels: Sequence[Label]) -> Iterator[str]:
    for label in labels:
        if label.num_rare:
            yield f"{label.name}: {label.num_rare:,} captions of classes too rare"
        if label.num_ambiguous:
            yield f"{label.name}: {label.num_ambiguous:,} captions that rows label differently"


def _pick_tokens(
    captions: Sequence[Sequence[int]],
) -> tuple[dict[str, list[str | None]], list[int]]:
    """One token a caption that is frequent, and the one before it; and where it stands."""
    counts = Counter(token for tokens in captions for token in tokens[1:])
    frequent = {token for token, _ in counts.most_common(WORD_CLASSES)}
    rng = np.random.default_rng(0)
    words: dict[str, list[str | None]] = {"word": [], "word before": []}
    places = []
    for tokens in captions:
        candidates = [place for place in range(1, len(tokens)) if tokens[place] in frequent]
        place = int(rng.choice(candidates)) if candidates else 0
        words["word"].append(str(tokens[place]) if candidates else None)
        words["word before"].append(str(tokens[place - 1]) if candidates else None)
        places.append(place)
    return words, places


def _read(
    store: FeatureStore,
    ids: np.ndarray,
    places: Sequence[int],
    pool: Pool,
    advance: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
    """LN(h) of captions, pooled, and of one token of each: both float32 ``[L, N, H]``."""
    shape = (len(store.layers), len(ids), store.manifest.identity.model.width)
    pooled, picked = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for start in range(0, len(ids), _CAPTIONS_AT_ONCE):
        part = slice(start, min(len(ids), start + _CAPTIONS_AT_ONCE))
        rows = store.read(ids[part])
        firsts = rows.offsets[:-1]
        for layer in range(shape[0]):
            hidden = (rows.bits[:, layer].astype(np.uint32) << 16).view(np.float32)  # [R, H]
            hidden -= hidden.mean(1, keepdims=True)
            hidden /= np.sqrt(np.square(hidden).mean(1, keepdims=True) + LN_EPS)
            if pool == "mean":
                sums = np.add.reduceat(hidden, firsts)
                pooled[layer, part] = sums / np.diff(rows.offsets)[:, None]
            else:
                pooled[layer, part] = hidden[rows.offsets[1:] - 1]
            picked[layer, part] = hidden[firsts + np.array(places[part])]
        advance(part.stop - part.start)
    return pooled, picked


def _split(num: int) -> tuple[slice, slice, slice]:
    """To fit to, to choose on, to judge."""
    first, second = round(SHARES[0] * num), round(sum(SHARES) * num)
    return slice(0, first), slice(first, second), slice(second, num)


def _accuracy(features: np.ndarray, label: Label) -> tuple[float, float]:
    """Accuracy on what is judged, and the penalty: features ``[N, H]``."""
    known = label.values >= 0
    x, y = features[known].astype(np.float64), label.values[known]
    fit, choose, judge = _split(len(y))
    x -= x[fit].mean(0)
    x /= np.maximum(x[fit].std(0), 1e-6)
    target = np.eye(len(label.classes))[y[fit]]
    shares = target.mean(0)
    gram, moment = x[fit].T @ x[fit], x[fit].T @ (target - shares)
    diagonal = np.arange(len(gram))
    best = (-1.0, 0.0, PENALTIES[0])
    for penalty in PENALTIES:
        damped = gram.copy()
        damped[diagonal, diagonal] += penalty * len(target)
        answers = (x @ np.linalg.solve(damped, moment) + shares).argmax(1)
        right = answers == y
        best = max(
            best, (float(right[choose].mean()), float(right[judge].mean()), penalty), key=_on_dev
        )
    return best[1:]


def _on_dev(scores: tuple[float, float, float]) -> float:
    return scores[0]


def _summary(label: Label, results: Sequence[tuple[float, float]]) -> LinearProbe:
    values = label.values[label.values >= 0]
    fit, _, judge = _split(len(values))
    usual = np.bincount(values[fit], minlength=len(label.classes)).argmax()
    num = judge.stop - judge.start
    intervals = [wilson(accuracy, num) for accuracy, _ in results]
    return LinearProbe(
        label=label.name,
        num_classes=len(label.classes),
        num_fitted=fit.stop,
        num_judged=num,
        chance=float((values[judge] == usual).mean()),
        accuracy=[accuracy for accuracy, _ in results],
        low=[low for low, _ in intervals],
        high=[high for _, high in intervals],
        penalty=[penalty for _, penalty in results],
    )


def wilson(share: float, num: int) -> tuple[float, float]:
    """95 % interval of a share of ``num`` (Wilson's score interval)."""
    spread = Z_95**2 / num
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
