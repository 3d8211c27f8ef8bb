"""Does it matter what each block reads? Trained networks, under other weights than they learned.

Weights are swapped when pictures are drawn; nothing is trained again. A network that has adapted to
its weights loses under any others: what such a swap tells is what the network relies on, not what
another training would reach. Compare swaps with each other: weights that differ by depth and are
replaced by their mean, against the same weights in reverse order, against another run's.

Shapes: D blocks, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import torch
from torch import Tensor

from ..schemas import InputError, Scoring
from .routing import Given
from .run import Run
from .study import OpenDecoder, judge_run, label

TRAINED = "as trained"
TOP = 3


def swaps(
    alpha: Tensor, other: Tensor | None, layers: Sequence[int], *, leave_one_out: bool
) -> dict[str, Tensor]:
    """Name -> weights [D, L] to put in place of alpha [D, L]; those that change nothing are left
    out.

    Args:
        other: weights of another run, or None.
        leave_one_out: each layer in turn without its weight, which the others share.
    """
    top = alpha.abs().topk(min(TOP, alpha.shape[1])).indices
    found = {
        TRAINED: alpha,
        "mean over blocks": alpha.mean(0, keepdim=True).expand_as(alpha),
        "blocks reversed": alpha.flip(0),
        "uniform": torch.full_like(alpha, 1 / alpha.shape[1]),
        f"top {TOP} layers": _share(torch.zeros_like(alpha).scatter(1, top, alpha.gather(1, top))),
    }
    if other is not None:
        found["another run's"] = other
    if leave_one_out and len(layers) > 1:
        for place, layer in enumerate(layers):
            without = alpha.clone()
            without[:, place] = 0.0
            found[f"without layer {layer}"] = _share(without)
    return {
        name: weights
        for name, weights in found.items()
        if name == TRAINED or not torch.allclose(weights, alpha, atol=1e-6)
    }


def _share(weights: Tensor) -> Tensor:
    """Rows that sum to one."""
    return weights / weights.sum(1, keepdim=True)


def ablate(
    runs: Sequence[Run],
    scoring: Scoring,
    open_decoder: OpenDecoder,
    *,
    leave_one_out: bool = False,
    report: Callable[[str], None] = print,
) -> pa.Table:
    """Judge runs under every swap of their weights.

    Returns:
        Judgements as a study has them: ``arm`` is the swap, ``seed`` the number of the run.

    Raises:
        InputError: weights that depend on t or on the token, or runs that differ in blocks or
            layers.
    """
    weights = [_weights(run) for run in runs]
    for run, alpha in zip(runs, weights, strict=True):
        if run.layers != runs[0].layers or alpha.shape != weights[0].shape:
            raise InputError(
                f"{run.path} routes {list(alpha.shape)} blocks and layers {run.layers}, but "
                f"{runs[0].path} {list(weights[0].shape)}, {runs[0].layers}: compare runs of one "
                "arm"
            )
    tables = []
    for number, run in enumerate(runs):
        other = weights[(number + 1) % len(runs)] if len(runs) > 1 else None
        found = swaps(weights[number], other, run.layers, leave_one_out=leave_one_out)
        for done, (name, alpha) in enumerate(found.items(), start=1):
            with reading(run, alpha):
                table = judge_run(run, scoring, open_decoder)
            report(f"{run.path}: {name}, {done}/{len(found)}")
            tables.append(label(table, name, number))
    return pa.concat_tables(tables)


def _weights(run: Run) -> Tensor:
    router = run.model.router
    if router.depends_on_t or router.depends_on_content or run.record.features.mixes is not None:
        raise InputError(
            f"{run.path}: strategy {run.record.config.routing.strategy} has no one set of weights "
            "over layers to swap; expected static, depth or another fixed one"
        )
    return torch.from_numpy(run.weights()[0])


@contextmanager
def reading(run: Run, alpha: Tensor) -> Iterator[None]:
    """The network with these weights."""
    own = run.model.router
    run.model.router = Given(run.layers, alpha)
    try:
        yield
    finally:
        run.model.router = own
