"""A short timed run of the LLM, and of codecs on the hidden states that it gave.

Shapes: R rows (tokens), L layers, H width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...schemas import Codec, InputError
from ...schemas.verbosity import progress_bar
from ..codecs.base import Codec as OpenCodec
from ..codecs.chunks import compress, decompress
from ..codecs.error import CodecError
from ..codecs.fit import encode_rows, fit_codec, fit_rows
from ..executor.base import num_cpus
from ..extraction.plan import LINE_TOKENS, Plan
from ..models.llm import Encoder
from ..models.packing import NUM_CAPTIONS, supports_packing
from ..text.batching import Batch, batches

SECONDS = 20.0
"""Duration of a benchmark of the LLM."""
MAX_BYTES = 2_000_000_000
"""Largest amount of hidden states that a benchmark keeps, in bfloat16."""
HELD_OUT = 4
"""One caption in this many is held out from fitting codecs, and measured."""
MAX_HELD_ROWS = 2_048
MIN_CAPTIONS, CAPTIONS_PER_SECOND = 64, 100
"""Captions to make batches of, at least and per second of the benchmark; a shard has thousands."""
MIN_ROWS_PER_CHANNEL = 6
"""Fitted rows per channel below which matrices do worse than those of a store."""
REPEATS = 3
"""Timings of coding, of which the shortest counts."""


@dataclass(frozen=True)
class CodecTrial:
    """A codec measured on rows that it was not fitted on.

    Attributes:
        bits_per_value: with zstd, without what a store holds once, such as matrices.
        error: mean relative error of LN(h).
        encode_seconds: time per row on all cores, including compression.
        decode_bytes_per_second: bfloat16 bytes that one core decodes, including decompression.
    """

    bits_per_value: float
    error: float
    encode_seconds: float
    decode_bytes_per_second: float


@dataclass(frozen=True)
class LLMBenchmark:
    """A short run of the LLM over some of a plan's captions.

    Attributes:
        device: where it ran, with the number of CPU threads.
        num_captions, num_tokens: what the LLM saw, including the template and without padding.
        load_seconds, seconds: time to load the model, and to run it.
        hidden: the first rows, bfloat16 ``[R, L, H]``, on the CPU.
        held_out: rows that no codec is fitted on, bool ``[R]``.
    """

    device: str
    num_captions: int
    num_tokens: int
    load_seconds: float
    seconds: float
    hidden: torch.Tensor
    held_out: torch.Tensor

    @property
    def tokens_per_second(self) -> float:
        """Speed of one device."""
        return self.num_tokens / self.seconds

    def can_fit(self, codec: str) -> bool:
        """Whether there are enough rows to fit a codec, and others to measure it on."""
        fitted = int((~self.held_out).sum())
        has_matrices = codec in ("linear", "predictive")
        least = MIN_ROWS_PER_CHANNEL * self.hidden.shape[2] if has_matrices else 1
        return fitted >= least and bool(self.held_out.any())

    def try_codec(self, spec: Codec, layers: list[int], held: Sequence[int]) -> CodecTrial:
        """Fit a codec to some of the rows and measure it on the others.

        Args:
            spec: as requested.
            layers: numbers of the layers to code.
            held: numbers of all layers of ``hidden``.
        """
        positions = [held.index(layer) for layer in layers]
        num_fitted = fit_rows(self.hidden.shape[2])
        fitted = self.hidden[~self.held_out][:num_fitted, positions].float()
        codec, _ = fit_codec(spec, fitted, layers)
        rows = self.hidden[self.held_out][:MAX_HELD_ROWS, positions].float()
        seconds = []
        for _ in range(REPEATS):
            error = CodecError(positions)
            started = time.perf_counter()
            chunks = compress(codec, encode_rows(codec, rows, error))
            seconds.append(time.perf_counter() - started)
        num_bytes = sum(len(chunk) for of_array in chunks.values() for chunk in of_array)
        return CodecTrial(
            bits_per_value=8 * num_bytes / rows.numel(),
            error=error.to_dict()["mean"],
            encode_seconds=min(seconds) / len(rows),
            decode_bytes_per_second=_decode_speed(codec, chunks, len(rows)),
        )


def run_benchmark(plan: Plan, batch_tokens: int, seconds: float = SECONDS) -> LLMBenchmark:
    """Run the LLM for some seconds over batches as extraction makes them, in random order.

    All CPU cores are used, or one GPU.

    Args:
        batch_tokens: tokens per batch, including padding.

    Raises:
        InputError: hidden states are not finite.
    """
    torch.set_num_threads(num_cpus())
    started = time.perf_counter()
    encoder = Encoder(plan.model, plan.identity.layers, plan.identity.dtype)
    load_seconds = time.perf_counter() - started
    order = _random_batches(plan, encoder, batch_tokens, seconds)
    _encode(plan, encoder, order[0])  # to warm up
    hidden: list[torch.Tensor] = []
    held_out: list[torch.Tensor] = []
    spent = 0.0
    num_bytes = num_tokens = num_captions = 0
    with progress_bar(total=round(seconds), unit="s", desc="probe") as bar:
        for batch in order:
            started = time.perf_counter()
            layers = _encode(plan, encoder, batch)
            spent += time.perf_counter() - started
            num_tokens += int(plan.captions.sequence_lengths[batch.entries].sum())
            num_captions += len(batch)
            if num_bytes < MAX_BYTES:
                hidden.append(torch.stack(layers, 1))
                held_out.append(_held_out_rows(plan, batch))
                num_bytes += hidden[-1].nbytes
            bar.update(min(round(spent), round(seconds)) - bar.n)
            if spent > seconds:
                break
    rows = torch.cat(hidden)
    if not rows.isfinite().all():
        raise InputError("the LLM gave NaN or infinity; with --dtype bfloat16 try float32")
    threads = f", {num_cpus()} threads" if encoder.device.type == "cpu" else ""
    return LLMBenchmark(
        device=f"{encoder.device}{threads}",
        num_captions=num_captions,
        num_tokens=num_tokens,
        load_seconds=load_seconds,
        seconds=spent,
        hidden=rows,
        held_out=torch.cat(held_out),
    )


def _random_batches(plan: Plan, encoder: Encoder, batch_tokens: int, seconds: float) -> list[Batch]:
    """Batches of the first captions, in random order."""
    captions = plan.captions
    # The store's order is random, so its first captions are a fair sample.
    num = min(len(captions), max(MIN_CAPTIONS, int(seconds * CAPTIONS_PER_SECOND)))
    tried = [captions.sequences[i] for i in range(min(num, NUM_CAPTIONS))]
    line_tokens = LINE_TOKENS if supports_packing(encoder, tried) else None
    found = list(batches(captions.sequence_lengths[:num], batch_tokens, line_tokens))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def _encode(plan: Plan, encoder: Encoder, batch: Batch) -> list[torch.Tensor]:
    """Hidden states of a batch by layer, bfloat16 ``[R, H]`` each, on the CPU."""
    captions, layers = plan.captions, []

    def keep(_: int, hidden: torch.Tensor) -> None:
        layers.append(hidden.to(torch.bfloat16).cpu())

    sequences = [captions.sequences[i] for i in batch.entries]
    encoder.encode(sequences, captions.rows.of(batch.entries), keep, batch.row)
    return layers


def _held_out_rows(plan: Plan, batch: Batch) -> torch.Tensor:
    """Which rows of a batch are of captions that no codec is fitted on, bool ``[R]``."""
    entries = batch.entries
    num_rows = torch.from_numpy(plan.captions.num_tokens[entries])
    return torch.from_numpy(entries % HELD_OUT == 0).repeat_interleave(num_rows)


def _decode_speed(codec: OpenCodec, chunks: dict[str, list[bytes]], num_rows: int) -> float:
    """Bytes of bfloat16 that one core decodes in a second."""
    out = np.empty((num_rows, codec.num_layers, codec.width), np.uint16)
    positions = list(range(codec.num_layers))
    seconds = []
    for _ in range(1 + REPEATS):  # the first time compiles
        started = time.perf_counter()
        codec.decode(decompress(codec, chunks, num_rows), positions, np.arange(num_rows), out)
        seconds.append(time.perf_counter() - started)
    return out.nbytes / min(seconds)
