import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from threadpoolctl import threadpool_info, threadpool_limits

from semroute.cli import cli
from semroute.pipeline.executor.threads import WAITING, quiet_products, wait_briefly

BUSY = """
import os
os.getloadavg = lambda: (1000.0, 0.0, 0.0)
from semroute.cli import cli
cli()
"""


pytestmark = pytest.mark.usefixtures("quiet_machine")


def test_libgomp_is_told_before_torch_loads_it(tmp_path):
    keys = ("features", "latents", "output")
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {tmp_path / key}\n" for key in keys))
    run = subprocess.run(
        [sys.executable, "-c", BUSY, "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert "Error:" in run.stderr  # there is no store
    assert "GOMP_SPINCOUNT = '1000'" in run.stderr


@pytest.mark.parametrize(("name", "value"), [*zip(WAITING, ("7", "PASSIVE"), strict=True)])
def test_what_the_user_says_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    wait_briefly()
    assert {key: os.environ[key] for key in WAITING if key in os.environ} == {name: value}


def test_an_extraction_expects_other_work(tmp_path):
    arguments = [str(tmp_path / "captions.txt"), str(tmp_path / "features"), "--model", "llm"]
    assert CliRunner().invoke(cli, ["extract", *arguments]).exit_code == 1
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


def test_other_commands_expect_none_on_a_quiet_machine(tmp_path, monkeypatch):
    CliRunner().invoke(cli, ["status", str(tmp_path)])
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    CliRunner().invoke(cli, ["status", str(tmp_path)])
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_products_of_numpy_take_one_thread_beside_other_work(monkeypatch):
    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        with quiet_products():
            assert threads() == {2}
        monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
        with quiet_products():
            assert threads() == {1}
        assert threads() == {2}
