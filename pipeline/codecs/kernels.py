"""Loops of codecs on a CPU, compiled by numba on first use: one pass over rows that stay in the
cache, where tensors take twenty passes over memory.

Compiled code is cached on disk where a folder can be written. It releases the GIL, so threads run
side by side. Shapes: R rows, L layers, H width. Row i of codes is decoded to row ``targets[i]`` of
``out``.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from .loops import check_fitted, check_output, check_predictive, check_shapes, code_sizes, compiled

MIN_PART_ROWS = 64
"""Fewest rows that are worth a thread."""

LANES = 32
"""Lanes of the search for the largest values; 16 and 64 were slower."""

ROUND = np.float32(12_582_912.0)
"""1.5 * 2**23: adding and subtracting it rounds numbers below 2**22 to nearest even."""


def _summing(function: Callable[..., Any]) -> Any:
    """Compile a sum in any order, and so vectorised; of NaN the result is undefined."""
    return compiled(function, fastmath={"reassoc", "nsz", "nnan"})


# ----------------------------------------------------------------------------- reading and decoding


def _memcpy_code(_context, target, source, num_bytes):  # type: ignore[no-untyped-def]
    """C's memcpy between two addresses; the assignment of a slice compiles to a loop, which takes
    four times as long."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        to, start = (builder.inttoptr(value, cgutils.voidptr_t) for value in arguments[:2])
        cgutils.raw_memcpy(builder, to, start, arguments[2], 1)

    return types.void(types.uintp, types.uintp, types.intp), generate


_memcpy: Any = intrinsic(_memcpy_code)


def copy_runs(
    source: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    targets: np.ndarray,
    out: np.ndarray,
) -> None:
    """Copy runs of bytes.

    Args:
        source, out: uint8 ``[bytes]``.
        starts, sizes, targets: in bytes, int64 ``[runs]``.

    Raises:
        ValueError: a run is not inside its array; nothing was copied.
    """
    runs = (starts, sizes, targets)
    for array in (source, out):
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise ValueError(f"found {array.dtype} {array.shape}; expected contiguous bytes")
    if any(array.dtype != np.int64 or array.shape != starts.shape for array in runs):
        raise ValueError("expected one start, size and target for each run, int64")
    outside = _copy_runs(source, starts, sizes, targets, out)
    if outside >= 0:
        start, size, target = (int(array[outside]) for array in runs)
        raise ValueError(
            f"{size:,} bytes at {start:,} to {target:,} are not inside {len(source):,} and "
            f"{len(out):,} bytes"
        )


@compiled
def _copy_runs(source, starts, sizes, targets, out):  # type: ignore[no-untyped-def]
    """The first run that is not inside its array; if there is none, -1, and all are copied."""
    for run in range(len(starts)):
        size = sizes[run]
        if not 0 <= size <= min(len(source), len(out)):
            return run
        if not (0 <= starts[run] <= len(source) - size and 0 <= targets[run] <= len(out) - size):
            return run
    for run in range(len(starts)):
        _memcpy(
            np.uintp(out.ctypes.data + targets[run]),
            np.uintp(source.ctypes.data + starts[run]),
            sizes[run],
        )
    return -1


