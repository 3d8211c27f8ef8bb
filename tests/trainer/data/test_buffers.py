import gc

import pytest
import torch

from semroute.trainer.data import throughput
from semroute.trainer.data.buffers import MAX_FREE, BufferPool, allocate
from semroute.trainer.data.throughput import InputStallMonitor


class TestBuffers:
    def test_memory_is_reused_once_nobody_looks(self):
        buffers = BufferPool()
        lent = buffers.lend(100_000)
        address = lent.ctypes.data
        view = torch.from_numpy(lent)[10:20]
        del lent
        assert buffers.lend(100_000).ctypes.data != address  # a view still looks at it
        del view
        gc.collect()
        addresses = {lent.ctypes.data for lent in [buffers.lend(90_000), buffers.lend(90_000)]}
        assert address in addresses

    def test_a_batch_that_is_kept_is_not_written_over(self):
        kept = [allocate((1000, 3), torch.float32).fill_(n) for n in range(20)]
        for n, tensor in enumerate(kept):
            assert (tensor == n).all()

    def test_few_are_kept(self):
        buffers = BufferPool()
        lent = [buffers.lend(1000 + n) for n in range(30)]
        del lent
        gc.collect()
        assert len(buffers._free) <= MAX_FREE

    def test_nothing_fits_into_nothing(self):
        assert allocate((0, 4), torch.bfloat16).shape == (0, 4)


class TestInputStallMonitor:
    def monitor(self, monkeypatch, waited, batches=30, seconds=10.0):
        """A monitor after so many batches of 100 rows and 8 samples in so many seconds."""
        now = [0.0]
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
        monitor = InputStallMonitor(workers=2)
        monitor.add(3.0, 100, 8)  # the first, which counts for nothing
        for _ in range(batches):
            now[0] += seconds / batches
            monitor.add(waited / batches, 100, 8)
        return monitor

    def stored(self, rows, samples):
        return 1e6 * rows + 1e3 * samples

    def test_says_what_is_needed_and_what_was_delivered(self, monkeypatch):
        monitor = self.monitor(monkeypatch, waited=5.0)
        warning = monitor.warning(self.stored)
        # 30 batches of 100.008 MB in 10 s, half of which was waiting
        assert "50% of the time" in warning
        assert "needs 600.0 MB/s" in warning
        assert "2 threads delivered 300.0" in warning
        assert "data.workers" in warning
        assert monitor.warning(self.stored) is None  # once

    @pytest.mark.parametrize(
        "case",
        [{"waited": 0.05}, {"waited": 2.0, "seconds": 4.0}, {"waited": 5.0, "batches": 10}],
    )
    def test_silent_where_data_is_in_time_or_it_is_too_early(self, monkeypatch, case):
        assert self.monitor(monkeypatch, **case).warning(self.stored) is None
