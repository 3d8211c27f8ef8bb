"""What a source names: files of one kind, in a stated order.

A source is a path, a URL, a folder, a pattern, or several of them with ``::`` between. Parts and
braces keep their order; what ``*``, ``?`` or a folder holds is sorted by path.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.core import split_protocol

from ...schemas import InputError
from ...schemas.escaping import NOT_UTF8
from ...schemas.files import reaching
from ...schemas.urls import check_protocol, without_query
from .values import parse_json

TAR = ".tar"
FOLDER = "folder"
"""Kind of a folder of images with captions in files of their own."""
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".arrow", TAR)
"""Kinds of files."""
ALIASES = {".jsonlines": ".jsonl", ".ndjson": ".jsonl"}
"""Other suffixes of a kind."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Kinds that may be compressed."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
SIDECARS = (".txt", ".caption", ".json")
_METADATA = re.compile(r"metadata\.(jsonl|csv|parquet)")
_NO_TABLES = re.compile(
    r"(readme|license|requirements).*|dataset_infos?\.json|state\.json|.*_stats\.json", re.I
)
_SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test|eval)(?=[/_.-]|$)", re.I)


@dataclass(frozen=True)
class Files:
    """The files that a source names.

    Attributes:
        source: as the user named it.
        kind: one of :data:`SUFFIXES`, or :data:`FOLDER`, with the images as its paths.
        paths: paths or URLs, in order.
        sidecars: of a folder, suffix -> path of each image's file of that suffix, or None.
    """

    source: str
    kind: str
    paths: list[str]
    sidecars: dict[str, list[str | None]]

    @property
    def is_one_file(self) -> bool:
        """Whether it is a file by its own name, rather than several or a folder."""
        return self.paths == [self.source]

    def describe(self) -> str:
        """Number and kind of the files."""
        if self.kind == FOLDER:
            beside = " and ".join(f"{name} files" for name in self.sidecars) or "no captions"
            return f"{len(self.paths):,} images with {beside} beside them"
        files = "file" if len(self.paths) == 1 else "files"
        return f"{len(self.paths):,} {self.kind[1:]} {files}"


def _named(path: str) -> str:
    """The part of a path or URL that has the suffix: before the query, unless the query has it."""
    before = without_query(path)
    known = {*SUFFIXES, *ALIASES, *COMPRESSIONS}
    return before if PurePosixPath(before).suffix.lower() in known else path


def kind_of(path: str) -> str:
    """The kind of a file by its name, or its suffix where that is none."""
    suffixes = PurePosixPath(_named(path)).suffixes
    last = suffixes[-1].lower() if suffixes else ""
    if last in COMPRESSIONS and len(suffixes) > 1:
        inner = ALIASES.get(suffixes[-2].lower(), suffixes[-2].lower())
        return inner if inner in TEXT_SUFFIXES else f"{inner}{last}"
    return ALIASES.get(last, last)


def compression_of(path: str) -> str | None:
    """How a file is compressed, by its name."""
    return COMPRESSIONS.get(PurePosixPath(_named(path)).suffix.lower())


def find_files(source: str) -> Files:
    """The files of a source.

    Raises:
        InputError: none, several kinds, or a folder in which the captions cannot be told; or a
            place that does not answer.
    """
    with reaching(source):
        return _find(source)


def _find(source: str) -> Files:
    found = [_in_folder(path) if _is_folder(path) else _file(path) for path in expand(source)]
    for path in (source, *(path for each in found for path in each.paths)):
        if NOT_UTF8.search(path):
            raise InputError(f"{path}: its name is not UTF-8, so it cannot be recorded; rename it")
        check_file(path)
    kinds = [*dict.fromkeys(each.kind for each in found)]
    if len(kinds) > 1:
        raise InputError(
            f"{source} names files of several kinds: {', '.join(kinds)}; expected one kind"
        )
    num = [len(each.paths) for each in found]
    sidecars = {
        suffix: [
            path
            for each, count in zip(found, num, strict=True)
            for path in each.sidecars.get(suffix, [None] * count)
        ]
        for suffix in SIDECARS
        if any(suffix in each.sidecars for each in found)
    }
    for path in (path for paths in sidecars.values() for path in paths if path is not None):
        check_file(path)
    return Files(source, kinds[0], [path for each in found for path in each.paths], sidecars)


