"""How an image file says that its pixels must be turned, wherever its container writes it."""

import re
from xml.parsers import expat

from PIL import Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation as EXIF counts it -> what turns the image upright; from 5 on, width and height are
swapped."""
_EXIF_TAG = 0x0112
_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns# RDF"
_NAME = "http://ns.adobe.com/tiff/1.0/ Orientation"
_VALUE = re.compile(r"\s*([1-8])\s*")
_IN_MALFORMED = re.compile(r"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")


def orientation_of(image: Image.Image) -> int:
    """Orientation as EXIF counts it, 1 to 8; 1 is upright. EXIF goes before XMP."""
    profile = _from_hex(image.info.get("Raw profile type APP1") or b"")
    found = exif_orientation(image)
    if found is None and profile and not profile.startswith(_XMP_HEADER):
        exif = Image.Exif()
        exif.load(profile)
        found = exif.get(_EXIF_TAG)
    if found is None and image.format != "AVIF":  # there only its own transformation counts
        texts = [image.info.get("XML:com.adobe.xmp"), image.info.get("xmp")]
        texts += [_from_hex(image.info.get("Raw profile type xmp") or b""), profile]
        for text in filter(None, texts):
            xmp = _in_xmp(text.encode() if isinstance(text, str) else text)
            if xmp is not None:
                return xmp
    return found if isinstance(found, int) and found in TURNS else 1


def exif_orientation(image: Image.Image) -> int | None:
    """What EXIF says in front of the pixels, whether it is an orientation or not."""
    # The method of PNG would decode all pixels to look for a tag behind them.
    return Image.Image.getexif(image).get(_EXIF_TAG)


def _in_xmp(content: bytes) -> int | None:
    """The orientation in XMP, by any prefix, as an attribute or as an element. Only the image's own
    properties count, not those of others that XMP tells of, such as its thumbnail's."""
    content = content.removeprefix(_XMP_HEADER)
    parser = expat.ParserCreate(namespace_separator=" ")
    path: list[str] = []
    found: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if path[-1:] == [_RDF] and _NAME in attributes:
            found.append(attributes[_NAME])
        path.append(name)
        if path[-3:-2] == [_RDF] and name == _NAME:
            found.append("")

    def text(part: str) -> None:
        if path[-3:-2] == [_RDF] and path[-1] == _NAME:
            found[-1] += part

    def refuse(*_declaration: object) -> None:
        raise ValueError("XMP declares entities")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _name: path.pop()
    parser.CharacterDataHandler = text
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError):  # other readers look for the usual words
        if not found and (match := _IN_MALFORMED.search(content.decode("utf-8", "replace"))):
            found.append(match[1])
    values = [int(match[1]) for match in map(_VALUE.fullmatch, found) if match]
    return values[0] if values else None


def _from_hex(profile: str | bytes) -> bytes:
    """The bytes of a profile as ImageMagick writes it into PNG: name, length, hex digits."""
    text = profile.decode("latin-1") if isinstance(profile, bytes) else profile
    return bytes.fromhex("".join(text.split("\n")[3:]))
