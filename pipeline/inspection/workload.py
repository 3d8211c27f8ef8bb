"""How much work caching is, and how fast this machine does it: what an estimate is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import Codec
from ...schemas.columns import numbers
from ...schemas.units import format_bytes
from ..codecs.registry import fitted_arrays

if TYPE_CHECKING:
    from ..extraction.plan import Plan
    from .benchmark import CodecTrial, LLMBenchmark

TYPICAL_BITS = {
    "bf16": {0: 16.0},
    "lossless": {0: 10.9, 1: 10.5, 2: 10.6, 3: 10.7, 6: 10.7},
    "delta": {0: 6.2, 1: 4.9, 2: 5.3, 3: 5.5, 6: 5.8},
    "linear": {0: 5.8, 1: 3.9, 2: 4.3, 3: 4.6, 6: 4.9},
    "predictive": {0: 6.2, 1: 4.5, 2: 4.9, 3: 5.2, 6: 5.5},
}
"""Codec -> distance between stored layers (0: a single one) -> bits per value, at quality 4; see
docs/benchmarks/codecs.md. One step of quality is about one bit."""
TYPICAL_QUALITY = 4.0
EXACT_BITS = 13.0
"""Bits per value of a layer that is stored exactly beside a codec with loss: bfloat16 in zstd."""


@dataclass(frozen=True)
class StoreSize:
    """Size of a store of some layers under one codec.

    Attributes:
        layers: LLM layers.
        codec: as it would be requested.
        num_bytes: on disk.
        once_bytes: the part that is read once instead of with every sample: matrices.
        raw_bytes: size in bfloat16, without a codec.
        trial: of the codec on rows of a benchmark. None: the size is a typical one.
    """

    layers: list[int]
    codec: Codec
    num_bytes: int
    once_bytes: int
    raw_bytes: int
    trial: CodecTrial | None

    @property
    def text(self) -> str:
        """``~184.2 MB``; without the sign if the size is measured or exact."""
        is_known = self.trial is not None or self.codec.name == "bf16"
        return ("" if is_known else "~") + format_bytes(self.num_bytes)

    @property
    def codec_name(self) -> str:
        """``delta q4``."""
        quality = self.codec.quality
        return self.codec.name if quality is None else f"{self.codec.name} q{quality:g}"


@dataclass(frozen=True)
class Workload:
    """The tokens of an extraction and of training, and the speed of the LLM on this machine.

    Attributes:
        tokens: tokens that the LLM sees in extraction, including the template.
        rows: tokens that are stored.
        sample_tokens, sample_rows: the same per sample in training, averaged over samples and over
            the captions of each.
        num_samples: samples per pass.
        samples_per_second, passes: of training.
        tokens_per_second: speed of the LLM on all devices of this machine; None if unknown.
        load_seconds: time to load the LLM.
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
    def from_plan(
        cls, plan: Plan, samples_per_second: float, passes: float, benchmark: LLMBenchmark | None
    ) -> Workload:
        """The workload of a plan's captions; without a benchmark, the LLM's speed is unknown."""
        import torch

        captions = plan.captions
        speed = None
        if benchmark is not None:
            speed = benchmark.tokens_per_second * max(1, torch.cuda.device_count())
        return cls(
            tokens=int(captions.sequence_lengths.sum()),
            rows=int(captions.num_tokens.sum()),
            sample_tokens=_mean_over_samples(captions.caption_ids, captions.sequence_lengths),
            sample_rows=_mean_over_samples(captions.caption_ids, captions.num_tokens),
            num_samples=len(plan.samples),
            samples_per_second=samples_per_second,
            passes=passes,
            tokens_per_second=speed,
            load_seconds=benchmark.load_seconds if benchmark else 0.0,
        )

    def online_seconds(self) -> float:
        """Time of the LLM for one pass, if it runs for every sample."""
        assert self.tokens_per_second is not None
        return self.num_samples * self.sample_tokens / self.tokens_per_second

    def online_share(self) -> float:
        """Share of this machine that the LLM would use at the requested training speed."""
        assert self.tokens_per_second is not None
        return self.samples_per_second * self.sample_tokens / self.tokens_per_second

    def extraction_seconds(self, size: StoreSize) -> float | None:
        """Time of the LLM over every unique caption once, and of the codec; None if unknown."""
        if self.tokens_per_second is None or size.trial is None:
            return None
        coding = self.rows * size.trial.encode_seconds
        return self.load_seconds + self.tokens / self.tokens_per_second + coding

    def sample_bytes(self, size: StoreSize) -> float:
        """Bytes on disk per sample."""
        return self.sample_rows * (size.num_bytes - size.once_bytes) / self.rows

    def disk_bytes_per_second(self, size: StoreSize) -> float:
        """Speed at which training reads from disk."""
        return self.samples_per_second * self.sample_bytes(size)

    def decode_cores(self, size: StoreSize, trial: CodecTrial) -> float:
        """CPU cores needed to decode what training reads."""
        rate = self.samples_per_second * self.sample_rows * size.raw_bytes / self.rows
        return rate / trial.decode_bytes_per_second

    def recompute_bytes_per_second(self, size: StoreSize) -> float:
        """Disk speed at which reading a sample takes as long as running the LLM over it."""
        assert self.tokens_per_second is not None
        return self.tokens_per_second / self.sample_tokens * self.sample_bytes(size)

    def break_even(self, size: StoreSize) -> float | None:
        """Passes with the LLM online that cost as much as extraction; None if unknown."""
        seconds = self.extraction_seconds(size)
        return None if seconds is None else seconds / self.online_seconds()


