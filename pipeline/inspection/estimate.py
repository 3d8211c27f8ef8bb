"""What caching would cost and save, before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas import Codec, DataConfig, InputError, Rank, Summary
from ...schemas.display import Table
from ...schemas.escaping import in_html
from ...schemas.storage import MIN_BYTES, StorageSpeed, measure_storage
from ...schemas.units import format_bytes
from ..codecs.registry import CODECS, is_lossy, request_codec, settle_rank, with_exact_layers
from ..extraction.exact import choose_exact_layers
from ..extraction.requests import ExtractRequest
from ..store.views import short_name
from .workload import BudgetCost, StoreSize, Workload, choose_layers, store_size

if TYPE_CHECKING:
    from ..extraction.plan import Plan
    from .benchmark import LLMBenchmark
    from .pipelines import PipelineText

SMALL_SHARE = 0.05
"""Share of a machine below which running the LLM online hardly slows training."""


@dataclass(frozen=True, repr=False)
class Estimate:
    """Cost and benefit of caching, as ``semroute estimate`` prints them.

    Attributes:
        facts: about the captions, and about the LLM if it was run.
        tables: title -> rows of cells, the first of which is the head.
        advice: sentences on whether caching pays.
        details: the same for machines, in plain JSON types.
    """

    facts: Summary
    tables: Mapping[str, list[list[str]]]
    advice: list[str]
    details: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = [str(self.facts)]
        for title, rows in self.tables.items():
            parts.append("\n  ".join([title, *str(Table(rows)).splitlines()]))
        parts.append("\n".join(f"- {sentence}" for sentence in self.advice))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [self.facts._repr_html_()]
        for title, rows in self.tables.items():
            parts.append(f"<strong>{in_html(title)}</strong>{Table(rows).to_html()}")
        advice = "".join(f"<li>{in_html(sentence)}</li>" for sentence in self.advice)
        return f"<div>{''.join(parts)}<ul>{advice}</ul></div>"

    def to_json(self) -> str:
        return json.dumps(self.details, indent=1)


def estimate(
    plan: Plan,
    *,
    codec: str | None = None,
    quality: float | None = None,
    rank: Rank | None = None,
    exact_layers: str | None = None,
    samples_per_second: float = 100.0,
    passes: float = 10.0,
    budget: int | None = None,
    probe: LLMBenchmark | None = None,
    pipeline: PipelineText | None = None,
    storage: str | None = None,
) -> Estimate:
    """Sizes, times, bandwidths and the break-even of caching a plan's captions.

    Args:
        plan: from :func:`semroute.pipeline.extraction.plan.make_plan`.
        codec, quality, rank, exact_layers: as for extraction. Default: all codecs.
        samples_per_second: speed of training, over all devices.
        passes: over the samples, in all epochs, seeds and ablations together.
        budget: bytes that the store may take: also what extraction must deliver then, and costs.
        probe: from :func:`semroute.pipeline.inspection.benchmark.run_benchmark`. Without it, times
            are unknown and codecs have their typical sizes.
        pipeline: from :func:`semroute.pipeline.inspection.pipelines.read_pipeline`: also what its
            network reads, and the bytes per caption.
        storage: a folder with large files on the disk that the store will be on: its speed is
            measured at the size of a caption, for two seconds per codec.

    Raises:
        InputError: an option for a codec that does not have it; or the disk of ``storage`` cannot
            be measured.
    """
    if codec is None and quality is not None:
        raise InputError(f"--quality {quality:g} needs --codec delta, linear or predictive")
    if codec is None and rank is not None:
        raise InputError(f"--rank {rank} needs --codec predictive")
    width = plan.identity.model.width
    specs = [request_codec(name, quality, rank) for name in ([codec] if codec else CODECS)]
    codecs = [
        _with_exact(plan, spec, exact_layers if codec or is_lossy(spec.name) else None, pipeline)
        for spec in (settle_rank(spec, width) for spec in specs)
    ]
    sizes = [
        [store_size(plan, layers, request, probe) for request in codecs]
        for layers in choose_layers(plan.identity.layers, plan.identity.model.num_layers)
    ]
    work = Workload.from_plan(plan, samples_per_second, passes, probe)
    facts, tables = _facts(plan, work, probe), _tables(sizes, work, probe)
    details = _details(plan, sizes, work, probe)
    advice = _advise(sizes[0], work)
    if budget is not None:
        costs = [BudgetCost.of(size, work, budget) for size in sizes[0]]
        tables[f"with a disk budget of {format_bytes(budget)}, {passes:g} passes"] = _budget_table(
            sizes[0], costs
        )
        details["budget"] = {
            "bytes": budget,
            "codecs": {s.codec.name: asdict(c) for s, c in zip(sizes[0], costs, strict=True)},
        }
        advice = [*advice, *_advise_on_budget(sizes[0], costs, budget)]
    if pipeline is not None:
        needs = _Needs.of(pipeline, plan)
        facts = Summary(facts.title, {**facts.items, **needs.facts()})
        tables = {needs.title: needs.table(sizes[0]), **tables}
        details = {**details, "pipeline": needs.details(sizes[0])}
    if storage is not None:
        speeds = [_measure(storage, size, len(plan.captions)) for size in sizes[0]]
        rows = [["codec", "disk"]]
        for size, speed in zip(sizes[0], speeds, strict=True):
            needed = work.disk_bytes_per_second(size)
            rows.append([size.codec_name, speed.compare(needed)])
        tables = {**tables, f"storage {storage}": rows}
        details = {**details, "storage": [asdict(speed) for speed in speeds]}
    return Estimate(facts, tables, advice=advice, details=details)


def _measure(storage: str, size: StoreSize, num_captions: int) -> StorageSpeed:
    """The speed of a disk for captions of a codec."""
    speed = measure_storage(storage, math.ceil(size.num_bytes / num_captions))
    if speed is None:
        raise InputError(
            f"{storage} cannot be measured: expected a folder on a local disk with at least "
            f"{format_bytes(MIN_BYTES)} of files that are larger than a caption, such as a store"
        )
    return speed


def _with_exact(
    plan: Plan,
    spec: Codec,
    exact_layers: str | None,
    pipeline: PipelineText | None,
) -> Codec:
    """The spec of a codec, with the layers that extraction would store exactly beside it."""
    identity = plan.identity
    if exact_layers is None and pipeline is not None and is_lossy(spec.name):
        base = {*pipeline.base_layers(identity.model.num_layers)} & {*identity.layers}
        return with_exact_layers(spec, sorted(base) if len(base) < len(identity.layers) else [])
    return with_exact_layers(spec, choose_exact_layers(exact_layers, spec.name, identity))


@dataclass(frozen=True)
class _Needs:
    """What a pipeline reads of captions, and where it is stored.

    Attributes:
        base: layers that its network reads.
        num_captions: that are stored.
        conditioning_bytes: per caption, on average; of a store that the pipeline needs, or that
            can be made.
    """

    pipeline: PipelineText
    base: tuple[int, ...]
    num_captions: int
    conditioning_bytes: float

    @classmethod
    def of(cls, pipeline: PipelineText, plan: Plan) -> _Needs:
        base = pipeline.base_layers(plan.identity.model.num_layers)
        return cls(pipeline, base, len(plan.captions), pipeline.conditioning_bytes(plan))

    @property
    def title(self) -> str:
        return f"bytes per caption for {self.pipeline.pipeline}, on average"

    def facts(self) -> dict[str, str]:
        preset = self.pipeline.preset
        why = "its own rows are those of the features"
        if preset.needs_conditioning:
            parts = ["rows of padding"] * preset.reads_padding
            parts += ["other rows of text"] * bool(preset.others)
            why = f"it reads {' and '.join(parts)}"
        needed = "needed" if preset.needs_conditioning else "not needed"
        return {
            "pipeline": f"{self.pipeline.pipeline}, --template {self.pipeline.preset_name}: reads "
            f"layers {', '.join(map(str, self.base))}; at most {preset.length} rows",
            "conditioning": f"{needed}: {why}; {format_bytes(int(self.conditioning_bytes))} per "
            "caption",
        }

    def table(self, sizes: Sequence[StoreSize]) -> list[list[str]]:
        """Bytes per caption by codec, of all layers."""
        rows = [["codec", "base layers", "features", "conditioning", "together"]]
        for size in sizes:
            features = size.num_bytes / self.num_captions
            extra = self.conditioning_bytes if self.pipeline.preset.needs_conditioning else 0.0
            exact = not is_lossy(size.codec.name) or {*self.base} <= {*size.codec.exact_layers}
            rows.append(
                [
                    size.codec_name,
                    "exact" if exact else "with the codec's error",
                    format_bytes(int(features)),
                    format_bytes(int(extra)) if extra else "-",
                    format_bytes(int(features + extra)),
                ]
            )
        return rows

    def details(self, sizes: Sequence[StoreSize]) -> dict[str, Any]:
        return {
            "class": self.pipeline.pipeline,
            "template": self.pipeline.preset_name,
            "base_layers": list(self.base),
            "conditioning_needed": self.pipeline.preset.needs_conditioning,
            "conditioning_bytes_a_caption": self.conditioning_bytes,
            "features_bytes_a_caption": {
                size.codec.name: size.num_bytes / self.num_captions for size in sizes
            },
        }


def _tables(
    sizes: Sequence[Sequence[StoreSize]], work: Workload, probe: LLMBenchmark | None
) -> dict[str, list[list[str]]]:
    """Sizes by layers and codec; costs of all layers by codec."""
    all_layers = sizes[0]
    by_layers = [["layers", *(size.codec_name for size in all_layers)]]
    by_layers += [[_name_layers(row[0].layers), *(size.text for size in row)] for row in sizes]
    costs = [_costs(size, work) for size in all_layers]
    measured = ", measured on held-out tokens of the probe" if probe else ""
    layers = _name_layers(all_layers[0].layers)
    return {
        f"bytes on disk{measured} (~: typical)": by_layers,
        f"layers {layers}, training at {work.samples_per_second:g} samples/s": [
            [*costs[0]],
            *([*row.values()] for row in costs),
        ],
    }


def _facts(plan: Plan, work: Workload, probe: LLMBenchmark | None) -> Summary:
    captions, identity = plan.captions, plan.identity
    cut = int(np.count_nonzero(captions.num_cut))
    token_bytes = 2 * len(identity.layers) * identity.model.width
    items = {
        "model": f"{short_name(plan.model.name)} "
        f"({identity.model.architecture}, {identity.model.num_layers} layers of "
        f"{identity.model.width}, {identity.dtype})",
        "captions": f"{len(captions):,} unique (the null caption included) of "
        f"{work.num_samples:,} samples",
        "tokens": f"{work.rows:,} to store, {work.sample_rows:.1f} per sample, at most "
        f"{captions.num_tokens.max()}; the LLM sees {work.tokens:,}; {cut:,} captions cut at "
        f"{identity.max_length} tokens",
        "bytes per token": f"{format_bytes(token_bytes)} in bf16",
    }
    if probe is not None:
        items["LLM"] = (
            f"{probe.tokens_per_second:,.0f} tokens/s on {probe.device} ({probe.num_captions:,} "
            f"captions in {probe.seconds:.1f} s)"
        )
    return Summary(f"estimate for {plan.samples.source}", items)


def _costs(size: StoreSize, work: Workload) -> dict[str, str]:
    """A row of the second table, by column."""
    row = {
        "codec": size.codec_name,
        "smaller": f"{size.raw_bytes / size.num_bytes:.2f}x",
        "read from disk": f"{format_bytes(work.disk_bytes_per_second(size))}/s",
    }
    if work.tokens_per_second is None:
        return row
    unknown = "not measured"
    seconds, passes = work.extraction_seconds(size), work.break_even(size)
    recompute = work.recompute_bytes_per_second(size)
    trial = size.trial
    return row | {
        "error of LN(h)": f"{trial.error:.1e}" if trial else unknown,
        "cores to decode": f"{work.decode_cores(size, trial):.2f}" if trial else unknown,
        "extraction": unknown if seconds is None else format_seconds(seconds),
        "costs as passes online": unknown if passes is None else f"{passes:.2f}",
        "LLM reads as fast as a disk of": f"{format_bytes(recompute)}/s",
    }


def _advise(sizes: Sequence[StoreSize], work: Workload) -> list[str]:
    """Sentences on whether caching pays, under the smallest of the codecs that were measured."""
    smallest = min(sizes, key=lambda size: size.num_bytes)
    advice = [
        f"Training at {work.samples_per_second:g} samples/s reads random captions at "
        f"{format_bytes(work.disk_bytes_per_second(smallest))}/s ({smallest.codec_name}) to "
        f"{format_bytes(max(map(work.disk_bytes_per_second, sizes)))}/s: storage must deliver that "
        "to all nodes together."
    ]
    measured = [size for size in sizes if size.trial is not None]
    if work.tokens_per_second is None or not measured:
        return [
            *advice,
            "Sizes with ~ are those of SmolLM2-135M on short captions. Those of this LLM, hours "
            "and whether caching pays are not known without --probe.",
        ]
    best = min(measured, key=lambda size: size.num_bytes)
    recompute = work.recompute_bytes_per_second(best)
    return [
        *advice,
        *_advise_on_share(work.online_share()),
        _advise_on_passes(best, work),
        f"The LLM recomputes a sample's hidden states as fast as a disk of "
        f"{format_bytes(recompute)}/s would read them ({best.codec_name}); from slower storage, "
        "caching loses time however many the passes.",
    ]


def _budget_table(sizes: Sequence[StoreSize], costs: Sequence[BudgetCost]) -> list[list[str]]:
    """What a disk budget costs, by codec."""
    rows = [["codec", "budget holds", "encoded again per pass", "extraction must deliver"]]
    measured = any(cost.seconds is not None for cost in costs)
    if measured:
        rows[0] += ["machines like this one", "all passes", "of a full cache", "of the LLM online"]
    for size, cost in zip(sizes, costs, strict=True):
        row = [
            size.codec_name,
            f"{cost.share:.1%}",
            f"{cost.again:.1%}",
            f"{cost.tokens_per_second:,.0f} tokens/s",
        ]
        if measured:
            known = cost.seconds is not None
            row += [
                f"{cost.machines:.2f}" if known else "not measured",
                format_seconds(cost.seconds) if cost.seconds is not None else "not measured",
                f"{cost.of_full_cache:.2f}x" if known else "not measured",
                f"{cost.of_online:.2f}x" if known else "not measured",
            ]
        rows.append(row)
    return rows


def _advise_on_budget(
    sizes: Sequence[StoreSize], costs: Sequence[BudgetCost], budget: int
) -> list[str]:
    """Sentences on training within a disk budget, under the smallest of the codecs."""
    size, cost = min(zip(sizes, costs, strict=True), key=lambda pair: pair[0].num_bytes)
    window, shard = DataConfig().window, ExtractRequest.model_fields["shard_bytes"].default
    least = 2 * (window + 1) * shard * size.num_bytes / size.raw_bytes
    if cost.share == 1:
        return [f"The budget holds the whole store ({size.codec_name}): it needs none."]
    advice = [
        f"With a budget ({size.codec_name}), every pass runs the LLM again over {cost.again:.0%} "
        "of the captions, all captions of a sample among them: it saves disk, not the LLM's time, "
        "and keeps the LLM out of the training processes."
    ]
    if budget < least:
        advice.append(
            f"About 2 x (data.window + 1) shards must fit: {format_bytes(int(least))} with a "
            f"window of {window} and shards of {format_bytes(shard)}. Take smaller ones."
        )
    return advice


def _advise_on_share(share: float) -> list[str]:
    """Sentences on running the LLM online."""
    if share > 1:
        return [f"Online, the LLM would need {share:.1f} machines like this one to feed training."]
    advice = [f"Online, the LLM would take {100 * share:.1f} % of a machine like this one."]
    if share < SMALL_SHARE:
        advice.append(
            "That is little, and caching saves no more time than that. It may still be worth it "
            "for the LLM's memory, or to repeat runs to the bit."
        )
    return advice


def _advise_on_passes(best: StoreSize, work: Workload) -> str:
    """From which pass on caching pays."""
    cost = work.break_even(best)
    assert cost is not None
    saved = work.online_seconds() * (work.passes - cost)
    first = int(np.floor(cost)) + 1
    if saved > 0:
        return (
            f"Extraction ({best.codec_name}) costs as much as {cost:.2f} passes online, so caching "
            f"pays from pass {first} on; {work.passes:g} passes save {format_seconds(saved)} of "
            "this machine."
        )
    return (
        f"Caching does NOT pay for {work.passes:g} passes: extraction ({best.codec_name}) costs as "
        f"much as {cost:.2f} passes online, {format_seconds(-saved)} more. It would pay from "
        f"pass {first} on."
    )


def _details(
    plan: Plan,
    sizes: Sequence[Sequence[StoreSize]],
    work: Workload,
    probe: LLMBenchmark | None,
) -> dict[str, Any]:
    """All numbers, with their units in their names."""
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
        "stores": [_store_details(size, work) for row in sizes for size in row],
    }


def _store_details(size: StoreSize, work: Workload) -> dict[str, Any]:
    known = work.tokens_per_second is not None
    return {
        "layers": size.layers,
        "codec": size.codec.name,
        "quality": size.codec.quality,
        "rank": size.codec.rank,
        "exact_layers": list(size.codec.exact_layers),
        "bytes": size.num_bytes,
        "bytes_bf16": size.raw_bytes,
        "measured": size.trial is not None,
        "error": size.trial and size.trial.error,
        "disk_bytes_per_second": work.disk_bytes_per_second(size),
        "decode_cores": size.trial and work.decode_cores(size, size.trial),
        "extraction_seconds": work.extraction_seconds(size),
        "break_even_passes": work.break_even(size),
        "recompute_bytes_per_second": work.recompute_bytes_per_second(size) if known else None,
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
