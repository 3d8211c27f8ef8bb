"""The README of an exported adapter: what it is, how it is loaded, and what is untried."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipeline.style import DPI
from ...schemas import LoraConfig, write_document
from ...schemas.escaping import code, fenced, in_markdown
from ..adapters.lora_files import matrices_of
from ..plots.adapters import layer_weights, lora_sizes
from ..plots.routing import routing_heatmap

if TYPE_CHECKING:
    from ...pipeline.style import Figure
    from .adapter import Adapter

FIGURE = "weights.png"
_ROWS = {"input": "input", "taps": "layer that the network reads", "blocks": "block"}


@dataclass(frozen=True)
class Content:
    """What an export holds, for its card.

    Attributes:
        about: a sentence: what it is.
        use: how it is loaded: headings, each with the language and text of a code block, or with
            prose if the language is empty.
        holds: how exact it is, and what is missing, as paragraphs.
        note: the same in one line, for the command line; empty if it is exact.
        tags: for the Hub.
    """

    about: str
    use: Sequence[tuple[str, str, str]]
    holds: Sequence[str] = ()
    note: str = ""
    tags: Sequence[str] = field(default_factory=tuple)


def write_card(
    adapter: "Adapter", folder: Path, title: str, content: Content, files: Sequence[str]
) -> None:
    """Write ``README.md`` and the figure of the weights into a folder.

    Args:
        title: of the document.
        files: that the export wrote.
    """
    _figure(adapter).savefig(folder / FIGURE, dpi=DPI)
    document = "\n".join(
        [
            *_front_matter(adapter, content),
            f"# {in_markdown(title)}",
            "",
            content.about,
            "",
            *_facts(adapter, files),
            f"![Weights]({FIGURE})",
            "",
            *(line for part in content.use for line in _how(*part)),
            "## What it holds",
            "",
            *(line for paragraph in content.holds for line in (paragraph, "")),
            "## What is untried",
            "",
            "The format was tested on small models with random weights, on a CPU, in float32, with "
            f"diffusers {in_markdown(adapter.record.versions.get('diffusers', ''))}. Untried: "
            "published weights, GPUs, bfloat16"
            + (", and ComfyUI itself." if "comfyui" in content.tags else "."),
            "",
            "## Text",
            "",
            "Hidden states were extracted with this text around each caption:",
            "",
            *fenced(adapter.record.features.template.text, "text"),
        ]
    )
    write_document(folder / "README.md", document.rstrip("\n") + "\n")


def _front_matter(adapter: "Adapter", content: Content) -> list[str]:
    """Facts for the Hub, in YAML; quoted as in JSON, which is YAML too."""
    base = adapter.hub_base
    tags = ["semroute", "text-to-image", *content.tags]
    return [
        "---",
        *([] if base is None else [f"base_model: {json.dumps(base)}"]),
        "library_name: diffusers",
        f"tags: {json.dumps(tags)}",
        "---",
        "",
    ]


def _facts(adapter: "Adapter", files: Sequence[str]) -> list[str]:
    record, identity = adapter.record, adapter.identity
    routing, model, llm = record.config.routing, record.config.model, record.features.model
    trained = f"{code(model.train)}"
    if "router" in adapter.parts:
        trained += f", strategy {code(routing.strategy)}, {code(routing.weights)} weights"
    if {"router", "gain"} & adapter.parts:
        trained += f", at {code(routing.where)}"
    digests = [
        f"{code(name)} {code(digest[:12])}"
        for name, digest in identity.files.items()
        if name.endswith(".safetensors")
    ]
    rows = {
        "Base model": f"{code(str(model.pretrained))}, {code(identity.transformer)} "
        f"({in_markdown(identity.family)})",
        "Its weights (sha256)": ", ".join(digests[:4]) + (", ..." if len(digests) > 4 else ""),
        "Text encoder": f"{code(record.model_source)}, {llm.num_layers} layers of width "
        f"{llm.width}",
        "Layers that the base reads": ", ".join(map(str, identity.base_layers)),
        "Layers in the features": _listed(record.features.layers),
        "Trained": trained,
        "Step": f"{adapter.step:,} of {record.config.steps:,}, "
        + ("moving average" if adapter.source == "ema" else "last weights"),
        "Files": ", ".join(code(name) for name in files),
    }
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return ["| | |", "|---|---|", *lines, ""]


def _listed(layers: Sequence[int]) -> str:
    """Layers in order; the first and the last if there is no gap."""
    if [*layers] == [*range(layers[0], layers[-1] + 1)]:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _how(heading: str, language: str, text: str) -> list[str]:
    body = fenced(text, language) if language else [text, ""]
    return [f"## {heading}", "", *body]


def _figure(adapter: "Adapter") -> "Figure":
    """The weights of layers that were learned; of LoRA alone, the size of its changes."""
    parts, base = adapter.parts, adapter.identity.base_layers
    where = adapter.record.config.routing.where
    if "router" in parts:
        mean = " (mean over t)" if adapter.router.depends_on_t else ""
        title = f"Routing weights{mean}: what differs from uniform is added"
        several = adapter.num_blocks > 1 and where == "blocks" and len(base) > 1
        rows = "block and layer" if several and adapter.family.name != "hidream" else _ROWS[where]
        return routing_heatmap(adapter.weights().mean(0), adapter.layers, title, rows)
    if "fusion" in parts:
        before, after = fusion_weights(adapter)
        title = "Weights of the layers that the network reads"
        what = "gain" if adapter.family.fusion == "gains" else "weight"
        return layer_weights(before, after, base, title, "LLM layer", what)
    if "gain" in parts:
        gains = (1 + adapter.trained["gain"].float()).tolist()
        before, numbers = [1.0] * len(gains), [*range(1, len(gains) + 1)]
        return layer_weights(before, gains, numbers, "Gain of text", _ROWS[where], "gain")
    matrices = matrices_of(adapter.trained, adapter.record.config.model.lora or LoraConfig())
    norms = {name: float((second @ first).norm()) for name, (first, second) in matrices.items()}
    return lora_sizes(norms, "LoRA: size of the change to each linear layer")


def fusion_weights(adapter: "Adapter") -> tuple[list[float], list[float]]:
    """The weights of layers of a network that has its own, before and after training."""
    if adapter.family.fusion == "gains":
        gains = 1 + adapter.trained["fusion_gain"].float()
        return [1.0] * len(gains), gains.tolist()
    name = f"{adapter.family.fusion_layer[0]}.weight"
    before, after = adapter.read_base(name), adapter.trained[f"transformer.{name}"]
    return before.float().flatten().tolist(), after.float().flatten().tolist()
