"""What caching would cost and save, before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import Codec, InputError, Summary
from ...schemas.units import format_bytes
from ..codecs.registry import CODECS, request_codec
from ..extraction.plan import Plan

if TYPE_CHECKING:
    from .benchmark import CodecTrial, LLMBenchmark


TYPICAL_BITS = {
    "bf16": {0: 16.0},
    "lossless": {0: 10.9, 1: 10.5, 2: 10.6, 3: 10.7, 6: 10.7},
    "delta": {0: 6.2, 1: 4.9, 2: 5.3, 3: 5.5, 6: 5.8},
    "linear": {0: 5.8, 1: 3.9, 2: 4.3, 3: 4.6, 6: 4.9},
}
"""Codec -> distance between stored layers (0: a single one) -> bits a value, at quality 4; see
docs/benchmarks/codecs.md. One step of quality is about one bit."""
TYPICAL_QUALITY = 4.0
SMALL_SHARE = 0.05
"""Share of the time below which running the LLM online hardly slows training."""


@dataclass(frozen=True)
class Cell:
    """Size of a store: some layers, under one codec.

    Attributes:
        layers: LLM layers.
        codec: as it would be asked for.
        num_bytes: on disk.
        once_bytes: of those, what is read once and not for every sample: matrices.
        raw_bytes: the same in bfloat16, without any codec.
        trial: of the codec on rows of a probe; None where the size is a typical one.
    """

    layers: list[int]
    codec: Codec
    num_bytes: int
    once_bytes: int
    raw_bytes: int
    trial: CodecTrial | None

    @property
    def size(self) -> str:
        """``~184.2 MB``, without the sign where it was measured or is exact."""
        sure = self.trial is not None or self.codec.name == "bf16"
        return ("" if sure else "~") + format_bytes(self.num_bytes)

    @property
    def name(self) -> str:
        """``delta, quality 4``, briefly."""
        quality = self.codec.quality
        return self.codec.name if quality is None else f"{self.codec.name} q{quality:g}"


@dataclass(frozen=True, repr=False)
class Estimate:
    """What ``semroute estimate`` says.

    Attributes:
        facts: about the captions, and about the LLM where it was probed.
        tables: title -> rows of cells, the first of them the head.
        advice: whether caching pays, in sentences.
        details: the same for machines; plain JSON types.
    """

    facts: Summary
    tables: Mapping[str, list[list[str]]]
    advice: list[str]
    details: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = [str(self.facts)]
        for title, rows in self.tables.items():
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = [
                "  ".join(
                    cell.rjust(width) if number else cell.ljust(width)
                    for number, (cell, width) in enumerate(zip(row, widths, strict=True))
                )
                for row in rows
            ]
            parts.append("\n  ".join([title, *lines]))
        parts.append("\n".join(f"- {sentence}" for sentence in self.advice))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [self.facts._repr_html_()]
        for title, (head, *rows) in self.tables.items():
            top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            parts.append(f"<strong>{escape(title)}</strong><table><tr>{top}</tr>{body}</table>")
        advice = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.advice)
        return f"<div>{''.join(parts)}<ul>{advice}</ul></div>"

    def to_json(self) -> str:
        return json.dumps(self.details, indent=1)


def estimate(
    plan: Plan,
    *,
    codec: str | None = None,
    quality: float | None = None,
    samples_per_second: float = 100.0,
    passes: float = 10.0,
    probe: LLMBenchmark | None = None,
) -> Estimate:
    """Sizes, times, bandwidths and the break-even of caching a plan's captions.

    Args:
        plan: from :func:`semroute.pipeline.extraction.plan.make_plan`.
        codec, quality: as for extraction; default: all codecs.
        samples_per_second: speed of training, over all devices.
        passes: times that the samples are trained on, over all epochs, seeds and ablations.
        probe: from :func:`semroute.pipeline.inspection.benchmark.run_benchmark`; without one there
            are no times, and codecs have their typical sizes.

    Raises:
        InputError: a quality for a codec that has none.
    """
    if codec is None and quality is not None:
        raise InputError(f"--quality {quality:g} needs --codec delta or linear")
    specs = [request_codec(name, quality) for name in ([codec] if codec else CODECS)]
    cells = [
        [_size(plan, layers, spec, probe) for spec in specs]
        for layers in _choose(plan.identity.layers)
    ]
    work = _Workload.of(plan, samples_per_second, passes, probe)
    sizes = [["layers", *(cell.name for cell in cells[0])]]
    for row in cells:
        sizes.append([_name_layers(row[0].layers), *(cell.size for cell in row)])
    costs = [[*_costs(cells[0][0], work)], *([*_costs(cell, work).values()] for cell in cells[0])]
    how = "bytes on disk, measured on held-out tokens of the probe" if probe else "bytes on disk"
    return Estimate(
        facts=_facts(plan, work, probe),
        tables={
            f"{how} (~: typical)": sizes,
            f"layers {_name_layers(plan.identity.layers)}, training at "
            f"{samples_per_second:g} samples/s": costs,
        },
        advice=_advise(cells[0], work),
        details=_details(plan, cells, work, probe),
    )


@dataclass(frozen=True)
class _Workload:
    """How much there is to do, and how fast this machine does it.

    Attributes:
        tokens: that the LLM sees in extraction, template included.
        rows: stored.
        sample_tokens, sample_rows: the same for a sample in training, on average over samples
            and over the captions of each.
        num_samples: of a pass.
        samples_per_second, passes: of training.
        tokens_per_second: of the LLM, on all devices of this machine; None where unknown.
        load_seconds: of the LLM.
    """

    tokens: int
    rows: int
    sample_tokens: float
    sample_rows: float
    num_samples: int
    samples_per_second: float
    passes: float
    tokens_per_second: float | None
    load_seconds: float

    @classmethod
    def of(
        cls, plan: Plan, samples_per_second: float, passes: float, probe: LLMBenchmark | None
    ) -> _Workload:
        import torch

        captions = plan.captions
        speed = probe.tokens_per_second * max(1, torch.cuda.device_count()) if probe else None
        return cls(
            tokens=int(captions.sequence_lengths.sum()),
            rows=int(captions.num_tokens.sum()),
            sample_tokens=_mean_over_samples(captions.caption_ids, captions.sequence_lengths),
            sample_rows=_mean_over_samples(captions.caption_ids, captions.num_tokens),
            num_samples=len(plan.samples),
            samples_per_second=samples_per_second,
            passes=passes,
            tokens_per_second=speed,
            load_seconds=probe.load_seconds if probe else 0.0,
        )

    def online_seconds(self) -> float:
        """Of the LLM, for one pass, where it is run for every sample."""
        assert self.tokens_per_second is not None
        return self.num_samples * self.sample_tokens / self.tokens_per_second

    def online_share(self) -> float:
        """Of this machine's time, that the LLM takes where training is as fast as asked."""
        assert self.tokens_per_second is not None
        return self.samples_per_second * self.sample_tokens / self.tokens_per_second

    def extraction_seconds(self, cell: Cell) -> float | None:
        """Of the LLM over every unique caption once, and of the codec."""
        if self.tokens_per_second is None or cell.trial is None:
            return None
        coding = self.rows * cell.trial.encode_seconds
        return self.load_seconds + self.tokens / self.tokens_per_second + coding

    def sample_bytes(self, cell: Cell) -> float:
        """On disk, of a sample."""
        return self.sample_rows * (cell.num_bytes - cell.once_bytes) / self.rows

    def disk_bytes_per_second(self, cell: Cell) -> float:
        """That training reads."""
        return self.samples_per_second * self.sample_bytes(cell)

    def decode_cores(self, cell: Cell, trial: CodecTrial) -> float:
        """CPU cores that decode what training reads."""
        rate = self.samples_per_second * self.sample_rows * cell.raw_bytes / self.rows
        return rate / trial.decode_bytes_per_second

    def recompute_bytes_per_second(self, cell: Cell) -> float:
        """Disk speed at which reading a sample takes as long as running the LLM over it."""
        assert self.tokens_per_second is not None
        return self.tokens_per_second / self.sample_tokens * self.sample_bytes(cell)

    def break_even(self, cell: Cell) -> float | None:
        """Passes of running the LLM online that cost as much as extraction."""
        seconds = self.extraction_seconds(cell)
        return None if seconds is None else seconds / self.online_seconds()


