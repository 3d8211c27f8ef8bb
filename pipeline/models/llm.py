"""The frozen LLM: batches of tokens -> hidden states of chosen layers, by forward hooks."""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ...schemas import InputError, ModelIdentity
from .hub import LOAD_ERRORS, ModelFiles
from .limits import Limits, limits_of, refuse_streams
from .rope import separate_captions, token_lengths
from .weights import (
    GGUF,
    LOADING_REPORT,
    SAFETENSORS,
    is_quantised,
    read_header,
    refuse_integers,
    refuse_misread,
)

Dtype = Literal["float32", "bfloat16"]
Sink = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class ModuleNames:
    """Names that a family of text towers in transformers gives its parts."""

    embedding: str
    blocks: str
    norm: str


MODULE_NAMES = (
    ModuleNames("embed_tokens", "layers", "norm"),  # Llama, Qwen, Gemma, Mistral and most since
    ModuleNames("embed_tokens", "block", "final_layer_norm"),  # T5, mT5, UMT5
    ModuleNames("embed_in", "layers", "final_layer_norm"),  # GPT-NeoX
    ModuleNames("wte", "h", "ln_f"),  # GPT-2
)
"""The known families: a model can be used if its text tower has these parts."""

_ENCODER_ONLY = {"t5", "mt5", "umt5"}
"""Model types for which transformers has a class without the decoder."""


@dataclass(frozen=True)
class TextTower:
    """The text tower of a model: the language model of a vision-language model, the encoder of an
    encoder-decoder.

    Attributes:
        module: the tower; called with ``input_ids`` and ``attention_mask``.
        name: its name inside the model, "" where the model is the tower.
        names: of its parts.
        causal: whether a token sees only those before it.
    """

    module: Any
    name: str
    names: ModuleNames
    causal: bool

    @property
    def blocks(self) -> torch.nn.ModuleList:
        blocks: torch.nn.ModuleList = getattr(self.module, self.names.blocks)
        return blocks

    @property
    def norm(self) -> torch.nn.Module:
        norm: torch.nn.Module = getattr(self.module, self.names.norm)
        return norm

    def keep_blocks(self, number: int) -> None:
        """Remove all blocks but the first ``number``."""
        setattr(self.module, self.names.blocks, self.blocks[:number])


def load_tokenizer(source: ModelFiles) -> Any:
    """Load the model's tokenizer, a fast one of transformers."""
    from transformers import AutoTokenizer

    try:
        folder = source.tokenizer or source.folder
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source.name}: transformers loads no tokenizer: {error}") from error


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the tokenizer's serialised state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(state.encode()).hexdigest()


def describe_model(source: ModelFiles) -> ModelIdentity:
    """Identity of the text tower, from the model's configuration; no weights are loaded.

    Raises:
        InputError: transformers does not know the model, or its text tower is of no known family;
            weights are missing in its files, or are there and not used.
    """
    tower = tower_without_weights(source)
    config = tower.module.config
    return ModelIdentity(
        architecture=config.model_type,
        num_layers=len(tower.blocks),
        width=config.hidden_size,
        causal=tower.causal,
        files=source.files,
    )


def attention_of(source: ModelFiles) -> str:
    """The attention implementation of transformers for the model: ``sdpa`` where its class has it,
    or ``eager`` (Gemma 2, whose scores have a soft cap).

    Raises:
        InputError: as :func:`describe_model`.
    """
    attention: str = tower_without_weights(source).module.config._attn_implementation
    return attention


def model_limits(source: ModelFiles) -> Limits:
    """What the model can read.

    Raises:
        InputError: as :func:`describe_model`.
    """
    return limits_of(tower_without_weights(source).module)


def check_streams(source: ModelFiles, layers: Sequence[int]) -> None:
    """Refuse layers that are several streams of hidden states.

    Raises:
        InputError: they are; or as :func:`describe_model`.
    """
    tower = tower_without_weights(source)
    refuse_streams(source.name, tower.module.config, layers, len(tower.blocks))


