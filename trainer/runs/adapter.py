"""What a run on a pretrained network learned, without that network: read from the run's directory
or from a folder that it was exported into, and written into such a folder.

On disk::

    adapter.json                          schemas.AdapterRecord
    config.json, router.safetensors       the router, see .export; if there is one
    gains.safetensors                     gains; if they were trained
    pytorch_lora_weights.safetensors      LoRA; or adapter_config.json and adapter_model.safetensors
    transformer.safetensors               the network's own weights that were trained

Shapes: T noise levels, D mixes that the router makes, R rows (tokens), L layers, H text width.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ...schemas import (
    AdapterRecord,
    InputError,
    LoraConfig,
    PretrainedIdentity,
    RunRecord,
    differences,
    parse,
    refuse_differences,
    write_document,
)
from ...schemas.json_file import read_json
from ...schemas.tensor_files import load_tensors, save_tensors
from ..adapters.base import Family, count_mixes
from ..adapters.families import find_family
from ..adapters.lora_files import find_loader, matrices_of, read_lora, weights_of, write_lora
from ..adapters.pretrained import find_class, find_pretrained, hub_id
from ..adapters.routed import PARTS, Unrouted
from ..model.router import Learned, Router
from ..model.strategies import make_router
from .compatibility import check_identity
from .export import TENSORS, router_parameters, write_router
from .record import RECORD, choose_checkpoint, read_record

ADAPTER = "adapter.json"
GAINS = "gains.safetensors"
NETWORK = "transformer.safetensors"
NUM_CAPTIONS = 64
"""Captions of the run's store over which weights of single tokens are averaged."""
_ROUTER, _NETWORK = "router.", "transformer."


