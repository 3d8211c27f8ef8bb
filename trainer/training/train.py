"""Training of a run, from its configuration to its last checkpoint."""

import sys
from contextlib import nullcontext
from pathlib import Path

from tqdm.auto import tqdm

from ...pipeline.store.lock import locked
from ...schemas import InputError, TrainConfig
from ...schemas.escaping import shown
from ...schemas.verbosity import speaks
from ..adapters.paths import make_path
from ..runs.checkpoint import Checkpoint, latest_checkpoint
from ..runs.metrics import trim_metrics
from ..runs.record import tracker_id, write_record
from ..runs.start import start_from
from .accelerator import make_accelerator
from .position import followed_stores, publishing
from .previews import open_previews
from .setup import make_loader, prepare
from .threads import describe_threads
from .trainer import Trainer


def train(config: TrainConfig, *, progress: bool = True) -> Path:
    """Train a run, or resume it, and return its directory.

    If the output directory has a ``run.json``, the run is resumed from its newest checkpoint, bit
    for bit on the same machine; ``steps`` may have grown.

    Args:
        progress: show a progress bar.

    Raises:
        InputError: raised before any work: a store is unfinished or not the one that the run
            started with, the configuration is not the run's, or parts do not fit together. Also if
            another process trains this run.
        FloatingPointError: the loss or gradient is not finite; with the sample ids of the batch.
        TrainingInterrupted: stopped by SIGTERM or Ctrl-C, after writing a checkpoint.
    """
    setup = prepare(config)
    model, record, path = setup.model, setup.record, Path(config.output)
    if setup.start is not None:
        start_from(model, record, setup.start)
    accelerator = make_accelerator(config)
    previews = None
    if config.sampling.every is not None:
        previews = open_previews(setup, accelerator.device)
    loader = make_loader(
        setup,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        codes=accelerator.device.type != "cpu"
        and any(pair.features.codec.matrices for pair in setup.pairs),
    )
    # All ranks have read the directory before one of them writes to it.
    accelerator.wait_for_everyone()
    main = accelerator.is_main_process
    with locked(path, _report) if main else nullcontext() as lock:
        if main:
            _check_unchanged(path, setup.checkpoint)
            write_record(path, record)
            trim_metrics(path, loader.start_step)
            if progress and accelerator.device.type == "cpu":
                for line in describe_threads(record):
                    _report(line)
            if progress and (len(loader.pairs) > 1 or loader.pairs[0].selection):
                for pair in loader.pairs:
                    _report(pair.summary())
        trainer = Trainer(
            config,
            accelerator,
            model,
            setup.checkpoint,
            setup.validation,
            make_path(record.config.flow, record.pretrained),
            previews,
            tracker_id(record),
        )
        followed = followed_stores(setup.pairs)
        with publishing(
            record.config,
            followed if main else [],
            lambda: trainer.step,
            lambda: loader.wait_seconds,
        ):
            if trainer.step < config.steps:
                trainer.fit(loader, progress, lock)
        accelerator.end_training()
    return path


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
