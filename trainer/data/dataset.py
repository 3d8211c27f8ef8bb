"""Which samples and captions of stores take part in training, and how often.

Shapes: N samples, M captions of all samples.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from ...pipeline.store.features import FeatureStore
from ...pipeline.store.latents import LatentStore
from ...pipeline.store.open import open_features, open_latents
from ...schemas import (
    DataConfig,
    InputError,
    MixtureRecord,
    SelectionConfig,
    SelectionRecord,
    differences,
)
from ...schemas.seeds import as_uniform
from .filters import parse_filter


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Samples to train on, of one pair of stores.

    Attributes:
        samples: ids, ascending: int64 ``[N]``.
        starts: int64 ``[N + 1]``; sample n has captions ``starts[n]:starts[n + 1]``, at least one.
        captions: ids, int64 ``[M]``.
        weights: how often each caption is shown, against the others of its sample: positive,
            float64 ``[M]``. None: all alike.
        shards: in which each caption lies, int64 ``[M]``; for an order by shards.
    """

    samples: np.ndarray
    starts: np.ndarray
    captions: np.ndarray
    weights: np.ndarray | None = None
    shards: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def _below(self) -> np.ndarray:
        """Share of its sample's weight that captions before each one have: float64 ``[M]``."""
        assert self.weights is not None
        first, counts = self.starts[:-1], np.diff(self.starts)
        before = np.cumsum(self.weights) - self.weights
        sums = np.add.reduceat(self.weights, first)
        return np.asarray((before - np.repeat(before[first], counts)) / np.repeat(sums, counts))

    def choose(self, places: np.ndarray, words: np.ndarray) -> np.ndarray:
        """A caption of each sample: places in :attr:`captions`, int64 ``[P]``.

        Args:
            places: in :attr:`samples`, int64 ``[P]``.
            words: random bits that decide, uint64 ``[P]``.
        """
        first = self.starts[places]
        counts = self.starts[places + 1] - first
        if self.weights is None:
            return np.asarray(first + (words % counts.astype(np.uint64)).astype(np.int64))
        choice, drawn = np.zeros(len(places), np.int64), as_uniform(words)
        for number in range(1, int(counts.max(initial=1))):
            some = np.flatnonzero(counts > number)
            choice[some] += drawn[some] >= self._below[first[some] + number]
        return np.asarray(first + choice)


_SHOWN = 20  # column names listed in a message
# What must be the same in all stores of a mixture; other captions are the point of it.
_FREE = {"captions", "samples", "max_length"}
Shape = tuple[int, int, int]
"""C, h and w of latents."""


@dataclass(frozen=True)
class StorePair:
    """A feature and a latent store of the same samples, and what of them is trained on.

    Attributes:
        source: for the order.
        selection: what was left out; None where everything takes part alike.
        proportion: of all positions; None: what the others leave.
    """

    features: FeatureStore
    latents: LatentStore
    source: SampleIndex
    selection: SelectionRecord | None = None
    proportion: float | None = None

    def without(self, held_out: Sequence[int] | np.ndarray) -> "StorePair":
        """The same, but for some samples.

        Raises:
            InputError: none is left.
        """
        source = self.source
        kept = ~np.isin(source.samples, held_out)
        if kept.all():
            return self
        if not kept.any():
            raise InputError(f"{self.features.path}: all samples are held out; hold out less")
        counts = np.diff(source.starts)
        captions = np.repeat(kept, counts)
        return replace(self, source=_source(source, kept, captions))

    def row_bytes(self, layers: Sequence[int]) -> float:
        """Stored bytes of a token; of compressed stores all layers are read."""
        share = 1.0
        if self.features.codec.name == "bf16":
            share = len(layers) / len(self.features.layers)
        return share * self._row_bytes

    @cached_property
    def _row_bytes(self) -> float:
        return self.features.num_bytes() / self.features.manifest.layout.num_rows

    @cached_property
    def latent_bytes(self) -> float:
        """Stored bytes of a latent."""
        return self.latents.num_bytes() / max(1, len(self.latents.ids))

    def summary(self) -> str:
        """How much takes part, on one line."""
        text = f"{self.features.path}: {len(self.source):,} samples"
        if self.selection is not None:
            text += (
                f" (left out by data.select: {self.selection.left_out_samples:,} samples, "
                f"{self.selection.left_out_captions:,} captions)"
            )
        return text if self.proportion is None else f"{text}, {self.proportion:.3g} of all shown"

    def record(self) -> MixtureRecord:
        """What ``run.json`` says of it, where it is not the first."""
        return MixtureRecord(
            features=self.features.manifest.identity,
            codec=self.features.manifest.codec,
            latents=self.latents.manifest.identity,
            selection=self.selection,
        )


