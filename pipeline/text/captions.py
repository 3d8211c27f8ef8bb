"""Captions deduplicated, put in a seeded order, templated, tokenised and fingerprinted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import CaptionsIdentity, InputError, Template, fingerprint
from ...schemas.seeds import UnnumberedPurpose, numpy_generator
from .templates import NULL_TEXT, bos_token, eos_token, split_template
from .tokenization import RaggedTokens, TemplateTokens, apply_template, tokenize


@dataclass(frozen=True)
class Captions:
    """Unique captions in store order; entry 0 is the null caption.

    Attributes:
        texts: the captions, without the template, large_string.
        sequences: token ids of each whole sequence, template included.
        kept: first stored row of each sequence; the rows before it are the dropped prefix.
        num_cut: tokens that max_length cut off each caption.
        caption_ids: ``list<int64>``, the captions of each sample.
        identity: compared on resuming, and by training.
        template: the template as tokenised.
        earlier: identity of the captions of each earlier generation, which come first here.
    """

    texts: pa.Array
    sequences: RaggedTokens
    kept: np.ndarray
    num_cut: np.ndarray
    caption_ids: pa.ListArray
    identity: CaptionsIdentity
    template: Template
    earlier: list[CaptionsIdentity]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens that the LLM sees for each caption, int64 ``[num_captions]``."""
        return self.sequences.lengths

    @property
    def num_tokens(self) -> np.ndarray:
        """Rows stored for each caption, int64 ``[num_captions]``."""
        return self.sequence_lengths - self.kept


def build_captions(
    texts: pa.ListArray,
    tokenizer: Any,
    *,
    template: str,
    max_length: int,
    keep_prefix: bool = False,
    causal: bool = True,
    seed: int = 0,
    earlier: Sequence[int] = (),
) -> Captions:
    """Deduplicate, order, template and tokenise captions.

    Args:
        texts: ``list<string>``, the captions of each sample.
        tokenizer: a tokenizer of transformers.
        template: text with one ``{caption}``, optionally with ``{bos}`` at its start and ``{eos}``
            at its end. ``{bos}`` is the tokenizer's BOS token, or for a causal LLM whose tokenizer
            has none its EOS or padding token.
        max_length: tokens of the longest sequence; a longer caption loses its last tokens (the
            suffix stays), which is counted in ``num_cut``.
        keep_prefix: store the rows of the prefix for every caption.
        causal: whether a token sees only those before it. Then something must stand in front of the
            caption, to be the attention sink; otherwise something in front or behind is enough.
        seed: of the order in which captions are stored.
        earlier: numbers of samples that a store had each time before samples were appended,
            ascending. The captions of those samples come first, in the order that they had then;
            each later generation has an order of its own.

    A prefix row is dropped where the whole sequence starts with the prefix's own tokens; a token
    that the tokenizer merged across the boundary belongs to the caption and is kept.

    Raises:
        InputError: the template has nothing in front of the caption (for an encoder: nothing but
            the caption), the tokenizer lacks a token that it asks for, max_length leaves no room,
            or a caption has no tokens.
    """
    start, prefix, suffix, end = split_template(template)
    lead = [bos_token(tokenizer, causal)] if start else []
    tail = [eos_token(tokenizer)] if end else []
    unique = _deduplicate(texts, seed, earlier)
    prefix_tokens = [*lead, *tokenize(tokenizer, [prefix])[0]]
    suffix_tokens = [*tokenize(tokenizer, [suffix])[0], *tail]
    _check_template(template, len(prefix_tokens), len(suffix_tokens), max_length, causal)
    around = TemplateTokens(prefix, suffix, lead, tail, suffix_tokens, max_length)
    sequences, num_cut = apply_template(tokenizer, unique.texts, around)
    kept = sequences.common_prefix([] if keep_prefix else prefix_tokens)
    kept[0] = 0
    without = np.flatnonzero(sequences.lengths == kept)
    if len(without):
        raise InputError(
            f"{len(without)} captions have no tokens of their own, the first is "
            f"{unique.texts[without[0]].as_py()!r}; remove them"
        )
    return Captions(
        texts=unique.texts,
        sequences=sequences,
        kept=kept,
        num_cut=num_cut,
        caption_ids=unique.caption_ids,
        identity=_identify(unique.texts, seed),
        template=Template(
            text=template,
            prefix_tokens=prefix_tokens,
            suffix_tokens=suffix_tokens,
            keep_prefix=keep_prefix,
        ),
        earlier=[_identify(unique.texts.slice(0, end), seed) for end in unique.ends[:-1]],
    )


