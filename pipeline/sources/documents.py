"""JSON documents as rows: lists of objects, objects keyed by path, COCO captions."""

from collections.abc import Mapping
from typing import Any

from ...schemas import InputError
from .values import RepeatedKeys, decode, parse_json

KEY = "image_path"
"""Column of the keys of an object of objects, which are paths of images in kohya's metadata."""
_LISTS = ("items", "data")  # keys under which a document may hold its list
_CAPTION = "caption"


def read_document(content: bytes, source: str) -> list[dict[str, Any]]:
    """The rows of a JSON document.

    Args:
        content: a list of objects; an object with such a list under ``items`` or ``data``; an
            object of objects, whose keys become the column ``image_path``; or captions of COCO, of
            which each image becomes a row with all its captions.

    Raises:
        InputError: it is none of these, or not JSON.
    """
    try:
        document = parse_json(decode(content, source))
    except ValueError as error:
        raise InputError(f"{source} is not a readable json file: {error}") from error
    if isinstance(document, dict):
        if isinstance(document.get("images"), list) and isinstance(
            document.get("annotations"), list
        ):
            return _coco(document, source)
        lists = [document[key] for key in _LISTS if isinstance(document.get(key), list)]
        if lists:
            return _objects(lists[0], source)
        return _keyed(document, source)
    if isinstance(document, list):
        return _objects(document, source)
    raise InputError(f"{source} holds {document!r:.60}; expected a list or an object")


def _objects(rows: list[Any], source: str) -> list[dict[str, Any]]:
    for row, each in enumerate(rows):
        if not isinstance(each, dict):
            raise InputError(
                f"{source}: row {row} (counted from 0) is {each!r:.60}; expected an object"
            )
    return rows


def _keyed(document: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    if isinstance(document, RepeatedKeys):
        raise InputError(f"{source} has the key {min(document.repeated)!r} twice; expected it once")
    rows = []
    for key, value in document.items():
        if not isinstance(value, dict):
            raise InputError(
                f"{source}: {key!r} is {value!r:.60}; expected an object per image, captions of "
                "COCO, or a list of objects"
            )
        rows.append({KEY: key, **value})
    return rows


def _coco(document: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """Images in their order, each with its captions in theirs."""
    images = _objects(document["images"], source)
    captions: dict[Any, list[Any]] = {}
    for each in _objects(document["annotations"], source):
        captions.setdefault(each.get("image_id"), []).append(each.get(_CAPTION))
    unknown = captions.keys() - {image.get("id") for image in images}
    if unknown:
        raise InputError(
            f"{source}: {len(unknown):,} of its annotations' image_id are no id of an image, for "
            f"example {next(iter(unknown))!r}"
        )
    if len({image.get("id") for image in images}) != len(images):
        raise InputError(f"{source}: two images have the same id; expected each once")
    return [{**image, _CAPTION: captions.get(image.get("id"), [])} for image in images]
