"""Hooks that let the blocks of a pretrained network read other text than it was given.

They are forward pre-hooks of torch on the blocks: names of weights, LoRA, gradient checkpointing,
``torch.compile`` of a block's ``forward``, DDP and FSDP2 stay what they are.

Shapes: B batch, T text rows of the padded layout, K taps, H text width, W width of the network,
P rows of text, D sockets.
"""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import Family, Socket, Text


@dataclass(eq=False)
class Source:
    """What the sockets read during one forward pass, and its recomputation in the backward pass.

    Attributes:
        text: what the network is given.
        deviation: what is added to it, fp32 [P + 1, D or 1, K, H]; the last row is zero. With 1,
            it is the same for all sockets.
        index: row of ``deviation`` for each row of the text, int64 [B, T]; the last one where
            nothing is added.
        projected: P(base), [B, T, W]; only for sockets of kind ``residual``. None: the first of
            them computes it.
        done: its backward pass has begun.
    """

    text: Text
    deviation: Tensor
    index: Tensor
    projected: Tensor | None = None
    done: bool = False

    def deviation_of(self, number: int) -> Tensor:
        """fp32 [B, T, K, H] of one socket."""
        rows = self.deviation[:, number if self.deviation.shape[1] > 1 else 0]
        return rows.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def read(self, number: int) -> Tensor:
        """base + deviation of one socket: [B, T, K, H] in the dtype of the base."""
        return add(self.text.base, self.deviation_of(number))


def add(base: Tensor, deviation: Tensor) -> Tensor:
    """base + deviation, computed in fp32, in the dtype of the base."""
    return (base.float() + deviation).to(base.dtype)


class _Mark(torch.autograd.Function):
    """Identity that tells the hooks whose backward pass begins."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, hooks: "Sockets", source: Source) -> Tensor:
        ctx.hooks, ctx.source = hooks, source
        return output.clone()  # FSDP2 warns of views

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.hooks.begin_backward(ctx.source)
        return grad, None, None


class Sockets:
    """The hooks of one network; without a :class:`Source` they change nothing.

    Args:
        transformer: a pretrained network of diffusers.
        family: of the network.
        sockets: where its blocks read text.
    """

    def __init__(self, transformer: nn.Module, family: Family, sockets: Sequence[Socket]) -> None:
        self.transformer = transformer
        self.family = family
        self.source: Source | None = None
        self._live: weakref.WeakSet[Source] = weakref.WeakSet()
        self._handles = [
            socket.module.register_forward_pre_hook(self._hook(number, socket), with_kwargs=True)
            for number, socket in enumerate(sockets)
        ]
        self._project_base = any(socket.kind == "residual" for socket in sockets)

    def remove(self) -> None:
        """Remove the hooks; the network is as it was."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def reading(self, source: Source) -> Iterator[None]:
        """A context in which the network reads a source."""
        if self._project_base and source.projected is None:
            text = source.text
            source.projected = self.family.project(self.transformer, text.base, text.mask)
        self.source = source
        try:
            yield
        finally:
            self.source = None

    def mark(self, output: Tensor, source: Source) -> Tensor:
        """The output of a forward pass, whose backward pass will read the same source."""
        if not (torch.is_grad_enabled() and output.requires_grad):
            return output
        self._live.add(source)
        marked: Tensor = _Mark.apply(output, self, source)
        return marked

    def begin_backward(self, source: Source) -> None:
        """Recomputed blocks read this source from here on.

        Raises:
            RuntimeError: two forward passes wait for their backward passes under gradient
                checkpointing, where blocks of one would be recomputed with the text of the other.
        """
        source.done = True
        waiting = [other for other in self._live if not other.done]
        if waiting and getattr(self.transformer, "is_gradient_checkpointing", False):
            raise RuntimeError(
                f"{len(waiting) + 1} forward passes before a backward pass, expected one: with "
                "gradient checkpointing, blocks are recomputed with the text of the last forward "
                "pass. Call backward after each forward pass, or switch gradient checkpointing off."
            )
        self.source = source
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.source = None

    def _hook(self, number: int, socket: Socket) -> Any:
        signature = inspect.signature(type(socket.module).forward)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            source = self.source
            if source is None:
                return None
            bound = signature.bind(module, *args, **kwargs)
            old = bound.arguments[socket.argument]
            bound.arguments[socket.argument] = self._write(number, socket, source, old)
            return bound.args[1:], bound.kwargs

        return hook

    def _write(self, number: int, socket: Socket, source: Source, old: Tensor) -> Tensor:
        if socket.kind == "raw":
            return add(old, source.deviation_of(number)[:, :, 0])
        mask = source.text.mask
        new = self.family.project(self.transformer, source.read(number), mask)
        if socket.kind == "replace":
            return new.to(old.dtype)
        if source.projected is None:
            source.projected = self.family.project(self.transformer, source.text.base, mask)
        # Zero outside the caption's rows, where a sequence may go on with the image.
        change = torch.where(mask[..., None], new - source.projected, 0.0).to(old.dtype)
        start = socket.start
        first = start(old, mask.shape[1]) if callable(start) else start
        num = min(mask.shape[1], old.shape[1] - first)
        middle = old[:, first : first + num] + change[:, :num]
        return torch.cat([old[:, :first], middle, old[:, first + num :]], dim=1)
