"""The training loop: two stores in, a run directory with routing weights and a DiT out.

What step s trains on, and with which t and noise, is a function of (seed, position); the learning
rates are a function of s. So a run that is stopped and continued needs tensors and a step number
and nothing else, and ends in the same bits as one that was not stopped.

Shapes: B batch (of one rank and accumulation step), K noise draws, C channels.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from ...pipeline.store.lock import Lock, LockedError
from ...schemas import TrainConfig, flat
from ..data.batch import Batch, on_device
from ..data.loader import PackedLoader
from ..diffusion.flow import Flow
from ..diffusion.noise import draw_noise, jitter
from ..model.dit import DiT
from ..model.router import entropy
from ..runs.checkpoint import (
    Checkpoint,
    cut_like,
    gather,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from ..runs.metrics import METRICS, WEIGHTS, add_line
from .accelerator import stop_signals
from .optimizers import make_optimizers, make_schedule
from .validation import Validation

HISTORY_T = [0.1, 0.3, 0.5, 0.7, 0.9]
"""Noise levels at which weights that depend on t are logged."""


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the run after a whole step; its checkpoint is written."""


class Trainer:
    """One run in memory: the network, its optimizers and average, and how to take a step."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: DiT,
        found: Checkpoint | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.config = config
        self.validation = validation
        self.accelerator = accelerator
        self.path = Path(config.output)
        self.flow = Flow.from_config(config.flow)
        self.step = 0 if found is None else found.step
        if found is not None:
            model.load_state_dict(found.model())
        self.dit = model.train().to(accelerator.device)
        self.dit.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            for block in self.dit.blocks:
                block.compile()
        self.plain_optimizers = make_optimizers(self.dit, config.optimizer)
        # The stream is not prepared: it knows its rank. Neither are the schedules, which accelerate
        # would advance once for every rank.
        self.model, *self.optimizers = accelerator.prepare(self.dit, *self.plain_optimizers)
        if found is not None:
            load_optimizer_tensors(self.dit, self.plain_optimizers, found.optimizer())
        self.schedules = [make_schedule(o, config, self.step) for o in self.plain_optimizers]
        parameters = dict(self.dit.named_parameters())
        average = parameters if found is None else found.ema()
        self.ema = {
            name: cut_like(average[name].detach(), parameter.detach()).to(
                accelerator.device, torch.float32, copy=True
            )
            for name, parameter in parameters.items()
        }
        self.window = Window() if found is None else Window(**found.state()["window"])

    def fit(self, stream: PackedLoader, show: bool, lock: Lock | None = None) -> None:
        """Take steps; once in a while log, once in a while validate, and once in a while save.

        Args:
            lock: of the run directory, where this process holds it.
        """
        config, every = self.config, self.config.validation.every
        self._start_tracker()
        progress = tqdm(
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=not (show and self.accelerator.is_main_process),
        )
        self.window.start(stream)
        with progress, closing(iter(stream)) as read, stop_signals() as stop:
            batches = on_device(read, self.accelerator.device)
            while self.step < config.steps:
                if lock is not None and lock.lost:
                    raise LockedError(
                        f"another process took this one for dead and has taken over {self.path}"
                    )
                seen, stopping = self.take_step(batches, stop.is_set())
                progress.update()
                last = self.step == config.steps
                validating = self.validation is not None and (self.step % every == 0 or last)
                if self.step % config.log_every == 0 or validating or last:
                    self.log(seen, stream, progress, self.validate() if validating else {})
                if stopping or self.step % config.checkpoint_every == 0:
                    self.save()
                if stopping and self.step < config.steps:
                    self._stop(progress)
            self.save()

    def take_step(self, batches: Iterator[Batch], stop: bool) -> tuple[tuple[Tensor, Any], bool]:
        """One step of the optimizers, over all accumulation steps.

        Args:
            batches: on the device.
            stop: whether this rank was asked to.

        Returns:
            What the last weights were a function of, t [B * K] and hidden states [R, L, H]; and
            whether any rank was asked to stop.
        """
        config, accelerator = self.config, self.accelerator
        # Read once a step: a device that is asked for a number waits until it has no more to do.
        own_loss, sample_ids = torch.zeros((), device=accelerator.device), []
        for _ in range(config.grad_accum_steps):
            batch = next(batches)
            sample_ids += batch.names()
            with accelerator.accumulate(self.model):
                loss, t = self.loss(batch)
                self.put_router_together()
                accelerator.backward(loss + self.dit.router.penalty(t))
            own_loss += loss.detach() / config.grad_accum_steps
        parameters = self.dit.parameters()
        norm = float(accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm))
        report = torch.stack([own_loss, torch.full_like(own_loss, stop)])
        total_loss, stopping = accelerator.reduce(report, "mean").tolist()
        if not (math.isfinite(total_loss) and math.isfinite(norm)):
            raise FloatingPointError(
                self._not_finite(own_loss.item(), total_loss, norm, sample_ids)
            )
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.step += 1
        if self.step % config.ema.every == 0:
            self._average()
        self.window.add(total_loss, norm)
        return (t, batch.hidden), stopping > 0

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, each sample under K draws of t and noise; and the t that routing
        saw."""
        draws = self.config.data.noise_draws
        t, noise = draw_noise(
            self.flow,
            tuple(batch.latents.shape[1:]),
            seed=self.config.seed,
            first=batch.position,
            num=len(batch.sample_ids),
            draws=draws,
        )
        t_routing = t
        if deviation := self.config.routing.t_jitter:
            t_routing = jitter(
                t, deviation, seed=self.config.seed, first=batch.position, draws=draws
            )
        t, t_routing, noise = (each.to(batch.latents.device) for each in (t, t_routing, noise))
        x0 = batch.latents.repeat_interleave(draws, dim=0)  # [B*K, C, h, w]
        caption = batch.caption.repeat_interleave(draws)  # [B*K]
        x_t = self.flow.interpolate(x0, noise, t)  # [B*K, C, h, w]
        prediction = self.model(x_t, t, batch.hidden, batch.offsets, caption, t_routing)
        return self.flow.loss(prediction, x0, noise, t).mean(), t_routing

    def validate(self) -> dict[str, Any]:
        """The loss on what is never trained on, as metrics; its time is not the steps'."""
        assert self.validation is not None
        with self.window.paused():
            losses = self.validation.measure(self.model, self.flow, self.accelerator)
        return {"validation_loss": math.fsum(losses) / len(losses), "validation_by_t": losses}

    @torch.no_grad()
    def log(
        self,
        seen: tuple[Tensor, Any],
        stream: PackedLoader,
        progress: tqdm,
        measured: dict[str, Any],
    ) -> None:
        """A line of metrics: to the file, the tracker and the progress bar; now and then the
        weights of layers to a file of their own."""
        self.put_router_together()
        alpha, weights = self.dit.router.alpha(*seen), self.weights(seen[1])
        if isinstance(self.dit, FSDPModule):
            self.dit.reshard()
        line = {
            "step": self.step,
            **self.window.summary(stream),
            "lr": self.schedules[0].get_last_lr()[0],
            "routing_entropy": entropy(alpha).mean().item(),
            **measured,
        }
        self.window = Window()
        self.window.start(stream)
        if not self.accelerator.is_main_process:
            return
        if (warning := stream.warning()) is not None:
            progress.write(warning, file=sys.stderr)
        add_line(self.path, METRICS, line)
        if weights is not None:
            add_line(self.path, WEIGHTS, weights)
        numbers = {k: v for k, v in line.items() if k not in ("step", "validation_by_t")}
        for number, loss in enumerate(line.get("validation_by_t", [])):
            low, high = (place / len(line["validation_by_t"]) for place in (number, number + 1))
            numbers[f"validation_loss/t {low:.3g} to {high:.3g}"] = loss
        self.accelerator.log(numbers, step=self.step)
        progress.set_postfix(
            {
                "loss": f"{line['loss']:.4g}",
                "samples/s": f"{line['samples_per_second']:.3g}",
                "data wait": f"{line['data_wait_share']:.0%}",
                "routing entropy": f"{line['routing_entropy']:.3f}",
            }
        )

    def weights(self, hidden: Any) -> dict[str, Any] | None:
        """The weights of layers as they are now, where they are learned; about 200 times a run.

        Args:
            hidden: [R, L, H], tokens to take the mean over where each weighs for itself.
        """
        config, router = self.config, self.dit.router
        gap = config.log_every * math.ceil(config.steps / 200 / config.log_every)
        due = self.step % gap == 0 or self.step == config.steps
        if not (due and self.dit.router_parameters()):
            return None
        levels = HISTORY_T if router.depends_on_t else [1.0]
        alpha = router.alpha(torch.tensor(levels, device=self.accelerator.device), hidden)
        rounded = [[[round(w, 6) for w in row] for row in rows] for rows in alpha.tolist()]
        return {"step": self.step, "t": levels, "weights": rounded}

    def save(self) -> None:
        """Write a checkpoint; the main process writes, the others wait."""
        main = self.accelerator.is_main_process
        model, ema = gather(self.dit.state_dict(), main), gather(self.ema, main)
        optimizer = gather(optimizer_tensors(self.dit, self.plain_optimizers), main)
        if main:
            save_checkpoint(
                self.path,
                self.step,
                model=model,
                ema=ema,
                optimizer=optimizer,
                state={"window": {"losses": self.window.losses, "norms": self.window.norms}},
                keep=self.config.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

    def put_router_together(self) -> None:
        """FSDP2 has it whole in ``forward`` alone, and again up to the end of a backward pass."""
        if isinstance(self.dit, FSDPModule):
            self.dit.unshard()

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average; its decay rises as (1 + n) / (10 + n), so that the average of a short
        run is not its initial weights."""
        n = self.step // self.config.ema.every
        decay = min(self.config.ema.decay, (1 + n) / (10 + n))
        for name, parameter in self.dit.named_parameters():
            self.ema[name].lerp_(parameter.float(), 1 - decay)

    def _start_tracker(self) -> None:
        config, name = self.config, self.config.tracker
        if name == "none":
            return
        if name == "tensorboard":
            # Steps that a stopped run had logged beyond its checkpoint are taken back.
            purge = {name: {"purge_step": self.step + 1}}
            self.accelerator.init_trackers(name, init_kwargs=purge)
            return
        # Trackers want numbers, strings and nothing else.
        said = {k: v if isinstance(v, (int, float)) else str(v) for k, v in flat(config).items()}
        options = {"wandb": {"name": self.path.name, "dir": config.output}}
        self.accelerator.init_trackers(
            "semroute", config=said, init_kwargs={name: options.get(name, {})}
        )

    def _stop(self, progress: tqdm) -> None:
        message = (
            f"Stopped after step {self.step} of {self.config.steps}; a checkpoint is in "
            f"{self.path}. Run the same command to continue."
        )
        if self.accelerator.is_main_process:
            progress.write(message, file=sys.stderr)
        self.accelerator.end_training()
        raise TrainingInterrupted(message)

    def _not_finite(self, own: float, total: float, norm: float, sample_ids: list[str]) -> str:
        last = latest_checkpoint(self.path)
        where = f"samples of this rank: {', '.join(sample_ids)}"
        if math.isfinite(own) and not math.isfinite(total):
            where = "the samples are another rank's, which names them"
        return (
            f"step {self.step + 1}: loss {total}, gradient norm {norm}; {where}. Look at these "
            "samples and at the learning rates. The last checkpoint is "
            f"{last.path if last else 'not written yet'}."
        )


# --------------------------------------------------------------------------------- parts of a run


@dataclass
class Window:
    """What has happened since the last line of metrics."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def start(self, stream: PackedLoader) -> None:
        """Start the clocks. Steps of before a restart count for the means, but not for speed."""
        self._began, self._waited = time.perf_counter(), stream.wait_seconds
        self._untimed = len(self.losses)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not counted."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def add(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def summary(self, stream: PackedLoader) -> dict[str, float]:
        """Means and speed."""
        seconds = time.perf_counter() - self._began
        samples = (len(self.losses) - self._untimed) * stream.data.batch_size
        return {
            "loss": math.fsum(self.losses) / len(self.losses),
            "grad_norm": math.fsum(self.norms) / len(self.norms),
            "samples_per_second": samples / seconds,
            "data_wait_share": (stream.wait_seconds - self._waited) / seconds,
        }