def check_file(path: str) -> None:
    """Refuse a pipe or a device of this machine, which may have no end; what is not there passes.

    Raises:
        InputError: it is one.
    """
    protocol, inner = split_protocol(path)
    if protocol not in (None, "file", "local"):
        return
    try:
        mode = os.stat(inner).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path} is a pipe or a device; expected a file")


def expand(pattern: str) -> list[str]:
    """Paths or URLs that match a pattern: parts between ``::`` and braces in their order, ``*``,
    ``**`` and ``?`` sorted. A file that has the name itself is taken as it is.

    Raises:
        InputError: nothing matches.
    """
    paths: list[str] = []
    parts = split(pattern)
    for plain in (plain for part in parts for plain in _expand_braces(part)):
        check_protocol(plain)
        if not re.search(r"[*?]", _before_query(plain)):
            paths.append(plain)
            continue
        filesystem, path = filesystem_of(plain)
        matches = [path] if filesystem.exists(path) else sorted(filesystem.glob(path))
        if not matches:
            raise InputError(f"{pattern}: no such file: nothing matches {plain}")
        if "://" in plain:
            matches = [filesystem.unstrip_protocol(match) for match in matches]
        paths += matches
    return paths


def split(pattern: str) -> list[str]:
    """``a.tar::b.tar`` -> both; URLs that fsspec chains by ``::`` stay in one part, as
    ``simplecache::s3://bucket/a.tar`` and ``zip://a.tar::b.zip``."""
    parts: list[str] = []
    chained = False
    for piece in pattern.split("::"):
        if chained:
            parts[-1] += f"::{piece}"
        else:
            parts.append(piece)
        inside = re.match(r"(tar|zip|libarchive)://", piece) is not None
        chained = inside or piece in _protocols()
    return parts


def filesystem_of(path: str) -> tuple[Any, str]:
    """The filesystem of a path or URL, and the path there.

    Raises:
        InputError: no such kind of URL, or its package is missing.
    """
    check_protocol(path)
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise InputError(f"{path} cannot be opened: {error}") from error
    return filesystem, inner


@lru_cache(maxsize=1)
def _protocols() -> frozenset[str]:
    return frozenset(fsspec.available_protocols())


def _expand_braces(pattern: str) -> list[str]:
    """``a{0..2}{x,y}`` -> a0x, a0y, a1x ...; a range is padded to the width of its start. A local
    file that has the name itself is taken as it is."""
    if Path(pattern).exists():
        return [pattern]
    before = _before_query(pattern)
    query = pattern[len(before) :]
    parts = re.split(r"\{([^{}]*)\}", before)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if number % 2 == 0:
            choices.append([part])
        elif bounds:
            first, last = bounds.groups()
            numbers = range(int(first), int(last) + 1)
            choices.append([str(each).zfill(len(first)) for each in numbers])
        else:
            choices.append(part.split(","))
    return ["".join(chosen) + query for chosen in product(*choices)]


def _before_query(plain: str) -> str:
    """A URL of a file without its query; others as they are, as ``?`` stands for any character."""
    before = without_query(plain)
    return before if kind_of(before) in SUFFIXES else plain


def _is_folder(path: str) -> bool:
    if path.startswith(("http://", "https://")):
        return False  # a server lists nothing
    filesystem, inner = filesystem_of(path)
    return bool(filesystem.isdir(inner))


def _file(path: str) -> Files:
    kind = kind_of(path)
    if kind not in SUFFIXES:
        raise InputError(
            f"{path}: cannot tell the format from {kind or 'a name without suffix'!r}; "
            f"expected one of {', '.join(SUFFIXES)}, or a folder"
        )
    return Files(path, kind, [path], {})


