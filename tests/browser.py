"""A headless Chromium, and notebooks in JupyterLab that it opens."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Theme = Literal["light", "dark"]
TIMEOUT = 150_000
"""Milliseconds until something is there, on a machine that does other work."""


def find_chromium() -> str | None:
    """Program of a Chromium, such as Debian's; None if none is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium starts as root in a container only without its sandbox; it opens own pages only.
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Any, theme: Theme = "light", width: int = 1200, height: int = 900) -> Any:
    """An empty page, which records in ``page.faults`` what its scripts throw."""
    size = {"width": width, "height": height}
    page = browser.new_page(viewport=size, color_scheme=theme)
    page.set_default_timeout(TIMEOUT)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    return page


@contextmanager
def serve_lab(folder: Path) -> Iterator[str]:
    """JupyterLab on a folder: its address, in which {} stands for a file.

    Settings are those of a fresh installation, but for news from a network.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = folder / ".jupyter"
    settings = own / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {
        **os.environ,
        **{place: str(own / place) for place in places},
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_TOKEN": token,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    log = own / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + TIMEOUT / 1000
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={token}").close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield f"{address}/doc/tree/{{}}?token={token}"
    finally:
        server.terminate()
        server.wait(30)


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    import nbformat  # takes seconds

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, path)


def run_cells(page: Any, address: str, num_cells: int) -> None:
    """Open a notebook and run its first cells, of which the first takes no time."""
    page.goto(address)
    cells = page.locator(".jp-CodeCell")
    cells.first.wait_for()
    # JupyterLab forgets a cell that is run before its kernel is connected.
    deadline = time.monotonic() + TIMEOUT / 1000
    while not re.search(r"\d", cells.first.locator(".jp-InputPrompt").inner_text()):
        assert time.monotonic() < deadline
        cells.first.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(1_000)
    for number in range(1, num_cells):
        cells.nth(number).locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
