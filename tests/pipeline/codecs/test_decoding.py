"""Reading coded stores without torch, against the formulas of docs/store-format.md in numpy."""

import shutil
from typing import get_args

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semroute.pipeline.codecs.predictive import SCALES
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.shard_file import CorruptShardError
from semroute.schemas import CodecName, InputError

NAMES = get_args(CodecName)
QUALITY = 3.0
"""Of random stores."""
everything = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def unpack(code, escape):
    """Zigzag codes of a byte, or two a byte, with their escapes -> signed integers."""
    code, escape = code.astype(np.int64), escape.astype(np.int64)
    if code.shape == escape.shape:
        zigzag = np.where(code == 255, 254 + escape, code)
    else:
        zigzag = np.stack([code & 15, code >> 4], -1).reshape(*code.shape[:-1], -1)
        zigzag = zigzag[..., : escape.shape[-1]]
        zigzag = np.where(zigzag == 15, 14 + escape, zigzag)
    return zigzag


def signed(zigzag):
    return (zigzag >> 1) ^ -(zigzag & 1)


def to_steps(values):
    return np.rint(values).clip(-127, 127)


def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode_as_documented(group, rows):
    """Whole arrays read by zarr-python -> float32 [rows, L, H]."""
    codes = {name: array[rows] for name, array in group.arrays() if name != "layer"}
    if "hidden" in codes:
        return widen(codes["hidden"])
    fitted = {name: array[...] for name, array in group["parameters"].arrays()}
    out = []
    if "mantissa" in codes:
        # Code and escape are a byte together: arithmetic is modulo 256.
        residual = signed(unpack(codes["code"], codes["escape"]) & 255)
        distance = residual[:, 0]
        for layer in range(residual.shape[1]):
            if layer:
                distance = residual[:, layer] + fitted["follow"][layer][distance & 255]
            exponent = (distance + fitted["base"][layer]) & 255
            rest = codes["mantissa"][:, layer].astype(np.int64)
            out.append(widen((rest & 128) << 8 | exponent << 7 | rest & 127))
        return np.stack(out, 1)
    scalar = codes["scalar"]
    mean, deviation = (widen(scalar[..., i : i + 2].copy().view("<u2")) for i in (0, 2))
    residual = signed(unpack(codes["code"], codes["escape"])) * SCALES[scalar[..., 4]][..., None]
    state = np.zeros(scalar.shape[::2][:1] + fitted["bias"].shape[1:])
    unit = SCALES[scalar[..., 4]] * 2.0**QUALITY / 16
    for layer in range(scalar.shape[1]):
        if "slope" in fitted:
            below, turned = state * fitted["slope"][layer], residual[:, layer]
            if layer and "down" in fitted:
                down, up = (fitted[name][layer].astype(float) for name in ("down", "up"))
                size = unit[:, layer - 1, None]
                axes = to_steps(to_steps(state / size) @ down.T * fitted["shrink"][layer])
                below = below + axes @ up * fitted["gain"][layer] * size
        else:
            below = state @ widen(fitted["matrix"][layer])
            turned = residual[:, layer] @ widen(fitted["rotation"][layer])
        state = (below if layer else 0) + fitted["bias"][layer] + turned
        out.append(state * deviation[:, layer] + mean[:, layer])
    return np.stack(out, 1)