def _in_folder(folder: str) -> Files:
    """What a folder holds: a dataset saved to disk, a table of metadata with images, images with
    files of captions beside them, or tables."""
    filesystem, root = filesystem_of(folder)
    names = sorted(
        str(PurePosixPath(path).relative_to(PurePosixPath(root))) for path in filesystem.find(root)
    )
    names = [
        name for name in names if not any(part[0] in "._" for part in PurePosixPath(name).parts)
    ]

    def found(kind: str, chosen: Iterable[str]) -> Files:
        return Files(folder, kind, [_join(folder, name) for name in chosen], {})

    if {"state.json", "dataset_info.json"} <= {*names}:
        state = filesystem.cat_file(str(PurePosixPath(root) / "state.json"))
        return found(".arrow", _data_files(state, _join(folder, "state.json")))
    if "dataset_dict.json" in names:
        parts = sorted({PurePosixPath(n).parts[0] for n in names if n.endswith("state.json")})
        raise InputError(
            f"{folder} holds the splits {', '.join(parts)}; name one, such as "
            f"{_join(folder, parts[0] if parts else 'train')}"
        )
    metadata = [name for name in names if _METADATA.fullmatch(PurePosixPath(name).name)]
    images = [n for n in names if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES]
    if metadata:
        return found(_one_kind(folder, metadata, "metadata"), _one_split(folder, metadata))
    sidecars = _sidecars(images, {*names}, lambda name: _join(folder, name))
    if sidecars:
        return Files(folder, FOLDER, [_join(folder, name) for name in images], sidecars)
    tars = {name.removesuffix(TAR) for name in names if name.endswith(TAR)}
    tables = [
        name
        for name in names
        if kind_of(name) in SUFFIXES
        and not _NO_TABLES.fullmatch(PurePosixPath(name).name)
        # Beside each of its tars img2dataset lists what it downloaded, failures included.
        and not (name.endswith(".parquet") and name.removesuffix(".parquet") in tars)
    ]
    if tables:
        return found(_one_kind(folder, tables, "tables"), _one_split(folder, tables))
    if images:
        return found(FOLDER, images)
    shown = sorted({PurePosixPath(name).suffix for name in names} - {""})
    raise InputError(
        f"{folder} holds neither images nor tables; found "
        f"{', '.join(shown) or 'no files'}, expected images or one of {', '.join(SUFFIXES)}"
    )


def _data_files(content: bytes, source: str) -> list[str]:
    """Names of the files of a dataset saved to disk, which lie beside its state."""
    try:
        state = parse_json(content)
    except ValueError as error:
        raise InputError(f"{source} is damaged: {error}; save the dataset again") from error
    match state:
        case {"_data_files": [_, *_] as files}:
            names = [each.get("filename") if isinstance(each, dict) else None for each in files]
            if all(isinstance(name, str) and PurePosixPath(name).name == name for name in names):
                return [str(name) for name in names]
    raise InputError(
        f"{source} is damaged: expected _data_files, a list of objects with the filename of a file "
        "beside it; save the dataset again"
    )


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/') or ''}/{name}"


def _sidecars(
    images: list[str], names: set[str], place: Callable[[str], str]
) -> dict[str, list[str | None]]:
    """For each suffix that any image has a file of beside it: that file of each image."""
    found = {}
    for suffix in SIDECARS:
        stems = [str(PurePosixPath(name).with_suffix(suffix)) for name in images]
        if any(stem in names for stem in stems):
            found[suffix] = [place(stem) if stem in names else None for stem in stems]
    return found


def _one_kind(folder: str, names: list[str], what: str) -> str:
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(kind_of(name), name)
    if len(kinds) > 1:
        candidates = ", ".join(_join(folder, name) for name in kinds.values())
        raise InputError(
            f"{folder} holds {what} of several kinds, for example {candidates}; name those of one "
            f"kind, such as '{_join(folder, '**/*')}{next(iter(kinds))}'"
        )
    return next(iter(kinds))


def _one_split(folder: str, names: list[str]) -> list[str]:
    """Refuse to mix the splits of a data set, which are told by names of files and folders."""
    splits: dict[str, str] = {}
    for name in names:
        match = _SPLIT.search(name)
        splits.setdefault(match[1].lower() if match else "", name)
    if len(splits) > 1:
        candidates = ", ".join(_join(folder, name) for name in splits.values())
        raise InputError(
            f"{folder} holds several splits, for example {candidates}; name the files of one, with "
            "* for what differs"
        )
    return names
