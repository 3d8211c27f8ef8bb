"""``study.yaml``: the arms to train, their seeds, and how they are scored."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config import put
from .contract import Fraction, Positive, Settings, parse
from .errors import InputError
from .train import Seed, TrainConfig

Seeds = Annotated[list[Seed], Field(min_length=1)]


class Scoring(Settings):
    """Scoring of a run on captions of the shapes dataset."""

    features: str
    """Feature store of the captions."""
    samples: str
    """The file that it was extracted from: ``dev.parquet`` or ``test.parquet`` of the dataset."""
    cfg_scales: Annotated[list[float], Field(min_length=1)]
    step: Positive | None = None
    """The checkpoint to score; by default the last."""
    cfg_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Lowest and highest t with guidance."""
    images_per_caption: Positive = 1
    num_steps: Positive = 50
    """Steps of the solver."""
    solver: Literal["euler", "heun"] = "euler"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products. ``auto``: bfloat16 on a GPU for runs that were trained so,
    otherwise float32."""
    clock: str = "nominal"
    """The t that routing sees: ``nominal``, ``shift:K`` or ``estimated``."""
    seed: Seed = 0
    """Seed of the noise, the same for every run, so that runs are compared image by image."""


class Tuning(Settings):
    """A setting that each arm tunes by the same number of trials on dev captions."""

    key: str = "optimizer.router_lr"
    values: Annotated[list[Any], Field(min_length=2)]
    steps: Positive
    """Training steps of each trial."""
    seeds: Seeds
    """Seeds of the trials, none of which the study uses."""
    skill: str = "all"
    """The skill by which the best value is chosen, on average over seeds and guidance scales."""
    scoring: Scoring


_SHARED = ("samples", "cfg_scales", "images_per_caption", "seed")


class Arm(Settings):
    """Settings of one arm of a study; in the file, dotted keys of training stand beside these."""

    of: str | None = None
    """Another arm, whose runs this one scores differently: nothing is trained."""
    seeds: Seeds | None = None
    """The study's seeds that this arm has; by default all."""
    against: str | None = None
    """The arm that this one is compared with; by default the one whose runs it scores, or else the
    study's reference."""
    scoring: dict[str, Any] = Field(default_factory=dict)
    """Differences in scoring: features, step, num_steps, solver, clock, cfg_interval."""
    tuning: dict[str, Any] = Field(default_factory=dict)
    """The same for the scoring of trials; and ``key`` and ``values``, where this arm tunes another
    setting than the study does."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of ``semroute train``."""


