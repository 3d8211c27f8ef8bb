"""Does it matter what each block reads? Trained networks, under other weights than they learned.

Weights are swapped when pictures are drawn; nothing is trained again. A network that has adapted to
its weights loses under any others: what such a swap tells is what the network relies on, not what
another training would reach. Compare swaps with each other: weights that differ by depth and are
replaced by their mean, against the same weights in reverse order, against another run's.

Shapes: D blocks, L layers.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...schemas import InputError, Scoring
from ..model.strategies import Given
from ..runs.run import Run
from .job import OpenDecoder, judge_run
from .results import EvaluationKey, ResultsTable, RunScores, label, name_of

TRAINED = "as trained"
TOP = 3
WITHOUT = "without layer {}"


def swaps(
    alpha: Tensor, other: Tensor | None, layers: Sequence[int], *, leave_one_out: bool
) -> dict[str, Tensor]:
    """Name -> weights [D, L] to put in place of alpha [D, L]; those that change nothing are left
    out.

    Args:
        other: weights of another run, or None.
        leave_one_out: each layer in turn without its weight, which the others share; but none of
            which a block reads nothing else.
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
            if (without != 0).any(1).all():
                found[WITHOUT.format(layer)] = _share(without)
    return {
        name: weights
        for name, weights in found.items()
        if name == TRAINED or not torch.allclose(weights, alpha, atol=1e-6)
    }


def swaps_of_t(alpha: Tensor) -> dict[str, Tensor | None]:
    """The same of weights that depend on t, by their mean over t, [D, L]: do they need to?"""
    found: dict[str, Tensor | None] = {TRAINED: None, "mean over t": alpha}
    blocks = alpha.mean(0, keepdim=True).expand_as(alpha)
    if not torch.allclose(blocks, alpha, atol=1e-6):
        found["mean over t and blocks"] = blocks
    return found | {"uniform": torch.full_like(alpha, 1 / alpha.shape[1])}


def _share(weights: Tensor) -> Tensor:
    """Rows that sum to one."""
    return weights / weights.sum(1, keepdim=True)


def ablate(
    runs: Sequence[Run],
    scoring: Scoring,
    open_decoder: OpenDecoder,
    archive: ResultsTable,
    *,
    leave_one_out: bool = False,
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> pa.Table:
    """Judge runs under every swap of their weights.

    Args:
        archive: of ``arm`` and ``seed``. Each swap's judgements go into it at once, and those that
            it has of the same network, weights and scoring are not made again.
        report: takes a line for every swap.
        progress: show a bar.

    Returns:
        Judgements as a study has them: ``arm`` is the swap, ``seed`` the number of the run.

    Raises:
        InputError: weights that depend on the token, or runs that differ in strategy, blocks or
            layers.
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
    with tqdm(total=sum(map(len, plans)), unit="swap", disable=not progress) as bar:
        for number, (run, plan) in enumerate(zip(runs, plans, strict=True)):
            for done, (name, alpha) in enumerate(plan.items(), start=1):
                labels: dict[str, str | int] = {"arm": name, "seed": number}
                digest = _digest(run, weights[number], alpha)
                asked = EvaluationKey(run.record.config, scoring, digest)
                said = f"{run.path}: {name}, {done}/{len(plan)}"
                table = archive.find(name_of(labels), asked)
                if table is None:
                    with reading(run, alpha):
                        table = judge_run(run, scoring, open_decoder)
                    archive.add(RunScores(labels, asked.document(), table))
                else:
                    said += ", judged before"
                report(said)
                bar.update()
                tables.append(label(table, **labels))
    return pa.concat_tables(tables)


def _digest(run: Run, own: Tensor, alpha: Tensor | None) -> str:
    """Of the weights in place of its own, and of the network by what it learned and how long."""
    digest = hashlib.sha256(f"{run.step} {run.source}".encode())
    for weights in (own, own if alpha is None else alpha):
        digest.update(weights.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _swaps_of(
    run: Run, weights: Sequence[Tensor], number: int, leave_one_out: bool
) -> Mapping[str, Tensor | None]:
    if run.model.router.depends_on_t:
        return swaps_of_t(weights[number])
    other = weights[(number + 1) % len(weights)] if len(weights) > 1 else None
    return swaps(weights[number], other, run.layers, leave_one_out=leave_one_out)


def weights_of(run: Run, num_steps: int) -> Tensor:
    """What the run learned, [D, L]; where it depends on t the mean over the t of sampling."""
    if run.model.router.depends_on_content or run.record.features.mixes is not None:
        raise InputError(
            f"{run.path}: strategy {run.record.config.routing.strategy} has no one set of weights "
            "over layers to swap; expected static, depth, time, joint or a fixed one"
        )
    t = run.flow.schedule(num_steps)[:-1].numpy() if run.model.router.depends_on_t else None
    return torch.from_numpy(run.weights(t)).mean(0)


@contextmanager
def reading(run: Run, alpha: Tensor | None) -> Iterator[None]:
    """The network with these weights; None: its own."""
    own = run.model.router
    run.model.router = own if alpha is None else Given(run.layers, alpha)
    try:
        yield
    finally:
        run.model.router = own
