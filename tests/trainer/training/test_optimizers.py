import pytest

pytest.importorskip("torch")
import torch

from semroute.trainer.training.optimizers import Muon


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_muon_steps_as_torchs_own_does_but_for_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    found = []
    for kind in (Muon, torch.optim.Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1, weight_decay=0.01)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append((weight.detach() - start, optimizer.state_dict()))
    (mine, state), (expected, other) = found
    assert float((mine - expected).norm() / expected.norm()) < 2**-7  # of a bfloat16 mantissa
    assert torch.equal(state["state"][0]["momentum_buffer"], other["state"][0]["momentum_buffer"])
    assert state["param_groups"] == other["param_groups"]


def test_muon_returns_what_its_closure_does():
    weight = torch.nn.Parameter(torch.eye(4))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], lr=0.1).step(closure).item() == 4.0