@compiled
def _unpack(code, escape, out):  # type: ignore[no-untyped-def]
    """Zigzag codes of one row and layer: uint8 [H] or [ceil(H / 2)], [H] -> [H]."""
    width = len(out)
    if len(code) == width and width > 1:
        for channel in range(width):
            out[channel] = code[channel]
            if code[channel] == 255:
                out[channel] = 254 + escape[channel]
    else:
        for pair in range(width // 2):
            out[2 * pair] = code[pair] & 15
            out[2 * pair + 1] = code[pair] >> 4
        if width % 2:
            out[width - 1] = code[width // 2] & 15
        for channel in range(width):
            if out[channel] == 15:
                out[channel] = 14 + escape[channel]


def decode_lossless(
    code: np.ndarray,
    escape: np.ndarray,
    mantissa: np.ndarray,
    base: np.ndarray,
    follow: np.ndarray,
    slots: np.ndarray,
    targets: np.ndarray,
    out: np.ndarray,
) -> None:
    """As :meth:`semroute.pipeline.codecs.lossless.Lossless.decode_torch`; slots are those of
    :func:`semroute.pipeline.codecs.base.output_slots`.

    Raises:
        ValueError: shapes, rows or slots do not belong together.
    """
    width, num = mantissa.shape[-1], len(slots)
    codes = {"code": code, "escape": escape, "mantissa": mantissa}
    sizes = {"code": code_sizes(width)[1:], "escape": (width,), "mantissa": (width,)}
    check_shapes(codes, sizes, num)
    check_fitted({"base": base}, num, width)
    check_fitted({"follow": follow}, num, 256)
    check_output(targets, slots, out, len(code), width)
    _decode_lossless(code, escape, mantissa, base, follow, slots, targets, out)


@compiled
def _decode_lossless(code, escape, mantissa, base, follow, slots, targets, out):  # type: ignore[no-untyped-def]
    rows, _, width = mantissa.shape
    zigzag = np.empty(width, np.uint8)
    distance = np.empty(width, np.uint8)
    for row in range(rows):
        for layer in range(len(slots)):
            _unpack(code[row, layer], escape[row, layer], zigzag)
            for channel in range(width):
                zigzag[channel] = (zigzag[channel] >> 1) ^ -(zigzag[channel] & 1)
            if layer == 0:
                distance[:] = zigzag
            else:
                known = follow[layer]
                for channel in range(width):
                    distance[channel] = zigzag[channel] + known[distance[channel]]
            if slots[layer] >= 0:
                bits = out[targets[row], slots[layer]]
                for channel in range(width):
                    exponent = np.uint16(np.uint8(distance[channel] + base[layer, channel]))
                    rest = np.uint16(mantissa[row, layer, channel])
                    bits[channel] = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)


@compiled
def _scalars(scalar):  # type: ignore[no-untyped-def]
    """Mean and deviation: uint8 [5] -> two float32."""
    both = np.empty(2, np.uint32)
    for i in range(2):
        both[i] = (np.uint32(scalar[2 * i + 1]) << 24) | (np.uint32(scalar[2 * i]) << 16)
    values = both.view(np.float32)
    return values[0], values[1]


@compiled
def _to_bits(values, mean, deviation, bits, out):  # type: ignore[no-untyped-def]
    """values * deviation + mean -> bits of bfloat16, to nearest even; ``bits`` is scratch."""
    width = len(values)
    floats = bits.view(np.float32)
    for channel in range(width):
        floats[channel] = values[channel] * deviation + mean
    for channel in range(width):
        value = bits[channel]
        rounded = value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))
        out[channel] = np.uint16(rounded >> np.uint32(16))


def decode_delta(
    code: np.ndarray,
    escape: np.ndarray,
    scalar: np.ndarray,
    scales: np.ndarray,
    slope: np.ndarray,
    bias: np.ndarray,
    slots: np.ndarray,
    targets: np.ndarray,
    out: np.ndarray,
) -> None:
    """As :meth:`semroute.pipeline.codecs.predictive.Predictive.decode_torch`; slots are those of
    :func:`semroute.pipeline.codecs.base.output_slots`.

    Raises:
        ValueError: shapes, rows or slots do not belong together.
    """
    width, num = escape.shape[-1], len(slots)
    check_predictive(code, escape, scalar, scales, width, num)
    check_fitted({"slope": slope, "bias": bias}, num, width)
    check_output(targets, slots, out, len(code), width)
    _decode_delta(code, escape, scalar, scales, slope, bias, slots, targets, out)


@compiled
def _decode_delta(code, escape, scalar, scales, slope, bias, slots, targets, out):  # type: ignore[no-untyped-def]
    rows, _, width = escape.shape
    state = np.zeros(width, np.float32)
    zigzag = np.empty(width, np.int32)
    bits = np.empty(width, np.uint32)
    for row in range(rows):
        state[:] = 0
        for layer in range(len(slots)):
            _unpack(code[row, layer], escape[row, layer], zigzag)
            scale = scales[scalar[row, layer, 4]]
            for channel in range(width):
                number = np.float32((zigzag[channel] >> 1) ^ -(zigzag[channel] & 1))
                state[channel] = (
                    state[channel] * slope[layer, channel] + bias[layer, channel]
                ) + number * scale
            if slots[layer] >= 0:
                mean, deviation = _scalars(scalar[row, layer])
                _to_bits(state, mean, deviation, bits, out[targets[row], slots[layer]])


