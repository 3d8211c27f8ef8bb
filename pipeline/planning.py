"""What an extraction is about, known before the LLM runs: its captions, its model, its identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from ..schemas import SAMPLES_SCHEMA, FeatureIdentity
from .captions import Captions, build_captions, read_template
from .samples import Samples, read_samples

if TYPE_CHECKING:
    from .encoder import Source


@dataclass(frozen=True)
class Plan:
    """Samples, captions and model of an extraction.

    Attributes:
        model: where the LLM is.
        samples: the user's table.
        captions: unique, templated, tokenised, in store order.
        identity: what resume and training compare.
    """

    model: Source
    samples: Samples
    captions: Captions
    identity: FeatureIdentity

    def samples_table(self) -> pa.Table:
        """samples.parquet: a row an input row."""
        columns = [
            pa.array(range(len(self.samples)), pa.int64()),
            self.captions.caption_ids,
            self.samples.image_names(),
        ]
        return pa.table(columns, schema=SAMPLES_SCHEMA)

    def report_cuts(self, report: Callable[[str], None]) -> None:
        """Say which captions lose their end, the longest first."""
        captions = self.captions
        cut = np.flatnonzero(captions.num_cut)
        if not len(cut):
            return
        report(
            f"warning: {len(cut):,} captions are longer than {self.identity.max_length} tokens and "
            "lose their end (captions.parquet has num_cut_tokens), for example:"
        )
        for entry in cut[np.argsort(-captions.num_cut[cut], kind="stable")[:3]]:
            text = captions.texts[entry]
            shown = text if len(text) <= 70 else f"{text[:67]}..."
            report(f"  -{captions.num_cut[entry]} tokens: {shown!r}")


def make_plan(
    source: str,
    *,
    model: str,
    template: str = "bos",
    text_column: str | None = None,
    layers: str = "all",
    max_length: int = 512,
    keep_prefix: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    limit: int | None = None,
    seed: int = 0,
) -> Plan:
    """Read, deduplicate and tokenise the captions; no weights are loaded.

    Args: as for :func:`semroute.pipeline.extraction.extract`; ``auto`` is bfloat16 on a GPU and
    float32 on a CPU.

    Raises:
        InputError: bad input.
    """
    import torch

    from .encoder import (
        ATTENTION,
        describe_model,
        find_model,
        load_tokenizer,
        parse_layers,
        tokenizer_digest,
    )

    template_text = read_template(template)
    samples = read_samples(source, text_column=text_column, limit=limit, need="text")
    texts = samples.texts()
    located = find_model(model)
    described = describe_model(located)
    chosen = parse_layers(layers, described.num_layers)
    tokenizer = load_tokenizer(located)
    captions = build_captions(
        texts,
        tokenizer,
        template=template_text,
        max_length=max_length,
        keep_prefix=keep_prefix,
        seed=seed,
    )
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    identity = FeatureIdentity(
        model=described,
        tokenizer=tokenizer_digest(tokenizer),
        template=captions.template,
        layers=chosen,
        final_norm="normed" if chosen[-1] == described.num_layers else "absent",
        dtype=dtype,
        attention=ATTENTION,
        max_length=max_length,
        captions=captions.identity,
        samples=samples.identity(),
    )
    return Plan(located, samples, captions, identity)
