"""Trained networks under other routing weights than they learned: does it matter what blocks read?

Weights are swapped when images are generated; nothing is trained again. A network that has adapted
to its weights loses under any others: a swap shows what the network relies on, not what another
training would reach. Compare swaps with each other: weights that differ by depth and are replaced
by their mean, against the same weights in reverse order, against another run's.

Shapes: D blocks, L layers.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch import Tensor

from ...schemas import InputError, Scoring
from ...schemas.verbosity import progress_bar
from ..model.strategies import Given
from .job import OpenDecoder, score_images_of
from .results import EvaluationKey, ResultsTable, RunScores, label, name_of

if TYPE_CHECKING:
    from ..runs.run import Run

TRAINED = "as trained"
"""Name of the arm without a swap."""
TOP = 3
"""Number of layers kept in the swap to the largest weights."""
WITHOUT = "without layer {}"
"""Name of an arm that leaves out a layer."""


def swaps(
    alpha: Tensor, other: Tensor | None, layers: Sequence[int], *, leave_one_out: bool
) -> dict[str, Tensor]:
    """Name -> weights [D, L] to put in place of alpha [D, L], without those that change nothing.

    Args:
        other: weights of another run, or None.
        leave_one_out: also leave out each layer in turn and share its weight among the others,
            unless it is the only layer that some block reads.
    """
    top = alpha.abs().topk(min(TOP, alpha.shape[1])).indices
    candidates = {
        TRAINED: alpha,
        "mean over blocks": alpha.mean(0, keepdim=True).expand_as(alpha),
        "blocks reversed": alpha.flip(0),
        "uniform": torch.full_like(alpha, 1 / alpha.shape[1]),
        f"top {TOP} layers": _normalised(
            torch.zeros_like(alpha).scatter(1, top, alpha.gather(1, top))
        ),
    }
    if other is not None:
        candidates["another run's"] = other
    if leave_one_out and len(layers) > 1:
        for position, layer in enumerate(layers):
            without = alpha.clone()
            without[:, position] = 0.0
            if (without != 0).any(1).all():
                candidates[WITHOUT.format(layer)] = _normalised(without)
    return {
        name: weights
        for name, weights in candidates.items()
        if name == TRAINED or not torch.allclose(weights, alpha, atol=1e-6)
    }


def swaps_of_t(alpha: Tensor) -> dict[str, Tensor | None]:
    """Swaps for weights that depend on t, from their mean over t, alpha [D, L]; None: no swap."""
    weights: dict[str, Tensor | None] = {TRAINED: None, "mean over t": alpha}
    blocks = alpha.mean(0, keepdim=True).expand_as(alpha)
    if not torch.allclose(blocks, alpha, atol=1e-6):
        weights["mean over t and blocks"] = blocks
    return weights | {"uniform": torch.full_like(alpha, 1 / alpha.shape[1])}


def _normalised(weights: Tensor) -> Tensor:
    """Weights with rows that sum to one."""
    return weights / weights.sum(1, keepdim=True)


def ablate(
    runs: Sequence["Run"],
    scoring: Scoring,
    open_decoder: OpenDecoder,
    stored: ResultsTable,
    *,
    leave_one_out: bool = False,
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> pa.Table:
    """Score runs under every swap of their weights.

    Args:
        stored: scores by ``arm`` and ``seed``. The scores of a swap are added to it at once, and
            reused if network, weights and scoring are the same.
        report: takes one line per swap.
        progress: show a bar.

    Returns:
        Scores as a study has them: ``arm`` is the swap, ``seed`` the number of the run.

    Raises:
        InputError: weights that depend on the token or define no mix, or runs that differ in
            strategy, blocks or layers.
    """
    weights = [weights_of(run, scoring.num_steps) for run in runs]
    kinds = [
        f"{run.record.config.routing.strategy} of {len(alpha)} blocks over layers {run.layers}"
        for run, alpha in zip(runs, weights, strict=True)
    ]
    for run, kind in zip(runs, kinds, strict=True):
        if kind != kinds[0]:
            raise InputError(
                f"{run.path} is {kind}, but {runs[0].path} is {kinds[0]}: compare runs of one arm"
            )
    plans = [_swaps_of(run, weights, n, leave_one_out) for n, run in enumerate(runs)]
    tables = []
    with progress_bar(total=sum(map(len, plans)), unit="swap", disable=not progress) as bar:
        for number, (run, plan) in enumerate(zip(runs, plans, strict=True)):
            for done, (name, alpha) in enumerate(plan.items(), start=1):
                labels: dict[str, str | int] = {"arm": name, "seed": number}
                digest = _digest(run, weights[number], alpha)
                key = EvaluationKey(run.record.config, scoring, digest)
                line = f"{run.path}: {name}, {done}/{len(plan)}"
                table = stored.find(name_of(labels), key)
                if table is None:
                    with swapped_weights(run, alpha):
                        table = score_images_of(run, scoring, open_decoder)
                    stored.add(RunScores(labels, key.document(), table))
                else:
                    line += ", scored before"
                report(line)
                bar.update()
                tables.append(label(table, **labels))
    return pa.concat_tables(tables)


def _digest(run: "Run", own: Tensor, alpha: Tensor | None) -> str:
    """Digest of the swapped weights, and of the network: its own weights, and its checkpoint."""
    digest = hashlib.sha256(f"{run.step} {run.source}".encode())
    for weights in (own, own if alpha is None else alpha):
        digest.update(weights.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _swaps_of(
    run: "Run", weights: Sequence[Tensor], number: int, leave_one_out: bool
) -> Mapping[str, Tensor | None]:
    """Swaps of run ``number``; the weights of all runs are given."""
    if run.model.router.depends_on_t:
        return swaps_of_t(weights[number])
    other = weights[(number + 1) % len(weights)] if len(weights) > 1 else None
    return swaps(weights[number], other, run.layers, leave_one_out=leave_one_out)


def weights_of(run: "Run", num_steps: int) -> Tensor:
    """Learned routing weights of a run, [D, L]; if they depend on t, the mean over t of sampling.

    Raises:
        InputError: the weights depend on the token, blocks read no mix that they define, or the run
            reads stored mixes.
    """
    router = run.model.router
    if router.depends_on_content or not router.mixes_layers or run.record.features.mixes:
        raise InputError(
            f"{run.path}: strategy {run.record.config.routing.strategy} has no one set of weights "
            "over layers to swap; expected static, depth, time, joint or a fixed one"
        )
    t = None
    if router.depends_on_t:
        t = run.flow.at(run.record.latents.shape).schedule(num_steps)[:-1].numpy()
    return torch.from_numpy(run.weights(t)).mean(0)


@contextmanager
def swapped_weights(run: "Run", alpha: Tensor | None) -> Iterator[None]:
    """Give the network of a run these weights for a while; None: its own."""
    own = run.model.router
    if alpha is not None:
        device = next(run.model.parameters()).device
        run.model.router = Given(run.layers, alpha).to(device)
    try:
        yield
    finally:
        run.model.router = own
