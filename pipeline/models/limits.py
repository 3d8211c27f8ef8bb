"""What a model can read: tokens that it has embeddings for, positions, one stream of states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...schemas import InputError

_STREAMS = ("altup_num_inputs", "hc_mult")
"""Keys of configurations: streams between blocks (Gemma 3n; hyper-connections, as DeepSeek V4)."""
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
"""Names of learned positions in a text tower."""
_SHOWN = 70


@dataclass(frozen=True)
class Limits:
    """What a text tower can read.

    Attributes:
        kind: class of the tower.
        num_tokens: rows of its embedding.
        num_positions: rows of its learned positions; None if it has none.
        trained_positions: those that it was made for, where rotary positions go further; None if
            that is not known.
    """

    kind: str
    num_tokens: int
    num_positions: int | None = None
    trained_positions: int | None = None


def limits_of(tower: Any) -> Limits:
    """Limits of a text tower of transformers, with or without weights."""
    positions = getattr(tower.config, "max_position_embeddings", None)
    rope = getattr(tower.config, "rope_parameters", None) or {}
    stretched = any("dynamic" in str(value) for value in rope.values())  # by its length
    learned = [getattr(tower, name, None) for name in _POSITIONS]
    rows = [getattr(module, "num_embeddings", None) for module in learned]
    return Limits(
        kind=type(tower).__name__,
        num_tokens=int(tower.get_input_embeddings().weight.shape[0]),
        num_positions=min(filter(None, rows), default=None),
        trained_positions=None if stretched else positions,
    )


def refuse_streams(name: str, config: Any, layers: Sequence[int], num_layers: int) -> None:
    """Refuse layers of a model that are several streams of hidden states.

    Args:
        name: of the model, for the message.
        config: of its text tower.

    Raises:
        InputError: layers other than the last one after the final norm, which is one stream.
    """
    streams = [getattr(config, key, None) for key in _STREAMS]
    number = max((int(value) for value in streams if value), default=1)
    if number > 1 and [*layers] != [num_layers]:
        raise InputError(
            f"{name}: {config.model_type} keeps {number} streams of hidden states between its "
            f"blocks, so that its layers are not one vector per token. Only layer {num_layers}, "
            f"after the final norm, can be stored: --layers {num_layers}; or take another LLM"
        )


def refuse_beyond(
    name: str, limits: Limits, sequences: Any, texts: Sequence[Any], tokenizer: Any
) -> None:
    """Refuse captions that a model cannot read.

    Args:
        name: of the model, for messages.
        sequences: token ids of each caption, template included: ``tokens``, ``offsets``,
            ``lengths``.
        texts: the captions.
        tokenizer: names the token.

    Raises:
        InputError: a token beyond the embedding, or more tokens than learned positions.
    """
    tokens = sequences.tokens
    if len(tokens) and int(tokens.max()) >= limits.num_tokens:
        at = int(np.argmax(tokens >= limits.num_tokens))
        caption = int(np.searchsorted(sequences.offsets - sequences.offsets[0], at, "right")) - 1
        token = int(tokens[at])
        raise InputError(
            f"{name}: the tokenizer makes token {token}, "
            f"{tokenizer.convert_ids_to_tokens(token)!r}, of the caption {_text(texts, caption)}, "
            f"and the embedding of {limits.kind} has {limits.num_tokens:,} rows. Take the "
            "tokenizer that belongs to the model, or resize its embedding "
            "(resize_token_embeddings) and train the new rows"
        )
    longest = int(sequences.lengths.argmax())
    length = int(sequences.lengths[longest])
    if limits.num_positions is not None and length > limits.num_positions:
        raise InputError(
            f"{name}: {limits.kind} has {limits.num_positions:,} positions, and the caption "
            f"{_text(texts, longest)} has {length:,} tokens with its template; take --max-length "
            f"{limits.num_positions} or less, or a template with less padding"
        )


def beyond_training(limits: Limits, sequences: Any, texts: Sequence[Any]) -> str | None:
    """A warning about captions longer than those that rotary positions were trained on."""
    if limits.trained_positions is None:
        return None
    num = int((sequences.lengths > limits.trained_positions).sum())
    if not num:
        return None
    longest = int(sequences.lengths.argmax())
    return (
        f"{num:,} captions have more tokens than the {limits.trained_positions:,} positions that "
        f"{limits.kind} was made for, the longest is {_text(texts, longest)}; expected fewer: take "
        f"--max-length {limits.trained_positions}"
    )


def _text(texts: Sequence[Any], number: int) -> str:
    text = texts[number].as_py() if hasattr(texts[number], "as_py") else texts[number]
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
