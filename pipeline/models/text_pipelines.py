"""The text half of a pipeline of diffusers: captions -> exactly what its transformer is given.

Only tokenizers and text encoders are loaded, and texts go through the pipeline's own
``encode_prompt``. How each class of pipelines reads text is in
:mod:`semroute.pipeline.models.text_recipes`.

Shapes: B captions, T rows, K base layers, H text width.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ...schemas import MASK, InputError
from ...schemas.json_file import read_json
from .hub import LOAD_ERRORS, PIPELINE_INDEX, ModelFiles, download, hash_file, hub_name, is_hub_id
from .llm import Dtype, find_tower, load_tokenizer, tokenizer_digest
from .rope import separate_captions
from .text_recipes import NEGATIVE, Encoded, find_recipe
from .weights import LOADING_REPORT, check_files, refuse_misread

_TEXT_COMPONENTS = ("tokenizer", "text_encoder")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_NOT_PASSED = ("self", "prompt", "negative_prompt")
"""Parameters of ``encode_prompt`` whose default in ``__call__`` is not taken."""


def find_text_pipeline(name: str, option: str = "--pipeline") -> ModelFiles:
    """Locate a pipeline: its folder, or a hub id (``org/name@revision``).

    Tokenizers, and configurations and safetensors of text encoders, are downloaded from the hub.

    Args:
        option: of the command line, named in messages.

    Returns:
        Where it is. ``files`` has the sha256 of the text encoders' files, and for each tokenizer
        that of its state and of its chat template.

    Raises:
        InputError: no such pipeline, one of a class that is not known, or one without safetensors.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        source = str(folder)
    elif is_hub_id(name):
        folder = download(name, [PIPELINE_INDEX], option)
        source = hub_name(name, folder)
        components = _text_components(read_index(folder, name, option))
        folder = download(source, [*_patterns(components)], option)
    else:
        raise InputError(
            f"{option} {name}: no such folder, and not a hub id (org/name); expected a pipeline of "
            "diffusers"
        )
    index = read_index(folder, name, option)
    recipe = find_recipe(index.get("_class_name"), name, option)
    lacking = {recipe.encoder, recipe.tokenizer} - {*_text_components(index)}
    if lacking:
        raise InputError(
            f"{option} {name}: {PIPELINE_INDEX} has no {' and no '.join(sorted(lacking))}, the "
            "LLM whose "
            "layers are read; expected a pipeline that was saved with it (save_pretrained)"
        )
    files: dict[str, str] = {}
    for component in _text_components(index):
        where = folder / component
        if component.startswith("tokenizer"):
            check_files(where, [], option)
            tokenizer = load_tokenizer(ModelFiles(f"{option} {name}/{component}", where, {}))
            files[component] = tokenizer_digest(tokenizer)
            if isinstance(template := tokenizer.chat_template, str):
                files[f"{component}/chat_template"] = _sha256(template)
        else:
            files |= {f"{component}/{f.name}": hash_file(f) for f in _model_files(where, option)}
    return ModelFiles(source, folder, files)


def read_index(folder: Path, name: str, option: str = "--pipeline") -> dict[str, Any]:
    """``model_index.json`` of a pipeline.

    Args:
        name: of the pipeline, and option: of the command line, for messages.

    Raises:
        InputError: missing or damaged.
    """
    try:
        index = read_json(folder / PIPELINE_INDEX, follow=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{option} {name}: no {PIPELINE_INDEX} there; expected a pipeline of diffusers"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{option} {name}: {folder / PIPELINE_INDEX} is not JSON: {error}"
        ) from error
    if not isinstance(index, dict):
        raise InputError(f"{option} {name}: {folder / PIPELINE_INDEX} is no JSON object")
    return index


def open_text_pipeline(
    name: str, device: str = "cpu", dtype: Dtype = "float32", option: str = "--pipeline"
) -> "TextPipeline":
    """Open the text half of a pipeline; weights are loaded when first needed.

    Args:
        name, option: as for :func:`find_text_pipeline`.
        device, dtype: of the text encoders.

    Raises:
        InputError: as :func:`find_text_pipeline`.
    """
    return TextPipeline(find_text_pipeline(name, option), device, dtype)


