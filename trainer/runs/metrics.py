"""``metrics.jsonl``, and ``routing.jsonl`` with the routing weights over time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...schemas import InputError, write_document
from ...schemas.files import read_file
from ...schemas.json_file import load_json

METRICS = "metrics.jsonl"
WEIGHTS = "routing.jsonl"
METRICS_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("grad_norm", pa.float64(), nullable=False),
        pa.field("lr", pa.float64(), nullable=False),
        pa.field("samples_per_second", pa.float64(), nullable=False),
        pa.field("data_wait_share", pa.float64(), nullable=False),
        pa.field("routing_entropy", pa.float64(), nullable=False),
        pa.field("validation_loss", pa.float64()),
        pa.field("validation_by_t", pa.list_(pa.float64())),
        pa.field("tokens_per_second", pa.float64()),
        pa.field("peak_memory_bytes", pa.int64()),
        pa.field("peak_flops_share", pa.float64()),
        pa.field("ema_distance", pa.float64()),
        pa.field("grad_norm_router", pa.float64()),
        pa.field("grad_norm_matrices", pa.float64()),
        pa.field("grad_norm_others", pa.float64()),
        pa.field("sample_score", pa.float64()),
        pa.field("fetched_bytes", pa.int64()),
        pa.field("fetch_retries", pa.int64()),
        pa.field("cached_bytes", pa.int64()),
        pa.field("cache_faults", pa.int64()),
        pa.field("fetch_requests", pa.int64()),
    ]
)
"""A line of ``metrics.jsonl``, written after ``step`` steps.

Loss and grad_norm (before clipping) are means since the previous line; lr is that of the step
itself; data_wait_share is the share of that time spent waiting for data; routing_entropy is in nats
divided by log L, so 1 is uniform. If measured, validation_by_t is the loss on held-out samples in
equal parts of t from 0 to 1, and validation_loss is its mean.

Tokens are patches of images, of each noise draw. Memory is that of the main process's device, or of
the process on a CPU. The share of peak FLOPs is known for some GPUs. ema_distance is |w - average|
/ |w|. Norms of the gradients of the step itself, before clipping, are given by group: router,
matrices of the blocks, others. Bytes fetched from stores behind URLs or from the cache, requests,
those that failed, and chunks that the cache had damaged or no room for, are those of the main
process since it started. Early versions wrote none of these.
"""


def read_metrics(path: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` or ``routing.jsonl``, without a last line that a kill cut off.

    Raises:
        InputError: a line is damaged.
    """
    file = path / name
    return [_line(file, number, line) for number, line in enumerate(_whole_lines(file), 1)]


def last_step(path: Path) -> int:
    """Step of the last whole line of ``metrics.jsonl``; 0 without one.

    Raises:
        InputError: it is damaged.
    """
    file = path / METRICS
    lines = _whole_lines(file)
    return int(_line(file, len(lines), lines[-1])["step"]) if lines else 0


def _whole_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    try:
        return read_file(file, follow=True).decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is damaged: {error}") from error


def _line(file: Path, number: int, text: str) -> dict[str, Any]:
    found = load_json(text, f"{file}, line {number},")
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise InputError(f"{file} is damaged: line {number} is no JSON object with a step")
    return found


def refuse_gone(path: Path) -> None:
    """Refuse to write into a run's directory that is not there any more.

    Raises:
        InputError: it was moved or removed.
    """
    if not path.is_dir():
        raise InputError(
            f"{path} is gone: the run's directory was moved or removed while it was trained. Put "
            "it back and rerun the same command to resume from its newest checkpoint"
        )


def add_line(path: Path, name: str, line: Mapping[str, Any]) -> None:
    """Append a line to ``metrics.jsonl`` or ``routing.jsonl``.

    Raises:
        InputError: the run's directory is gone.
    """
    refuse_gone(path)
    with (path / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def trim_metrics(path: Path, step: int) -> None:
    """Remove lines after ``step``, which a run that resumes there writes again."""
    for name in (METRICS, WEIGHTS):
        if name == METRICS or (path / name).exists():
            lines = [line for line in read_metrics(path, name) if line["step"] <= step]
            write_document(path / name, "".join(json.dumps(line) + "\n" for line in lines))