def find_tower(model: Any, name: str) -> TextTower:
    """Find the text tower in a model of transformers, and the names of its parts.

    Args:
        name: of the model, for the error.

    Raises:
        InputError: no family of :data:`MODULE_NAMES` fits; the message names the parts that the
            nearest one lacks.
    """
    encoder = model.get_encoder()
    module = model.get_decoder() if encoder is model else encoder
    missing = [
        [part for part in dataclasses.astuple(names) if not hasattr(module, part)]
        for names in MODULE_NAMES
    ]
    fewest = min(missing, key=len)
    names = MODULE_NAMES[missing.index(fewest)]
    if fewest:
        raise InputError(
            f"{name}: {type(module).__name__}, the text tower of {type(model).__name__}, is of no "
            f"known form; it lacks {', '.join(fewest)}. Expected a decoder LLM such as Llama, "
            "Qwen, Gemma or Mistral, a vision-language model around one, or a T5 encoder."
        )
    (path,) = [path for path, part in model.named_modules() if part is module]
    bidirectional = encoder is not model or (
        getattr(module.config, "use_bidirectional_attention", None) is True  # EmbeddingGemma
    )
    return TextTower(module, path, names, causal=not bidirectional)


def parse_layers(
    text: str,
    num_layers: int,
    final_norm: Literal["normed", "raw", "both"] = "normed",
    *,
    embedding: bool = False,
    option: str = "--layers",
) -> list[int]:
    """Layers by name: ``all``, ``every:3``: each third counted back from the last; or ``1-10,17``.

    Layer 0 is the embedding output, l the output of block l. The last block has two layers: L is
    its output after the final norm, L + 1 before it.

    Args:
        num_layers: L.
        final_norm: which of the two ``all`` and ``every`` take as the last. ``normed``: there is no
            layer L + 1.
        embedding: whether ``all`` begins with layer 0.
        option: of the command line, named in messages.

    Raises:
        InputError: another form, a layer that does not exist, or one named twice.
    """
    last = {"normed": [num_layers], "raw": [num_layers + 1], "both": [num_layers, num_layers + 1]}
    if text == "all":
        return [*range(0 if embedding else 1, num_layers), *last[final_norm]]
    if match := re.fullmatch(r"every:([1-9]\d*)", text):
        return [*sorted(range(num_layers, 0, -int(match[1])))[:-1], *last[final_norm]]
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise InputError(f"{option} {text!r}: expected all, every:3, or numbers such as 1-10,17")
    layers: list[int] = []
    for part in text.split(","):
        first, highest = int(part.partition("-")[0]), int(part.rpartition("-")[2])
        _check_layer(max(first, highest), num_layers, final_norm, option)
        if first > highest:
            raise InputError(
                f"{option}: {part} ends before it begins; did you mean {highest}-{first}?"
            )
        layers += range(first, highest + 1)
    if len(set(layers)) < len(layers):
        raise InputError(f"{option} {text!r} names a layer twice")
    return sorted(layers)


def _check_layer(layer: int, num_layers: int, final_norm: str, option: str) -> None:
    raw = num_layers + 1
    if layer <= num_layers or (layer == raw and final_norm != "normed"):
        return
    known = f"the model has layers 0 to {num_layers}"
    if final_norm != "normed":
        known += f", and {raw}, which is {num_layers} before the final norm"
    elif layer == raw:
        known += f"; with --final-norm raw or both, {raw} is {num_layers} before the final norm"
    raise InputError(f"{option}: no layer {layer}; {known}")