class TextPipeline:
    """Tokenizers and text encoders of a pipeline, and its own way to use them.

    Args:
        source: from :func:`find_text_pipeline`.
        device, dtype: of the text encoders.

    Attributes:
        recipe: how its class reads text.
        index: its ``model_index.json``.

    Raises:
        InputError: the LLM has fewer layers than the pipeline reads.
    """

    def __init__(self, source: ModelFiles, device: str = "cpu", dtype: Dtype = "float32") -> None:
        self.source = source
        self.device = torch.device(device)
        self.dtype = dtype
        self.index = read_index(source.folder, source.name)
        self.recipe = find_recipe(self.index.get("_class_name"), source.name)
        highest = max(self.recipe.layers(self.num_layers, self.index))
        if highest > self.num_layers:
            raise InputError(
                f"{source.name}: {self.recipe.pipeline} reads layer {highest}, but the LLM in "
                f"{self.recipe.encoder} has {self.num_layers}"
            )

    @cached_property
    def _config(self) -> Any:
        """Configuration of the LLM of the base layers."""
        from transformers import AutoConfig

        folder = self.source.folder / self.recipe.encoder
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise InputError(f"{folder}: not a model that transformers knows: {error}") from error
        return config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Number of layers of the LLM."""
        return int(self._config.num_hidden_layers)

    @property
    def num_known_tokens(self) -> int:
        """Rows of its embedding."""
        return int(self._config.vocab_size)

    @property
    def width(self) -> int:
        """Width of its hidden states, H."""
        return int(self._config.hidden_size)

    @cached_property
    def base_layers(self) -> list[int]:
        """LLM layers that the transformer reads, in the order of its taps: 0 is the embedding, L
        the last layer after the final norm, L + 1 the same before it."""
        layers = self.recipe.layers(self.num_layers, self.index)
        last = self.num_layers + (self.recipe.final_norm == "raw")
        return [last if layer == self.num_layers else layer for layer in layers]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the LLM."""
        name = f"{self.source.name}/{self.recipe.tokenizer}"
        return load_tokenizer(ModelFiles(name, self.source.folder / self.recipe.tokenizer, {}))

    @cached_property
    def max_length(self) -> int:
        """Rows that ``encode_prompt`` pads captions to, or cuts them at."""
        call = inspect.signature(self._class.__call__).parameters
        return int(call["max_sequence_length"].default)

    @cached_property
    def attends_padding(self) -> bool:
        """Whether the LLM runs without a mask, so that tokens attend to padding."""
        with self._watched(self._token_pipe) as seen:
            self._token_pipe.encode_prompt(**self._arguments_for("a"))
        return bool(seen) and seen[-1][2] is None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """What the pipeline gives its transformer for captions, by name, and the mask of rows.

        Captions are run one at a time, so that none depends on the others. "" is encoded as the
        pipeline encodes the negative prompt "" when guidance is on.

        Returns:
            Tensors ``[B, ...]`` in the dtype of the pipeline, on its device. Where the transformer
            reads no padding, only the captions' own rows are kept and padded with zeros to the
            longest; otherwise all rows are. ``mask`` is bool ``[B, T]``: the captions' own rows of
            ``recipe.rows``.
        """
        captions = [self.encode_one(text) for text in texts]
        return {
            name: torch.nn.utils.rnn.pad_sequence([c[name] for c in captions], batch_first=True)
            for name in captions[0]
        }

    def encode_one(self, text: str) -> Encoded:
        """As :meth:`encode` of one caption, without the axis of captions and without padding."""
        outputs, _ = self._run(self.pipe, text)
        return self._own_rows(outputs)

    def rows(self, encoded: Mapping[str, torch.Tensor], index: int) -> torch.Tensor:
        """A caption's own rows in the base layers, in order: ``[T, K, H]``.

        Args:
            encoded: from :meth:`encode`.
        """
        own = encoded[self.recipe.rows][index][encoded[MASK][index]]
        return self.recipe.view(own, len(self.base_layers))

    def tokens(self, text: str) -> np.ndarray:
        """Token ids of a caption's own rows, int64 ``[T]``, by the pipeline's own code; no weights.

        Text encoders are stood in for by modules whose hidden states are the token ids.
        """
        outputs, ids = self._run(self._token_pipe, text)
        if not self.recipe.reads_padding:
            ids = self._own_rows(outputs)[self.recipe.rows].flatten(1)[:, 0]
        return ids.long().cpu().numpy()

    def sequence(self, text: str) -> np.ndarray:
        """Token ids that the LLM reads for a caption, template included: int64 ``[T]``; no weights.
        Empty where the pipeline runs the LLM in parts (Ideogram 4)."""
        return self._run(self._token_pipe, text)[1].long().cpu().numpy()

    @torch.inference_mode()
    def final_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """The LLM's final norm of rows of its last layer, ``[..., H]``."""
        name = f"{self.source.name}/{self.recipe.encoder}"
        norm = find_tower(getattr(self.pipe, self.recipe.encoder), name).norm
        return norm(rows.to(self.device, getattr(torch, self.dtype)))

    def _own_rows(self, outputs: Encoded) -> Encoded:
        """One caption's outputs, without the rows that the transformer does not read."""
        if self.recipe.reads_padding:
            return {name: values[0] for name, values in outputs.items()}
        (mask,) = outputs[MASK]
        return {name: values[0][mask] for name, values in outputs.items()}

    @torch.inference_mode()
    def _run(self, pipe: Any, text: str) -> tuple[Encoded, torch.Tensor]:
        """Outputs of ``encode_prompt`` for one caption, ``[1, ...]`` each; and the tokens that the
        LLM attended to."""
        recipe = self.recipe
        guided = recipe.has_negative and not text
        with self._watched(pipe) as seen:
            values = pipe.encode_prompt(**self._arguments_for(text))
        outputs = {
            name.removeprefix(NEGATIVE): value
            for name, value in zip(recipe.outputs, values, strict=True)
            if name is not None and name.startswith(NEGATIVE) == guided
        }
        outputs = recipe.arrange(outputs)
        rows, mask = outputs[recipe.rows], outputs.pop(MASK, None)
        if mask is None and MASK in recipe.outputs:  # Qwen-Image: all rows are the caption's
            mask = rows.new_ones(rows.shape[:2])
        ids, attended, _ = seen[-1] if seen else (rows.new_zeros(0), None, None)
        mask = torch.as_tensor(attended if mask is None else mask).to(rows.device, torch.bool)
        # Rows of another encoder come first (SD3).
        mask = torch.nn.functional.pad(mask, (rows.shape[1] - mask.shape[1], 0))
        return {**outputs, MASK: mask}, ids if attended is None else ids[attended]

    @contextmanager
    def _watched(self, pipe: Any) -> Iterator[list[tuple[Any, Any, Any]]]:
        """Of each call of the LLM: token ids, which of them are no padding, and the mask that it
        was given or None; ``[1, T]`` each."""
        llm = getattr(pipe, self.recipe.encoder)
        signature = inspect.signature(type(llm).forward)
        seen: list[tuple[Any, Any, Any]] = []

        def record(module: Any, args: Any, kwargs: Any) -> None:
            given = signature.bind(module, *args, **kwargs).arguments
            ids, mask = given["input_ids"], given.get("attention_mask")
            own = ids != self.tokenizer.pad_token_id if mask is None else mask.bool()
            seen.append((ids, own, mask))

        handle = llm.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()

    @cached_property
    def _class(self) -> Any:
        """The pipeline's class."""
        try:
            import diffusers
        except ImportError as error:
            raise InputError(
                f"{self.source.name}: {self.recipe.pipeline} is a class of diffusers, which is not "
                "installed: pip install 'semroute[vae]'"
            ) from error
        found = getattr(diffusers, self.recipe.pipeline, None)
        if found is None:
            raise InputError(
                f"{self.source.name}: diffusers {diffusers.__version__} has no "
                f"{self.recipe.pipeline}; expected a later version"
            )
        return _text_half(found) if self.recipe.needs_networks else found

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ``encode_prompt``: what ``__call__`` passes on by default."""
        call = inspect.signature(self._class.__call__).parameters
        names = inspect.signature(self._class.encode_prompt).parameters
        defaults = {
            name: call[name].default
            for name, parameter in names.items()
            if name in call
            and name not in _NOT_PASSED
            and (call[name].default is not None or parameter.default is parameter.empty)
        }
        return {**defaults, **self.recipe.arguments}

    def _arguments_for(self, text: str) -> dict[str, Any]:
        arguments = {**self.arguments, "prompt": [text], "device": self.device}
        if self.recipe.has_negative:  # "" stands for the negative prompt, which comes with guidance
            arguments["do_classifier_free_guidance"] = not text
            arguments["negative_prompt"] = ""
        return arguments

    @cached_property
    def pipe(self) -> Any:
        """The pipeline with its text encoders.

        Raises:
            InputError: weights are missing in their files, or are there and not used.
        """
        names = [name for name in _text_components(self.index) if name.startswith("text_encoder")]
        for name in names:
            self._check_weights(name)
        pipe = self._load(encoders=True)
        for name in names:
            encoder = getattr(pipe, name).eval().requires_grad_(False)
            separate_captions(encoder)  # from captions before, too
            encoder.to(self.device)
        return pipe

    def _check_weights(self, component: str) -> None:
        """Refuse weights of a text encoder that diffusers would leave out or make up."""
        import transformers
        from transformers.utils import logging

        folder, name = self.source.folder / component, f"{self.source.name}/{component}"
        cls = getattr(transformers, self.index[component][1], None)
        if cls is None:
            raise InputError(
                f"{name}: transformers {transformers.__version__} has no "
                f"{self.index[component][1]}; expected a later version"
            )
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model, loaded = cls.from_pretrained(
                folder, device_map="meta", use_safetensors=True, **LOADING_REPORT
            )
        except LOAD_ERRORS as error:
            raise InputError(f"{name}: transformers cannot load it: {error}") from error
        finally:
            logging.set_verbosity(verbosity)
        refuse_misread(name, model, loaded, heads=False)

    @cached_property
    def _token_pipe(self) -> Any:
        """The pipeline with modules in place of its text encoders that give back token ids."""
        pipe = self._load(encoders=False)
        for name in _text_components(self.index):
            if name.startswith("text_encoder"):
                pooled = self.index[name][1].endswith("WithProjection")  # CLIP
                setattr(pipe, name, _TokenReader(self.num_layers + 1, self.device, pooled))
        if self.recipe.tapped:
            num = len(self.base_layers)
            setattr(pipe, self.recipe.tapped, lambda _, ids, *_args: [_as_states(ids)] * num)
        return pipe

    def _load(self, *, encoders: bool) -> Any:
        """The pipeline without any network but its text encoders."""
        from diffusers.utils import logging

        wanted = _TEXT_COMPONENTS if encoders else _TEXT_COMPONENTS[:1]
        parameters = inspect.signature(self._class.__init__).parameters.values()
        names = {p.name for p in parameters if p.default is p.empty and p.name != "self"}
        names |= {*_components(self.index)}
        absent = {name: None for name in names if not name.startswith(wanted)}
        if self.recipe.needs_networks:
            absent = {n: None for n in absent if n.startswith(_TEXT_COMPONENTS)}
        logging.disable_progress_bar()
        try:
            pipe = self._class.from_pretrained(
                self.source.folder,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                local_files_only=True,
                **absent,
            )
        except LOAD_ERRORS as error:
            raise InputError(f"{self.source.name}: diffusers cannot load it: {error}") from error
        if hasattr(pipe, "transformer"):  # FIBO asks for its dtype
            pipe.transformer = SimpleNamespace(dtype=getattr(torch, self.dtype))
        return pipe


class _TokenReader(torch.nn.Module):
    """Stands in for a text encoder: each value of its hidden states is the token itself, H = 2.

    Args:
        num_states: number of hidden states.
        pooled: whether the first output is one vector per caption.
    """

    dtype = torch.float32  # exact up to 2^24

    def __init__(self, num_states: int, device: torch.device, pooled: bool) -> None:
        super().__init__()
        self.num_states, self.device, self.pooled = num_states, device, pooled

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> "_TokenStates":
        states = _as_states(input_ids)
        first = states[:, 0] if self.pooled else states
        return _TokenStates(first, [states] * self.num_states)


class _TokenStates:
    """Output of :class:`_TokenReader`, in the forms in which pipelines ask for it."""

    def __init__(self, first: torch.Tensor, states: list[torch.Tensor]) -> None:
        self.first, self.last_hidden_state, self.hidden_states = first, states[-1], states

    def __getitem__(self, _index: int) -> torch.Tensor:
        return self.first


def _as_states(ids: torch.Tensor) -> torch.Tensor:
    return ids[..., None].float().repeat(1, 1, 2)


def _text_half(pipeline: Any) -> Any:
    """A class of pipelines whose constructor takes nothing but tokenizer and text encoder."""
    from diffusers import DiffusionPipeline

    class TextHalf(pipeline):
        def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
            DiffusionPipeline.__init__(self)
            self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder)

    return TextHalf


def _components(index: Mapping[str, Any]) -> list[str]:
    """Names of a pipeline's parts that are there: (library, class) in ``model_index.json``."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
    ]


