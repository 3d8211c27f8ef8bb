"""Training of a run, from its configuration to its last checkpoint."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

from tqdm.auto import tqdm

from ...pipeline.store.lock import locked
from ...schemas import InputError, TrainConfig
from ...schemas.escaping import shown
from ...schemas.verbosity import speaks
from ..adapters.paths import make_path
from ..data.batch import Batch
from ..data.loader import PackedLoader
from ..runs.checkpoint import Checkpoint, latest_checkpoint, remove_leftovers, set_aside
from ..runs.metrics import trim_metrics
from ..runs.record import tracker_id, write_llm_weights, write_record
from ..runs.start import start_from
from ..runs.threads import describe_threads
from .accelerator import make_accelerator, timeout_of
from .agreement import From, check_shared, prepare_together
from .position import publishing
from .previews import open_previews
from .ranks import joined
from .setup import Opening, Setup, make_loader
from .trainer import Trainer, TrainingInterrupted


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    resume_from: From = "newest",
    opening: Opening | None = None,
) -> Path:
    """Train a run, or resume it, and return its directory.

    If the output directory has a ``run.json``, the run is resumed from its newest checkpoint, bit
    for bit on the same machine; ``steps`` may have grown.

    Args:
        progress: show a progress bar.
        resume_from: if the newest checkpoint is damaged, ``previous`` sets it aside and resumes
            from the newest whole one.
        opening: the stores of the configuration, where another thread opens them already.

    Raises:
        InputError: raised before any work: a store is unfinished or not the one that the run
            started with, the configuration is not the run's, or parts do not fit together; the
            newest checkpoint is damaged; ranks do not find the same; another process trains this
            run. Later: another rank has stopped.
        FloatingPointError: the loss or gradient is not finite; with the sample ids of the batch.
        TrainingInterrupted: stopped by SIGTERM or Ctrl-C, after writing a checkpoint.
    """
    accelerator = make_accelerator(config)
    main, path = accelerator.is_main_process, Path(config.output)
    with joined(accelerator, timeout_of(config), TrainingInterrupted) as ranks:
        setup, damaged = prepare_together(
            ranks, config, resume_from, _report if main else lambda _line: None, opening
        )
        record = setup.record
        if setup.start is not None:
            start_from(setup.model, record, setup.start)
        previews = None
        if config.sampling.every is not None:
            previews = open_previews(setup, accelerator.device)
        loader = make_loader(
            setup,
            rank=ranks.rank,
            num_ranks=ranks.num,
            codes=accelerator.device.type != "cpu"
            and any(pair.features.codec.matrices for pair in setup.pairs),
        )
        with locked(path, _report) if main else nullcontext() as lock:
            check_shared(ranks, path)
            if main:
                on_cpu = accelerator.device.type == "cpu"
                _begin(path, setup, damaged, loader, progress, on_cpu)
            ranks.wait()
            done = loader.start_step >= config.steps
            # Reading begins before there are optimizers, whose first one takes torch seconds.
            reading: AbstractContextManager[Iterator[Batch]] = nullcontext(iter(()))
            with reading if done else closing(iter(loader)) as read:
                trainer = Trainer(
                    config,
                    accelerator,
                    setup.model,
                    setup.checkpoint,
                    setup.validation,
                    make_path(record.config.flow, record.pretrained),
                    previews,
                    tracker_id(record),
                    ranks,
                )
                position = publishing(record.config, loader, lambda: trainer.step)
                with position if main else nullcontext():
                    if not done:
                        trainer.fit(loader, read, progress, lock)
            ranks.wait()
            accelerator.end_training()
    return path


def _begin(
    path: Path,
    setup: Setup,
    damaged: Sequence[Checkpoint],
    loader: PackedLoader,
    progress: bool,
    on_cpu: bool,
) -> None:
    """Write what is to be in the run directory before the first step, and say what is to be known
    of the run."""
    _check_unchanged(path, next(iter(damaged), setup.checkpoint))
    for checkpoint in damaged:
        _report(f"{checkpoint.path} is now {set_aside(checkpoint).name}")
    remove_leftovers(path)
    record = setup.record
    if setup.llm_weights is not None:
        record = write_llm_weights(path, record, setup.llm_weights)
    write_record(path, record)
    trim_metrics(path, loader.start_step)
    for line in describe_threads(setup.record) if progress and on_cpu else []:
        _report(line)
    if progress and (len(loader.pairs) > 1 or loader.pairs[0].selection):
        for pair in loader.pairs:
            _report(pair.summary())


def _report(line: str) -> None:
    if speaks() != "quiet" or line.startswith("warning"):
        tqdm.write(shown(line), file=sys.stderr)


def _check_unchanged(path: Path, checkpoint: Checkpoint | None) -> None:
    """Refuse to resume if another process has trained the run since setup read the checkpoint."""
    newest = latest_checkpoint(path)
    before, now = (None if each is None else each.step for each in (checkpoint, newest))
    if before != now:
        raise InputError(
            f"another process has meanwhile trained {path} to step {now}: rerun the same command"
        )
