"""Checkpoints: weights, optimizer states and step, complete or absent.

On disk, of one process and of three::

    step-00001000/                     step-00001000/
      model.safetensors                  model-00001-of-00003.safetensors, 00002, 00003
      ema.safetensors                    ema-00001-of-00003.safetensors, ...
      optimizer.safetensors              optimizer-00001-of-00003.safetensors, ...
      state.json                         state.json
      checksums.json                     checksums.json

Of several ranks each writes a part: its shards of tensors that FSDP2 shards, and its share of all
others. Any number of ranks reads them.
"""

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...schemas import (
    CheckpointFiles,
    CheckpointState,
    Cut,
    Cuts,
    InputError,
    WrittenFile,
    parse,
    render,
    sync,
    write_document,
)
from ...schemas.files import open_file
from ...schemas.json_file import load_json, read_json
from ...schemas.tensor_files import save_tensors
from .metrics import refuse_gone

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"
STATE = "state.json"
KINDS = ("model", "ema", "optimizer")
ASIDE = ".damaged"
"""Suffix of a damaged checkpoint that was set aside."""
_CUTS = "cuts"


class DamagedError(InputError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: the state after ``step`` steps.

    Attributes:
        checked: its files were compared with their checksums already.
    """

    path: Path
    step: int
    checked: bool = False

    def model(self) -> dict[str, Tensor]:
        """Weights by parameter name."""
        return self.open("model").read_all()

    def ema(self) -> dict[str, Tensor]:
        """Exponential moving average of the weights, fp32."""
        return self.open("ema").read_all()

    def optimizer(self) -> dict[str, Tensor]:
        """States of the optimizers, named as in :func:`optimizer_tensors`."""
        return self.open("optimizer").read_all()

    def state(self) -> CheckpointState:
        """State of the training loop besides tensors.

        Raises:
            DamagedError: it is damaged.
        """
        with _damage(self.path):
            found = parse(CheckpointState, read_json(self.path / STATE, follow=True), STATE)
            if found.step != self.step:
                raise DamagedError(f"{STATE} is of step {found.step}; expected {self.step}")
        return found

    def open(self, kind: str) -> "TensorReader":
        """Tensors of a kind (:data:`KINDS`), to be read one at a time.

        Raises:
            DamagedError: its files are damaged.
        """
        names = self._names(kind)
        if not self.checked:
            self._check(names)
        with _damage(self.path):
            return TensorReader([self.path / name for name in names])

    def verify(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Check the files that a rank is to check: together, the ranks check all.

        Raises:
            DamagedError: one of them is missing or damaged.
        """
        self.state()
        names = [name for kind in KINDS for name in self._names(kind)]
        self._check(names[rank::num_ranks])
        for kind in KINDS:
            with _damage(self.path):
                TensorReader([self.path / name for name in self._names(kind)])

    def _names(self, kind: str) -> list[str]:
        num_ranks = self.state().num_ranks or 1
        return [part_name(kind, rank, num_ranks) for rank in range(num_ranks)]

    def _check(self, names: Sequence[str]) -> None:
        state = self.state()
        if state.num_ranks is None and not (self.path / CHECKSUMS).exists():
            return  # of an early version
        with _damage(self.path):
            document = read_json(self.path / CHECKSUMS, follow=True)
            written = parse(CheckpointFiles, document, CHECKSUMS).files
            for name in (STATE, *names):
                expected, found = written.get(name), describe_file(self.path / name)
                if expected is None:
                    raise DamagedError(f"{CHECKSUMS} does not list {name}")
                if found.num_bytes != expected.num_bytes:
                    raise DamagedError(
                        f"{name} has {found.num_bytes:,} bytes; expected {expected.num_bytes:,}"
                    )
                if found.sha256 != expected.sha256:
                    raise DamagedError(f"{name} has another sha256 than when it was written")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise
    except (InputError, OSError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


class TensorReader:
    """Tensors in the files of a checkpoint; only what is asked for is read.

    Raises:
        InputError: pieces of a tensor are missing.
        SafetensorError: a file is damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._pieces: dict[str, list[tuple[Any, Cut | None]]] = {}
        for path in files:
            file = safe_open(path, "pt")
            text = (file.metadata() or {}).get(_CUTS, "{}")
            cuts = parse(Cuts, load_json(text, f"{_CUTS} of {path.name}"), path.name).tensors
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                self._pieces.setdefault(name, []).append((file, cuts.get(name)))
        for name in self._pieces:
            self._check(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def shape(self, name: str) -> list[int]:
        """Shape of a whole tensor."""
        file, cut = self._pieces[name][0]
        return self._shape(file, name) if cut is None else list(cut.shape)

    def read(self, name: str, rows: tuple[int, int, int] | None = None) -> Tensor:
        """A tensor, on the CPU.

        Args:
            rows: dimension, start and stop of the part to read; by default all.
        """
        pieces = self._pieces[name]
        file, cut = pieces[0]
        if cut is None:
            if rows is None:
                tensor: Tensor = file.get_tensor(name)
                return tensor
            return self._slice(file, name, *rows)
        dim, (start, stop) = cut.dim, (0, cut.shape[cut.dim])
        if rows is not None and rows[0] == dim:
            start, stop = rows[1:]
        parts: list[Tensor] = []
        for file, place in pieces:
            first = 0 if place is None else place.start
            length = self._shape(file, name)[dim]
            low, high = max(start, first), min(stop, first + length)
            if low < high or not parts:
                parts.append(self._slice(file, name, dim, low - first, max(low, high) - first))
        whole = torch.cat(parts, dim)
        if rows is None or rows[0] == dim:
            return whole
        return whole.narrow(rows[0], rows[1], rows[2] - rows[1])

    def read_all(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        return {name: self.read(name) for name in self}

    def _check(self, name: str) -> None:
        """Refuse pieces that do not make up a tensor; sort them."""
        pieces = self._pieces[name]
        if len(pieces) == 1 and pieces[0][1] is None:
            return
        cuts = [cut for _, cut in pieces if cut is not None]
        if len(cuts) < len(pieces) or any(
            (cut.shape, cut.dim) != (cuts[0].shape, cuts[0].dim) for cut in cuts
        ):
            raise InputError(f"the pieces of {name} are not of one tensor")
        pieces.sort(key=lambda piece: piece[1].start if piece[1] else 0)
        shape, dim, stop = cuts[0].shape, cuts[0].dim, 0
        for file, cut in pieces:
            assert cut is not None
            own = self._shape(file, name)
            if dim >= len(shape) or cut.start != stop or len(own) != len(shape):
                raise InputError(f"pieces of {name} are missing")
            stop += own[dim]
            if [*own[:dim], shape[dim], *own[dim + 1 :]] != shape:
                raise InputError(f"the pieces of {name} are not of one tensor")
        if stop != shape[dim]:
            raise InputError(f"pieces of {name} are missing")

    @staticmethod
    def _shape(file: Any, name: str) -> list[int]:
        return list(file.get_slice(name).get_shape())

    @staticmethod
    def _slice(file: Any, name: str, dim: int, start: int, stop: int) -> Tensor:
        part: Tensor = file.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]
        return part


def list_checkpoints(path: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run, oldest first."""
    folders = (path / CHECKPOINTS).glob("step-*")
    complete = [Checkpoint(p, int(p.name[5:])) for p in folders if p.name[5:].isdigit()]
    return sorted(complete, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(path: Path) -> Checkpoint | None:
    """The newest complete checkpoint, if any."""
    return next(reversed(list_checkpoints(path)), None)


# ---------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Part:
    """Tensors of one kind that one rank writes, and the places of those that are pieces."""

    tensors: dict[str, Tensor]
    cuts: dict[str, Cut]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether FSDP2 has sharded a tensor. Only what shards one imports its class, which takes half
    a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensors: Mapping[str, Tensor], rank: int = 0, num_ranks: int = 1) -> Part:
    """What a rank writes of tensors that all ranks have, or have shards of.

    Whole tensors are dealt out by size, the largest first, each to the rank with the least so far:
    all ranks find the same.
    """
    part = Part({}, {})
    whole = {name: each for name, each in tensors.items() if not is_sharded(each)}
    num_bytes = [0] * num_ranks
    for name in sorted(whole, key=lambda name: (-whole[name].nbytes, name)):
        owner = num_bytes.index(min(num_bytes))
        num_bytes[owner] += whole[name].nbytes
        if owner == rank:
            part.tensors[name] = whole[name].detach()
    for name, each in tensors.items():
        if is_sharded(each) and (piece := _own_piece(each)) is not None:
            part.tensors[name], cut = piece
            if cut is not None:
                part.cuts[name] = cut
    return part


def _own_piece(tensor: "DTensor") -> tuple[Tensor, Cut | None] | None:
    """The shard of this rank, unless it is empty or another rank of the mesh has the same."""
    from torch.distributed.tensor import Shard

    place, coordinate = _place(tensor), tensor.device_mesh.get_coordinate()
    if coordinate is None or any(
        index and not isinstance(placement, Shard)
        for index, placement in zip(coordinate, tensor.placements, strict=True)
    ):
        return None
    if place is None:
        return tensor.to_local().detach(), None
    dim, start, stop = place
    if start == stop:
        return None
    return tensor.to_local().detach(), Cut(shape=list(tensor.shape), dim=dim, start=start)


def _place(tensor: "DTensor") -> tuple[int, int, int] | None:
    """Dimension, start and stop of this rank's shard; None if tensors are replicated."""
    from torch.distributed.tensor import Shard

    shards = [(axis, p.dim) for axis, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    if not shards:
        return None
    ((axis, dim),) = shards
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    rows = tensor.shape[dim]
    # As torch.chunk: 5 rows of 4 ranks are 2, 2, 1, 0.
    size = math.ceil(rows / tensor.device_mesh.size(axis))
    start = min(coordinate[axis] * size, rows)
    return dim, start, min(start + size, rows)


def part_name(kind: str, rank: int, num_ranks: int) -> str:
    """Name of the file of one rank."""
    part = "" if num_ranks == 1 else f"-{rank + 1:05d}-of-{num_ranks:05d}"
    return f"{kind}{part}.safetensors"


def write_part(
    folder: Path, parts: Mapping[str, Part], rank: int = 0, num_ranks: int = 1
) -> CheckpointFiles:
    """Write the part of a rank into the folder of an unfinished checkpoint, to disk.

    Args:
        parts: kind -> tensors in host memory.

    Raises:
        InputError: the run's directory is gone.
    """
    refuse_gone(folder.parent.parent)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for kind, part in parts.items():
        name = part_name(kind, rank, num_ranks)
        metadata = {"format": "pt"}
        if part.cuts:
            metadata[_CUTS] = Cuts(tensors=part.cuts).model_dump_json()
        whole = {key: tensor.contiguous() for key, tensor in part.tensors.items()}
        save_tensors(whole, folder / name, metadata)
        sync(folder / name)
        files[name] = describe_file(folder / name)
    return CheckpointFiles(files=files)


def publish_checkpoint(
    unfinished: Path, written: Iterable[CheckpointFiles], state: CheckpointState
) -> Checkpoint:
    """Give a checkpoint of which all parts are written its final name."""
    (unfinished / STATE).write_text(render(state), "utf-8")
    files = {name: file for part in written for name, file in part.files.items()}
    files[STATE] = describe_file(unfinished / STATE)
    write_document(unfinished / CHECKSUMS, render(CheckpointFiles(files=files)))
    for file in (unfinished / STATE, unfinished):
        sync(file)
    final = folder_of(unfinished.parent.parent, state.step)
    unfinished.rename(final)
    sync(final.parent)
    return Checkpoint(final, state.step)


def folder_of(path: Path, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return path / CHECKPOINTS / f"step-{step:08d}"


def remove_leftovers(path: Path) -> None:
    """Remove what a killed save left."""
    for leftover in (path / CHECKPOINTS).glob("*.tmp"):
        shutil.rmtree(leftover)


def remove_old(path: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for old in list_checkpoints(path)[:-keep]:
        shutil.rmtree(old.path)


def set_aside(checkpoint: Checkpoint) -> Path:
    """Rename a damaged checkpoint so that it counts as none, and return its new name."""
    aside = checkpoint.path.with_name(checkpoint.path.name + ASIDE)
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.path.rename(aside)


def save_checkpoint(
    path: Path,
    state: CheckpointState,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
) -> Checkpoint:
    """Write a checkpoint of one process."""
    final = folder_of(path, state.step)
    unfinished = final.with_name(f"{final.name}.tmp")
    kinds = zip(KINDS, (model, ema, optimizer), strict=True)
    written = write_part(unfinished, {kind: own_part(tensors) for kind, tensors in kinds})
    return publish_checkpoint(unfinished, [written], state)


def describe_file(path: Path) -> WrittenFile:
    """Size and sha256 of a file."""
    with open_file(path, follow=True) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return WrittenFile(num_bytes=os.fstat(file.fileno()).st_size, sha256=sha256)


# ------------------------------------------------------------------------------ tensors in memory


def optimizer_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """States of all optimizers, flat: ``<parameter>/<key>`` -> tensor.

    Hyperparameters are left out: they follow from the configuration and the step.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def read_like(reader: TensorReader, name: str, parameter: Tensor) -> Tensor:
    """A saved tensor; of one that has the shape of a parameter that FSDP2 shards, the shard of this
    rank, of which alone is read."""
    if not is_sharded(parameter) or reader.shape(name) != list(parameter.shape):
        return reader.read(name)
    local = reader.read(name, _place(parameter)).to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return type(parameter).from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def load_optimizer_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], reader: TensorReader
) -> None:
    """Restore optimizers from what :func:`optimizer_tensors` returned, and a checkpoint holds."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, str]] = {}
    for key in reader:
        name, _, field = key.rpartition("/")
        by_name.setdefault(name, {})[field] = key
    for optimizer in optimizers:
        ordered = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            number: {
                field: read_like(reader, key, parameter)
                for field, key in by_name[names[parameter]].items()
            }
            for number, parameter in enumerate(ordered)
            if names[parameter] in by_name
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