def _text_components(index: Mapping[str, Any]) -> list[str]:
    """Names of its tokenizers and text encoders.

    Raises:
        InputError: one of them is not of transformers, but perhaps code of the pipeline's author.
    """
    names = [name for name in _components(index) if name.startswith(_TEXT_COMPONENTS)]
    foreign = [name for name in names if index[name][0] != "transformers"]
    if foreign:
        raise InputError(
            f"{PIPELINE_INDEX}: {foreign[0]} is {'.'.join(index[foreign[0]])}; expected a class of "
            "transformers, since code of a pipeline is not run"
        )
    return names


def _patterns(components: Sequence[str]) -> Iterator[str]:
    """Files of a pipeline to download."""
    yield PIPELINE_INDEX
    for component in components:
        is_tokenizer = component.startswith("tokenizer")
        files = _TOKENIZER_FILES if is_tokenizer else ("*.json", *_WEIGHTS)
        yield from (f"{component}/{file}" for file in files)


def _model_files(folder: Path, option: str) -> list[Path]:
    """Configuration and weights of a text encoder."""
    weights = [file for file in sorted(folder.glob("*")) if any(map(file.match, _WEIGHTS))]
    if not weights:
        raise InputError(f"{option}: no {_WEIGHTS[0]} in {folder}")
    check_files(folder, weights, option)
    return [folder / "config.json", *weights]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
