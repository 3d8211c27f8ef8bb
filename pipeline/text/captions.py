"""Captions deduplicated, put in a seeded order, templated, tokenised and fingerprinted."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import CaptionsIdentity, InputError, Template, TextProcessing, fingerprint
from ...schemas.seeds import UnnumberedPurpose, numpy_generator
from .cleaning import cleaner
from .templates import NULL_TEXT, special_tokens, split_template
from .tokenization import BLOCK, RaggedTokens, TemplateTokens, apply_template, tokenize


@dataclass(frozen=True)
class StoredRows:
    """Rows of sequences that are stored.

    Of BOS (b), a prefix (p), a caption (c) and padding (-) those of b and c::

        row      0 1 2 3 4 5 6
        token    b p p c c c -       lead 1, kept 3, stops 6

    Attributes:
        kept: first stored row of each sequence, behind the dropped prefix; int32 ``[n]``.
        stops: the row after the last stored one, int32 ``[n]``.
        lead: number of rows in front of the dropped prefix that are stored too.
    """

    kept: np.ndarray
    stops: np.ndarray
    lead: int = 0

    @property
    def counts(self) -> np.ndarray:
        """Number of stored rows of each sequence, int32 ``[n]``."""
        return self.stops - self.kept + np.minimum(self.lead, self.kept)

    def __getitem__(self, part: slice) -> "StoredRows":
        return StoredRows(self.kept[part], self.stops[part], self.lead)

    def of(self, entries: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Numbers of the stored rows of some sequences, int64 ``[rows]`` each."""
        lead = np.arange(self.lead)
        spans = zip(self.kept[entries].tolist(), self.stops[entries].tolist(), strict=True)
        return [np.concatenate([lead[:first], np.arange(first, stop)]) for first, stop in spans]

    def tokens(self, sequences: RaggedTokens) -> RaggedTokens:
        """Token ids of the stored rows."""
        return sequences.select(self.kept, self.stops, self.lead)


@dataclass(frozen=True)
class Captions:
    """Unique captions in store order; entry 0 is the null caption.

    Attributes:
        texts: the captions as the user wrote them: a dictionary of large_string, in whose order the
            samples have them.
        sequences: token ids of each whole sequence, template included.
        rows: those that are stored.
        num_cut: tokens that max_length cut off each caption, int32 ``[num_captions]``.
        caption_ids: ``list<int32>``, the captions of each sample.
        identity: compared on resuming, and by training.
        template: the template as tokenised.
        earlier: identity of the captions of each earlier generation, which come first here.
    """

    texts: pa.DictionaryArray
    sequences: RaggedTokens
    rows: StoredRows
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
        """Rows stored for each caption, int32 ``[num_captions]``."""
        return self.rows.counts


