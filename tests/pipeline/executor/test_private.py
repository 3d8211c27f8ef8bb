"""Nobody else on a shared machine reaches what a command starts."""

import os
import socket
import ssl
import stat
import sys

import psutil
import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("distributed")

from distributed.security import Security

from semroute.pipeline.executor import private
from semroute.pipeline.executor.connect import connect
from semroute.pipeline.executor.workers import inspect_workers
from semroute.schemas import InputError

PATHS = ("/", "/status", "/sitemap.json", "/health", "/metrics", "/info/main/workers.html")


def listening():
    """Where this process and those that it started listen: port -> address."""
    own = psutil.Process()
    return {
        each.laddr.port: each.laddr.ip
        for process in (own, *own.children(recursive=True))
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    }


def heard(port, keys=None, path="/", host="127.0.0.1"):
    """What a server says to whoever connects and asks for a page.

    Args:
        keys: TLS with these, and no question; None: a plain connection.
    """
    try:
        with socket.create_connection((host, port), timeout=10) as connection:
            if keys is not None:
                context = keys.get_connection_args("client")["ssl_context"]
                with context.wrap_socket(connection) as secure:
                    return secure.recv(1000)
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return connection.recv(1000)
    except (ConnectionError, ssl.SSLError):
        return b""


def is_alert(content):
    """Whether TLS itself says that something is wrong, or nothing is said."""
    return content[:1] in (b"", b"\x15")


@pytest.mark.parametrize("dashboard", [True, False])
def test_workers_of_this_machine_are_reached_with_the_keys_of_the_run_only(dashboard, monkeypatch):
    monkeypatch.setattr(private, "has_dashboard", lambda: dashboard)
    before = listening()
    with connect("local", 1) as executor:
        client = executor.client
        ports = {port: ip for port, ip in listening().items() if port not in before}
        link = executor.dashboard()
        served = [port for port in ports if heard(port).startswith(b"HTTP/")]
        assert {*ports.values()} == {"127.0.0.1"}
        assert len(ports) - len(served) == 3  # scheduler, nanny, worker
        for port in {*ports} - {*served}:
            assert is_alert(heard(port))
            assert heard(port, Security.temporary()) == b""
            assert heard(port, client.security) != b""
        assert len(served) == dashboard
        for port in served:
            assert all(b" 404 " in heard(port, path=path) for path in PATHS)
            *_, prefix, page = link.split("/")
            assert b" 200 " in heard(port, path=f"/{prefix}/{page}")
            assert b" 404 " in heard(port, path=f"/{prefix[:-1]}/{page}")
        assert bool(link) == dashboard


def jobs(folder, **options):
    """jobs.yaml: one job of this machine."""
    options = {"cores": 1, "memory": "2GB", "python": sys.executable, **options}
    document = {"kind": "local", "maximum_jobs": 1, "options": options}
    (folder / "jobs.yaml").write_text(yaml.safe_dump(document))
    return str(folder / "jobs.yaml")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its Popen
def test_jobs_are_reached_with_the_keys_of_the_run_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = listening()
    with connect(jobs(tmp_path), None) as executor:
        assert inspect_workers(executor, str(tmp_path / "store"), [].append).threads >= 1
        ports = {port: ip for port, ip in listening().items() if port not in before}
        served = [port for port, ip in ports.items() if heard(port, host=ip)[:5] == b"HTTP/"]
        assert {ports[port] for port in served} == {"127.0.0.1"}
        assert len(ports) - len(served) >= 2
        for port in {*ports} - {*served}:
            assert is_alert(heard(port, host=ports[port]))
            assert heard(port, Security.temporary(), host=ports[port]) == b""
            assert heard(port, executor.client.security, host=ports[port]) != b""
        (folder,) = tmp_path.glob(".semroute-keys-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.geteuid()
    assert not folder.exists()


def test_a_folder_for_the_keys_of_jobs_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "two words").mkdir()
    for folder, message in (
        (tmp_path / "two words", "has spaces or signs"),
        (tmp_path / "missing", "cannot be written to .*missing: No such file"),
    ):
        with (
            connect(jobs(tmp_path, shared_temp_directory=str(folder)), None) as executor,
            pytest.raises(InputError, match=f"{message}.*Name .*shared_temp_directory"),
        ):
            executor.threads()


@pytest.mark.parametrize("name", ["security", "protocol"])
def test_options_of_jobs_do_not_replace_the_keys(name, tmp_path):
    with pytest.raises(InputError, match=f"options.{name} is set by semroute"):
        connect(jobs(tmp_path, **{name: "tcp://"}), None)
