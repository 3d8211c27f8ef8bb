import asyncio
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("distributed")  # or a setting for a while takes its defaults away at the end

from distributed import Client, Scheduler

from semroute.pipeline.executor import dask as dask_executor
from semroute.pipeline.executor import jobs, workers
from semroute.pipeline.executor.base import ClusterLostError
from semroute.pipeline.executor.connect import MOST_WORKERS, connect
from semroute.pipeline.executor.jobqueue import with_lifetime
from semroute.pipeline.executor.workers import inspect_workers
from semroute.pipeline.extraction.features import extract
from semroute.schemas import InputError

SHARD_BYTES = 60_000
PROFILE = "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"


def contents(store):
    files = [*store.glob("*.parquet"), *store.glob("hidden.zarr/**/*")]
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def options(samples_file, tiny_llm):
    return {
        "source": str(samples_file),
        "model": str(tiny_llm),
        "shard_bytes": SHARD_BYTES,
        "threads": 1,
        "limit": 60,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, options):
    path = tmp_path_factory.mktemp("undisturbed") / "features"
    extract(features=path, workers=0, report=[].append, **options)
    return contents(path)


class Machines:
    """A scheduler and workers, each a process that its own command started.

    Args:
        start: starts a module with arguments.
    """

    def __init__(self, folder, start):
        self.file = folder / "scheduler.json"
        self.start = start
        options = ("--port", "0", "--no-dashboard", "--scheduler-file", self.file)
        self.scheduler = start("distributed.cli.dask_scheduler", *options)
        # It is there before it is written.
        while not (self.file.exists() and self.file.read_text().endswith("}")):
            time.sleep(0.05)

    def worker(self, *words):
        name = ["--scheduler-file", self.file, "--nthreads", "1", "--no-dashboard", *words]
        return self.start("distributed.cli.dask_worker", *name)


@pytest.fixture
def machines(tmp_path, monkeypatch, start_command):
    """Their processes are forked, and workers without the nanny that would start them anew."""
    monkeypatch.setenv(PROFILE, "False")

    def start(module, *words):
        given = ["--no-nanny"] if module.endswith("worker") else []
        return start_command(*words, *given, module=module)

    return Machines(tmp_path, start)


