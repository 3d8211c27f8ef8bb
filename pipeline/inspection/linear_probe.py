"""Linear probes on cached hidden states, solved in closed form: which layer knows what.

A probe is a ridge regression from the hidden states of a layer to the classes of a label, one-hot;
its answer is the class with the largest output. There are no iterations and no initial weights, so
the same store and labels give the same numbers. One probe per layer is the idea of Alain and Bengio
(arXiv 1610.01644).

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

from ...schemas import InputError, Summary
from ...schemas.verbosity import progress_bar
from ..executor.threads import quiet_products
from ..sources.labels import Label, classify, read_labels
from ..store.features import FeatureStore
from ..store.open import open_features
from .statistics import layer_norm, layer_of

Pool = Literal["mean", "last"]
NUM_CAPTIONS = 5_000
SHARES = (0.6, 0.2)
"""Shares of the captions to fit on and to choose the penalty on; the others are the test set."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties of the ridge regression, in units of the number of fitted captions; channels are scaled
to a variance of 1."""
WORD_CLASSES = 50
"""Number of the most frequent tokens, which ``word`` tells apart."""
Z_95 = 1.959964
BATCH_SIZE = 256
"""Captions read at once."""


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of a label's probes on captions that they were not fitted on.

    Attributes:
        label: name of the label.
        num_classes: C.
        num_fitted, num_judged: captions to fit and to test on.
        chance: accuracy of always answering the class that is most frequent in the fitted captions.
        accuracy: share of right answers, by layer ``[L]``.
        low, high: its 95 % interval over captions (Wilson, J. Am. Stat. Assoc. 22, 1927).
        penalty: the penalty chosen for each layer, in units of ``num_fitted`` ``[L]``.
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
        """Position of the layer with the highest accuracy; the first one in a tie."""
        return int(np.argmax(self.accuracy))


@dataclass(frozen=True, repr=False)
class ProbeResults:
    """Linear probes of all layers of a store.

    Attributes:
        layers: LLM layers.
        pool: how the tokens of a caption became one vector.
        probes: one per label.
        skipped: labels without a probe, and captions without a label, each with the reason.
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
            f"classes; tested on {probe.num_judged:,} captions"
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
    """Probe every stored layer for labels of captions, and for words.

    All probes read LN(h), which is what routing mixes. A caption's label is read from the mean of
    its tokens, or from the last one. Two labels need no table, and are read from one token of each
    caption: ``word`` asks which of the ``WORD_CLASSES`` most frequent tokens it is, and ``word
    before`` which token stands before it, which a layer can only know from context.

    The captions are the first ones in store order, which is random; ``SHARES`` of them are used to
    fit and to choose the penalty, the others to test. Memory: ``8 N L H`` bytes.

    Args:
        source: a table with captions and labels, see
            :func:`semroute.pipeline.sources.labels.read_labels`.
        text_column: column of captions. Default: text, prompt or caption.
        labels: columns of labels. Default: all with few enough classes.
        pool: read a caption's label from the mean of its tokens, or from the last.
        num_captions: the largest number of captions to use, N.

    Raises:
        InputError: as ``read_labels``; a shard is not written; a store of mixes.
    """
    store = open_features(path)
    if store.mixes is not None:
        raise InputError(f"{path} holds mixes of layers; expected a store of layers, its source")
    if len(store) < 2:
        raise InputError(f"{path} holds no caption besides the null caption")
    ids = np.arange(1, min(len(store), num_captions + 1))
    table = store.captions.slice(1, len(ids))
    caption_labels, skipped = read_labels(
        source, table["text"].to_pylist(), text_column=text_column, names=labels
    )
    words, positions = _pick_tokens(table["token_ids"].to_pylist())
    word_labels = {name: classify(name, tokens) for name, tokens in words.items()}
    skipped += [
        f"{name}: too few captions with frequent tokens"
        for name, label in word_labels.items()
        if label is None
    ]
    with progress_bar(total=len(ids), desc="reading", unit="caption", disable=not progress) as bar:
        pooled, picked = _read(store, ids, positions, pool, bar.update)
    subjects = [(label, pooled) for label in caption_labels]
    subjects += [(label, picked) for label in word_labels.values() if label is not None]
    results: list[list[tuple[float, float]]] = [[] for _ in subjects]
    alike: dict[tuple[int, bytes], list[int]] = {}
    for number, (label, hidden) in enumerate(subjects):
        alike.setdefault((id(hidden), (label.values >= 0).tobytes()), []).append(number)
    bar = progress_bar(total=len(store.layers), desc="probing", unit="layer", disable=not progress)
    with bar, quiet_products():
        for layer in range(len(store.layers)):
            for numbers in alike.values():
                together, hidden = [subjects[n][0] for n in numbers], subjects[numbers[0]][1]
                for number, found in zip(numbers, _probe(hidden[layer], together), strict=True):
                    results[number].append(found)
            bar.update()
    probes = [_summarise(label, each) for (label, _), each in zip(subjects, results, strict=True)]
    return ProbeResults(store.layers, pool, probes, [*skipped, *_left_out(caption_labels)])


