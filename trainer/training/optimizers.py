"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ...schemas import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from ..runs.record import Network

_TOGETHER = 1 << 24
"""Numbers that are orthogonalised together, as they are copied for it; or one matrix, if larger."""


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` that orthogonalises matrices of one shape together.

    Its steps and state are the same. Between the products of small matrices a processor does little
    but wait for the next: dozens of a hundred rows take less than half the time together.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step as ``torch.optim.Muon`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            learning = [(each, each.grad) for each in group["params"] if each.grad is not None]
            for shape in dict.fromkeys(matrix.shape for matrix, _ in learning):
                alike = [pair for pair in learning if pair[0].shape == shape]
                num = max(1, _TOGETHER // shape.numel())
                for start in range(0, len(alike), num):
                    self._step_together(alike[start : start + num], group)
        return loss

    def _step_together(
        self, alike: list[tuple[torch.Tensor, torch.Tensor]], group: dict[str, Any]
    ) -> None:
        """Takes the step of matrices of one shape, each with its gradient."""
        updates = []
        for matrix, gradient in alike:
            state, momentum = self.state[matrix], group["momentum"]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(average, momentum) if group["nesterov"] else average)
        directions = _orthogonalise(
            torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rate = group["lr"] * math.sqrt(max(1, directions.shape[1] / directions.shape[2]))
        for (matrix, _), direction in zip(alike, directions, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(direction, alpha=-rate)


def _orthogonalise(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz iterations in bfloat16 that bring singular values near 1.

    As https://kellerjordan.github.io/posts/muon does. On a CPU products are computed in float32 and
    rounded: a GPU accumulates in float32 too, and a CPU without bfloat16 instructions takes many
    times as long for products in bfloat16.

    Args:
        matrices: [number, rows, columns].
    """
    exact = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().to(exact)

    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = rounded(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = rounded(x @ x.mT)
        change = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.baddbmm(x, change, x, beta=a))
    return (x.mT if tall else x).bfloat16()


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
