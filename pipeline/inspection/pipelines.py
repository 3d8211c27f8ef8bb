"""What a pipeline of diffusers reads of text, from its configuration; no weights are needed.

Shapes: T rows of a caption, K base layers, H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas import InputError
from ...schemas.json_file import read_json
from ..models.hub import PIPELINE_INDEX, download, hub_name, is_hub_id
from ..models.text_pipelines import read_index
from ..text.presets import PRESETS, OtherRows, Preset, preset_of

if TYPE_CHECKING:
    from ..extraction.plan import Plan

_CONFIGS = [PIPELINE_INDEX, "*/config.json"]
BYTES_PER_VALUE = 2
"""Of bfloat16, in which pipelines run."""


@dataclass(frozen=True)
class PipelineText:
    """The text half of a pipeline.

    Attributes:
        name: names it again on a command line.
        pipeline: its class.
        preset_name: the preset with which captions are extracted for it.
        index: its ``model_index.json``.
        configs: ``config.json`` by component.
    """

    name: str
    pipeline: str
    preset_name: str
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]

    @property
    def preset(self) -> Preset:
        return PRESETS[self.preset_name]

    @property
    def model(self) -> str:
        """Names its LLM for ``--model``.

        Raises:
            InputError: the pipeline comes without it.
        """
        encoder = self.preset.encoder
        if encoder not in self.configs:
            raise InputError(
                f"--for {self.name} has no {encoder}: name the LLM that the pipeline is run with "
                "by --model"
            )
        where, _, revision = self.name.partition("@")
        return f"{where}/{encoder}{f'@{revision}' if revision else ''}"

    def base_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers that its network reads, where its configuration names them, or those of the
        preset; in its order, each once.

        Args:
            num_layers: L, of the LLM.
        """
        taps = self.index.get("text_encoder_select_layers")  # Krea 2: hidden states
        blocks = self.configs.get("transformer", {}).get("llama_layers")  # HiDream: blocks, from 0
        if self.preset_name == "krea2" and taps:
            return tuple(taps)
        if self.preset_name == "hidream" and blocks:
            return tuple(dict.fromkeys(block + 1 for block in blocks))
        return self.preset.base_layers(num_layers)

    def conditioning_bytes(self, plan: Plan) -> float:
        """Bytes of a caption in a store of conditioning, on average over captions."""
        model, rows = plan.identity.model, float(plan.captions.num_tokens.mean())
        own = self.preset.length if self.preset.reads_padding else rows
        values = own * len(self.base_layers(model.num_layers)) * model.width
        for other in self.preset.others:
            width = self._width(other, model.width)
            values += other.rows * width
        return values * BYTES_PER_VALUE

    def _width(self, other: OtherRows, width: int) -> int:
        if other.encoder == self.preset.encoder:
            return width
        config = self.configs.get(other.encoder, {})
        key = "projection_dim" if other.pooled else "d_model"
        if not isinstance(config.get(key), int):
            raise InputError(f"--for {self.name}: {other.encoder}/config.json has no {key}")
        return int(config[key])


def read_pipeline(name: str, option: str = "--for") -> PipelineText:
    """Read the configuration of a pipeline.

    Args:
        name: its folder, or a hub id (``org/name@revision``), of which only configuration is
            downloaded.
        option: of the command line, named in messages.

    Raises:
        InputError: no such pipeline, or none that there is a preset for.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        source = str(folder)
    elif is_hub_id(name):
        folder = download(name, _CONFIGS, option)
        source = hub_name(name, folder)
    else:
        raise InputError(
            f"{option} {name}: no such folder, and not a hub id (org/name); expected a pipeline of "
            "diffusers"
        )
    index = read_index(folder, name, option)
    pipeline = index.get("_class_name")
    preset = preset_of(str(pipeline))
    if preset is None:
        known = sorted({each for preset in PRESETS.values() for each in preset.pipelines})
        raise InputError(
            f"{option} {name}: there is no preset for {pipeline}; expected one of "
            f"{', '.join(known)}"
        )
    configs = {file.parent.name: _read_json(file) for file in sorted(folder.glob("*/config.json"))}
    return PipelineText(source, str(pipeline), preset, index, configs)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file, follow=True))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} is not the configuration of a model: {error}") from error
