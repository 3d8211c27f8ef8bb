"""Files of weights: whether they are whole, and whether a model uses all that is in them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schemas import InputError
from ...schemas.files import open_file
from ...schemas.json_file import load_json, read_json

LOADING_REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options with which ``from_pretrained`` of transformers also gives what it did with the files."""
SAFETENSORS = ".safetensors"
GGUF = ".gguf"
_INDEX = ".safetensors.index.json"
_ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1_024
"""A pointer of Git LFS is shorter."""
_TEXTS = {".json", ".model", ".txt", ".jinja"}
_MAGIC = b"GGUF"
_HEADER_BYTES = 100_000_000
"""Longest header that safetensors reads."""
_INTEGERS = re.compile(r"[IU]\d+|BOOL")
_PART = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_CONSTANTS = re.compile(r"(^|\.)((original_)?inv_freq|masked_bias|position_ids)$")
"""What early versions of transformers stored though it follows from the configuration."""
_OTHER_PARTS = re.compile(r"vis|image|audio|speech|talker|decoder|mtp|draft|head")
"""Parts of a model beside its text tower."""
_LATER_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Keys of configurations: blocks behind the last one that predict tokens further ahead."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the name of its dtype in safetensors, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def check_files(folder: Path, files: Iterable[Path], option: str) -> None:
    """Check that the files of a model are whole, from their headers.

    Args:
        folder: whose other texts (tokenizer, configuration) and index are checked too.
        files: its weights.
        option: of the command line, named in messages.

    Raises:
        InputError: a pointer of Git LFS, a file that is cut off or missing, one of another kind, or
            an adapter in place of a model; it names the file.
    """
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{option} {folder} holds an adapter ({_ADAPTER}), whose base model would be loaded "
            "from elsewhere: merge it into its model (merge_and_unload of peft), and save that"
        )
    for file in sorted(folder.iterdir()):
        if file.suffix in _TEXTS and not file.is_dir():
            _refuse_pointer(file, option)
    files = [*files]
    for file in files:
        read_header(file, option)
    names = {file.name for file in files}
    for file in folder.glob(f"*{_INDEX}"):
        _check_index(file, names, option)
    for match in filter(None, map(_PART.fullmatch, sorted(names))):
        stem, _, num = match.groups()
        width = len(match[2])
        parts = [f"{stem}-{i:0{width}}-of-{num}{SAFETENSORS}" for i in range(1, int(num) + 1)]
        _refuse_absent(folder, [part for part in parts if part not in names], option)


def _check_index(file: Path, names: set[str], option: str) -> None:
    index = read_json(file, follow=True)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{option}: {file} has no weight_map; expected the file of each weight")
    _refuse_absent(file.parent, sorted({*files.values()} - names), option)


def _refuse_absent(folder: Path, absent: Sequence[str], option: str) -> None:
    if absent:
        raise InputError(
            f"{option} {folder}: {len(absent)} files of weights are missing, the first is "
            f"{absent[0]}; download the model again"
        )


def check_gguf(file: Path, option: str) -> None:
    """Refuse a pointer of Git LFS, and a file of another kind.

    Raises:
        InputError: it names the file.
    """
    _refuse_pointer(file, option)
    with file.open("rb") as stream:
        head = stream.read(8)
    if head[:4] != _MAGIC:
        raise InputError(f"{option}: {file} is no GGUF file; it begins with {head!r}")


def _refuse_pointer(file: Path, option: str) -> None:
    with open_file(file, follow=True) as stream:
        head = stream.read(_POINTER_BYTES + 1)
    if len(head) > _POINTER_BYTES or not head.startswith(_POINTER):
        return
    raise InputError(
        f"{option}: {file} is a Git LFS pointer and not the file itself: run `git lfs pull` in "
        f"{file.parent}, or download the model with `hf download`"
    )


def read_header(file: Path, option: str) -> dict[str, StoredTensor]:
    """The tensors in a file of safetensors, by name; their values are not read.

    Raises:
        InputError: it is a pointer of Git LFS, cut off, or of another kind.
    """
    _refuse_pointer(file, option)
    found = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        size = int.from_bytes(head, "little")
        text = stream.read(size) if size <= _HEADER_BYTES else b""
    if size > _HEADER_BYTES or (text and text[:1] != b"{"):
        raise InputError(f"{option}: {file} is no safetensors file; it begins with {head!r}")
    if len(text) < max(size, 1):
        raise InputError(
            f"{option}: {file} is cut off: it has {found:,} bytes, and its header alone "
            f"{size + 8:,}; download it again"
        )
    try:
        entries = load_json(text.rstrip(), str(file))
        entries.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(entry["dtype"], (*entry["shape"],))
            for name, entry in entries.items()
        }
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        expected = 8 + size + int(end)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{option}: the header of {file} is damaged: {error}") from error
    if found != expected:
        fault = "is cut off" if found < expected else "has bytes behind its last tensor"
        raise InputError(
            f"{option}: {file} {fault}: it has {found:,} bytes; expected {expected:,}. Download it "
            "again"
        )
    return tensors


