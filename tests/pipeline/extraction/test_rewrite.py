import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.extraction.rewrite import rewrite
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.verify import verify
from semroute.schemas import InputError, Routing

torch = pytest.importorskip("torch")


@pytest.fixture
def arguments(feature_store, tmp_path):
    return {
        "features": feature_store,
        "out": tmp_path / "out",
        "shard_bytes": 100_000,
        "workers": 0,
        "report": [].append,
    }


def contents(store):
    files = [*store.glob("*.parquet"), *store.glob("hidden.zarr/**/*")]
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file()}


@pytest.mark.parametrize("codec", ["bf16", "lossless"])
def test_exact_codecs_change_no_bit(arguments, feature_store, codec):
    source, found = open_features(feature_store), rewrite(**arguments | {"codec": codec})
    np.testing.assert_array_equal(found.read(range(193)).bits, source.read(range(193)).bits)
    assert found.manifest.derived is not None
    assert found.manifest.derived.codec == source.manifest.codec
    assert found.manifest.derived.codec_error > 1e-4
    assert all(r.codec_error["mean"] == 0 for r in found.receipts().values())
    assert verify(found.path).problems == []


def test_shuffled_layers_are_the_same_ones_in_an_order_of_each_caption(arguments, feature_store):
    given = {"codec": "bf16", "shuffle_layers": 3}
    source, found = open_features(feature_store), rewrite(**arguments | given)
    assert found.manifest.identity.shuffled == 3
    orders = set()
    for caption in range(40):
        before, after = source.read([caption]).bits, found.read([caption]).bits
        order = [next(i for i in range(4) if (before[:, i] == after[:, j]).all()) for j in range(4)]
        assert sorted(order) == [0, 1, 2, 3]
        orders.add(tuple(order))
    assert len(orders) > 10
    # Shards and batches do not matter, and a store is continued as it was begun.
    larger = {"out": arguments["out"].with_name("b"), "shard_bytes": 400_000}
    other = rewrite(**arguments | given | larger)
    np.testing.assert_array_equal(other.read(range(193)).bits, found.read(range(193)).bits)
    with pytest.raises(InputError, match="shuffled: 4 instead of 3"):
        rewrite(**arguments | given | {"shuffle_layers": 4})
    with pytest.raises(InputError, match="in a store that holds them in order"):
        rewrite(**arguments | given | {"features": found.path, "out": found.path.with_name("c")})
    with pytest.raises(InputError, match="codec delta is fitted to what each layer is"):
        rewrite(**arguments | given | {"codec": "delta", "out": found.path.with_name("d")})
    with pytest.raises(InputError, match="layers in random order, a control"):
        PromptEncoder(found.manifest.identity, "nowhere")


@pytest.mark.parametrize("codec", ["delta", "linear"])
def test_what_is_lost_is_measured_and_lossy_stores_come_back(arguments, feature_store, codec):
    found = rewrite(**arguments | {"codec": codec, "quality": 5, "layers": "2,4"})
    assert found.layers == [2, 4]
    exact = open_features(feature_store).read(range(193), [2, 4]).tensor().float()
    norm = torch.nn.functional.layer_norm
    a, b = (norm(x, (32,)) for x in (exact, found.read(range(193)).tensor().float()))
    error = ((b - a).norm(dim=-1) / a.norm(dim=-1)).mean().item()
    promised = np.mean([r.codec_error["mean"] for r in found.receipts().values()])
    assert 0.8 < promised / error < 1.25
    back = rewrite(**arguments | {
        "features": found.path, "out": found.path.with_name("back"), "codec": "bf16"
    })  # fmt: skip
    if codec == "delta":
        np.testing.assert_array_equal(back.read(range(193)).bits, found.read(range(193)).bits)
    # A matrix product over another number of rows may be summed otherwise, on some processors.
    a, b = (store.read(range(193)).tensor().float() for store in (back, found))
    assert ((b - a).norm(dim=-1) / a.norm(dim=-1)).max() < 1e-3


def test_a_subset_of_captions_with_samples_of_its_own(arguments, feature_store, texts, tmp_path):
    chosen = [texts[5], texts[3], texts[5]]
    file = tmp_path / "some.parquet"
    pa.parquet.write_table(pa.table({"text": chosen}), file)
    found, source = rewrite(**arguments | {"captions": str(file)}), open_features(feature_store)
    assert len(found) == 3
    assert found.captions["text"].to_pylist()[0] == ""
    assert found.samples.num_rows == 3
    for text, (caption,) in zip(chosen, found.samples["caption_ids"].to_pylist(), strict=True):
        old = source.captions["text"].to_pylist().index(text)
        assert found[caption].text == text
        np.testing.assert_array_equal(found[caption].hidden, source[old].hidden)
    assert verify(found.path).problems == []


def routing(**changes):
    """Three blocks over the four layers, of two independent mixes."""
    weights = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.4, 0.15, 0.2, 0.25]])
    given = {"strategy": "depth", "step": 9, "source": "ema", "layers": [1, 2, 3, 4]}
    return Routing.model_validate(given | {"weights": weights.tolist()} | changes)


