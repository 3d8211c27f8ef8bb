"""Prompts encoded for a pipeline of diffusers, by its own text encoders, with what a run learned.

On disk, a safetensors file::

    prompt_embeds, prompt_attention_mask, ...   as the pipeline takes them, one item per prompt;
                                                items of a list as prompt_embeds.0, .1, ...
    semroute.hidden                             LLM layers of the tokens, [R, L, H]; if needed
    semroute.offsets                            int64 [N + 2]: prompt i has tokens offsets[i] to
                                                offsets[i + 1], and the negative prompt the last
    metadata "semroute"                         schemas.EmbedsRecord

Shapes: N prompts, B batch, T text rows, R tokens of all prompts, L layers, K base layers, H text
width.
"""

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...pipeline.executor.workers import own_device
from ...pipeline.models.hub import PIPELINE_INDEX, find_model, is_hub_id
from ...pipeline.models.llm import describe_model, find_tower
from ...pipeline.models.text_pipelines import open_text_pipeline
from ...schemas import EmbedsRecord, InputError, parse, write_whole
from ...schemas.json_file import load_json
from ...schemas.tensor_files import open_tensors
from ...schemas.verbosity import progress_bar
from ..adapters.arguments import ARGUMENTS, TEXT_ONLY, Arguments
from ..adapters.captures import Captures
from ..adapters.families import FAMILIES
from ..adapters.pipeline import TextReader
from ..runs.adapter import Adapter, is_export, load_adapter
from ..runs.record import adapt
from .fit import check_encoder

if TYPE_CHECKING:
    from ...pipeline.models.text_pipelines import TextPipeline
    from ..adapters.routed import Routed

SUFFIX = ".safetensors"
NEGATIVE = "negative_"
_OWN = "semroute"
_HIDDEN, _OFFSETS = f"{_OWN}.hidden", f"{_OWN}.offsets"
_NETWORK = "transformer."


@dataclass(frozen=True)
class Embeds:
    """Prompts that were encoded for a pipeline.

    Attributes:
        record: how.
        given: tensors, or lists of them, by argument of the pipeline.
        hidden: layers of the tokens of each prompt, and of the negative prompt, [R, L, H] each;
            empty unless ``record.learned`` is ``layers``.
    """

    record: EmbedsRecord
    given: Mapping[str, Any]
    hidden: Sequence[Tensor]

    @property
    def usage(self) -> str:
        """What the pipeline needs besides its arguments; "": nothing."""
        if self.record.learned == "layers":
            return "Blocks read text of their own: semroute.attach(pipe, RUN, embeds=OUT) adds it."
        if self.record.network:
            return (
                "The run changed weights of the transformer: semroute.attach(pipe, RUN, "
                "embeds=OUT) loads them, or semroute export RUN."
            )
        return ""

    def captures(self, names: Arguments, config: Mapping[str, Any]) -> Captures:
        """The tokens of the prompts.

        Args:
            names: arguments of the pipeline.
            config: of its transformer.
        """
        captures = Captures(self.record.layers, self.record.base_layers, max_calls=None)
        rows = [*names.read(self.given[names.embeds], config)]  # [T, K, H] each
        if NEGATIVE + names.embeds in self.given:
            rows.append(names.read(self.given[NEGATIVE + names.embeds], config)[0])
        for hidden, each in zip(self.hidden, rows, strict=True):
            captures.add(hidden, each)
        return captures


def embed(
    run: str | os.PathLike[str],
    prompts: Sequence[str],
    out: str | os.PathLike[str],
    *,
    negative: str | None = None,
    pipeline: str | None = None,
    step: int | None = None,
    weights: Literal["ema", "model"] | None = None,
) -> Embeds:
    """Encode prompts as a pipeline does, and add what a run on its network learned.

    Where blocks read text of their own, or by noise level, that cannot be added to embeddings: the
    file then holds the layers of the LLM besides.

    Args:
        run: the run directory, a folder that semroute export --as pipeline wrote, or a pipeline of
            diffusers, its folder or hub id: then prompts are encoded, and nothing is added.
        out: a .safetensors file; it is replaced if it exists.
        negative: negative prompt. Default: the empty one, if the pipeline takes one.
        pipeline: where the pipeline is. Default: where it was when the run was trained.
        step: step of the checkpoint. Default: the newest.
        weights: the exponential moving average, which is the default, or the weights themselves.

    Raises:
        InputError: no prompts; no such run; a pipeline that does not fit it; one that takes no
            negative prompt, or no embeddings.
    """
    path = Path(out)
    if path.suffix != SUFFIX:
        raise InputError(f"{path} is no name of a safetensors file: let it end in {SUFFIX}")
    if not prompts:
        raise InputError("there are no prompts to encode")
    adapter = None
    if _is_pipeline(run):
        if pipeline is not None or step is not None or weights is not None:
            raise InputError(f"{run} is a pipeline: leave out --pipeline, --step and --weights")
        text = open_text_pipeline(str(run), own_device(), option="RUN")
    else:
        adapter = load_adapter(run, step, weights)
        text = _open_pipeline(adapter, pipeline)
    encoder = _Encoder(adapter, text)
    if negative is not None and not encoder.takes_negative:
        raise InputError(f"{encoder.pipeline} takes no negative prompt: leave it out")
    items = [encoder.encode(prompt) for prompt in progress_bar(prompts, unit="prompt")]
    given = _join(items, encoder.names)
    if encoder.takes_negative:
        item = encoder.encode(negative or "", negative=True)
        items.append(item)
        repeated = _join([item] * len(prompts), encoder.names)
        given |= {NEGATIVE + name: value for name, value in repeated.items()}
    record = EmbedsRecord(
        pipeline=encoder.pipeline,
        model=describe_model(find_model(str(text.source.folder / text.recipe.encoder)))
        if adapter is None
        else adapter.record.features.model,
        base_layers=text.base_layers if adapter is None else adapter.identity.base_layers,
        prompts=[*prompts],
        negative=(negative or "") if encoder.takes_negative else None,
        learned=encoder.learned,
        layers=encoder.layers,
        network=adapter is not None and any(n.startswith(_NETWORK) for n in adapter.trained),
        step=adapter and adapter.step,
        weights=adapter and adapter.source,
    )
    hidden = [item.hidden for item in items if item.hidden is not None]
    embeds = Embeds(record, given, hidden)
    _write(embeds, path)
    return embeds


