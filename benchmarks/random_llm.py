"""A control: an LLM with the same architecture and tokenizer, and untrained weights.

    python benchmarks/random_llm.py MODEL OUT [--seed 0]

MODEL is anything that ``semroute extract --model`` takes; OUT becomes a folder that it takes too.
"""

from pathlib import Path

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import load_tokenizer


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True)
def main(model: str, out: Path, seed: int) -> None:
    located = find_model(model)
    config = AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    load_tokenizer(located).save_pretrained(out)
    click.echo(f"{out}: {config.model_type} with {config.num_hidden_layers} random layers")


if __name__ == "__main__":
    main()