def open_pairs(features: FeatureStore, latents: LatentStore, data: DataConfig) -> list[StorePair]:
    """The pair of stores that a run names, and those of its mixture.

    Raises:
        InputError: a store is unfinished, or two do not belong together; a filter or column of
            weights does not fit; nothing is left to train on.
    """
    pairs = [select(features, latents, data.select)]
    for config in data.mixture:
        texts, images = open_features(config.features), open_latents(config.latents)
        different = differences(
            texts.manifest.identity.model_dump(mode="json", exclude=_FREE),
            features.manifest.identity.model_dump(mode="json", exclude=_FREE),
        )
        different += differences(
            images.manifest.identity.model_dump(mode="json", include={"vae", "files"}),
            latents.manifest.identity.model_dump(mode="json", include={"vae", "files"}),
        )
        if different:
            listed = "\n  ".join(map(str, different))
            raise InputError(
                f"{texts.path} and {images.path} cannot be mixed with {features.path} and "
                f"{latents.path}; these, against those:\n  {listed}\n"
                "Make them with the same model, template, layers and VAE."
            )
        pair = select(texts, images, config.select)
        pairs.append(replace(pair, proportion=config.proportion))
    return pairs


def by_shape(pairs: Sequence[StorePair]) -> dict[Shape, dict[int, SampleIndex]]:
    """What is trained on, apart by the shape of its latents: shape -> number of the pair -> source.

    The shape that most is shown of comes first.
    """
    found: dict[Shape, dict[int, SampleIndex]] = {}
    for number, pair in enumerate(pairs):
        buckets = pair.latents.buckets[pair.source.samples]
        counts = np.diff(pair.source.starts)
        for bucket in np.unique(buckets).tolist():
            kept = buckets == bucket
            part = pair.source
            if not kept.all():
                part = _source(part, kept, np.repeat(kept, counts))
            found.setdefault(pair.latents.shape(bucket), {})[number] = part
    return dict(sorted(found.items(), key=lambda item: -sum(shares_of(pairs, item[1]))))


def proportions(pairs: Sequence[StorePair]) -> list[float]:
    """Share of all positions that each pair has."""
    others = [pair.proportion or 0.0 for pair in pairs[1:]]
    return [1.0 - sum(others), *others]


def shares_of(pairs: Sequence[StorePair], sources: Mapping[int, SampleIndex]) -> list[float]:
    """Share of all positions that these parts of pairs have."""
    whole = proportions(pairs)
    return [whole[n] * len(part) / len(pairs[n].source) for n, part in sources.items()]


