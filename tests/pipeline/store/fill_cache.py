"""Reads a remote store through a cache for ever, in random order, and ends at the first value that
is not that of the same store on a disk. It begins when a file is there."""

import sys
import time
from pathlib import Path

import numpy as np

from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.remote.cache import ChunkCache
from semroute.pipeline.store.remote.chunks import ReadAhead

url, copy, folder, size, begin = sys.argv[1:]
store, local = open_features(url), open_features(copy)
expected = {n: local.read([n]).bits for n in range(len(local))}
cache = ChunkCache(Path(folder), int(size))
rng = np.random.default_rng()
print("ready", flush=True)
while not Path(begin).exists():
    time.sleep(0.01)
while True:
    ahead = ReadAhead(cache, kept_bytes=1)
    store.fetch_by(ahead)
    for number in rng.permutation(len(store)).tolist():
        assert np.array_equal(store.read([number]).bits, expected[number])
    assert not ahead.counts.refetched
    ahead.close()
