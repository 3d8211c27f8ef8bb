"""Imported by the process that tests fork others from: what takes each of them seconds to import,
and compiled loops, whose first takes half a second to load."""

import numpy as np
import torch
import torch._dynamo

import semroute.cli
import semroute.pipeline.extraction.features
import semroute.pipeline.models.llm
import semroute.trainer.studies.runner
import semroute.trainer.training.train  # noqa: F401 - all of them are
from semroute.pipeline.codecs.error import layer_errors
from semroute.pipeline.codecs.ranges import request_ranges

nothing = np.zeros(1, np.int64)
request_ranges(nothing, nothing, np.ones(1, bool))
layer_errors(torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bfloat16))
