"""What only a GPU can fail; benchmarks/gpu.py runs these tests there."""

from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel

from semroute.pipeline.codecs.registry import CODECS
from semroute.pipeline.store.open import open_features, open_latents
from semroute.schemas import ModelConfig, RoutingConfig
from semroute.trainer.data.batch import on_device
from semroute.trainer.data.loader import PackedLoader
from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise import NoiseSource
from semroute.trainer.diffusion.sampling import SamplingConfig, sample
from semroute.trainer.model.attention import attend
from semroute.trainer.model.dit import DiT
from semroute.trainer.runs.metrics import read_metrics
from semroute.trainer.training.train import train

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_decodes_as_on_a_cpu(codec, random_store):
    store = open_features(random_store(codec))
    ids, layers = np.arange(len(store)), [4, 1, 3]
    found = store.read_codes(ids, layers).tensor(DEVICE)
    assert found.device.type == DEVICE
    expected = store.read(ids, layers).tensor()
    if CODECS[codec].matrices:  # whose products round as the library likes
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(found.cpu(), expected, rtol=2**-6, atol=2**-8 * scale)
    else:
        assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16))  # NaN too


@pytest.mark.parametrize("codes", [False, True])
def test_batches_are_pinned_and_copied_without_waiting(codes, configure, tmp_path):
    config = configure(tmp_path)
    stores = open_features(config.features), open_latents(config.latents)
    loader = PackedLoader(
        *stores, config.data, seed=0, layers=[1, 2, 3, 4], codes=codes, noise=NoiseSource(Flow(), 0)
    )
    read = [loader.read(step) for step in range(3)]
    for batch in read:
        assert batch.latents.is_pinned()
        assert all(tensor.is_pinned() for tensor in batch.draws.tensors())
        assert codes or batch.hidden.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [*islice(on_device(iter([*read, read[0]]), torch.device(DEVICE)), 3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for before, after in zip(read, moved, strict=True):
        assert after.hidden.device.type == after.latents.device.type == DEVICE
        assert torch.equal(after.hidden.cpu(), before.to("cpu").hidden)
        assert torch.equal(after.latents.cpu(), before.latents)


def test_training_follows_that_on_a_cpu(configure, tmp_path, monkeypatch):
    losses = {}
    for device in (DEVICE, "cpu"):
        PartialState._reset_state()
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(int(device == "cpu")))
        path = train(configure(tmp_path / device, steps=3, log_every=1), progress=False)
        losses[device] = [line["loss"] for line in read_metrics(path)]
    PartialState._reset_state()
    np.testing.assert_allclose(losses[DEVICE], losses["cpu"], rtol=1e-3)


@pytest.mark.parametrize("strategy", ["depth", "joint", "token"])
def test_sampling_in_bfloat16(strategy):
    torch.manual_seed(0)
    model = ModelConfig(size="nano", patch_size=4)
    options = {"latent_shape": (4, 16, 16), "layers": [1, 2, 3], "num_llm_layers": 3}
    dit = DiT(model, RoutingConfig(strategy=strategy), text_width=32, **options).eval()
    torch.nn.init.normal_(dit.patch_out.weight, std=0.02)
    hidden, offsets = torch.randn(9, 3, 32), torch.tensor([0, 2, 9])

    def latents(device, dtype):
        config = SamplingConfig(4, 3.0, dtype=dtype)
        null = hidden[:1].to(device)
        return sample(dit.to(device), Flow(), hidden.to(device), offsets, null, config)

    expected = latents("cpu", "float32")
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 3e-2)):
        found = latents(DEVICE, dtype)
        assert (found.dtype, found.device.type) == (torch.float32, DEVICE)
        assert (found.cpu() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_attention_takes_a_fast_kernel(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 24, 64, generator=generator) for heads in (8, 2, 2))
    mask = torch.arange(24) < torch.tensor([[24], [7]]) if masked else None
    mask = None if mask is None else mask[:, None, None]
    expected = attend(q, k, v, mask)
    given = [x.to(DEVICE, dtype) for x in (q, k, v)]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        found = attend(*given, None if mask is None else mask.to(DEVICE))
    torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2)
