"""The router of a run alone, as two files that can be read without this library.

On disk::

    config.json            schemas.RouterRecord
    router.safetensors     alpha, t, layers; and the router's own parameters

Shapes: T noise levels, D blocks, L layers.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...schemas import InputError, RouterRecord, parse, write_document
from ...schemas.atomic import whole_folder
from ...schemas.json_file import read_json
from ...schemas.tensor_files import load_tensors, save_tensors
from ..model.router import Learned, Router
from ..model.strategies import make_router

if TYPE_CHECKING:
    from .adapter import Adapter
    from .run import Run

CONFIG = "config.json"
TENSORS = "router.safetensors"
NUM_T = 101
"""Noise levels at which alpha is tabulated if it depends on t."""
_PARAMETERS = "parameters."


def export_router(run: "Run | Adapter", out: str | os.PathLike[str]) -> Path:
    """Write the router of a run into a new or empty folder.

    ``alpha`` float32 [T, D, L] holds its weights at ``t`` float32 [T] (one, any, if they do not
    depend on it) over ``layers`` int64 [L]: enough to mix layers without this library. If each
    token has its own weights, alpha is a mean over some tokens, and the parameters are what counts.

    Of a run on a pretrained network, ``alpha`` is what its layers are weighed by beside its own:
    it adds those of alpha less 1/L.

    Raises:
        InputError: the folder holds other files, or no router was trained.
    """
    with whole_folder(out, own=(CONFIG, TENSORS)) as folder:
        write_router(run, folder)
    return Path(out)


def write_router(run: "Run | Adapter", folder: Path) -> None:
    """Write the router of a run into an existing folder, as :func:`export_router`.

    Raises:
        InputError: no router was trained.
    """
    router, record = run.router, run.record
    if record.pretrained is not None and not isinstance(router, Learned):
        raise InputError(
            f"{run.path} has no router: it was trained with model.train={record.config.model.train}"
        )
    if record.llm_attention is not None:
        raise InputError(
            f"{run.path} has no router: with strategy deep-fusion, blocks read keys and values of "
            "the LLM, and no mix of layers; export the run as a pipeline"
        )
    t = torch.linspace(0, 1, NUM_T) if router.depends_on_t else torch.ones(1)
    tensors = {
        "alpha": torch.from_numpy(run.weights(t.numpy())),
        "t": t,
        "layers": torch.tensor(run.layers),
        **{_PARAMETERS + name: value.cpu() for name, value in router.state_dict().items()},
    }
    exported = RouterRecord(
        routing=record.config.routing,
        layers=run.layers,
        num_llm_layers=record.features.model.num_layers,
        num_blocks=run.num_blocks,
        text_width=record.features.model.width,
        mixes=record.features.mixes,
        features=record.features,
        pretrained=record.pretrained,
        model_source=record.model_source,
        step=run.step,
        weights=run.source,
    )
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(whole, folder / TENSORS, {"format": "pt", "strategy": exported.routing.strategy})
    write_document(folder / CONFIG, exported.model_dump_json(indent=1) + "\n")


def load_router(path: str | os.PathLike[str]) -> Router:
    """Load the router that :func:`.export_router` wrote, as a module.

    Called with packed hidden states [R, layers_read, H], it returns what every block reads.

    Raises:
        InputError: the folder is missing or damaged.
    """
    folder = Path(path)
    try:
        document = read_json(folder / CONFIG, follow=True)
        tensors = load_tensors(folder / TENSORS)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no exported router: {error}") from error
    exported = parse(RouterRecord, document, str(folder / CONFIG))
    with torch.random.fork_rng(devices=[]):
        router = make_router(
            exported.routing,
            layers=exported.layers if exported.mixes is None else exported.features.layers,
            num_llm_layers=exported.num_llm_layers,
            num_blocks=exported.num_blocks,
            text_width=exported.text_width,
            mixes=exported.mixes,
        )
    try:
        router.load_state_dict(router_parameters(tensors))
    except RuntimeError as error:  # names or shapes of tensors
        raise InputError(f"{folder / TENSORS} does not fit {folder / CONFIG}: {error}") from error
    return router.eval().requires_grad_(False)


def router_parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a router, by name, among the tensors of ``router.safetensors``."""
    names = [name for name in tensors if name.startswith(_PARAMETERS)]
    return {name.removeprefix(_PARAMETERS): tensors[name] for name in names}