def refuse_misread(
    name: str, module: Any, loaded: Mapping[str, Any], tower: str = "", *, heads: bool = True
) -> None:
    """Refuse weights that are not as the model expects them.

    transformers and diffusers make missing weights up and leave out those that they have no place
    for, such as the scales of quantised weights; they only log that.

    Args:
        name: of the model, for messages.
        module: the model, or the part of it whose weights matter.
        loaded: what ``from_pretrained`` did, see :data:`LOADING_REPORT`.
        tower: name of that part inside the model, "" where it is the whole.
        heads: whether the model's heads matter.

    Raises:
        InputError: weights are missing, of another shape, or not used; it names the first.
    """
    kind, prefix = type(module).__name__, f"{tower}." if tower else ""
    missing = sorted(
        key
        for key in loaded["missing_keys"]
        if key.startswith(prefix) and (heads or "head" not in key.partition(".")[0])
    )
    if missing:
        raise InputError(
            f"{name}: {len(missing)} weights of {kind} are not in its files, the first is "
            f"{missing[0]}; expected all of them"
        )
    mismatched = sorted(e for e in loaded["mismatched_keys"] if e[0].startswith(prefix))
    if mismatched:
        key, found, expected = mismatched[0]
        raise InputError(
            f"{name}: {len(mismatched)} weights of {kind} have another shape than config.json "
            f"says, the first is {key}: found {[*found]}, expected {[*expected]}"
        )
    unused = sorted(key for key in loaded["unexpected_keys"] if _belongs(key, module))
    if unused:
        raise InputError(
            f"{name}: {len(unused)} weights in its files are not used, the first is {unused[0]}: "
            f"{kind} has no place for them, so that what it computes would be wrong. Take "
            "the model's files as they were before quantisation or conversion"
            f"{_quantised_by(module)}"
        )


def refuse_integers(
    name: str, module: Any, files: Mapping[str, Mapping[str, StoredTensor]]
) -> None:
    """Refuse weights that are stored as integers, of a model that is not quantised.

    Args:
        name, module: as for :func:`refuse_misread`.
        files: file -> its tensors.

    Raises:
        InputError: it names the first weight.
    """
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            stem, _, leaf = key.rpartition(".")
            if leaf in ("weight", "bias") and _INTEGERS.fullmatch(tensor.dtype):
                if not _belongs(key, module):
                    continue
                raise InputError(
                    f"{name}: {stem}.{leaf} in {file} is {tensor.dtype}; expected floating-point "
                    "numbers. Take the model's files as they were before quantisation"
                    f"{_quantised_by(module)}"
                )


def is_quantised(name: str, config: Any) -> bool:
    """Whether a model is quantised, by a method that transformers knows.

    Raises:
        InputError: by another one.
    """
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils import logging

    quantised = getattr(config, "quantization_config", None)
    if not isinstance(quantised, dict):
        return quantised is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        known = AutoHfQuantizer.supports_quant_method(quantised)
    except ValueError:
        known = False
    finally:
        logging.set_verbosity(verbosity)
    if not known:
        raise InputError(
            f"{name}: config.json says that its weights are quantised by "
            f"{quantised.get('quant_method')!r}, which transformers does not know. Take the "
            "model's files as they were before quantisation, or remove quantization_config if "
            "they are"
        )
    return True


def _quantised_by(module: Any) -> str:
    quantised = getattr(getattr(module, "config", None), "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    return "" if method is None else f" (config.json: quantised by {method!r})"


def _belongs(key: str, module: Any) -> bool:
    """Whether a weight of a file belongs to a module, though that has no place for it.

    The name may have parts in front that the module does not have: ``model.layers.0.q.scale`` is
    one of ``layers.0.q``; or it may count more blocks.
    """
    if _CONSTANTS.search(key):
        return False
    modules = dict(module.named_modules())
    known = {part for path in modules for part in path.split(".")}
    parts = key.split(".")
    config = getattr(module, "config", None)
    later = sum(int(getattr(config, name, None) or 0) for name in _LATER_LAYERS)
    for first in range(len(parts) - 1):
        if any(_OTHER_PARTS.search(part) and part not in known for part in parts[:first]):
            return False
        path = ""
        for stop in range(first + 1, len(parts)):
            inner = ".".join(parts[first:stop])
            if inner not in modules:
                break
            path, part = inner, parts[stop]
            if part.isdigit() and f"{path}.{part}" not in modules:
                return int(part) >= len([*modules[path].children()]) + later
        if path and (path.count(".") == len(parts) - first - 2 or modules[path]._parameters):
            return True
    return False
