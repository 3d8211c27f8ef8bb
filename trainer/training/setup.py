"""Setup of a run: open and check everything, and write nothing."""

import importlib.metadata
import platform
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...pipeline.store.documents import AGAINST, passed_against
from ...pipeline.store.features import FeatureStore
from ...pipeline.store.latents import LatentStore
from ...pipeline.store.open import open_features
from ...pipeline.store.order.dataset import StorePair, by_shape, held_out, open_stores
from ...pipeline.store.order.sampler import BatchPartition
from ...schemas import (
    FeatureIdentity,
    InputError,
    ModelConfig,
    PretrainedIdentity,
    RunRecord,
    TrainConfig,
)
from ...schemas.seeds import RANDOM_VERSION
from ..adapters.paths import make_path
from ..data.loader import PackedLoader
from ..diffusion.noise import NoiseSource
from ..model.blocks import resolve_size
from ..model.deep_fusion import layers_of_blocks
from ..runs.checkpoint import Checkpoint
from ..runs.record import build_model, find_run, put_llm_weights, read_llm_weights
from ..runs.run import Run
from ..runs.start import open_start
from .accelerator import check_tracker
from .position import check_followed
from .validation import Validation, open_validation

if TYPE_CHECKING:
    from ...pipeline.models.hub import ModelFiles
    from ..runs.record import Network


