"""Texts of a stranger's store, wherever they are shown."""

import re
import shutil

import pytest
from click.testing import CliRunner
from tiny_stores import make_store, read, seal, write

from semroute.cli import cli
from semroute.pipeline.inspection.describe import inspect
from semroute.pipeline.inspection.hub import push
from semroute.pipeline.inspection.report import write_report
from semroute.pipeline.store.open import open_store
from semroute.schemas import InputError

EVIL = (
    "\x1b[2J\x1b]0;title\x07</td><script>alert(1)</script>|`[x](javascript:a)"
    "\u202e$\\frac$\nstate  complete https://me:word@host/?sig=abc"
)


def leaves(document):
    """Object or list, and key, of every text."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from leaves(value)
        elif isinstance(value, str):
            yield document, key


def poison(store):
    """Put the text into every field that takes it; returns how many."""
    manifest, num = read(store, "manifest.json"), 0
    for parent, key in [*leaves(manifest)]:
        before, parent[key] = parent[key], EVIL
        write(store, "manifest.json", manifest)
        seal(store)
        try:
            _ = getattr(open_store(store), "codec", None)
            num += 1
        except InputError as error:
            check_terminal(str(error))
            parent[key] = before
    write(store, "manifest.json", manifest)
    for file in sorted((store / "receipts").glob("*.json")):
        name = f"receipts/{file.name}"
        write(store, name, read(store, name) | {"warnings": [EVIL], "worker": EVIL})
    quarantine = {"shard": 0, "entries": [0], "reason": EVIL, "traceback": EVIL}
    (store / "quarantine").mkdir(exist_ok=True)
    write(store, "quarantine/shard-000000.json", quarantine)
    seal(store)
    return num


@pytest.fixture(scope="module", params=["delta", "latents", "padded"])
def poisoned(request, tmp_path_factory):
    store = make_store(request.param, tmp_path_factory.mktemp("poisoned") / "store")
    assert poison(store) >= 5
    return store


def check_terminal(output):
    assert all(sign.isprintable() or sign in "\n\t" for sign in output)
    assert "\nstate  complete" not in output
    assert "word" not in output
    assert "sig=abc" not in output


def test_terminals(poisoned, tmp_path):
    store = shutil.copytree(poisoned, tmp_path / "store")
    (store / "\x1b[2Jstray.txt").touch()
    for words in ("inspect", "inspect --json", "status", "status --json", "verify"):
        command, *options = words.split()
        result = CliRunner().invoke(cli, [command, str(store), *options])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        check_terminal(result.stdout)
    assert "alert(1)" in CliRunner().invoke(cli, ["inspect", str(store)]).output
    check_terminal(CliRunner().invoke(cli, ["push", str(poisoned), "me/it", "--dry-run"]).output)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bits as hidden states
def test_pages(poisoned, tmp_path):
    page = write_report(poisoned, tmp_path / "page.html").read_text()
    for text in (page, inspect(poisoned)._repr_html_(), inspect(poisoned).facts._repr_html_()):
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert" in text


def test_cards(poisoned):
    card = push(poisoned, "me/it", dry_run=True).card
    rows = [line for line in card.splitlines() if "alert" in line]
    assert rows
    for row in rows:
        check_terminal(row)
        unescaped = re.sub(r"\\.", "", row)
        assert unescaped.count("|") == 3  # two cells
        assert {*"<>[]`$"}.isdisjoint(unescaped)
