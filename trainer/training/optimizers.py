"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable
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
    """AdamW, with a rate of its own and no decay for the router; and Muon if configured.

    Norms and biases have a group of their own if they do not decay. What does not learn has none.
    """
    shares = network.parameter_groups()
    router = [parameter for part, _ in shares for parameter in part]
    matrices = network.block_matrices() if config.name == "muon" else []
    apart = {id(parameter) for parameter in (*router, *matrices)}
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    others = [parameter for parameter in learning if id(parameter) not in apart]
    small = [p for p in others if p.ndim < 2] if config.decayed == "matrices" else []
    apart = {id(parameter) for parameter in small}
    others = [parameter for parameter in others if id(parameter) not in apart]
    groups: list[dict[str, Any]] = [{"params": others}] if others else []
    groups += [{"params": small, "weight_decay": 0.0}] if small else []
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
    """Warm-up, then the schedule of the configuration, for a run that has taken ``step`` steps."""
    warmup = config.optimizer.warmup_steps
    after = _after_warmup(config.optimizer, max(1, config.steps - warmup))

    def factor(now: int) -> float:
        return (now + 1) / (warmup + 1) if now < warmup else after(now - warmup)

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def _after_warmup(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Factor of the rates by number of steps since the warm-up, of which ``steps`` are left."""
    match config.schedule:
        case "constant":
            return lambda _now: 1.0
        case "linear":
            return lambda now: 1.0 - now / steps
        case "cosine":
            return lambda now: 0.5 - 0.5 * math.cos(math.pi * (1.0 - now / steps))
        case "cosine-restarts":
            from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

            made = get_cosine_with_hard_restarts_schedule_with_warmup(
                _any_optimizer(), 0, steps, config.num_cycles
            )
        case "wsd":
            from transformers import get_wsd_schedule

            made = get_wsd_schedule(
                _any_optimizer(), 0, config.decay_steps, steps, decay_type=config.decay_shape
            )
    return made.lr_lambdas[0]


def _any_optimizer() -> torch.optim.Optimizer:
    """An optimizer for schedules that are made with one and of which only the factor is used."""
    return torch.optim.SGD([torch.zeros(1)], lr=1.0)