@dataclass(frozen=True)
class BudgetCost:
    """Cost of training from a store that takes no more than a disk budget.

    Attributes:
        share: of the whole store that the budget holds, at most 1.
        again: share of the captions that each pass but the first encodes again. With f as the
            share, a shard is still there in the next pass if that comes to it soon enough, which
            happens to f**2 / 2 of all shards in two random orders.
        tokens_per_second: that extraction must deliver so that training does not wait.
        machines: like this one, for the LLM and the codec; None if its speed is unknown.
        seconds: of this machine for all passes; None if unknown.
        of_full_cache: the same as a multiple of extraction of the whole store.
        of_online: the same as a multiple of running the LLM in training.
    """

    share: float
    again: float
    tokens_per_second: float
    machines: float | None
    seconds: float | None
    of_full_cache: float | None
    of_online: float | None

    @classmethod
    def of(cls, size: StoreSize, work: Workload, budget: int) -> BudgetCost:
        """The cost of a budget in bytes."""
        share = min(1.0, budget / size.num_bytes)
        again = 1 - share**2 / 2 if share < 1 else 0.0
        passes_per_second = work.samples_per_second / work.num_samples
        once = work.extraction_seconds(size)
        machines = seconds = of_full_cache = of_online = None
        if once is not None:
            each = once - work.load_seconds
            seconds = once + max(0.0, work.passes - 1) * again * each
            machines = each * passes_per_second
            of_full_cache = seconds / once
            of_online = seconds / (work.passes * work.online_seconds())
        # The first pass encodes everything, so this is what it takes not to wait in any.
        tokens = work.tokens * passes_per_second
        return cls(share, again, tokens, machines, seconds, of_full_cache, of_online)


def store_size(
    plan: Plan, layers: list[int], codec: Codec, benchmark: LLMBenchmark | None
) -> StoreSize:
    """Size of a plan's store if it held these layers under this codec.

    It is measured on rows of the benchmark if these suffice, and otherwise typical.
    """
    width, trial = plan.identity.model.width, None
    num_exact = len({*codec.exact_layers} & {*layers})
    if benchmark is not None and benchmark.can_fit(codec.name):
        exact = tuple(layer for layer in codec.exact_layers if layer in layers)
        spec = codec.model_copy(update={"exact_layers": exact})
        trial = benchmark.try_codec(spec, layers, plan.identity.layers)
        bits = trial.bits_per_value
    else:
        bits = _typical_bits(layers, codec) + EXACT_BITS * num_exact / len(layers)
    num_values = int(plan.captions.num_tokens.sum()) * len(layers) * width
    fitted = fitted_arrays(codec, width).values()
    per_layer = sum(math.prod(shape) * dtype.itemsize for shape, dtype in fitted if len(shape) > 1)
    matrices = per_layer * len(layers)
    num_bytes = int(num_values * bits / 8) + matrices
    return StoreSize(layers, codec, num_bytes, matrices, 2 * num_values, trial)


def choose_layers(layers: list[int], num_layers: int) -> list[list[int]]:
    """All of the layers, each second and third counted from the last, and the last but one.

    Args:
        num_layers: L, of the LLM. Layers L and L + 1 are two outputs of one block, and count once.
    """
    blocks = layers[:-1] if {num_layers, num_layers + 1} <= {*layers} else layers
    fewer = [blocks[::-1][::step][::-1] for step in (2, 3)] + [blocks[-2:-1]]
    return [layers] + [choice for choice in fewer if 0 < len(choice) < len(layers)]


def _typical_bits(layers: list[int], codec: Codec) -> float:
    """Bits per value, from the nearest smaller distance between layers that is known."""
    distance = int(np.median(np.diff(layers))) if len(layers) > 1 else 0
    known = TYPICAL_BITS[codec.name]
    bits = known[max(key for key in known if key <= distance)]
    return bits if codec.quality is None else bits + codec.quality - TYPICAL_QUALITY


def _mean_over_samples(caption_ids: pa.ListArray, values: np.ndarray) -> float:
    """Mean over samples of the mean over each one's captions, as training picks one of them."""
    counts = numbers(pc.list_value_length(caption_ids))
    weights = 1 / np.repeat(counts, counts)
    return float(np.average(values[numbers(caption_ids.flatten())], weights=weights))
