"""Everything that only a GPU can tell, in nine minutes on one H100 or H200.

    python benchmarks/gpu.py OUT [--only PART] [--tiny]

Needs semroute with its `test` extra, this checkout and 40 GB of disk in OUT; no network, no model
and no data: the LLM has the shape of Qwen3-4B (36 layers of width 2560) and random weights. Every
part runs in a process of its own with a time limit of its own, and fails alone. OUT/gpu.json holds
all rows, OUT/gpu.md a table for each part; both are written anew after each part, and a part that
fails or takes too long keeps the rows that it had. OUT/logs has what each part printed. The exit
code is 1 if a part failed.

``--tiny`` runs the same code on small shapes, in about a minute, also on a CPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part: its title, its time limit, and a line on what its table shows."""

    title: str
    limit_seconds: float
    about: str


PARTS = {
    "tests": Part("Tests marked gpu", 50, "What only a GPU can fail."),
    "extraction": Part(
        "Extraction",
        115,
        "LLM of Qwen3-4B's shape in bfloat16. *Bare forward* runs the same batches and keeps "
        "nothing; *LLM idle share* is the part of the extraction that the bare forward does not "
        "need.",
    ),
    "decoding": Part(
        "Decoding",
        35,
        "GB/s of decoded bfloat16: from codes on the device, and from codes in pinned memory. "
        "*Copy* is the rate of the codes alone from host to device.",
    ),
    "step-small": Part("Training step, small", 40, ""),
    "step-base": Part("Training step, base", 45, ""),
    "step-paper": Part("Training step, paper", 90, ""),
    "stream": Part(
        "Training from a store",
        65,
        "`semroute train` of `base`; the store is in the page cache. *Data wait* is the share of "
        "time in which training waits for a batch.",
    ),
    "sampling": Part(
        "Sampling", 35, "With guidance. *Apart* is the distance from the float32 latents."
    ),
    "scaling": Part(
        "compile, checkpoints, FSDP2",
        65,
        "Network `base`, strategy `depth`. *Pause* is how long a checkpoint keeps training from "
        "its next step. FSDP2 shards over one rank.",
    ),
}
STEP = (
    "A step of `Trainer` at 256 px (forward, loss, backward, clipping, AdamW), in bfloat16, "
    "features on the device; in two rows they come from pinned memory, or from the LLM at every "
    "step. *Attention* counts the kernels of torch that a step calls."
)


def run_part(name: str, out: Path, limit: float, options: list[str]) -> dict[str, Any]:
    """Run a part in a process of its own, and gather its rows, whatever becomes of it."""
    work, log = out / "work" / name, out / "logs" / f"{name}.txt"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log.parent.mkdir(exist_ok=True)
    began, status = time.monotonic(), "ok"
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, __file__, str(work), f"--part={name}", *options],
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if process.wait(max(0.0, limit)):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
    rows, machine = work / "rows.jsonl", work / "machine.json"
    found = {
        "status": status,
        "seconds": time.monotonic() - began,
        "rows": [*map(json.loads, rows.read_text("utf-8").splitlines())] if rows.exists() else [],
        "machine": json.loads(machine.read_text("utf-8")) if machine.exists() else {},
    }
    if status != "ok":
        found["error"] = log.read_text("utf-8", "replace").splitlines()[-20:]
    shutil.rmtree(work)
    return found


def measure(name: str, folder: Path, tiny: bool) -> None:
    """The process of a part: its rows go to FOLDER/rows.jsonl as soon as they are measured."""
    from gpu_shapes import FULL, TINY, machine

    (folder / "machine.json").write_text(json.dumps(machine()), "utf-8")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows:
        for row in rows_of(name, TINY if tiny else FULL, folder):
            rows.write(json.dumps(row) + "\n")
            rows.flush()


def rows_of(name: str, shapes: Any, folder: Path) -> Rows:
    """Run a part; it imports what it needs and no more, as there are many."""
    if name == "tests":
        return run_tests(folder)
    if name in ("extraction", "decoding"):
        import gpu_features as module
    else:
        import gpu_training as module
    kind, _, size = name.partition("-")
    found: Rows = getattr(module, f"measure_{kind}")(shapes, folder, *[size] * bool(size))
    return found


def run_tests(folder: Path) -> Rows:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text("utf-8")]
    found = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"--junitxml={found}", *map(str, files)], cwd=ROOT)
    for case in ElementTree.parse(found).iter("testcase"):
        result = next((child.tag for child in case), "passed")
        yield {"test": case.get("name"), "result": result, "s": float(case.get("time", 0))}
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = [*dict.fromkeys(name for row in rows for name in row)]
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " --: |" * (len(columns) - 1))
    return lines + [
        "| " + " | ".join(shown(row.get(name, "")) for name in columns) + " |" for row in rows
    ]


def page(found: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["# On a GPU", ""]
    machine: dict[str, Any] = next((each["machine"] for each in found.values()), {})
    lines += [", ".join(f"{key}: {value}" for key, value in machine.items()), ""]
    for name, result in found.items():
        part = PARTS[name]
        lines += [f"## {part.title}", "", STEP if name.startswith("step") else part.about, ""]
        if result["rows"]:
            lines += [*table(result["rows"]), ""]
        lines += [f"{result['status']}, {result['seconds']:.0f} s", ""]
        if "error" in result:
            lines += ["```text", *result["error"], "```", ""]
    return "\n".join(lines)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--only", multiple=True, type=click.Choice([*PARTS]), help="Only these parts.")
@click.option("--minutes", default=9.0, show_default=True, help="Limit of all parts together.")
@click.option("--tiny", is_flag=True, help="Small shapes, for a CPU.")
@click.option("--part", hidden=True, help="This part alone, in this process.")
def main(out: Path, only: tuple[str, ...], minutes: float, tiny: bool, part: str | None) -> None:
    if part is not None:
        measure(part, out, tiny)
        return
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    found: dict[str, dict[str, Any]] = {}
    for name, planned in PARTS.items():
        if (only and name not in only) or (tiny and name in ("step-base", "step-paper")):
            continue
        limit = min(planned.limit_seconds * (4 if tiny else 1), end - time.monotonic())
        found[name] = run_part(name, out, limit, ["--tiny"] * tiny)
        click.echo(f"{name}: {found[name]['status']}, {found[name]['seconds']:.0f} s", err=True)
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (out / "gpu.md").write_text(page(found), "utf-8")
    shutil.rmtree(out / "work", ignore_errors=True)
    click.echo((out / "gpu.md").read_text("utf-8"))
    if any(each["status"] != "ok" for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
