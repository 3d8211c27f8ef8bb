"""Stores that hold something for every unique caption."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import (
    SAMPLES_EXTRA,
    SAMPLES_SCHEMA,
    ConditioningManifest,
    FeatureManifest,
)
from ...schemas.columns import as_column, numbers
from ...schemas.tables import WEIGHTS
from .base import Store
from .checks.tables import caption_faults, sample_faults, token_faults
from .documents import StoreError, refuse_faults

C = TypeVar("C", FeatureManifest, ConditioningManifest)


class CaptionStore(Store[C]):
    """Common part of stores that hold something for every unique caption."""

    tables = ("captions.parquet", "samples.parquet")
    captions_schema: ClassVar[pa.Schema]
    """Schema of that table."""
    length_columns: tuple[str, ...]
    """Columns of it that :meth:`expected_rows` needs."""

    @cached_property
    def captions(self) -> pa.Table:
        """One row per unique caption, in store order; row 0 is the null caption."""
        table = self.read_table(self.tables[0], self.captions_schema, len(self))
        faults = caption_faults(table, self.manifest.layout, self.expected_rows(table))
        refuse_faults(self.path / self.tables[0], chain(token_faults(table), faults))
        return table

    @abstractmethod
    def expected_rows(self, captions: pa.Table) -> np.ndarray:
        """Number of rows that each caption must have, ``[captions]``, by its tokens."""

    @cached_property
    def samples(self) -> pa.Table:
        """One row per input row (:data:`semroute.schemas.SAMPLES_SCHEMA`), some with
        :data:`semroute.schemas.SAMPLES_EXTRA`."""
        num = self.manifest.identity.samples.num_samples
        schema = pa.schema([*SAMPLES_SCHEMA, *SAMPLES_EXTRA])
        table = self.read_table("samples.parquet", schema, num, SAMPLES_EXTRA.names)
        refuse_faults(self.path / "samples.parquet", sample_faults(table, len(self)))
        return table

    def check_tables(self, *, all_columns: bool = True) -> None:
        _ = (self.captions, self.samples) if all_columns else (self._rows, self.sample_lists())

    @cached_property
    def first_captions(self) -> np.ndarray:
        """First caption of each sample: ids for reading, int64 ``[samples]``."""
        return numbers(pc.list_element(self.sample_lists()["caption_ids"], 0))

    def sample_lists(self) -> pa.Table:
        """The captions of each sample, and their weights if there are any: columns ``caption_ids``
        and ``caption_weights`` of :attr:`samples`; of the table little more is read."""
        table = self.__dict__.get("samples")
        if table is None:
            schema = pa.schema(
                [
                    SAMPLES_SCHEMA.field("sample_id"),
                    SAMPLES_SCHEMA.field("caption_ids"),
                    SAMPLES_EXTRA.field(WEIGHTS),
                ]
            )
            num = self.manifest.identity.samples.num_samples
            table = self.read_table(self.tables[1], schema, num, [WEIGHTS])
            refuse_faults(self.path / self.tables[1], sample_faults(table, len(self)))
        return table.select([n for n in table.column_names if n in ("caption_ids", WEIGHTS)])

    def check_source(
        self,
        source: str | os.PathLike[str],
        texts: Sequence[str],
        *,
        first_rows: bool = False,
        remedy: str = "",
    ) -> None:
        """Refuse a file that this store was not extracted from.

        Args:
            source: the file, for the message.
            texts: first caption of each row; with ``first_rows``, perhaps of the first rows only.
            remedy: what to do, a sentence at the end of the message.

        Raises:
            StoreError: the first captions of the stored samples are not these.
        """
        ids = self.first_captions[: len(texts)] if first_rows else self.first_captions
        stored = self.captions["text"].take(as_column(ids)).to_pylist()
        if stored != list(texts):
            raise StoreError(
                f"{self.path} was not extracted from {source}: the captions differ."
                f"{' ' * bool(remedy)}{remedy}"
            )

    def __len__(self) -> int:
        return self.manifest.identity.captions.num_captions

    def num_rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Number of rows of each caption, int64 ``[captions]``; errors as for :meth:`row_spans`."""
        starts, stops = self.row_spans(ids)
        return np.asarray(stops - starts)

    def row_spans(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row of some captions, and the row after the last of each: int64 ``[captions]``.

        Raises:
            StoreError: no such caption.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise StoreError(
                f"caption ids {ids.min()} to {ids.max()} asked for; the store has 0 to "
                f"{len(self) - 1}"
            )
        starts, stops = self._rows
        return starts[ids], stops[ids]

    def shards(self) -> np.ndarray:
        """Shard of each caption, int64 ``[captions]``."""
        return np.asarray(self._rows[0] // self.manifest.layout.rows_per_shard)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of every caption, and the row after its last.

        It is all that reading needs to hold: texts and tokens are read when somebody asks for
        :attr:`captions`.
        """
        table = self.__dict__.get("captions")
        if table is None:
            names = {"caption_id", "shard", "row_start", "row_stop", *self.length_columns}
            schema = pa.schema([field for field in self.captions_schema if field.name in names])
            table = self.read_table(self.tables[0], schema, len(self))
            faults = caption_faults(table, self.manifest.layout, self.expected_rows(table))
            refuse_faults(self.path / self.tables[0], faults)
        return numbers(table["row_start"]), numbers(table["row_stop"])