@pytest.fixture
def memory_url():
    """Put a folder where fsspec finds it, away from the disk: folder -> URL."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")

    def put(folder):
        for file in folder.rglob("*"):
            if file.is_file():
                memory.pipe(f"/{folder.name}/{file.relative_to(folder)}", file.read_bytes())
        return f"memory://{folder.name}"

    yield put
    memory.store.clear()


@pytest.mark.parametrize("name", NAMES)
class TestEveryCodec:
    def test_values_are_those_of_the_documented_formula(self, name, random_store):
        store = open_features(random_store(name))
        group = zarr.open_group(store.path / "hidden.zarr", mode="r")
        caption = store.captions.slice(5, 1).to_pylist()[0]
        expected = decode_as_documented(group, slice(caption["row_start"], caption["row_stop"]))
        found = store.read([5]).numpy()
        if name in ("bf16", "lossless"):
            np.testing.assert_array_equal(found, expected)
        else:
            size = np.abs(expected).max(-1, keepdims=True)
            assert (np.abs(found - expected) <= 2**-8 * size).all()

    @everything
    @given(data=st.data())
    def test_any_captions_and_layers_by_any_path(self, name, random_store, data):
        store, slow = (open_features(random_store(name)) for _ in range(2))
        slow.direct = False
        ids = data.draw(st.lists(st.integers(0, len(store) - 1), max_size=30))
        layers = data.draw(
            st.none() | st.lists(st.sampled_from(store.layers), min_size=1, unique=True)
        )
        store.num_threads = data.draw(st.integers(1, 4))
        slow.num_threads = 1
        rows = store.read(ids, layers)
        single = [np.zeros((0, 4, 32), np.uint16), *(store.read([i]).bits for i in ids)]
        wanted = [store.layers.index(layer) for layer in layers or store.layers]
        if name == "linear":  # a matrix product rounds by the number of its rows
            expected = widen(np.concatenate(single)[:, wanted])
            np.testing.assert_allclose(rows.numpy(), expected, rtol=2**-6, atol=1e-2)
        else:
            np.testing.assert_array_equal(rows.bits, np.concatenate(single)[:, wanted])
        np.testing.assert_array_equal(rows.bits, slow.read(ids, layers).bits)
        assert (
            rows.offsets.tolist() == np.cumsum([0, *(len(store[i].tokens) for i in ids)]).tolist()
        )

    def test_a_buffer_is_filled_and_nothing_behind_it(self, name, random_store):
        store = open_features(random_store(name))
        expected = store.read([7, 3]).bits
        out = np.full((len(expected) + 5, *expected.shape[1:]), 77, np.uint16)
        rows = store.read([7, 3], out=out)
        assert rows.bits.base is out
        np.testing.assert_array_equal(out[: len(expected)], expected)
        assert (out[len(expected) :] == 77).all()

    def test_other_zarr_libraries_open_every_array(self, name, random_store):
        tensorstore = pytest.importorskip("tensorstore")
        xarray = pytest.importorskip("xarray")
        path = random_store(name) / "hidden.zarr"
        store = open_features(path.parent)
        data = xarray.open_zarr(path, consolidated=False)
        for key, array in store.arrays.items():
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / key)}}
            expected = array.array[:40]
            np.testing.assert_array_equal(
                tensorstore.open(spec, read=True).result()[:40].read().result(), expected
            )
            np.testing.assert_array_equal(data[key][:40].values, expected)
            assert data[key].dims[:2] == ("row", "layer")

    def test_a_store_behind_a_url_reads_the_same(self, name, random_store, memory_url):
        path = random_store(name)
        expected, found = open_features(path), open_features(memory_url(path))
        assert not any(array.is_local for array in found.arrays.values())
        ids = [5, 3, 4, 100]
        np.testing.assert_array_equal(found.read(ids, [3]).bits, expected.read(ids, [3]).bits)
        assert found[7].text == expected[7].text
        assert found.num_bytes() == expected.num_bytes()
        assert "complete" in repr(found)

    def test_a_flipped_bit_is_an_error_and_never_wrong_numbers(self, name, random_store, tmp_path):
        path = tmp_path / "store"
        shutil.copytree(random_store(name), path)
        for array in open_features(path).arrays:
            file = path / "hidden.zarr" / array / "c" / "0" / "0" / "0"
            whole = file.read_bytes()
            for place in (3, len(whole) // 2, len(whole) - 9):
                flipped = bytearray(whole)
                flipped[place] ^= 4
                file.write_bytes(flipped)
                store = open_features(path)
                store.num_threads = 2
                first_shard = np.flatnonzero(store.captions["shard"].to_numpy() == 0)
                with pytest.raises(CorruptShardError):
                    store.read(first_shard)
            file.write_bytes(whole)
        open_features(path).read(first_shard)


@pytest.mark.parametrize("name", NAMES[1:])
def test_other_parameters_are_refused(name, random_store, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(random_store(name), path)
    group = zarr.open_group(path / "hidden.zarr" / "parameters", mode="r+")
    array = next(array for _, array in group.arrays())
    array[0] = array[0] + 1
    with pytest.raises(StoreError, match=r"(?i)put it back from a copy"):
        open_features(path).read([1])


def test_an_unknown_kind_of_url_is_said():
    with pytest.raises(InputError, match="nowhere"):
        open_features("nowhere://features")
