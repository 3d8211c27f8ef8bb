"""A folder behind a slow line, as S3 and plain HTTP show it, on loopback.

    python benchmarks/slow_store.py FOLDER --port 9000 --delay 20 --rate 200

Every request is answered after the delay; all answers together are sent at the rate, a slice of
each in turn. It knows what readers need: GET with ranges, HEAD, and ListObjectsV2 of a bucket,
which is a folder in the folder. ``GET /-/counts`` gives the requests and bytes so far as JSON,
without delay, and forgets them.
"""

import asyncio
import json
import mmap
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import click

SLICE = 65_536
"""Bytes of one answer that are sent before it is the next one's turn."""
TICK = 0.001
BURST = 0.02
"""Seconds for which the line may have been idle and make up for it."""
REASONS = {
    **{200: "OK", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"},
    **{416: "Range Not Satisfiable", 500: "Internal Error", 503: "Slow Down"},
}


class SlowStore:
    """The server; one event loop.

    Args:
        delay: seconds before every answer.
        rate: bytes per second of all answers together.

    Attributes:
        counts: of requests by method (``GET``, ``HEAD``, ``LIST``), and ``bytes`` of bodies.
        began: moment of the first GET since they were last asked for; 0 if there was none.
        opened: called with the address once it is served.
        fault: called with the key of each GET and its range; a status to answer instead, or None.
            ``0`` cuts the connection in the middle of the body.
    """

    def __init__(self, folder: Path, delay: float = 0.0, rate: float = float("inf")) -> None:
        self.folder, self.delay, self.rate = folder.resolve(), delay, rate
        self.counts: Counter[str] = Counter()
        self.began = 0.0
        self.fault: Callable[[str, str], int | None] = lambda _key, _range: None
        self.opened: Callable[[str], None] = lambda _url: None
        self.connections: set[Connection] = set()
        self.waiting: deque[Connection] = deque()
        self.port = 0
        self._files: dict[Path, tuple[tuple[int, int, int], memoryview]] = {}

    async def serve(self, port: int = 0) -> None:
        """Serve without end."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self), "127.0.0.1", port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self.opened(f"http://127.0.0.1:{self.port}")
        try:
            async with server:
                await self._pump()
        finally:
            for connection in self.connections:
                connection.transport.abort()
            await asyncio.sleep(0)

    async def _pump(self) -> None:
        last, credit = time.perf_counter(), 0.0
        while True:
            now = time.perf_counter()
            credit = min(credit + (now - last) * self.rate, self.rate * BURST)
            last = now
            turns = len(self.waiting)
            while self.waiting and credit > 0 and turns > 0:
                connection = self.waiting.popleft()
                sent = connection.send_slice()
                if connection.body:
                    self.waiting.append(connection)
                credit -= sent
                turns = len(self.waiting) if sent else turns - 1
            await asyncio.sleep(TICK)

    def start(self) -> "SlowStore":
        """Serve on a thread of this process; returns once the port is known."""
        self._loop = asyncio.new_event_loop()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._task = self._loop.create_task(self.serve())
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._task)
            self._loop.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        while not self.port:
            time.sleep(0.001)
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def file(self, key: str) -> tuple[memoryview, str, str] | None:
        """Bytes of an object, its ETag and the time of its last change."""
        path = (self.folder / key).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            return None
        status = path.stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._files.get(path, (None,))[0] != state:
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if state[1] else b""
            self._files[path] = state, memoryview(content)
        etag = '"' + "-".join(f"{number:x}" for number in state) + '"'
        return self._files[path][1], etag, formatdate(status.st_mtime, usegmt=True)

    def listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        """An answer to ListObjectsV2."""
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        root, keys, folders = self.folder / bucket, [], set()
        start = root / prefix.rpartition("/")[0]
        for path in sorted(start.rglob("*")) if start.is_dir() else []:
            key = path.relative_to(root).as_posix()
            if not (path.is_file() and key.startswith(prefix)):
                continue
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                folders.add(prefix + head + found)
                continue
            status = path.stat()
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            keys.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                f"<ETag>&quot;{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}&quot;"
                f"</ETag><Size>{status.st_size}</Size><StorageClass>STANDARD</StorageClass>"
                "</Contents>"
            )
        common = [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders]
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult '
            'xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}"
            f"</KeyCount><MaxKeys>1000000</MaxKeys><IsTruncated>false</IsTruncated>"
            f"{''.join(keys)}{''.join(sorted(common))}</ListBucketResult>"
        ).encode()


class Connection(asyncio.Protocol):
    """One connection, kept open; its requests are answered in order."""

    def __init__(self, store: SlowStore) -> None:
        self.store = store
        self.body = memoryview(b"")
        self._received, self._paused, self._busy, self._cut = b"", False, False, False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.store.connections.add(self)
        transport.set_write_buffer_limits(4 * SLICE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.store.connections.discard(self)
        self.body = memoryview(b"")

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._next()

    def _next(self) -> None:
        end = self._received.find(b"\r\n\r\n")
        if self._busy or end < 0:
            return
        head, self._received = self._received[:end].decode("latin-1"), self._received[end + 4 :]
        self._busy = True
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        delay = 0.0 if target == "/-/counts" else self.store.delay
        asyncio.get_running_loop().call_later(delay, self._answer, method, target, headers)

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        if self.transport.is_closing():
            return
        url = urlsplit(target)
        key, query = unquote(url.path).strip("/"), parse_qs(url.query)
        kind = "LIST" if method == "GET" and ("list-type" in query or "/" not in key) else method
        if target == "/-/counts":
            counts = {"bytes": 0, **self.store.counts, "began": self.store.began}
            self.store.counts.clear()
            self.store.began = 0.0
            self._reply(200, json.dumps(counts).encode(), [], method)
            return
        self.store.counts[kind] += 1
        if kind == "LIST":
            content = self.store.listing(key.partition("/")[0], query)
            self._reply(200, content, ["Content-Type: application/xml"], method)
            return
        self.store.began = self.store.began or time.monotonic()
        span = headers.get("range", "")
        status = self.store.fault(key, span) if method == "GET" else None
        found = self.store.file(key)
        if status:
            self._error(status, key, method)
        elif found is None:
            self._error(404, key, method)
        else:
            self._object(found, span, headers.get("if-match"), key, method, cut=status == 0)

    def _object(
        self,
        found: tuple[memoryview, str, str],
        span: str,
        wanted: str | None,
        key: str,
        method: str,
        *,
        cut: bool,
    ) -> None:
        content, etag, changed = found
        if wanted is not None and wanted != etag:
            self._error(412, key, method)
            return
        start, stop, status = 0, len(content), 200
        if span.startswith("bytes="):
            first, _, last = span[6:].partition("-")
            if first:
                start, stop = int(first), min(stop, int(last) + 1) if last else stop
            else:
                start = max(0, stop - int(last))
            status = 206
            if start >= stop:
                self._error(416, key, method)
                return
        more = [f"ETag: {etag}", f"Last-Modified: {changed}", "Accept-Ranges: bytes"]
        if status == 206:
            more.append(f"Content-Range: bytes {start}-{stop - 1}/{len(content)}")
        self._cut = cut
        self._reply(status, content[start:stop], more, method)

    def _error(self, status: int, key: str, method: str) -> None:
        name = {404: "NoSuchKey", 503: "SlowDown", 412: "PreconditionFailed"}.get(status, "Error")
        text = f"<Code>{name}</Code><Message>{name}</Message><Key>{escape(key)}</Key>"
        content = f"<Error>{text}</Error>".encode()
        self._reply(status, content, ["Content-Type: application/xml"], method)

    def _reply(
        self, status: int, content: bytes | memoryview, more: list[str], method: str
    ) -> None:
        lines = [f"HTTP/1.1 {status} {REASONS[status]}", f"Content-Length: {len(content)}", *more]
        self.transport.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if method == "HEAD" or not len(content):
            self._done()
            return
        self.body = memoryview(content)
        if self._cut:
            self.body = self.body[: len(self.body) // 2]
        self.store.waiting.append(self)

    def send_slice(self) -> int:
        """Send the next slice of the answer; returns its bytes, 0 if the reader is slow."""
        if self._paused or not self.body:
            return 0
        part, self.body = self.body[:SLICE], self.body[SLICE:]
        self.transport.write(part)
        self.store.counts["bytes"] += len(part)
        if not self.body:
            self._done()
        return len(part)

    def _done(self) -> None:
        self._busy = False
        if self._cut:
            self._cut = False
            self.transport.close()
        else:
            self._next()


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--port", default=9000, show_default=True, help="0: any that is free.")
@click.option("--delay", default=20.0, show_default=True, help="Milliseconds.")
@click.option("--rate", default=200.0, show_default=True, help="MB/s.")
def main(folder: Path, port: int, delay: float, rate: float) -> None:
    store = SlowStore(folder, delay / 1e3, rate * 1e6)
    store.opened = click.echo
    with suppress(KeyboardInterrupt):
        asyncio.run(store.serve(port))


if __name__ == "__main__":
    main()
