"""What a run on a pretrained network learned, as files that other programs load.

``lora`` and ``config`` are read by diffusers alone, ``comfyui`` by ComfyUI, ``weights`` by people
and node packs. What has no such form says so; ``pipeline`` holds all of it, for
``semroute.attach``.

Shapes: D mixes that the router makes, K base layers (taps), L layers.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ...schemas import InputError, LoraConfig, write_document
from ...schemas.atomic import whole_folder
from ...schemas.tensor_files import save_tensors
from ..adapters.approximation import Fit, exact_gains, fit_layers, linear_change, low_rank
from ..adapters.lora_files import find_loader, matrices_of, write_lora
from .adapter import Adapter, write_adapter
from .card import FIGURE, Content, fusion_weights, write_card

Kind: TypeAlias = Literal["pipeline", "lora", "comfyui", "weights", "config"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COMFYUI_FILE = "comfyui-{family}-layers.safetensors"
WEIGHTS, GAINS, CHOICE = "weights.json", "gains.txt", "layers.json"
_HERE = "path/of/this/folder"
_IMPORT, _IMPORT_PEFT = "\nimport semroute\n", "from peft import PeftModel\n"


@dataclass(frozen=True)
class Export:
    """An export that was written.

    Attributes:
        folder: where.
        note: how exact it is, in one line; empty if it is exact.
    """

    folder: Path
    note: str


def export_adapter(
    adapter: Adapter, out: str | os.PathLike[str], kind: Kind = "pipeline", rank: int | None = None
) -> Export:
    """Write what a run on a pretrained network learned into a new folder, with a README.

    Args:
        kind: ``lora``: for ``load_lora_weights`` of diffusers, or for peft where the pipeline has
            none; ``comfyui``: for ComfyUI's loader of LoRA; ``weights``: numbers of layers;
            ``config``: for each place, the layer of largest weight, as a setting of diffusers;
            ``pipeline``: everything, for ``semroute.attach``.
        rank: of LoRA that stands for gains of layers. Default: as many as make it exact.

    Raises:
        InputError: this cannot be expressed so, with what can; the folder is not empty; or the
            pretrained network or the features of the run are needed but missing.
    """
    folder = Path(out)
    reason = _WRITERS[kind].reason(adapter)
    if reason is not None:
        possible = [each for each in KINDS if _WRITERS[each].reason(adapter) is None]
        raise InputError(
            f"{adapter.path} cannot be exported as {kind}: {reason}. Choose --as "
            f"{' or '.join(possible)}."
        )
    if rank is not None and (kind != "lora" or not _is_linear(adapter)):
        raise InputError(
            "--rank is for --as lora of gains of layers (FLUX.2): any other has the rank that it "
            "was trained with"
        )
    with whole_folder(folder) as unfinished:
        content = _WRITERS[kind].write(adapter, unfinished, rank)
        files = sorted(p.name for p in unfinished.iterdir())
        write_card(adapter, unfinished, folder.resolve().name, content, [*files, FIGURE])
    return Export(folder, content.note)


# --------------------------------------------------------------------------------------- reasons


def _is_linear(adapter: Adapter) -> bool:
    """Whether what was learned is about weights of layers in front of one linear layer."""
    return (
        adapter.family.fusion == "gains" and "lora" not in adapter.parts and _layer(adapter) != ""
    )


def _layer(adapter: Adapter) -> str:
    """The linear layer that weights of layers belong to, or that reads the layers; "": none."""
    return adapter.family.fusion_layer[0]


def _why_no_layers(adapter: Adapter) -> str | None:
    """Why what was learned is not about weights of the layers that the network reads itself."""
    config, family = adapter.record.config, adapter.family
    if "fusion" in adapter.parts:
        return None
    if family.fusion is None:
        return f"{family.name} reads one layer of its LLM, so it has no weights of layers"
    if not adapter.parts & {"router", "gain"} or adapter.parts & {"projection", "network"}:
        return f"model.train={config.model.train} learned more than weights of layers"
    if config.routing.where == "blocks":
        return (
            "each block reads a mix of its own (routing.where: blocks), which no weight of the "
            "network expresses"
        )
    if "router" in adapter.parts and adapter.router.depends_on_t:
        return f"weights of strategy {config.routing.strategy} change with the noise level"
    return None


def _why_no_linear(adapter: Adapter) -> str | None:
    """Why what was learned is no change of one linear layer."""
    reason = _why_no_layers(adapter)
    if reason is None and not _layer(adapter):
        return (
            f"{adapter.family.name} normalises its layers together before a linear layer reads "
            "them, so that no change of that layer is a weight of one of them"
        )
    if reason is not None or "fusion" in adapter.parts or adapter.family.fusion == "gains":
        return reason
    return (
        f"the layers of {adapter.family.name} pass attention before they meet its projector, so "
        "no linear layer expresses a mix in front of that"
    )


def _why_no_lora(adapter: Adapter) -> str | None:
    return None if "lora" in adapter.parts else _why_no_linear(adapter)


def _why_no_comfyui(adapter: Adapter) -> str | None:
    if "lora" in adapter.parts:
        return (
            "ComfyUI reads LoRA with diffusers' own names for many families (comfy/lora.py lists "
            "them), so it may take the file of --as lora"
        )
    return _why_no_linear(adapter)


def _why_no_weights(adapter: Adapter) -> str | None:
    if "fusion" in adapter.parts or "gain" in adapter.parts:
        return None
    train = adapter.record.config.model.train
    if "router" not in adapter.parts:
        return f"model.train={train} learned no weights of layers"
    if adapter.router.depends_on_t or adapter.router.depends_on_content:
        strategy = adapter.record.config.routing.strategy
        return (
            f"weights of strategy {strategy} change with the noise level or the token "
            "(export --router tabulates them)"
        )
    return None


def _why_no_config(adapter: Adapter) -> str | None:
    if "router" not in adapter.parts:
        return f"model.train={adapter.record.config.model.train} has no router"
    if adapter.family.layers_setting is None:
        return f"no setting of diffusers names the layer that {adapter.family.name} reads"
    return None


# --------------------------------------------------------------------------------------- contents


def _open(adapter: Adapter, *arguments: str, imports: str = "") -> str:
    """Python that opens the base model; its last line ends in the arguments."""
    base = adapter.hub_base or str(adapter.record.config.model.pretrained)
    given = ", ".join([repr(base), "dtype=torch.bfloat16", *arguments])
    return (
        f"import torch\nfrom diffusers import DiffusionPipeline\n{imports}\n"
        f"pipe = DiffusionPipeline.from_pretrained({given})\n"
    )


def _write_pipeline(adapter: Adapter, folder: Path, _rank: int | None) -> Content:
    write_adapter(adapter, folder)
    return Content(
        f"What semroute learned for {adapter.family.name}, complete.",
        [
            (
                "With semroute",
                "python",
                f'{_open(adapter, imports=_IMPORT)}semroute.attach(pipe, "{_HERE}")\n'
                'pipe(prompt="a cat")\n',
            )
        ],
        [
            "All weights that were trained. `adapter.json` is the run's record; "
            "`router.safetensors` holds the routing weights as a table that any program can read, "
            "and LoRA lies apart in the format that diffusers or peft loads."
        ],
        tags=["diffusers"],
    )


def _write_lora(adapter: Adapter, folder: Path, rank: int | None) -> Content:
    loader, note = find_loader(adapter.identity), ""
    if "lora" in adapter.parts:
        config = adapter.record.config.model.lora or LoraConfig()
        matrices = matrices_of(adapter.trained, config)
        holds = ["LoRA of the transformer; its scale, alpha / rank, is part of the matrices."]
        if "router" in adapter.parts:
            note = "LoRA alone, without the router that it was trained with"
            holds += [
                "It was trained beside a router, which is not in this file: alone it is not what "
                "was trained. `semroute export --as pipeline` holds both."
            ]
    else:
        layer, _ = adapter.family.fusion_layer
        change, holds, note = _linear(adapter)
        product, error = low_rank(change, rank)
        matrices = {layer: product}
        if error:
            size = len(product[0])
            note = _joined(note, f"rank {size} of {min(change.shape)}, error {error:.3g}")
            holds += [
                f"The change of {layer!r} has rank {min(change.shape)}; this file has rank {size}, "
                f"which leaves an error of {error:.3g} relative to the change. `--rank` sets it; "
                "without, the file is exact."
            ]
    write_lora(folder, matrices, loader, adapter.hub_base)
    if loader:
        how = f'{_open(adapter)}pipe.load_lora_weights("{_HERE}")\npipe(prompt="a cat")\n'
    else:
        how = (
            f"{_open(adapter, imports=_IMPORT_PEFT)}# Adds it to pipe.transformer itself.\n"
            f'PeftModel.from_pretrained(pipe.transformer, "{_HERE}")\npipe(prompt="a cat")\n'
        )
    about = f"LoRA for {adapter.family.name}, trained by semroute from stored hidden states."
    name = "With diffusers" if loader else "With diffusers and peft"
    return Content(about, [(name, "python", how)], holds, note, ["lora", "diffusers"])


def _write_comfyui(adapter: Adapter, folder: Path, _rank: int | None) -> Content:
    change, holds, note = _linear(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    file = COMFYUI_FILE.format(family=adapter.family.name)
    key = f"diffusion_model.{adapter.family.fusion_layer[1]}.diff"
    save_tensors({key: change.contiguous()}, folder / file, {"format": "pt"})
    how = (
        f"Copy `{file}` into `ComfyUI/models/loras` and load it with the node "
        "*LoraLoaderModelOnly*. Strength 1 is what was learned, 0 the base model. The file holds "
        f"one tensor, `{key}`, which ComfyUI adds to the weight of that name."
    )
    about = f"Weights of layers for {adapter.family.name} in ComfyUI, learned from data."
    return Content(about, [("With ComfyUI", "", how)], holds, note, ["comfyui"])


def _linear(adapter: Adapter) -> tuple[Tensor, list[str], str]:
    """The change of the linear layer that weighs or reads the layers; what it leaves out."""
    name = f"{adapter.family.fusion_layer[0]}.weight"
    weight = adapter.read_base(name).float()
    if adapter.family.fusion == "projector":
        exact = f"The change of `{name}`, exactly."
        return adapter.trained[f"transformer.{name}"].float() - weight, [exact], ""
    fit, holds, note = _fit(adapter, diagonal=False)
    holds = [f"The change of `{name}` by which it reads its layers with other weights.", *holds]
    return linear_change(weight, fit.matrix), holds, note


def _fit(adapter: Adapter, *, diagonal: bool) -> tuple[Fit, list[str], str]:
    """Weights of the network's own layers, and how exact they are."""
    num = len(adapter.identity.base_layers)
    if "fusion" in adapter.parts:
        return exact_gains(1 + adapter.trained["fusion_gain"].float()), ["It is exact."], ""
    pads = "Padding rows, which routing leaves as they are, change too."
    if "gain" in adapter.parts:
        gains = 1 + adapter.trained["gain"].float()
        return exact_gains(gains.expand(num)), [f"It is exact on rows of captions. {pads}"], pads
    router = adapter.learned_router
    hidden = adapter.read_hidden()
    fit = fit_layers(router, hidden, adapter.identity.base_layers, diagonal=diagonal)
    what = "a gain per layer" if diagonal else "weights of these layers alone"
    note = f"approximation by {what}: error {fit.error:.3g} of the learned change"
    holds = (
        f"It is an approximation by {what}, fitted to {len(hidden):,} tokens of the run's "
        f"captions. It misses {fit.error:.3g} of the learned change (0 is exact, 1 is nothing). "
        f"{pads}"
    )
    return fit, [holds], note


