"""Metrics of training: means over steps, routing weights, and where both are logged.

Shapes: R rows (tokens of captions, packed), L layers, H text width.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ...schemas import TrainConfig, flat
from ..runs.metrics import METRICS, WEIGHTS, add_line

if TYPE_CHECKING:
    from ..data.loader import PackedLoader
    from ..runs.record import Network

HISTORY_T = [0.1, 0.3, 0.5, 0.7, 0.9]
"""Noise levels at which weights that depend on t are logged."""
HISTORY_LINES = 200
"""How often routing weights are logged in a run, about."""


@dataclass
class Window:
    """Losses and gradient norms of the steps since the last line of metrics."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def start(self, loader: "PackedLoader") -> None:
        """Start the clocks. Steps before a restart count for the means, but not for the speed."""
        self._start, self._waited = time.perf_counter(), loader.wait_seconds
        self._untimed = len(self.losses)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, loss: float, norm: float) -> None:
        """Record a step."""
        self.losses.append(loss)
        self.norms.append(norm)

    def summary(self, loader: "PackedLoader") -> dict[str, float]:
        """Means and speed."""
        seconds = time.perf_counter() - self._start
        samples = (len(self.losses) - self._untimed) * loader.data.batch_size
        return {
            "loss": math.fsum(self.losses) / len(self.losses),
            "grad_norm": math.fsum(self.norms) / len(self.norms),
            "samples_per_second": samples / seconds,
            "data_wait_share": (loader.wait_seconds - self._waited) / seconds,
        }


def start_tracker(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Start the tracker that the configuration names, for a run that resumes after ``step``."""
    name = config.tracker
    if name == "none":
        return
    if name == "tensorboard":
        # Drop steps that a stopped run had logged beyond its checkpoint.
        accelerator.init_trackers(name, init_kwargs={name: {"purge_step": step + 1}})
        return
    # Trackers accept numbers and strings only.
    values = {k: v if isinstance(v, (int, float)) else str(v) for k, v in flat(config).items()}
    options = {"wandb": {"name": Path(config.output).name, "dir": config.output}}
    accelerator.init_trackers("semroute", config=values, init_kwargs={name: options.get(name, {})})


def routing_weights(
    network: "Network", config: TrainConfig, step: int, hidden: Any
) -> dict[str, Any] | None:
    """A line of ``routing.jsonl``; None if weights are not learned, or this step has no line.

    Args:
        hidden: [R, L, H], tokens to average over if each token has its own weights.
    """
    every = config.log_every * math.ceil(config.steps / HISTORY_LINES / config.log_every)
    due = step % every == 0 or step == config.steps
    router = network.router
    if not (due and [*router.parameters()]):
        return None
    levels = HISTORY_T if router.depends_on_t else [1.0]
    device = next(network.parameters()).device
    alpha = router.alpha(torch.tensor(levels, device=device), hidden)
    rounded = [[[round(w, 6) for w in row] for row in rows] for rows in alpha.tolist()]
    return {"step": step, "t": levels, "weights": rounded}


def log_metrics(
    accelerator: Accelerator,
    config: TrainConfig,
    line: Mapping[str, Any],
    weights: Mapping[str, Any] | None,
    progress: tqdm,
) -> None:
    """Write a line of metrics to the run, the tracker and the progress bar.

    Args:
        weights: a line of ``routing.jsonl``, if one is due.
    """
    path = Path(config.output)
    add_line(path, METRICS, line)
    if weights is not None:
        add_line(path, WEIGHTS, weights)
    numbers = {k: v for k, v in line.items() if k not in ("step", "validation_by_t")}
    bins = line.get("validation_by_t", [])
    for number, loss in enumerate(bins):
        low, high = number / len(bins), (number + 1) / len(bins)
        numbers[f"validation_loss/t {low:.3g} to {high:.3g}"] = loss
    accelerator.log(numbers, step=line["step"])
    progress.set_postfix(
        {
            "loss": f"{line['loss']:.4g}",
            "samples/s": f"{line['samples_per_second']:.3g}",
            "data wait": f"{line['data_wait_share']:.0%}",
            "routing entropy": f"{line['routing_entropy']:.3f}",
        }
    )
