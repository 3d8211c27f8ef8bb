"""Templates that captions are put into: their parts, and the BOS and EOS tokens around them."""

import re
from typing import Any

from ...schemas import InputError
from .tokenization import added_tokens, tokenize

NULL_TEXT = ""
_MARKER = re.compile(r"<\|\w+\|>|\[/?[A-Z_]+\]")


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


def special_tokens(
    template: str, tokenizer: Any, *, causal: bool, own: bool
) -> tuple[list[int], list[int]]:
    """Tokens in front of a sequence and behind it, for the ``{bos}`` and ``{eos}`` of a template.

    Args:
        causal: whether a token of the LLM sees only those before it.
        own: what the tokenizer itself adds instead, if it adds anything.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if own and any(added := added_tokens(tokenizer)):
        return added
    start, _, _, end = split_template(template)
    lead = [bos_token(tokenizer, causal)] if start else []
    return lead, [eos_token(tokenizer)] if end else []