def _write_weights(adapter: Adapter, folder: Path, _rank: int | None) -> Content:
    base = adapter.identity.base_layers
    document: dict[str, Any] = {
        "format": "semroute.layer-weights",
        "family": adapter.family.name,
        "base_model": str(adapter.record.config.model.pretrained),
        "base_layers": base,
        "step": adapter.step,
    }
    gains: list[float | None] | None = None
    holds, note = [], ""
    if adapter.family.fusion == "projector" and "fusion" in adapter.parts:
        before, after = fusion_weights(adapter)
        gains = [new / old if old else None for old, new in zip(before, after, strict=True)]
        document |= {"weights": after, "weights_before": before, "gains": gains}
        holds += [
            f"`weights` are those of `{adapter.family.fusion_layer[0]}`, exactly; `gains` are "
            "these divided by the published ones, for nodes that scale the projector. Nodes that "
            "scale the conditioning in front of the layers' attention do something else with them."
        ]
    elif "gain" in adapter.parts and _why_no_layers(adapter) is not None:
        document["gains"] = (1 + adapter.trained["gain"].float()).tolist()
        holds += [
            "`gains` multiply the text that each block reads. No field of another program takes "
            "them."
        ]
        note = "no other program takes a gain per block"
    else:
        if "router" in adapter.parts:
            alpha = torch.from_numpy(adapter.weights()[0])
            document |= {"layers": adapter.layers, "added": (alpha - 1 / alpha.shape[1]).tolist()}
            holds += [
                "`added` [mixes, layers] are the weights of LN(h) that are added, in units of the "
                "deviation of the layer that the network reads; no other program takes them."
            ]
        if _why_no_layers(adapter) is None:
            fit, exactness, note = _fit(adapter, diagonal=True)
            gains = fit.matrix.diagonal().tolist()
            document |= {"gains": gains, "error": fit.error}
            holds += ["`gains` scale each layer that the network reads.", *exactness]
    folder.mkdir(parents=True, exist_ok=True)
    write_document(folder / WEIGHTS, json.dumps(document, indent=1) + "\n")
    use = [("As numbers", "json", json.dumps({"base_layers": base, "gains": gains}))]
    if gains is not None and None not in gains:
        line = ",".join(f"{gain:.6g}" for gain in gains)
        write_document(folder / GAINS, line + "\n")
        use = [("In a text field", "text", line), *_weights_in_diffusers(adapter, document)]
    about = f"Weights of layers for {adapter.family.name}, learned from data, as numbers."
    return Content(about, use, holds, note)


