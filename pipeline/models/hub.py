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
from ...schemas.tensor_files import make_readable

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ".safetensors"
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
        InputError: no such model, or none that transformers could load.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path.resolve()
        tokenizer = _tokenizer_beside(folder, option)
        return ModelFiles(str(folder), folder, _hash_files(path, option, weights), tokenizer)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"{option} {name}: a file must be a .gguf; for safetensors name the folder that "
                "contains config.json"
            )
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
    if not (folder.parent / PIPELINE_INDEX).exists():
        return None
    names = _tokenizer_names(folder.name)
    for name in names:
        if (folder.parent / name).is_dir():
            return folder.parent / name
    raise InputError(
        f"{option} {folder}: the pipeline has no tokenizer for it; expected a folder "
        f"{' or '.join(names)} beside it"
    )


def _hash_files(folder: Path, option: str, weights: bool = True) -> dict[str, str]:
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
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None


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
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEMROUTE_CACHE") or Path(base) / "semroute")


def _convert_gguf(file: Path, digest: str) -> Path:
    """Convert to safetensors once: transformers takes ten times longer to load a GGUF."""
    folder = _cache_folder() / "gguf" / digest[:32]
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        unfinished = make_folder(folder.parent, f"{folder.name}.")
    except OSError as error:
        raise InputError(
            f"--model {file} would be converted into {folder.parent}, which cannot be written to: "
            f"{error.strerror}. Name another folder with the environment variable SEMROUTE_CACHE."
        ) from error
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
        # The weights are plain float32 now, but transformers still marks the model as quantised
        # and would refuse to save it.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        make_readable(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
