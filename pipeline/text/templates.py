"""Templates that captions are put into: presets, files, and the BOS and EOS tokens around them."""

import re
from pathlib import Path
from typing import Any

from ...schemas import InputError
from .tokenization import tokenize

PRESETS = {
    "bos": "{bos}{caption}",
    "eos": "{caption}{eos}",
    "describe": "{bos}Describe this image. {caption}",
    "paper": "Describe this image.{caption}",
    "qwen-image": (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
        "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
        "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "lumina2": (
        "{bos}You are an assistant designed to generate superior images with the superior degree "
        "of image-text alignment based on textual prompts or user prompts. <Prompt Start> {caption}"
    ),
    "z-image": "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n",
    "flux2": (
        "{bos}[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give "
        "structured responses focusing on object relationships, object\nattribution and actions "
        "without speculation.[/SYSTEM_PROMPT][INST]{caption}[/INST]"
    ),
    "flux2-klein": (
        "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
}
"""Named templates. ``eos``: as T5 was trained. ``paper``: as in the reference code of arXiv
2602.03510, no space, no BOS. From ``qwen-image`` on: as the pipelines of diffusers 0.42 with these
names put a prompt to their LLM, with the chat template written out."""

NULL_TEXT = ""
_MARKER = re.compile(r"<\|\w+\|>|\[/?[A-Z_]+\]")


def read_template(name: str) -> str:
    """The text of a preset, or of a file.

    Raises:
        InputError: neither a preset nor a readable file, or not exactly one ``{caption}``.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        text = Path(name).read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--template {name!r} is neither a preset ({', '.join(PRESETS)}) nor a readable text "
            f"file: {error}"
        ) from error
    split_template(text)
    return text


def foreign_markers(template: str, tokenizer: Any) -> list[str]:
    """Markers of a chat template, ``<|word|>`` or ``[WORD]``, that are not a single token."""
    markers = list(dict.fromkeys(_MARKER.findall(template)))
    tokens = tokenize(tokenizer, markers) if markers else []
    return [marker for marker, ids in zip(markers, tokens, strict=True) if len(ids) != 1]


def split_template(text: str) -> tuple[bool, str, str, bool]:
    """Parts of a template: whether BOS comes first, prefix, suffix, whether EOS comes last.

    Raises:
        InputError: not exactly one ``{caption}``, or a ``{bos}`` or ``{eos}`` in another place.
    """
    without_bos = text.removeprefix("{bos}")
    body = without_bos.removesuffix("{eos}")
    if body.count("{caption}") != 1 or "{bos}" in body or "{eos}" in body:
        raise InputError(
            f"the template {text!r} must contain {{caption}} exactly once, {{bos}} only at its "
            "start and {eos} only at its end"
        )
    prefix, suffix = body.split("{caption}")
    return without_bos != text, prefix, suffix, body != without_bos


def bos_token(tokenizer: Any, causal: bool) -> int:
    """The token for ``{bos}``; for a causal LLM without a BOS token its EOS or padding token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    if not causal:
        raise InputError(
            "the template starts with {bos}, but the tokenizer of this encoder has no BOS token; "
            "use --template eos"
        )
    for token in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "the template starts with {bos}, but the tokenizer has neither a BOS, an EOS nor a padding "
        "token; use a template that starts with words"
    )


def eos_token(tokenizer: Any) -> int:
    """The token for ``{eos}``.

    Raises:
        InputError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the template ends with {eos}, but the tokenizer has no EOS token")
    return int(tokenizer.eos_token_id)
