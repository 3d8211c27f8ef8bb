"""What pipelines of diffusers do to a prompt before it is tokenized."""

import html
import re
import warnings
from collections.abc import Callable
from typing import Any

from ...schemas import Cleaning, InputError

IMAGE_TOKEN = "[IMG]"
"""Stands for an image in Mistral's prompts; ``Flux2Pipeline`` takes it out of texts."""


def cleaner(cleaning: Cleaning) -> Callable[[str], str]:
    """The function that cleans a caption.

    Raises:
        InputError: a package that it needs is not installed.
    """
    match cleaning:
        case "none":
            return str
        case "strip":
            return str.strip
        case "lower_strip":
            return lambda text: text.lower().strip()
        case "no_images":
            return lambda text: text.replace(IMAGE_TOKEN, "")
        case "clean_caption":
            return _caption_cleaner()
        case "fix_text":
            return _text_fixer()


def _caption_cleaner() -> Callable[[str], str]:
    """As ``PixArtSigmaPipeline`` cleans when it is called; its own code, with what that needs."""
    try:
        import bs4
        import ftfy  # noqa: F401
        from diffusers import PixArtSigmaPipeline
    except ImportError as error:
        raise InputError(
            "this preset cleans captions as its pipeline does, with the packages diffusers, ftfy "
            "and beautifulsoup4: pip install 'semroute[adapters]'"
        ) from error
    pipeline: Any = object.__new__(PixArtSigmaPipeline)

    def clean(text: str) -> str:
        with warnings.catch_warnings():
            # A caption may look like a URL or a file name.
            warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
            (cleaned,) = pipeline._text_preprocessing(text, clean_caption=True)
        return str(cleaned)

    return clean


def _text_fixer() -> Callable[[str], str]:
    """As ``prompt_clean`` of ``WanPipeline`` cleans where ftfy is installed."""
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise InputError(
            "this preset repairs captions with the package ftfy, as its pipeline does: "
            "pip install 'semroute[adapters]'"
        ) from error

    def clean(text: str) -> str:
        text = html.unescape(html.unescape(fix_text(text))).strip()
        return re.sub(r"\s+", " ", text).strip()

    return clean