class Encoder:
    """A loaded text tower that hands over one layer at a time.

    Args:
        source: from :func:`find_model`.
        layers: ascending, see :func:`parse_layers`. Blocks above the last one are not run.
        dtype: of the LLM's weights and activations.
        device: default: the first GPU, or the CPU.

    Raises:
        InputError: as :func:`describe_model`.
    """

    def __init__(
        self, source: ModelFiles, layers: Sequence[int], dtype: Dtype, device: str | None = None
    ) -> None:
        self.layers = list(layers)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, loaded = _make(
            source,
            "from_pretrained",
            source.folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            **LOADING_REPORT,
        )
        self.tower = find_tower(model, source.name)
        refuse_misread(source.name, self.tower.module, loaded, self.tower.name)
        self._ropes = separate_captions(self.tower.module)
        num_layers = len(self.tower.blocks)
        # Layer 0 is the input of the first block: some models scale their embedding or add to it.
        self._needs_input = self.layers[0] == 0
        self.tower.keep_blocks(max(1, min(self.layers[-1], num_layers)))
        self.tower.module.eval().requires_grad_(False).to(self.device)
        outputs = [*self.tower.blocks]  # of layers 1, 2, ...
        outputs[num_layers - 1 :] = [self.tower.norm, *outputs[num_layers - 1 :]]
        self._outputs = {
            index: outputs[layer - 1] for index, layer in enumerate(self.layers) if layer > 0
        }

    @property
    def takes_positions(self) -> bool:
        """True if the tower accepts the position of each token in its caption."""
        return "position_ids" in inspect.signature(self.tower.module.forward).parameters

    @torch.inference_mode()
    def encode(
        self,
        sequences: Sequence[np.ndarray],
        kept: Sequence[int] | Sequence[np.ndarray],
        sink: Sink,
        row: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Run one batch.

        Args:
            sequences: token ids of each caption, template included.
            kept: first token of each sequence whose hidden states are wanted; or the numbers of all
                that are, ascending, int64.
            sink: called as ``sink(index, rows)`` for each layer in turn, ``index`` into ``layers``;
                ``rows`` are the hidden states of the wanted tokens of all sequences, one after the
                other, ``[tokens, H]`` in the LLM's dtype, on its device. Only that layer is alive,
                and with the last one that before the final norm.
            row: the row of the batch in which each sequence stands, ascending from 0. Sequences
                that share a row are packed one after the other. Positions that start anew keep
                them apart: transformers derives its masks from them
                (``masking_utils.find_packed_sequence_indices``). Whether a model respects them has
                to be tested (:mod:`semroute.pipeline.models.packing`). Default: each sequence in a
                row of its own, padded on the right.

        Raises:
            InputError: a block gives something else than one vector per token.
        """
        inputs, wanted = lay_out(sequences, kept, row)
        shape = inputs["input_ids"].shape
        if self._ropes:
            rows = np.arange(len(sequences)) if row is None else row
            lengths = token_lengths(sequences, rows, shape).to(self.device)
            for rope in self._ropes:
                rope.lengths = lengths
        # Indices instead of a mask: a device would have to count a mask, and the CPU to wait.
        chosen = wanted.flatten().nonzero().squeeze(1).to(self.device)
        waiting: dict[int, torch.Tensor] = {}
        turn = 0

        def hand_over(index: int, hidden: torch.Tensor) -> None:
            """In the order of layers: what goes into the final norm comes before its output."""
            nonlocal turn
            if hidden.shape[:-1] != shape:
                raise InputError(
                    f"layer {self.layers[index]} of {type(self.tower.module).__name__} is "
                    f"{[*hidden.shape]} for {[*shape]} tokens; expected one vector per token. "
                    "Take other --layers or another LLM"
                )
            waiting[index] = hidden.flatten(0, 1).index_select(0, chosen)
            while turn in waiting:
                sink(turn, waiting.pop(turn))
                turn += 1

        def receive(_module: Any, inputs: Any) -> None:
            hand_over(0, inputs[0])

        def give(index: int) -> Callable[[Any, Any, Any], None]:
            def take(_module: Any, _inputs: Any, output: Any) -> None:
                hand_over(index, output[0] if isinstance(output, tuple) else output)  # [B, T, H]

            return take

        handles = [
            module.register_forward_hook(give(index)) for index, module in self._outputs.items()
        ]
        if self._needs_input:
            handles.append(self.tower.blocks[0].register_forward_pre_hook(receive))
        try:
            self.tower.module(
                **{name: values.to(self.device) for name, values in inputs.items()},
                use_cache=False,
            )
        finally:
            for handle in handles:
                handle.remove()


def lay_out(
    sequences: Sequence[np.ndarray],
    kept: Sequence[int] | Sequence[np.ndarray],
    row: Sequence[int] | np.ndarray | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Arrange a batch as inputs of transformers.

    Sequences a (3 tokens), b (2) and c (4), packed into rows 0, 0 and 1::

        input_ids      a a a b b    position_ids   0 1 2 0 1
                       c c c c .                   0 1 2 3 0

    Args: as for :meth:`Encoder.encode`.

    Returns:
        ``input_ids`` and ``attention_mask``, or, where sequences share a row, ``position_ids``:
        int64 ``[B, T]`` each; and which tokens are wanted, bool ``[B, T]``.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    row = np.arange(len(lengths)) if row is None else np.asarray(row)
    ends = np.cumsum(lengths)
    first_of_row = np.searchsorted(row, row)
    stops = ends - (ends - lengths)[first_of_row]  # of each sequence, in its row
    shape = (int(row[-1]) + 1, int(stops.max()))
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    positions = torch.zeros_like(tokens)  # that of padding always exists
    for r, stop, sequence, rows in zip(row, stops, sequences, kept, strict=True):
        start = stop - len(sequence)
        tokens[r, start:stop] = torch.from_numpy(sequence)
        mask[r, start:stop] = 1
        if isinstance(rows, np.ndarray):
            wanted[r, start + torch.from_numpy(rows)] = True
        else:
            wanted[r, start + rows : stop] = True
        positions[r, start:stop] = torch.arange(len(sequence))
    if shape[0] < len(sequences):
        return {"input_ids": tokens, "position_ids": positions}, wanted
    return {"input_ids": tokens, "attention_mask": mask}, wanted


def _config(source: ModelFiles) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise InputError(f"{source.name}: not a model that transformers knows: {error}") from error


@functools.lru_cache(maxsize=1)
def tower_without_weights(source: ModelFiles) -> TextTower:
    """The text tower on the meta device, in which all weights of the files have a place."""
    config = _config(source)
    if not any(name.endswith((SAFETENSORS, GGUF)) for name in source.files):
        return _tower_of_config(source, config)
    try:
        if is_quantised(source.name, config):
            # Its method may need a device that only workers have, and names of its own.
            return _tower_of_config(source, config)
        unknown = None
    except InputError as error:
        unknown = error
    model, loaded = _make(
        source, "from_pretrained", source.folder, device_map="meta", **LOADING_REPORT
    )
    tower = find_tower(model, source.name)
    refuse_misread(source.name, tower.module, loaded, tower.name)
    files = sorted(source.folder.glob(f"*{SAFETENSORS}"))
    headers = {file.name: read_header(file, "--model") for file in files}
    refuse_integers(source.name, tower.module, headers)
    if unknown is not None:
        raise unknown
    return tower


def _tower_of_config(source: ModelFiles, config: Any) -> TextTower:
    with torch.device("meta"):
        return find_tower(_make(source, "from_config", config), source.name)


def _make(source: ModelFiles, constructor: str, *arguments: Any, **options: Any) -> Any:
    """Make the model without heads: ``from_config`` or ``from_pretrained`` of the fitting class."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.utils import logging

    encoder_only = _config(source).model_type in _ENCODER_ONLY
    auto = AutoModelForTextEncoding if encoder_only else AutoModel
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # heads are left out on purpose; transformers lists them
    logging.disable_progress_bar()
    try:
        return getattr(auto, constructor)(*arguments, trust_remote_code=False, **options)
    except LOAD_ERRORS as error:
        raise InputError(f"{source.name}: transformers cannot load it: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
