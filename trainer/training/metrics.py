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

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ...schemas import TrainConfig, flat
from ...schemas.units import format_bytes
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
    _tokens: int = 0

    def start(self, loader: "PackedLoader") -> None:
        """Start the clocks. Steps before a restart count for the means, but not for the speed."""
        self._start, self._waited = time.perf_counter(), loader.wait_seconds
        self._untimed, self._tokens = len(self.losses), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, loss: float, norm: float, num_tokens: int) -> None:
        """Record a step, and its tokens of images over all ranks."""
        self.losses.append(loss)
        self.norms.append(norm)
        self._tokens += num_tokens

    def summary(self, loader: "PackedLoader") -> dict[str, float]:
        """Means and speed."""
        seconds = time.perf_counter() - self._start
        samples = (len(self.losses) - self._untimed) * loader.data.batch_size
        return {
            "loss": math.fsum(self.losses) / len(self.losses),
            "grad_norm": math.fsum(self.norms) / len(self.norms),
            "samples_per_second": samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / max(1, len(self.losses) - self._untimed),
            "data_wait_share": (loader.wait_seconds - self._waited) / seconds,
        }


def start_tracker(accelerator: Accelerator, config: TrainConfig, step: int, run_id: str) -> None:
    """Start the tracker that the configuration names, for a run that resumes after ``step``.

    Args:
        run_id: by which the tracker continues the run, if it can be told: 32 hexadecimal digits.
    """
    name = config.tracker
    if name == "none":
        return
    if name == "tensorboard":
        # Drop steps that a stopped run had logged beyond its checkpoint.
        accelerator.init_trackers(name, init_kwargs={name: {"purge_step": step + 1}})
        return
    # Trackers accept numbers and strings only.
    values = {k: v if isinstance(v, (int, float)) else str(v) for k, v in flat(config).items()}
    options = tracker_options(config.output, run_id)
    accelerator.init_trackers("semroute", config=values, init_kwargs={name: options.get(name, {})})


def tracker_options(output: str, run_id: str) -> dict[str, dict[str, Any]]:
    """Arguments of trackers' own ``init``, by which a run that is resumed is the same run there;
    aim, clearml and mlflow choose ids themselves, and begin another."""
    name = Path(output).name
    return {
        "wandb": {"name": name, "dir": output, "id": run_id, "resume": "allow"},
        "trackio": {"name": f"{name}-{run_id[:8]}", "resume": "allow"},
        "swanlab": {"experiment_name": name, "id": run_id[:21], "resume": "allow"},
        "comet_ml": {"experiment_key": run_id},  # its mode, get_or_create, is the default
        "dvclive": {"dir": str(Path(output) / "dvclive"), "resume": True},
    }


def log_images(accelerator: Accelerator, images: NDArray[np.uint8], step: int) -> None:
    """Send images [N, height, width, 3] to the tracker, if it takes images."""
    for tracker in accelerator.trackers:
        log = getattr(tracker, "log_images", None)
        if log is not None:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            log({"samples": images}, step=step, **options)


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
    if not (due and any(parameter.requires_grad for parameter in router.parameters())):
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
    fetched = {}
    if "fetched_bytes" in line:
        text, retries = format_bytes(line["fetched_bytes"]), line["fetch_retries"]
        fetched["fetched"] = f"{text}, {retries} retries" if retries else text
    progress.set_postfix(
        {
            "loss": f"{line['loss']:.4g}",
            "samples/s": f"{line['samples_per_second']:.3g}",
            "data wait": f"{line['data_wait_share']:.0%}",
            "routing entropy": f"{line['routing_entropy']:.3f}",
            **fetched,
        }
    )
