"""Numbers of bytes as text."""

import re

from .errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """``"256MB"`` -> 256,000,000; ``"1GiB"`` -> 1,073,741,824.

    Raises:
        InputError: not a positive number with a known unit.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    num_bytes = int(float(match[1]) * unit) if match and unit else 0
    if num_bytes <= 0:
        raise InputError(
            f"{text!r} is not a size; expected a number and a unit, such as 256MB or 1GiB"
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """``256000000`` -> ``"256.0 MB"``."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
