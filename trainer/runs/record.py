"""``run.json``: the record of a run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas import (
    LOCK_FILE,
    InputError,
    RunRecord,
    TrainConfig,
    differences,
    parse,
    refuse_differences,
    write_document,
)
from .checkpoint import Checkpoint, latest_checkpoint

if TYPE_CHECKING:
    from ..model.dit import DiT

RECORD = "run.json"

# Keys of a record that describe the data of training and validation.
_STORES = {"features", "codec", "latents", "validation", "selection", "mixture"}
# Keys of a configuration that may change when a run is resumed: where things are (stores are
# compared by identity), and what is kept and shown. None of them changes a weight.
FREE: Any = {
    "features": True,
    "latents": True,
    "output": True,
    "steps": True,
    "log_every": True,
    "checkpoint_every": True,
    "keep_checkpoints": True,
    "gradient_checkpointing": True,
    "tracker": True,
    "data": {
        "prefetch": True,
        "workers": True,
        "select": {"columns"},
        "mixture": {"__all__": {"features": True, "latents": True, "select": {"columns"}}},
    },
    "validation": {"every", "features", "latents"},
}


def build_model(record: RunRecord) -> "DiT":
    """The network that a record describes, with fresh weights that ``config.seed`` determines."""
    import torch

    from ..model.dit import DiT

    llm = record.features.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.config.seed)
        return DiT(
            record.config.model,
            record.config.routing,
            latent_shape=record.latents.shape,
            layers=record.features.layers,
            num_llm_layers=llm.num_layers,
            text_width=llm.width,
            mixes=record.features.mixes,
        )


def write_record(path: Path, record: RunRecord) -> None:
    """Write ``run.json`` atomically."""
    write_document(path / RECORD, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        InputError: it is missing or damaged.
    """
    file = path / RECORD
    try:
        document = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is no run: it has no {RECORD}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    return parse(RunRecord, document, str(file))


def find_run(path: Path, record: RunRecord) -> tuple[RunRecord, Checkpoint | None]:
    """The run to resume in a directory, or a new one.

    Returns:
        The record to write, and the checkpoint to resume from (None: from the start).

    Raises:
        InputError: the directory holds something else, or another run.
    """
    if not (path / RECORD).exists():
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; expected a new folder for the run")
        present = {p.name for p in path.iterdir()} if path.exists() else set()
        foreign = sorted(present - {f"{RECORD}.tmp", LOCK_FILE})
        if foreign:
            raise InputError(
                f"{path} is not empty and no run: it holds {', '.join(foreign[:5])} but no "
                f"{RECORD}. Name a new folder."
            )
        return record, None
    before = read_record(path)
    stores = differences(
        record.model_dump(mode="json", include=_STORES),
        before.model_dump(mode="json", include=_STORES),
    )
    changed = differences(_fixed(record.config), _fixed(before.config))
    if record.config.steps < before.config.steps or (
        record.config.steps > before.config.steps and record.config.optimizer.schedule != "constant"
    ):
        changed += differences({"steps": record.config.steps}, {"steps": before.config.steps})
    refuse_differences(
        (*stores, *changed),
        f"{path} is another run; what was requested, against what it has",
        "Run the command as it was, or name a new folder. (steps may grow if "
        "optimizer.schedule is constant.)",
    )
    resumed = before.model_copy(update={"config": record.config, "versions": record.versions})
    return resumed, latest_checkpoint(path)


def _fixed(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=FREE)
