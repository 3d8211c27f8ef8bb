"""A short timed run of the LLM, and what codecs do to what it gave."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ...schemas import InputError
from ..codecs.base import Codec
from ..codecs.chunks import compress, decompress
from ..codecs.error import CodecError
from ..codecs.fit import encode_rows, fit_codec, fit_rows
from ..executor.base import num_cpus
from ..extraction.plan import LINE_TOKENS, Plan
from ..models.llm import Encoder
from ..models.packing import NUM_CAPTIONS, supports_packing
from ..text.batching import batches

SECONDS = 20.0
"""That the LLM runs."""
MAX_BYTES = 2_000_000_000
"""Of hidden states that a probe keeps, in bfloat16."""
HELD_OUT = 4
"""One caption in so many is not fitted on, but measured."""
MAX_HELD_ROWS = 2_048
CAPTIONS_A_SECOND = 100
"""Captions that the batches are made of, for each second of the probe; a shard has thousands."""
MIN_ROWS_A_CHANNEL = 6
"""Fitted rows a channel below which the matrices of ``linear`` do worse than those of a store."""
REPEATS = 3
"""Timings of coding, of which the shortest counts."""


@dataclass(frozen=True)
class CodecTrial:
    """What a codec did to rows that it was not fitted on.

    Attributes:
        bits_per_value: with zstd; what a store holds once, such as matrices, is not in it.
        error: mean relative error of LN(h).
        encode_seconds: a row, compression included, with all cores.
        decode_bytes_per_second: bfloat16 bytes that one core gives, decompression included.
    """

    bits_per_value: float
    error: float
    encode_seconds: float
    decode_bytes_per_second: float


@dataclass(frozen=True)
class LLMBenchmark:
    """A short run of the LLM over some of a plan's captions.

    Attributes:
        device: that it ran on, with the number of CPU threads.
        num_captions, num_tokens: that the LLM saw, template included, padding not.
        load_seconds, seconds: of loading the model, and of running it.
        hidden: rows kept, bfloat16 ``[R, L, H]``, on the CPU.
        held: rows that nothing is fitted on, bool ``[R]``.
    """

    device: str
    num_captions: int
    num_tokens: int
    load_seconds: float
    seconds: float
    hidden: torch.Tensor
    held: torch.Tensor

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.num_tokens / self.seconds

    def can_fit(self, codec: str) -> bool:
        """Whether there are rows enough to fit a codec, and others to measure it on."""
        fitted = int((~self.held).sum())
        least = MIN_ROWS_A_CHANNEL * self.hidden.shape[2] if codec == "linear" else 1
        return fitted >= least and bool(self.held.any())

    def try_codec(self, name: str, quality: float | None, positions: list[int]) -> CodecTrial:
        """Fit a codec to some of the rows and measure it on the others.

        Args:
            positions: of the layers, among those of the probe.
        """
        most = fit_rows(self.hidden.shape[2])
        codec, _ = fit_codec(name, self.hidden[~self.held][:most, positions].float(), quality)
        rows = self.hidden[self.held][:MAX_HELD_ROWS, positions].float()
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
    """Run the LLM over batches as extraction makes them, in random order, for some seconds.

    All CPU cores are used, or one GPU.

    Args:
        batch_tokens: tokens a batch, padding included.

    Raises:
        InputError: hidden states are not finite.
    """
    identity, captions = plan.identity, plan.captions
    torch.set_num_threads(num_cpus())
    started = time.perf_counter()
    encoder = Encoder(plan.model, identity.layers, identity.dtype)
    load_seconds = time.perf_counter() - started
    # The store's order is random, so its first captions are a fair sample.
    num = min(len(captions), max(64, int(seconds * CAPTIONS_A_SECOND)))
    lengths = captions.sequence_lengths[:num]
    tried = [captions.sequences[i] for i in range(min(num, NUM_CAPTIONS))]
    line_tokens = LINE_TOKENS if supports_packing(encoder, tried) else None
    order = list(batches(lengths, batch_tokens, line_tokens))
    order = [order[i] for i in np.random.default_rng(0).permutation(len(order))]
    parts: list[torch.Tensor] = []
    held: list[torch.Tensor] = []
    kept_bytes = num_tokens = num_captions = 0
    spent = 0.0
    with tqdm(total=round(seconds), unit="s", desc="probe") as bar:
        # The first one twice: to warm up.
        for number, each in enumerate([order[0], *order]):
            batch = each.entries
            layers: list[torch.Tensor] = []

            def keep(_: int, hidden: torch.Tensor, layers: list[torch.Tensor] = layers) -> None:
                layers.append(hidden.to(torch.bfloat16).cpu())

            started = time.perf_counter()
            encoder.encode(
                [captions.sequences[i] for i in batch],
                captions.kept[batch].tolist(),
                keep,
                each.row,
            )
            took = time.perf_counter() - started
            if number == 0:
                continue
            spent += took
            num_tokens += int(lengths[batch].sum())
            num_captions += len(batch)
            if kept_bytes < MAX_BYTES:
                parts.append(torch.stack(layers, 1))
                kept_bytes += parts[-1].nbytes
                counts = torch.from_numpy(lengths[batch] - captions.kept[batch])
                held.append(torch.from_numpy(batch % HELD_OUT == 0).repeat_interleave(counts))
            bar.update(min(round(spent), round(seconds)) - bar.n)
            if spent > seconds:
                break
    hidden = torch.cat(parts)
    if not hidden.isfinite().all():
        raise InputError("the LLM gave NaN or infinity; with --dtype bfloat16 try float32")
    return LLMBenchmark(
        device=str(encoder.device)
        + (f", {num_cpus()} threads" if encoder.device.type == "cpu" else ""),
        num_captions=num_captions,
        num_tokens=num_tokens,
        load_seconds=load_seconds,
        seconds=spent,
        hidden=hidden,
        held=torch.cat(held),
    )


def _decode_speed(codec: Codec, chunks: dict[str, list[bytes]], num_rows: int) -> float:
    out = np.empty((num_rows, codec.num_layers, codec.width), np.uint16)
    positions = list(range(codec.num_layers))
    seconds = []
    for _ in range(1 + REPEATS):  # the first time compiles
        started = time.perf_counter()
        codec.decode(decompress(codec, chunks, num_rows), positions, np.arange(num_rows), out)
        seconds.append(time.perf_counter() - started)
    return out.nbytes / min(seconds)
