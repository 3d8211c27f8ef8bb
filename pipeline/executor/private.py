"""Dask for one user of a shared machine: keys made for the run, and no pages for others.

Whoever may talk to a scheduler, a worker or a nanny can hand it code. Those that we start speak TLS
with a key that only this run has (``distributed.security.Security.temporary``). Workers serve no
HTTP. The scheduler serves its dashboard if Bokeh is installed, below a path that cannot be guessed,
as any user of the machine reaches its loopback interface.
"""

import hmac
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed import Scheduler, Worker
from distributed.security import Security
from tornado.web import ErrorHandler


def make_keys() -> Security:
    """Key and certificate of one run, in memory; both sides of a connection must have them."""
    return Security.temporary()


def write_keys(folder: Path) -> Security:
    """Key and certificate of one run, as files for processes that get paths.

    Args:
        folder: that only its owner may enter.
    """
    made = make_keys().get_tls_config_for_role("worker")
    files = {name: folder / f"{name}.pem" for name in ("ca_file", "cert", "key")}
    for name, file in files.items():
        file.write_text(made[name])
    roles = [f"tls_{role}" for role in ("client", "scheduler", "worker")]
    paths = {f"{role}_{name}": str(files[name]) for role in roles for name in ("cert", "key")}
    return Security(require_encryption=True, tls_ca_file=str(files["ca_file"]), **paths)


def has_dashboard() -> bool:
    """Whether the scheduler has pages: Dask needs Bokeh to make them."""
    return find_spec("bokeh") is not None


def make_prefix() -> str:
    """Path below which a scheduler serves its pages, as its option ``http_prefix``."""
    return f"/{secrets.token_hex(16)}"


class PrivateScheduler(Scheduler):
    """Serves pages below its ``http_prefix`` only, and none without Bokeh."""

    def start_http_server(
        self, routes: Any, dashboard_address: Any, default_port: int = 0, ssl_options: Any = None
    ) -> None:
        if not has_dashboard():
            return
        super().start_http_server(routes, dashboard_address, default_port, ssl_options)
        application = self.http_application
        find_handler = application.find_handler

        def find_private(request: Any, **options: Any) -> Any:
            # Bokeh's redirects and Tornado's list of all paths would tell the prefix to anyone.
            own = f"{self.http_prefix}/".encode()
            if hmac.compare_digest(request.path.encode()[: len(own)], own):
                return find_handler(request, **options)
            return application.get_handler_delegate(request, ErrorHandler, {"status_code": 404})

        application.find_handler = find_private  # type: ignore[method-assign]

    def __init__(self, *arguments: Any, http_prefix: str, **options: Any) -> None:
        self.http_prefix = http_prefix
        super().__init__(*arguments, http_prefix=http_prefix, **options)


class PrivateWorker(Worker):
    """Serves no HTTP."""

    def start_http_server(self, *_arguments: Any, **_options: Any) -> None:
        """Nothing is started."""
