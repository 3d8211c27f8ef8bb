"""What pipelines of diffusers do to a prompt before it is tokenized."""

import html
import re
from collections.abc import Callable

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
        case "fix_text":
            return _text_fixer()


def _text_fixer() -> Callable[[str], str]:
    """As ``prompt_clean`` of ``WanPipeline`` cleans where ftfy is installed."""
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise InputError(
            "this preset repairs captions with the package ftfy, as its pipeline does: "
            "pip install 'semroute[wan]'"
        ) from error

    def clean(text: str) -> str:
        text = html.unescape(html.unescape(fix_text(text))).strip()
        return re.sub(r"\s+", " ", text).strip()

    return clean