Opening = Future[list[StorePair]]
"""The result of :func:`.open_stores` in another thread."""


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs, opened and checked.

    Attributes:
        pairs: the run's own stores, and those of its mixture.
        record: ``run.json``, to be written.
        checkpoint: where to resume; None: from the start.
        model: the network with fresh weights.
        start: the run that ``config.start`` names, if this run is new and the network not empty.
        validation: measures the run on held-out samples, if configured.
        llm_weights: weights of the LLM that a new run with strategy ``deep-fusion`` copies.
    """

    features: FeatureStore
    latents: LatentStore
    pairs: list[StorePair]
    record: RunRecord
    checkpoint: Checkpoint | None
    model: "Network"
    start: Run | None
    validation: Validation | None
    llm_weights: Mapping[str, Tensor] | None = None


def prepare(
    config: TrainConfig,
    building: AbstractContextManager[Any] | None = None,
    *,
    empty: bool = False,
    opening: Opening | None = None,
) -> Setup:
    """Open and check all that training needs.

    Args:
        building: context in which the network is made.
        empty: make the network without weights, which another rank has.
        opening: the stores, where another thread opens them.

    Raises:
        InputError: as in :func:`.train.train`.
    """
    pairs = open_stores(config) if opening is None else opening.result()
    features, latents = pairs[0].features, pairs[0].latents
    check_verified(config, pairs)
    record, checkpoint = find_run(Path(config.output), make_record(config, pairs))
    check_followed(record.config, pairs)
    record, llm = find_llm_attention(record, features.layers)
    model = build_model(record, building, empty=empty)
    llm_weights = None
    if record.llm_attention is not None and building is None and not empty:
        if llm is not None:
            from ...pipeline.models.attention import read_attention

            llm_weights = read_attention(llm, record.llm_attention, record.features)
        put_llm_weights(model, llm_weights or read_llm_weights(Path(config.output), record))
    for shape in by_shape(pairs):
        model.check_shape(shape)
    start = open_start(model, record) if checkpoint is None and not empty else None
    check_tracker(config)
    validation = open_validation(config, features, latents, model.router)
    return Setup(
        *(features, latents, pairs, record, checkpoint, model, start, validation), llm_weights
    )


def make_loader(
    setup: Setup, *, rank: int = 0, num_ranks: int = 1, codes: bool = False
) -> PackedLoader:
    """The loader of one rank, from the step where the run starts or resumes.

    Args:
        codes: deliver codes, see :class:`.PackedLoader`.

    Raises:
        InputError: ranks and accumulation steps do not divide the batch.
    """
    config = setup.record.config
    version = config.random_version or RANDOM_VERSION
    return PackedLoader(
        setup.features,
        setup.latents,
        config.data,
        seed=config.seed,
        layers=setup.model.router.layers_read,
        partition=BatchPartition(rank, num_ranks, config.grad_accum_steps),
        held_out=held_out(config.validation, setup.latents.ids),
        marks_null=setup.model.router.needs_positions,
        start_step=0 if setup.checkpoint is None else setup.checkpoint.step,
        codes=codes,
        pairs=setup.pairs,
        version=version,
        noise=NoiseSource(
            make_path(config.flow, setup.record.pretrained),
            config.seed,
            config.data.noise_draws,
            config.routing.t_jitter,
            version,
        ),
    )


def find_llm_attention(
    record: RunRecord, stored: Sequence[int]
) -> "tuple[RunRecord, ModelFiles | None]":
    """The LLM whose keys and values blocks read with strategy ``deep-fusion``.

    Args:
        stored: layers in the feature store.

    Returns:
        The record that describes them; and the LLM, where the run is new and has no copy yet.

    Raises:
        InputError: the store lacks layers, or the LLM is missing, is another one, or has keys and
            values that stored layers do not determine.
    """
    config = record.config
    if config.routing.strategy != "deep-fusion" or record.llm_attention is not None:
        return record, None
    from ...pipeline.models.attention import find_attention

    llm = record.features.model
    if record.features.mixes is not None:
        raise InputError(
            "the features hold mixes of layers, but each block of the LLM reads its own layer: "
            "train deep-fusion on the store that they were made from"
        )
    depth = resolve_size(config.model).depth
    chosen = layers_of_blocks(stored, llm.num_layers, depth, config.routing.layers)
    model = config.routing.llm or record.model_source
    source, attention = find_attention(record.features, sorted({*chosen}), model)
    return record.model_copy(update={"llm_attention": attention}), source


def make_record(config: TrainConfig, pairs: Sequence[StorePair]) -> RunRecord:
    """The ``run.json`` of a run that starts now.

    Args:
        pairs: the run's own stores, and those of its mixture.
    """
    first, *others = pairs
    features, latents = first.features, first.latents
    names = ["torch", "accelerate", "numpy"]
    pretrained = identify_pretrained(config.model, features.manifest.identity)
    if pretrained is not None:
        names.append("diffusers")
        config = with_shift(config, pretrained, latents.manifest.identity.shape)
    second = config.validation.features
    return RunRecord(
        config=config,
        features=features.manifest.identity,
        codec=features.manifest.codec,
        latents=latents.manifest.identity,
        validation=None if second is None else open_features(second).manifest.identity.samples,
        selection=first.selection,
        mixture=[pair.record() for pair in others],
        pretrained=pretrained,
        model_source=features.manifest.provenance.model,
        vae_source=latents.manifest.provenance.model,
        id=uuid.uuid4().hex,
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def identify_pretrained(
    config: ModelConfig, features: FeatureIdentity
) -> PretrainedIdentity | None:
    """The pretrained network of a configuration; None if it names none.

    Raises:
        InputError: it is missing or of an unknown family, or its text is of another width.
    """
    if config.pretrained is None:
        return None
    from ..adapters.pretrained import find_pretrained

    found = find_pretrained(config.pretrained)
    width = found.family.text_width(found.config)
    if width != features.model.width:
        raise InputError(
            f"{found.name} reads hidden states of width {width}, but the features are of width "
            f"{features.model.width}, of another LLM: extract them with its own text encoder"
        )
    return found.identity(config, features.model.num_layers)


def check_verified(config: TrainConfig, pairs: Sequence[StorePair]) -> None:
    """Refuse stores that were never compared with the pipeline of a pretrained network.

    Raises:
        InputError: with the command that compares one.
    """
    name = config.model.pretrained
    if name is None or config.data.unverified:
        return
    from ..adapters.pretrained import find_pretrained

    found = find_pretrained(name)
    pipeline = found.index.get("_class_name", "")
    files: Mapping[str, str] | None = None
    for pair in pairs:
        for store in (pair.features, pair.conditioning):
            if store is None:
                continue
            if files is None and (store.path / AGAINST).exists():
                files = found.text_files()
            if files is None or not passed_against(store.path, pipeline, files):
                raise InputError(
                    f"{store.path} was not compared with what {name} does to text: run semroute "
                    f"verify {store.path} --against {name}, or train with data.unverified=true "
                    "(--unverified)"
                )


def with_shift(
    config: TrainConfig, pretrained: PretrainedIdentity, shape: tuple[int, int, int]
) -> TrainConfig:
    """The configuration with the shift of the pretrained scheduler, unless it names one."""
    if "shift" in config.flow.model_fields_set:
        return config
    from ..adapters.paths import shift_of

    shift = shift_of(pretrained, shape)
    if shift is None:
        return config
    flow = config.flow.model_copy(update={"shift": shift})
    return config.model_copy(update={"flow": flow})
