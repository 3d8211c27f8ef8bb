"""The hash by which texts are the same."""

import hashlib
from collections.abc import Iterable, Sequence


def fingerprint(rows: Iterable[Sequence[str] | str]) -> str:
    """sha256 over rows of texts, each text preceded by its length in bytes so that none can run on
    into the next."""
    digest = hashlib.sha256()
    for row in rows:
        texts = (row,) if isinstance(row, str) else row
        digest.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()
