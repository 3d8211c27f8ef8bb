"""Cost of caching hidden states beyond the LLM itself, beside other ways to do it: one run,
interleaved, medians.

    python -m venv peers; peers/bin/pip install torch      (from the index of CPU wheels)
    peers/bin/pip install semroute -r benchmarks/requirements-peers.txt
    peers/bin/python benchmarks/extract.py CAPTIONS --model LLM --work extract-files

In every round each contender has its own process, on one core and with nothing else to do: it
loads the LLM, runs a first batch, and then is timed. With `--cores 2` the LLM still has one thread,
and the other core is free for work that can be done in parallel.

- *semroute* is `semroute extract` in its own process (`--workers 0`) from its first shard to the
  end; codecs were fitted before. The receipts break down the time. Use captions for several shards:
  each is written while the next one runs, and only the last one is written alone.
- *Bare forward* runs the LLM on exactly the batches of the store and keeps nothing, not one layer.
  It alternates with semroute in the same process, as processes differ by more than the effect
  measured.
- The others follow image trainers and general tools: batches of a fixed number of captions in
  random order, padded to the longest, `output_hidden_states`, and each caption's layers in bfloat16
  to a file of its own, or through a writer used as its documentation recommends.

The second part takes all cores: the real command with one worker and with several, of one thread
each, against as many processes that only run the forward pass. Seconds are from the first shard's
first batch to the last receipt; the time to start Python, Dask and the LLM is listed separately.

A contender that cannot be imported is skipped, with a message.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from read import Reader, median, size_of

CODECS = ("bf16", "delta")
TURNS = 4
"""Turns of bare forward and semroute in one process."""


@dataclass(frozen=True)
class Setting:
    """Inputs and settings that all contenders share.

    Attributes:
        work: folder for the stores and the output of contenders.
        extract: arguments of :func:`semroute.pipeline.extraction.features.extract` except codec
            and target.
        batch_size: captions per batch of contenders that pad.
    """

    work: Path
    extract: dict[str, Any]
    batch_size: int

    def store(self, codec: str) -> Path:
        return self.work / f"store-{codec}"

    def run(self, codec: str, report: Callable[[str], None] = lambda _: None) -> None:
        """Make or resume the store in this process."""
        from semroute.pipeline.extraction.features import extract

        extract(
            features=self.store(codec), codec=codec, workers=0, threads=1, report=report,
            **self.extract,
        )  # fmt: skip

    def reopen(self, codec: str, shards: int | None = None) -> None:
        """Mark the store, or some of its shards, to be rewritten."""
        from semroute.pipeline.store.open import open_features

        store = open_features(self.store(codec), complete=False)
        store.reopen(range(store.manifest.layout.num_shards if shards is None else shards))


class Captions:
    """Token ids of a store's captions, template included, and the LLM that made it."""

    def __init__(self, path: Path) -> None:
        from semroute.pipeline.store.open import open_features

        self.store = open_features(path, complete=False)
        self.manifest = self.store.manifest
        template = self.manifest.identity.template
        prefix = [] if template.keep_prefix else template.prefix_tokens
        stored = self.store.captions["token_ids"].to_pylist()
        self.kept = np.array([0, *[len(prefix)] * (len(stored) - 1)])
        self.sequences = [
            np.array([*(prefix if kept else []), *ids], np.int32)
            for kept, ids in zip(self.kept, stored, strict=True)
        ]
        self.lengths = np.array([*map(len, self.sequences)])

    @cached_property
    def tower(self) -> Any:
        """The text tower alone, as in transformers. In one process with semroute it is the same
        object, because weights elsewhere in memory are read faster or slower."""
        import torch

        from semroute.pipeline.extraction.worker import encoder_of
        from semroute.pipeline.models.hub import find_model

        torch.set_num_threads(1)
        source = find_model(self.manifest.provenance.model)
        return encoder_of(source, self.manifest.identity).tower.module

    def planned(self, *, padded: bool) -> Iterator[dict[str, Any]]:
        """The batches of the store, as inputs of the LLM; or those of a store that pads."""
        from semroute.pipeline.text.batching import batches

        shards, layout = self.store.captions["shard"].to_numpy(), self.manifest.layout
        for shard in range(layout.num_shards):
            entries = np.flatnonzero(shards == shard)
            line_tokens = None if padded else layout.line_tokens
            for batch in batches(self.lengths[entries], layout.batch_tokens, line_tokens):
                yield self.inputs(entries[batch.entries], batch.row)

    def inputs(self, entries: np.ndarray, line: np.ndarray | None = None) -> dict[str, Any]:
        """A batch as inputs of the LLM: packed, or padded on the right."""
        from semroute.pipeline.models.llm import lay_out

        return lay_out([self.sequences[i] for i in entries], self.kept[entries].tolist(), line)[0]

    def random(self, size: int) -> list[np.ndarray]:
        """All captions in random order, in batches of the given size."""
        order = np.random.default_rng(0).permutation(len(self.sequences))
        return [order[first : first + size] for first in range(0, len(order), size)]

    def forward(self, inputs: dict[str, Any], **options: Any) -> Any:
        """One batch through transformers."""
        import torch

        with torch.inference_mode():
            return self.tower(**inputs, use_cache=False, **options)

    def encode(self, batch: np.ndarray) -> list[Any]:
        """Hidden states of each caption of a padded batch, bfloat16 [T, L, H]."""
        import torch

        states = self.forward(self.inputs(batch), output_hidden_states=True).hidden_states
        layers = self.manifest.identity.layers
        hidden = torch.stack([states[layer].bfloat16() for layer in layers], 2)  # [B, T, L, H]
        spans = zip(hidden, self.kept[batch], self.lengths[batch], strict=True)
        return [rows[first:stop].contiguous() for rows, first, stop in spans]


