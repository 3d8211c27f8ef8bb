"""``run.json``: the record of a run."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...schemas import (
    LOCK_FILE,
    InputError,
    PretrainedIdentity,
    RunRecord,
    TrainConfig,
    differences,
    parse,
    refuse_differences,
    sync,
    write_document,
)
from ...schemas.escaping import without_secrets
from ...schemas.json_file import read_json
from ...schemas.memory import memory_bytes
from ...schemas.seeds import RANDOM_VERSION
from ...schemas.tensor_files import save_tensors
from ...schemas.units import format_bytes
from .checkpoint import Checkpoint, describe_file, latest_checkpoint, list_checkpoints

if TYPE_CHECKING:
    from ..adapters.routed import Routed
    from ..model.dit import DiT

    Network: TypeAlias = DiT | Routed

RECORD = "run.json"
LLM_WEIGHTS = "llm.safetensors"
"""Weights of the LLM that blocks read with strategy ``deep-fusion``; see :class:`LlmAttention`."""

# Keys of a record that describe the data of training and validation.
STORES = {"features", "codec", "latents", "validation", "selection", "mixture", "pretrained"}
# Keys of a configuration that say where things are; stores are compared by identity.
PATHS: Any = {
    "features": True,
    "latents": True,
    "output": True,
    "model": {"pretrained"},
    "routing": {"llm"},
    "data": {
        "cache": True,
        "conditioning": True,
        "select": {"columns"},
        "mixture": {
            "__all__": {
                "features": True,
                "latents": True,
                "conditioning": True,
                "select": {"columns"},
            }
        },
    },
    "validation": {"features", "latents", "conditioning"},
}
# Keys that may change when a run is resumed: those, and what is kept and shown. None of them
# changes a weight.
FREE: Any = {
    **PATHS,
    "steps": True,
    "log_every": True,
    "checkpoint_every": True,
    "keep_checkpoints": True,
    "gradient_checkpointing": True,
    "sampling": True,
    "timeout_minutes": True,
    "tracker": True,
    "data": {**PATHS["data"], "unverified": True, "prefetch": True, "workers": True},
    "validation": {"every", *PATHS["validation"]},
}


def build_model(
    record: RunRecord,
    building: AbstractContextManager[Any] | None = None,
    *,
    empty: bool = False,
) -> "Network":
    """The network that a record describes: fresh weights are determined by ``config.seed``, those
    of a pretrained network are loaded.

    Args:
        building: context in which it is made; pretrained weights are not loaded then.
        empty: only its buffers have memory; parameters are on the meta device.

    Raises:
        InputError: the pretrained network is missing, or is another one.
    """
    if record.pretrained is not None:
        return _build_pretrained(record, record.pretrained, building, empty)
    if building is None and not empty:
        _check_memory(record)
    with _without_parameters() if empty else building or nullcontext():
        return _build_dit(record)


def _check_memory(record: RunRecord) -> None:
    """Refuse a network that this machine cannot hold, which the system would end unexplained."""
    from ..model.blocks import resolve_size

    size, has = resolve_size(record.config.model), memory_bytes()
    inner = 3 * size.mlp_width
    if record.llm_attention is None:  # otherwise heads are the LLM's
        inner += 2 * (size.num_heads + size.num_kv_heads) * size.head_dim
    needs = 4 * size.depth * size.width * inner
    if has is not None and needs > has:
        raise InputError(
            f"the network's weights take more than {format_bytes(needs)}, and this machine has "
            f"{format_bytes(has)} of memory: choose another model.size, or a smaller model.depth, "
            "model.width or model.mlp_width; semroute train --dry-run says what a run needs"
        )


def _without_parameters() -> AbstractContextManager[Any]:
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def is_empty(model: nn.Module) -> bool:
    """Whether the parameters of a network have no memory."""
    return any(parameter.is_meta for parameter in model.parameters())


def _build_pretrained(
    record: RunRecord,
    pretrained: PretrainedIdentity,
    building: AbstractContextManager[Any] | None,
    empty: bool,
) -> "Routed":
    from ..adapters.pretrained import find_pretrained, load_transformer

    config, llm = record.config.model, record.features.model
    assert config.pretrained is not None
    found = find_pretrained(config.pretrained)
    refuse_differences(
        differences(
            found.identity(config, llm.num_layers).model_dump(mode="json"),
            pretrained.model_dump(mode="json"),
        ),
        f"{found.name} is not the pretrained network of the run; found, against the run's own",
        "Name that one.",
    )
    if empty:
        with _without_parameters():
            return adapt(record, load_transformer(found, config, weights=False))
    if building is None:
        return adapt(record, load_transformer(found, config))
    with torch.device("meta"):
        model = adapt(record, load_transformer(found, config, weights=False))
    with building:
        model.to_empty(device="cpu")
    return model


def adapt(record: RunRecord, transformer: Any, *, trainable: bool = True) -> "Routed":
    """A pretrained transformer with what a run adds to it; fresh weights are determined by
    ``config.seed``.

    Args:
        trainable: see :class:`semroute.trainer.adapters.routed.Routed`.

    Raises:
        InputError: it is of another family, or does not fit.
    """
    from ..adapters.families import find_family
    from ..adapters.routed import Routed

    pretrained, llm = record.pretrained, record.features.model
    assert pretrained is not None
    family = find_family(type(transformer).__name__, pretrained.transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.config.seed)
        return Routed(
            transformer,
            family,
            record.config.model,
            record.config.routing,
            layers=record.features.layers,
            base_layers=pretrained.base_layers,
            num_llm_layers=llm.num_layers,
            text_width=llm.width,
            latent_shape=record.latents.shape,
            mixes=record.features.mixes,
            trainable=trainable,
        )


def _build_dit(record: RunRecord) -> "DiT":
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
            attention=record.llm_attention,
        )


def put_llm_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill the weights of the LLM that a network holds.

    Raises:
        InputError: they are not those of its router.
    """
    router = model.get_submodule("router")
    refuse_differences(
        differences(
            {name: list(value.shape) for name, value in weights.items()},
            {name: list(value.shape) for name, value in router.named_parameters()},
        ),
        f"{LLM_WEIGHTS} holds other weights than the network reads; found, expected",
        "Restore the run directory from a copy.",
    )
    router.load_state_dict(dict(weights))


