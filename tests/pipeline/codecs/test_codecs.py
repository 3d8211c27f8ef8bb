from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semroute import schemas
from semroute.pipeline.codecs.base import Codec
from semroute.pipeline.codecs.error import CodecError, layer_errors, relative_errors
from semroute.pipeline.codecs.predictive import SCALES, Predictive
from semroute.pipeline.codecs.registry import CODECS, request_codec, settle_rank

torch = pytest.importorskip("torch")
from semroute.pipeline.codecs.fit import fit_codec  # noqa: E402

NAMES = [("bf16", None), ("lossless", None), ("delta", 4.0), ("delta", 2.0), ("linear", 4.0),
         ("linear", 2.0), ("predictive", 4.0), ("predictive", 2.0)]  # fmt: skip
slow = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def make_hidden(rows, layers, width, seed=0, kind="residual"):
    """Hidden states as a residual stream has them, float32 [R, L, H]."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(rows, layers, width, generator=generator)
    steps[:, 0] *= 3
    hidden = steps.cumsum(1)
    if kind == "massive":  # one channel carries nearly all of the norm, as in real LLMs
        hidden[:: max(1, rows // 3), :, min(1, width - 1)] += 30_000.0
    if kind == "constant":
        hidden[::2] = 0.25
    if kind == "zero":
        hidden[:] = 0
    if kind == "tiny":
        hidden *= 1e-20
    if kind == "huge":
        hidden *= 1e15
    return hidden


def fit(name, sample, quality=None, rank=5):
    """A codec fitted to a sample; a rank that the width does not allow is one less than it."""
    *_, num_layers, width = sample.shape
    rank = min(rank, width - 1) if name == "predictive" else None
    return fit_codec(request_codec(name, quality, rank), sample, range(num_layers))


def encode(codec: Codec, hidden):
    """Codes as numpy [R, L, size], and what the encoder says a reader gets."""
    codes, decoded, coded = {spec.name: [] for spec in codec.arrays}, [], None
    for layer in range(hidden.shape[1]):
        coded = codec.encode(layer, hidden[:, layer], coded)
        for spec in codec.arrays:
            if spec.layers is not None and layer not in spec.layers:
                assert spec.name not in coded.codes
                continue
            array = coded.codes[spec.name]
            assert array.shape == (len(hidden), spec.size)
            codes[spec.name].append(array.numpy())
            assert codes[spec.name][-1].dtype == spec.dtype
        decoded.append(coded.hidden)
    return {name: np.stack(layers, 1) for name, layers in codes.items()}, torch.stack(decoded, 1)


def decode(codec, codes, layers):
    rows = len(next(iter(codes.values())))
    out = np.full((rows, len(layers), codec.width), 0xFFFF, np.uint16)
    codec.decode(codes, layers, np.arange(len(out)), out)
    return torch.from_numpy(out).view(torch.bfloat16)


def decode_torch(codec, codes, layers):
    return codec.decode_torch({n: torch.from_numpy(a) for n, a in codes.items()}, layers)


def ln(hidden):
    return torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-5)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(2, 33))
KINDS = ["residual", "massive", "constant", "zero", "tiny", "huge"]
kinds = st.sampled_from(KINDS)


@pytest.mark.parametrize(("name", "quality"), NAMES)
class TestEveryCodec:
    @pytest.mark.slow
    @slow
    @given(shape=shapes, kind=kinds, seed=st.integers(0, 99), data=st.data())
    def test_both_decoders_give_what_the_encoder_promised(
        self, name, quality, shape, kind, seed, data
    ):
        hidden = make_hidden(*shape, seed=seed, kind=kind)
        sample = make_hidden(8, *shape[1:], seed=seed + 1)
        codec, _ = fit(name, sample, quality)
        codes, promised = encode(codec, hidden)
        assert torch.isfinite(promised).all()
        everything = list(range(shape[1]))
        layers = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
        for wanted in (everything, layers):
            for found in (decode(codec, codes, wanted), decode_torch(codec, codes, wanted)):
                assert found.dtype == torch.bfloat16
                if name == "linear":  # matrix products round as the library likes
                    torch.testing.assert_close(
                        found.float(), promised[:, wanted].float(), rtol=2**-7, atol=1e-3 *
                        float(promised.float().abs().max())
                    )  # fmt: skip
                else:
                    assert torch.equal(found, promised[:, wanted])

    @slow
    @given(
        # Two channels that are nearly equal differ by less than bfloat16 can say.
        shape=st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(8, 33)),
        kind=st.sampled_from(["residual", "massive"]),
        seed=st.integers(0, 99),
    )
    def test_the_error_is_what_the_quality_promises(self, name, quality, shape, kind, seed):
        hidden = make_hidden(*shape, seed=seed, kind=kind)
        codec, _ = fit(name, make_hidden(8, *shape[1:], seed=seed + 1), quality)
        _, promised = encode(codec, hidden)
        if quality is None:
            assert torch.equal(promised, hidden.to(torch.bfloat16))
            return
        # The step is at most 2**-quality of the RMS, rounded by half of an eighth of an octave; a
        # code is off by half a step at most. bfloat16 of mean, deviation and value does the rest.
        largest = float(2.0**-quality * 2 ** (1 / 16) / 2 * 1.05 + 2**-7)
        error = (ln(promised) - ln(hidden)).norm(dim=-1) / ln(hidden).norm(dim=-1).clamp_min(1e-3)
        assert float(error.max()) <= largest * (1.5 if name == "linear" else 1)

    def test_two_hundred_layers(self, name, quality):
        hidden = make_hidden(5, 200, 24)
        codec, _ = fit(name, hidden, quality)
        codes, promised = encode(codec, hidden)
        assert torch.equal(decode_torch(codec, codes, [199]), promised[:, [199]])
        error = CodecError(range(200))
        for layer in range(200):
            error.add(layer, hidden[:, layer], promised[:, layer])
        first, last = error.totals[:20].mean(), error.totals[-20:].mean()
        assert last <= 1.5 * first + 1e-3  # a closed loop: errors do not pile up

    def test_a_fit_is_a_function_of_its_sample(self, name, quality):
        sample = make_hidden(20, 3, 16)
        one, two = fit(name, sample, quality)[0], fit(name, sample, quality)[0]
        assert one.parameters.keys() == two.parameters.keys()
        for key, values in one.parameters.items():
            np.testing.assert_array_equal(values, two.parameters[key])


@slow
@given(bits=st.lists(st.integers(0, 0xFFFF), min_size=12, max_size=12), seed=st.integers(0, 99))
def test_lossless_keeps_every_bit_pattern_whatever_the_fit(bits, seed):
    codec, _ = fit("lossless", make_hidden(40, 3, 4, seed=seed))
    raw = np.array(bits, np.uint16).reshape(1, 3, 4)
    hidden = torch.from_numpy(raw).view(torch.bfloat16)  # NaN and infinity included
    codes, _ = encode(codec, hidden)
    for found in (decode(codec, codes, [0, 1, 2]), decode_torch(codec, codes, [0, 1, 2])):
        np.testing.assert_array_equal(found.view(torch.uint16).numpy(), raw)


def decode_as_documented(codec, codes):
    """Rank below the width, in numpy: float32, and int64 for what is multiplied by matrices."""
    given, scalar = codec.parameters, codes["scalar"]
    mean, deviation = (
        (scalar[..., i : i + 2].copy().view("<u2").astype(np.uint32) << 16).view(np.float32)
        for i in (0, 2)
    )
    scale = SCALES[scalar[..., 4:]]
    unit = (scale.astype(float) * 2**codec.quality / 16).astype(np.float32)
    zigzag = unpack(codes["code"], codes["escape"], codec.code_bits)
    residual = ((zigzag >> 1) ^ -(zigzag & 1)).astype(np.float32) * scale
    state, out = np.zeros_like(residual[:, 0]), []
    for layer in range(residual.shape[1]):
        low = np.float32(0)
        if layer and codec.rank:
            size = unit[:, layer - 1]
            steps = to_steps(state * (np.float32(1) / size))
            product = (steps @ given["down"][layer].astype(int).T).astype(np.float32)
            axes = to_steps(product * given["shrink"][layer])
            low = (axes @ given["up"][layer].astype(int)).astype(np.float32)
            low = low * given["gain"][layer] * size
        state = state * given["slope"][layer] + given["bias"][layer] + low + residual[:, layer]
        out.append(state * deviation[:, layer] + mean[:, layer])
    return torch.from_numpy(np.stack(out, 1)).to(torch.bfloat16)


def unpack(code, escape, bits):
    code, escape = code.astype(np.int32), escape.astype(np.int32)
    if bits == 4:
        code = np.stack([code & 15, code >> 4], -1).reshape(*code.shape[:2], -1)
        code = code[..., : escape.shape[2]]
    limit = 2**bits - 1
    return np.where(code == limit, limit - 1 + escape, code)


def to_steps(values):
    return np.rint(values.clip(-127, 127)).astype(int)


@slow
@given(data=st.data(), seed=st.integers(0, 99), bits=st.sampled_from([4, 8]))
def test_a_rank_is_decoded_to_the_bits_of_the_formula(data, seed, bits):
    """Whatever was fitted, by the loop and by tensors, for any number of rows and layers."""
    width, num_layers = data.draw(st.integers(2, 41)), data.draw(st.integers(1, 4))
    num_rows = data.draw(st.sampled_from([1, 2, 3, 31, 32, 33, 70]))
    rank = data.draw(st.integers(0, width - 1))
    rng = np.random.default_rng(seed)
    given = {
        name: rng.integers(-128, 128, (num_layers, *shape)).astype(dtype)
        if dtype == np.int8
        else rng.normal(0, 0.02 if name in ("shrink", "gain") else 1, (num_layers, *shape)).astype(
            dtype
        )
        for name, (shape, dtype) in Predictive.fitted(width, rank).items()
    }
    codec = Predictive(num_layers, width, given, 3.5, bits, rank=rank)
    codes = {
        spec.name: rng.integers(0, 256, (num_rows, num_layers, spec.size)).astype(spec.dtype)
        for spec in codec.code_arrays
    }
    codes["scalar"][..., 1:4:2] = 0x3F
    codes["scalar"][..., 4] = rng.integers(130, 200, (num_rows, num_layers))
    layer = st.integers(0, num_layers - 1)
    wanted = data.draw(st.lists(layer, unique=True, min_size=1))
    expected = decode_as_documented(codec, codes)[:, wanted]
    assert torch.equal(decode(codec, codes, wanted), expected)
    assert torch.equal(decode_torch(codec, codes, wanted), expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("down", (2, 3, 16)), ("down", (2, 4, 15)), ("down", (1, 4, 16)), ("up", (2, 3, 16))),
        *(("up", (2, 4, 17)), ("shrink", (2, 8)), ("gain", (2, 15)), ("slope", (1, 16))),
        *(("bias", (2, 17)), ("rotation", (2, 16, 16)), ("rotation", (2, 3, 16))),
    ],
)
def test_fitted_arrays_that_a_loop_would_read_beyond_are_refused(name, shape):
    codec, _ = fit("predictive", make_hidden(20, 2, 16), 4.0, 4)
    codes, _ = encode(codec, make_hidden(3, 2, 16))
    decode(codec, codes, [1])
    given = codec._prediction._replace(**{name: np.zeros(shape, np.float32)})
    codec.__dict__["_prediction"] = given
    with pytest.raises(ValueError, match=r"expected"):
        decode(codec, codes, [1])


def test_sums_of_a_fit_are_exact_for_any_width():
    """127 times the sum of magnitudes is what a sum of products can be at most."""
    sample = make_hidden(1500, 2, 1100)
    sample[:, 1] = sample[:, 0] + sample[:, :1].mean(-1)  # all channels count alike
    given = Predictive.fit(sample, 2)
    for name, axis in (("down", 2), ("up", 1)):
        total = np.abs(given[name].astype(int)).sum(axis)
        assert 0 < total.max() * 127 < 2**24


def test_rank_saves_bits_where_channels_mix():
    mixing = torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    hidden = make_hidden(3000, 1, 48).repeat(1, 3, 1)
    for layer in (1, 2):
        noise = torch.randn(3000, 48, generator=torch.Generator().manual_seed(layer))
        push = hidden[:, layer - 1] @ mixing.T @ mixing.flip(1) / 30
        hidden[:, layer] = hidden[:, layer - 1] + push + 0.1 * noise
    bits = [fit("predictive", hidden, 4.0, rank)[1] for rank in (0, 1, 3)]
    assert bits[0] - 0.1 > bits[1]
    assert bits[1] - 0.1 > bits[2]


@pytest.mark.parametrize(("bits", "width"), [(8, 48), (4, 48), (4, 33), (8, 200)])
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_encoder_does_the_arithmetic_of_tensors(kind, rank, bits, width):
    """But for sums in another order, which may turn the last bit of what they give."""
    hidden = make_hidden(70, 3, width, seed=4, kind=kind)
    fitted, _ = fit("predictive", hidden, 4.0, rank)
    codec = Predictive(3, width, fitted.parameters, 4.0, bits, rank=rank)
    one = other = None
    for layer in range(3):
        one = codec.encode(layer, hidden[:, layer], one)
        other = codec.encode_tensors(layer, hidden[:, layer], other)
        assert {*one.codes} == {*other.codes}
        for name, array in one.codes.items():
            assert array.dtype == other.codes[name].dtype
            assert (array != other.codes[name]).float().mean() < 0.02
        torch.testing.assert_close(ln(one.hidden), ln(other.hidden), atol=0.3, rtol=0.02)
        expected = relative_errors(ln(hidden[:, layer]), ln(one.hidden) - ln(hidden[:, layer]))
        for found, wanted in zip(layer_errors(hidden[:, layer], one.hidden), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_threads_code_what_one_does():
    hidden = make_hidden(400, 2, 40)
    codec, _ = fit("delta", hidden, 4.0)
    before = torch.get_num_threads()
    try:
        found = []
        for num in (1, 3):
            torch.set_num_threads(num)
            found.append(encode(codec, hidden)[0])
    finally:
        torch.set_num_threads(before)
    for name, codes in found[0].items():
        np.testing.assert_array_equal(codes, found[1][name])


def test_a_code_is_never_clipped():
    """One channel a million times its RMS without it: the vector's step widens instead."""
    hidden = make_hidden(4, 2, 64)
    hidden[0, :, 3] = 3e8
    codec, _ = fit("delta", make_hidden(50, 2, 64), 8.0)
    codes, promised = encode(codec, hidden)
    assert codes["escape"].max() > 0
    torch.testing.assert_close(promised[0, :, 3].float(), hidden[0, :, 3], rtol=2**-7, atol=0)