def decode_codes(
    code: np.ndarray,
    escape: np.ndarray,
    scalar: np.ndarray,
    layer: int,
    scales: np.ndarray,
    out: np.ndarray,
) -> None:
    """Codes of one layer times their scale, float32 [R, H].

    Raises:
        ValueError: shapes do not belong together.
    """
    check_predictive(code, escape, scalar, scales, out.shape[-1], layer + 1)
    if len(out) != len(code):
        raise ValueError(f"out is {out.shape}; expected {len(code)} rows")
    _decode_codes(code, escape, scalar, layer, scales, out)


@compiled
def _decode_codes(code, escape, scalar, layer, scales, out):  # type: ignore[no-untyped-def]
    zigzag = np.empty(out.shape[1], np.int32)
    for row in range(len(out)):
        _unpack(code[row, layer], escape[row, layer], zigzag)
        scale = scales[scalar[row, layer, 4]]
        for channel in range(len(zigzag)):
            number = np.float32((zigzag[channel] >> 1) ^ -(zigzag[channel] & 1))
            out[row, channel] = number * scale


def denormalise(
    state: np.ndarray,
    scalar: np.ndarray,
    layer: int,
    slot: int,
    targets: np.ndarray,
    out: np.ndarray,
) -> None:
    """LN(h) of one layer, float32 [R, H] -> bits of bfloat16 of h, in a slot of ``out``.

    Raises:
        ValueError: shapes, rows or slot do not belong together.
    """
    rows, width = state.shape
    check_shapes({"scalar": scalar}, {"scalar": (5,)}, layer + 1)
    check_output(targets, np.array([slot]), out, rows, width)
    if len(scalar) != rows:
        raise ValueError(f"scalar has {len(scalar)} rows; expected {rows}")
    _denormalise(state, scalar, layer, slot, targets, out)


@compiled
def _denormalise(state, scalar, layer, slot, targets, out):  # type: ignore[no-untyped-def]
    bits = np.empty(state.shape[1], np.uint32)
    for row in range(len(state)):
        mean, deviation = _scalars(scalar[row, layer])
        _to_bits(state[row], mean, deviation, bits, out[targets[row], slot])


# ----------------------------------------------------------------------------------------- encoding

# Loops run over indices: LLVM does not vectorise what numba makes of a loop over the values of an
# array, which is ten times slower.


@_summing
def _mean(values):  # type: ignore[no-untyped-def]
    """The mean, in float64 so that rounding makes no variance where there is none."""
    total = np.float64(0)
    for i in range(len(values)):
        total += values[i]
    return np.float32(total / len(values))


@_summing
def _variance(values, mean):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(values)):
        total += (values[i] - mean) * (values[i] - mean)
    return total / np.float32(len(values))


@_summing
def _squares(values):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i] * values[i]
    return total


