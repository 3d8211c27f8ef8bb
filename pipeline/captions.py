"""Captions: templated, tokenised, deduplicated and fingerprinted, in a seeded order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schemas import CaptionsIdentity, InputError, Template, fingerprint

PRESETS = {
    "bos": "{bos}{caption}",
    "describe": "{bos}Describe this image. {caption}",
    "paper": "Describe this image.{caption}",
}
"""Named templates. ``paper``: as the reference code of arXiv 2602.03510, no space, no BOS."""

NULL_TEXT = ""


@dataclass(frozen=True)
class Captions:
    """Unique captions in store order; entry 0 is the null caption.

    Attributes:
        texts: the captions, without the template.
        sequences: token ids of each whole sequence, template included, int32.
        kept: first stored row of each sequence; the rows before it are the dropped prefix.
        num_cut: tokens that max_length cut off each caption.
        caption_ids: ``list<int64>``, for each sample the captions that it has.
        identity: what resume and training compare.
        template: the template as tokenised.
    """

    texts: list[str]
    sequences: list[np.ndarray]
    kept: np.ndarray
    num_cut: np.ndarray
    caption_ids: pa.ListArray
    identity: CaptionsIdentity
    template: Template

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens that the LLM sees for each caption, int64 ``[num_captions]``."""
        return np.array([len(sequence) for sequence in self.sequences], np.int64)

    @property
    def num_tokens(self) -> np.ndarray:
        """Rows stored for each caption, int64 ``[num_captions]``."""
        return self.sequence_lengths - self.kept


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
            f"--template {name!r} is no preset ({', '.join(PRESETS)}) and no readable text file: "
            f"{error}"
        ) from error
    _split_template(text)
    return text


def build_captions(
    texts: pa.ListArray,
    tokenizer: Any,
    *,
    template: str,
    max_length: int,
    keep_prefix: bool = False,
    seed: int = 0,
) -> Captions:
    """Deduplicate, order, template and tokenise.

    Args:
        texts: ``list<string>``, the captions of each sample.
        tokenizer: a tokenizer of transformers.
        template: text with one ``{caption}``, and at most one ``{bos}``, at its start. ``{bos}`` is
            the tokenizer's BOS token, or where it has none its EOS or padding token.
        max_length: longest sequence in tokens; a longer caption loses its last tokens (the suffix
            stays), which is counted in ``num_cut``.
        keep_prefix: store the rows of the prefix for every caption.
        seed: of the order in which captions are stored.

    A prefix row is dropped where the whole sequence starts with the prefix's own tokens; a token
    that the tokenizer merged across the boundary belongs to the caption and is kept.

    Raises:
        InputError: the template has nothing in front of the caption, max_length leaves no room, or
            a caption has no tokens.
    """
    start, prefix, suffix = _split_template(template)
    lead = [_bos_token(tokenizer)] if start else []
    unique = pc.unique(texts.flatten())
    unique = unique.filter(pc.not_equal(unique, NULL_TEXT))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(unique))
    ordered = [NULL_TEXT, *unique.take(pa.array(order)).to_pylist()]

    prefix_tokens = [*lead, *_tokenize(tokenizer, [prefix])[0]]
    suffix_tokens = _tokenize(tokenizer, [suffix])[0]
    if not prefix_tokens:
        raise InputError(
            f"the template {template!r} puts nothing in front of the caption: its first word would "
            "become the LLM's attention sink and lose its meaning, and the null caption would have "
            "no row. Start it with {bos} or with words."
        )
    if max_length <= len(prefix_tokens) + len(suffix_tokens):
        raise InputError(
            f"--max-length {max_length} leaves no token for the caption: the template takes "
            f"{len(prefix_tokens) + len(suffix_tokens)}"
        )
    sequences, kept, num_cut = [], [], []
    for tokens in _tokenize(tokenizer, [prefix + text + suffix for text in ordered]):
        whole = [*lead, *tokens]
        cut = max(0, len(whole) - max_length)
        if cut:
            whole = whole[: max_length - len(suffix_tokens)] + suffix_tokens
        sequences.append(np.array(whole, np.int32))
        kept.append(0 if keep_prefix else _common_prefix(prefix_tokens, whole))
        num_cut.append(cut)
    kept[0] = 0
    without = [text for text, s, k in zip(ordered, sequences, kept, strict=True) if len(s) == k]
    if without:
        raise InputError(
            f"{len(without)} captions have no tokens of their own, the first is {without[0]!r}; "
            "remove them"
        )
    positions = pc.index_in(texts.flatten(), pa.array(ordered, pa.string())).cast(pa.int64())
    offsets = pa.array(np.concatenate([[0], np.cumsum(pc.list_value_length(texts))]), pa.int32())
    return Captions(
        texts=ordered,
        sequences=sequences,
        kept=np.array(kept, np.int64),
        num_cut=np.array(num_cut, np.int64),
        caption_ids=pa.ListArray.from_arrays(offsets, positions),
        identity=CaptionsIdentity(
            num_captions=len(ordered), fingerprint=fingerprint(ordered), seed=seed
        ),
        template=Template(
            text=template,
            prefix_tokens=prefix_tokens,
            suffix_tokens=suffix_tokens,
            keep_prefix=keep_prefix,
        ),
    )


def _split_template(text: str) -> tuple[bool, str, str]:
    """Whether BOS comes first, the prefix and the suffix."""
    body = text.removeprefix("{bos}")
    if body.count("{caption}") != 1 or "{bos}" in body:
        raise InputError(
            f"the template {text!r} must hold {{caption}} exactly once, and {{bos}} only at its "
            "start"
        )
    prefix, suffix = body.split("{caption}")
    return body != text, prefix, suffix


def _bos_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "the template starts with {bos}, but the tokenizer has neither a BOS, an EOS nor a padding "
        "token; use a template that starts with words"
    )


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False
    )["input_ids"]
    return ids


def _common_prefix(prefix: Sequence[int], tokens: Sequence[int]) -> int:
    for position, (one, other) in enumerate(zip(prefix, tokens, strict=False)):
        if one != other:
            return position
    return min(len(prefix), len(tokens))
