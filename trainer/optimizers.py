"""What moves the weights of a run, and how far in which step."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..schemas import OptimizerConfig, TrainConfig
from .dit import DiT


def make_optimizers(dit: DiT, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, with the router in a group of its own rate and no decay; and Muon where asked for."""
    shares = dit.router.parameter_groups()
    router = [parameter for part, _ in shares for parameter in part]
    matrices = dit.block_matrices() if config.name == "muon" else []
    apart = {id(parameter) for parameter in (*router, *matrices)}
    others = [parameter for parameter in dit.parameters() if id(parameter) not in apart]
    groups: list[dict[str, Any]] = [{"params": others}]
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
        optimizers.append(
            torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
        )
    return optimizers


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> LambdaLR:
    """Warm-up, then constant, cosine or linear, about to take step ``step``."""
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