@dataclass(frozen=True)
class _Item:
    """One prompt: tensors by argument of the pipeline, with a batch of one; and its layers."""

    given: Mapping[str, Any]
    hidden: Tensor | None


class _Encoder:
    """The text half of a pipeline, and what a run makes of it."""

    def __init__(self, adapter: Adapter | None, text: "TextPipeline") -> None:
        self.pipeline = text.recipe.pipeline
        family = next((f.name for f in FAMILIES if self.pipeline in f.pipelines), None)
        self.names = TEXT_ONLY[text.recipe.family] if family is None else ARGUMENTS[family]
        if not self.names.embeds:
            raise InputError(
                f"{self.pipeline} takes no embeddings: give it prompts, where a run is attached"
            )
        call = inspect.signature(type(text.pipe).__call__).parameters
        self.takes_negative = NEGATIVE + self.names.embeds in call
        self._text = text
        self.learned: Literal["added", "layers", "none"] = "none"
        self.layers: list[int] = []
        if adapter is not None:
            self._add(adapter, text)

    def _add(self, adapter: Adapter, text: "TextPipeline") -> None:
        """Let the text be read as a run does."""
        self._config = adapter.identity.config
        routed = _without_network(adapter)
        captures = Captures(routed.router.layers_read, routed.base_layers)
        self._reader = TextReader(routed, captures)
        if routed.deviates:
            encoder = getattr(text.pipe, self.names.encoder)
            tower = find_tower(encoder, self.names.encoder)
            captures.watch(encoder, tower, text.num_layers, text.tokenizer.pad_token_id)
            in_blocks = routed.hooked or routed.router.depends_on_t
            self.learned = "layers" if in_blocks else "added"
            self.layers = captures.layers if in_blocks else []
        elif routed.fusion_gain is not None:
            self.learned = "added"

    @torch.no_grad()
    def encode(self, prompt: str, negative: bool = False) -> _Item:
        """One prompt, with what the run learned added or its layers beside it."""
        given = _encode(self._text, self.names, prompt, negative)
        name = self.names.embeds
        hidden = None
        if self.learned != "none":
            rows = self.names.read(given[name], self._config)
            if self.learned == "added":
                source = self._reader.read(rows)
                given[name] = self.names.write(given[name], source.text.base)
            else:
                tokens, numbers = self._reader.find(rows)
                own = numbers[numbers < len(tokens)]
                hidden = tokens[own.to(tokens.device)].cpu()
        on_cpu = {
            name: [each.cpu() for each in value] if isinstance(value, list) else value.cpu()
            for name, value in given.items()
        }
        return _Item(on_cpu, hidden)


def _is_pipeline(run: str | os.PathLike[str]) -> bool:
    """Whether this names a pipeline, in a folder or on the hub, and nothing that was learned."""
    path = Path(run)
    if path.exists():
        return (path / PIPELINE_INDEX).exists() and not is_export(path)
    return is_hub_id(str(run))


def _open_pipeline(adapter: Adapter, pipeline: str | None) -> "TextPipeline":
    """The text half of the pipeline, which fits the run."""
    record, identity = adapter.record, adapter.identity
    name, option = pipeline, "--pipeline"
    if name is None:
        name, option = str(record.config.model.pretrained), "model.pretrained"
    text = open_text_pipeline(name, own_device(), record.features.dtype, option)
    if text.recipe.pipeline not in adapter.family.pipelines:
        raise InputError(
            f"{option} {name} is a {text.recipe.pipeline}, but {adapter.path} adapted a "
            f"{identity.transformer}, which {' and '.join(adapter.family.pipelines)} have"
        )
    check_encoder(text.pipe, record, adapter.path)
    layers = adapter.family.base_layers(text.num_layers, text.index, identity.config)
    if layers != identity.base_layers:
        raise InputError(
            f"{option} {name} reads layers {layers} of its text encoder, but {adapter.path} was "
            f"trained for a pipeline that reads layers {identity.base_layers}"
        )
    return text


