import pytest

pytest.importorskip("torch")
import torch

from semroute.trainer.training.optimizers import Muon


@pytest.mark.parametrize("together", [1 << 24, 48 * 48, 1])
def test_muon_steps_as_torchs_own_does_but_for_rounding(together, monkeypatch):
    """However many matrices are taken together; one of them does not learn."""
    monkeypatch.setattr("semroute.trainer.training.optimizers._TOGETHER", together)
    shapes = [(48, 48), (96, 32), (48, 48), (32, 96), (96, 32), (48, 48), (48, 48)]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    found = []
    for kind in (Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = kind(weights, lr=0.1, weight_decay=0.01)
        for each in gradients:
            for weight, gradient in zip(weights[:-1], each, strict=False):
                weight.grad = gradient.clone()
            optimizer.step()
        moved = [(w.detach() - start) for w, start in zip(weights, starts, strict=True)]
        found.append((moved, optimizer.state_dict()))
    (mine, state), (expected, other) = found
    assert not mine[-1].any()
    for moved, right in zip(mine[:-1], expected, strict=False):
        assert float((moved - right).norm() / right.norm()) < 2**-7  # of a bfloat16 mantissa
    assert state["state"].keys() == other["state"].keys() == {*range(6)}
    for number, buffers in state["state"].items():
        assert buffers.keys() == other["state"][number].keys() == {"momentum_buffer"}
        assert torch.equal(buffers["momentum_buffer"], other["state"][number]["momentum_buffer"])
    assert state["param_groups"] == other["param_groups"]


def test_muon_returns_what_its_closure_does():
    weight = torch.nn.Parameter(torch.eye(4))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight], lr=0.1).step(closure).item() == 4.0