def _weights_in_diffusers(adapter: Adapter, document: dict[str, Any]) -> list[tuple[str, str, str]]:
    """How plain diffusers applies weights of layers."""
    layer = _layer(adapter)
    if "weights" in document:
        lines = (
            f"weight = pipe.transformer.{layer}.weight\n"
            f"weight.data.copy_(torch.tensor([{document['weights']}]))\n"
        )
    elif adapter.family.fusion == "gains" and layer:
        lines = (
            f"gains = torch.tensor({document['gains']})\n"
            f"weight = pipe.transformer.{layer}.weight  # reads the layers side by side\n"
            "weight.data.unflatten(1, (len(gains), -1)).mul_(gains.to(weight)[:, None])\n"
        )
    else:
        return []
    return [("With diffusers", "python", f'{_open(adapter)}{lines}pipe(prompt="a cat")\n')]


def _write_config(adapter: Adapter, folder: Path, _rank: int | None) -> Content:
    choice = choose_layers(adapter)
    setting = str(adapter.family.layers_setting)
    value = [layer - (setting == "llama_layers") for layer in choice.layers]
    opened, call = _open(adapter), f'pipe(prompt="a cat", {setting}={tuple(value)})'
    if setting == "llama_layers":
        call = f"pipe.transformer.register_to_config({setting}={value})"
    if setting == "text_encoder_select_layers":
        call = _open(adapter, f"{setting}={tuple(value)}").splitlines()[-1]
        opened = opened.rpartition("pipe = ")[0]
    how = f"{opened}{call}\n" + ("" if call.startswith("pipe(") else 'pipe(prompt="a cat")\n')
    document = {
        "format": "semroute.layer-choice",
        "family": adapter.family.name,
        "base_model": str(adapter.record.config.model.pretrained),
        setting: value,
        "layers": choice.layers,
        "base_layers": choice.base,
        "weights": choice.weights,
        "shares": choice.shares,
        "call": call,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_document(folder / CHOICE, json.dumps(document, indent=1) + "\n")
    changed = sum(a != b for a, b in zip(choice.layers, choice.base, strict=True))
    mean = sum(choice.shares) / len(choice.shares)
    note = (
        f"approximation: the chosen layers have {100 * mean:.0f} % of the weight on average, "
        f"{changed} of {len(value)} differ from the base"
    )
    holds = [
        "It is an approximation: in each place the network reads one layer, that of the largest "
        "learned weight, where the run reads a mix. `shares` says how much of the weight the "
        f"chosen layer has: {100 * min(choice.shares):.0f} % at the least, {100 * mean:.0f} % on "
        f"average. {changed} of {len(value)} layers differ from the base model's own"
        + (", so this setting changes nothing." if not changed else "."),
        "Another layer has other statistics than the one that the network was trained with; the "
        "run corrects for that, this setting does not.",
    ]
    about = f"A choice of layers for {adapter.family.name}, learned from data."
    use = [("With diffusers", "python", how)]
    return Content(about, use, holds, note, ["diffusers"])


@dataclass(frozen=True)
class Choice:
    """One layer for each place where a network reads a layer, counted as in the features.

    Attributes:
        layers: those of the largest weight. base: those of the pretrained network.
        weights: of the chosen layers, in LN units, where the layer of the base has 1 from the
            start. shares: the same, relative to the sum of the absolute weights of all layers.
    """

    layers: list[int]
    base: list[int]
    weights: list[float]
    shares: list[float]


def choose_layers(adapter: Adapter) -> Choice:
    """The layer of largest weight in each place where the network reads one.

    Weights that depend on t are averaged over it; those of several blocks that read the same
    places, over the blocks.
    """
    layers, base = adapter.layers, adapter.identity.base_layers
    if adapter.family.layers_setting == "llama_layers":
        places = [layer + 1 for layer in adapter.identity.config["llama_layers"]]
    else:
        places = [*base]
    alpha = torch.from_numpy(adapter.weights().mean(0))  # [D, L]
    added = alpha - 1 / len(layers)
    if len(added) > 1:
        added = added.unflatten(0, (-1, len(places))).mean(0)  # [K, L]
    weights = added.expand(len(places), -1).clone()
    for place, layer in enumerate(places):
        weights[place, layers.index(layer)] += 1
    best = weights.argmax(1)
    values = weights.gather(1, best[:, None])[:, 0]
    shares = values.abs() / weights.abs().sum(1)
    chosen = [layers[number] for number in best.tolist()]
    return Choice(chosen, places, values.tolist(), shares.tolist())


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


@dataclass(frozen=True)
class _Writer:
    """A kind of export: why an adapter cannot be expressed so (None: it can), and how it is
    written."""

    reason: Callable[[Adapter], str | None]
    write: Callable[[Adapter, Path, int | None], Content]


_WRITERS: dict[Kind, _Writer] = {
    "pipeline": _Writer(lambda _adapter: None, _write_pipeline),
    "lora": _Writer(_why_no_lora, _write_lora),
    "comfyui": _Writer(_why_no_comfyui, _write_comfyui),
    "weights": _Writer(_why_no_weights, _write_weights),
    "config": _Writer(_why_no_config, _write_config),
}