def _without_network(adapter: Adapter) -> "Routed":
    """What the run learned about text, on a network without weights."""
    import diffusers

    cls = getattr(diffusers, adapter.identity.transformer)
    with torch.device("meta"):
        network = cls.from_config(dict(adapter.identity.config))
    routed = adapt(adapter.record, network, trainable=False)
    own = {n: value for n, value in adapter.trained.items() if not n.startswith(_NETWORK)}
    routed.load_state_dict(own, strict=False)
    return routed.requires_grad_(False)


def _encode(text: "TextPipeline", names: Arguments, prompt: str, negative: bool) -> dict[str, Any]:
    """What the pipeline's own ``encode_prompt`` gives for one prompt, by argument."""
    arguments = {**text.arguments, "prompt": [prompt], "device": text.device}
    beside = negative and text.recipe.has_negative  # the negative prompt comes with another
    if text.recipe.has_negative:
        arguments |= {"do_classifier_free_guidance": negative, "negative_prompt": [prompt]}
    outputs = zip(names.encoded, text.pipe.encode_prompt(**arguments), strict=True)
    given = {
        name.removeprefix(NEGATIVE): value
        for name, value in outputs
        if name is not None and name.startswith(NEGATIVE) == beside
    }
    for name, value in given.items():
        if name.endswith("mask"):
            given[name] = _mask(value, given[names.embeds])
    return given


def _mask(value: Tensor | None, rows: Tensor) -> Tensor:
    """A mask [1, T] as a pipeline gives it: Qwen-Image gives none where all rows are the prompt's,
    and AuraFlow one value per number [1, T H]."""
    if value is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    return value.unflatten(1, (rows.shape[1], -1))[:, :, 0]


def _join(items: Sequence[_Item], names: Arguments) -> dict[str, Any]:
    """Items of one prompt each as a batch, padded with zeros to the longest."""
    joined: dict[str, Any] = {}
    for name in items[0].given:
        values = [item.given[name] for item in items]
        if isinstance(values[0], list):
            joined[name] = [rows for value in values for rows in value]
            continue
        axis = names.axis if name == names.embeds else 0
        rows = [value.movedim(axis, 0)[0] for value in values]
        if axis:  # [layers, T, H], whose T is fixed
            joined[name] = torch.stack(rows).movedim(0, axis)
        else:
            joined[name] = pad_sequence(rows, batch_first=True)
    return joined


def _write(embeds: Embeds, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name, value in embeds.given.items():
        if isinstance(value, list):
            tensors |= {f"{name}.{number}": each for number, each in enumerate(value)}
        else:
            tensors[name] = value
    if embeds.hidden:
        lengths = torch.tensor([0, *map(len, embeds.hidden)])
        tensors |= {_HIDDEN: torch.cat([*embeds.hidden]), _OFFSETS: lengths.cumsum(0)}
    # Clones: safetensors refuses tensors that share memory, such as one negative prompt for all.
    own = torch.contiguous_format
    whole = {name: value.clone(memory_format=own) for name, value in tensors.items()}
    write_whole(path, save(whole, {_OWN: embeds.record.model_dump_json()}))


def _parts(hidden: Tensor | None, offsets: Tensor | None, path: Path) -> Sequence[Tensor]:
    """The LLM layers of each prompt."""
    if hidden is None and offsets is None:
        return []
    if hidden is not None and offsets is not None and hidden.dim() and offsets.dim() == 1:
        lengths = offsets.diff()
        is_whole = offsets.dtype == torch.int64 and len(lengths) and int(offsets[0]) == 0
        if is_whole and int(lengths.min()) >= 0 and int(offsets[-1]) == len(hidden):
            return hidden.split(lengths.tolist())
    raise InputError(f"{path} is damaged: {_OFFSETS} does not divide {_HIDDEN} among prompts")


def read_embeds(file: str | os.PathLike[str]) -> Embeds:
    """Read what :func:`embed` wrote.

    Raises:
        InputError: no such file, or another one.
    """
    path = Path(file)
    try:
        with open_tensors(path) as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"{path} holds no embeddings: {error}") from error
    if _OWN not in metadata:
        raise InputError(f"{path} is not a file of semroute embed")
    record = parse(EmbedsRecord, load_json(metadata[_OWN], f"{_OWN} of {path}"), str(path))
    hidden, offsets = tensors.pop(_HIDDEN, None), tensors.pop(_OFFSETS, None)
    parts = _parts(hidden, offsets, path)
    given: dict[str, Any] = {}
    for name, value in tensors.items():
        argument, mark, number = name.partition(".")
        if mark:
            if not re.fullmatch("[0-9]{1,4}", number) or argument in tensors:
                raise InputError(f"{path} is damaged: it holds a tensor {name!r}")
            given.setdefault(argument, {})[int(number)] = value
        else:
            given[name] = value
    for name, value in given.items():
        if isinstance(value, dict):
            given[name] = [value[number] for number in sorted(value)]
    return Embeds(record, given, [*parts])