def select(features: FeatureStore, latents: LatentStore, config: SelectionConfig) -> StorePair:
    """What a configuration chooses from a pair of stores.

    A filter is about each caption of each sample. Captions that it leaves out are never shown, and
    samples without a caption left are not trained on. Samples without a latent never are.

    Raises:
        InputError: as :func:`open_pairs`.
    """
    check_joined(features, latents)
    whole = everything(features, latents)
    if config.filter is None and config.caption_weights is None:
        return StorePair(features, latents, whole)
    columns = JoinedColumns(features, latents, config.columns)
    sample = np.repeat(np.arange(len(whole)), np.diff(whole.starts))
    kept = np.ones(len(sample), bool)
    if config.filter is not None:
        kept &= columns.passing(config.filter, whole, sample)
    weights = None
    if config.caption_weights is not None:
        weights = columns.weights(config.caption_weights, whole, sample)
        kept &= weights > 0
    counts = np.bincount(sample[kept], minlength=len(whole))
    if not counts.any():
        raise InputError(
            f"{features.path}: the filter {config.filter!r} leaves nothing to train on, of "
            f"{len(whole):,} samples"
        )
    source = _source(replace(whole, weights=weights), counts > 0, kept)
    parts = (source.samples, source.starts, source.captions, source.weights)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    record = SelectionRecord(
        num_samples=len(source),
        num_captions=len(source.captions),
        left_out_samples=len(whole) - len(source),
        left_out_captions=len(whole.captions) - len(source.captions),
        fingerprint=digest.hexdigest(),
    )
    return StorePair(features, latents, source, record)


def everything(features: FeatureStore, latents: LatentStore) -> SampleIndex:
    """All samples that have a latent, and all their captions, alike."""
    lists = features.samples["caption_ids"].combine_chunks().take(pa.array(latents.ids))
    shards = features.captions["shard"].to_numpy().astype(np.int64)
    captions = lists.values.to_numpy()
    starts = lists.offsets.to_numpy().astype(np.int64)
    return SampleIndex(latents.ids, starts, captions, shards=shards[captions])


def _source(whole: SampleIndex, samples: np.ndarray, captions: np.ndarray) -> SampleIndex:
    """Part of a source, by masks."""
    number = np.repeat(np.arange(len(whole)), np.diff(whole.starts))
    counts = np.bincount(number[captions], minlength=len(whole))[samples]
    return SampleIndex(
        whole.samples[samples],
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        whole.captions[captions],
        None if whole.weights is None else whole.weights[captions],
        None if whole.shards is None else whole.shards[captions],
    )