class Clock:
    """Seconds since it was made or restarted."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        now = time.perf_counter(), time.process_time()
        return {"seconds": now[0] - self.began[0], "processor": now[1] - self.began[1]}


Work = Callable[[Captions, Path, int], None]
"""Encodes all captions into a new folder, in batches of the given size."""


def write_files(captions: Captions, out: Path, size: int) -> None:
    from safetensors.torch import save_file

    out.mkdir()
    for batch in captions.random(size):
        for number, hidden in zip(batch, captions.encode(batch), strict=True):
            save_file({"hidden": hidden}, out / f"{number}.safetensors")


def write_arrow(captions: Captions, out: Path, size: int) -> None:
    import datasets
    import torch

    datasets.disable_progress_bars()

    def encode(rows: dict[str, list[int]]) -> dict[str, list[bytes]]:
        found = captions.encode(np.array(rows["id"]))
        return {"hidden": [hidden.view(torch.uint16).numpy().tobytes() for hidden in found]}

    order = np.concatenate(captions.random(size))
    table = datasets.Dataset.from_dict({"id": order.tolist()})
    features = datasets.Features({"id": table.features["id"], "hidden": datasets.Value("binary")})
    out.mkdir()
    table.map(
        encode,
        batched=True,
        batch_size=size,
        features=features,
        cache_file_name=str(out / "hidden.arrow"),
        new_fingerprint="hidden",  # or it would hash the LLM
    )


def write_mds(captions: Captions, out: Path, size: int) -> None:
    import torch
    from streaming import MDSWriter

    columns = {"id": "int", "hidden": "ndarray:uint16"}
    with MDSWriter(columns=columns, out=str(out)) as writer:
        for batch in captions.random(size):
            for number, hidden in zip(batch, captions.encode(batch), strict=True):
                found = hidden.view(torch.uint16).numpy()
                writer.write({"id": int(number), "hidden": found})


@dataclass
class Contender:
    """Something that runs the LLM over all captions.

    Attributes:
        codec: of the store whose captions, and planned batches if any, it runs.
        needs: modules it imports, if any.
        work: work of contenders that pad; None for bare forward and for semroute.
        bare: runs the LLM and keeps nothing.
        padded: whether a bare forward runs the batches of a store that pads.
        found: one entry per round: ``seconds``, ``processor`` (seconds), ``num_bytes``, and
            ``parts``, seconds by name.
    """

    name: str
    codec: str
    needs: tuple[str, ...] = ()
    work: Work | None = None
    bare: bool = False
    padded: bool = False
    found: list[dict[str, Any]] = field(default_factory=list)

    def median(self, name: str) -> float:
        return median([each[name] for each in self.found])

    def ratio(self, bare: "Contender", name: str) -> str:
        """Ratio to bare forward, of medians; for semroute, whose turns alternate with it, the
        median and the middle half of the ratios."""
        if self.bare or self.work is not None:
            return f"{self.median(name) / bare.median(name):.3f}"
        pairs = zip(self.found, bare.found, strict=True)
        ratios = [own[name] / other[name] for own, other in pairs]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    def run(self, setting: Setting) -> dict[str, Any]:
        """Run and time it, in a process of its own."""
        if self.bare:
            return self._run_bare(setting)
        if self.work is not None:
            return self._run_work(setting, self.work)
        return self._run_own(setting)

    def _run_bare(self, setting: Setting) -> dict[str, Any]:
        captions = Captions(setting.store(self.codec))
        planned = [*captions.planned(padded=self.padded)]
        captions.forward(planned[0])
        return time_bare(captions, planned)

    def _run_work(self, setting: Setting, work: Work) -> dict[str, Any]:
        captions, out = Captions(setting.store(self.codec)), setting.work / "written"
        shutil.rmtree(out, ignore_errors=True)
        captions.encode(captions.random(setting.batch_size)[0])
        clock = Clock()
        work(captions, out, setting.batch_size)
        found = {**clock.read(), "num_bytes": size_of(out)}
        shutil.rmtree(out)
        return found

    def _run_own(self, setting: Setting) -> dict[str, Any]:
        """Turns of bare forward and of semroute, each first in every other turn."""
        captions = Captions(setting.store(self.codec))
        planned = [*captions.planned(padded=False)]
        captions.forward(planned[0])
        setting.reopen(self.codec, 1)
        setting.run(self.codec)  # loads the LLM and compiles
        works = [
            ("bare", lambda: time_bare(captions, planned)),
            ("own", lambda: self._time_own(setting)),
        ]
        return {
            "turns": [
                {name: work() for name, work in works[:: 1 - 2 * (n % 2)]} for n in range(TURNS)
            ]
        }

    def _time_own(self, setting: Setting) -> dict[str, Any]:
        from semroute.pipeline.store.open import open_features

        setting.reopen(self.codec)
        clock = Clock()

        def hear(line: str) -> None:
            if "to do:" in line:  # the plan is made, shards start
                clock.begin()

        setting.run(self.codec, hear)
        found = clock.read()
        store = open_features(setting.store(self.codec))
        parts = total([receipt.seconds for receipt in store.receipts().values()])
        return {**found, "num_bytes": store.num_bytes(), "parts": parts}


def time_bare(captions: Captions, planned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    clock = Clock()
    for batch in planned:
        captions.forward(batch)
    return {**clock.read(), "num_bytes": 0}


def total(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            found[name] += value
    return found


def all_contenders() -> list[Contender]:
    peers: list[tuple[str, tuple[str, ...], Work]] = [
        ("padded, one safetensors per caption", ("safetensors",), write_files),
        ("padded, `datasets.map` into Arrow", ("datasets",), write_arrow),
        ("padded, MDS writer", ("streaming",), write_mds),
    ]
    return [
        *(
            contender
            for codec in CODECS
            for contender in (
                Contender(f"bare forward, batches of {codec}", codec, bare=True),
                Contender(f"semroute {codec}", codec),
            )
        ),
        Contender("bare forward, padded batches", CODECS[0], bare=True, padded=True),
        *(Contender(name, CODECS[0], needs, work) for name, needs, work in peers),
    ]


def start(command: Sequence[str], name: str, *options: str) -> subprocess.Popen[str]:
    """Start a contender's process, with memory allocated as in our workers."""
    settings = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
    return subprocess.Popen(
        [*command, f"--alone={name}", *options],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )


def read(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Result of a contender's process, once it ends."""
    out, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def measure(contender: Contender, bare: Contender | None, command: Sequence[str]) -> None:
    """Run one round of a contender in its own process, along with its bare forward, if any."""
    result = read(start(command, contender.name))
    if bare is None:
        contender.found.append(result)
        return
    for turn in result["turns"]:
        contender.found.append(turn["own"])
        bare.found.append(turn["bare"])


@dataclass
class Workers:
    """The real command with a number of workers, and as many bare forwards at once.

    Attributes:
        bare: seconds of the slowest process; each runs all captions.
        seconds: from the first batch to the last receipt.
        start: seconds before that: Python, plan, Dask and the LLM.
        waits: share of the workers' time in which the LLM waited.
    """

    num: int
    bare: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def measure_bare(self, command: Sequence[str], codec: str) -> None:
        name = f"bare forward, batches of {codec}"
        running = [start(command, name, "--all-cores") for _ in range(self.num)]
        self.bare.append(max(read(process)["seconds"] for process in running))

    def measure(self, setting: Setting, codec: str) -> None:
        from semroute.pipeline.store.open import open_features

        setting.reopen(codec)
        options = setting.extract
        command = [sys.executable, "-m", "semroute.cli", "extract", options["source"]]
        command += [str(setting.store(codec)), "--model", options["model"], "--codec", codec]
        command += ["--shard-size", str(options["shard_bytes"]), "--workers", str(self.num)]
        for name in ("text_column", "template", "limit"):
            if options[name] is not None:
                command += [f"--{name.replace('_', '-')}", str(options[name])]
        began = time.time()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        store = open_features(setting.store(codec))
        by_worker = defaultdict(list)
        for shard, receipt in store.receipts().items():
            written = (store.path / "receipts" / f"shard-{shard:06d}.json").stat().st_mtime
            by_worker[receipt.worker].append((written, receipt.seconds))
        firsts, lasts, busy = [], [], 0.0
        for shards in by_worker.values():
            shards.sort(key=lambda each: each[0])
            written, seconds = shards[0]
            firsts.append(written - seconds["write"] - seconds["code"] - seconds["forward"])
            lasts.append(shards[-1][0])
            busy += sum(seconds["forward"] + seconds["code"] for _, seconds in shards)
        self.seconds.append(max(lasts) - min(firsts))
        self.start.append(min(firsts) - began)
        # Nothing waits for the last shard to be written.
        ends = sum(shards[-1][1]["write"] for shards in by_worker.values())
        self.waits.append(1 - busy / (sum(lasts) - sum(firsts) - ends))


@click.command()
@click.argument("captions", type=click.Path(exists=True, path_type=Path))
@click.option("--model", required=True)
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for files.")
@click.option("--text-column")
@click.option("--template", default="bos", show_default=True)
@click.option("--limit", type=int, help="Only the first rows.")
@click.option("--shard-size", "shard_bytes", default=64_000_000, show_default=True)
@click.option("--batch-size", default=32, show_default=True, help="For contenders that pad.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--workers", default="1,2", show_default=True, help="For the second part.")
@click.option("--cores", default=1, show_default=True, help="Cores per contender; its LLM has one.")
@click.option("--part", type=click.Choice(["one-core", "all-cores"]), help="Run only this part.")
@click.option("--alone", hidden=True, help="One contender by name, timed by the process above.")
@click.option("--all-cores", is_flag=True, hidden=True)
def main(
    captions: Path,
    work: Path,
    batch_size: int,
    rounds: int,
    workers: str,
    cores: int,
    part: str | None,
    alone: str | None,
    all_cores: bool,
    **options: Any,
) -> None:
    setting = Setting(work, {"source": str(captions), **options}, batch_size)
    contenders = all_contenders()
    if alone is not None:
        if not all_cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
        os.environ["OMP_NUM_THREADS"] = "1"
        found = next(each for each in contenders if each.name == alone).run(setting)
        print("\n" + json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # some contenders leave threads that take seconds to stop
    contenders = [c for c in contenders if Reader(c.name, c.needs, "", None).can_be_imported()]  # type: ignore[arg-type]
    for codec in CODECS:
        setting.run(codec, partial(click.echo, err=True))
    command = [sys.executable, __file__, *sys.argv[1:]]
    if part == "all-cores":
        contenders = []
    scaling = [Workers(int(num)) for num in workers.split(",")] if part != "one-core" else []
    bare = {each.codec: each for each in contenders if each.bare and not each.padded}
    for _ in range(rounds):
        for contender in contenders:
            if contender is not bare[contender.codec]:
                beside = None if contender.bare or contender.work else bare[contender.codec]
                measure(contender, beside, command)
        for each in scaling:
            each.measure_bare(command, CODECS[-1])
            each.measure(setting, CODECS[-1])
    encoded = Captions(setting.store(CODECS[-1]))
    if contenders:
        print_contenders(contenders, encoded)
        print_parts(contenders)
    if scaling:
        print_scaling(scaling, encoded)


def print_contenders(contenders: Sequence[Contender], captions: Captions) -> None:
    num, tokens = len(captions.sequences), int(captions.lengths.sum())
    bare = {each.codec: each for each in contenders if each.bare and not each.padded}
    print(f"{num:,} captions, {tokens:,} tokens\n")
    print("| | s | x bare forward | x, processor time | captions/s | tokens/s | MB |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for each in contenders:
        seconds = each.median("seconds")
        ratios = [each.ratio(bare[each.codec], name) for name in ("seconds", "processor")]
        print(
            f"| {each.name} | {seconds:.1f} | {ratios[0]} | {ratios[1]} "
            f"| {num / seconds:.1f} | {tokens / seconds:,.0f} "
            f"| {each.median('num_bytes') / 1e6:,.0f} |"
        )


def print_parts(contenders: Sequence[Contender]) -> None:
    """Print the breakdown of semroute's time, as shares of the bare forward."""
    bare = {c.codec: c.median("seconds") for c in contenders if c.bare and not c.padded}
    print("\n| % of bare forward | forward | code | LLM waits | write, meanwhile |")
    print("| --- | --: | --: | --: | --: |")
    for each in contenders:
        if each.bare or each.work:
            continue
        names = ("forward", "code", "write")
        *busy, write = (median([found["parts"][name] for found in each.found]) for name in names)
        shares = [*busy, each.median("seconds") - sum(busy), write]
        shown = " | ".join(f"{100 * share / bare[each.codec]:.1f}" for share in shares)
        print(f"| {each.name} | {shown} |")


def print_scaling(scaling: Sequence[Workers], captions: Captions) -> None:
    tokens = int(captions.lengths.sum())
    first = scaling[0]
    print(
        f"\n| workers | start, s | s | tokens/s | x of {first.num} | LLM waits, % "
        f"| bare forwards at once, tokens/s | x of {first.num} | of bare |"
    )
    print("| --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    own = tokens / median(first.seconds)
    bare = first.num * tokens / median(first.bare)
    for each in scaling:
        ours = tokens / median(each.seconds)
        theirs = each.num * tokens / median(each.bare)
        print(
            f"| {each.num} | {median(each.start):.1f} | {median(each.seconds):.1f} | {ours:,.0f} "
            f"| {ours / own:.2f} | {100 * median(each.waits):.1f} | {theirs:,.0f} "
            f"| {theirs / bare:.2f} | {ours / theirs:.3f} |"
        )


if __name__ == "__main__":
    main()
