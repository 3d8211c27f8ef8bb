import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.store.documents import StoreError  # noqa: E402
from semroute.pipeline.store.open import open_features  # noqa: E402
from semroute.pipeline.store.verify import verify  # noqa: E402
from semroute.schemas import InputError  # noqa: E402


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def make(tiny_llm, tmp_path):
    """Extract a list of texts into a folder; returns the store."""

    def run(texts, name="features", **options):
        file = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pa.table({"text": texts}), file)
        arguments = {"model": str(tiny_llm), "codec": "bf16", "shard_bytes": 25_000}
        arguments |= {"workers": 0, "threads": 1, "report": [].append} | options
        return extract(str(file), tmp_path / name, **arguments)

    return run


def shards(path: Path) -> dict[str, bytes]:
    files = [*path.glob("hidden.zarr/*/c/*/0/0"), *path.glob("receipts/*")]
    files += path.glob("hidden.zarr/parameters/**/*")
    return {str(f.relative_to(path)): f.read_bytes() for f in files if f.is_file()}


def contents(path: Path) -> dict[str, bytes]:
    """All that does not hold a time."""
    files = [*path.glob("*.parquet"), *path.glob("hidden.zarr/**/*")]
    return {str(f.relative_to(path)): f.read_bytes() for f in files if f.is_file()}


def state_of(path: Path) -> str:
    """What a reader finds: the whole old store, or an error that says what to do."""
    try:
        store = open_features(path)
    except StoreError as error:
        found = re.search(r"was growing when|is not finished.*Rerun the command that", str(error))
        return found[0][:13]
    assert len(store) == 41
    assert len(store.read(range(41)).bits) == store.manifest.layout.num_rows
    return "old"


def by_text(store) -> dict[str, np.ndarray]:
    texts = store.captions["text"].to_pylist()
    rows = store.read(range(len(store)))
    cuts = rows.offsets
    hidden = torch.nn.functional.layer_norm(rows.tensor().float(), (32,)).numpy()
    return {text: hidden[cuts[i] : cuts[i + 1]] for i, text in enumerate(texts)}


