"""The file of ``data.columns``: columns of the user's, with the types of their values."""

from typing import Any, Protocol

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from fsspec.implementations.local import LocalFileSystem

from ....schemas import InputError
from ....schemas.arrow import ParquetReader, in_arrow
from ....schemas.files import reaching
from ....schemas.urls import check_protocol, suffix_of

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
_BLOCK_BYTES = 1 << 26
"""Block of a csv or jsonl file: its largest row must fit in one, and the first gives the types."""


class ColumnsFile(Protocol):
    """What is used of a dataset of Arrow's."""

    @property
    def schema(self) -> pa.Schema:
        """Of all columns."""

    def to_table(self, columns: list[str]) -> pa.Table:
        """These columns."""


def open_columns(name: str) -> ColumnsFile:
    """Open a file of columns.

    Args:
        name: path or URL of a parquet, csv, tsv or jsonl file.

    Raises:
        InputError: it is not there, not readable as such, or does not answer.
    """
    import pyarrow.dataset  # and with it pandas

    check_protocol(name)
    suffix = suffix_of(name, SUFFIXES)
    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        if isinstance(filesystem, LocalFileSystem):
            return pyarrow.dataset.dataset(path, format=_format(suffix))
        if suffix == ".parquet":
            return _FetchedParquet(name)
        return pyarrow.dataset.dataset(_fetch(name, suffix))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"data.columns: {name} cannot be read as parquet, csv or jsonl: {error}"
        ) from error


class _FetchedParquet:
    """Parquet that Arrow's threads would read through Python: it is read in this thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        with self._open() as file:
            self.schema = ParquetReader(file).schema_arrow
        _check_names(self.schema)

    def to_table(self, columns: list[str]) -> pa.Table:
        with self._open() as file:
            return ParquetReader(file).read_columns(columns)

    def _open(self) -> Any:
        with reaching(self._name):
            return fsspec.open(self._name, "rb").open()


def _fetch(name: str, suffix: str) -> pa.Table:
    with reaching(name), fsspec.open(name, "rb") as file:
        content = pa.BufferReader(in_arrow(file.read()))
    if suffix in (".csv", ".tsv"):
        options, parse_options = _csv_options(suffix)
        table = pyarrow.csv.read_csv(content, read_options=options, parse_options=parse_options)
    elif suffix == ".jsonl":
        table = pyarrow.json.read_json(content, read_options=_json_options())
    else:
        raise ValueError(f"its name ends in {suffix or 'no suffix'}")
    _check_names(table.schema)
    return table


def _check_names(schema: pa.Schema) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise ValueError(f"it has multiple columns named {name}")


def _format(suffix: str) -> Any:
    import pyarrow.dataset

    if suffix in (".csv", ".tsv"):
        options, parse_options = _csv_options(suffix)
        return pyarrow.dataset.CsvFileFormat(read_options=options, parse_options=parse_options)
    if suffix == ".jsonl":
        return pyarrow.dataset.JsonFileFormat(read_options=_json_options())
    return suffix.removeprefix(".")


def _csv_options(suffix: str) -> tuple[pyarrow.csv.ReadOptions, pyarrow.csv.ParseOptions]:
    form: dict[str, Any] = {"newlines_in_values": True}
    if suffix == ".tsv":
        form = {"delimiter": "\t", "quote_char": False, "double_quote": False}
    options = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES)
    return options, pyarrow.csv.ParseOptions(**form)


def _json_options() -> pyarrow.json.ReadOptions:
    return pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES)
