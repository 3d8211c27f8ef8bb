"""What a study reads, checked before its runs start."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...schemas import FeatureIdentity, InputError
from ..evaluation.shapes import read_captions
from ..runs.compatibility import check_planned

if TYPE_CHECKING:
    from .job import Job


def check_inputs(jobs: "Sequence[Job]") -> None:
    """Refuse missing stores and captions, and such as do not belong together, before any run
    starts."""
    from ...pipeline.store.order.dataset import open_stores

    alike = defaultdict(list)  # most runs read the same
    for job in jobs:
        check_step(job)
        alike[job.config.model_dump_json(include={"features", "latents", "data"})].append(job)
    for group in alike.values():
        pairs = open_stores(group[0].config)
        for pair in pairs:
            pair.features.check_complete()  # a disk budget is for runs that extraction follows
        scored = [(job.scoring, job) for job in group if job.scoring is not None]
        for job in {(each.features, each.samples): job for each, job in scored}.values():
            check_scored(job, pairs[0].features.manifest.identity)


def check_scored(job: "Job", own: FeatureIdentity) -> None:
    """Refuse features to score on that are not of the captions, or that the run cannot read.

    Args:
        own: identity of the features that it trains on.
    """
    from ...pipeline.store.open import open_features

    assert job.scoring is not None
    features = open_features(job.scoring.features)
    features.check_source(job.scoring.samples, read_captions(job.scoring.samples).texts)
    check_planned(job.arm, own, features.manifest.identity)


def check_step(job: "Job") -> None:
    """Refuse a step to score at which the run will have no checkpoint."""
    if job.scoring is None or job.scoring.step is None:
        return
    step, steps, every = job.scoring.step, job.config.steps, job.config.checkpoint_every
    if step != steps and (step > steps or step % every):
        raise InputError(
            f"arm {job.arm} is scored at step {step}, where its runs have no checkpoint: they have "
            f"{steps} steps and a checkpoint every {every}. Choose a multiple of that, or another "
            "checkpoint_every"
        )
    later = -(-steps // every) - step // every  # the last one may be no multiple
    if later >= job.config.keep_checkpoints:
        raise InputError(
            f"arm {job.arm} is scored at step {step}, after which its runs write {later} more "
            f"checkpoints and keep {job.config.keep_checkpoints}: set keep_checkpoints to at least "
            f"{later + 1}"
        )