class TestGrowing:
    @pytest.mark.slow
    @settings(
        max_examples=6,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        cuts=st.tuples(st.integers(1, 58), st.integers(1, 58)).map(sorted),
        codec=st.sampled_from(["bf16", "lossless", "delta", "linear", "predictive"]),
    )
    def test_growing_twice_gives_what_a_store_made_at_once_gives(
        self, make, texts, tmp_path, cuts, codec
    ):
        rows = [texts[i * 7 % 50] for i in range(60)]  # the last ten are there already
        for name in ("grown", "whole"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        stops = sorted({*cuts, 60})
        before: dict[str, bytes] = {}
        first = [max(rows, key=len), *rows]  # so that each caption fits into a shard
        for stop in stops:
            store = make(first[: stop + 1], "grown", codec=codec)
            after = shards(store.path)
            assert {name: after[name] for name in before} == before
            before = after
            assert verify(store.path).problems == []
            assert verify(store.path).warnings == []
        assert [g.samples.num_samples for g in store.manifest.grown_from] == [
            stop + 1 for stop in stops[:-1]
        ]
        whole = make(first, "whole", codec=codec)
        found, expected = by_text(store), by_text(whole)
        assert found.keys() == expected.keys()
        for text, hidden in expected.items():
            error = np.linalg.norm(found[text] - hidden, axis=-1)
            error /= np.linalg.norm(hidden, axis=-1)
            # Both are off by the codec's own error.
            assert error.max() < (0.02 if codec in ("bf16", "lossless") else 0.12), codec
        now, then = store.samples["caption_ids"].to_pylist(), whole.samples
        assert [store.captions["text"][row[0]].as_py() for row in now] == first
        assert len(now) == then.num_rows

    def test_it_reports_and_the_same_command_then_has_nothing_to_do(self, make, texts):
        lines: list[str] = []
        make(texts[:100])
        make(texts, report=lines.append)
        assert "grows: 100 new samples and 92 captions in" in "\n".join(lines)
        grown = make(texts, report=lines.append)
        assert lines[-1].endswith("nothing was left to do")
        ((generation),) = grown.manifest.grown_from
        assert generation.samples.num_samples == 100
        assert generation.captions.num_captions == 101
        assert grown.manifest.identity.samples.num_samples == 200

    def test_rows_without_new_captions_add_no_shard(self, make, texts):
        first = make(texts[:192])
        grown = make(texts)
        assert grown.manifest.layout == first.manifest.layout
        assert grown.samples.num_rows == 200
        assert grown.is_complete
        assert verify(grown.path).problems == []

    @pytest.mark.slow
    def test_workers_and_an_unfinished_store_make_no_difference(self, make, texts, fork_server):
        make(texts[:100])
        whole = make(texts)
        begun = make(texts[:100], "begun")
        (begun.path / "receipts" / "shard-000001.json").unlink()
        manifest = json.loads((begun.path / "manifest.json").read_text())
        (begun.path / "manifest.json").write_text(
            json.dumps(manifest | {"status": "extracting"}, indent=1) + "\n"
        )
        grown = make(texts, "begun", workers=1)
        assert contents(grown.path) == contents(whole.path)

    def test_any_moment_is_a_good_one_to_be_killed(self, make, texts, tmp_path, monkeypatch):
        """Every rename is one after which a process may die."""
        small = make(texts[:40], "small")
        shutil.copytree(small.path, tmp_path / "reference")
        reference = contents(make(texts[:60], "reference").path)
        rename = Path.replace
        states = set()
        for last in range(12):
            name = f"killed-{last}"
            shutil.copytree(small.path, tmp_path / name)
            left = iter(range(last))

            def die(path, target, left=left):
                if next(left, None) is None:
                    raise Killed
                return rename(path, target)

            monkeypatch.setattr(Path, "replace", die)
            with pytest.raises(Killed):
                make(texts[:60], name)
            monkeypatch.setattr(Path, "replace", rename)
            states.add(state_of(tmp_path / name))
            grown = make(texts[:60], name)
            assert contents(grown.path) == reference
            assert verify(grown.path).problems == verify(grown.path).warnings == []
        assert states == {"old", "was growing w", "is not finish"}

    def test_an_undecided_growth_leaves_the_smaller_command_as_it_was(
        self, make, texts, tmp_path, monkeypatch
    ):
        small = make(texts[:40])
        before = contents(small.path)

        def die(path, target):
            raise Killed

        rename = Path.replace
        monkeypatch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            make(texts[:60])
        monkeypatch.setattr(Path, "replace", rename)
        make(texts[:40])
        assert contents(small.path) == before
        assert not (small.path / "growing").exists()

    def test_verify_names_a_growth_that_was_stopped(self, make, texts, tmp_path):
        store = make(texts[:40])
        (store.path / "growing").mkdir()
        shutil.copy(store.path / "manifest.json", store.path / "growing" / "manifest.json")
        with pytest.raises(StoreError, match="was growing when it was stopped"):
            verify(store.path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "row"),
        [
            (lambda rows: [*rows[:7], "another", *rows[8:], "new"], 7),
            (lambda rows: [*rows[:3], *rows[4:], "new", "newer"], 3),
            (lambda rows: [rows[0], rows[2], rows[1], *rows[3:], "new"], 1),
            (lambda rows: [*rows[:-1], "another"], 39),
        ],
        ids=["changed", "removed", "reordered", "as many"],
    )
    def test_rows_that_are_not_as_they_were(self, make, texts, change, row):
        before = contents(make(texts[:40]).path)
        with pytest.raises(StoreError, match=rf"row {row}, counted from 0, is '.*made from '") as e:
            make(change(texts[:40]))
        assert repr(texts[row]) in str(e.value)
        store = make(texts[:40])
        assert contents(store.path) == before

    def test_a_file_that_ends_before_the_store(self, make, texts):
        make(texts[:40])
        make(texts[:60])
        for num in (39, 40, 59):
            with pytest.raises(
                StoreError, match=rf"{num} rows were asked for, but .* holds 60 samples"
            ):
                make(texts[:num])

    @pytest.mark.parametrize(
        ("change", "key"),
        [
            ({"layers": "1,2"}, "identity.layers"),
            ({"codec": "delta"}, "codec.name: 'delta' instead of 'bf16'"),
            ({"seed": 3}, "identity.captions.seed: 3 instead of 0"),
            ({"shard_bytes": 50_000}, "layout.rows_per_shard"),
        ],
    )
    def test_growing_with_anything_else_changed(self, make, texts, change, key):
        before = contents(make(texts[:40]).path)
        with pytest.raises(StoreError, match="was made differently") as error:
            make(texts[:60], **change)
        assert key in str(error.value)
        assert "num_samples" not in str(error.value)
        assert contents(make(texts[:40]).path) == before

    def test_a_caption_longer_than_a_shard(self, make, texts):
        make(["a cup", "a tree"])
        with pytest.raises(InputError, match="an entry of 60 rows does not fit into a shard"):
            make(["a cup", "a tree", "a" * 60])

    def test_a_run_of_the_smaller_store(self, make, configure, samples_file, texts, tmp_path):
        from semroute.pipeline.extraction.latents import encode_images
        from semroute.trainer.training.train import train

        latents = {"workers": 0, "report": [].append}
        encode_images(str(samples_file), tmp_path / "latents-100", limit=100, **latents)
        encode_images(str(samples_file), tmp_path / "latents-200", **latents)
        config = {"features": str(tmp_path / "features"), "model": {"patch_size": 6}}
        first, second = (str(tmp_path / f"latents-{num}") for num in (100, 200))
        make(texts[:100])
        train(configure(tmp_path / "run", latents=first, steps=1, **config))
        make(texts)
        again = configure(tmp_path / "run", latents=second, steps=2, **config)
        with pytest.raises(InputError, match=r"features\.captions\.num_captions: 193 instead of"):
            train(again)
