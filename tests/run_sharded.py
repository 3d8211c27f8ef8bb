"""``python -m run_sharded CONFIG...`` on several ranks: train each under FSDP2, on CPUs.

Accelerate does all that it does on GPUs; only on a CPU it does not begin by itself.
"""

import sys
import warnings
from pathlib import Path

import accelerate.utils.other
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from semroute.schemas import TrainConfig
from semroute.trainer.training import train as module

warnings.simplefilter("error")
accelerate.utils.other.is_deepspeed_available = lambda: False  # importing it takes long
torch.set_num_threads(1)
make, networks = module.make_accelerator, []


def make_accelerator(config):
    accelerator = make(config)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    prepare = accelerator.prepare

    def watched(network, *optimizers):
        networks.append(network)
        return prepare(network, *optimizers)

    accelerator.prepare = watched
    # The next run needs the process group.
    accelerator.end_training = accelerator.wait_for_everyone
    return accelerator


module.make_accelerator = make_accelerator
for name in sys.argv[1:]:
    module.train(TrainConfig.model_validate_json(Path(name).read_text()), progress=False)
    network = networks.pop()
    assert isinstance(network, FSDPModule)
    sharded = [m for m in network.modules() if type(m).__name__.startswith("FSDP")]
    assert len(sharded) >= 5, sharded  # itself and at least four of its modules