def write_llm_weights(path: Path, record: RunRecord, weights: Mapping[str, Tensor]) -> RunRecord:
    """Write weights of the LLM into a run directory.

    Returns:
        The record with their checksum.
    """
    assert record.llm_attention is not None
    path.mkdir(parents=True, exist_ok=True)
    unfinished = path / f"{LLM_WEIGHTS}.tmp"
    save_tensors(weights, unfinished, {"format": "pt"})
    sync(unfinished)
    sha256 = describe_file(unfinished).sha256
    unfinished.replace(path / LLM_WEIGHTS)
    sync(path)
    attention = record.llm_attention.model_copy(update={"sha256": sha256})
    return record.model_copy(update={"llm_attention": attention})


def read_llm_weights(path: Path, record: RunRecord) -> dict[str, Tensor]:
    """The weights of the LLM in a run directory.

    Raises:
        InputError: they are missing or damaged.
    """
    assert record.llm_attention is not None
    file = path / LLM_WEIGHTS
    try:
        found = describe_file(file).sha256
        if found != record.llm_attention.sha256:
            raise InputError("it has another sha256 than when it was written")
        return load_file(file)
    except (InputError, OSError, SafetensorError) as error:
        raise InputError(
            f"{file} is missing or damaged ({error}): restore the run directory from a copy"
        ) from error


def learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that learn, with their names: all of our own network, some of a pretrained one."""
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights that learn, by name, as checkpoints hold them."""
    names = {name for name, _ in learning(model)}
    return {name: value for name, value in model.state_dict().items() if name in names}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a checkpoint.

    Raises:
        InputError: they are not those that learn in this network.
    """
    refuse_other_weights(weights, trained_weights(model))
    model.load_state_dict(dict(weights), strict=False)


def refuse_other_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights of a checkpoint that are not those that a network learns.

    Raises:
        InputError: with each name or shape that differs.
    """
    refuse_differences(
        differences(
            {name: list(value.shape) for name, value in found.items()},
            {name: list(value.shape) for name, value in expected.items()},
        ),
        "the checkpoint holds other weights than the network learns; found, expected",
        "Restore the run directory from a copy.",
    )


def write_record(path: Path, record: RunRecord) -> None:
    """Write ``run.json`` atomically, without the secrets of URLs."""
    write_document(path / RECORD, without_secrets(record.model_dump_json(indent=1)) + "\n")


def read_record(path: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        InputError: it is missing or damaged.
    """
    file = path / RECORD
    try:
        document = read_json(file, follow=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is no run: it has no {RECORD}") from error
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
        own = {f"{RECORD}.tmp", LLM_WEIGHTS, f"{LLM_WEIGHTS}.tmp"}
        own |= {*(name for name in present if name.startswith(LOCK_FILE))}
        foreign = sorted(present - own)
        if foreign:
            raise InputError(
                f"{path} is not empty and no run: it holds {', '.join(foreign[:5])} but no "
                f"{RECORD}. Name a new folder."
            )
        return _with_version(record, RANDOM_VERSION), None
    before = read_record(path)
    before = _with_version(before, 1)
    record = _with_version(record, before.config.random_version)
    stores = differences(
        record.model_dump(mode="json", include=STORES),
        before.model_dump(mode="json", include=STORES),
    )
    changed = differences(_fixed(record.config), _fixed(before.config))
    newest = latest_checkpoint(path)
    more = record.config.steps - before.config.steps
    if more < 0 or (more > 0 and not _may_grow(before.config, newest)):
        changed += differences({"steps": record.config.steps}, {"steps": before.config.steps})
    refuse_differences(
        (*stores, *changed),
        f"{path} is another run; what was requested, against what it has",
        "Run the command as it was, or name a new folder. (steps may grow if "
        "optimizer.schedule is constant, or wsd and has not begun to decay.)",
    )
    resumed = before.model_copy(update={"config": record.config, "versions": record.versions})
    return resumed, newest


def _with_version(record: RunRecord, version: int | None) -> RunRecord:
    """A record whose ``config.random_version`` is this one if it names none."""
    if record.config.random_version is not None:
        return record
    config = record.config.model_copy(update={"random_version": version})
    return record.model_copy(update={"config": config})


def _may_grow(config: TrainConfig, newest: Checkpoint | None) -> bool:
    """Whether a run may get more steps: its learning rates so far do not depend on their number."""
    done = 0 if newest is None else newest.step
    match config.optimizer.schedule:
        case "constant":
            return True
        case "wsd":
            return done <= config.steps - config.optimizer.decay_steps
    return False


def tracker_id(record: RunRecord) -> str:
    """What trackers know the run by: 32 hexadecimal digits."""
    if record.id is not None:
        return record.id
    return hashlib.sha256(f"{record.created} {record.config.output}".encode()).hexdigest()[:32]


def choose_checkpoint(path: Path, record: RunRecord, step: int | None) -> Checkpoint:
    """A checkpoint of a run: that of a step, or the newest.

    Raises:
        InputError: there is none yet, or none of this step.
    """
    checkpoints = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(path)}
    if not checkpoints:
        raise InputError(
            f"{path} has no checkpoint yet: the first is written after "
            f"{min(record.config.checkpoint_every, record.config.steps):,} steps"
        )
    if step is not None and step not in checkpoints:
        raise InputError(f"{path} has no checkpoint of step {step}; it has {sorted(checkpoints)}")
    return checkpoints[max(checkpoints) if step is None else step]


def _fixed(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=FREE)
