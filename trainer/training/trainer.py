"""The training loop: two stores in, a run directory with routing weights and a DiT out.

The samples of a step, their t and noise are functions of (seed, position), and learning rates are a
function of the step. So a run resumes from tensors and a step number alone, and ends in the same
bits as one that was never stopped.

Shapes: B batch (of one rank and accumulation step), K noise draws, C channels.
"""

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from ...pipeline.store.lock import Lock, LockedError
from ...schemas import CheckpointState, TrainConfig, WindowState
from ..data.batch import Batch, on_device
from ..diffusion.ddpm import Ddpm
from ..diffusion.flow import Flow
from ..diffusion.noise import draw_noise, jitter
from ..model.router import entropy
from ..runs.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    read_like,
)
from ..runs.record import is_empty, learning, load_trained, trained_weights
from .accelerator import place_network, prepare_model, stop_signals
from .metrics import Window, log_metrics, routing_weights, start_tracker
from .optimizers import make_optimizers, make_schedule
from .ranks import Ranks
from .saver import Saver

if TYPE_CHECKING:
    from ..data.loader import PackedLoader
    from ..runs.record import Network
    from .validation import Validation


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the run after a complete step, and its checkpoint is written."""


class Trainer:
    """One run in memory: the network, its optimizers and average, and how to take a step.

    Args:
        checkpoint: where to resume. None: start from the weights of ``model``.
        validation: measures the run on held-out samples.
        flow: the path that a pretrained network was trained on; by default that of the
            configuration.
        ranks: those that train this run; by default this process alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: "Network",
        checkpoint: Checkpoint | None = None,
        validation: "Validation | None" = None,
        flow: "Flow | Ddpm | None" = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.validation = validation
        self.accelerator = accelerator
        self.path = Path(config.output)
        self.flow = Flow.from_config(config.flow) if flow is None else flow
        self.step = 0 if checkpoint is None else checkpoint.step
        if checkpoint is not None and not is_empty(model):
            load_trained(model, checkpoint.model())
        self.network = model.train()
        place_network(accelerator, self.ranks, self.network)
        self.network.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            self.network.compile_blocks()
        self.plain_optimizers = make_optimizers(self.network, config.optimizer)
        # The loader is not prepared, since it knows its rank; nor are the schedules, which
        # Accelerate would advance once per rank.
        self.model, self.optimizers = prepare_model(
            accelerator, self.network, *self.plain_optimizers
        )
        if checkpoint is not None:
            reader = checkpoint.open("optimizer")
            load_optimizer_tensors(self.network, self.plain_optimizers, reader)
        self.schedules = [make_schedule(o, config, self.step) for o in self.plain_optimizers]
        self.ema = self._open_average(checkpoint)
        self.window = Window()
        if checkpoint is not None:
            window = checkpoint.state().window
            self.window = Window(window.losses, window.norms)
        self.saver = Saver(self.path, self.ranks, config.keep_checkpoints, self.step)

    def _open_average(self, checkpoint: Checkpoint | None) -> dict[str, Tensor]:
        """The moving average: that of a checkpoint, or the weights themselves."""
        parameters = {name: each.detach() for name, each in learning(self.network)}
        average = parameters
        if checkpoint is not None:
            reader = checkpoint.open("ema")
            average = {name: read_like(reader, name, each) for name, each in parameters.items()}
        device = self.accelerator.device
        return {name: each.to(device, torch.float32, copy=True) for name, each in average.items()}

    def fit(self, loader: "PackedLoader", show: bool, lock: Lock | None = None) -> None:
        """Take all remaining steps; log, validate and save as often as configured.

        Args:
            show: show a progress bar.
            lock: lock of the run directory, if this process holds it.

        Raises:
            LockedError: another process has taken over the run directory.
            FloatingPointError: the loss or gradient is not finite.
            TrainingInterrupted: a signal stopped the run.
        """
        config = self.config
        start_tracker(self.accelerator, config, self.step)
        progress = tqdm(
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=not (show and self.accelerator.is_main_process),
        )
        self.window.start(loader)
        with progress, closing(iter(loader)) as read, stop_signals() as stop:
            batches = self._all_ready(on_device(read, self.accelerator.device))
            try:
                self._take_steps(batches, loader, lock, stop, progress)
            except Exception:
                if self.ranks.num == 1:  # others would have to wait for this one
                    with suppress(OSError):
                        self.saver.wait()
                raise

    def _take_steps(
        self,
        batches: Iterator[Batch],
        loader: "PackedLoader",
        lock: Lock | None,
        stop: threading.Event,
        progress: tqdm,
    ) -> None:
        config, every = self.config, self.config.validation.every
        while self.step < config.steps:
            if lock is not None and lock.lost:
                raise LockedError(
                    f"another process took over {self.path} because this one seemed dead"
                )
            self.saver.check()
            routing_inputs, stopping = self.take_step(batches, stop.is_set())
            progress.update()
            last = self.step == config.steps
            validating = self.validation is not None and (self.step % every == 0 or last)
            if self.step % config.log_every == 0 or validating or last:
                measured = self.validate() if validating else {}
                self.log(routing_inputs, loader, progress, measured)
            if stopping or last or self.step % config.checkpoint_every == 0:
                self.save()
            if stopping and not last:
                self.saver.wait()
                self._stop(progress)
        self.saver.wait()

    def _all_ready(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, from when all ranks have their first: the order of an epoch takes long."""
        first = next(batches)
        self.ranks.wait()
        yield first
        yield from batches

    def take_step(self, batches: Iterator[Batch], stop: bool) -> tuple[tuple[Tensor, Any], bool]:
        """Take one step of the optimizers, over all accumulation steps.

        Args:
            batches: on the device.
            stop: whether this rank was asked to stop.

        Returns:
            What routing read last, t [B*K] and hidden states [R, L, H]; and whether any rank was
            asked to stop.
        """
        config, accelerator = self.config, self.accelerator
        # Read once per step: reading a number waits until the device has finished its work.
        own_loss, sample_ids = torch.zeros((), device=accelerator.device), []
        for _ in range(config.grad_accum_steps):
            batch = next(batches)
            sample_ids += batch.names()
            with accelerator.accumulate(self.model):
                loss, t = self.loss(batch)
                self._unshard()
                accelerator.backward(loss + self.network.router.penalty(t))
            own_loss += loss.detach() / config.grad_accum_steps
        parameters = self.network.parameters()
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
        inputs = (x_t, t, batch.hidden, batch.offsets, caption, t_routing)
        extra = {} if batch.conditioning is None else {"conditioning": batch.conditioning}
        prediction = self.model(*inputs, **extra)
        return self.flow.loss(prediction, x0, noise, t).mean(), t_routing

    def validate(self) -> dict[str, Any]:
        """The loss on held-out samples, as metrics; its time does not count for the speed."""
        assert self.validation is not None
        with self.window.paused():
            losses = self.validation.measure(
                self.model, self.flow, self.accelerator, self.ranks.wait
            )
        return {"validation_loss": math.fsum(losses) / len(losses), "validation_by_t": losses}

    @torch.no_grad()
    def log(
        self,
        routing_inputs: tuple[Tensor, Any],
        loader: "PackedLoader",
        progress: tqdm,
        measured: dict[str, Any],
    ) -> None:
        """Log metrics since the last call, and now and then the routing weights.

        Args:
            routing_inputs: what routing read last, t [B*K] and hidden states [R, L, H].
            measured: metrics of validation.
        """
        self._unshard()
        alpha = self.network.router.alpha(*routing_inputs)
        weights = routing_weights(self.network, self.config, self.step, routing_inputs[1])
        if isinstance(self.network, FSDPModule):
            self.network.reshard()
        line = {
            "step": self.step,
            **self.window.summary(loader),
            "lr": self.schedules[0].get_last_lr()[0],
            "routing_entropy": entropy(alpha).mean().item(),
            **measured,
        }
        self.window = Window()
        self.window.start(loader)
        if not self.accelerator.is_main_process:
            return
        if (warning := loader.warning()) is not None:
            progress.write(warning, file=sys.stderr)
        log_metrics(self.accelerator, self.config, line, weights, progress)

    def save(self) -> None:
        """Copy the state, and begin to write it as a checkpoint; see :class:`.Saver`."""
        window = WindowState(losses=[*self.window.losses], norms=[*self.window.norms])
        self.saver.save(
            CheckpointState(step=self.step, window=window, num_ranks=self.ranks.num),
            {
                "model": trained_weights(self.network),
                "ema": self.ema,
                "optimizer": optimizer_tensors(self.network, self.plain_optimizers),
            },
        )

    def _unshard(self) -> None:
        """Make the router whole outside ``forward``, where FSDP2 has its parameters sharded.

        They are sharded again at the end of the next backward pass.
        """
        if isinstance(self.network, FSDPModule):
            self.network.unshard()

    @torch.no_grad()
    def _average(self) -> None:
        """Update the moving average. Its decay rises as (1 + n) / (10 + n), so that initial weights
        do not dominate the average of a short run."""
        n = self.step // self.config.ema.every
        decay = min(self.config.ema.decay, (1 + n) / (10 + n))
        for name, parameter in learning(self.network):
            self.ema[name].lerp_(parameter.float(), 1 - decay)

    def _stop(self, progress: tqdm) -> None:
        message = (
            f"Stopped after step {self.step} of {self.config.steps}; a checkpoint is in "
            f"{self.path}. Rerun the same command to resume."
        )
        if self.accelerator.is_main_process:
            progress.write(message, file=sys.stderr)
        self.accelerator.end_training()
        raise TrainingInterrupted(message)

    def _not_finite(self, own: float, total: float, norm: float, sample_ids: list[str]) -> str:
        self.saver.wait()
        last = latest_checkpoint(self.path)
        where = f"samples of this rank: {', '.join(sample_ids)}"
        if math.isfinite(own) and not math.isfinite(total):
            where = "the samples are on another rank, which names them"
        return (
            f"step {self.step + 1}: loss {total}, gradient norm {norm}; {where}. Check these "
            "samples and the learning rates. Last checkpoint: "
            f"{last.path if last else 'none yet'}."
        )