class StudyConfig(Settings):
    """Arms x seeds on one pair of stores."""

    output: str
    """Folder for the runs, the results and the report."""
    train: dict[str, Any]
    """Settings of all runs: a configuration of ``semroute train`` without output and seed."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Name -> differences as dotted keys: ``{routing.strategy: depth}``. Besides, ``seeds``,
    ``scoring`` and ``tuning`` hold other differences, ``of`` names an arm to score differently, and
    ``against`` one to compare with."""
    reference: str
    """The arm that others are compared with by default."""
    seeds: Seeds
    """One run of each arm per seed. Runs of one seed share initial weights, sample order, t and
    noise."""
    scoring: Scoring | None = None
    """Null: runs are only trained, to be scored by other means."""
    tuning: Tuning | None = None
    along: Annotated[list[Positive], Field(strict=True)] = Field(default_factory=list)
    """Steps at which every run is scored, besides its end: those of checkpoints that are kept. Arm
    ``depth`` gets an arm ``depth-at-1500``, which is compared with the other arm's at that step."""

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        self._add_arms_along()
        if self.reference not in self.arms:
            raise ValueError(f"reference {self.reference!r} is not an arm: {', '.join(self.arms)}")
        for name in self.arms:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"arm {name!r} names a folder: use letters, digits, - _ .")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} contain duplicates")
        for name in self.arms:
            self._check(name)
        if self.tuning is not None:
            shared = sorted({*self.seeds} & {*self.tuning.seeds})
            if shared:
                raise ValueError(f"tuning.seeds shares {shared} with seeds: choose others")
            samples = None if self.scoring is None else self.scoring.samples
            if self.tuning.scoring.samples == samples:
                raise ValueError(
                    f"tuning.scoring.samples is {samples}, by which the study is scored: choose "
                    "settings by other captions"
                )
        return self

    def _add_arms_along(self) -> None:
        """Add the arms that score runs before their end."""
        if not self.along:
            return
        if self.scoring is None:
            raise ValueError(f"along is {self.along}, in a study without scoring")
        if len({*self.along}) < len(self.along):
            raise ValueError(f"along {self.along} contains duplicates")
        added: dict[str, dict[str, Any]] = {}
        for name in self.arms:
            arm = self.arm(name)
            if arm.of is not None:
                continue
            reference = arm.against or self.reference
            for step in sorted(self.along):
                own: dict[str, Any] = {"of": name, "scoring": {**arm.scoring, "step": step}}
                if reference != name:
                    own["against"] = at_step(reference, step)
                if arm.seeds is not None:
                    own["seeds"] = arm.seeds
                added[at_step(name, step)] = own
        if shared := sorted({*added} & {*self.arms}):
            raise ValueError(f"arm {shared[0]} is one that along adds: give it another name")
        self.arms.update(added)

    def steps_of(self, name: str) -> dict[int, str]:
        """Steps at which an arm is scored before its end -> the arms that have these scores."""
        return {
            step: arm for step in sorted(self.along) if (arm := at_step(name, step)) in self.arms
        }

    def _check(self, name: str) -> None:
        arm = self.arm(name)
        if arm.seeds is not None and not {*arm.seeds} <= {*self.seeds}:
            raise ValueError(f"arm {name} has seeds {arm.seeds}, not all of which are the study's")
        for place, changes in (("scoring", arm.scoring), ("tuning", arm.tuning)):
            if found := sorted({*changes} & {*_SHARED}):
                raise ValueError(
                    f"arm {name} changes {place}.{found[0]}, by which all arms are compared: "
                    "leave it out"
                )
        if self.scoring is None and (arm.of is not None or arm.scoring):
            raise ValueError(f"arm {name} is scored differently, in a study without scoring")
        if arm.tuning and self.tuning is None:
            raise ValueError(f"arm {name} changes the tuning of a study that has none")
        if "key" in arm.tuning and "values" not in arm.tuning:
            raise ValueError(f"arm {name} tunes {arm.tuning['key']}: give its values too")
        if arm.against is not None and arm.against not in {*self.arms} - {name}:
            raise ValueError(f"arm {name} is against {arm.against!r}, which is not another arm")
        if arm.of is None:
            return
        if arm.of not in self.arms or "of" in self.arms[arm.of]:
            raise ValueError(f"arm {name} is of {arm.of!r}, which is not an arm with its own runs")
        if arm.train or arm.tuning:
            raise ValueError(
                f"arm {name} scores the runs of {arm.of} and trains nothing: it may have seeds and "
                "scoring only"
            )

    def arm(self, name: str) -> Arm:
        """The settings of an arm."""
        given = self.arms[name]
        own = {key: given[key] for key in given if key in Arm.model_fields and key != "train"}
        train = {key: given[key] for key in given if key not in own}
        return Arm.model_validate({**own, "train": train})

    def only(self, names: Iterable[str]) -> "StudyConfig":
        """The study of some arms, with those that they are compared with or whose runs they score.

        Raises:
            InputError: no such arm.
        """
        wanted = {self.reference}
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            if name not in self.arms:
                raise InputError(f"{name!r} is not an arm of this study: {', '.join(self.arms)}")
            wanted.add(name)
            others = {self.reference_of(name), self.arm(name).of or name}
            waiting += others - wanted
        wanted |= {arm for name in wanted for arm in self.steps_of(name).values()}
        arms = {name: given for name, given in self.arms.items() if name in wanted}
        return self.model_copy(update={"arms": arms})

    def reference_of(self, name: str) -> str:
        """The arm that an arm is compared with; itself, for the study's reference."""
        arm = self.arm(name)
        return arm.against or arm.of or self.reference

    def seeds_of(self, name: str) -> list[int]:
        """Seeds of an arm."""
        return self.arm(name).seeds or self.seeds

    def scoring_of(self, name: str) -> Scoring | None:
        """Scoring of an arm; None if the study does not score."""
        if self.scoring is None:
            return None
        return _changed(self.scoring, self.arm(name).scoring, f"arm {name}, scoring")

    def tuning_of(self, name: str) -> Tuning:
        """Tuning of an arm, in a study that tunes."""
        assert self.tuning is not None
        source, changes = f"arm {name}, tuning", self.arm(name).tuning
        own: dict[str, Any] = {key: changes[key] for key in ("key", "values") if key in changes}
        others = {key: value for key, value in changes.items() if key not in own}
        scoring = _changed(self.tuning.scoring, others, source)
        document: dict[str, Any] = {
            **self.tuning.model_dump(),
            **own,
            "scoring": scoring.model_dump(),
        }
        return parse(Tuning, document, source)

    def run(self, arm: str, seed: int, output: str, **changes: Any) -> TrainConfig:
        """The configuration of one run.

        Args:
            arm: one that trains.
            changes: dotted key -> value, which override all else.

        Raises:
            InputError: the settings of this arm are not a valid configuration.
        """
        document: dict[str, Any] = {}
        for key, value in {**self.train, **self.arm(arm).train, **changes}.items():
            put(document, key, value)
        for key in ("output", "seed"):
            if key in document:
                raise InputError(f"arm {arm} sets {key}, which the study sets for every run")
        return parse(TrainConfig, {**document, "output": output, "seed": seed}, f"arm {arm}")


def at_step(arm: str, step: int) -> str:
    """The arm that has the scores of an arm's runs at a step."""
    return f"{arm}-at-{step}"


def _changed(scoring: Scoring, changes: dict[str, Any], source: str) -> Scoring:
    return parse(Scoring, {**scoring.model_dump(), **changes}, source)