def test_more_quality_is_less_error_and_more_bits():
    hidden = make_hidden(300, 4, 64)
    bits, errors = [], []
    for quality in (2.0, 4.0, 6.0, 8.0):
        codec, bits_per_value = fit("delta", hidden, quality)
        error = CodecError(range(4))
        _, promised = encode(codec, hidden)
        for layer in range(4):
            error.add(layer, hidden[:, layer], promised[:, layer])
        bits.append(bits_per_value)
        errors.append(error.to_dict()["mean"])
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)


def test_codes_of_four_bits_are_chosen_where_they_are_smaller():
    hidden = make_hidden(400, 1, 384).repeat(1, 8, 1)
    hidden += 0.5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    assert fit("delta", hidden, 2.0)[0].code_bits == 4
    assert fit("delta", hidden, 6.0)[0].code_bits == 8


def test_a_matrix_beats_a_slope_where_channels_mix():
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(5)) / 32**0.5
    hidden = make_hidden(3000, 1, 32).repeat(1, 4, 1)
    for layer in range(1, 4):
        noise = torch.randn(3000, 32, generator=torch.Generator().manual_seed(layer))
        hidden[:, layer] = hidden[:, layer - 1] @ mixing + 0.1 * noise
    assert fit("linear", hidden, 4.0)[1] < fit("delta", hidden, 4.0)[1] - 0.5


