import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from semroute.pipeline.codecs import CODECS, CodecError

bf16 = CODECS["bf16"]


@given(codes=stn.arrays(np.uint16, stn.array_shapes(max_dims=3, max_side=8)))
def test_numpy_decodes_every_bit_pattern_exactly(codes):
    values = bf16.decode(codes)
    assert values.dtype == np.float32
    assert (values.view(np.uint32) == codes.astype(np.uint32) << 16).all()


class TestInTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @given(
        values=stn.arrays(
            np.float32, stn.array_shapes(max_dims=3, max_side=8), elements=st.floats(width=32)
        )
    )
    def test_encoding_is_a_cast_to_bfloat16(self, values):
        import torch

        tensor = torch.from_numpy(values)
        codes = bf16.encode(tensor).numpy()
        expected = tensor.to(torch.bfloat16)
        torch.testing.assert_close(
            bf16.decode_torch(codes), expected, equal_nan=True, rtol=0, atol=0
        )
        np.testing.assert_array_equal(bf16.decode(codes), expected.float().numpy())

    def test_decoding_shares_memory(self):
        codes = np.zeros(3, np.uint16)
        bf16.decode_torch(codes)[1] = 1.0
        assert codes.tolist() == [0, 0x3F80, 0]

    def test_the_error_is_that_of_the_layer_norm(self, torch):
        hidden = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
        hidden[:, 5] *= 1000  # a massive activation hides the others
        coded = hidden.to(torch.bfloat16)
        error = CodecError()
        error.add(hidden[:32], coded[:32])
        error.add(hidden[32:], coded[32:])
        norm = torch.nn.functional.layer_norm
        a, b = norm(hidden, (96,)), norm(coded.float(), (96,))
        relative = (b - a).norm(dim=-1) / a.norm(dim=-1)
        found = error.to_dict()
        assert found["mean"] == pytest.approx(relative.mean().item(), rel=1e-4)
        assert found["max"] == pytest.approx(relative.max().item(), rel=1e-4)
        assert found["mean_without_top3"] > found["mean"]
        assert found["max_without_top3"] >= found["mean_without_top3"]

    def test_an_llm_that_runs_in_bfloat16_loses_nothing(self, torch):
        hidden = torch.ones(4, 8, dtype=torch.bfloat16)
        error = CodecError()
        error.add(hidden, bf16.encode(hidden).view(torch.bfloat16))
        assert set(error.to_dict().values()) == {0.0}
        assert error.count == 4