def _mean_over_samples(caption_ids: pa.ListArray, values: np.ndarray) -> float:
    """Mean over samples of the mean over each one's captions: training draws one of them."""
    counts = pc.list_value_length(caption_ids).to_numpy()
    weights = 1 / np.repeat(counts, counts)
    return float(np.average(values[caption_ids.flatten().to_numpy()], weights=weights))


def _choose(layers: list[int]) -> list[list[int]]:
    """All of the layers, each second and third counted from the last, and the last but one."""
    fewer = [layers[::-1][::step][::-1] for step in (2, 3)] + [layers[-2:-1]]
    return [layers] + [choice for choice in fewer if 0 < len(choice) < len(layers)]


def _size(plan: Plan, layers: list[int], spec: Codec, probe: LLMBenchmark | None) -> Cell:
    width, trial = plan.identity.model.width, None
    if probe is not None and probe.can_fit(spec.name):
        positions = [plan.identity.layers.index(layer) for layer in layers]
        trial = probe.try_codec(spec.name, spec.quality, positions)
        bits = trial.bits_per_value
    else:
        distance = int(np.median(np.diff(layers))) if len(layers) > 1 else 0
        known = TYPICAL_BITS[spec.name]
        bits = known[max(key for key in known if key <= distance)]
        bits += spec.quality - TYPICAL_QUALITY if spec.quality is not None else 0.0
    num_values = int(plan.captions.num_tokens.sum()) * len(layers) * width
    matrices = 2 * 2 * len(layers) * width**2 if spec.name == "linear" else 0  # two, in bfloat16
    num_bytes = int(num_values * bits / 8) + matrices
    return Cell(layers, spec, num_bytes, matrices, 2 * num_values, trial)


