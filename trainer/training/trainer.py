"""The training loop: two stores in, a run directory with routing weights and a DiT out.

The samples of a step, their t and noise are functions of (seed, position), and learning rates are a
function of the step. So a run resumes from tensors and a step number alone, and ends in the same
bits as one that was never stopped.

Shapes: B batch (of one rank and accumulation step), K noise draws, C channels.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ...pipeline.store.lock import Lock, LockedError
from ...schemas import CheckpointState, InputError, TrainConfig, WindowState
from ...schemas.interrupts import WaitEndedError
from ...schemas.verbosity import progress_bar
from ..data.batch import Batch, on_device
from ..diffusion.ddpm import Ddpm
from ..diffusion.flow import Flow
from ..model.router import entropy
from ..runs.checkpoint import (
    Checkpoint,
    is_sharded,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    read_like,
)
from ..runs.metrics import refuse_gone
from ..runs.record import is_empty, learning, load_trained, trained_weights
from .accelerator import has_shards, place_network, prepare_model, stop_signals
from .metrics import Window, log_metrics, routing_weights, start_tracker
from .optimizers import make_optimizers, make_schedule
from .previews import Forwarding, Previews
from .ranks import Ranks
from .saver import Saver
from .throughput import count_flops, device_peak_flops, peak_memory_bytes

if TYPE_CHECKING:
    from ..data.loader import PackedLoader
    from ..runs.record import Network
    from .validation import Validation


def whole(*numbers: Tensor) -> Tensor:
    """Scalars, put together under FSDP2, in fp32: [n]."""
    full = (each.full_tensor() if is_sharded(each) else each for each in numbers)
    return torch.stack([each.float() for each in full])


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the run after a complete step, and its checkpoint is written."""


