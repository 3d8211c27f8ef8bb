"""Token ids of many texts in one flat array, tokenised a block of texts at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import Any, overload

import numpy as np
import pyarrow as pa

from ...schemas.verbosity import progress_bar

BLOCK = 8_192
"""Texts tokenised at a time: only a block's token ids ever exist as Python objects."""
_NUM_COMPARED = 16
"""Texts of a block whose ids are compared with those that transformers gives."""
BAR_SECONDS = 2.0
"""Seconds after which a progress bar appears."""


@dataclass(frozen=True)
class RaggedTokens:
    """Token ids of texts, one after the other: ``len``, ``sequences[i]``, slices.

    Attributes:
        tokens: int32 ``[sum of lengths]``.
        offsets: int64 ``[texts + 1]``; text i has ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def concatenate(cls, parts: Iterable["RaggedTokens"]) -> "RaggedTokens":
        """Join several, one after the other; of a generator's, one is held at a time."""
        tokens, offsets, num = BytesIO(), BytesIO(), 0
        offsets.write(bytes(8))
        for part in parts:
            tokens.write(part.tokens.data)
            offsets.write((part.offsets[1:] + num).data)
            num += len(part.tokens)
        # They grow in place, and are not copied here.
        return cls(
            np.frombuffer(tokens.getbuffer(), np.int32),
            np.frombuffer(offsets.getbuffer(), np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "RaggedTokens": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | RaggedTokens":
        if not isinstance(index, slice):
            number = range(len(self))[index]
            return self.tokens[self.offsets[number] : self.offsets[number + 1]]
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise IndexError(f"a slice of sequences has step {step}; expected 1")
        offsets = self.offsets[start : max(start, stop) + 1]
        return RaggedTokens(self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 ``[texts]``."""
        return np.diff(self.offsets)

    def select(self, starts: np.ndarray, stops: np.ndarray, lead: int = 0) -> "RaggedTokens":
        """A copy with some tokens of each text.

        Args:
            starts, stops: first one of each text, and the one after its last; int64 ``[texts]``.
            lead: how many of those before the first are kept as well, from the start of the text.
        """
        first = np.minimum(lead, starts)
        runs = np.stack([first, starts - first, stops - starts, self.lengths - stops], 1)
        kept = np.repeat(np.tile([True, False], 2 * len(self)), runs.ravel())
        return RaggedTokens(
            self.tokens[kept], np.append(0, np.cumsum(runs[:, 0] + runs[:, 2], dtype=np.int64))
        )

    def padded(self, length: int, token: int, side: str) -> "RaggedTokens":
        """A copy in which each text has ``length`` tokens, filled up on the left or on the right.

        Texts that have more tokens stay as they are.
        """
        lengths = self.lengths
        missing = np.maximum(length - lengths, 0)
        left = missing if side == "left" else np.zeros_like(missing)
        runs = np.stack([left, lengths, missing - left], 1)
        offsets = np.append(0, np.cumsum(lengths + missing))
        tokens = np.full(offsets[-1], token, self.tokens.dtype)
        tokens[np.repeat(np.tile([False, True, False], len(self)), runs.ravel())] = self.tokens
        return RaggedTokens(tokens, offsets)

    def common_prefix(self, prefix: Sequence[int]) -> np.ndarray:
        """Number of first tokens that each text shares with ``prefix``, int32 ``[texts]``."""
        lengths = self.lengths
        common = np.zeros(len(self), np.int32)
        for position, token in enumerate(prefix):
            alike = np.flatnonzero((common == position) & (lengths > position))
            common[alike[self.tokens[self.offsets[alike] + position] == token]] += 1
        return common


@dataclass(frozen=True)
class TemplateTokens:
    """The template around every text.

    Attributes:
        prefix, suffix: text around it, tokenised together with it.
        lead, tail: token ids in front of the prefix and behind the suffix.
        ending: token ids with which a sequence that is cut ends: those of suffix and tail, or
            those of the tail alone.
        max_length: tokens of the longest sequence, all included.
    """

    prefix: str
    suffix: str
    lead: Sequence[int]
    tail: Sequence[int]
    ending: Sequence[int]
    max_length: int

    def assemble(self, ids: Sequence[Sequence[int]]) -> tuple[RaggedTokens, np.ndarray]:
        """Whole sequences from the tokens of texts with prefix and suffix, and what was cut off.

        A text of three tokens (a b c, of which c is the suffix) between lead and tail::

            position           0     1     2     3     4
            own               -1     0     1     2     3
            max_length 5     lead    a     b     c   tail
            max_length 4     lead    a     c   tail           c and tail are the ending

        Returns:
            The sequences, and the number of tokens cut off each, int64 ``[texts]``.
        """
        lead, tail, ending = (np.array(t, np.int32) for t in (self.lead, self.tail, self.ending))
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum()))
        first = np.cumsum(counts) - counts  # of each text, in flat
        whole = counts + len(lead) + len(tail)
        lengths = np.minimum(whole, self.max_length)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # For each token of the result: its text, its position in the whole sequence, and its
        # position among the text's own tokens.
        text = np.repeat(np.arange(len(ids)), lengths)
        position = np.arange(len(text)) - offsets[text]
        own = position - len(lead)
        in_lead, in_tail = own < 0, own >= counts[text]
        in_text = ~(in_lead | in_tail)
        tokens = np.empty(len(text), np.int32)
        tokens[in_lead] = lead[position[in_lead]]
        tokens[in_text] = flat[(first[text] + own)[in_text]]
        tokens[in_tail] = tail[(own - counts[text])[in_tail]]
        # A sequence that was cut: its last tokens become the ending.
        in_ending = position - (self.max_length - len(ending))
        is_ending = (in_ending >= 0) & (whole > self.max_length)[text]
        tokens[is_ending] = ending[in_ending[is_ending]]
        return RaggedTokens(tokens, offsets), whole - lengths


def apply_template(
    tokenizer: Any,
    texts: pa.Array,
    template: TemplateTokens,
    clean: Callable[[str], str] = str,
    before: Sequence[RaggedTokens] = (),
) -> tuple[RaggedTokens, np.ndarray]:
    """Tokenise texts inside a template.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: strings, ``[n]``, or a dictionary of them.
        clean: applied to every text first.
        before: sequences that come in front of theirs.

    Returns:
        Whole sequences, and how many tokens ``max_length`` cut off each, int32 ``[sequences]``.
    """
    cuts = [np.zeros(sum(map(len, before)), np.int32)]

    def blocks() -> Iterator[RaggedTokens]:
        with progress_bar(
            total=len(texts), unit=" captions", desc="tokenise", delay=BAR_SECONDS
        ) as bar:
            for first in range(0, len(texts), BLOCK):
                block = texts.slice(first, BLOCK).cast(pa.large_string()).to_pylist()
                whole = [template.prefix + clean(text) + template.suffix for text in block]
                sequences, num_cut = template.assemble(tokenize(tokenizer, whole))
                cuts.append(num_cut.astype(np.int32))
                yield sequences
                bar.update(len(block))

    return RaggedTokens.concatenate(chain(before, blocks())), np.concatenate(cuts)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are, without special tokens.

    Of many texts the tokenizer's own engine gives them on all cores, without the offsets that
    transformers asks it for; where it gives other ids for the first texts, transformers does.
    """
    if len(texts) <= _NUM_COMPARED:
        return _tokenize(tokenizer, texts)
    first = _tokenize(tokenizer, texts[:_NUM_COMPARED])  # sets the engine up, too
    engine = getattr(tokenizer, "backend_tokenizer", None)
    if engine is None or not hasattr(engine, "encode_batch_fast"):
        return first + _tokenize(tokenizer, texts[_NUM_COMPARED:])
    encoded = engine.encode_batch_fast(list(texts), add_special_tokens=False)
    if [each.ids for each in encoded[:_NUM_COMPARED]] != first:
        return first + _tokenize(tokenizer, texts[_NUM_COMPARED:])
    return [each.ids for each in encoded]


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False
    )["input_ids"]
    return ids


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that a tokenizer itself adds in front of a text, and behind it."""
    (bare,) = tokenize(tokenizer, ["a"])
    (whole,) = tokenizer(["a"], return_attention_mask=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        stop = start + len(bare)
        if whole[start:stop] == bare:
            return list(whole[:start]), list(whole[stop:])
    return [], []