def read_by_blocks(store):
    """What the blocks of ``routing()`` read of every caption, from layers or mixes: [R, D, H]."""
    hidden = store.read(range(len(store))).tensor().float()
    if store.mixes is not None:
        return torch.tensor(store.mixes.coefficients) @ hidden
    return torch.tensor(routing().weights) @ torch.nn.functional.layer_norm(hidden, (32,), eps=1e-5)


def relative(found, expected):
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item()


def stated(store):
    receipts = store.receipts().values()
    weights = [r.num_rows for r in receipts]
    return np.average([r.codec_error["mean"] for r in receipts], weights=weights)


def test_a_rank_is_that_of_the_codec_and_stays(arguments):
    found = rewrite(**arguments | {"rank": 4})
    codec = found.manifest.codec
    assert (codec.name, codec.rank, codec.quality) == ("predictive", 4, 4)
    assert verify(found.path).problems == []
    before = contents(found.path)
    again = rewrite(features=found.path, out=found.path.with_name("again"), workers=0, report=str)
    assert again.manifest.codec.rank == 4
    rewrite(**arguments | {"rank": 4})
    assert contents(found.path) == before
    with pytest.raises(StoreError, match=r"codec\.rank: 5 instead of 4"):
        rewrite(**arguments | {"rank": 5})
    with pytest.raises(InputError, match=r"--rank 32: the hidden states have 32 channels"):
        rewrite(**arguments | {"rank": 32})
    ends = [
        rewrite(**arguments | {"rank": r, "out": found.path.with_name(str(r))}) for r in (0, "full")
    ]
    assert [end.manifest.codec.name for end in ends] == ["delta", "linear"]


class TestMixes:
    @pytest.mark.parametrize(
        ("codec", "quality", "most"),
        [("bf16", None, 3e-3), ("lossless", None, 3e-3), ("delta", 5, 3e-2), ("linear", 5, 3e-2)],
    )
    def test_under_every_codec_blocks_read_the_same_within_the_stated_error(
        self, arguments, feature_store, codec, quality, most
    ):
        found = rewrite(
            **arguments | {"routing": routing(), "rank": 2, "codec": codec, "quality": quality}
        )
        expected = read_by_blocks(open_features(feature_store))
        assert stated(found) == pytest.approx(relative(read_by_blocks(found), expected), rel=0.01)
        assert stated(found) < most
        assert found.mixes.error < 1e-6
        assert found.manifest.identity.llm_layers == [1, 2, 3, 4]
        assert verify(found.path).problems == []
        lengths = open_features(feature_store).captions["num_tokens"]
        assert found.captions["num_tokens"] == lengths

    def test_the_rank_costs_what_is_stated(self, arguments, feature_store):
        found = rewrite(**arguments | {"routing": routing(), "rank": 1})
        error = relative(read_by_blocks(found), read_by_blocks(open_features(feature_store)))
        assert error > 0.01
        assert stated(found) == pytest.approx(error, rel=0.01)
        assert found.mixes.errors[0] == pytest.approx(error, rel=0.2)  # there, on a sample
        assert found.mixes.tolerance is None

    def test_the_lowest_rank_under_a_percent_is_chosen_and_said(self, arguments):
        lines = []
        found = rewrite(**arguments | {"routing": routing(), "report": lines.append})
        assert found.mixes.num_mixes == 2
        assert found.layers == [1, 2]
        assert found.mixes.tolerance == 1e-2
        assert "2 mixes of 4 layers for 3 blocks, strategy depth; mean error" in lines[0]
        assert any("tokens x 2 mixes of 4 layers: " in line for line in lines)

    def test_layers_of_no_weight_are_not_read(self, arguments):
        few = rewrite(**arguments | {"layers": "2,3"})
        one = routing(strategy="penultimate", layers=[3], weights=[[1.0]])
        found = rewrite(**arguments | {
            "features": few.path, "out": few.path.with_name("one"), "routing": one
        })  # fmt: skip
        expected = torch.nn.functional.layer_norm(
            few.read(range(193), [3]).tensor().float(), (32,), eps=1e-5
        )
        read = torch.tensor(found.mixes.coefficients) @ found.read(range(193)).tensor().float()
        assert relative(read, expected) < 3e-3
        assert found.manifest.identity.final_norm == "absent"

    def test_mixes_are_rewritten_as_layers_are(self, arguments, feature_store, tmp_path, texts):
        file = tmp_path / "some.parquet"
        pa.parquet.write_table(pa.table({"text": texts[:20]}), file)
        first = rewrite(**arguments | {"routing": routing()})
        again = rewrite(**arguments | {
            "features": first.path, "out": tmp_path / "again", "codec": "delta",
            "captions": str(file),
        })  # fmt: skip
        assert again.mixes == first.mixes
        assert len(again) == 21
        ids = [
            first.captions["text"].to_pylist().index(t) for t in again.captions["text"].to_pylist()
        ]
        expected = torch.tensor(first.mixes.coefficients) @ first.read(ids).tensor().float()
        assert stated(again) == pytest.approx(relative(read_by_blocks(again), expected), rel=0.01)
        assert again.manifest.derived.codec_error == pytest.approx(stated(first))
        assert verify(again.path).problems == []

    def test_a_killed_rewriting_is_continued_to_the_same_bytes(self, arguments, tmp_path):
        wanted = arguments | {"routing": routing(), "shard_bytes": 10_000, "codec": "delta"}
        whole = rewrite(**wanted)
        assert whole.manifest.layout.num_shards > 4
        part = tmp_path / "part"
        shutil.copytree(whole.path, part)
        store = open_features(part)
        store.reopen([1, 3])
        for file in store.remaining():
            shutil.rmtree(part / f"hidden.zarr/code/c/{file}")
        lines = []
        done = rewrite(**wanted | {"out": part, "report": lines.append})
        assert any("to do: 2" in line for line in lines)
        assert contents(part) == contents(whole.path)
        assert done.is_complete

    @pytest.mark.parametrize("change", [{"rank": 1}, {"rank": 2}, {"routing": routing(step=10)}])
    def test_another_request_for_the_same_folder_is_refused(self, arguments, change):
        rewrite(**arguments | {"routing": routing()})
        with pytest.raises(StoreError, match=r"identity\.mixes\.(tolerance|step)"):
            rewrite(**arguments | {"routing": routing()} | change)

    def test_chosen_layers_are_refused(self, arguments):
        with pytest.raises(
            InputError, match="--layers 1,2: the layers that are mixed are those of"
        ):
            rewrite(**arguments | {"routing": routing(), "layers": "1,2"})

    @pytest.mark.parametrize("rank", [0, "full"])
    def test_a_rank_of_mixes_is_a_number(self, arguments, rank):
        with pytest.raises(InputError, match=f"--rank {rank} with --routing is the number of mix"):
            rewrite(**arguments | {"rank": rank, "routing": routing()})

    def test_more_than_there_are_is_refused(self, arguments):
        with pytest.raises(InputError, match=r"--rank 3: .* 2 independent mixes; expected 1 to 2"):
            rewrite(**arguments | {"routing": routing(), "rank": 3})
        assert not arguments["out"].exists()

    def test_layers_that_are_not_there_are_refused(self, arguments):
        few = rewrite(**arguments | {"layers": "2,3"})
        with pytest.raises(InputError, match=r"does not hold layers \[1, 4\], which the run reads"):
            rewrite(**arguments | {
                "features": few.path, "out": few.path / "x", "routing": routing()
            })  # fmt: skip

    @pytest.mark.parametrize("change", [{"routing": routing()}, {"layers": "1"}])
    def test_mixes_are_not_mixed_again(self, arguments, change):
        found = rewrite(**arguments | {"routing": routing()})
        with pytest.raises(InputError, match=r"holds mixes of layers \[1, 2, 3, 4\], which cannot"):
            rewrite(**arguments | {"features": found.path, "out": found.path / "x"} | change)