@compiled
def _widest(values):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude; as integers they have the same order, and vectorise."""
    bits, widest = values.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        size = np.int32(bits[i] & np.int32(0x7FFFFFFF))  # without the cast it would be 64 bits wide
        widest = size if size > widest else widest
    return widest


@compiled
def _largest(values, most, sizes, tops):  # type: ignore[no-untyped-def]
    """Indices of the values of largest magnitude, the first of equal ones.

    Value i belongs to lane i modulo the number of lanes, and each lane's largest is kept: one
    vectorised pass finds them all. Then each rank looks at the lanes' largest and, to replace the
    one it takes, at the values of one lane. (One pass that keeps a sorted few would branch for each
    value in a way that no processor predicts.) Six values in three lanes::

        values  5 1 7 | 2 9 3      lane 0: 5 2    lane 1: 1 9    lane 2: 7 3
        tops    5 9 7              the largest is 9, in lane 1, whose next is 1: tops 5 1 7

    Args:
        most: receives the indices, int64 [most].
        sizes: scratch, uint32 [number of values, rounded up to whole lanes].
        tops: scratch, uint32 [lanes].
    """
    bits, lanes = values.view(np.uint32), len(tops)
    for i in range(len(bits)):
        sizes[i] = (bits[i] & np.uint32(0x7FFFFFFF)) + np.uint32(1)  # 0 means taken, or padding
    sizes[len(bits) :] = 0
    tops[:] = 0
    for start in range(0, len(sizes), lanes):
        dealt = sizes[start : start + lanes]
        for lane in range(lanes):
            tops[lane] = max(tops[lane], dealt[lane])
    for rank in range(len(most)):
        top = np.uint32(0)
        for lane in range(lanes):
            top = max(top, tops[lane])
        first = len(sizes)
        for lane in range(lanes):
            if tops[lane] == top:
                index = lane
                while sizes[index] != top:
                    index += lanes
                first = min(first, index)
        most[rank] = first
        sizes[first] = 0
        top = np.uint32(0)
        for index in range(first % lanes, len(sizes), lanes):
            top = max(top, sizes[index])
        tops[first % lanes] = top


@compiled
def _to_bf16(value, bits):  # type: ignore[no-untyped-def]
    """Bits of bfloat16, to nearest even; ``bits`` is scratch, uint32 [1]."""
    bits.view(np.float32)[0] = value
    return (bits[0] + np.uint32(0x7FFF) + ((bits[0] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(
        16
    )


@compiled
def _from_bf16(value, bits):  # type: ignore[no-untyped-def]
    bits[0] = np.uint32(value) << np.uint32(16)
    return bits.view(np.float32)[0]


@compiled
def encode_delta(  # type: ignore[no-untyped-def]
    hidden, below, slope, bias, scales, step, massive, eps, code, escape, scalar, state, decoded
):
    """One layer, as :meth:`semroute.pipeline.codecs.predictive.Predictive.encode`.

    Args:
        hidden: float32 [R, H].
        below: state of the layer below, float32 [R, H], or [0, H].
        slope, bias: float32 [H].
        scales: float32 [256].
        step: in units of the RMS.
        massive: number of channels left out of the RMS.
        code, escape, scalar: uint8 [R, H or ceil(H / 2)], uint16 [R, H], uint8 [R, 5]; written.
        state, decoded: float32 and uint16 [R, H]; written.
    """
    # Loops are short so that each is vectorised; what they hand on stays in the cache.
    rows, width = hidden.shape
    narrow = code.shape[1] < width
    limit = np.float32(15 if narrow else 255)
    normed, residual = np.empty(width, np.float32), np.empty(width, np.float32)
    zigzag, low = np.empty(width, np.float32), np.empty(width + 1, np.uint8)
    scratch, bits = np.empty(width, np.uint32), np.empty(1, np.uint32)
    one = bits.view(np.float32)
    most, tops = np.empty(massive, np.int64), np.empty(LANES, np.uint32)
    sizes = np.empty(-(-width // LANES) * LANES, np.uint32)
    low[width] = 0
    widest = np.float32(32_767 / 2**0.0625 - 1)
    for row in range(rows):
        values, into, high, coded = hidden[row], state[row], escape[row], decoded[row]
        exact = _mean(values)
        variance = _variance(values, exact)
        mean_bits = _to_bf16(exact, bits)
        mean = _from_bf16(mean_bits, bits)
        deviation_bits = _to_bf16(np.sqrt(variance + np.float32(eps)), bits)
        deviation = _from_bf16(deviation_bits, bits)
        for channel in range(width):
            normed[channel] = (values[channel] - mean) / deviation
        if len(below):
            before = below[row]
            for channel in range(width):
                into[channel] = before[channel] * slope[channel] + bias[channel]
        else:
            into[:] = bias
        for channel in range(width):
            residual[channel] = normed[channel] - into[channel]
        rest = _squares(normed)
        _largest(normed, most, sizes, tops)
        for i in range(massive):
            rest -= normed[most[i]] * normed[most[i]]
        rms = np.sqrt(max(rest, np.float32(0)) / np.float32(width - massive))
        bits[0] = _widest(residual)
        needed = max(max(rms * np.float32(step), one[0] / widest), np.float32(1e-30))
        number = np.float32(8) * (np.log2(needed) + np.float32(24))
        number = (number + ROUND) - ROUND
        chosen = np.uint8(min(max(number, np.float32(0)), np.float32(255)))
        scale = scales[chosen]
        for channel in range(width):
            units = residual[channel] / scale
            units = min(max(units, np.float32(-32_767)), np.float32(32_767))
            residual[channel] = (units + ROUND) - ROUND
        for channel in range(width):
            into[channel] += residual[channel] * scale
        for channel in range(width):
            sign = np.float32(residual[channel] < np.float32(0))
            zigzag[channel] = np.float32(2) * abs(residual[channel]) - sign
        for channel in range(width):
            low[channel] = np.uint8(np.int32(min(zigzag[channel], limit)))
        for channel in range(width):
            over = max(zigzag[channel] - (limit - np.float32(1)), np.float32(0))
            high[channel] = np.uint16(np.int32(over))  # exact: under 2**24
        if narrow:
            for pair in range(code.shape[1]):
                code[row, pair] = low[2 * pair] | (low[2 * pair + 1] << 4)
        else:
            code[row] = low[:width]
        scalar[row, 0], scalar[row, 1] = mean_bits & 0xFF, mean_bits >> 8
        scalar[row, 2], scalar[row, 3] = deviation_bits & 0xFF, deviation_bits >> 8
        scalar[row, 4] = chosen
        _to_bits(into, mean, deviation, scratch, coded)


@compiled
def measure_errors(hidden, coded, eps, largest, relative, bare):  # type: ignore[no-untyped-def]
    """Errors of LN(h), as :func:`semroute.pipeline.codecs.error.relative_errors`.

    Args:
        hidden: float32 [R, H].
        coded: bits of bfloat16, uint16 [R, H].
        largest: number of channels left out of ``bare``.
        relative, bare: float32 [R]; written.
    """
    rows, width = hidden.shape
    found_bits = np.empty(width, np.uint32)
    found = found_bits.view(np.float32)
    expected, sizes = np.empty(width, np.float32), np.empty(-(-width // LANES) * LANES, np.uint32)
    most, tops = np.empty(largest, np.int64), np.empty(LANES, np.uint32)
    for row in range(rows):
        values, bits = hidden[row], coded[row]
        for channel in range(width):
            found_bits[channel] = np.uint32(bits[channel]) << np.uint32(16)
        mean, found_mean = _mean(values), _mean(found)
        inverse = np.float32(1) / np.sqrt(_variance(values, mean) + np.float32(eps))
        found_inverse = np.float32(1) / np.sqrt(_variance(found, found_mean) + np.float32(eps))
        for channel in range(width):
            expected[channel] = (values[channel] - mean) * inverse
        for channel in range(width):
            found[channel] = (found[channel] - found_mean) * found_inverse - expected[channel]
        norm, total = _squares(expected), _squares(found)
        known = np.float32(norm > np.float32(1e-6))
        relative[row] = known * np.sqrt(total / max(norm, np.float32(1e-6)))
        _largest(expected, most, sizes, tops)
        for i in range(largest):
            norm -= expected[most[i]] * expected[most[i]]
            total -= found[most[i]] * found[most[i]]
        norm = max(norm, np.float32(1e-6))
        bare[row] = known * np.sqrt(max(total, np.float32(0)) / norm)


def in_parts(function: Callable[[slice], None], num_rows: int) -> None:
    """Call a compiled loop for slices of all rows, in as many threads as torch would use."""
    import torch

    parts = max(1, min(torch.get_num_threads(), num_rows // MIN_PART_ROWS))
    bounds = [num_rows * part // parts for part in range(parts + 1)]
    slices = [slice(*pair) for pair in pairwise(bounds)]
    if parts == 1:
        function(slices[0])
        return
    for _ in _threads(torch.get_num_threads()).map(function, slices):
        pass


@lru_cache(maxsize=1)
def _threads(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num)
