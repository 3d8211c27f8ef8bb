"""Token ids of many texts: one flat array, made a block of texts at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

BLOCK = 8_192
"""Texts that are tokenised at a time; only theirs are ever alive as objects of Python."""
BAR_SECONDS = 2.0
"""After which a bar shows how far it is."""


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
    def of(cls, parts: Sequence["RaggedTokens"]) -> "RaggedTokens":
        """Several, one after the other."""
        lengths = np.concatenate([part.lengths for part in parts])
        tokens = np.concatenate([part.tokens for part in parts])
        return cls(tokens, np.concatenate([[0], np.cumsum(lengths)]))

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
            raise IndexError(f"a step of {step}; sequences lie one after the other")
        offsets = self.offsets[start : max(start, stop) + 1]
        return RaggedTokens(self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 ``[texts]``."""
        return np.diff(self.offsets)

    def without(self, leading: np.ndarray) -> "RaggedTokens":
        """The same without the first tokens of each, int64 ``[texts]``."""
        row = np.repeat(np.arange(len(self)), self.lengths)
        place = np.arange(len(row)) - (self.offsets[:-1] - self.offsets[0])[row]
        lengths = self.lengths - leading
        return RaggedTokens(self.tokens[place >= leading[row]], np.append(0, np.cumsum(lengths)))

    def common_prefix(self, prefix: Sequence[int]) -> np.ndarray:
        """How many of its first tokens each has in common with ``prefix``, int64 ``[texts]``."""
        lengths = self.lengths
        common = np.zeros(len(self), np.int64)
        for place, token in enumerate(prefix):
            alike = np.flatnonzero((common == place) & (lengths > place))
            common[alike[self.tokens[self.offsets[alike] + place] == token]] += 1
        return common


@dataclass(frozen=True)
class TemplateTokens:
    """What stands around every text.

    Attributes:
        prefix, suffix: text that is tokenised together with it.
        lead, tail: token ids in front and behind.
        ending: token ids of suffix and tail, which a text that is cut ends with.
        max_length: longest sequence, all included.
    """

    prefix: str
    suffix: str
    lead: Sequence[int]
    tail: Sequence[int]
    ending: Sequence[int]
    max_length: int

    def assemble(self, ids: Sequence[Sequence[int]]) -> tuple[RaggedTokens, np.ndarray]:
        """Whole sequences from the tokens of texts with prefix and suffix; and what was cut off."""
        lead, tail, ending = (np.array(t, np.int32) for t in (self.lead, self.tail, self.ending))
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int32, int(counts.sum()))
        whole = counts + len(lead) + len(tail)
        lengths = np.minimum(whole, self.max_length)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        row = np.repeat(np.arange(len(ids)), lengths)
        place = np.arange(len(row)) - offsets[row]
        inner = place - len(lead)
        tokens = np.empty(len(row), np.int32)
        in_front, behind = inner < 0, inner >= counts[row]
        inside = ~(in_front | behind)
        tokens[in_front] = lead[place[in_front]]
        tokens[inside] = flat[((np.cumsum(counts) - counts)[row] + inner)[inside]]
        tokens[behind] = tail[(inner - counts[row])[behind]]
        last = place - (self.max_length - len(ending))
        ends = (last >= 0) & (whole > self.max_length)[row]
        tokens[ends] = ending[last[ends]]
        return RaggedTokens(tokens, offsets), whole - lengths


def frame_texts(
    tokenizer: Any, texts: pa.Array, frame: TemplateTokens
) -> tuple[RaggedTokens, np.ndarray]:
    """Tokenise texts in their frame.

    Args:
        tokenizer: of transformers.
        texts: strings, ``[n]``.

    Returns:
        Whole sequences, and how many tokens ``max_length`` cut off each, int64 ``[n]``.
    """
    parts, cut = [], []
    with tqdm(total=len(texts), unit=" captions", desc="tokenise", delay=BAR_SECONDS) as bar:
        for first in range(0, len(texts), BLOCK):
            block = texts.slice(first, BLOCK).to_pylist()
            ids = tokenize(tokenizer, [frame.prefix + text + frame.suffix for text in block])
            sequences, lost = frame.assemble(ids)
            parts.append(sequences)
            cut.append(lost)
            bar.update(len(block))
    return RaggedTokens.of(parts), np.concatenate(cut)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are, without special tokens."""
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False
    )["input_ids"]
    return ids