class TestRefused:
    def test_captions_that_are_not_there(self, arguments, tmp_path):
        file = tmp_path / "other.txt"
        file.write_text("a red cup\na purple elephant\n")
        with pytest.raises(InputError, match=r"1 captions are not in .*a purple elephant"):
            rewrite(**arguments | {"captions": str(file)})
        assert not arguments["out"].exists()

    def test_layers_that_are_not_there(self, arguments):
        few = rewrite(**arguments | {"layers": "1,3"})
        with pytest.raises(InputError, match=r"does not hold \[2\]; it has \[1, 3\]"):
            rewrite(**arguments | {"features": few.path, "out": few.path / "x", "layers": "2,3"})

    def test_itself(self, arguments, feature_store):
        with pytest.raises(InputError, match="is the store itself"):
            rewrite(**arguments | {"out": feature_store})

    def test_another_request_for_the_same_folder(self, arguments):
        rewrite(**arguments | {"codec": "delta"})
        with pytest.raises(StoreError, match=r"codec\.quality"):
            rewrite(**arguments | {"codec": "delta", "quality": 3})


def test_a_damaged_source_is_quarantined_and_never_copied(arguments, feature_store, tmp_path):
    damaged = shutil.copytree(feature_store, tmp_path / "damaged")
    file = damaged / "hidden.zarr/hidden/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="chunk 0 at byte"):
        rewrite(**arguments | {"features": damaged})
    out = open_features(arguments["out"], complete=False)
    assert out.remaining()
    assert set(out.quarantined()) == set(out.remaining())


@pytest.mark.slow
def test_a_killed_rewriting_is_continued_to_the_same_bytes(
    arguments, feature_store, tmp_path, start_command
):
    whole = rewrite(**arguments | {"codec": "delta", "shard_bytes": 25_000})
    killed = tmp_path / "killed"
    command = ["rewrite", feature_store, killed, "--codec", "delta"]
    command += ["--shard-size", 25_000, "--workers", 0]
    process = start_command(*command)
    process.wait_until(lambda: len(list(killed.glob("receipts/shard-*.json"))) >= 2)
    process.kill()
    assert open_features(killed, complete=False).remaining()
    done = start_command(*command)
    assert done.wait() == 0, done.output.read_text()
    assert contents(killed) == contents(whole.path)
