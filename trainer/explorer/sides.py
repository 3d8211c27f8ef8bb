"""What is explored: one store or run, or two side by side."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.store.features import FeatureStore
from ...pipeline.store.open import open_features
from ...schemas import InputError
from ...schemas.files import is_local, locate
from .features import NUM_SAMPLE, FeaturesView

if TYPE_CHECKING:
    from ..runs.run import Run
    from .runs import RunView
    from .widget import Explorer

RUN = "run.json"
"""File by which the folder of a run is known."""


class Side:
    """A store, or a run with the features that it reads.

    Attributes:
        features: None where those of a run are not here.
        run: None for a store.
    """

    def __init__(self, features: FeaturesView | None, run: "RunView | None") -> None:
        self.features = features
        self.run = run
        views = [view for view in (features, run) if view is not None]
        self._answers: dict[str, Callable[..., dict[str, Any]]] = {
            name: getattr(view, name) for view in views for name in _QUESTIONS[type(view).__name__]
        }

    def facts(self) -> dict[str, Any]:
        """What the widget has to know before it asks."""
        views = {"features": self.features, "run": self.run}
        return {name: None if view is None else view.facts() for name, view in views.items()}

    def answer(self, question: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a question of the widget.

        Raises:
            InputError: no such question, or one that has no answer here.
        """
        if question not in self._answers:
            raise InputError(f"nothing here answers {question!r}")
        return self._answers[question](**arguments)


_QUESTIONS = {
    "FeaturesView": ("search", "find", "caption", "nearest", "similarity"),
    "RunView": ("weights", "reads", "samples"),
}


def explore(
    source: "FeatureStore | Run | str | os.PathLike[str]",
    other: "FeatureStore | Run | str | os.PathLike[str] | None" = None,
    *,
    features: "FeatureStore | str | os.PathLike[str] | None" = None,
    tokenizer: str | None = None,
    sample: int = NUM_SAMPLE,
) -> "Explorer":
    """Show feature stores and runs in Jupyter: captions, layers, and what blocks read.

    Of a store: a search over its captions; of a caption its tokens by layers and its nearest
    captions; and how similar layers are. Of a run also its weights, what a block reads of the
    caption, and generated images.

    Args:
        source: a feature store or a run, or the path of one.
        other: another, shown beside it; a caption is chosen in both.
        features: features for runs. Default: those that each was trained on.
        tokenizer: folder, GGUF file or Hub id of the LLM, whose tokenizer gives tokens their text.
            Default: tokens are numbered.
        sample: number of captions among which the nearest ones are found. They are read when they
            are first asked for, and held as 4 bytes per layer and channel.

    Raises:
        InputError: anywidget is not installed, no store or run there, or another tokenizer.
    """
    try:
        from .widget import Explorer
    except ImportError as error:
        raise InputError(
            f"the explorer needs anywidget ({error}): pip install 'semroute[notebook]'"
        ) from error
    if sample < 1:
        raise InputError(f"sample is {sample}; expected at least 1")
    how: dict[str, Any] = {"tokenizer": tokenizer, "sample": sample}
    sources = [source] if other is None else [source, other]
    return Explorer([_open_side(each, features, how) for each in sources])


def _open_side(source: Any, features: Any, how: Mapping[str, Any]) -> Side:
    if isinstance(source, (str, os.PathLike)):
        place = locate(source)
        if is_local(place) and (place / RUN).is_file():
            from ..runs.run import load_run

            source = load_run(place)
        else:
            source = open_features(source)
    if isinstance(source, FeatureStore):
        return Side(FeaturesView(source, **how), None)
    from ..runs.run import Run
    from .runs import RunView

    if not isinstance(source, Run):
        raise InputError(
            f"found {type(source).__name__}; expected a feature store, a run, or the path of one"
        )
    if features is None:
        trained = source.record.config.features
        view = FeaturesView(open_features(trained), **how) if _is_there(trained) else None
    else:
        store = features if isinstance(features, FeatureStore) else open_features(features)
        view = FeaturesView(store, **how)
    return Side(view, RunView(source, view))


def _is_there(place: str) -> bool:
    """Whether a folder that a run names is here."""
    located = locate(place)
    return not is_local(located) or Path(located).is_dir()
