"""How long a step waits for a checkpoint, against how long it takes to write.

    python benchmarks/checkpoint.py OUT [--size small] [--num 5]

The tensors are those of a network of that size under AdamW: weights, their average and two moments,
in fp32, on the CPU. Each checkpoint is waited for, as a step would if it were
written in between; medians are printed.
"""

import shutil
import statistics
import time
from pathlib import Path

import click
import torch

from semroute.schemas import CheckpointState, ModelConfig, RoutingConfig
from semroute.schemas.units import format_bytes
from semroute.trainer.model.blocks import SIZES
from semroute.trainer.model.dit import DiT
from semroute.trainer.training.ranks import Ranks
from semroute.trainer.training.saver import Saver


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", default="small", show_default=True, type=click.Choice([*SIZES]))
@click.option("--num", default=5, show_default=True, type=click.IntRange(2), help="Checkpoints.")
def main(out: Path, size: str, num: int) -> None:
    """Write checkpoints into OUT, which is removed at the end."""
    network = DiT(
        ModelConfig(size=size),
        RoutingConfig(),
        latent_shape=(4, 32, 32),
        layers=range(1, 31),
        num_llm_layers=30,
        text_width=576,
    )
    weights = {name: each.detach() for name, each in network.named_parameters()}
    moments = {f"{name}/{key}": each for name, each in weights.items() for key in ("m", "v")}
    kinds = {"model": weights, "ema": weights, "optimizer": moments}
    num_bytes = sum(each.nbytes for kind in kinds.values() for each in kind.values())
    saver = Saver(out, Ranks(), keep=1)
    pauses, writes = [], []
    for step in range(1, num + 1):
        start = time.perf_counter()
        saver.save(CheckpointState(step=step, num_ranks=1), kinds)
        pauses.append(saver.pause_seconds)
        saver.wait()
        writes.append(time.perf_counter() - start)
    first, *others = pauses
    shutil.rmtree(out)
    click.echo(
        f"{size}: {format_bytes(num_bytes)} per checkpoint; a step waits {first:.3f} s for the "
        f"first, {statistics.median(others):.3f} s for the others; to disk, with its checksums, "
        f"{statistics.median(writes):.2f} s; {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
