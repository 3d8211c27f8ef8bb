"""A step waits for its device once, and copies nothing to it from pageable memory.

As far as a CPU can tell: forward and backward run on the device ``meta``, whose tensors have no
values, so that whatever would wait for a value is an error; and what arrives there is counted.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.model.dit import DiT
from semroute.trainer.training.accelerator import make_accelerator
from semroute.trainer.training.setup import make_loader, prepare
from semroute.trainer.training.trainer import Trainer

aten = torch.ops.aten
META = torch.device("meta")


class Operators(TorchDispatchMode):
    """Copies to another device, and reads of single numbers."""

    def __init__(self):
        super().__init__()
        self.copies, self.reads = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function is aten._to_copy.default and device not in (None, args[0].device):
            self.copies.append((args[0], kwargs.get("non_blocking", False)))
        if function is aten._local_scalar_dense.default:
            self.reads.append(args[0].data_ptr())
        return function(*args, **kwargs)


@pytest.fixture
def configure(configure, tmp_path):
    def changed(strategy, **changes):
        usual = {"routing": {"strategy": strategy}, "steps": 3}
        usual["data"] = {"batch_size": 8, "noise_draws": 2}
        return configure(tmp_path / "run", **usual | changes)

    return changed


@pytest.fixture
def no_autocast(monkeypatch):
    """``meta`` has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("strategy", ["penultimate", "depth", "joint", "token"])
def test_forward_and_backward_wait_for_nothing(configure, strategy):
    config = configure(strategy)
    setup = prepare(config)
    batch = make_loader(setup).read(0)
    arrived = []
    with Operators() as seen:
        model = setup.model.to(META)
        assert isinstance(model, DiT)
        seen.copies.clear()
        there = batch.to(META)
        arrived += seen.copies
        trainer = SimpleNamespace(config=config, flow=Flow.from_config(config.flow), model=model)
        loss, t = Trainer.loss(trainer, there)
        (loss + model.router.penalty(t)).backward()
    assert loss.device == META
    # Rows, latents, t, noise and the t of routing: all in memory that is pinned on a GPU.
    assert len(arrived) == 5
    pinned = {each.data_ptr() for each in (batch.hidden, batch.latents, *batch.draws.tensors())}
    assert {copied.data_ptr() for copied, _ in arrived} == pinned
    # Then indices alone, which model.transfer.send pins.
    indices = seen.copies[5:]
    assert len(indices) == (4 if strategy == "joint" else 2)
    assert all(not copied.is_floating_point() for copied, _ in indices)
    assert all(non_blocking for _, non_blocking in seen.copies)


@pytest.mark.parametrize("changes", [{}, {"grad_accum_steps": 2}, {"optimizer": {"name": "muon"}}])
def test_a_step_reads_its_numbers_once(configure, changes):
    config = configure("depth", **changes)
    setup = prepare(config)
    trainer = Trainer(config, make_accelerator(config), setup.model)
    loader = make_loader(setup)
    parts = [loader.read(0, part) for part in range(config.grad_accum_steps)]
    tolist, lists = torch.Tensor.tolist, []

    def counted(tensor):
        lists.append(tensor)
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch, Operators() as seen:
        patch.setattr(torch.Tensor, "tolist", counted)
        trainer.take_step(iter(parts), stop=False)
    # Optimizers read the number of their steps, which is on the CPU on any device.
    steps = {
        state["step"].data_ptr()
        for optimizer in trainer.plain_optimizers
        for state in optimizer.state.values()
        if "step" in state
    }
    floating = [each for each in lists if each.is_floating_point()]
    assert len(floating) == 1
    assert floating[0].shape == (3,)  # loss, whether to stop, gradient norm
    integers = 2 * config.grad_accum_steps  # lengths of captions, of tensors that stay on the CPU
    assert len([each for each in seen.reads if each not in steps]) <= integers


def test_memory_that_a_batch_arrives_in_is_of_the_allocator(configure, monkeypatch):
    """Where there is CUDA, :func:`.buffers.allocate` pins; here it is counted."""
    from semroute.trainer.data import loader as module

    allocate, made = module.allocate, []

    def counted(shape, dtype):
        made.append(allocate(shape, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(module, "allocate", counted)
    setup = prepare(configure("depth"))
    batch = make_loader(setup).read(0)
    wanted = {each.data_ptr() for each in (batch.hidden, batch.latents, *batch.draws.tensors())}
    assert wanted <= {each.data_ptr() for each in made}