@dataclass(frozen=True)
class Adapter:
    """What a run on a pretrained network learned.

    Attributes:
        path: the run's directory, or the folder of an export.
        record: the run's ``run.json``.
        trained: weights that were trained, by name in a
            :class:`semroute.trainer.adapters.routed.Routed`.
        step: steps done at the checkpoint.
        source: which weights these are, ``ema`` or ``model``.
    """

    path: Path
    record: RunRecord
    trained: Mapping[str, Tensor]
    step: int
    source: Literal["ema", "model"]

    @property
    def identity(self) -> PretrainedIdentity:
        """The pretrained network."""
        assert self.record.pretrained is not None
        return self.record.pretrained

    @property
    def family(self) -> Family:
        """Its family."""
        return find_family(self.identity.transformer, str(self.path))

    @property
    def parts(self) -> set[str]:
        """What was trained: some of ``fusion``, ``router``, ``gain``, ``lora``, ``projection`` and
        ``network``."""
        return PARTS[self.record.config.model.train]

    @property
    def hub_base(self) -> str | None:
        """Name of the pretrained model on the Hub; None if it is a folder."""
        return hub_id(str(self.record.config.model.pretrained))

    @property
    def layers(self) -> list[int]:
        """LLM layers that alpha weighs, in its order."""
        return [*self.router.layers]

    @cached_property
    def num_blocks(self) -> int:
        """Number of mixes that the router makes (D)."""
        cls = find_class(self.identity.transformer)
        with torch.device("meta"):
            sockets = self.family.sockets(cls.from_config(dict(self.identity.config)))
        where = self.record.config.routing.where
        return count_mixes(sockets, where, len(self.identity.base_layers))

    @cached_property
    def router(self) -> Router:
        """The router, with its weights; :class:`.routed.Unrouted` if there is none."""
        features = self.record.features
        if "router" not in self.parts:
            return Unrouted(features.layers, self.identity.base_layers)
        with torch.random.fork_rng(devices=[]):
            router = make_router(
                self.record.config.routing,
                layers=features.layers,
                num_llm_layers=features.model.num_layers,
                num_blocks=self.num_blocks,
                text_width=features.model.width,
            )
        own = {n.removeprefix(_ROUTER): v for n, v in self.trained.items() if n.startswith(_ROUTER)}
        router.load_state_dict(own)
        return router.eval().requires_grad_(False)

    @property
    def learned_router(self) -> Learned:
        """The router, which was trained.

        Raises:
            InputError: none was.
        """
        if not isinstance(self.router, Learned):
            raise InputError(
                f"{self.path} has no router: it was trained with model.train="
                f"{self.record.config.model.train}"
            )
        return self.router

    def weights(self, t: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
        """The routing weights alpha, as :meth:`.run.Run.weights` gives them: float32 [T, D, L].

        Raises:
            InputError: each token has its own weights, but the store is missing or has changed.
        """
        router = self.router
        if t is None:
            t = np.linspace(0, 1, 21) if router.depends_on_t else [1.0]
        hidden = self.read_hidden() if router.depends_on_content else None
        levels = torch.as_tensor(np.asarray(t, np.float32))
        return router.table(levels, self.num_blocks, hidden).numpy()

    def read_hidden(self) -> Tensor:
        """Hidden states of the first captions that the run was trained on: [R, layers, H].

        Raises:
            InputError: the store is missing, or has changed.
        """
        from ...pipeline.store.open import open_features

        features = open_features(self.record.config.features)
        check_identity(f"{self.path} was", self.record.features, features.manifest.identity)
        ids = range(min(len(features), NUM_CAPTIONS))
        return features.read(ids, self.router.layers_read).tensor()

    def read_base(self, name: str) -> Tensor:
        """A weight of the pretrained network, as it was published.

        Raises:
            InputError: the network is missing, or is another one.
        """
        found = find_pretrained(str(self.record.config.model.pretrained))
        for file in sorted(p for p in found.folder.iterdir() if p.suffix == ".safetensors"):
            with safe_open(file, "pt") as tensors:
                if name not in tensors.keys():  # noqa: SIM118  # it is no mapping
                    continue
                found.check_files(self.identity, ["config.json", file.name])
                weight: Tensor = tensors.get_tensor(name)
                return weight
        raise InputError(f"{found.folder} holds no weight {name}: restore it from a copy")


def load_adapter(
    path: str | os.PathLike[str],
    step: int | None = None,
    weights: Literal["ema", "model"] | None = None,
) -> Adapter:
    """Open what a run learned, from its directory or from a folder that it was exported into.

    Args:
        step: step of the checkpoint. Default: the newest.
        weights: the exponential moving average, which is the default, or the weights themselves.

    Raises:
        InputError: there is neither; the run is not one on a pretrained network; or an export
            holds another step or other weights.
    """
    path = Path(path)
    if is_export(path):
        return _open_export(path, step, weights)
    if not (path / RECORD).exists():
        raise InputError(
            f"{path} is no run and no exported adapter: it has neither {RECORD} nor {ADAPTER}"
        )
    record = read_record(path)
    if record.pretrained is None:
        raise InputError(
            f"{path} trained a network of semroute's own, from random weights; expected a run on "
            "a pretrained network (model.kind=pretrained)"
        )
    checkpoint = choose_checkpoint(path, record, step)
    source = weights or "ema"
    tensors = checkpoint.ema() if source == "ema" else checkpoint.model()
    return Adapter(path, record, tensors, checkpoint.step, source)


def is_export(path: Path) -> bool:
    """Whether a folder holds an exported adapter, complete or not."""
    return (path / ADAPTER).exists()


def _open_export(path: Path, step: int | None, weights: Literal["ema", "model"] | None) -> Adapter:
    file = path / ADAPTER
    try:
        document = read_json(file, follow=True)
    except OSError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    record = parse(AdapterRecord, document, str(file))
    asked = {"step": step, "weights": weights}
    refuse_differences(
        differences(
            {name: value for name, value in asked.items() if value is not None},
            {name: getattr(record, name) for name, value in asked.items() if value is not None},
        ),
        f"{path} holds what was exported once; what was asked for, against it",
        "Name the run instead, or leave it out.",
    )
    tensors = weights_of(read_lora(path), record.run.config.model.lora or LoraConfig())
    for name, prefix in ((NETWORK, _NETWORK), (GAINS, "")):
        tensors |= {prefix + key: value for key, value in _read(path / name).items()}
    parameters = router_parameters(_read(path / TENSORS))
    tensors |= {_ROUTER + key: value for key, value in parameters.items()}
    return Adapter(path, record.run, tensors, record.step, record.weights)


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors of a file; none if it does not exist."""
    if not file.exists():
        return {}
    try:
        return load_tensors(file)
    except OSError as error:
        raise InputError(f"{file} is damaged: {error}") from error


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write what :func:`load_adapter` reads into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter.record.config.model
    rest = dict(adapter.trained)
    if "router" in adapter.parts:
        write_router(adapter, folder)
    if "lora" in adapter.parts:
        matrices = matrices_of(rest, config.lora or LoraConfig())
        write_lora(folder, matrices, find_loader(adapter.identity), adapter.hub_base)
        for name in weights_of(matrices, config.lora or LoraConfig()):
            del rest[name]
    own = {n: v.contiguous() for n, v in rest.items() if not n.startswith(_ROUTER)}
    network = {n.removeprefix(_NETWORK): v for n, v in own.items() if n.startswith(_NETWORK)}
    gains = {n: v for n, v in own.items() if not n.startswith(_NETWORK)}
    for file, tensors in ((NETWORK, network), (GAINS, gains)):
        if tensors:
            save_tensors(tensors, folder / file, {"format": "pt"})
    record = AdapterRecord(run=adapter.record, step=adapter.step, weights=adapter.source)
    write_document(folder / ADAPTER, record.model_dump_json(indent=1) + "\n")
