import numpy as np
import pytest
import torch

from semroute.schemas import ModelConfig, RoutingConfig
from semroute.trainer.data.batch import Batch
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise import NoiseSource
from semroute.trainer.model.dit import DiT
from semroute.trainer.training.throughput import count_flops, peak_flops


@pytest.mark.parametrize("strategy", ["depth", "joint"])
def test_flops_are_those_of_the_products(strategy):
    model = DiT(
        ModelConfig(size="nano"),
        RoutingConfig(strategy=strategy),
        latent_shape=(4, 8, 8),
        layers=[1, 2, 3],
        num_llm_layers=3,
        text_width=32,
    )
    batch = Batch(
        step=0,
        micro_step=0,
        position=0,
        sample_ids=np.arange(3),
        hidden=torch.empty(5, 3, 32, dtype=torch.bfloat16),
        offsets=torch.tensor([0, 2, 5]),
        caption=torch.tensor([1, 0, 1]),
        latents=torch.empty(3, 4, 8, 8),
        draws=NoiseSource(Flow(), 0, 2).draw(0, 3, (4, 8, 8)),
    )
    # 6 images of 16 tokens: six FLOPs per weight and token, forward and backward; attention and
    # text besides, less the weights that read text, which see other tokens.
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    found = count_flops(model, batch, 2)
    assert found == pytest.approx(6 * weights * 6 * model.num_tokens((4, 8, 8)), rel=0.1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "share"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12)],
)
def test_peaks_are_found_by_name(name, share):
    assert peak_flops(name, "bf16") == share
    assert peak_flops(name, "no") is None
    assert peak_flops("some other", "bf16") is None
