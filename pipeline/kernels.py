"""Loops of reading and decoding, compiled by numba on first use and kept where it can write.

They hold no lock, so threads run them side by side. Shapes: R rows, L layers, H width. Row i of the
codes is decoded to row ``targets[i]`` of ``out``.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiled code is kept for the next process, where there is a folder to keep it in."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor the home can be written
        return numba.njit(nogil=True)(function)


def _memcpy_code(_context, target, source, num_bytes):  # type: ignore[no-untyped-def]
    """C's memcpy between two addresses. The assignment of a slice becomes a loop, which takes four
    times as long."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        to, start = (builder.inttoptr(value, cgutils.voidptr_t) for value in arguments[:2])
        cgutils.raw_memcpy(builder, to, start, arguments[2], 1)

    return types.void(types.uintp, types.uintp, types.intp), generate


_memcpy: Any = intrinsic(_memcpy_code)


@_compiled
def copy_runs(source, starts, sizes, targets, out):  # type: ignore[no-untyped-def]
    """Copy runs of bytes, int64 ``[runs]`` each, in bytes. Bounds are the caller's to check: beyond
    them lies memory that is not the arrays'."""
    for run in range(len(starts)):
        _memcpy(
            np.uintp(out.ctypes.data + targets[run]),
            np.uintp(source.ctypes.data + starts[run]),
            sizes[run],
        )


@_compiled
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


@_compiled
def decode_lossless(code, escape, mantissa, base, follow, places, targets, out):  # type: ignore[no-untyped-def]
    rows, _, width = mantissa.shape
    zigzag = np.empty(width, np.uint8)
    distance = np.empty(width, np.uint8)
    for row in range(rows):
        for layer in range(len(places)):
            _unpack(code[row, layer], escape[row, layer], zigzag)
            for channel in range(width):
                zigzag[channel] = (zigzag[channel] >> 1) ^ -(zigzag[channel] & 1)
            if layer == 0:
                distance[:] = zigzag
            else:
                known = follow[layer]
                for channel in range(width):
                    distance[channel] = zigzag[channel] + known[distance[channel]]
            if places[layer] >= 0:
                bits = out[targets[row], places[layer]]
                for channel in range(width):
                    exponent = np.uint16(np.uint8(distance[channel] + base[layer, channel]))
                    rest = np.uint16(mantissa[row, layer, channel])
                    bits[channel] = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)


@_compiled
def _scalars(scalar):  # type: ignore[no-untyped-def]
    """Mean and deviation: uint8 [5] -> two float32."""
    both = np.empty(2, np.uint32)
    for i in range(2):
        both[i] = (np.uint32(scalar[2 * i + 1]) << 24) | (np.uint32(scalar[2 * i]) << 16)
    values = both.view(np.float32)
    return values[0], values[1]


@_compiled
def _to_bits(values, mean, deviation, bits, out):  # type: ignore[no-untyped-def]
    """values * deviation + mean -> bits of bfloat16, to nearest even. ``bits`` is room for it."""
    width = len(values)
    room = bits.view(np.float32)
    for channel in range(width):
        room[channel] = values[channel] * deviation + mean
    for channel in range(width):
        value = bits[channel]
        rounded = value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))
        out[channel] = np.uint16(rounded >> np.uint32(16))


@_compiled
def decode_delta(code, escape, scalar, scales, slope, bias, places, targets, out):  # type: ignore[no-untyped-def]
    rows, _, width = escape.shape
    state = np.zeros(width, np.float32)
    zigzag = np.empty(width, np.int32)
    bits = np.empty(width, np.uint32)
    for row in range(rows):
        state[:] = 0
        for layer in range(len(places)):
            _unpack(code[row, layer], escape[row, layer], zigzag)
            scale = scales[scalar[row, layer, 4]]
            for channel in range(width):
                number = np.float32((zigzag[channel] >> 1) ^ -(zigzag[channel] & 1))
                state[channel] = (
                    state[channel] * slope[layer, channel] + bias[layer, channel]
                ) + number * scale
            if places[layer] >= 0:
                mean, deviation = _scalars(scalar[row, layer])
                _to_bits(state, mean, deviation, bits, out[targets[row], places[layer]])


@_compiled
def decode_codes(code, escape, scalar, layer, scales, out):  # type: ignore[no-untyped-def]
    """Codes of one layer times their scale, float32 [R, H]."""
    zigzag = np.empty(out.shape[1], np.int32)
    for row in range(len(out)):
        _unpack(code[row, layer], escape[row, layer], zigzag)
        scale = scales[scalar[row, layer, 4]]
        for channel in range(len(zigzag)):
            number = np.float32((zigzag[channel] >> 1) ^ -(zigzag[channel] & 1))
            out[row, channel] = number * scale


@_compiled
def denormalise(state, scalar, layer, place, targets, out):  # type: ignore[no-untyped-def]
    bits = np.empty(state.shape[1], np.uint32)
    for row in range(len(state)):
        mean, deviation = _scalars(scalar[row, layer])
        _to_bits(state[row], mean, deviation, bits, out[targets[row], place])
