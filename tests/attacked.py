"""Stores used in a process of their own, which may die of it: opened, read, inspected, verified.

    python tests/attacked.py

reads a JSON object per line, ``{"kind": ..., "path": ...}``, and prints one with what came of it.
"""

import hashlib
import json
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10
"""Longest use of a store, in seconds of the processor."""
RUN = "run"
"""Kind of what is no store, but a run: it has no checksums to agree with."""
INPUTS = ("tables", "embeds")
"""Kinds of folders whose files are no stores either, and are only read."""
_GRACE = 90.0  # until a process that hangs is killed, whatever else the machine does
_IMPORT_SECONDS = 120.0


class Attacked:
    """The process; one that dies is replaced by the next use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def use(self, kind: str, path: Path, patience: float = SECONDS + _GRACE) -> dict[str, Any]:
        """What came of each step, by its name: ``error`` and ``message``, or ``found``; and of all
        ``died``, how the process did, or ``megabytes`` that it took and ``seconds``."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"kind": kind, "path": str(path)}) + "\n")
        process.stdin.flush()
        if select.select([process.stdout], [], [], patience)[0]:
            line = process.stdout.readline()
            if line:
                return json.loads(line)
        else:
            process.kill()
        code = process.wait()
        self._process = None
        return {"died": signal.Signals(-code).name if code < 0 else f"exit {code}"}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = process = subprocess.Popen([sys.executable, __file__], **pipes)
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], _IMPORT_SECONDS)[0]
        assert process.stdout.readline() == "ready\n"
        return process


def _read(kind: str, path: str) -> str:
    """sha256 of all that a store or run gives its readers."""
    if kind == RUN:
        from forged_runs import read_run

        return read_run(path)
    if kind in INPUTS:
        from forged_inputs import read_inputs

        return read_inputs(kind, path)
    import numpy as np

    import semroute

    digest = hashlib.sha256()
    if kind in ("latents", "buckets"):
        latents = semroute.open_latents(path)
        for bucket in sorted({*latents.buckets.tolist()}):
            ids = [each for each in latents.ids.tolist() if latents.buckets[each] == bucket]
            noise = np.ones((len(ids), *latents.shape(bucket)), np.float32)
            digest.update(latents.read(ids, noise).tobytes())
    elif kind in ("ragged", "padded"):
        store = semroute.open_conditioning(path)
        for values in store.read(range(len(store))).values():
            digest.update(values.tobytes())
    else:
        features = semroute.open_features(path)
        digest.update(features.read(range(len(features))).bits.tobytes())
        digest.update(features.read_padded([0, 1], features.layers[:1]).tobytes())
        digest.update(str(features.search("caption")["text"].to_pylist()).encode())
    return digest.hexdigest()


def _inspect(kind: str, path: str) -> None:
    if kind == RUN:
        from forged_runs import inspect_run

        inspect_run(path)
        return
    if kind in INPUTS:
        return
    from semroute.pipeline.inspection.describe import inspect
    from semroute.pipeline.inspection.status import status

    json.dumps([inspect(path).details, status(path).details])


def _verify(kind: str, path: str) -> str:
    if kind == RUN:
        from forged_runs import resume_run

        return resume_run(path)
    if kind in INPUTS:
        return ""
    from semroute.pipeline.store.verify import verify

    found = verify(path)
    json.loads(found.to_json())
    return "\n".join(map(str, found.problems))


_STEPS: dict[str, Callable[[str, str], str | None]] = {
    "read": _read,
    "inspect": _inspect,
    "verify": _verify,
}


def _use(kind: str, path: str) -> dict[str, Any]:
    from semroute.schemas import InputError

    outcome: dict[str, Any] = {}
    before, began = _megabytes(), time.process_time()
    for name, step in _STEPS.items():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome[name] = {"found": step(kind, path)}
        except InputError as error:
            outcome[name] = {"error": "InputError", "message": str(error)}
        except BaseException as error:
            outcome[name] = {"error": type(error).__name__, "message": str(error)[:500]}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - began
    return outcome | {"megabytes": _megabytes() - before, "seconds": seconds}


def _megabytes() -> float:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _late(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main() -> None:
    """Use stores as they are asked for."""
    import semroute.pipeline.inspection.status
    import semroute.pipeline.store.verify  # noqa: F401

    signal.signal(signal.SIGPROF, _late)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_use(request["kind"], request["path"])), flush=True)


if __name__ == "__main__":
    main()
