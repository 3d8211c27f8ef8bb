import json
import os

import pytest
import torch
from click.testing import CliRunner

from semroute.cli import cli
from semroute.pipeline.executor.threads import wait_briefly
from semroute.trainer.runs.record import read_record
from semroute.trainer.runs.threads import describe_threads
from semroute.trainer.training.train import train


@pytest.fixture(autouse=True)
def one_thread(quiet_machine):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_says_and_records_its_threads(configure, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

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


def test_a_run_keeps_the_threads_it_began_with(configure, tmp_path, monkeypatch):
    torch.set_num_threads(2)  # of two cores
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def start(name, **changes):
        config = configure(tmp_path / name, **changes)
        file = tmp_path / "run.yaml"
        file.write_text(config.model_dump_json())
        result = CliRunner().invoke(cli, ["train", str(file)])
        assert result.exit_code == 0, result.output
        assert torch.get_num_threads() == 2
        return result.stderr, read_record(tmp_path / name).threads

    said, threads = start("busy", steps=1)
    assert threads == 1
    assert "1 thread on the CPU, GOMP_SPINCOUNT=1000; the run keeps this number" in said

    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    said, _ = start("busy", steps=2)  # quiet when it is resumed
    assert "1 thread on the CPU" in said
    assert "warning" not in said
    assert start("quiet", steps=1)[1] == 2

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "began with OMP_NUM_THREADS=1: with 2 its bits are not" in start("busy", steps=3)[0]


def test_one_thread_needs_no_advice(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    lines = describe_threads(type("Record", (), {"threads": None})())
    assert len(lines) == 2
    assert lines[1].startswith("warning: other work is running")
    assert "OMP_NUM_THREADS" not in lines[1]
