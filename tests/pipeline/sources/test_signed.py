"""Tables and images behind signed URLs: they are read, and their secrets are kept."""

import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from semroute.pipeline.extraction.driver import provenance
from semroute.pipeline.sources.prompts import read_prompts
from semroute.pipeline.sources.table import read_samples
from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.order.columns_file import open_columns
from semroute.schemas import InputError

pytest.importorskip("aiohttp")
SECRET = "X-Amz-Signature=3f2a"


def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def site():
    """Address of a server that wants its signature, but for ``/open``."""
    files = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, query = self.path.partition("?")
            allowed = query == SECRET or path.startswith("/open")
            content = files.get(path)
            refusal = {"broken": 500, "none": 404}.get(path.split("/")[1], 403)
            self.send_response(200 if allowed and content is not None else refusal)
            self.send_header("Content-Length", str(len(content or b"") if allowed else 0))
            self.end_headers()
            if allowed and content is not None and self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        rows = [f"a cat,{address}/images/1.png?{SECRET}", f"a dog,{address}/images/2.png?sig=no"]
        files["/signed/a.csv"] = "\n".join(["text,image", *rows]).encode()
        files["/open/a.csv"] = b"text,image\na cat,1.png\n"
        files["/images/1.png"] = files["/open/1.png"] = png()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield address
        server.shutdown()
        thread.join()


def test_a_signed_table_and_its_images_are_read_and_their_secrets_kept(site):
    samples = read_samples(f"{site}/signed/a.csv?{SECRET}", need="text")
    assert samples.texts().to_pylist() == [["a cat"], ["a dog"]]
    names = samples.image_names().to_pylist()
    assert names == [f"{site}/images/1.png?***", f"{site}/images/2.png?***"]
    first, second = samples.image_files()
    assert first == png()
    assert "sig=no" not in second.reason
    assert "/images/2.png?***" in second.reason
    assert provenance(samples.source, "llm").source == f"{site}/signed/a.csv?***"


def test_images_beside_a_table_on_a_server(site):
    (content,) = read_samples(f"{site}/open/a.csv?any=thing", need="image").image_files()
    assert content == png()


@pytest.mark.parametrize("name", ["signed/a.csv", "signed/missing.parquet"])
def test_what_a_server_refuses_is_told_without_the_secret(site, name):
    with pytest.raises((InputError, OSError)) as caught:
        read_samples(f"{site}/{name}?{SECRET}X", need="text")
    if isinstance(caught.value, InputError):
        assert SECRET not in str(caught.value)


def nowhere():
    """Address of a server that does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    "read",
    [
        lambda place: read_samples(f"{place}/a.csv", need="text"),
        lambda place: read_samples(f"{place}/a.jsonl.gz", need="text"),
        lambda place: read_samples(f"{place}/a.parquet", need="text"),
        lambda place: read_samples(f"{place}/a.tar", need="text"),
        lambda place: read_prompts(f"{place}/a.json"),
        lambda place: open_features(f"{place}/features"),
        lambda place: open_columns(f"{place}/a.parquet"),
    ],
    ids=["csv", "jsonl.gz", "parquet", "tar", "prompts", "store", "columns"],
)
def test_a_server_that_does_not_answer_is_no_missing_file(read):
    with pytest.raises(InputError, match=r"cannot be read.*Cannot connect to host 127\.0\.0\.1"):
        read(nowhere())


def test_why_an_image_was_not_fetched(site, tmp_path):
    table = tmp_path / "a.jsonl"
    places = (
        f"{nowhere()}/1.png",
        f"{site}/broken/1.png",
        f"{site}/none/1.png",
        f"{site}/open/1.png",
    )
    table.write_text("".join(json.dumps({"text": "a", "image": place}) + "\n" for place in places))
    silent, broken, missing, found = read_samples(str(table), need="image").image_files()
    assert "Cannot connect to host" in silent.reason
    assert "500" in broken.reason
    assert "no such file" in missing.reason
    assert found == png()


def test_a_server_that_fails_is_no_missing_file(site):
    for name, said in (("broken/a.csv", "500"), ("signed/a.csv", "403"), ("none/a.csv", "no such")):
        with pytest.raises(InputError, match=said):
            read_samples(f"{site}/{name}", need="text")
