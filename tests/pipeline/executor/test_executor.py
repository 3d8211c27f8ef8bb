import os
import signal
import threading
import time

import pytest

pytest.importorskip("torch")

from semroute.pipeline.executor.base import ATTEMPTS, Deferred, DiskFullError, Interrupted
from semroute.pipeline.executor.dask import IN_FLIGHT, DaskExecutor
from semroute.pipeline.executor.local import LocalExecutor

pytestmark = pytest.mark.usefixtures("fork_server")


def make_executor(workers):
    return DaskExecutor(workers) if workers else LocalExecutor()


def outcomes(executor, function, shards=range(6)):
    with executor:
        return dict(
            executor.run(list(shards), function, lambda shard: (shard,), on_progress=ignore)
        )


def ignore(_shard, _done):
    pass


@pytest.mark.parametrize("workers", [0, 2])
class TestRun:
    def test_every_shard_has_its_result(self, workers):
        assert outcomes(make_executor(workers), abs) == {shard: shard for shard in range(6)}

    @pytest.mark.parametrize("writing", [False, True])
    def test_what_raises_is_tried_again_and_given_up_alone(self, workers, writing, tmp_path):
        def fail(shard, folder=str(tmp_path)):
            def finish():
                if shard == 3 or (shard == 1 and tries == 1):
                    raise RuntimeError(f"shard {shard}")
                return shard

            with open(f"{folder}/{shard}", "a") as file:
                file.write("x")
            tries = os.path.getsize(f"{folder}/{shard}")
            return Deferred(finish) if writing else finish()

        executor = make_executor(workers)
        found = outcomes(executor, fail)
        assert isinstance(found.pop(3), RuntimeError)
        assert found == {shard: shard for shard in (0, 1, 2, 4, 5)}
        tries = [len((tmp_path / str(shard)).read_text()) for shard in range(6)]
        assert tries == [1, 2, 1, ATTEMPTS, 1, 1]
        assert executor.num_errors == 1 + ATTEMPTS

    def test_a_full_disk_ends_it(self, workers):
        def full(_shard):
            raise OSError(28, "No space left on device", "somewhere")

        with pytest.raises(DiskFullError):
            outcomes(make_executor(workers), full)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
    def test_a_signal_lets_shards_at_work_end(self, workers, number):
        def slow(shard):
            time.sleep(0.2)
            return shard

        seen = []

        def interrupt(executor):
            for shard, _ in executor.run(range(50), slow, lambda s: (s,), on_progress=ignore):
                seen.append(shard)
                if len(seen) == 2:
                    os.kill(os.getpid(), number)

        with make_executor(workers) as executor, pytest.raises(Interrupted):
            interrupt(executor)
        assert 2 <= len(seen) <= 2 + IN_FLIGHT * max(1, workers)
        assert executor.stop.is_set()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_is_written_while_the_next_is_at_work(workers, tmp_path):
    def task(shard, folder=str(tmp_path)):
        def write():
            for _ in range(600):
                if shard == 3 or os.path.exists(f"{folder}/{shard + 1}"):
                    return shard
                time.sleep(0.05)
            raise RuntimeError(f"nobody began shard {shard + 1}")

        with open(f"{folder}/{shard}", "x"):
            return Deferred(write)

    assert outcomes(make_executor(workers), task, range(4)) == {shard: shard for shard in range(4)}


def test_workers_are_without_dasks_profiler_and_pages_are_for_this_machine():
    from dask.config import get

    with DaskExecutor(1) as executor:
        assert executor.client
        assert get("scheduler", None) is None  # a program's own Dask goes on as it was
        (enabled,) = executor.ask(get, "distributed.worker.profile.enabled").values()
        assert not enabled
        assert executor.dashboard().startswith("http://127.0.0.1:")
    assert not LocalExecutor().dashboard()


class TestDeaths:
    def test_a_shard_that_kills_every_worker_is_given_up_and_no_other(self):
        def kill(shard):
            if shard == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
            return shard

        found = outcomes(DaskExecutor(2), kill, range(8))
        assert type(found.pop(2)).__name__ == "KilledWorker"
        assert found == {shard: shard for shard in (0, 1, 3, 4, 5, 6, 7)}

    def test_a_worker_that_is_killed_is_replaced(self):
        def pid(shard):
            time.sleep(0.1)
            return os.getpid()

        found = {}
        with DaskExecutor(2) as executor:
            for shard, worker in executor.run(range(20), pid, lambda s: (s,), on_progress=ignore):
                found[shard] = worker
                if len(found) == 3:
                    killed = worker
                    os.kill(killed, signal.SIGKILL)
            executor.client.wait_for_workers(2, timeout=60)
            replaced = executor.ask(os.getpid).values()
        assert sorted(found) == list(range(20))
        assert len({*replaced}) == 2
        assert killed not in replaced

    def test_workers_end_with_the_block(self):
        def pid(_shard):
            return os.getpid()

        with DaskExecutor(1) as executor:
            ((_, worker),) = executor.run([0], pid, lambda s: (s,), on_progress=ignore)
            assert executor.ask(os.getpid) == {next(iter(executor.ask(os.getpid))): worker}
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_it_runs_outside_of_the_main_thread():
    found = {}
    thread = threading.Thread(target=lambda: found.update(outcomes(LocalExecutor(), abs)))
    thread.start()
    thread.join()
    assert len(found) == 6