def _left_out(labels: Sequence[Label]) -> Iterator[str]:
    """Captions that have no label, by reason."""
    for label in labels:
        if label.num_rare:
            yield f"{label.name}: {label.num_rare:,} captions of classes that are too rare"
        if label.num_ambiguous:
            yield f"{label.name}: {label.num_ambiguous:,} captions with several labels"


def _pick_tokens(
    captions: Sequence[Sequence[int]],
) -> tuple[dict[str, list[str | None]], list[int]]:
    """One random frequent token per caption, the one before it, and its position.

    Of the tokens 7 3 9, with 3 and 9 frequent, either 3 is picked (word 3, word before 7, position
    1) or 9 (word 9, word before 3, position 2). The first token has none before it.
    """
    counts = Counter(token for tokens in captions for token in tokens[1:])
    frequent = {token for token, _ in counts.most_common(WORD_CLASSES)}
    rng = np.random.default_rng(0)
    words: dict[str, list[str | None]] = {"word": [], "word before": []}
    positions = []
    for tokens in captions:
        candidates = [at for at in range(1, len(tokens)) if tokens[at] in frequent]
        position = int(rng.choice(candidates)) if candidates else 0
        words["word"].append(str(tokens[position]) if candidates else None)
        words["word before"].append(str(tokens[position - 1]) if candidates else None)
        positions.append(position)
    return words, positions


def _read(
    store: FeatureStore,
    ids: np.ndarray,
    positions: Sequence[int],
    pool: Pool,
    advance: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
    """LN(h) of captions, pooled, and of one token of each: both float32 ``[L, N, H]``.

    Args:
        positions: of that token in each caption.
        advance: called with the number of captions read.
    """
    shape = (len(store.layers), len(ids), store.manifest.identity.model.width)
    pooled, picked = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for start in range(0, len(ids), BATCH_SIZE):
        part = slice(start, min(len(ids), start + BATCH_SIZE))
        rows = store.read(ids[part])
        firsts, ends = rows.offsets[:-1], rows.offsets[1:]
        for layer in range(shape[0]):
            hidden = layer_norm(layer_of(rows, layer))
            if pool == "mean":
                sums = np.add.reduceat(hidden, firsts)
                pooled[layer, part] = sums / (ends - firsts)[:, None]
            else:
                pooled[layer, part] = hidden[ends - 1]
            picked[layer, part] = hidden[firsts + np.array(positions[part])]
        advance(part.stop - part.start)
    return pooled, picked


def _split(num: int) -> tuple[slice, slice, slice]:
    """Captions to fit on, to choose the penalty on, and to test on."""
    first, second = round(SHARES[0] * num), round(sum(SHARES) * num)
    return slice(0, first), slice(first, second), slice(second, num)


def _probe(features: np.ndarray, labels: Sequence[Label]) -> list[tuple[float, float]]:
    """Accuracy on the test captions, and the penalty that was chosen, of labels that the same
    captions have: what is solved is the same for all.

    Args:
        features: ``[N, H]``.
    """
    known = labels[0].values >= 0
    x = features[known].astype(np.float64)
    fit, choose, _ = _split(len(x))
    x -= x[fit].mean(0)
    x /= np.maximum(x[fit].std(0), 1e-6)
    fitted, judged, num_choosing = x[fit], x[fit.stop :], choose.stop - choose.start
    targets = [np.eye(len(label.classes))[label.values[known][fit]] for label in labels]
    target = np.concatenate(targets, axis=1)
    shares = target.mean(0)
    ends = np.cumsum([len(label.classes) for label in labels])
    gram, moment = fitted.T @ fitted, fitted.T @ (target - shares)
    diagonal = np.arange(len(gram))
    best = [(-1.0, 0.0, PENALTIES[0])] * len(labels)
    for penalty in PENALTIES:
        damped = gram.copy()
        damped[diagonal, diagonal] += penalty * len(target)
        outputs = judged @ np.linalg.solve(damped, moment) + shares
        for number, (label, each) in enumerate(
            zip(labels, np.split(outputs, ends[:-1], axis=1), strict=True)
        ):
            right = each.argmax(1) == label.values[known][fit.stop :]
            score = float(right[:num_choosing].mean())
            if score > best[number][0]:
                best[number] = score, float(right[num_choosing:].mean()), penalty
    return [(accuracy, penalty) for _, accuracy, penalty in best]


def _summarise(label: Label, results: Sequence[tuple[float, float]]) -> LinearProbe:
    """The accuracies and penalties of all layers, with chance and intervals."""
    values = label.values[label.values >= 0]
    fit, _, test = _split(len(values))
    usual = np.bincount(values[fit], minlength=len(label.classes)).argmax()
    num = test.stop - test.start
    intervals = [wilson(accuracy, num) for accuracy, _ in results]
    return LinearProbe(
        label=label.name,
        num_classes=len(label.classes),
        num_fitted=fit.stop,
        num_judged=num,
        chance=float((values[test] == usual).mean()),
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
