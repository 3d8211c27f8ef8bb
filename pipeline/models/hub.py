"""Models found: on the Hugging Face Hub, in folders and in GGUF files."""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...schemas import InputError
from ...schemas.atomic import make_folder
from ...schemas.tensor_files import make_readable, system_errors

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ".safetensors"
_GGUF = ".gguf"
PIPELINE_INDEX = "model_index.json"
"""What a pipeline of diffusers has in its folder, above those of its components."""
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError)
"""Raised by transformers when it cannot load a model."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        name: names it again on a command line: ``org/name@commit``, a folder or a GGUF file.
        folder: for transformers to load.
        files: name -> sha256 of the files that determine the hidden states.
        tokenizer: folder of the tokenizer, where it is another one: in a pipeline of diffusers.
    """

    name: str
    folder: Path
    files: dict[str, str] = field(hash=False)
    tokenizer: Path | None = None


def find_model(
    name: str, option: str = "--model", with_code: bool = False, weights: bool = True
) -> ModelFiles:
    """Locate a model: a folder, a GGUF file (converted once, into a cache) or a hub id.

    A hub id may carry a revision: ``org/name@revision``. Only configuration, tokenizer and
    safetensors of a hub model are downloaded. The text encoder of a diffusers pipeline is named by
    its folder there, ``PIPELINE/text_encoder`` or ``org/name/text_encoder@revision``; its tokenizer
    is the one beside it.

    Args:
        option: of the command line, named in messages.
        with_code: download the code of a hub model too.
        weights: without, neither needed nor read: enough for configuration and tokenizer.

    Raises:
        InputError: no such model, or none that transformers could load; a file of weights is
            missing, cut off or a pointer of Git LFS.
    """
    from .weights import check_gguf

    path = Path(name).expanduser()
    if path.is_dir():
        folder = path.resolve()
        tokenizer = _tokenizer_beside(folder, option)
        return ModelFiles(str(folder), folder, _hash_files(path, option, weights), tokenizer)
    if path.is_file():
        if path.suffix != _GGUF:
            raise InputError(
                f"{option} {name}: a file must be a .gguf; for safetensors name the folder that "
                "contains config.json"
            )
        check_gguf(path, option)
        digest = hash_file(path)
        return ModelFiles(str(path.resolve()), _convert_gguf(path, digest), {path.name: digest})
    wanted = [file for file in _HUB_FILES if weights or not file.endswith(_WEIGHTS)]
    if is_hub_id(name):
        folder = download(name, [*wanted, *(["*.py"] if with_code else [])], option)
        return ModelFiles(hub_name(name, folder), folder, _hash_files(folder, option, weights))
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)/(text_encoder\w*)(@[\w./-]+)?", name):
        hub_id, component, revision = match.groups(default="")
        parts = [component, *_tokenizer_names(component)]
        patterns = [f"{part}/{file}" for part in parts for file in wanted]
        root = download(hub_id + revision, [PIPELINE_INDEX, *patterns], option)
        folder = root / component
        tokenizer = _tokenizer_beside(folder, option)
        known = f"{hub_id}/{component}@{root.name}"
        return ModelFiles(known, folder, _hash_files(folder, option, weights), tokenizer)
    raise InputError(f"{option} {name}: no such folder or file, and not a hub id (org/name)")


def _tokenizer_names(component: str) -> list[str]:
    """Where the tokenizer of a text encoder may be in its pipeline: ``tokenizer_2`` for
    ``text_encoder_2``."""
    number = component.removeprefix("text_encoder")
    return [f"tokenizer{number}", f"processor{number}"]


def _tokenizer_beside(folder: Path, option: str) -> Path | None:
    """The folder of the tokenizer of a pipeline's text encoder; None for any other model."""
    from .weights import check_files

    if not (folder.parent / PIPELINE_INDEX).exists():
        return None
    names = _tokenizer_names(folder.name)
    for name in names:
        if (folder.parent / name).is_dir():
            check_files(folder.parent / name, [], option)
            return folder.parent / name
    raise InputError(
        f"{option} {folder}: the pipeline has no tokenizer for it; expected a folder "
        f"{' or '.join(names)} beside it"
    )


