"""Stores pushed to a stand-in for the Hub: a server on this machine that keeps what it receives."""

import base64
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

hub = pytest.importorskip("semroute.pipeline.inspection.hub")

from semroute.cli import cli  # noqa: E402
from semroute.pipeline.store.open import open_features, open_latents  # noqa: E402
from semroute.pipeline.store.verify import verify  # noqa: E402
from semroute.schemas import InputError  # noqa: E402
from semroute.schemas.files import list_files, read_files  # noqa: E402

REPO = "somebody/captions"


class _Handler(BaseHTTPRequestHandler):
    """The Hub's HTTP API, as far as huggingface_hub needs it to upload, and to download a file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def answer(self, status, content=b"{}", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def resolve(self):
        name = urlsplit(self.path).path.partition("/resolve/main/")[2]
        if name not in self.server.files:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        content = self.server.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit="0" * 40)

    do_HEAD = resolve

    def do_GET(self):
        if "/resolve/" in self.path:
            self.resolve()
        else:
            self.answer(200, {"sha": "0" * 40, "id": REPO, "siblings": []})

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.server.sent.append(self.path)
        self.answer(200)

    def do_POST(self):
        server, body = self.server, self.body()
        if self.headers.get("Authorization") != "Bearer secret":
            self.answer(401, {"error": "no"})
        elif self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            self.answer(200, {"url": f"{server.url}/datasets/{REPO}"})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if "/c/" in file["path"] else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/objects/batch"):
            objects = []
            for each in json.loads(body)["objects"]:
                found = {"oid": each["oid"], "size": each["size"]}
                if each["oid"] not in server.blobs:
                    url = {"href": f"{server.url}/blobs/{each['oid']}"}
                    found["actions"] = {"upload": url}
                objects.append(found)
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.blobs[value["oid"]]
            server.commits.append(sorted(line["value"].get("path", "") for line in lines[1:]))
            url = f"{server.url}/datasets/{REPO}/commit/{'0' * 40}"
            self.answer(200, {"commitUrl": url, "commitOid": "0" * 40})
        else:
            self.answer(200)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.files, server.blobs = {}, {}
        server.created, server.commits, server.sent = [], [], []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


COMMANDS = """
import json, sys
from click.testing import CliRunner
from semroute.cli import cli
for arguments, token in json.loads(sys.argv[1]):
    done = CliRunner().invoke(cli, ["push", *arguments], env={"HF_TOKEN": token})
    print(json.dumps({"code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr}))
"""


class Pushed(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def push(server, tmp_path):
    """Run commands, each a store and options, with the stand-in as their Hub, in a process whose
    huggingface_hub knows it from the start."""

    def run(*commands, tokens=("secret",), url=server.url):
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf")}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        asked = [
            ([str(store), REPO, *options], token)
            for (store, *options), token in zip(commands, itertools.cycle(tokens), strict=False)
        ]
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(asked)],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return [Pushed(**json.loads(line)) for line in done.stdout.splitlines()]

    return run


def download(server, folder):
    """The layout that ``hf download --local-dir`` leaves."""
    for name, content in server.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/CACHEDIR.TAG").write_text("")
    return folder


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


class TestPush:
    def test_what_is_downloaded_is_the_store(self, server, push, random_store, tmp_path):
        path = tmp_path / "features"
        shutil.copytree(random_store("delta"), path)
        (path / "notes.txt").write_text("mine")
        (done,) = push((path, "--license", "cc-by-4.0"))
        assert done.code == 0, done.stderr
        assert f"hf download {REPO}" in done.stdout
        made = server.created[0]  # in version 1 of huggingface_hub, and in later ones
        assert made.get("private") or made["visibility"] == "private"
        assert server.commits[-1] == ["README.md", "manifest.json"]  # and they came last
        assert not any("manifest.json" in names for names in server.commits[:-1])
        assert "notes.txt" not in server.files
        assert "left out, as it is no file of the store: notes.txt" in done.stderr
        card = server.files["README.md"].decode()
        assert front_matter(card)["license"] == "cc-by-4.0"
        there = download(server, tmp_path / "there")
        names = [name for name in list_files(path) if name != "notes.txt"]
        assert read_files(there, names) == read_files(path, names)
        assert verify(there).problems == verify(there).warnings == []
        expected, found = open_features(path), open_features(there)
        assert np.array_equal(found.read([3, 50]).bits, expected.read([3, 50]).bits)

        sent = len(server.sent)
        (again,) = push((path,))
        assert again.code == 0, again.stderr
        assert len(server.sent) == sent  # shards that are there are not sent again

    def test_training_reads_what_was_downloaded(
        self, server, push, configure, feature_store, tmp_path
    ):
        torch = pytest.importorskip("torch")
        from semroute.trainer.runs.checkpoint import latest_checkpoint
        from semroute.trainer.training.train import train

        (done,) = push((feature_store,))
        assert done.code == 0, done.stderr
        there = download(server, tmp_path / "there")
        weights = []
        for name, features in (("here", feature_store), ("there", there)):
            changes = {"features": str(features), "steps": 2, "data": {"batch_size": 8}}
            run = train(configure(tmp_path / f"run-{name}", **changes), progress=False)
            weights.append(latest_checkpoint(run).model())
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    def test_another_store_or_no_token_is_refused(self, server, push, random_store, latent_store):
        store = random_store("bf16")
        first, other, stranger = push(
            (store,), (latent_store,), (store,), tokens=("secret", "secret", "wrong")
        )
        assert first.code == 0, first.stderr
        assert other.code == 1
        assert "holds another store than" in other.stderr
        assert stranger.code == 1
        assert "hf auth login" in stranger.stderr
        before = dict(server.files)
        card = {"README.md": hub.make_card(open_features(store), REPO).encode()}
        assert before == read_files(store, before.keys() - card) | card
        (done,) = push((store,), url="http://127.0.0.1:1")
        assert done.code == 1
        assert done.stderr.startswith(f"Error: {REPO}: ConnectError: ")
        assert "Rerun the same command to resume" in done.stderr
        assert server.files == before

    def test_unfinished_stores_are_refused(self, random_store, tmp_path):
        path = tmp_path / "features"
        shutil.copytree(random_store("bf16"), path)
        next(path.glob("hidden.zarr/hidden/c/0/0/0")).unlink()
        with pytest.raises(InputError, match=r"is not finished: 1 of \d+ shards"):
            hub.push(path, REPO, dry_run=True)
        open_features(path).reopen([0])
        with pytest.raises(InputError, match="Rerun the command that made it to resume"):
            hub.push(path, REPO, dry_run=True)

    def test_more_files_than_the_hub_takes(self, random_store, monkeypatch):
        monkeypatch.setattr(hub, "MAX_FILES", 10)
        with pytest.raises(InputError, match=r"but the Hub takes 10 per repository.*shard-size"):
            hub.push(random_store("bf16"), REPO, dry_run=True)


class TestCard:
    def test_a_dry_run_prints_files_and_card_and_needs_no_network(self, feature_store):
        done = CliRunner().invoke(cli, ["push", str(feature_store), REPO, "--dry-run"])
        assert done.exit_code == 0
        assert "(private if it is new)" in done.output
        assert "captions.parquet" in done.output
        assert "| licence | not stated" in done.output
        store = open_features(feature_store)
        card = hub.make_card(store, REPO)
        assert f"{len(store):,} unique" in card
        assert f"{store.manifest.layout.num_rows:,}" in card
        assert "| codec | bf16 |" in card
        assert "codec error" in card
        assert str(feature_store) not in card
        found = front_matter(card)
        assert "license" not in found
        assert [each["data_files"] for each in found["configs"]] == [
            "captions.parquet",
            "samples.parquet",
        ]

    @pytest.mark.parametrize("kind", ["features", "latents"])
    def test_its_code_runs_where_the_store_is_downloaded(
        self, kind, feature_store, latent_store, tmp_path, monkeypatch, capsys
    ):
        path = feature_store if kind == "features" else latent_store
        store = open_features(path) if kind == "features" else open_latents(path)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "captions").symlink_to(path)  # as the card names the folder
        blocks = hub.make_card(store, REPO).split("```python\n")[1:]
        assert len(blocks) == 2
        for block in blocks:
            exec(block.split("```")[0], {})
        said = capsys.readouterr().out
        assert ("mean" if kind == "latents" else "hidden") in said