def test_scales_are_eight_an_octave():
    np.testing.assert_allclose(SCALES[8:] / SCALES[:-8], 2.0, rtol=1e-6)


def test_every_codec_is_in_the_table():
    assert {name for name, _ in NAMES} == {*CODECS}
    assert get_args(schemas.CodecName) == tuple(CODECS)


def test_the_ends_of_the_ranks_are_the_old_codecs():
    assert request_codec("predictive", 3.0, 0) == request_codec("delta", 3.0)
    assert request_codec("predictive", 3.0, "full") == request_codec("linear", 3.0)
    for width, rank in ((16, 15), (2048, schemas.DEFAULT_RANK)):
        assert settle_rank(request_codec("predictive"), width).rank == rank
    with pytest.raises(schemas.InputError, match="--rank 4 is for --codec predictive, not delta"):
        request_codec("delta", None, 4)
    with pytest.raises(schemas.InputError, match=r"--rank 16: .* 16 channels; expected --rank 0"):
        settle_rank(request_codec("predictive", None, 16), 16)


class TestCodecError:
    def test_the_error_is_that_of_the_layer_norm(self):
        hidden = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
        hidden[:, 5] *= 1000  # a massive activation hides the others
        coded = hidden.to(torch.bfloat16)
        error = CodecError([7])
        error.add(0, hidden[:32], coded[:32])
        error.add(0, hidden[32:], coded[32:])
        relative = (ln(coded) - ln(hidden)).norm(dim=-1) / ln(hidden).norm(dim=-1)
        found = error.to_dict()
        assert found["mean"] == pytest.approx(relative.mean().item(), rel=1e-4)
        assert found["max"] == pytest.approx(relative.max().item(), rel=1e-4)
        assert found["mean_without_top3"] > found["mean"]
        assert found["max_without_top3"] >= found["mean_without_top3"]
        assert error.by_layer() == {"7": pytest.approx(found["mean"])}

    def test_an_llm_that_runs_in_bfloat16_loses_nothing(self):
        hidden = torch.ones(4, 8, dtype=torch.bfloat16)
        error = CodecError([1])
        error.add(0, hidden, hidden.clone())
        assert set(error.to_dict().values()) == {0.0}
        assert error.counts.tolist() == [4]

    @pytest.mark.parametrize("width", [32, 33, 576])
    def test_rounding_makes_no_variance_where_there_is_none(self, width):
        hidden = torch.randn(64, 1, generator=torch.Generator().manual_seed(1)).repeat(1, width)
        error = CodecError([1])
        error.add(0, hidden, hidden.bfloat16())
        assert error.to_dict()["max"] == 0.0

    def test_a_vector_without_variance_counts_as_exact(self):
        error = CodecError([1])
        error.add(0, torch.full((2, 8), 3.0), torch.full((2, 8), 3.0, dtype=torch.bfloat16))
        assert error.to_dict()["max"] == 0.0


