import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from semroute.pipeline.store import lock
from semroute.pipeline.store.lock import LockedError, is_dead, locked, read_driver
from semroute.schemas import LOCK_FILE, InputError

HOLD = """
import sys, time
from pathlib import Path
from semroute.pipeline.store.lock import locked
with locked(Path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A store, and another process that holds its lock."""
    store = tmp_path / "store"
    command = [sys.executable, "-c", HOLD, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield store, process
        process.kill()


def edit(store, **changes):
    document = json.loads((store / LOCK_FILE).read_text())
    (store / LOCK_FILE).write_text(json.dumps(document | changes))


def test_the_second_driver_is_refused_and_told_of_the_first(other):
    store, process = other
    with (
        pytest.raises(
            LockedError, match=rf"being written by process {process.pid} on .*, since 20"
        ),
        locked(store, print),
    ):
        raise AssertionError
    assert read_driver(store).pid == process.pid


def test_the_lock_of_the_dead_is_taken_over(other):
    store, process = other
    process.kill()
    process.wait()
    assert is_dead(read_driver(store))
    said = []
    with locked(store, said.append):
        assert read_driver(store).pid == os.getpid()
    who = f"process {process.pid} on {lock.socket.gethostname()}"
    assert said == [f"taking over the lock of {who}, which is gone"]
    assert not (store / LOCK_FILE).exists()


def test_a_pid_that_is_used_again_is_not_the_driver(other):
    store, process = other
    edit(store, pid=os.getpid())
    assert is_dead(read_driver(store))
    edit(store, pid=process.pid)
    assert is_dead(read_driver(store)) is False


@pytest.mark.parametrize(
    ("place", "alive"),
    [
        ({"host": "elsewhere"}, True),
        ({"host": "elsewhere"}, False),
        ({"namespace": "another boot"}, True),
        ({"namespace": ""}, True),  # of an early version
        ({"namespace": "a container", "pid": 1}, False),
    ],
)
def test_a_driver_of_another_machine_or_container_is_watched(other, place, alive, monkeypatch):
    store, process = other
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    process.kill()  # its beats come from here
    edit(store, **place)
    assert is_dead(read_driver(store)) is None
    stop = threading.Event()

    def beat():
        while alive and not stop.wait(0.1):
            (store / LOCK_FILE).touch()

    thread = threading.Thread(target=beat)
    thread.start()
    said = []
    try:
        if alive:
            with pytest.raises(LockedError, match="being written"), locked(store, said.append):
                raise AssertionError
        else:
            with locked(store, said.append):
                assert read_driver(store).pid == os.getpid()
    finally:
        stop.set()
        thread.join()
    assert "watching for 1 s whether it is alive" in said[0]


def test_a_living_driver_in_a_container_of_this_host_name_is_not_taken_for_dead(tmp_path):
    """In a PID namespace of its own, where its pid is 1 or one that we do not have."""
    unshare = shutil.which("unshare")
    command = [unshare or "", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    command += ["--kill-child"]
    if unshare is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no PID namespaces")
    store = tmp_path / "store"
    command += [sys.executable, "-c", HOLD, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        owner = read_driver(store)
        assert owner.host == lock.socket.gethostname()
        assert owner.pid != process.pid
        assert is_dead(owner) is None
        process.kill()


def test_a_driver_whose_processes_are_hidden_is_watched(other, monkeypatch):
    """As by ``hidepid`` of /proc, from another user."""
    store, _ = other

    def refuse(pid, number):
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(lock, "_start_ticks", lambda pid: "")
        patched.setattr(os, "kill", refuse)
        assert is_dead(read_driver(store)) is None
    assert is_dead(read_driver(store)) is False


def test_a_live_driver_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with locked(tmp_path, print):
        before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / LOCK_FILE).stat().st_mtime_ns > before


def test_only_one_of_many_takes_it(tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-c", HOLD.replace("time.sleep(60)", "time.sleep(5)"), str(store)]
    with locked(store, print):
        edit(store, pid=2**22 + 1)  # a driver that is gone
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, **options) for _ in range(4)]
        output = [process.communicate() for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1, 1]
    assert sum("LockedError" in errors for _, errors in output) == 3


def test_nothing_is_left_of_a_store_that_was_never_begun(tmp_path):
    with pytest.raises(InputError), locked(tmp_path / "store", print):
        raise InputError("bad input")
    assert not (tmp_path / "store").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"), locked(tmp_path / "file", print):
        raise AssertionError
