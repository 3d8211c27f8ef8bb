"""Checkpoints written while training goes on.

A step waits for a copy of this rank's part to host memory, and for nothing else::

    training   | step | copy | step | step | step | step |
    this rank                | write own part |
    rank 0                   | write own part | wait for all parts | rename |

If the next checkpoint is due before one is written, training waits for the first: so of a run that
is asked to stop, the older one is whole before the last one is begun.
"""

import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...schemas import CheckpointFiles, CheckpointState, parse
from ...schemas.json_file import load_json
from ..runs.checkpoint import (
    Part,
    folder_of,
    own_part,
    publish_checkpoint,
    remove_old,
    write_part,
)
from .ranks import Ranks


class Saver:
    """Writes the checkpoints of a run, one at a time. All ranks make one, and call it alike.

    Args:
        path: the run directory.
        keep: number of newest checkpoints that are kept.
        step: step of the newest checkpoint; 0 if there is none.

    Attributes:
        pause_seconds: how long training has waited for the last checkpoint.
    """

    def __init__(self, path: Path, ranks: Ranks, keep: int, step: int = 0) -> None:
        self.path, self.ranks, self.keep, self.step = path, ranks, keep, step
        self.pause_seconds = 0.0
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        (self._session, *_) = ranks.gather(uuid.uuid4().hex[:8])

    def save(self, state: CheckpointState, kinds: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy this rank's part of a state, and begin to write it; nothing to do if the newest
        checkpoint is of the same step.

        Args:
            kinds: kind -> tensors, which may change afterwards.

        Raises:
            OSError: the checkpoint before could not be written.
            RankStopped: another rank has stopped.
        """
        start = time.perf_counter()
        self.wait()
        if state.step == self.step:
            return
        self.step = state.step
        parts = {kind: self._copy_part(kind, tensors) for kind, tensors in kinds.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._thread = threading.Thread(
            target=self._run, args=(state, parts), daemon=True, name="semroute-checkpoint"
        )
        self._thread.start()
        self.pause_seconds = time.perf_counter() - start

    def check(self) -> None:
        """Raise what went wrong in writing, if anything."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is whole.

        Raises:
            OSError: it could not be written.
            RankStopped: another rank has stopped.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _copy_part(self, kind: str, tensors: Mapping[str, Tensor]) -> Part:
        part = own_part(tensors, self.ranks.rank, self.ranks.num)
        copies = {name: self._copy(f"{kind}/{name}", each) for name, each in part.tensors.items()}
        return Part(copies, part.cuts)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """In memory that all checkpoints reuse; pinned, where it comes from a GPU."""
        memory = self._memory.get(name)
        if memory is None or (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
            memory = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
            )
            self._memory[name] = memory
        return memory.copy_(tensor, non_blocking=True)

    def _run(self, state: CheckpointState, parts: Mapping[str, Part]) -> None:
        try:
            self._write(state, parts)
        except BaseException as error:
            self._error = error

    def _write(self, state: CheckpointState, parts: Mapping[str, Part]) -> None:
        ranks, final = self.ranks, folder_of(self.path, state.step)
        unfinished = final.with_name(f"{final.name}.{self._session}.tmp")
        own = write_part(unfinished, parts, ranks.rank, ranks.num).model_dump_json()
        written, published = f"written-{state.step}", f"published-{state.step}"
        ranks.tell(written, own)
        if not ranks.is_main:
            ranks.hear(published, 0)
            return
        files = [
            parse(CheckpointFiles, load_json(text, "what a rank wrote"), "what a rank wrote")
            for text in ranks.hear_all(written, own)
        ]
        publish_checkpoint(unfinished, files, state)
        remove_old(self.path, self.keep)
        ranks.tell(published, "")