def _facts(plan: Plan, work: _Workload, probe: LLMBenchmark | None) -> Summary:
    captions, identity = plan.captions, plan.identity
    cut = int(np.count_nonzero(captions.num_cut))
    items = {
        "model": f"{os.path.basename(plan.model.name) or plan.model.name} "
        f"({identity.model.architecture}, {identity.model.num_layers} layers of "
        f"{identity.model.width}, {identity.dtype})",
        "captions": f"{len(captions):,} unique (the null caption included) of "
        f"{work.num_samples:,} samples",
        "tokens": f"{work.rows:,} to store, {work.sample_rows:.1f} a sample, at most "
        f"{captions.num_tokens.max()}; the LLM sees {work.tokens:,}; {cut:,} captions cut at "
        f"{identity.max_length} tokens",
        "bytes a token": f"{format_bytes(2 * len(identity.layers) * identity.model.width)} in bf16",
    }
    if probe is not None:
        items["LLM"] = (
            f"{probe.tokens_per_second:,.0f} tokens/s on {probe.device} ({probe.num_captions:,} "
            f"captions in {probe.seconds:.1f} s)"
        )
    return Summary(f"estimate for {plan.samples.source}", items)


def _costs(cell: Cell, work: _Workload) -> dict[str, str]:
    """A row of the second table, by column."""
    row = {
        "codec": cell.name,
        "smaller": f"{cell.raw_bytes / cell.num_bytes:.2f}x",
        "read from disk": f"{format_bytes(work.disk_bytes_per_second(cell))}/s",
    }
    if work.tokens_per_second is None:
        return row
    unknown = "not measured"
    seconds, passes = work.extraction_seconds(cell), work.break_even(cell)
    recompute = work.recompute_bytes_per_second(cell)
    trial = cell.trial
    return row | {
        "error of LN(h)": f"{trial.error:.1e}" if trial else unknown,
        "cores to decode": f"{work.decode_cores(cell, trial):.2f}" if trial else unknown,
        "extraction": unknown if seconds is None else format_seconds(seconds),
        "costs as passes online": unknown if passes is None else f"{passes:.2f}",
        "LLM reads as fast as a disk of": f"{format_bytes(recompute)}/s",
    }


