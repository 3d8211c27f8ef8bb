"""Hidden states of a text encoder, caught as it runs, and found again by value.

A pipeline cuts, pads, repeats and joins what its text encoder gave before its network reads it. The
rows themselves stay what they are, so that each of them leads back to the token that it came from.

Shapes: B batch, T text rows, R tokens, Q padding tokens, L layers, K base layers that the network
reads (taps), H text width.
"""

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...pipeline.models.llm import TextTower
from ...schemas import InputError

MAX_CALLS = 32
"""Calls of the text encoder that are kept, those that were read last."""


@dataclass(eq=False)
class _Call:
    """What one call of a text encoder gave.

    Attributes:
        hidden: the layers of its tokens, [R, L, H].
        base: the base layers of its tokens, then of its padding, [R + Q, K, H].
    """

    hidden: Tensor
    base: Tensor


class Captures:
    """What a text encoder gave lately.

    Args:
        layers: those that are kept, see :func:`semroute.pipeline.models.llm.parse_layers`.
        base_layers: those of them that the network reads, in its order.
        max_calls: how many calls of the text encoder are kept, those that were read last; None:
            all.
    """

    def __init__(
        self,
        layers: Sequence[int],
        base_layers: Sequence[int],
        max_calls: int | None = MAX_CALLS,
    ) -> None:
        self.layers = [*layers]
        self._base = [self.layers.index(layer) for layer in base_layers]
        self._calls: deque[_Call] = deque(maxlen=max_calls)
        self._handles: list[Any] = []

    def add(self, hidden: Tensor, padding: Tensor) -> None:
        """Keep the layers of tokens, [R, L, H], and the base layers of padding, [Q, K, H]."""
        self._calls.append(_Call(hidden, torch.cat([hidden[:, self._base], padding])))

    def find(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that rows of text came from.

        Args:
            rows: base layers as the network is given them, [B, T, K, H].

        Returns:
            Layers of some tokens, [R, L, H], and for each row the number of its token, int64
            [B, T], on the CPU; R for padding and for rows of zeros.

        Raises:
            InputError: a row came from no token and no padding that is kept.
        """
        flat = rows.flatten(0, 1)
        zero = (flat == 0).flatten(1).all(1).cpu()
        numbers = torch.full(zero.shape, -1)  # of tokens among those of the calls that are used
        missing = (~zero).nonzero()[:, 0]
        hidden: list[Tensor] = []
        padding = zero.clone()
        for call in [*reversed(self._calls)]:
            if not len(missing):
                break
            known = call.base.to(rows.device, rows.dtype)
            place = _places(flat[missing.to(rows.device)], known).cpu()
            found, token = place >= 0, place < len(call.hidden)
            if not found.any():
                continue
            numbers[missing[found & token]] = place[found & token] + sum(map(len, hidden))
            padding[missing[found & ~token]] = True
            missing = missing[~found]
            hidden.append(call.hidden.to(rows.device))
            self._calls.remove(call)  # to the end, as the last that was read
            self._calls.append(call)
        if len(missing):
            raise InputError(
                f"{len(missing):,} of {len(flat):,} rows of text that the network is given are not "
                "known: they did not come from the text encoder since semroute.attach, or not in "
                f"its last {MAX_CALLS} calls. Pass prompts, or embeddings of semroute embed, with "
                "attach(..., embeds=FILE)."
            )
        tokens = (
            torch.cat(hidden) if hidden else rows.new_zeros(0, len(self.layers), rows.shape[-1])
        )
        numbers[padding] = len(tokens)
        return tokens, numbers.unflatten(0, rows.shape[:2])

    def watch(self, encoder: nn.Module, tower: TextTower, num_layers: int, pad_token: int) -> None:
        """Catch what a text encoder gives from now on.

        Args:
            encoder: of transformers, and its tower.
            num_layers: L, of the LLM; the last blocks of the tower may be missing.
            pad_token: number of the padding token; other tokens are the caption's own where the
                encoder runs without a mask.
        """
        signature = inspect.signature(type(encoder).forward)
        own: list[Tensor] = []  # of the call that runs: which rows are tokens, bool [B * T]
        caught: dict[int, tuple[Tensor, Tensor | None]] = {}
        running = [False]  # whether the encoder itself, and not its parts alone

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            own.clear()
            caught.clear()
            running[0] = True
            given = signature.bind(module, *args, **kwargs).arguments
            ids, mask = given.get("input_ids"), given.get("attention_mask")
            if ids is None or (mask is not None and mask.shape != ids.shape):
                return  # a step of generation
            own.append((ids != pad_token if mask is None else mask.bool()).flatten())

        def begin_parts(_module: nn.Module, args: Any) -> None:
            if not running[0]:  # Ideogram 4 runs blocks one by one, and makes padding zeros
                own[:] = [torch.ones(args[0].numel(), dtype=torch.bool)]
                caught.clear()

        def take(number: int, hidden: Tensor) -> None:
            if own:
                rows, mask = hidden.detach().flatten(0, 1), own[0].to(hidden.device)
                caught[number] = rows[mask], rows[~mask] if number in self._base else None
                if not running[0] and len(caught) == len(self.layers):
                    keep()

        def keep() -> None:
            hidden = torch.stack([caught[number][0] for number in range(len(self.layers))], 1)
            padding = [caught[number][1] for number in self._base]
            self.add(hidden, torch.stack(padding, dim=1))  # type: ignore[arg-type]
            own.clear()
            caught.clear()

        def end(_module: nn.Module, _args: Any, _output: Any) -> None:
            if own:
                keep()
            running[0] = False

        self._handles.append(encoder.register_forward_pre_hook(begin, with_kwargs=True))
        embedding = tower.module.get_input_embeddings()
        self._handles.append(embedding.register_forward_pre_hook(begin_parts))
        self._handles += [
            _on_layer(tower, num_layers, layer, partial(take, number))
            for number, layer in enumerate(self.layers)
        ]
        self._handles.append(encoder.register_forward_hook(end, always_call=True))

    def remove(self) -> None:
        """Remove the hooks and forget what they caught."""
        for handle in self._handles:
            handle.remove()
        self._calls.clear()


def _on_layer(tower: TextTower, num_layers: int, layer: int, take: Callable[[Tensor], None]) -> Any:
    """A hook that hands over what a layer gives."""
    if layer == 0:
        return tower.blocks[0].register_forward_pre_hook(
            lambda _module, args, kwargs: take(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    block = tower.blocks[min(layer, num_layers) - 1]
    module = tower.norm if layer == num_layers else block
    return module.register_forward_hook(
        lambda _module, _args, output: take(output[0] if isinstance(output, tuple) else output)
    )


def _places(rows: Tensor, known: Tensor) -> Tensor:
    """Number of the first known row that equals each row, [N, ...] in [M, ...]; -1: none does."""
    both = torch.cat([known, rows]).flatten(1).float()
    distinct, same = torch.unique(both, dim=0, return_inverse=True)
    order = torch.arange(len(known), device=rows.device)
    first = torch.full((len(distinct),), len(known), device=rows.device)
    first = first.scatter_reduce(0, same[: len(known)], order, "amin")[same[len(known) :]]
    return torch.where(first < len(known), first, -1)
