"""Memory of planning an extraction, step by step.

    python benchmarks/plan_memory.py FOLDER --model LLM --num 1000000
    python benchmarks/plan_memory.py FOLDER --model LLM --num 10000000 --until dropped

Captions are those of benchmarks/plan.py. After each step the resident memory is printed, and its
peak since the step before; the first line is the process with its libraries, before it reads. The
LLM's weights are not looked at, and no manifest is written.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
from plan import write_captions

STEPS = ("read", "fingerprinted", "deduplicated", "dropped", "tokenised", "captions", "samples")


def show(step: str) -> None:
    """Print memory, and begin a new peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    now, peak = (int(sizes[key]) / 1e3 for key in ("VmRSS", "VmHWM"))
    click.echo(f"{step:14} {now:8,.0f} MB, peak {peak:8,.0f} MB, CPU {time.process_time():5.0f} s")
    Path("/proc/self/clear_refs").write_text("5")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", required=True)
@click.option("--num", type=int, default=1_000_000, show_default=True)
@click.option("--until", type=click.Choice(STEPS), default=STEPS[-1], show_default=True)
def main(folder: Path, model: str, num: int, until: str) -> None:
    """Plan once, up to a step."""
    import torch  # noqa: F401  (as in the driver)

    from semroute.pipeline.extraction.plan import Plan
    from semroute.pipeline.models.hub import find_model
    from semroute.pipeline.models.llm import load_tokenizer
    from semroute.pipeline.sources.table import read_samples
    from semroute.pipeline.store.documents import render_table
    from semroute.pipeline.store.layout import pack
    from semroute.pipeline.text.captions import deduplicate, tokenize_captions

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num}.parquet"
    if not path.exists():
        write_captions(path, num)
    tokenizer: Any = load_tokenizer(find_model(model))
    show("start")

    def after(step: str) -> None:
        show(step)
        if step == until:
            sys.exit()

    samples = read_samples(str(path), need="text")
    after("read")
    samples.identity()
    after("fingerprinted")
    unique = deduplicate(samples.texts(), 0, [])
    after("deduplicated")
    samples = samples.without_texts()
    pa.default_memory_pool().release_unused()
    after("dropped")
    captions = tokenize_captions(
        unique,
        tokenizer,
        template="{bos}{caption}",
        max_length=512,
        keep_prefix=False,
        processing=None,
        causal=True,
        seed=0,
    )
    packing = pack(
        captions.num_tokens,
        bytes_per_row=2 * 30 * 576,
        shard_bytes=256_000_000,
        batch_tokens=512,
        aligned=True,
    )
    after("tokenised")
    nothing: Any = None
    plan = Plan(nothing, samples, captions, nothing, [], [], nothing)
    render_table(plan.captions_reader(packing))
    after("captions")
    render_table(plan.samples_table())
    after("samples")


if __name__ == "__main__":
    main()
