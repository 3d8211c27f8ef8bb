"""What ``study.yaml`` says: which arms are trained, how often, and by what they are judged."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config import put
from .contract import Contract, parse
from .errors import InputError
from .train import Fraction, Positive, TrainConfig

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
    """Of the solver."""
    solver: Literal["euler", "heun"] = "euler"
    clock: str = "nominal"
    """What routing by t is told: ``nominal``, ``shift:K`` or ``estimated``."""
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


_SHARED = ("samples", "cfg_scales", "images_per_caption", "seed")


class Arm(Contract):
    """What differs in one arm of a study; in the file, with the dotted keys beside these."""

    of: str | None = None
    """Another arm, whose runs this one judges otherwise: nothing is trained."""
    seeds: Seeds | None = None
    """Those of the study's that this arm has; by default all."""
    against: str | None = None
    """The arm that this one is compared with; by default the one whose runs it judges, or else the
    study's reference."""
    scoring: dict[str, Any] = Field(default_factory=dict)
    """What is judged otherwise: features, num_steps, solver, clock, cfg_interval."""
    tuning: dict[str, Any] = Field(default_factory=dict)
    """The same of the scoring of trials."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of ``semroute train``."""


class StudyConfig(Contract):
    """Arms x seeds over one pair of stores."""

    output: str
    """Folder of the runs, the results and the report."""
    train: dict[str, Any]
    """What all runs share: a configuration of ``semroute train`` without output and seed."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name -> what differs, as dotted keys: ``{routing.strategy: depth}``. Besides, ``seeds``,
    ``scoring`` and ``tuning`` say what else differs, ``of`` names an arm to judge otherwise, and
    ``against`` one to be compared with."""
    reference: str
    """The arm that the others are compared with, where they name no other."""
    seeds: Seeds
    """Runs of an arm. Arms of one seed share initial weights, order of samples, t and noise."""
    scoring: Scoring | None = None
    """None: runs are trained only, to be judged by other means."""
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
        for name in self.arms:
            self._check(name)
        if self.tuning is not None:
            shared = sorted({*self.seeds} & {*self.tuning.seeds})
            if shared:
                raise ValueError(f"tuning.seeds shares {shared} with seeds: choose others")
            judged_by = None if self.scoring is None else self.scoring.samples
            if self.tuning.scoring.samples == judged_by:
                raise ValueError(
                    f"tuning.scoring.samples is {judged_by}, which the study is judged "
                    "by: choose settings by other captions"
                )
        return self

    def _check(self, name: str) -> None:
        arm = self.arm(name)
        if arm.seeds is not None and not {*arm.seeds} <= {*self.seeds}:
            raise ValueError(f"arm {name} has seeds {arm.seeds}, of which the study has not all")
        for place, changes in (("scoring", arm.scoring), ("tuning", arm.tuning)):
            if found := sorted({*changes} & {*_SHARED}):
                raise ValueError(
                    f"arm {name} changes {place}.{found[0]}, by which all arms are compared: "
                    "leave it out"
                )
        if self.scoring is None and (arm.of is not None or arm.scoring):
            raise ValueError(f"arm {name} is judged otherwise, in a study that judges nothing")
        if arm.tuning and self.tuning is None:
            raise ValueError(f"arm {name} changes the tuning of a study that has none")
        if arm.against is not None and arm.against not in {*self.arms} - {name}:
            raise ValueError(f"arm {name} is against {arm.against!r}, which is no other arm")
        if arm.of is None:
            return
        if arm.of not in self.arms or "of" in self.arms[arm.of]:
            raise ValueError(f"arm {name} is of {arm.of!r}, which is no arm with runs of its own")
        if arm.train or arm.tuning:
            raise ValueError(
                f"arm {name} judges the runs of {arm.of} and trains none: it may have seeds and "
                "scoring only"
            )

    def arm(self, name: str) -> Arm:
        """What differs in an arm."""
        given = self.arms[name]
        own = {key: given[key] for key in given if key in Arm.model_fields and key != "train"}
        train = {key: given[key] for key in given if key not in own}
        return Arm.model_validate({**own, "train": train})

    def only(self, names: Iterable[str]) -> "StudyConfig":
        """The study of some arms, with those that they are compared with and whose runs they judge.

        Raises:
            InputError: no such arm.
        """
        wanted = {self.reference}
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            if name not in self.arms:
                raise InputError(f"{name!r} is no arm of this study: {', '.join(self.arms)}")
            wanted.add(name)
            others = {self.reference_of(name), self.arm(name).of or name}
            waiting += others - wanted
        kept = {name: given for name, given in self.arms.items() if name in wanted}
        return self.model_copy(update={"arms": kept})

    def reference_of(self, name: str) -> str:
        """What an arm is compared with; itself, where it is what others are compared with."""
        arm = self.arm(name)
        return arm.against or arm.of or self.reference

    def seeds_of(self, name: str) -> list[int]:
        """Seeds of an arm."""
        return self.arm(name).seeds or self.seeds

    def scoring_of(self, name: str) -> Scoring | None:
        """How an arm is judged, where the study judges."""
        if self.scoring is None:
            return None
        return _changed(self.scoring, self.arm(name).scoring, f"arm {name}, scoring")

    def trials_of(self, name: str) -> Scoring:
        """How trials of an arm are judged, where the study tunes."""
        assert self.tuning is not None
        return _changed(self.tuning.scoring, self.arm(name).tuning, f"arm {name}, tuning")

    def run(self, arm: str, seed: int, output: str, **changes: Any) -> TrainConfig:
        """The configuration of one run.

        Args:
            arm: one that trains.
            changes: dotted key -> value, put in last.

        Raises:
            InputError: what the study says of this arm is no valid configuration.
        """
        document: dict[str, Any] = {}
        for key, value in {**self.train, **self.arm(arm).train, **changes}.items():
            put(document, key, value)
        for key in ("output", "seed"):
            if key in document:
                raise InputError(f"arm {arm} sets {key}, which the study sets for every run")
        return parse(TrainConfig, {**document, "output": output, "seed": seed}, f"arm {arm}")


def _changed(scoring: Scoring, changes: dict[str, Any], source: str) -> Scoring:
    return parse(Scoring, {**scoring.model_dump(), **changes}, source)
