"""Sizes and pixels of images that are stored lying: wherever a file says so, both are upright."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from semroute.pipeline.sources.images import describe_images, image_to_codes, open_upright
from semroute.pipeline.sources.table import Unreadable

HEIGHT, WIDTH = 24, 40
PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (3, 5, 3)), np.ones((8, 8, 1)))
PIXELS = PIXELS.astype(np.uint8)
LAID = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def lying(orientation, container, **options):
    image, content = Image.fromarray(PIXELS), io.BytesIO()
    image = image.transpose(LAID[orientation]) if orientation in LAID else image
    image.save(content, container, **options)
    return content.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def xmp(orientation, form='tiff:Orientation="{}"'):
    return f"<x:xmpmeta><rdf:Description {form.format(orientation)}/></x:xmpmeta>".encode()


def packet(description, bound="t", encoding="utf-8"):
    """XMP as the standard has it: namespaces are bound, by whatever prefix."""
    space = f'xmlns:{bound}="http://ns.adobe.com/tiff/1.0/"' if bound else ""
    rdf = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="{rdf}" {space}>'
        f"{description}</r:RDF></x:xmpmeta>"
    ).encode(encoding)


def other_prefix(orientation):
    return packet(f"<r:Description t:Orientation='&#{48 + orientation};'/>")


def no_prefix(orientation):
    name = "Orientation"
    inner = f'<{name} xmlns="http://ns.adobe.com/tiff/1.0/">{orientation}</{name}>'
    return packet(f"<r:Description>{inner}</r:Description>", "", "utf-16")


def with_thumbnail(orientation):
    """Whose own orientation stands in front of the image's."""
    inner = '<t:Thumbnail><r:Description t:Orientation="6"/></t:Thumbnail>'
    own = f"<t:Orientation>{orientation}</t:Orientation>"
    return packet(f"<r:Description>{inner}{own}</r:Description>")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(orientation, kind, data, late):
    """With a chunk in front of the pixels, or behind them."""
    file = lying(orientation, "PNG")
    at = len(file) - 12 if late else 33
    return file[:at] + chunk(kind, data) + file[at:]


def profile(name, data):
    """As ImageMagick writes it."""
    text = f"\n{name}\n{len(data):8}\n{data.hex()}\n".encode()
    return b"Raw profile type " + name.encode() + b"\0\0" + zlib.compress(text)


def tiff(orientation):
    return b"Exif\0\0" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")


PLACES = {
    "jpeg exif": lambda o: lying(o, "JPEG", quality=98, exif=exif(o)),
    "jpeg xmp": lambda o: lying(o, "JPEG", quality=98, xmp=xmp(o)),
    "jpeg xmp element": lambda o: lying(
        o, "JPEG", quality=98, xmp=xmp(o, "><tiff:Orientation> {} <")
    ),
    "jpeg xmp, other prefix": lambda o: lying(o, "JPEG", quality=98, xmp=other_prefix(o)),
    "webp xmp, no prefix": lambda o: lying(o, "WEBP", lossless=True, xmp=no_prefix(o)),
    "jpeg xmp, thumbnail": lambda o: lying(o, "JPEG", quality=98, xmp=with_thumbnail(o)),
    "webp exif": lambda o: lying(o, "WEBP", lossless=True, exif=exif(o)),
    "webp xmp": lambda o: lying(o, "WEBP", lossless=True, xmp=xmp(o, "tiff:Orientation='{}'")),
    "tiff": lambda o: lying(o, "TIFF", exif=exif(o)),
    "tiff deflate": lambda o: lying(o, "TIFF", exif=exif(o), compression="tiff_adobe_deflate"),
    "tiff xmp": lambda o: lying(o, "TIFF", tiffinfo={700: xmp(o)}),
    "tiff xmp, other quotes": lambda o: lying(
        o, "TIFF", tiffinfo={700: xmp(o, "tiff:Orientation='{}'")}
    ),
    "avif": lambda o: lying(o, "AVIF", quality=100, exif=exif(o)),
    **{
        f"png {name}, {'late' if late else 'early'}": (
            lambda o, kind=kind, data=data, late=late: png(o, kind, data(o), late)
        )
        for late in (False, True)
        for name, kind, data in (
            ("exif", b"eXIf", lambda o: tiff(o)[6:]),
            ("profile", b"zTXt", lambda o: profile("exif", tiff(o))),
            ("old profile", b"zTXt", lambda o: profile("APP1", tiff(o))),
            (
                "old profile of xmp",
                b"zTXt",
                lambda o: profile("APP1", b"http://ns.adobe.com/xap/1.0/\0" + other_prefix(o)),
            ),
            ("profile of xmp", b"zTXt", lambda o: profile("xmp", xmp(o))),
            ("xmp", b"iTXt", lambda o: b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(o)),
        )
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_upright(place, orientation):
    if place == "avif":
        features = pytest.importorskip("PIL.features")
        if not features.check("avif"):
            pytest.skip("this Pillow reads no AVIF")
    file = PLACES[place](orientation)
    found = describe_images([file], "images", None)
    assert found.sizes.tolist() == [[HEIGHT, WIDTH]]
    codes = image_to_codes(file, (HEIGHT, WIDTH))
    assert not isinstance(codes, Unreadable), codes.reason
    assert np.abs(codes.transpose(1, 2, 0).astype(int) - PIXELS).mean() < 8


def test_exif_goes_before_xmp_and_nonsense_is_upright():
    both = lying(6, "JPEG", exif=exif(6), xmp=xmp(3))
    upright = lying(1, "JPEG", exif=exif(1), xmp=xmp(6))
    nonsense = lying(1, "JPEG", exif=exif(99))
    found = describe_images([both, upright, nonsense], "images", None)
    assert found.sizes.tolist() == [[HEIGHT, WIDTH]] * 3


def test_transparency_inside_a_palette_is_over_white():
    # A Targa of 4 x 4 with a palette of 32 bits: transparent black above opaque red.
    header = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 4, 4, 8, 0x20)
    file = header + bytes([0, 0, 0, 0, 0, 0, 255, 255]) + bytes([0] * 8 + [1] * 8)
    codes = image_to_codes(file, (4, 4))
    if int(PIL.__version__.partition(".")[0]) < 12:
        assert "unrecognized raw mode" in codes.reason
        return
    assert codes[:, 0, 0].tolist() == [255, 255, 255]
    assert codes[:, 3, 3].tolist() == [255, 0, 0]


def test_pixels_of_another_size_than_the_header_says_are_not_taken():
    file = lying(1, "PNG")
    with open_upright(file) as image:
        object.__setattr__(image, "size", (WIDTH, HEIGHT))
        with pytest.raises(ValueError, match="says 24 x 40 pixels, and it has 40 x 24"):
            image.read()