def _advise(cells: Sequence[Cell], work: _Workload) -> list[str]:
    """Whether caching pays, for the smallest of the codecs that were measured, or in general."""
    smallest = min(cells, key=lambda cell: cell.num_bytes)
    advice = [
        f"Training at {work.samples_per_second:g} samples/s reads random captions at "
        f"{format_bytes(work.disk_bytes_per_second(smallest))}/s ({smallest.name}) to "
        f"{format_bytes(max(map(work.disk_bytes_per_second, cells)))}/s: storage must deliver that "
        "to all nodes together."
    ]
    measured = [cell for cell in cells if cell.trial is not None]
    if work.tokens_per_second is None or not measured:
        return [
            *advice,
            "Sizes with ~ are what SmolLM2-135M takes on short captions. Those of this LLM, hours "
            "and whether caching pays are not known without --probe.",
        ]
    share = work.online_share()
    best = min(measured, key=lambda cell: cell.num_bytes)
    cost = work.break_even(best)
    assert cost is not None
    online = work.online_seconds()
    saved = online * (work.passes - cost)
    if share > 1:
        advice.append(
            f"Online, the LLM would need {share:.1f} machines like this one to feed training."
        )
    else:
        advice.append(f"Online, the LLM would take {100 * share:.1f} % of a machine like this one.")
    if share < SMALL_SHARE:
        advice.append(
            "That is little: caching saves at most so much time. It may still be worth it for the "
            "LLM's memory, or to repeat runs to the bit."
        )
    if saved > 0:
        advice.append(
            f"Extraction ({best.name}) costs as much as {cost:.2f} passes online, so caching pays "
            f"from pass {int(np.floor(cost)) + 1} on; {work.passes:g} passes save "
            f"{format_seconds(saved)} of this machine."
        )
    else:
        advice.append(
            f"Caching does NOT pay for {work.passes:g} passes: extraction ({best.name}) costs as "
            f"much as {cost:.2f} passes online, {format_seconds(-saved)} more. It would pay from "
            f"pass {int(np.floor(cost)) + 1} on."
        )
    advice.append(
        f"The LLM makes a sample's hidden states anew as fast as a disk of "
        f"{format_bytes(work.recompute_bytes_per_second(best))}/s would read them ({best.name}); "
        "from slower storage caching loses time, whatever the passes."
    )
    return advice


def _details(
    plan: Plan, cells: Sequence[Sequence[Cell]], work: _Workload, probe: LLMBenchmark | None
) -> dict[str, Any]:
    known = work.tokens_per_second is not None
    return {
        "captions": len(plan.captions),
        "captions_cut": int(np.count_nonzero(plan.captions.num_cut)),
        "samples": work.num_samples,
        "tokens": work.rows,
        "tokens_llm": work.tokens,
        "tokens_a_sample": work.sample_rows,
        "model": plan.model.name,
        "num_layers": plan.identity.model.num_layers,
        "width": plan.identity.model.width,
        "samples_per_second": work.samples_per_second,
        "passes": work.passes,
        "probe": probe
        and {
            "device": probe.device,
            "captions": probe.num_captions,
            "tokens": probe.num_tokens,
            "seconds": probe.seconds,
            "load_seconds": probe.load_seconds,
            "tokens_per_second": probe.tokens_per_second,
        },
        "online_share": work.online_share() if known else None,
        "online_seconds_a_pass": work.online_seconds() if known else None,
        "stores": [
            {
                "layers": cell.layers,
                "codec": cell.codec.name,
                "quality": cell.codec.quality,
                "bytes": cell.num_bytes,
                "bytes_bf16": cell.raw_bytes,
                "measured": cell.trial is not None,
                "error": cell.trial and cell.trial.error,
                "disk_bytes_per_second": work.disk_bytes_per_second(cell),
                "decode_cores": cell.trial and work.decode_cores(cell, cell.trial),
                "extraction_seconds": work.extraction_seconds(cell),
                "break_even_passes": work.break_even(cell),
                "recompute_bytes_per_second": work.recompute_bytes_per_second(cell)
                if known
                else None,
            }
            for row in cells
            for cell in row
        ],
    }


def _name_layers(layers: list[int]) -> str:
    """``[2, 4, 6]`` -> ``"2-6 by 2 (3)"``."""
    if len(layers) == 1:
        return f"{layers[0]}"
    steps = {b - a for a, b in pairwise(layers)}
    by = f" by {steps.pop()}" if len(steps) == 1 and steps != {1} else ""
    return f"{layers[0]}-{layers[-1]}{by} ({len(layers)})"


def format_seconds(seconds: float) -> str:
    """``90.0`` -> ``"1.5 min"``."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
