"""Samples and captions of stores that take part in training, and how often.

Shapes: N samples, M captions of all samples, P positions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ....schemas import (
    MASK,
    DataConfig,
    InputError,
    MixtureRecord,
    SelectionConfig,
    SelectionRecord,
    TrainConfig,
    ValidationConfig,
    differences,
    refuse_differences,
)
from ....schemas.arrow import passing
from ....schemas.columns import as_column, numbers, one_array, to_plain
from ....schemas.seeds import Purpose, as_uniform, numpy_generator
from ....schemas.tables import WEIGHTS
from .columns_file import open_columns
from .filters import parse_filter

if TYPE_CHECKING:
    from ..conditioning import ConditioningStore
    from ..features import FeatureStore
    from ..latents import LatentStore


NUM_COMPARED = 64
"""Captions whose number of rows is compared between features and conditioning."""
_NUM_NAMED = 20
"""Column names listed in a message."""
_MAY_DIFFER = {"captions", "samples", "max_length"}
"""Parts of the identity of features that may differ within a mixture: other captions are its
point."""
Shape = tuple[int, int, int]
"""C, h and w of latents."""


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Samples to train on, of one pair of stores, and their captions.

    Two samples, 4 with one caption and 7 with two::

        samples     4   7
        starts      0   1       3
        captions   11  12  40

    Attributes:
        samples: ids, ascending: int64 ``[N]``.
        starts: int64 ``[N + 1]``; sample n has captions ``starts[n]:starts[n + 1]``, at least one.
        captions: ids, int64 ``[M]``.
        weights: how often each caption is shown, relative to the others of its sample: positive,
            float64 ``[M]``. None: all equally often.
        shards: shard of each caption, int64 ``[M]``; for an order by shards.
    """

    samples: np.ndarray
    starts: np.ndarray
    captions: np.ndarray
    weights: np.ndarray | None = None
    shards: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def _share_before(self) -> np.ndarray:
        """Share of its sample's weight that the captions before each one have: float64 ``[M]``."""
        assert self.weights is not None
        first, counts = self.starts[:-1], np.diff(self.starts)
        before = np.cumsum(self.weights) - self.weights
        sums = np.add.reduceat(self.weights, first)
        return np.asarray((before - np.repeat(before[first], counts)) / np.repeat(sums, counts))

    def choose(self, samples: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """A caption of each sample: indices into :attr:`captions`, int64 ``[P]``.

        Args:
            samples: indices into :attr:`samples`, int64 ``[P]``.
            bits: random bits that decide, uint64 ``[P]``.
        """
        first = self.starts[samples]
        counts = self.starts[samples + 1] - first
        if self.weights is None:
            return np.asarray(first + (bits % counts.astype(np.uint64)).astype(np.int64))
        # Weights 1, 3 and 4 have the shares 0, 1/8 and 4/8 before them. The choice is how many of
        # these, not counting the first, the uniform number has reached.
        choice, uniform = np.zeros(len(samples), np.int64), as_uniform(bits)
        for number in range(1, int(counts.max(initial=1))):
            some = np.flatnonzero(counts > number)
            choice[some] += uniform[some] >= self._share_before[first[some] + number]
        return np.asarray(first + choice)

    def subset(self, samples: np.ndarray, captions: np.ndarray) -> "SampleIndex":
        """Some of the samples and captions, by masks ``[N]`` and ``[M]``."""
        number = np.repeat(np.arange(len(self)), np.diff(self.starts))
        counts = np.bincount(number[captions], minlength=len(self))[samples]
        return SampleIndex(
            self.samples[samples],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            self.captions[captions],
            None if self.weights is None else self.weights[captions],
            None if self.shards is None else self.shards[captions],
        )


@dataclass(frozen=True)
class StorePair:
    """A feature and a latent store of the same samples, and what of them is trained on.

    Attributes:
        index: samples and captions that are trained on.
        selection: what was left out; None where all samples and captions take part equally.
        proportion: share of all positions; None: what the others leave.
        conditioning: what the pipeline of a pretrained network gives it for the captions.
    """

    features: "FeatureStore"
    latents: "LatentStore"
    index: SampleIndex
    selection: SelectionRecord | None = None
    proportion: float | None = None
    conditioning: "ConditioningStore | None" = None

    def without(self, held_out: Sequence[int] | np.ndarray) -> "StorePair":
        """The same pair without some samples.

        Raises:
            InputError: none is left.
        """
        kept = ~np.isin(self.index.samples, held_out)
        if kept.all():
            return self
        if not kept.any():
            raise InputError(f"{self.features.path}: all samples are held out; hold out fewer")
        captions = np.repeat(kept, np.diff(self.index.starts))
        return replace(self, index=self.index.subset(kept, captions))

    def row_bytes(self, layers: Sequence[int]) -> float:
        """Stored bytes per token that reading these layers takes; codecs but bf16 read all."""
        share = 1.0
        if self.features.codec.name == "bf16":
            share = len(layers) / len(self.features.layers)
        return share * self._row_bytes

    @cached_property
    def _row_bytes(self) -> float:
        receipts = self.features.receipts().values()
        num_rows = sum(receipt.num_rows for receipt in receipts)
        if not num_rows:  # with a disk budget, before its first shard
            return self.features.bytes_per_row()
        return sum(f.num_bytes for r in receipts for f in r.files.values()) / num_rows

    @cached_property
    def latent_bytes(self) -> float:
        """Stored bytes per latent."""
        return self.latents.num_bytes() / max(1, len(self.latents.ids))

    def summary(self) -> str:
        """Its path and counts, in one line."""
        text = f"{self.features.path}: {len(self.index):,} samples"
        if self.selection is not None:
            text += (
                f" (left out by data.select: {self.selection.left_out_samples:,} samples, "
                f"{self.selection.left_out_captions:,} captions)"
            )
        return text if self.proportion is None else f"{text}, {self.proportion:.3g} of all shown"

    def record(self) -> MixtureRecord:
        """Its entry in ``run.json``, where it is not the first pair."""
        return MixtureRecord(
            features=self.features.manifest.identity,
            codec=self.features.manifest.codec,
            latents=self.latents.manifest.identity,
            selection=self.selection,
        )


def open_stores(config: TrainConfig) -> list[StorePair]:
    """Open what a run reads: :func:`open_pairs` of the two stores that its configuration names.

    Raises:
        StoreError: as :meth:`.Store.open`.
        InputError: as :func:`open_pairs`.
    """
    from ..open import open_followed, open_latents

    features = open_followed(config.features)
    return open_pairs(features, open_latents(config.latents, all_columns=False), config.data)


def open_pairs(
    features: "FeatureStore", latents: "LatentStore", data: DataConfig
) -> list[StorePair]:
    """The pair of stores that a run names, and those of its mixture.

    Raises:
        InputError: a store is unfinished, or two do not belong together; a filter or column of
            weights does not fit; nothing is left to train on.
    """
    from ..open import open_followed, open_latents

    first = select(features, latents, data.select)
    pairs = [replace(first, conditioning=open_joined(data.conditioning, features))]
    for config in data.mixture:
        texts = open_followed(config.features)
        images = open_latents(config.latents, all_columns=False)
        different = differences(
            texts.manifest.identity.model_dump(mode="json", exclude=_MAY_DIFFER),
            features.manifest.identity.model_dump(mode="json", exclude=_MAY_DIFFER),
        )
        different += differences(
            images.manifest.identity.model_dump(mode="json", include={"vae", "files"}),
            latents.manifest.identity.model_dump(mode="json", include={"vae", "files"}),
        )
        refuse_differences(
            different,
            f"{texts.path} and {images.path} cannot be mixed with {features.path} and "
            f"{latents.path}; these, against those",
            "Make them with the same model, template, layers and VAE.",
        )
        if (config.conditioning is None) != (data.conditioning is None):
            raise InputError(
                f"data.conditioning is {data.conditioning} and that of {config.features} in "
                f"data.mixture is {config.conditioning}: name both or neither"
            )
        pair = select(texts, images, config.select)
        conditioning = open_joined(config.conditioning, texts)
        pairs.append(replace(pair, proportion=config.proportion, conditioning=conditioning))
    return pairs


def open_joined(path: str | None, features: "FeatureStore") -> "ConditioningStore | None":
    """Open a conditioning store of the captions of a feature store; None if none is named.

    Raises:
        InputError: it is unfinished, of other captions, or of other lengths.
    """
    if path is None:
        return None
    from ..open import open_conditioning

    store = open_conditioning(path, all_columns=False)
    store.check_complete()
    refuse_differences(
        differences(
            store.manifest.identity.captions.model_dump(mode="json"),
            features.manifest.identity.captions.model_dump(mode="json"),
        ),
        f"{store.path} was made from other captions than {features.path}; these, against those",
        "Make both from the same file, with the same seed.",
    )
    ids = range(min(len(features), NUM_COMPARED))
    own, given = features.num_rows(ids), _own_rows(store, ids)
    different = np.flatnonzero(own != given)
    if len(different):
        caption = int(different[0])
        text = features.captions["text"][caption].as_py()
        raise InputError(
            f"caption {text!r} has {own[caption]} rows in {features.path} and {given[caption]} in "
            f"{store.path}: extract the features with the preset of the pipeline, and check them "
            "with semroute verify --against"
        )
    return store


def _own_rows(store: "ConditioningStore", ids: Sequence[int]) -> np.ndarray:
    """Rows of a pipeline's text that are a caption's own, int64 ``[captions]``."""
    if store.manifest.identity.ragged:
        return store.num_rows(ids)
    return np.asarray(store.read(ids, [MASK])[MASK].astype(np.int64).sum(-1))


def by_shape(pairs: Sequence[StorePair]) -> dict[Shape, dict[int, SampleIndex]]:
    """Samples that are trained on, by the shape of their latents: shape -> number of the pair ->
    samples.

    The shape that is shown most comes first.
    """
    shapes: dict[Shape, dict[int, SampleIndex]] = {}
    for number, pair in enumerate(pairs):
        buckets = pair.latents.buckets[pair.index.samples]
        counts = np.diff(pair.index.starts)
        for bucket in np.unique(buckets).tolist():
            kept = buckets == bucket
            part = pair.index
            if not kept.all():
                part = part.subset(kept, np.repeat(kept, counts))
            shapes.setdefault(pair.latents.shape(bucket), {})[number] = part
    return dict(sorted(shapes.items(), key=lambda item: -sum(shares_of(pairs, item[1]))))


def proportions(pairs: Sequence[StorePair]) -> list[float]:
    """Share of all positions per pair."""
    others = [pair.proportion or 0.0 for pair in pairs[1:]]
    return [1.0 - sum(others), *others]


def shares_of(pairs: Sequence[StorePair], parts: Mapping[int, SampleIndex]) -> list[float]:
    """Share of all positions per part of a pair, by the number of the pair."""
    whole = proportions(pairs)
    return [whole[n] * len(part) / len(pairs[n].index) for n, part in parts.items()]


def select(features: "FeatureStore", latents: "LatentStore", config: SelectionConfig) -> StorePair:
    """A pair of stores with the samples and captions that a configuration chooses.

    A filter tests each caption of each sample. Captions that it leaves out are never shown, and
    samples without a remaining caption are not trained on, nor are samples without a latent.

    Captions whose columns had weights in extraction keep them unless the configuration has others.

    Raises:
        InputError: as :func:`open_pairs`.
    """
    check_joined(features, latents)
    table = features.sample_lists().take(as_column(latents.ids))
    whole = _index(features, latents, table)
    weights = None
    if config.caption_weights is None and WEIGHTS in table.column_names:
        weights = numbers(one_array(table[WEIGHTS]).flatten())
    if config.filter is None and config.caption_weights is None and weights is None:
        return StorePair(features, latents, whole)
    columns = JoinedColumns(features, latents, config.columns)
    sample = np.repeat(np.arange(len(whole)), np.diff(whole.starts))
    kept = np.ones(len(sample), bool)
    if config.filter is not None:
        kept &= columns.passing(config.filter, whole, sample)
    if config.caption_weights is not None:
        weights = columns.weights(config.caption_weights, whole, sample)
    if weights is not None:
        kept &= weights > 0
    counts = np.bincount(sample[kept], minlength=len(whole))
    if not counts.any():
        raise InputError(
            f"{features.path}: the filter {config.filter!r} leaves nothing to train on, of "
            f"{len(whole):,} samples"
        )
    index = replace(whole, weights=weights).subset(counts > 0, kept)
    parts = (index.samples, index.starts, index.captions, index.weights)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
    record = SelectionRecord(
        num_samples=len(index),
        num_captions=len(index.captions),
        left_out_samples=len(whole) - len(index),
        left_out_captions=len(whole.captions) - len(index.captions),
        fingerprint=digest.hexdigest(),
    )
    return StorePair(features, latents, index, record)


def all_samples(features: "FeatureStore", latents: "LatentStore") -> SampleIndex:
    """All samples that have a latent, with all their captions."""
    return _index(features, latents, features.sample_lists().take(as_column(latents.ids)))


def _index(features: "FeatureStore", latents: "LatentStore", table: pa.Table) -> SampleIndex:
    """Samples that have a latent, with the captions that a table lists for each of them."""
    lists, shards = one_array(table["caption_ids"]), features.shards()
    captions = numbers(lists.values)
    starts = numbers(lists.offsets).astype(np.int64)
    return SampleIndex(latents.ids, starts, captions, shards=shards[captions])


def held_out(config: ValidationConfig, ids: np.ndarray) -> np.ndarray:
    """Samples to hold out of training: int64 ids, in random order.

    The random number of a sample is a function of (seed, id), so a store that grows holds out the
    same samples, and some of the new ones.

    Args:
        ids: samples that have a latent: int64, ascending.
    """
    if not config.share:
        return ids[:0]
    generator = numpy_generator(config.seed, Purpose.HELD_OUT)
    drawn = generator.random(int(ids.max(initial=-1)) + 1)[ids]
    picked = np.flatnonzero(drawn < config.share)
    return ids[picked[np.argsort(drawn[picked], kind="stable")]]


def validation_samples(config: ValidationConfig, ids: np.ndarray) -> np.ndarray:
    """Held-out samples that the loss is measured on: int64 ids, ascending.

    Args:
        ids: samples that have a latent: int64, ascending.

    Raises:
        InputError: the share leaves no samples on one side.
    """
    samples = held_out(config, ids)
    if not 0 < len(samples) < len(ids):
        raise InputError(
            f"validation.share {config.share:g} holds out {len(samples)} of {len(ids)} samples: it "
            "must leave some on each side"
        )
    return np.sort(samples[: config.num_samples])


class JoinedColumns:
    """Columns of both stores and of the user's table, joined to captions of samples.

    Args:
        table: path or URL of a parquet, csv or jsonl file: with a column ``sample_id``, or one row
            per sample, in their order.
    """

    def __init__(self, features: "FeatureStore", latents: "LatentStore", table: str | None) -> None:
        self.by_caption = features.captions
        self.by_sample = [features.samples, latents.samples]
        self.table = None if table is None else open_columns(table)
        self.name = table
        self.num_samples = len(latents)

    def passing(self, text: str, whole: SampleIndex, sample: np.ndarray) -> np.ndarray:
        """Mask of the captions that a filter keeps: bool ``[M]``; null counts as false."""
        expression, names = parse_filter(text)
        columns = {name: self.column(name, whole, sample) for name in sorted(names)}
        number = "_number"
        table = pa.table({**columns, number: np.arange(len(sample))})
        try:
            passed = passing(table, expression)[number].to_numpy()
        except pa.ArrowException as error:
            raise InputError(f"filter {text!r}: {error}") from error
        kept = np.zeros(len(sample), bool)
        kept[passed] = True
        return kept

    def weights(
        self, given: Sequence[float] | str, whole: SampleIndex, sample: np.ndarray
    ) -> np.ndarray:
        """Weight of each caption: float64 ``[M]``.

        Args:
            given: one number per caption of a sample, in their order; or the name of a column.
        """
        # Of samples with 1, 2 and 1 captions:  sample 0 1 1 2, starts 0 1 3 4, within 0 0 1 0.
        within = np.arange(len(sample)) - whole.starts[sample]
        if not isinstance(given, str):
            if len(sample) and within.max() >= len(given):
                raise InputError(
                    f"caption_weights has {len(given)} numbers, but sample "
                    f"{whole.samples[sample[within.argmax()]]} has {within.max() + 1} captions; "
                    "give one number per caption, 0 for those that are not to be shown"
                )
            return np.asarray(given, np.float64)[within]
        column = self.column(given, whole, sample)
        try:
            weights = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowException as error:
            raise InputError(
                f"caption_weights: column {given!r} has no numbers: {error}"
            ) from error
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            raise InputError(
                f"caption_weights: column {given!r} has {weights[bad[0]]} for sample "
                f"{whole.samples[sample[bad[0]]]}; expected numbers of 0 or more"
            )
        return weights

    def column(self, name: str, whole: SampleIndex, sample: np.ndarray) -> pa.Array:
        """One column by caption: ``[M]``."""
        if name in self.by_caption.schema.names:
            return one_array(self.by_caption[name]).take(as_column(whole.captions))
        for table in self.by_sample:
            if name in table.schema.names:
                return one_array(table[name]).take(as_column(whole.samples[sample]))
        if self.table is None or name not in self.table.schema.names:
            known = [
                *self.by_caption.schema.names,
                *(n for table in self.by_sample for n in table.schema.names),
                *(self.table.schema.names if self.table else ()),
            ]
            shown = ", ".join([*dict.fromkeys(known)][:_NUM_NAMED])
            hint = "" if self.table else "; data.columns names a file with more"
            raise InputError(f"no column {name!r}; there are {shown}{hint}")
        own = self._table_column(name)
        if not (pa.types.is_list(own.type) or pa.types.is_large_list(own.type)):
            return own.take(as_column(whole.samples[sample]))
        lists = own.take(as_column(whole.samples))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        counts = np.diff(whole.starts)
        wrong = np.flatnonzero(lengths != counts)
        if len(wrong):
            raise InputError(
                f"{self.name}: column {name!r} has {lengths[wrong[0]]} values for sample "
                f"{whole.samples[wrong[0]]}, which has {counts[wrong[0]]} captions; give one value "
                "per caption, or one per sample"
            )
        return lists.flatten()

    def _table_column(self, name: str) -> pa.Array:
        """A column of the user's table by sample; null for samples that the table lacks."""
        assert self.table is not None
        if "sample_id" not in self.table.schema.names:
            column = self._read_table([name])[0]
            if len(column) != self.num_samples:
                raise InputError(
                    f"{self.name} has {len(column):,} rows but there are {self.num_samples:,} "
                    "samples; give it a column sample_id, or the rows that the stores were made "
                    "from"
                )
            return column
        number, column = self._read_table(["sample_id", name])
        ids = number.to_numpy(zero_copy_only=False)
        if len(np.unique(ids)) != len(ids):
            raise InputError(f"{self.name}: a sample_id occurs twice; expected one row per sample")
        row = pc.index_in(as_column(np.arange(self.num_samples)), as_column(ids.astype(np.int64)))
        return column.take(row)

    def _read_table(self, names: list[str]) -> list[pa.Array]:
        """Columns of the user's table.

        Raises:
            InputError: the file is damaged.
        """
        assert self.table is not None
        try:
            table = self.table.to_table(columns=names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"data.columns: {self.name} cannot be read: {error}") from error
        return [one_array(to_plain(table[name])) for name in names]


def check_joined(features: "FeatureStore", latents: "LatentStore") -> None:
    """Refuse stores that cannot be trained on together.

    Raises:
        InputError: one is unfinished, or they were not made from the same samples.
    """
    if not features.has_budget:
        features.check_complete()
    latents.check_complete()
    text, images = features.manifest.identity.samples, latents.manifest.identity.samples
    if text.num_samples != images.num_samples:
        raise InputError(
            f"{features.path} has {text.num_samples} samples but {latents.path} has "
            f"{images.num_samples}: make both from the same file"
        )
    if images.fingerprint is not None and text.fingerprint != images.fingerprint:
        raise InputError(
            f"{features.path} and {latents.path} were made from different captions or a different "
            f"order of samples (fingerprints {text.fingerprint} and {images.fingerprint}): make "
            "both from the same file"
        )
