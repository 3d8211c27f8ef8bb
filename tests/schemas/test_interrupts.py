import os
import signal
import subprocess
import sys
import threading

import pytest

from semroute.schemas.interrupts import draining, ignoring_interrupts


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Every test leaves the handlers as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


class TestDraining:
    def test_the_first_ctrl_c_sets_the_event_and_the_second_interrupts(self):
        stop = threading.Event()
        with draining(stop):
            assert not stop.is_set()
            send(signal.SIGINT)
            assert stop.is_set()
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)

    def test_ctrl_c_interrupts_what_others_have_stopped(self):
        stop = threading.Event()
        with draining(stop):
            stop.set()
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)

    def test_sigterm_never_interrupts(self):
        stop = threading.Event()
        with draining(stop, signal.SIGTERM, signal.SIGINT):
            send(signal.SIGTERM)
            assert stop.is_set()
            send(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)

    def test_a_ctrl_c_that_follows_soon_is_the_same_one(self, monkeypatch):
        now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        stop = threading.Event()
        with draining(stop, signal.SIGTERM, signal.SIGINT, again_seconds=1):
            send(signal.SIGINT)
            assert stop.is_set()
            now = 100.9
            send(signal.SIGINT)
            now = 101.8
            send(signal.SIGINT)
            now = 103.0
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)

    def test_outside_the_main_thread_nothing_changes(self):
        found = []

        def run():
            with draining(threading.Event()), ignoring_interrupts():
                found.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert found == [signal.getsignal(signal.SIGINT)]


def test_ctrl_c_is_ignored_also_by_processes_that_are_started():
    script = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    with ignoring_interrupts():
        send(signal.SIGINT)
        output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.stdout.strip() == "True"
