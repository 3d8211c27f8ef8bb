"""Memory that does not suffice: how it shows, and how much there is."""

import os

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_OVERFLOW = ("Storage size calculation overflowed", "integer multiplication overflow")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of PyTorch too, says that there is not enough memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in (*_WORDS, *_OVERFLOW)
    )


def memory_bytes() -> int | None:
    """Memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
