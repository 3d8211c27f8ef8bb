"""DeepSpeed's ZeRO: states of the optimizer, and in stage 2 gradients, cut up among processes.

Weights stay whole in every process, in float32; a checkpoint holds states whole, by parameter, as
without DeepSpeed. So a run may change between ZeRO, FSDP2, DDP and one process.

DeepSpeed flattens each group of parameters into one tensor, of which a process has a part, and
gives and takes a parameter's share of it (``deepspeed.utils.safe_get_full_optimizer_state``).
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from ..schemas import InputError, TrainConfig

STAGES = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, of its shape; beside ``step``."""
# Parts of DeepSpeed's configuration that run.yaml says, or that would train otherwise.
_OTHERS = ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "amp")
_OFFLOADS = ("offload_optimizer", "offload_param")


def make_plugin(config: TrainConfig) -> DeepSpeedPlugin | None:
    """DeepSpeed as the launcher asks for it; None where it does not.

    Of its configuration all holds but what ``run.yaml`` says: precision, clipping, batches.

    Raises:
        InputError: what checkpoints cannot hold, or what would train another way than asked for.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    if "LOCAL_RANK" not in os.environ or parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise InputError(
            "DeepSpeed is asked for (ACCELERATE_USE_DEEPSPEED) without a launcher or on a CPU: run "
            "accelerate launch --config_file docs/accelerate/deepspeed.yaml -m semroute.cli train"
        )
    if find_spec("deepspeed") is None:
        raise InputError(
            "DeepSpeed is asked for and not installed: pip install 'semroute[deepspeed]'"
        )
    try:
        plugin = DeepSpeedPlugin(
            gradient_accumulation_steps=config.grad_accum_steps,
            gradient_clipping=config.optimizer.max_grad_norm,
        )
    except ValueError as error:  # a file that is not there, or lacks a part
        raise InputError(f"DeepSpeed's configuration: {error}") from error
    asked: dict[str, Any] = plugin.deepspeed_config
    zero = asked["zero_optimization"]
    wrong = [key for key in _OTHERS if _is_on(asked.get(key))]
    wrong += [key for key in _OFFLOADS if (zero.get(key) or {}).get("device", "none") != "none"]
    if zero["stage"] not in STAGES:
        wrong.append(f"zero_optimization.stage {zero['stage']}")
    if wrong:
        raise InputError(
            f"DeepSpeed's configuration has {', '.join(wrong)}; expected ZeRO of stage 1 or 2 "
            "without offloading, and precision and optimizer from run.yaml. Where a network does "
            "not fit so, use FSDP2, see docs/accelerate/fsdp2.yaml"
        )
    if config.optimizer.name != "adamw":
        raise InputError(
            f"DeepSpeed flattens parameters, and {config.optimizer.name} needs matrices: set "
            "optimizer.name: adamw, or use FSDP2 or DDP"
        )
    if zero["stage"] == 2 and config.grad_accum_steps > 1:
        raise InputError(
            "ZeRO of stage 2 adds up gradients of accumulation steps wrongly where its parts meet "
            "(seen with DeepSpeed 0.19.8): set zero_stage: 1, or grad_accum_steps: 1"
        )
    for key in ("train_batch_size", *_OTHERS):
        asked.pop(key, None)
    zero.pop("compute_grad_norm", None)  # it is logged, and looked at
    asked["gradient_accumulation_steps"] = config.grad_accum_steps
    asked["gradient_clipping"] = config.optimizer.max_grad_norm
    # It is told for its counts alone; batches come from the stream.
    asked["train_micro_batch_size_per_gpu"] = 1
    if config.mixed_precision == "bf16":
        # Gradients of no module are sent in bfloat16, as with DDP.
        asked["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return plugin


def _is_on(part: Any) -> bool:
    return bool(part) and not (isinstance(part, dict) and part.get("enabled") in (False, "auto"))


def gather_zero(model: nn.Module, zero: Any, keep: bool) -> dict[str, Tensor]:
    """What ``optimizer_tensors`` gives without DeepSpeed, put together from all processes; all of
    which must call it.

    Args:
        zero: DeepSpeed's optimizer.
        keep: of this process; the others get nothing.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    states = [zero.optimizer.state[part] for part in zero.single_partition_of_fp32_groups]
    if not all(states):
        return {}  # before the first step
    _link(zero)
    found = {}
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, key)
            if keep:
                found[f"{name}/{key}"] = whole.cpu()
        if keep:
            found[f"{name}/step"] = states[0]["step"].clone()
    return found


def load_zero(model: nn.Module, zero: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`gather_zero` or ``optimizer_tensors`` took."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if not tensors:
        return
    steps = [tensor for name, tensor in tensors.items() if name.endswith("/step")]
    for part in zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(part) for key in MOMENTS}
        # The same of all parameters; a copy each, for AdamW counts in place.
        zero.optimizer.state[part] = {"step": steps[0].clone(), **moments}
    _link(zero)
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            if (tensor := tensors.get(f"{name}/{key}")) is not None:
                safe_set_full_optimizer_state(parameter, tensor.to(parameter.device), key)


def _link(zero: Any) -> None:
    """Tell each parameter where its states are. DeepSpeed does so in its first step, before those
    of the second group of parameters are there."""
    groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    for parameters, part in groups:
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                state = zero.optimizer.state[part]
                parameter._hp_mapping.set_optim_state_fragment(part, state)