def _hash_files(folder: Path, option: str, weights: bool = True) -> dict[str, str]:
    from .weights import check_files

    wanted = {_WEIGHTS} if weights else set()
    files = sorted(p for p in folder.iterdir() if p.suffix in wanted or p.name == "config.json")
    if (folder / PIPELINE_INDEX).exists():
        raise InputError(
            f"{option} {folder} is a pipeline of diffusers; name its text encoder, such as "
            f"{folder / 'text_encoder'}"
        )
    if not any(file.name == "config.json" for file in files):
        raise InputError(f"{option} {folder}: no config.json in this folder")
    if weights and not any(file.suffix == _WEIGHTS for file in files):
        raise InputError(f"{option} {folder}: no .safetensors in this folder")
    if weights:
        check_files(folder, [file for file in files if file.suffix == _WEIGHTS], option)
    return {file.name: hash_file(file) for file in files}


def hash_file(file: Path) -> str:
    """sha256 of a file of a model."""
    # The hub's cache names large files by their sha256, so they need not be read.
    target = file.resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_hub_id(name: str) -> bool:
    """True if a name has the form ``org/name`` or ``org/name@revision``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name) is not None


def hub_name(name: str, folder: Path) -> str:
    """A hub id with the commit that was downloaded, after which its folder is named."""
    return f"{name.partition('@')[0]}@{folder.name}"


def download(name: str, files: Sequence[str], option: str) -> Path:
    """The folder of a hub model; files that match the patterns are downloaded where missing.

    Args:
        option: of the command line, named in messages.

    Raises:
        InputError: not available from the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub_id, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=[*files]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{option} {name}: no such folder here, and not available from the hub: {error}"
        ) from error


def _cache_folder() -> Path:
    if own := os.environ.get("SEMROUTE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "semroute"


def _convert_gguf(file: Path, digest: str) -> Path:
    """Convert to safetensors once: transformers takes ten times longer to load a GGUF."""
    try:
        folder = _cache_folder() / "gguf" / digest[:32]
    except RuntimeError as error:  # there is no home folder
        raise InputError(f"--model {file}: {error} Set SEMROUTE_CACHE to a folder") from error
    try:
        if folder.is_dir():
            return folder
        unfinished = make_folder(folder.parent, f"{folder.name}.")
    except OSError as error:
        raise _no_cache(file, folder.parent, error) from error
    try:
        _write_safetensors(file, unfinished)
        make_readable(unfinished)
        try:
            unfinished.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # otherwise another process was faster
                raise _no_cache(file, folder.parent, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _no_cache(file: Path, folder: Path, error: Exception) -> InputError:
    return InputError(
        f"--model {file} is converted once, into {folder}, which cannot be written: {error}. Set "
        "SEMROUTE_CACHE to a folder with room for its weights in float32"
    )


def _write_safetensors(file: Path, folder: Path) -> None:
    """The model in a GGUF file, and its tokenizer, as transformers saves them."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    from .weights import LOADING_REPORT, refuse_misread

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, loaded = AutoModel.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            **LOADING_REPORT,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise InputError(
            f"--model {file}: reading GGUF needs the package gguf; pip install 'semroute[gguf]'"
        ) from error
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(
            f"--model {file}: transformers cannot read it, or it is cut off: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    refuse_misread(f"--model {file}", model, loaded, heads=False)
    _refuse_rope_tensors(file)
    # The weights are plain float32 now, but transformers still marks the model as quantised
    # and would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        with system_errors(folder):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise _no_cache(file, folder.parent, error) from error


def _refuse_rope_tensors(file: Path) -> None:
    """Refuse scales of rotary positions: transformers does not read them."""
    from gguf import GGUFReader

    names = [tensor.name for tensor in GGUFReader(file).tensors]
    unused = [name for name in names if re.match(r"rope_(freqs|factors)", name)]
    if unused:
        raise InputError(
            f"--model {file}: transformers does not use its {', '.join(unused)}, so that rotary "
            "positions would be wrong; take the model's safetensors"
        )
