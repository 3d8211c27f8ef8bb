"""Reads a store through a cache for ever, in random order, and ends at the first wrong value."""

import sys
from pathlib import Path

import numpy as np

from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.remote.cache import ChunkCache
from semroute.pipeline.store.remote.chunks import ReadAhead

url, folder, size = sys.argv[1:]
store = open_features(url)
expected = {n: store.read([n]).bits for n in range(len(store))}
cache = ChunkCache(Path(folder), int(size))
rng = np.random.default_rng()
print("filling", flush=True)
while True:
    ahead = ReadAhead(cache, kept_bytes=1)
    store.fetch_by(ahead)
    for number in rng.permutation(len(store)).tolist():
        assert np.array_equal(store.read([number]).bits, expected[number])
    assert not ahead.counts.refetched
    ahead.close()
