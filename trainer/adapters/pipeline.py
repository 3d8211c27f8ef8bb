"""A pipeline of diffusers whose network reads what a run learned, by hooks on its components.

Shapes: B batch, T text rows, R tokens, L layers, K base layers that the network reads (taps), H
text width.
"""

import inspect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import ARGUMENTS
from .base import Text
from .captures import Captures
from .lora import remove_lora
from .routed import Routed
from .sockets import Source

MAX_TEXTS = 2
"""Texts whose deviations are kept from step to step: with guidance, prompt and negative prompt."""


@dataclass(frozen=True, eq=False)
class _Laid:
    """A text that the network was given.

    Attributes:
        rows: its base layers, [B, T, K, H].
        hidden: layers of its tokens, [R, L, H].
        numbers: of the token of each row, int64 [B, T], on the CPU; R where there is none.
        source: what the sockets read, unless that depends on t.
    """

    rows: Tensor
    hidden: Tensor
    numbers: Tensor
    source: Source | None

    def holds(self, rows: Tensor) -> bool:
        same = (rows.device, rows.dtype) == (self.rows.device, self.rows.dtype)
        return same and torch.equal(rows, self.rows)


class TextReader:
    """What a run makes of rows of text, by the tokens that they came from.

    Args:
        routed: with its learned weights.
        captures: where the tokens are kept.
    """

    def __init__(self, routed: Routed, captures: Captures) -> None:
        self.routed = routed
        self._captures = captures
        self._recent: deque[_Laid] = deque(maxlen=MAX_TEXTS)

    def read(self, rows: Tensor, t: Tensor | None = None) -> Source:
        """What the network reads instead of rows of text.

        Args:
            rows: base layers as the network is given them, [B, T, K, H].
            t: [B]; needed where ``router.depends_on_t``.

        Raises:
            InputError: a row came from nothing that the text encoder gave.
        """
        laid = next((laid for laid in self._recent if laid.holds(rows)), None)
        if laid is None:
            laid = self._lay_out(rows)
            self._recent.append(laid)
        return laid.source or self._source(laid.rows, laid.hidden, laid.numbers, t)

    def _lay_out(self, rows: Tensor) -> _Laid:
        hidden, numbers = self.find(rows)
        source = None
        if not self.routed.router.depends_on_t:
            source = self._source(rows, hidden, numbers)
        return _Laid(rows, hidden, numbers, source)

    def find(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that rows came from; see :meth:`.captures.Captures.find`."""
        routed = self.routed
        if routed.deviates:
            return self._captures.find(rows)
        # Nothing but the gains of taps, which are of all rows.
        hidden = rows.new_zeros(0, len(routed.router.layers_read), rows.shape[-1])
        return hidden, torch.zeros(rows.shape[:2], dtype=torch.long)

    def _source(
        self, rows: Tensor, hidden: Tensor, numbers: Tensor, t: Tensor | None = None
    ) -> Source:
        routed = self.routed
        routed.router.to(rows.device)
        for gain in (routed.gain, routed.fusion_gain):
            if gain is not None:
                gain.data = gain.data.to(rows.device)
        text = Text(rows, (numbers < len(hidden)).to(rows.device))
        return routed.read(text, hidden, numbers, t)


class Attachment:
    """Hooks on a network that is a pipeline's own, by which it reads what a run learned.

    Args:
        routed: made of the pipeline's network, with its learned weights.
        captures: what the pipeline's text encoder gives; None: text stays as it is.
        replaced: weights of the network that the run's took the place of.
        trained: parameters of the network that had gradients.
    """

    def __init__(
        self,
        routed: Routed,
        captures: Captures | None,
        replaced: Mapping[str, Tensor],
        trained: frozenset[str],
    ) -> None:
        self.routed = routed
        self._captures, self._replaced, self._trained = captures, replaced, trained
        self._arguments = ARGUMENTS[routed.family.name]
        transformer = routed.transformer
        self._signature = inspect.signature(type(transformer).forward)
        self._handles: list[Any] = []
        if captures is not None:
            self._reader = TextReader(routed, captures)
            self._handles = [
                transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
                transformer.register_forward_hook(self._end, always_call=True),
            ]

    @property
    def changes_network(self) -> bool:
        """Whether weights of the network are not its own."""
        return bool(self._replaced) or "lora" in self.routed.parts

    def remove(self) -> None:
        """Give the network back as it was."""
        for handle in self._handles:
            handle.remove()
        if self._captures is not None:
            self._captures.remove()
        restore(self.routed, self._replaced, self._trained)

    def _begin(self, network: Any, args: Any, kwargs: Any) -> Any:
        routed, names = self.routed, self._arguments
        bound = self._signature.bind(network, *args, **kwargs)
        given = bound.arguments
        rows = names.read(given[names.text], network.config)
        t = None
        if routed.router.depends_on_t:
            t = names.read_t(given[names.timestep], network.config).float().expand(len(rows))
        source = self._reader.read(rows, t)
        if routed.hooked:
            source.projected = None  # weights may have changed since the last step
            routed.sockets.source = source
        else:
            given[names.text] = names.write(given[names.text], source.text.base)
        return bound.args[1:], bound.kwargs

    def _end(self, _network: nn.Module, _args: Any, _output: Any) -> None:
        self.routed.sockets.source = None


def replace_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put other tensors into parameters, in the dtype and on the device of each.

    Returns:
        Those that were there, by name.
    """
    replaced = {}
    for name, value in weights.items():
        parameter = network.get_parameter(name)
        replaced[name] = parameter.data
        parameter.data = value.to(parameter.device, parameter.dtype)
    return replaced


def restore(routed: Routed, replaced: Mapping[str, Tensor], trained: frozenset[str]) -> None:
    """Undo what making ``routed``, and loading its weights, did to its network.

    Args:
        replaced: weights that were replaced.
        trained: parameters that had gradients.
    """
    routed.sockets.remove()
    if "lora" in routed.parts:
        remove_lora(routed.transformer)
    replace_weights(routed.transformer, replaced)
    for name, parameter in routed.transformer.named_parameters():
        parameter.requires_grad_(name.replace(".base_layer.", ".") in trained)
