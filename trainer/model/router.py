"""Base classes of the strategies: weights over the stored LLM layers, and what blocks read.

Shapes: B batch, R rows (tokens of all captions, packed), P pairs of a batch item and a row,
L layers, H text width, D blocks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...schemas import InputError, RoutingConfig
from .fusion import fuse


class Router(nn.Module, ABC):
    """Base class of the strategies, which knows the layers that it weighs and those that it reads.

    Attributes:
        layers: the LLM layers that alpha weighs, in order (all that are stored).
        layers_read: those of them whose hidden states are needed, in this order; for a store of
            mixes, the numbers of the mixes.
        depends_on_t: True where what blocks read changes with t.
        depends_on_content: True where alpha changes with the token.
        mixes_layers: True where blocks read layers mixed by alpha, and nothing else of them.
        needs_positions: True where what blocks read changes with the position of a token.
    """

    depends_on_t = False
    depends_on_content = False
    mixes_layers = True
    needs_positions = False

    def __init__(self, layers: Sequence[int], layers_read: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.layers_read = self.layers if layers_read is None else tuple(layers_read)

    @abstractmethod
    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """The weights of the layers: fp32 [B or 1, D or 1, L], with 1 where they do not depend on t
        or on the block.

        Args:
            t: [B], only where ``depends_on_t``.
            hidden: [R, len(layers_read), H], only where ``depends_on_content``: alpha is then the
                mean over these rows.
        """

    def table(self, t: Tensor, num_blocks: int, hidden: Tensor | None = None) -> Tensor:
        """The weights at noise levels t [T]: fp32 [T, D, L], on the CPU.

        Args:
            hidden: as for :meth:`alpha`.
        """
        with torch.no_grad():
            alpha = self.alpha(t, hidden)
        return alpha.expand(len(t), num_blocks, len(self.layers)).cpu().contiguous()

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        """The layers that are read, and alpha over them: fp32 [D or 1, L].

        Raises:
            InputError: blocks do not read a fixed mix of layers.
        """
        positions = [self.layers.index(layer) for layer in self.layers_read]
        return [*self.layers_read], self.alpha()[0][:, positions].detach()

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that determine the weights, each group with its share of the router's
        learning rate. All others are trained like the network's own.

        Adam moves every parameter by about its learning rate per step. A logit that is a parameter
        moves by that much; one that is a product moves by fan-in times as much, for which the share
        compensates (as muP does for Adam, arXiv 2203.03466).
        """
        return [(list(self.parameters()), 1.0)]

    def penalty(self, t: Tensor | None = None) -> Tensor | float:
        """A term added to the loss: 0.0 unless the configuration asks for a regulariser."""
        return 0.0

    def width_read(self, text_width: int) -> int:
        """Width of what a block reads per token, before the projection; H except for ``concat``."""
        return text_width

    def forward(
        self,
        hidden: Tensor,
        t: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        """The input of the blocks, before the projection.

        Args:
            hidden: [R, len(layers_read), H], packed rows in the order of ``layers_read``.
            t: [B], only where ``depends_on_t``, with ``rows`` and ``owners`` as in
                :func:`~semroute.trainer.model.fusion.fuse`.

        Returns:
            fp32 [R or P, D or 1, H].
        """
        self._check_layers(hidden)
        if self.depends_on_t:
            return fuse(hidden, self.alpha(t), rows=rows, owners=owners)
        return self.mix(hidden)

    def mix(self, hidden: Tensor) -> Tensor:
        """:meth:`forward` without t: [R, len(layers_read), H] -> fp32 [R, D or 1, H]."""
        return fuse(hidden, self.alpha())

    def _check_layers(self, hidden: Tensor) -> None:
        if hidden.shape[1] != len(self.layers_read):
            raise ValueError(
                f"hidden states hold {hidden.shape[1]} layers, but this router reads "
                f"{len(self.layers_read)}: read layers {list(self.layers_read)}"
            )


class Learned(Router):
    """Weights from learned logits z, which start at zero: every such strategy starts as uniform.

    ``softmax`` (arXiv 2602.03510): alpha = softmax(z). ``signed``: alpha = (1 + z) / L, which is
    the softmax to first order in z except for a factor that all layers share, which the following
    RMSNorm removes; its weights may be negative. ``top_k`` keeps the k weights of largest absolute
    value; the gradient reaches all, as if all had been kept (straight-through, arXiv 1308.3432), so
    a layer that was dropped can come back. Layers that tie with the k-th are kept, so at the start
    all are.

    Raises:
        InputError: ``top_k`` exceeds the number of layers.
    """

    def __init__(self, layers: Sequence[int], config: RoutingConfig) -> None:
        super().__init__(layers)
        self.config = config
        if config.top_k is not None and config.top_k > len(self.layers):
            raise InputError(
                f"routing.top_k is {config.top_k}, but the store holds {len(self.layers)} layers: "
                "choose fewer"
            )

    @abstractmethod
    def logits(self, t: Tensor | None = None) -> Tensor:
        """z(t, d): [B or 1, D or 1, L], with 1 where it does not depend on t or on the block."""

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.weigh(self.logits(t))

    def weigh(self, logits: Tensor) -> Tensor:
        """Logits to weights, over the last axis, in fp32."""
        z = logits.float()
        signed = self.config.weights == "signed"
        alpha = (1 + z) / len(self.layers) if signed else z.softmax(dim=-1)
        if self.config.top_k is None:
            return alpha
        size = alpha.detach().abs()
        left_out = size < size.topk(self.config.top_k).values[..., -1:]
        kept = (
            alpha.masked_fill(left_out, 0.0)
            if signed
            else z.masked_fill(left_out, -torch.inf).softmax(dim=-1)
        )
        return alpha + (kept - alpha).detach()

    def deviation(
        self,
        hidden: Tensor,
        t: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        """The mix less the mix at zero logits, sum_l (alpha_l - 1/L) LN(h_l): exactly 0 there.

        Args, returns: as for :meth:`Router.forward`.
        """
        self._check_layers(hidden)
        if self.depends_on_t:
            return fuse(hidden, self.alpha(t), rows=rows, owners=owners, mean=False)
        return fuse(hidden, self.alpha(), mean=False)

    def penalty(self, t: Tensor | None = None) -> Tensor | float:
        """``uniform_penalty`` times the chi-square distance of alpha from uniform, L sum_l
        (alpha_l - 1/L)^2, averaged over blocks and t; plus ``smooth_penalty`` times the same
        distance between neighbouring blocks, L sum_l (alpha_l(d + 1) - alpha_l(d))^2."""
        toward_uniform, smooth = self.config.uniform_penalty, self.config.smooth_penalty
        if not (toward_uniform or smooth):
            return 0.0
        alpha, num_layers = self.alpha(t), len(self.layers)
        total = toward_uniform * num_layers * (alpha - 1 / num_layers).square().sum(-1).mean()
        steps = num_layers * alpha.diff(dim=1).square().sum(-1)  # [B or 1, D - 1]
        return total + smooth * steps.sum() / max(1, steps.numel())


def no_fixed_mix(strategy: str, reason: str) -> InputError:
    """The error for storing the mixes of a strategy that has no fixed ones."""
    return InputError(
        f"strategy {strategy} {reason}, so its blocks do not read a few fixed mixes of layers: "
        "keep the layers (strategies penultimate, uniform, static, depth and one-per-block can be "
        "mixed)"
    )


def entropy(alpha: Tensor) -> Tensor:
    """Entropy over the last axis in nats, divided by log L: 1 is uniform, 0 is a single layer.

    For weights of both signs, the entropy of their absolute values, divided by their sum. For a
    single layer (L = 1) it is 0.
    """
    share = alpha.abs() / alpha.abs().sum(dim=-1, keepdim=True).clamp(min=1e-12)
    nats = -torch.xlogy(share, share).sum(dim=-1)
    return nats / max(math.log(alpha.shape[-1]), 1e-9)