@pytest.fixture
def start_anew(tmp_path):
    """Starts a module as a shell does."""
    processes = []

    def start(module, *words):
        command = [sys.executable, "-m", module, *map(str, words)]
        with (tmp_path / "log.txt").open("a") as log:
            options = {"stdout": log, "stderr": log, "start_new_session": True, "cwd": tmp_path}
            processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class TestSchedulerFile:
    @pytest.mark.slow
    def test_workers_that_come_and_go_write_the_same_bytes(
        self, machines, options, undisturbed, tmp_path
    ):
        first = machines.worker()
        said = []

        def report(line):
            said.append(line)
            if "to do:" in line:
                machines.worker()
                os.killpg(first.pid, signal.SIGKILL)

        path = tmp_path / "features"
        extract(features=path, cluster=str(machines.file), report=report, **options)
        assert contents(path) == undisturbed
        said = [line for line in said if not line.startswith("waiting for the first worker")]
        assert said[0].startswith(f"1 workers of {machines.file} on 1 hosts, 0 of them with a GPU")
        assert any(f"workers of {machines.file}" in line or "to do:" in line for line in said[1:])

    def test_it_waits_for_the_first_worker_and_says_so(self, machines, monkeypatch):
        monkeypatch.setattr(workers, "WAIT_SECONDS", 0)
        said, wanted = [], []

        def count(dask_scheduler):
            return dask_scheduler.adaptive_target()

        def report(line):
            if not said:
                until = time.monotonic() + 60
                while not any(wanted) and time.monotonic() < until:
                    wanted.append(executor.client.run_on_scheduler(count))
                monkeypatch.setenv(PROFILE, "True")
                machines.worker("--nthreads", "3")
            said.append(line)

        with connect(str(machines.file), None) as executor:
            found = inspect_workers(executor, "s3://bucket/store", report)
            assert list(executor.ask(os.getcwd).values())
        assert said[0] == f"waiting for the first worker of {machines.file}"
        assert wanted[-1] == 1  # or an adaptive cluster would wait for work as we do for it
        *profiled, shared = said[1:-1]
        assert len(profiled) == (sys.version_info < (3, 12))
        assert all(
            "start them with DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False" in line
            for line in profiled
        )
        assert "1 workers have several threads" in shared
        assert not found.have_gpus

    def test_tls_is_what_dask_is_configured_with(self, tmp_path, monkeypatch, start_anew):
        """Of a scheduler and a worker as a shell starts them."""
        pytest.importorskip("cryptography")
        import dask
        from distributed.security import Security

        made = Security.temporary()
        files = {"cert": made.tls_client_cert, "key": made.tls_client_key}
        paths = {name: tmp_path / f"{name}.pem" for name in files}
        for name, content in files.items():
            paths[name].write_text(content)
        settings = {
            "distributed.comm.require-encryption": True,
            "distributed.comm.default-scheme": "tls",
            "distributed.comm.tls.ca-file": str(paths["cert"]),
        }
        for role in ("client", "scheduler", "worker"):
            settings |= {f"distributed.comm.tls.{role}.{n}": str(p) for n, p in paths.items()}
        config = {}
        with dask.config.set(settings, config=config):
            (tmp_path / "dask.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "dask.yaml"))
        machines = Machines(tmp_path, start_anew)
        machines.worker()
        address = json.loads(machines.file.read_text())["address"]
        assert address.startswith("tls://")
        for name in (address, str(machines.file)):
            with dask.config.set(settings), connect(name, None) as executor:
                assert inspect_workers(executor, str(tmp_path / "store"), print).threads >= 1
            with pytest.raises(InputError, match="no Dask scheduler answers"):
                connect(name, None).threads()

    def test_a_folder_that_workers_do_not_see_is_refused(self, machines, tmp_path):
        machines.worker()
        folder = tmp_path / "mine"
        with connect(str(machines.file), None) as executor:
            executor.client.wait_for_workers(1, timeout=60)
            with pytest.raises(InputError, match=r"do not see the folder .*mine.*that all nodes"):
                inspect_workers(executor, str(folder / "store"), print)

    def test_a_scheduler_that_dies_while_workers_are_asked(self, machines):
        machines.worker()
        with connect(str(machines.file), None) as executor:
            executor.client.wait_for_workers(1, timeout=60)
            with pytest.raises(ClusterLostError, match=r"is gone: .*rerun the same command"):
                executor.ask(os.killpg, machines.scheduler.pid, signal.SIGKILL)

    def test_a_scheduler_that_dies_loses_nothing(self, machines, options, undisturbed, tmp_path):
        machines.worker()
        path = tmp_path / "features"

        def report(line):
            if "to do:" in line:
                os.killpg(machines.scheduler.pid, signal.SIGKILL)

        import dask

        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
            pytest.raises(ClusterLostError, match="rerun the same command to resume"),
        ):
            extract(features=path, cluster=str(machines.file), report=report, **options)
        extract(features=path, workers=0, report=[].append, **options)
        assert contents(path) == undisturbed


def write_jobs(kind="local", **options):
    """jobs.yaml: up to two jobs, by default of this machine."""
    options |= {"memory": "2GB", "python": sys.executable, "walltime": "01:00:00"}
    jobs = {"kind": kind, "maximum_jobs": 2, "options": options}
    Path("jobs.yaml").write_text(yaml.safe_dump(jobs))


