"""Benchmarks that nobody can run here, run small."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from semroute.schemas import CodecName

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
STEP = {"penultimate", "depth", "depth, features from pinned memory", "joint"}
STEP |= {"depth, features by the LLM online"}


def run(out, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(GPU), str(out), "--tiny", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads((out / "gpu.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_that_a_gpu_is_asked_runs_on_a_cpu(tmp_path, start_command):
    """Each part as gpu.py starts it."""
    path, rows = str(GPU.parent), {}
    for name in runpy.run_path(str(GPU))["PARTS"]:
        if name in ("tests", "step-base", "step-paper"):
            continue  # alone below, and as step-small
        folder = tmp_path / name
        folder.mkdir()
        options = {"module": "gpu", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        part = start_command(folder, "--part", name, "--tiny", **options)
        assert part.wait(300) == 0, part.output.read_text()
        lines = (folder / "rows.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    assert [row["codec"] for row in rows["extraction"]] == ["bf16", "delta"]
    assert {row["codec"] for row in rows["decoding"]} == {*get_args(CodecName)}
    assert {row["strategy"] for row in rows["step-small"]} == STEP
    assert len(rows["stream"]) == 4
    assert all(0 <= row["data wait"] <= 1 for row in rows["stream"])
    assert {row["dtype"] for row in rows["sampling"]} == {"float32", "bfloat16"}
    assert all(row["apart"] < 0.05 for row in rows["sampling"])
    assert [row["setting"] for row in rows["scaling"]] == ["plain", "compile", "FSDP2"]
    assert all(row["checkpoint, GB"] > 0 for row in rows["scaling"])


def test_one_part_alone(tmp_path):
    code, found, printed = run(tmp_path, "--only", "tests")
    assert (code, [*found], found["tests"]["status"]) == (0, ["tests"], "ok")
    assert {row["result"] for row in found["tests"]["rows"]} == {"skipped"}
    assert len(found["tests"]["rows"]) > 10
    assert printed.strip() == (tmp_path / "gpu.md").read_text().strip()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "logs"}


def test_a_part_that_takes_too_long_is_stopped_alone(tmp_path):
    code, found, printed = run(tmp_path, "--only", "tests", "--only", "stream", "--minutes", "0.01")
    assert code == 1
    assert [*found] == ["tests", "stream"]
    assert all(part["status"].startswith("stopped after ") for part in found.values())
    assert "## Training from a store" in printed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_reader_of_an_object_store_is_timed(tmp_path):
    script = GPU.with_name("object_store.py")
    options = ["--captions=200", "--tokens", "2", "4", "--rounds=1", "--seconds=1", "--rate=400"]
    options += ["--only", "semroute bf16, shards, cache, 1 thread"]
    command = [sys.executable, str(script), str(tmp_path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| semroute")]
    assert len(rows) == 1
    assert 0 < float(rows[0][1].split()[0]) <= 440