class Trainer:
    """One run in memory: the network, its optimizers and average, and how to take a step.

    Args:
        checkpoint: where to resume. None: start from the weights of ``model``.
        validation: measures the run on held-out samples.
        flow: the path that a pretrained network was trained on; by default that of the
            configuration.
        previews: images while it trains.
        run_id: by which trackers know the run.
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
        previews: Previews | None = None,
        run_id: str = "0" * 32,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.validation = validation
        self.previews = previews
        self.run_id = run_id
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
        self.step_numbers: dict[str, float] = {}
        self._flops: int | None = None
        self._peak_flops = None
        if not has_shards(self.network):
            self._peak_flops = device_peak_flops(accelerator.device, config.mixed_precision)
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

    def fit(
        self,
        loader: "PackedLoader",
        read: Iterator[Batch],
        show: bool,
        lock: Lock | None = None,
    ) -> None:
        """Take all remaining steps; log, validate and save as often as configured.

        Args:
            read: batches of the loader, from the next step on.
            show: show a progress bar.
            lock: lock of the run directory, if this process holds it.

        Raises:
            LockedError: another process has taken over the run directory.
            InputError: that is gone, or a store has changed.
            FloatingPointError: the loss or gradient is not finite.
            TrainingInterrupted: a signal stopped the run.
        """
        config = self.config
        start_tracker(self.accelerator, config, self.step, self.run_id)
        progress = progress_bar(
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=not (show and self.accelerator.is_main_process),
        )
        self.window.start(loader)
        with progress, stop_signals(loader.stop):
            batches = self._all_ready(on_device(read, self.accelerator.device))
            try:
                self._take_steps(batches, loader, lock, progress)
            except Exception:
                if self.ranks.num == 1:  # others would have to wait for this one
                    with suppress(OSError, InputError):
                        self.saver.wait()
                raise

    def _take_steps(
        self,
        batches: Iterator[Batch],
        loader: "PackedLoader",
        lock: Lock | None,
        progress: tqdm,
    ) -> None:
        config = self.config
        while self.step < config.steps:
            if lock is not None and lock.lost:
                refuse_gone(self.path)
                raise LockedError(
                    f"another process took over {self.path} because this one seemed dead"
                )
            self.saver.check()
            try:
                routing_inputs, stopping = self.take_step(batches, loader.stop.is_set())
            except WaitEndedError:
                self._stop_waiting(progress)
            progress.update()
            if self._logs(self.step):
                measured = self.validate() if self._validates(self.step) else {}
                if self._previews(self.step):
                    measured |= self.preview()
                self.log(routing_inputs, loader, progress, measured)
            last = self.step == config.steps
            if stopping or last or self.step % config.checkpoint_every == 0:
                self.save()
            if stopping and not last:
                self._stop(progress)
        self.saver.wait()

    def _all_ready(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, from when all ranks have their first: the order of an epoch takes long."""
        first = next(batches)
        self.ranks.wait()
        yield first
        yield from batches

    def _validates(self, step: int) -> bool:
        """Whether the loss on held-out samples is measured after a step."""
        due = step % self.config.validation.every == 0 or step == self.config.steps
        return self.validation is not None and due

    def _previews(self, step: int) -> bool:
        """Whether images are generated after a step."""
        every = self.config.sampling.every
        due = every is not None and (step % every == 0 or step == self.config.steps)
        return self.previews is not None and due

    def _logs(self, step: int) -> bool:
        """Whether a line of metrics is written after a step."""
        due = step % self.config.log_every == 0 or step == self.config.steps
        return due or self._validates(step) or self._previews(step)

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
        by_group = self._group_norms() if self._logs(self.step + 1) else {}
        total_norm = accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        report = torch.stack([own_loss, torch.full_like(own_loss, stop)])
        numbers = whole(total_norm, *by_group.values())
        report = torch.cat([accelerator.reduce(report, "mean"), numbers])
        total_loss, stopping, norm, *norms = report.tolist()
        if not (math.isfinite(total_loss) and math.isfinite(norm)):
            raise FloatingPointError(
                self._not_finite(own_loss.item(), total_loss, norm, sample_ids)
            )
        self.step_numbers = {
            "lr": float(self.schedules[0].get_last_lr()[0]),
            **dict(zip(by_group, norms, strict=True)),
        }
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.step += 1
        if self.step % config.ema.every == 0:
            self._average()
        images = config.data.batch_size * config.data.noise_draws
        self.window.add(total_loss, norm, images * self.network.num_tokens(batch.latents.shape))
        if self._peak_flops is not None and self._flops is None:
            draws = config.data.noise_draws
            self._flops = config.grad_accum_steps * count_flops(self.network, batch, draws)
        return (t, batch.hidden), stopping > 0

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, each sample under K draws of t and noise; and the t that routing
        saw."""
        assert batch.draws is not None
        draws, (t, noise, t_routing) = self.config.data.noise_draws, batch.draws.tensors()
        x0 = batch.latents.repeat_interleave(draws, dim=0)  # [B*K, C, h, w]
        caption = batch.caption.repeat_interleave(draws)  # [B*K]
        x_t = self.flow.interpolate(x0, noise, t)  # [B*K, C, h, w]
        inputs = (x_t, t, batch.hidden, batch.offsets, caption, t_routing)
        extra = {} if batch.conditioning is None else {"conditioning": batch.conditioning}
        prediction = self.model(*inputs, **extra)
        losses, weight = self.flow.loss(prediction, x0, noise, t), self.flow.weight(t)  # [B*K]
        return (losses if weight is None else losses * weight).mean(), t_routing

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
        if has_shards(self.network):
            self.network.reshard()
        speed = self.window.summary(loader)
        seconds, fetched = speed.pop("seconds_per_step"), loader.fetched()
        line = {
            "step": self.step,
            **speed,
            **self.step_numbers,
            **({} if fetched is None else fetched.model_dump()),
            "routing_entropy": entropy(alpha).mean().item(),
            "ema_distance": self._ema_distance(),
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            **measured,
        }
        if self._flops is not None and self._peak_flops is not None:
            line["peak_flops_share"] = self._flops / seconds / self._peak_flops
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

    def preview(self) -> dict[str, Any]:
        """Generate images from the moving average; their score, as metrics, if they have one."""
        assert self.previews is not None
        with self.window.paused(), self._averaged():
            model = Forwarding(self.network, self.model)
            score = self.previews.draw(model, self.flow, self.accelerator, self.step)
        return {} if score is None else {"sample_score": score}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The network with its moving average for weights; one tensor at a time is copied."""

        @torch.no_grad()
        def swap() -> None:
            for name, parameter in learning(self.network):
                own = parameter.detach().clone()
                parameter.copy_(self.ema[name])
                self.ema[name].copy_(own)

        swap()
        try:
            yield
        finally:
            swap()

    def _group_norms(self) -> dict[str, Tensor]:
        """Norms of gradients by group, before clipping."""
        router = {id(parameter) for parameter in self.network.router_parameters()}
        matrices = {id(parameter) for parameter in self.network.block_matrices()}
        groups: dict[str, list[Tensor]] = {}
        for _, parameter in learning(self.network):
            if parameter.grad is not None:
                number = id(parameter)
                group = "router" if number in router else "matrices"
                group = group if number in router | matrices else "others"
                groups.setdefault(f"grad_norm_{group}", []).append(parameter.grad)
        return {name: torch.nn.utils.get_total_norm(grads) for name, grads in groups.items()}

    def _ema_distance(self) -> float:
        """|w - average| / |w|, over all that learns."""
        apart, own = [], []
        for name, parameter in learning(self.network):
            apart.append(whole((parameter.float() - self.ema[name]).square().sum()))
            own.append(whole(parameter.float().square().sum()))
        return float((torch.cat(apart).sum() / torch.cat(own).sum()).sqrt())

    def _unshard(self) -> None:
        """Make the router whole outside ``forward``, where FSDP2 has its parameters sharded.

        They are sharded again at the end of the next backward pass.
        """
        if has_shards(self.network):
            self.network.unshard()

    @torch.no_grad()
    def _average(self) -> None:
        """Update the moving average. Its decay rises as (1 + n) / (10 + n), so that initial weights
        do not dominate the average of a short run."""
        n = self.step // self.config.ema.every
        decay = min(self.config.ema.decay, (1 + n) / (10 + n))
        for name, parameter in learning(self.network):
            self.ema[name].lerp_(parameter.float(), 1 - decay)

    def _stop_waiting(self, progress: tqdm) -> NoReturn:
        """Stop while the next step waits for a shard. Other ranks wait for this one, so only a
        single process can save."""
        if self.ranks.num > 1:
            self.ranks.stop(InputError("stopped while it waited for a shard"))
        else:
            self.save()
        self._stop(progress)

    def _stop(self, progress: tqdm) -> NoReturn:
        self.saver.wait()
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