class TestJobs:
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its Popen
    def test_jobs_of_this_machine(self, options, undisturbed, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_jobs(cores=1, processes=1)
        path = tmp_path / "features"
        said, pages = [], []

        def hear(line):
            said.append(line)
            if line.startswith("Dask's dashboard: "):
                with urlopen(line.partition(": ")[2], timeout=30) as page:
                    pages.append(page.read())

        extract(features=path, cluster="jobs.yaml", report=hear, **options)
        assert contents(path) == undisturbed
        said = [line for line in said if not line.startswith("waiting for the first worker")]
        assert "workers of jobs.yaml" in said[0]
        assert not any("profiler" in line for line in said)  # it is switched off in jobs
        link = r"Dask's dashboard: http://127\.0\.0\.1:\d+/[0-9a-f]{32}/status"
        assert any(re.fullmatch(link, line) for line in said)
        assert len(pages) == 1
        assert b"bokeh" in pages[0]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_there_are_as_many_jobs_as_there_is_work_for(self, tmp_path, monkeypatch):
        """From one on, that has one task at a time although its job has four cores."""
        monkeypatch.chdir(tmp_path)
        write_jobs(cores=4)
        seen, both = tmp_path / "seen", tmp_path / "both"
        seen.mkdir()  # the keys of the run are beside it, under a random name

        def work(shard):
            number = os.getpid()
            while not both.exists():
                (seen / str(number)).touch()
                if len(list(seen.iterdir())) > 1:
                    both.touch()
                time.sleep(0.1)
            return number

        with connect("jobs.yaml", None) as executor:
            assert inspect_workers(executor, str(tmp_path), [].append).threads >= 1
            assert list(executor.threads().values()) == [1]
            found = executor.run(range(4), work, lambda shard: (shard,), on_progress=print)
            assert len({number for _, number in found}) == 2

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"kind": "slrum", "maximum_jobs": 2, "options": {}}, "kind"),
            ({"kind": "local", "options": {}}, "maximum_jobs"),
            ({"kind": "local", "maximum_jobs": 1, "minimum_jobs": 2, "options": {}}, "more than"),
            (
                {"kind": "local", "maximum_jobs": 1, "minimum_jobs": 0, "options": {}},
                "minimum_jobs",
            ),
            ({"kind": "local", "maximum_jobs": 1, "options": {"walltime": "4 h"}}, "such as 04:00"),
            ("text", "holds str; expected keys and values"),
        ],
    )
    def test_a_bad_file_says_what_is_wrong(self, document, message, tmp_path):
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(document))
        with pytest.raises(InputError, match=message):
            connect(str(tmp_path / "jobs.yaml"), None)

    # Its half object, which even has no repr.
    @pytest.mark.filterwarnings("ignore:unclosed cluster:ResourceWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_what_dask_jobqueue_refuses_is_told(self, tmp_path):
        jobs = {"kind": "slurm", "maximum_jobs": 1, "options": {"cores": 1, "colour": "blue"}}
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(jobs))
        with (
            connect(str(tmp_path / "jobs.yaml"), None) as executor,
            pytest.raises(InputError, match="dask-jobqueue refuses it"),
        ):
            inspect_workers(executor, str(tmp_path), print)
        del executor
        gc.collect()

    def test_the_task_at_work_ends_before_the_worker(self, tmp_path):
        """At the end of its lifetime Dask's worker would drop the task: no other could run it."""

        def work(name, folder=tmp_path):
            (folder / name).touch(exist_ok=False)
            time.sleep(3)
            return name

        async def run():
            options = {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
            lasting = {"lifetime": "2s", "nthreads": 1}
            async with (
                Scheduler(port=0, **options) as scheduler,
                Client(scheduler.address, asynchronous=True, set_as_default=False) as client,
            ):
                first, second = (client.submit(work, name) for name in ("first", "second"))
                async with jobs.PatientWorker(scheduler.address, **lasting, **options) as worker:
                    result = await first
                    first.release()
                    await worker.finished()
                return result, second.status

        assert asyncio.run(asyncio.wait_for(run(), 60)) == ("first", "pending")
        assert [path.name for path in tmp_path.iterdir()] == ["first"]

    def test_workers_end_before_their_job_does(self):
        found = with_lifetime({"walltime": "04:00:00"}, 10)["worker_extra_args"]
        assert found == ["--lifetime", "13500s", "--lifetime-stagger", "300s"]
        assert 13_500 + 300 == 3 * 3600 + 50 * 60
        assert with_lifetime({"walltime": 43_200}, 10)["walltime"] == "12:00:00"
        assert with_lifetime({"walltime": "1-00:00"}, 10)["worker_extra_args"][1] == "85500s"
        own = {"walltime": "04:00:00", "worker_extra_args": ["--lifetime", "1h"]}
        assert with_lifetime(own, 10) == own
        assert with_lifetime({"cores": 1}, 10) == {"cores": 1}
        with pytest.raises(InputError, match="not longer than"):
            with_lifetime({"walltime": "00:10:00"}, 10)


SUBMIT = """
touch submitted-$(ls submitted-* 2>/dev/null | wc -l)
num=$(ls submitted-* | wc -l)
cp "$1" script.sh
if [ $num = "$STARTED" ]; then bash script.sh >log 2>&1 & echo $! >pid; fi
echo "Submitted batch job $num"
"""
"""Counts jobs, and starts one of them."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestSlurm:
    """With commands in place of Slurm's; benchmarks/slurm.sh uses a real one."""

    @pytest.fixture
    def connect_slurm(self, tmp_path, monkeypatch):
        """Connects to jobs that these commands submit and list."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.1)

        def connect_slurm(**commands):
            (tmp_path / "bin").mkdir()
            for name, lines in ({"scancel": "echo $1 >> cancelled"} | commands).items():
                (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
                (tmp_path / "bin" / name).chmod(0o755)
            others = ":/usr/bin:/bin" if commands else ""  # a real Slurm may be there
            monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{others}")
            write_jobs(kind="slurm", cores=1)
            return connect("jobs.yaml", None)

        return connect_slurm

    @pytest.mark.parametrize(
        ("commands", "message"),
        [
            ({"sbatch": "echo sbatch: error: invalid partition >&2; exit 1"}, "invalid partition"),
            ({"sbatch": "echo no number"}, "no number"),
            ({}, r"No such file or directory: 'sbatch'"),
        ],
    )
    def test_a_job_that_is_not_taken_ends_the_wait(self, connect_slurm, commands, message):
        pattern = f"jobs.yaml do not start: the batch system does not take a job: .*{message}"
        with (
            connect_slurm(**commands) as executor,
            pytest.raises(ClusterLostError, match=pattern),
        ):
            inspect_workers(executor, "s3://bucket/store", [].append)

    def test_jobs_that_end_at_once_are_tried_three_times(self, connect_slurm):
        with (
            connect_slurm(
                sbatch=SUBMIT, squeue="echo 1 FAILED; echo 2 FAILED; echo 3 TIMEOUT"
            ) as executor,
            pytest.raises(ClusterLostError, match=r"3 times in a row .* job 3, ended \(TIMEOUT\)"),
        ):
            inspect_workers(executor, "s3://bucket/store", [].append)
        assert len([*Path().glob("submitted-*")]) == 3
        assert Path("cancelled").read_text().split() == ["1", "2", "3"]

    def test_a_job_that_is_lost_while_it_waits_is_replaced(self, connect_slurm, monkeypatch):
        """Job 1 waits, and is no longer listed then; job 2 has a worker."""
        monkeypatch.setenv("STARTED", "2")
        listing = "touch look-$(ls look-* 2>/dev/null | wc -l); [ -e look-3 ] || echo 1 PENDING"
        try:
            with connect_slurm(sbatch=SUBMIT, squeue=listing) as executor:
                inspect_workers(executor, "s3://bucket/store", [].append)
                assert len(executor.threads()) == 1
        finally:
            os.kill(int(Path("pid").read_text()), signal.SIGTERM)
        assert Path("cancelled").read_text().split() == ["1", "2"]
        assert not Path("submitted-2").exists()


class TestNames:
    @pytest.mark.parametrize("name", ["cluster", "host:8786", "jobs.toml"])
    def test_what_names_nothing(self, name):
        with pytest.raises(InputError, match="expected local, an address such as"):
            connect(name, None)

    def test_workers_are_of_this_machine_only(self):
        with pytest.raises(InputError, match="--workers 2 is only for --cluster local"):
            connect("tcp://127.0.0.1:1", 2)

    def test_no_scheduler_there(self, monkeypatch, tmp_path):
        monkeypatch.setattr(dask_executor, "CONNECT_SECONDS", 1)
        with (
            connect("tcp://127.0.0.1:1", None) as executor,
            pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"),
        ):
            inspect_workers(executor, str(tmp_path), print)
        with pytest.raises(InputError, match="no scheduler file"):
            connect(str(tmp_path / "missing.json"), None)
        (tmp_path / "empty.json").write_text(json.dumps({}))
        with pytest.raises(InputError, match="dask scheduler --scheduler-file"):
            connect(str(tmp_path / "empty.json"), None)

    def test_this_machine_by_default(self):
        assert connect("local", None, gpus=3).workers == 3
        assert 1 <= connect("local", None, gpus=0).workers <= MOST_WORKERS
        assert shutil.which("nvidia-smi") or connect("local", None).workers >= 1