def build_captions(
    texts: pa.ListArray,
    tokenizer: Any,
    *,
    template: str,
    max_length: int,
    keep_prefix: bool = False,
    processing: TextProcessing | None = None,
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
        processing: what a pipeline of diffusers does; it decides what is cut and which rows are
            stored. The tokens for ``{bos}`` and ``{eos}`` are then those that the tokenizer adds,
            if it adds any.
        causal: whether a token sees only those before it. Then something must stand in front of the
            caption, to be the attention sink; otherwise something in front or behind is enough.
        seed: of the order in which captions are stored.
        earlier: numbers of samples that a store had each time before samples were appended,
            ascending. The captions of those samples come first, in the order that they had then;
            each later generation has an order of its own.

    A prefix row is dropped where the whole sequence starts with the prefix's own tokens; a token
    that the tokenizer merged across the boundary belongs to the caption and is kept. A pipeline
    counts rows instead.

    Raises:
        InputError: the template has nothing in front of the caption (for an encoder: nothing but
            the caption), the tokenizer lacks a token that it asks for, max_length leaves no room,
            or a caption has no tokens.
    """
    return tokenize_captions(
        deduplicate(texts, seed, earlier),
        tokenizer,
        template=template,
        max_length=max_length,
        keep_prefix=keep_prefix,
        processing=processing,
        causal=causal,
        seed=seed,
    )


def tokenize_captions(
    unique: "UniqueCaptions",
    tokenizer: Any,
    *,
    template: str,
    max_length: int,
    keep_prefix: bool,
    processing: TextProcessing | None,
    causal: bool,
    seed: int,
) -> Captions:
    """The second half of :func:`build_captions`, from captions in store order."""
    around, prefix, suffix = _around(template, tokenizer, causal, max_length, processing)
    _check_template(template, prefix, suffix, max_length, causal, processing)
    if processing is None:
        sequences, num_cut = apply_template(tokenizer, unique.texts, around)
        kept = sequences.common_prefix([] if keep_prefix else prefix)
        kept[0] = 0
        rows = StoredRows(kept, sequences.lengths.astype(np.int32))
    else:
        null = _null_sequence(tokenizer, causal, max_length, processing)
        sequences, num_cut = apply_template(
            tokenizer, unique.texts.slice(1), around, cleaner(processing.cleaning), [null]
        )
        sequences, rows = _choose_rows(sequences, tokenizer, max_length, processing)
    without = np.flatnonzero(rows.counts == 0)
    if len(without):
        raise InputError(
            f"{len(without)} captions have no tokens of their own, the first is "
            f"{unique.texts[without[0]].as_py()!r}; remove them"
        )
    return Captions(
        texts=unique.texts,
        sequences=sequences,
        rows=rows,
        num_cut=num_cut,
        caption_ids=unique.caption_ids,
        identity=identify(unique.texts, seed),
        template=Template(
            text=template,
            prefix_tokens=prefix,
            suffix_tokens=suffix,
            keep_prefix=keep_prefix,
            processing=processing,
        ),
        earlier=[identify(unique.texts.slice(0, end), seed) for end in unique.ends[:-1]],
    )


def _around(
    template: str, tokenizer: Any, causal: bool, max_length: int, processing: TextProcessing | None
) -> tuple[TemplateTokens, list[int], list[int]]:
    """The template around every caption, and the tokens of its prefix and suffix."""
    _, prefix, suffix, _ = split_template(template)
    lead, closing = special_tokens(template, tokenizer, causal=causal, own=processing is not None)
    prefix_tokens = [*lead, *tokenize(tokenizer, [prefix])[0]]
    suffix_tokens = [*tokenize(tokenizer, [suffix])[0], *closing]
    apart = processing is not None and processing.suffix_apart
    around = TemplateTokens(
        prefix=prefix,
        suffix="" if apart else suffix,
        lead=lead,
        tail=suffix_tokens if apart else closing,
        ending=closing if processing and processing.cut == "sequence" else suffix_tokens,
        max_length=max_length,
    )
    return around, prefix_tokens, suffix_tokens


def _null_sequence(
    tokenizer: Any, causal: bool, max_length: int, processing: TextProcessing
) -> RaggedTokens:
    """Tokens of the null caption, in its own template."""
    if processing.null_tokens:
        if None in tokenizer.convert_ids_to_tokens(processing.null_tokens):
            raise InputError(
                f"the null caption of preset {processing.preset} is the tokens "
                f"{processing.null_tokens}, as in its pipeline, which this tokenizer does not "
                "have: the preset was made for another LLM"
            )
        tokens = np.array(processing.null_tokens, np.int32)
        return RaggedTokens(tokens, np.array([0, len(tokens)]))
    around, _, _ = _around(processing.null_text, tokenizer, causal, max_length, processing)
    return apply_template(tokenizer, pa.array([NULL_TEXT]), around)[0]


def _choose_rows(
    sequences: RaggedTokens, tokenizer: Any, max_length: int, processing: TextProcessing
) -> tuple[RaggedTokens, StoredRows]:
    """Sequences with the padding that the LLM sees, and the rows that a pipeline reads."""
    lead, first = processing.dropped_rows
    lengths = sequences.lengths.astype(np.int32)
    kept = np.minimum(first, lengths)
    kept[0] = min(processing.null_dropped_rows[1], lengths[0])
    if kept[0] == lengths[0] and not lead:
        kept[0] = 0  # the null caption has no other rows
    if processing.padding is None:
        return sequences, StoredRows(kept, lengths, lead)
    padded = sequences.padded(max_length, tokenizer.pad_token_id, processing.padding)
    if processing.padding == "left":
        shift = padded.lengths.astype(np.int32) - lengths
        kept, lengths = kept + shift, lengths + shift
    return padded, StoredRows(kept, lengths, lead)


def _check_template(
    template: str,
    prefix: Sequence[int],
    suffix: Sequence[int],
    max_length: int,
    causal: bool,
    processing: TextProcessing | None,
) -> None:
    """Refuse a template that leaves the null caption without a row, or a caption without room.

    What a pipeline does is not questioned.
    """
    if processing is None and not causal and not prefix and not suffix:
        raise InputError(
            f"the template {template!r} puts nothing around the caption: the null caption would "
            "have no row. End it with {eos}, as --template eos does."
        )
    if processing is None and causal and not prefix:
        raise InputError(
            f"the template {template!r} puts nothing in front of the caption: its first word would "
            "become the LLM's attention sink and lose its meaning, and the null caption would have "
            "no row. Start it with {bos} or with words."
        )
    if max_length <= len(prefix) + len(suffix):
        raise InputError(
            f"--max-length {max_length} leaves no token for the caption: the template takes "
            f"{len(prefix) + len(suffix)}"
        )


@dataclass(frozen=True)
class UniqueCaptions:
    """The null caption and all others in store order, and which samples have them.

    Attributes:
        texts: a dictionary of large_string. The texts themselves stay where the samples have them:
            in store order there would be a second copy of all.
        caption_ids: ``list<int32>``, the captions of each sample.
        ends: number of captions up to the end of each generation.
    """

    texts: pa.DictionaryArray
    caption_ids: pa.ListArray
    ends: list[int]


def deduplicate(texts: pa.ListArray, seed: int, earlier: Sequence[int]) -> UniqueCaptions:
    """The unique captions, those of each generation in a seeded order of its own.

    Three samples of captions (a b), (b), (c); two of them came before the store grew::

        codes        0 1 | 1 | 2     numbered in the order of first occurrence
        generations  a b     | c     each shuffled by itself, for example b a | c
        caption ids  2 1 | 1 | 3     0 is the null caption
    """
    offsets = texts.offsets.to_numpy()
    offsets = offsets - offsets[0]
    flat = texts.flatten().cast(pa.large_string())
    codes, first = _number(flat)
    empty = pc.index(flat, NULL_TEXT).as_py()
    null = -1 if empty < 0 else int(codes[empty])  # -1 where no sample has it
    unique = np.arange(len(first), dtype=np.int32)
    unique = unique[unique != null]
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
    ends = (np.cumsum([len(order) for order in orders]) + 1).tolist()
    stored = np.concatenate(orders)
    ids = np.zeros(len(first), np.int32)  # of each code
    ids[stored] = np.arange(1, len(stored) + 1)
    caption_ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids[codes]))
    places = pa.array(np.append(np.int32(0), first[stored] + 1))
    behind_null = pa.DictionaryArray.from_arrays(places, _behind_null(flat))
    return UniqueCaptions(behind_null, caption_ids, ends)


def _number(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of texts in the order of first occurrence.

    Texts are compared by 128 bits of BLAKE2b, in a fifth of the memory of Arrow's dictionary.

    Returns:
        The number of each text, int32 ``[texts]``; and where each number occurs first, int32.
    """
    digests = np.empty((len(texts), 2), np.uint64)
    for begin in range(0, len(texts), BLOCK):
        block = texts.slice(begin, BLOCK).cast(pa.large_binary()).to_pylist()
        joined = b"".join(blake2b(text, digest_size=16).digest() for text in block)
        digests[begin : begin + BLOCK] = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    # Stable: of equal texts the first comes first.
    order = np.lexsort(digests.T).astype(np.int32)
    is_new = np.ones(len(order), bool)
    for begin in range(1, len(order), BLOCK):
        part = digests[order[begin - 1 : begin + BLOCK]]
        is_new[begin : begin + BLOCK] = (part[1:] != part[:-1]).any(1)
    del digests
    first = order[is_new]
    by_place = np.argsort(first)
    rank = np.empty(len(first), np.int32)
    rank[by_place] = np.arange(len(first), dtype=np.int32)
    codes = np.empty(len(order), np.int32)
    codes[order] = rank[np.cumsum(is_new, dtype=np.int32) - 1]
    return codes, first[by_place]


def _behind_null(texts: pa.Array) -> pa.Array:
    """The texts with the null caption, which is empty, in front; their bytes are not copied."""
    assert not NULL_TEXT
    _, ends, content = texts.buffers()
    offsets = np.frombuffer(ends, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    with_null = pa.py_buffer(np.concatenate([offsets[:1], offsets]))
    return pa.LargeStringArray.from_buffers(len(texts) + 1, with_null, content)


def identify(texts: pa.Array, seed: int) -> CaptionsIdentity:
    """Identity of captions in store order."""
    return CaptionsIdentity(num_captions=len(texts), fingerprint=fingerprint(texts), seed=seed)
