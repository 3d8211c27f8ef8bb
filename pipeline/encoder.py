"""The frozen LLM: token batches -> hidden states of chosen layers, by forward hooks. No storage."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..schemas import InputError, ModelIdentity

Dtype = Literal["float32", "bfloat16"]
Sink = Callable[[int, torch.Tensor], None]

ATTENTION = "sdpa"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Attributes:
        name: as a user would name it again: ``org/name@commit``, a folder or a GGUF file.
        folder: what transformers loads.
        files: name -> sha256 of the files that decide the hidden states.
    """

    name: str
    folder: Path
    files: dict[str, str] = field(hash=False)


def find_model(name: str) -> Source:
    """Locate a model: a folder, a GGUF file (converted once, into a cache) or a hub id.

    A hub id may carry a revision: ``org/name@revision``. Of a hub model only configuration,
    tokenizer and safetensors are fetched.

    Raises:
        InputError: nothing there, or nothing that transformers could load.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path.resolve()), path.resolve(), _hash_files(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"--model {name}: a file must be a .gguf; for safetensors name the folder that "
                "holds config.json"
            )
        digest = _sha256(path)
        return Source(str(path.resolve()), _convert_gguf(path, digest), {path.name: digest})
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return _download(name)
    raise InputError(f"--model {name}: no such folder or file, and no hub id (org/name)")


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer (a fast one, transformers)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source.name}: no tokenizer that transformers loads: {error}") from error


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the tokenizer's serialised state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return hashlib.sha256(state.encode()).hexdigest()


def describe_model(source: Source) -> ModelIdentity:
    """Identity of the text decoder, from its configuration; no weights are loaded.

    Raises:
        InputError: not a transformer that transformers knows.
    """
    config = _text_config(source)
    return ModelIdentity(
        architecture=config.model_type,
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        files=source.files,
    )


def parse_layers(text: str, num_layers: int) -> list[int]:
    """``all`` -> 1..L; ``every:3`` -> each third, counted back from L; ``5,11,17`` -> those.

    0 is the embedding output, l the output of block l, L the output after the final norm.

    Raises:
        InputError: another form, a layer that does not exist, or one named twice.
    """
    if text == "all":
        return list(range(1, num_layers + 1))
    if match := re.fullmatch(r"every:([1-9]\d*)", text):
        return sorted(range(num_layers, 0, -int(match[1])))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"--layers {text!r}: expected all, every:3, or numbers such as 5,11,17")
    layers = [int(part) for part in text.split(",")]
    unknown = [layer for layer in layers if layer > num_layers]
    if unknown:
        raise InputError(f"--layers: no layer {unknown[0]}; the model has layers 0 to {num_layers}")
    if len(set(layers)) < len(layers):
        raise InputError(f"--layers {text!r} names a layer twice")
    return sorted(layers)


class Encoder:
    """A loaded LLM that hands over one layer at a time.

    Args:
        source: from :func:`find_model`.
        layers: ascending, see :func:`parse_layers`. Blocks above the last one are not run.
        dtype: in which the LLM runs.
        device: default: the first GPU, or the CPU.
    """

    def __init__(
        self, source: Source, layers: Sequence[int], dtype: Dtype, device: str | None = None
    ) -> None:
        from transformers import AutoModel

        self.layers = list(layers)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            model = AutoModel.from_pretrained(
                source.folder,
                dtype=getattr(torch, dtype),
                attn_implementation=ATTENTION,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{source.name}: transformers cannot load it: {error}") from error
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        missing = [
            part for part in ("layers", "norm", "embed_tokens") if not hasattr(decoder, part)
        ]
        if missing:
            raise InputError(
                f"{source.name}: {type(decoder).__name__} is no decoder-only transformer of the "
                f"known form; it lacks {', '.join(missing)}"
            )
        num_layers = len(decoder.layers)
        if self.layers[-1] < num_layers:
            decoder.layers = decoder.layers[: self.layers[-1]]
            decoder.config.num_hidden_layers = self.layers[-1]
        self.decoder = decoder.eval().requires_grad_(False).to(self.device)
        self._modules = [
            decoder.embed_tokens
            if layer == 0
            else decoder.norm
            if layer == num_layers
            else decoder.layers[layer - 1]
            for layer in self.layers
        ]

    @torch.inference_mode()
    def encode(self, sequences: Sequence[np.ndarray], kept: Sequence[int], sink: Sink) -> None:
        """Run one batch, padded on the right.

        Args:
            sequences: token ids of each caption, template included.
            kept: first row wanted of each sequence.
            sink: called as ``sink(index, rows)`` for each layer in turn, ``index`` into ``layers``;
                ``rows`` are the wanted rows of all sequences, packed, ``[rows, H]`` in the LLM's
                dtype, on its device. Only that layer is alive.
        """
        lengths = [len(sequence) for sequence in sequences]
        tokens = torch.zeros(len(sequences), max(lengths), dtype=torch.long)  # [B, T]
        mask = torch.zeros_like(tokens)  # [B, T]
        wanted = torch.zeros_like(tokens, dtype=torch.bool)  # [B, T]
        for row, (sequence, first) in enumerate(zip(sequences, kept, strict=True)):
            tokens[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
            wanted[row, first : len(sequence)] = True
        wanted = wanted.to(self.device)

        def hook(index: int) -> Callable[[Any, Any, Any], None]:
            def take(_module: Any, _inputs: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output  # [B, T, H]
                sink(index, hidden[wanted])

            return take

        handles = [
            module.register_forward_hook(hook(index)) for index, module in enumerate(self._modules)
        ]
        try:
            self.decoder(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                use_cache=False,
            )
        finally:
            for handle in handles:
                handle.remove()


def _text_config(source: Source) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        config = config.get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source.name}: no model that transformers knows: {error}") from error
    if not getattr(config, "num_hidden_layers", 0) or not getattr(config, "hidden_size", 0):
        raise InputError(
            f"{source.name}: {type(config).__name__} has no num_hidden_layers and hidden_size; "
            "expected a transformer"
        )
    return config


def _hash_files(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.suffix == _WEIGHTS or p.name == "config.json")
    if not any(file.name == "config.json" for file in files):
        raise InputError(f"--model {folder}: no config.json in this folder")
    if not any(file.suffix == _WEIGHTS for file in files):
        raise InputError(f"--model {folder}: no .safetensors in this folder")
    return {file.name: _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    # The hub's cache names large files by their sha256, which saves reading them.
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(name: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub_id, _, revision = name.partition("@")
    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision or None, allow_patterns=_HUB_FILES)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"--model {name}: no such folder here, and not to be had from the hub: {error}"
        ) from error
    return Source(f"{hub_id}@{folder.name}", folder, _hash_files(folder))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEMROUTE_CACHE") or Path(base) / "semroute")


def _convert_gguf(file: Path, digest: str) -> Path:
    """De-quantise once: transformers takes ten times longer to load a GGUF than safetensors."""
    folder = _cache_folder() / "gguf" / digest[:32]
    if folder.is_dir():
        return folder
    from transformers import AutoModel, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        try:
            arguments = {"gguf_file": file.name}
            model = AutoModel.from_pretrained(file.parent, dtype=torch.float32, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
        except ImportError as error:
            raise InputError(
                f"--model {file}: reading GGUF needs the package gguf; pip install 'semroute[gguf]'"
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--model {file}: transformers cannot read it: {error}") from error
        # The weights are plain float32 now; transformers still marks the model as quantised
        # and would refuse to save it.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
