"""URLs of fsspec: their protocol, and the name of a file before its query."""

from collections.abc import Collection
from pathlib import PurePosixPath

from .errors import InputError


def without_query(source: str) -> str:
    """A path as it is; a URL without what follows ``?`` or ``#``."""
    if "://" not in source:
        return source
    scheme, mark, rest = source.rpartition("://")
    return scheme + mark + rest.partition("?")[0].partition("#")[0]


def suffix_of(source: str, known: Collection[str]) -> str:
    """Suffix of a file, in lower case, such as ``.csv``; that of a URL is before its query, unless
    it is in it, as in ``https://host/get?file=a.csv``.

    Args:
        known: suffixes of files that can be read.
    """
    before = PurePosixPath(without_query(source)).suffix.lower()
    return before if before in known else PurePosixPath(source).suffix.lower()


def check_protocol(source: str) -> None:
    """Refuse a URL that nothing here can read.

    Raises:
        InputError: no such protocol, or its package is not installed.
    """
    if "://" not in source:
        return
    import fsspec

    for part in source.split("::"):
        protocol, mark, _ = part.partition("://")
        if not mark:
            continue
        try:
            fsspec.get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise InputError(f"{source}: {error}") from error
