"""Feature stores that a run can read."""

import math
from collections.abc import Set
from typing import TYPE_CHECKING

from ...schemas import (
    SAME_WEIGHTS,
    FeatureIdentity,
    InputError,
    Mixes,
    differences,
    refuse_differences,
)

if TYPE_CHECKING:
    from .run import Run

# Keys of an identity that may differ: other captions are the point of sampling.
_CAPTIONS = {"captions", "samples", "max_length"}
_LAYERS = {"layers", "final_norm", "mixes"}


def check_features(run: "Run", identity: FeatureIdentity) -> None:
    """Refuse features that a run cannot read; see :meth:`.run.Run.check_features`."""
    if identity.mixes is not None:
        check_llm(run, identity)
        _check_mixes(run, identity.mixes)
    elif run.record.features.mixes is not None:
        raise InputError(
            f"{run.path} was trained on mixes of layers, but these features hold layers: mix "
            f"them with semroute rewrite --routing {run.path}"
        )
    else:
        check_identity(f"{run.path} was", run.record.features, identity)


def check_llm(run: "Run", identity: FeatureIdentity) -> None:
    """Refuse features of another LLM, template or dtype; the layers may be others.

    Raises:
        InputError: with every key that differs, and both values.
    """
    check_identity(f"{run.path} was", run.record.features, identity, _CAPTIONS | _LAYERS)


def check_planned(arm: str, own: FeatureIdentity, identity: FeatureIdentity) -> None:
    """Refuse features that the runs of an arm could not be scored on, before they are trained.

    Mixes are compared with the weights of a run when it has some.

    Raises:
        InputError: with every key that differs, and both values.
    """
    mixed = own.mixes is not None or identity.mixes is not None
    check_identity(f"arm {arm} is", own, identity, _CAPTIONS | _LAYERS if mixed else _CAPTIONS)


def check_identity(
    run: str, own: FeatureIdentity, identity: FeatureIdentity, free: Set[str] = _CAPTIONS
) -> None:
    """Refuse features whose identity differs from that of a run's own.

    Args:
        run: its name and a verb, for the message.
        free: keys that may differ; by default those of the captions.

    Raises:
        InputError: with every key that differs, and both values.
    """
    refuse_differences(
        differences(
            identity.model_dump(mode="json", exclude={*free}),
            own.model_dump(mode="json", exclude={*free}),
        ),
        f"{run} trained on other features; those given, against its own",
        "Extract the captions with the run's model and options.",
    )


def _check_mixes(run: "Run", mixes: Mixes) -> None:
    """Refuse mixes whose weights are not the run's."""
    own = run.routing()
    distance = mixes.distance(own.layers, own.weights)
    if distance <= SAME_WEIGHTS:
        return
    keys = {"strategy", "step", "source", "layers"}
    different = differences(mixes.model_dump(include=keys), own.model_dump(include=keys))
    apart = f"up to {distance:.1e} apart"
    if math.isinf(distance):
        apart = (
            f"{len(mixes.weights)} blocks over {len(mixes.layers)} layers instead of "
            f"{len(own.weights)} over {len(own.layers)}"
        )
    refuse_differences(
        [*(f"mixes.{difference}" for difference in different), f"mixes.weights: {apart}"],
        f"the features are mixes for another run, or for other weights of {run.path}; those "
        "given, against its own",
        f"Rewrite the features with --routing {run.path}, or give features with all layers.",
    )
