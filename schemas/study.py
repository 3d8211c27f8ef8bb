"""What ``study.yaml`` says: which arms are trained, how often, and by what they are judged."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from .configuration import put
from .contract import Contract, parse
from .errors import InputError
from .run import Fraction, Positive, TrainConfig

Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Scoring(Contract):
    """How a run is judged on captions of a world of shapes."""

    features: str
    """Feature store of the captions."""
    samples: str
    """The file that it was extracted from: ``dev.parquet`` or ``test.parquet`` of a world."""
    cfg_scales: Annotated[list[float], Field(min_length=1)]
    cfg_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Lowest and highest t that are guided."""
    images_per_caption: Positive = 1
    num_steps: Positive = 50
    """Of Euler's method."""
    seed: int = 0
    """Of the noise, the same for every run, so that runs are compared picture by picture."""


class Tuning(Contract):
    """A setting that every arm chooses for itself, by the same number of trials on dev captions."""

    key: str = "optimizer.router_lr"
    values: Annotated[list[Any], Field(min_length=2)]
    steps: Positive
    """Of each trial."""
    seeds: Seeds
    """Of the trials; none of the study's own."""
    skill: str = "all"
    """The value whose runs are best in it, on average over seeds and guidance scales, is chosen."""
    scoring: Scoring


class StudyConfig(Contract):
    """Arms x seeds over one pair of stores."""

    output: str
    """Folder of the runs, the results and the report."""
    train: dict[str, Any]
    """What all runs share: a configuration of ``semroute train`` without output and seed."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name -> what differs, as dotted keys: ``{routing.strategy: depth}``."""
    reference: str
    """The arm that the others are compared with."""
    seeds: Seeds
    """Runs of an arm. Arms of one seed share initial weights, order of samples, t and noise."""
    scoring: Scoring
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is no arm: {', '.join(self.arms)}")
        for name in self.arms:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"arm {name!r} names a folder: use letters, digits, - _ .")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat themselves")
        if self.tuning is not None:
            shared = sorted({*self.seeds} & {*self.tuning.seeds})
            if shared:
                raise ValueError(f"tuning.seeds shares {shared} with seeds: choose others")
            if self.tuning.scoring.samples == self.scoring.samples:
                raise ValueError(
                    f"tuning.scoring.samples is {self.scoring.samples}, which the study is judged "
                    "by: choose settings by other captions"
                )
        return self

    def run(self, arm: str, seed: int, output: str, **changes: Any) -> TrainConfig:
        """The configuration of one run.

        Args:
            changes: dotted key -> value, put in last.

        Raises:
            InputError: what the study says of this arm is no valid configuration.
        """
        document: dict[str, Any] = {}
        for key, value in {**self.train, **self.arms[arm], **changes}.items():
            put(document, key, value)
        for key in ("output", "seed"):
            if key in document:
                raise InputError(f"arm {arm} sets {key}, which the study sets for every run")
        return parse(TrainConfig, {**document, "output": output, "seed": seed}, f"arm {arm}")