def _check_template(
    template: str, num_prefix: int, num_suffix: int, max_length: int, causal: bool
) -> None:
    """Refuse a template that leaves the null caption without a row, or a caption without room."""
    if not causal and not num_prefix and not num_suffix:
        raise InputError(
            f"the template {template!r} puts nothing around the caption: the null caption would "
            "have no row. End it with {eos}, as --template eos does."
        )
    if causal and not num_prefix:
        raise InputError(
            f"the template {template!r} puts nothing in front of the caption: its first word would "
            "become the LLM's attention sink and lose its meaning, and the null caption would have "
            "no row. Start it with {bos} or with words."
        )
    if max_length <= num_prefix + num_suffix:
        raise InputError(
            f"--max-length {max_length} leaves no token for the caption: the template takes "
            f"{num_prefix + num_suffix}"
        )


@dataclass(frozen=True)
class _UniqueCaptions:
    """The null caption and all others in store order, and which samples have them.

    Attributes:
        texts: large_string.
        caption_ids: ``list<int64>``, the captions of each sample.
        ends: number of captions up to the end of each generation.
    """

    texts: pa.Array
    caption_ids: pa.ListArray
    ends: list[int]


def _deduplicate(texts: pa.ListArray, seed: int, earlier: Sequence[int]) -> _UniqueCaptions:
    """The unique captions, those of each generation in a seeded order of its own.

    Three samples of captions (a b), (b), (c); two of them came before the store grew::

        codes        0 1 | 1 | 2     numbered in the order of first occurrence
        generations  a b     | c     each shuffled by itself, for example b a | c
        caption ids  2 1 | 1 | 3     0 is the null caption
    """
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(texts))]).astype(np.int64)
    encoded = texts.flatten().cast(pa.large_string()).dictionary_encode()
    codes = encoded.indices.to_numpy()  # numbered in the order of first occurrence
    null = pc.index(encoded.dictionary, NULL_TEXT).as_py()  # -1 where no sample has it
    known = np.arange(len(encoded.dictionary))
    unique = known[known != null]
    orders: list[np.ndarray] = []
    done = 0
    for number, stop in enumerate([*earlier, len(texts)]):
        seen = int(codes[: offsets[stop]].max(initial=-1)) + 1
        seen -= 0 <= null < seen
        generation = (number,) if number else ()  # the first has none in its key
        generator = numpy_generator(seed, UnnumberedPurpose.CAPTION_ORDER, *generation)
        order = generator.permutation(seen - done)
        orders.append(unique[done:seen][order])
        done = seen
    stored = np.concatenate(orders)
    ids = np.zeros(len(known), np.int64)  # of each code
    ids[stored] = np.arange(1, len(stored) + 1)
    first = pa.array([NULL_TEXT], pa.large_string())
    return _UniqueCaptions(
        pa.concat_arrays([first, encoded.dictionary.take(pa.array(stored))]),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids[codes])),
        (np.cumsum([len(order) for order in orders]) + 1).tolist(),
    )


def _identify(texts: pa.Array, seed: int) -> CaptionsIdentity:
    return CaptionsIdentity(num_captions=len(texts), fingerprint=fingerprint(texts), seed=seed)