@slow
@given(
    shape=shapes,
    name=st.sampled_from(["delta", "linear", "predictive"]),
    kind=kinds,
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_exact_layers_lie_beside_codes_that_they_do_not_change(shape, name, kind, seed, data):
    num_layers = shape[1]
    layer = st.integers(0, num_layers - 1)
    exact = tuple(sorted(data.draw(st.lists(layer, unique=True))))
    wanted = data.draw(st.lists(layer, unique=True, min_size=1))
    hidden = make_hidden(*shape, seed=seed, kind=kind)
    sample = make_hidden(8, *shape[1:], seed=seed + 1)
    plain, _ = fit(name, sample, 4.0)
    codec = replace(plain, exact=exact)
    codes, promised = encode(codec, hidden)
    before, lossy = encode(plain, hidden)
    for array in before:
        np.testing.assert_array_equal(codes[array], before[array])
    assert ("exact" in codes) == bool(exact)
    for layer in range(num_layers):
        expected = hidden[:, layer].bfloat16() if layer in exact else lossy[:, layer]
        assert torch.equal(promised[:, layer], expected)
    depths = codec.depths(wanted)
    assert ({*depths} <= {"exact"}) == ({*wanted} <= {*exact})
    needed = {array: codes[array][:, :depth] for array, depth in depths.items()}
    for found in (decode(codec, needed, wanted), decode_torch(codec, needed, wanted)):
        for slot, layer in enumerate(wanted):
            if layer in exact:
                assert torch.equal(found[:, slot], promised[:, layer])
        tolerance = 1e-3 * float(promised.float().abs().max()) if name == "linear" else 0
        torch.testing.assert_close(
            found.float(), promised[:, wanted].float(), rtol=2**-7 if tolerance else 0,
            atol=tolerance,
        )  # fmt: skip