class JoinedColumns:
    """Columns of both stores and of a table of the user's, by caption of a sample.

    Args:
        table: path or URL of a parquet, csv or jsonl file: with a column ``sample_id``, or as many
            rows as there are samples, in their order.
    """

    def __init__(self, features: FeatureStore, latents: LatentStore, table: str | None) -> None:
        self.by_caption = features.captions
        self.by_sample = [features.samples, latents.samples]
        self.table = None if table is None else _open_table(table)
        self.name = table
        self.num_samples = len(latents)

    def passing(self, text: str, whole: SampleIndex, sample: np.ndarray) -> np.ndarray:
        """Whether a filter keeps each caption: bool ``[M]``; what is null it leaves out."""
        expression, names = parse_filter(text)
        columns = {name: self.column(name, whole, sample) for name in sorted(names)}
        number = "_number"
        table = pa.table({**columns, number: np.arange(len(sample))})
        try:
            found = table.filter(expression)[number].to_numpy()
        except pa.ArrowException as error:
            raise InputError(f"filter {text!r}: {error}") from error
        kept = np.zeros(len(sample), bool)
        kept[found] = True
        return kept

    def weights(
        self, given: Sequence[float] | str, whole: SampleIndex, sample: np.ndarray
    ) -> np.ndarray:
        """Weight of each caption: float64 ``[M]``.

        Args:
            given: by the place of a caption in its sample, or the name of a column.
        """
        place = np.arange(len(sample)) - whole.starts[sample]
        if not isinstance(given, str):
            if len(sample) and place.max() >= len(given):
                raise InputError(
                    f"caption_weights has {len(given)} numbers, but sample "
                    f"{whole.samples[sample[place.argmax()]]} has {place.max() + 1} captions; give "
                    "one for each, 0 for those that are not to be shown"
                )
            return np.asarray(given, np.float64)[place]
        found = self.column(given, whole, sample)
        try:
            weights = found.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise InputError(
                f"caption_weights: column {given!r} has no numbers: {error}"
            ) from error
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            raise InputError(
                f"caption_weights: column {given!r} has {weights[bad[0]]} for sample "
                f"{whole.samples[sample[bad[0]]]}; expected numbers from 0 on"
            )
        return weights

    def column(self, name: str, whole: SampleIndex, sample: np.ndarray) -> pa.Array:
        """One column: ``[M]``."""
        if name in self.by_caption.schema.names:
            return _array(self.by_caption[name]).take(pa.array(whole.captions))
        for table in self.by_sample:
            if name in table.schema.names:
                return _array(table[name]).take(pa.array(whole.samples[sample]))
        if self.table is None or name not in self.table.schema.names:
            known = [
                *self.by_caption.schema.names,
                *(n for table in self.by_sample for n in table.schema.names),
                *(self.table.schema.names if self.table else ()),
            ]
            shown = ", ".join([*dict.fromkeys(known)][:_SHOWN])
            hint = "" if self.table else "; data.columns names a file with more"
            raise InputError(f"no column {name!r}; there are {shown}{hint}")
        own = self._joined(name)
        if not (pa.types.is_list(own.type) or pa.types.is_large_list(own.type)):
            return own.take(pa.array(whole.samples[sample]))
        lists = own.take(pa.array(whole.samples))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != np.diff(whole.starts))
        if len(wrong):
            raise InputError(
                f"{self.name}: column {name!r} has {lengths[wrong[0]]} values for sample "
                f"{whole.samples[wrong[0]]}, which has {np.diff(whole.starts)[wrong[0]]} captions; "
                "give one a caption, or one a sample"
            )
        return lists.flatten()

    def _joined(self, name: str) -> pa.Array:
        """A column of the user's table, by sample; null for samples that it does not have."""
        assert self.table is not None
        if "sample_id" not in self.table.schema.names:
            found = _array(self.table.to_table(columns=[name])[name])
            if len(found) != self.num_samples:
                raise InputError(
                    f"{self.name} has {len(found):,} rows but there are {self.num_samples:,} "
                    "samples; give it a column sample_id, or the rows that the stores were made of"
                )
            return found
        table = self.table.to_table(columns=["sample_id", name])
        ids = table["sample_id"].to_numpy()
        if len(np.unique(ids)) != len(ids):
            raise InputError(f"{self.name}: a sample_id occurs twice; expected one row a sample")
        place = pc.index_in(pa.array(np.arange(self.num_samples)), pa.array(ids.astype(np.int64)))
        return _array(table[name]).take(place)


def _array(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found


def _open_table(name: str) -> pyarrow.dataset.Dataset:
    form = {"jsonl": "json", "tsv": "csv"}.get(ending := name.rpartition(".")[2], ending)
    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        return pyarrow.dataset.dataset(path, filesystem=filesystem, format=form)
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.columns: {name} cannot be read as parquet, csv or jsonl: {error}"
        ) from error


def check_joined(features: FeatureStore, latents: LatentStore) -> None:
    """Refuse stores that cannot be trained on together.

    Raises:
        InputError: one is unfinished, or they were not made from the same samples.
    """
    for store in (features, latents):
        if not store.is_complete:
            raise InputError(
                f"{store.path} is not finished: {len(store.remaining())} of "
                f"{store.manifest.layout.num_shards} shards remain. Run the command that made it "
                "once more: it continues where it stopped."
            )
    text, images = features.manifest.identity.samples, latents.manifest.identity.samples
    if text.num_samples != images.num_samples:
        raise InputError(
            f"{features.path} has {text.num_samples} samples but {latents.path} has "
            f"{images.num_samples}: make both from the same file"
        )
    if images.fingerprint is not None and text.fingerprint != images.fingerprint:
        raise InputError(
            f"{features.path} and {latents.path} were made from other captions or another order "
            f"of samples (fingerprints {text.fingerprint} and {images.fingerprint}): make both "
            "from the same file"
        )
