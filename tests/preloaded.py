"""Imported by the process that tests fork others from: what takes each of them seconds to import,
and compiled loops, the first of which takes half a second to load."""

import importlib

import numpy as np
import torch

for name in (
    "distributed.nanny",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "semroute.pipeline.commands.stores",
    "semroute.pipeline.extraction.features",
    "semroute.pipeline.models.llm",
    "semroute.trainer.commands.study",
    "semroute.trainer.studies.runner",
    "semroute.trainer.training.train",
):
    importlib.import_module(name)

from semroute.pipeline.codecs.error import layer_errors  # noqa: E402
from semroute.pipeline.codecs.ranges import request_ranges  # noqa: E402

nothing = np.zeros(1, np.int64)
request_ranges(nothing, nothing, np.ones(1, bool))
layer_errors(torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bfloat16))
