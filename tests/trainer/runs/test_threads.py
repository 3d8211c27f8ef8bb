import json
import os

import pytest
import torch

from semroute.pipeline.executor.threads import WAITING, wait_briefly
from semroute.trainer.runs.record import read_record
from semroute.trainer.runs.threads import describe_threads
from semroute.trainer.training.train import train


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """One thread, no other load, and no word in the environment on how threads wait."""
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_says_and_records_its_threads(configure, tmp_path, capsys, monkeypatch):
    def start(**changes):
        train(configure(tmp_path / "run", **changes))
        return capsys.readouterr().err

    said = start(steps=1)
    assert "1 thread on the CPU\n" in said  # nothing else runs here
    assert "warning" not in said
    record = read_record(tmp_path / "run")
    assert record.threads == 1

    monkeypatch.setattr(os, "getloadavg", lambda: (1000.25, 0.0, 0.0))
    torch.set_num_threads(2)
    wait_briefly()
    said = start(steps=2)
    assert "2 threads on the CPU, GOMP_SPINCOUNT=1000\n" in said
    assert "began with OMP_NUM_THREADS=1: with 2 its bits are not" in said
    assert "load average 1000.2 on" in said
    assert "OMP_NUM_THREADS=1 can be faster" in said
    assert read_record(tmp_path / "run").threads == 1

    # As an earlier version wrote it.
    file = tmp_path / "run" / "run.json"
    document = json.loads(file.read_text())
    del document["threads"]
    file.write_text(json.dumps(document))
    assert "began" not in start(steps=3)


def test_one_thread_needs_no_advice(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    lines = describe_threads(type("Record", (), {"threads": None})())
    assert len(lines) == 2
    assert lines[1].startswith("warning: other work is running")
    assert "OMP_NUM_THREADS" not in lines[1]
