"""Optimizers and learning-rate schedules."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from ...schemas import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from ..runs.record import Network

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` that multiplies bfloat16 matrices in float32 on a CPU, and rounds then.

    A GPU accumulates in float32 too. On a CPU without bfloat16 instructions, products in bfloat16
    take many times as long and dominate the step of a small network; the results differ as much as
    with another order of summation.
    """

    def step(self, closure: Any = None) -> Any:
        """Take a step as ``torch.optim.Muon`` does."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        with _InFloat32():
            return super().step(closure)


class _InFloat32(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _PRODUCTS and args[0].dtype == torch.bfloat16:
            wide = (argument.float() for argument in args)
            return function(*wide, **(kwargs or {})).bfloat16()
        return function(*args, **(kwargs or {}))


def make_optimizers(network: "Network", config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, with a rate of its own and no decay for the router; and Muon if configured. What does
    not learn has no group."""
    shares = network.parameter_groups()
    router = [parameter for part, _ in shares for parameter in part]
    matrices = network.block_matrices() if config.name == "muon" else []
    apart = {id(parameter) for parameter in (*router, *matrices)}
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    others = [parameter for parameter in learning if id(parameter) not in apart]
    groups: list[dict[str, Any]] = [{"params": others}] if others else []
    if router:
        if config.router_scaling == "none":
            shares = [(router, 1.0)]
        groups += [
            {"params": part, "lr": config.router_lr * share, "weight_decay": 0.0}
            for part, share in shares
        ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
    ]
    if matrices:
        muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
        optimizers.append(muon)
    return optimizers


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> LambdaLR:
    """Warm-up, then constant, cosine or linear, for a run that has taken ``step`` steps."""
    warmup, steps = config.optimizer.warmup_steps, config.steps

    def factor(now: int) -> float:
        if now < warmup:
            return (now + 1) / (warmup + 1)
        left = 1.0 - (now - warmup) / max(1, steps - warmup)
        match config.optimizer.schedule:
            case "constant":
                return 1.0
            case "linear":
                return left
            case "cosine":
                return 0.5 - 0.5 * math.cos(math.pi * left)

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, factor, last_epoch=step - 1)
