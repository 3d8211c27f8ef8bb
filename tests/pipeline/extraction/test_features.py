import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import semroute
from semroute.pipeline.extraction.driver import ExtractionError
from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.latents import encode_images
from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import Encoder
from semroute.pipeline.store.documents import StoreError
from semroute.schemas import InputError

SHARD_BYTES = 25_000  # about 50 shards for the 192 captions


@pytest.fixture
def arguments(samples_file, tiny_llm, tmp_path):
    """What every extraction here has in common, to be changed one by one."""
    return {
        "source": str(samples_file),
        "features": tmp_path / "features",
        "model": str(tiny_llm),
        "codec": "bf16",
        "shard_bytes": SHARD_BYTES,
        "workers": 0,
        "threads": 1,
        "report": [].append,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, samples_file, tiny_llm):
    path = tmp_path_factory.mktemp("undisturbed") / "features"
    extract(
        str(samples_file),
        path,
        model=str(tiny_llm),
        codec="bf16",
        shard_bytes=SHARD_BYTES,
        workers=0,
        threads=1,
        report=[].append,
    )
    return path


@pytest.fixture
def extracted(arguments, undisturbed):
    """The arguments of an extraction that is complete."""
    shutil.copytree(undisturbed, arguments["features"])
    return arguments


def contents(store: Path) -> dict[str, bytes]:
    """Every byte that must be the same however often a run was killed."""
    files = [*store.glob("*.parquet"), *store.glob("hidden.zarr/**/*")]
    found = {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file()}
    assert len(found) > 10
    return found


def command(samples_file, tiny_llm, features, *options, workers=2):
    words = ["extract", samples_file, features, "--model", tiny_llm, "--shard-size", SHARD_BYTES]
    words += ["--codec", "bf16", "--workers", workers, "--threads", 1, *options]
    return [str(word) for word in words]


def num_receipts(features):
    return len(list((features / "receipts").glob("shard-*.json")))


class TestStored:
    def test_it_is_what_transformers_gives_for_the_caption_alone(self, undisturbed, tiny_llm):
        store = semroute.open_features(undisturbed)
        encoder = Encoder(find_model(str(tiny_llm)), store.layers, "float32", "cpu")
        for caption in store:
            prefix = [] if caption.caption_id == 0 else [0]
            online: list[torch.Tensor] = []
            sequence = np.array([*prefix, *caption.tokens], np.int32)
            encoder.encode([sequence], [len(prefix)], lambda _, rows, o=online: o.append(rows))
            expected = torch.stack(online, 1)
            torch.testing.assert_close(
                torch.from_numpy(caption.hidden), expected, rtol=2**-7, atol=1e-4
            )

    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [0, 1])
    def test_progress_moves_within_a_shard_and_ends_at_all(
        self, arguments, workers, capfd, monkeypatch, fork_server
    ):
        monkeypatch.setattr("semroute.pipeline.executor.progress.JSON_SECONDS", 0)
        options = {"workers": workers, "shard_bytes": 10**7, "batch_tokens": 64, "progress": "json"}
        extract(**arguments | options)
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        shown = [line["captions"] for line in lines]
        assert shown[0] == 0
        assert shown == sorted(shown)
        assert any(0 < num < 193 for num in shown)
        assert lines[-1]["captions"] == lines[-1]["captions_total"] == 193
        assert lines[-1]["rows"] == lines[-1]["rows_total"]
        assert lines[-1]["shards"] == lines[-1]["shards_total"] == 1
        assert lines[-1]["workers"] == workers

    def test_receipts_say_what_the_codec_lost(self, undisturbed):
        receipts = semroute.open_features(undisturbed).receipts().values()
        for receipt in receipts:
            assert 1e-4 < receipt.codec_error["mean"] < receipt.codec_error["max"] < 2**-7
            assert receipt.warnings == []
        assert sum(receipt.num_entries for receipt in receipts) == 193

    def test_chosen_layers_equal_those_of_a_full_store(self, arguments, undisturbed):
        some = extract(**arguments | {"layers": "3,1"})
        every = semroute.open_features(undisturbed)
        assert some.layers == [1, 3]
        assert some.manifest.identity.final_norm == "absent"
        # Other shards mean other batches, and so other rounding.
        found, expected = some.read(range(193)), every.read(range(193), layers=[1, 3])
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=2**-7, atol=1e-6)

    def test_long_captions_are_cut_counted_and_listed(self, arguments):
        lines: list[str] = []
        store = extract(**arguments | {"max_length": 20, "report": lines.append})
        cut = store.captions.filter(pa.compute.field("num_cut_tokens") > 0)
        assert 0 < cut.num_rows < 193
        assert all(row["num_tokens"] == 19 for row in cut.to_pylist())
        assert any(f"{cut.num_rows} captions are longer than 20 tokens" in line for line in lines)
        assert any(line.startswith("  -") and "seen from very far above" in line for line in lines)


class TestCodecs:
    @pytest.mark.parametrize(
        ("codec", "quality", "largest"),
        [
            ("lossless", None, 0),
            ("delta", 4, 0.025),
            ("predictive", 6, 0.012),
            ("linear", 4, 0.025),
        ],
    )
    def test_a_reader_gets_what_the_receipts_promise(
        self, arguments, undisturbed, codec, quality, largest
    ):
        store = extract(**arguments | {"codec": codec, "quality": quality})
        exact = semroute.open_features(undisturbed).read(range(193))
        found = store.read(range(193))
        assert store.num_bytes() < semroute.open_features(undisturbed).num_bytes()
        norm = torch.nn.functional.layer_norm
        a, b = (norm(rows.tensor().float(), (32,)) for rows in (exact, found))
        error = (b - a).norm(dim=-1) / a.norm(dim=-1)
        promised = [receipt.codec_error["mean"] for receipt in store.receipts().values()]
        if codec == "lossless":
            # Batches are those of larger shards, which changes a last bit here and there.
            assert (exact.bits != found.bits).mean() < 1e-2
            assert max(promised) < 2**-8
            return
        assert float(error.mean()) < largest
        assert 0.8 < np.mean(promised) / float(error.mean()) < 1.25
        for receipt in store.receipts().values():
            assert list(receipt.layer_error) == ["1", "2", "3", "4"]

    def test_a_killed_driver_is_continued_to_the_same_bytes(
        self, arguments, samples_file, tiny_llm, tmp_path, start_command
    ):
        lines: list[str] = []
        how = arguments | {"codec": "delta", "report": lines.append}
        whole = extract(**how | {"features": tmp_path / "whole"})
        assert any("fitted" in line for line in lines)
        features = tmp_path / "killed"
        options = ("--codec", "delta")
        process = start_command(*command(samples_file, tiny_llm, features, *options, workers=0))
        process.wait_until(lambda: num_receipts(features) >= 2)
        process.kill()
        lines.clear()
        extract(**how | {"features": features})
        assert not any("fitted" in line for line in lines)  # what was fitted is part of the store
        assert contents(features) == contents(whole.path)

    def test_another_codec_or_quality_is_refused(self, arguments):
        extract(**arguments | {"codec": "delta"})
        for change in ({"codec": "linear"}, {"codec": "delta", "quality": 3}, {}):
            with pytest.raises(StoreError, match=r"codec\.(name|quality)"):
                extract(**arguments | change)

    def test_a_quality_that_means_nothing_is_refused(self, arguments):
        with pytest.raises(InputError, match="--codec lossless has no step"):
            extract(**arguments | {"codec": "lossless", "quality": 4})
        with pytest.raises(InputError, match=r"expected 2 \(coarse\) to 8"):
            extract(**arguments | {"codec": "delta", "quality": 9})
        assert not arguments["features"].exists()

    def test_a_sample_that_is_not_finite_names_caption_and_layer(
        self, arguments, tiny_llm, tmp_path
    ):
        from safetensors.torch import load_file, save_file

        broken = shutil.copytree(tiny_llm, tmp_path / "broken")
        weights = load_file(broken / "model.safetensors")
        weights["layers.2.mlp.down_proj.weight"][:] = torch.inf
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"layer 3 are not finite for the caption '"):
            extract(**arguments | {"model": str(broken), "codec": "delta"})
        assert not arguments["features"].exists()


class TestContinuing:
    @pytest.mark.slow
    def test_a_killed_driver_is_continued_to_the_same_bytes(
        self, arguments, samples_file, tiny_llm, undisturbed, start_command
    ):
        features = arguments["features"]
        for num, workers in ((1, 2), (15, 0)):
            process = start_command(*command(samples_file, tiny_llm, features, workers=workers))
            process.wait_until(lambda num=num: num_receipts(features) >= num)
            process.kill()
            with pytest.raises(StoreError, match="is not finished"):
                semroute.open_features(features)
        receipts = (features / "receipts").glob("*.json")  # one may be half written, as .tmp
        written = {p.name: p.stat().st_mtime_ns for p in receipts}
        left = [*features.glob("hidden.zarr/**/*.partial")]
        left.append(features / "hidden.zarr/hidden/c/0/0/0.6e0f.partial")
        left[-1].write_bytes(b"half a shard")
        lines: list[str] = []
        extract(**arguments | {"report": lines.append})
        said = f"{len(left)} files that were being written when their writer was killed"
        assert any(said in line for line in lines)
        assert contents(features) == contents(undisturbed)
        after = {p.name: p.stat().st_mtime_ns for p in (features / "receipts").iterdir()}
        assert {name: after[name] for name in written} == written  # nothing was done twice

    @pytest.mark.slow
    def test_a_killed_worker_costs_nothing(self, arguments, undisturbed, fork_server):
        features = arguments["features"]
        killed: set[int] = set()

        def kill():
            while not killed:
                for path in (features / "receipts").glob("shard-*.json"):
                    killed.add(int(json.loads(path.read_text())["worker"].rpartition(":")[2]))
                time.sleep(0.005)
            for pid in killed:
                psutil.Process(pid).kill()

        with ThreadPoolExecutor(1) as other:
            done = other.submit(kill)
            extract(**arguments | {"workers": 2})
            done.result()
        assert os.getpid() not in killed
        assert contents(features) == contents(undisturbed)

    @pytest.mark.slow
    def test_ctrl_c_drains_and_the_same_command_continues(
        self, arguments, samples_file, tiny_llm, undisturbed, start_command
    ):
        features = arguments["features"]
        process = start_command(*command(samples_file, tiny_llm, features))
        process.wait_until(lambda: num_receipts(features) >= 1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130, process.output.read_text()
        output = process.output.read_text()
        assert "shards remain; rerun the same command to resume" in output
        assert "Traceback" not in output
        extract(**arguments)
        assert contents(features) == contents(undisturbed)

    def test_a_creation_that_was_killed_is_begun_again(self, arguments, undisturbed):
        features = arguments["features"]
        shutil.copytree(undisturbed, features, ignore=lambda *_: {"manifest.json", "receipts"})
        shutil.rmtree(features / "hidden.zarr" / "hidden" / "c")
        (features / "manifest.json.tmp").write_text("{")
        extract(**arguments)
        assert contents(features) == contents(undisturbed)

    def test_a_store_keeps_the_threads_it_was_begun_with(self, extracted, undisturbed):
        features = extracted["features"]
        manifest = json.loads((features / "manifest.json").read_text())
        assert manifest["layout"]["num_threads"] == 1
        (features / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
        (features / "receipts" / "shard-000000.json").unlink()
        extract(**extracted | {"threads": None})
        assert contents(features) == contents(undisturbed)

    def test_a_complete_store_is_left_alone(self, extracted):
        lines: list[str] = []
        extract(**extracted | {"report": lines.append})
        assert lines[-1].endswith("nothing was left to do")

    @pytest.mark.parametrize(
        ("change", "keys"),
        [
            ({"layers": "1,2"}, ["identity.layers", "layout.rows_per_shard"]),
            ({"template": "describe"}, ["identity.template.text: '{bos}Describe this image. "]),
            ({"seed": 5}, ["identity.captions.seed: 5 instead of 0"]),
            ({"max_length": 99}, ["identity.max_length: 99 instead of 512"]),
            ({"dtype": "bfloat16"}, ["identity.dtype: 'bfloat16' instead of 'float32'"]),
        ],
    )
    def test_another_request_is_refused_with_what_differs(self, extracted, change, keys):
        with pytest.raises(StoreError, match="was made differently") as error:
            extract(**extracted | change)
        for key in keys:
            assert key in str(error.value)

    def test_another_model_is_refused(self, extracted, tiny_llm, tmp_path):
        other = shutil.copytree(tiny_llm, tmp_path / "other")
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        with pytest.raises(StoreError, match=r"identity\.model\.files\.model\.safetensors: '"):
            extract(**extracted | {"model": str(other)})

    def test_captions_that_changed_are_refused(self, arguments, texts, tmp_path):
        path = tmp_path / "c.parquet"
        for number, content in enumerate((texts, [*texts[:-1], "another"])):
            pyarrow.parquet.write_table(pa.table({"text": content}), path)
            changed = arguments | {"source": str(path)}
            if number == 0:
                extract(**changed)
        with pytest.raises(StoreError, match=r"row 199, counted from 0, is 'another', but"):
            extract(**changed)


class TestBatching:
    def test_packed_is_padded_but_for_rounding(self, arguments, undisturbed, tmp_path):
        packed = semroute.open_features(undisturbed)
        padded = extract(**arguments | {"features": tmp_path / "padded", "batching": "padded"})
        assert packed.manifest.layout.line_tokens == 128
        assert padded.manifest.layout.line_tokens is None
        ids = range(len(packed))
        expected, found = (store.read(ids).tensor().float() for store in (padded, packed))
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)

    @pytest.mark.parametrize(("first", "then"), [("packed", "padded"), ("padded", "packed")])
    def test_a_store_goes_on_as_it_was_begun(self, arguments, first, then):
        store = extract(**arguments | {"batching": first})
        before = contents(store.path)
        (store.path / "receipts" / "shard-000001.json").unlink()
        with pytest.raises(InputError, match="line_tokens" if first == "packed" else "was begun"):
            extract(**arguments | {"batching": then})
        extract(**arguments | {"batching": "auto"})
        assert contents(store.path) == before


@pytest.fixture
def memory_for(monkeypatch):
    """A device on which the third layer of the LLM fits only so many captions at a time."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def make(most: int) -> None:
        def limited(layer, hidden, *rest, **named):
            if layer.self_attn.layer_idx == 2 and len(hidden) > most:
                # What torch's allocator of a CPU raises: torch.empty(2**62, dtype=torch.uint8)
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
            return forward(layer, hidden, *rest, **named)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)

    return make


class TestMemory:
    def test_the_error_of_a_real_allocation_is_known(self):
        from semroute.schemas.memory import is_out_of_memory

        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)

    def test_a_batch_that_does_not_fit_is_halved(self, arguments, memory_for, tiny_llm, tmp_path):
        from safetensors.torch import load_file, save_file

        # A first layer without variance has no error, so that one counted twice would show.
        model = shutil.copytree(tiny_llm, tmp_path / "flat")
        weights = load_file(model / "model.safetensors")
        weights["embed_tokens.weight"][:] = torch.randn(len(weights["embed_tokens.weight"]), 1)
        weights["layers.0.self_attn.o_proj.weight"][:] = 0
        weights["layers.0.mlp.down_proj.weight"][:] = 0
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        lines: list[str] = []
        arguments |= {"model": str(model), "codec": "delta", "report": lines.append}
        arguments |= {"shard_bytes": 10**6}
        whole = extract(**arguments | {"features": tmp_path / "whole"})
        assert "run in halves" not in " ".join(lines)
        memory_for(3)
        halved = extract(**arguments)
        num = whole.manifest.layout.num_shards
        assert f"warning for {num} of {num} shards: batches did not fit" in "\n".join(lines)
        ids = range(len(whole))
        expected, found = (store.read(ids).tensor().float() for store in (whole, halved))
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        for shard, receipt in halved.receipts().items():
            before = whole.receipts()[shard]
            assert receipt.layer_error["1"] == 0
            assert receipt.codec_error["mean"] == pytest.approx(
                before.codec_error["mean"], rel=0.01
            )

    def test_a_caption_that_does_not_fit_alone_is_quarantined(self, arguments, memory_for):
        memory_for(0)
        with pytest.raises(ExtractionError, match="can't allocate memory"):
            extract(**arguments | {"shard_bytes": 10**7})
        store = semroute.open_features(arguments["features"], complete=False)
        assert list(store.quarantined()) == [0]


class TestFailing:
    def test_hidden_states_that_are_not_finite_are_quarantined(self, arguments, tiny_llm, tmp_path):
        from safetensors.torch import load_file, save_file

        broken = shutil.copytree(tiny_llm, tmp_path / "broken")
        weights = load_file(broken / "model.safetensors")
        weights["layers.2.mlp.down_proj.weight"][:] = torch.nan
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ExtractionError, match=r"layer 3 are not finite for the caption '"):
            extract(**arguments | {"model": str(broken), "shard_bytes": 10**7})
        store = semroute.open_features(arguments["features"], complete=False)
        (quarantine,) = store.quarantined().values()
        assert quarantine.entries == list(range(193))
        assert "Traceback" in quarantine.traceback
        assert store.remaining() == [0]

    @pytest.mark.slow
    @pytest.mark.parametrize(("batching", "workers"), [("padded", 0), ("packed", 1)])
    def test_one_caption_that_is_not_finite_costs_its_shard_and_not_the_fit(
        self, batching, workers, arguments, tiny_llm, tmp_path, fork_server
    ):
        """One letter of the captions' bytes has an embedding that is not finite."""
        from safetensors.torch import load_file, save_file
        from transformers import AutoTokenizer

        broken = shutil.copytree(tiny_llm, tmp_path / "broken")
        weights = load_file(broken / "model.safetensors")
        (letter,) = AutoTokenizer.from_pretrained(broken)("z", add_special_tokens=False).input_ids
        weights["embed_tokens.weight"][letter] = torch.nan
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        texts = ["a red cup", "a green tree", "a zebra", "a blue box", "a car", "a dog", "a bird"]
        (tmp_path / "few.txt").write_text("\n".join(texts))
        said = []
        options = {"model": str(broken), "source": str(tmp_path / "few.txt"), "codec": "delta"}
        options |= {"shard_bytes": 6_000, "batching": batching, "workers": workers}
        options["report"] = said.append
        with pytest.raises(ExtractionError, match="for the caption 'a zebra'"):
            extract(**arguments | options)
        assert any(re.search("left out .* for the caption 'a zebra'", line) for line in said)
        store = semroute.open_features(arguments["features"], complete=False)
        assert len(store.quarantined()) == 1
        assert len(store.receipts()) == store.manifest.layout.num_shards - 1 > 0

    @pytest.mark.slow
    def test_a_full_disk_is_said_and_loses_nothing(
        self, arguments, samples_file, tiny_llm, undisturbed, start_command
    ):
        """A limit on the size of a file stands for the full disk: shards no longer fit."""
        features = arguments["features"]
        words = command(samples_file, tiny_llm, features, workers=0)
        process = start_command(*words, max_file_bytes=SHARD_BYTES * 3 // 4)
        assert process.wait() == 1
        printed = process.output.read_text()
        assert "disk of" in printed
        assert "is full" in printed
        assert "rerun the same command to resume" in printed
        assert "Traceback" not in printed
        extract(**arguments)
        assert contents(features) == contents(undisturbed)

    def test_too_little_space_is_refused_before_any_work(self, arguments, monkeypatch):
        usage = shutil.disk_usage("/")._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
        with pytest.raises(InputError, match=r"needs 1\.3 MB, but its disk has 1\.0 KB free"):
            extract(**arguments)
        assert not arguments["features"].exists()
        extract(**arguments | {"force": True})

    def test_an_attention_sink_is_warned_of(self, arguments, tiny_llm, tmp_path):
        """A token whose embedding is enormous stands for the sink."""
        from safetensors.torch import load_file, save_file

        sink = shutil.copytree(tiny_llm, tmp_path / "sink")
        weights = load_file(sink / "model.safetensors")
        vocabulary = json.loads((sink / "tokenizer.json").read_text())["model"]["vocab"]
        weights["embed_tokens.weight"][vocabulary["a"]] *= 1000
        save_file(weights, sink / "model.safetensors", metadata={"format": "pt"})
        lines: list[str] = []
        path = tmp_path / "c.parquet"
        pyarrow.parquet.write_table(pa.table({"text": ["a cup", "a tree", "a bird"]}), path)
        changed = {"source": str(path), "model": str(sink), "report": lines.append}
        extract(**arguments | changed)
        assert any("attention sink (from layer 1 " in line for line in lines)


class TestImages:
    def test_latents_are_continued_and_refused_like_features(
        self, samples_file, tmp_path, fork_server
    ):
        path = tmp_path / "latents"
        options = {"shard_bytes": 30_000, "workers": 0, "report": [].append}
        whole = encode_images(str(samples_file), path, **options)
        before = {p: p.read_bytes() for p in path.glob("latents.zarr/**/*") if p.is_file()}
        (path / "receipts" / "shard-000002.json").unlink()
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
        again = encode_images(str(samples_file), path, **options | {"workers": 1})
        assert again.is_complete
        assert before == {p: p.read_bytes() for p in path.glob("latents.zarr/**/*") if p.is_file()}
        np.testing.assert_array_equal(again.read([5, 150]), whole.read([5, 150]))
        with pytest.raises(StoreError, match=r"identity\.shape"):
            encode_images(str(samples_file), path, size=8, **options)

    def test_sizes_that_differ_need_a_size(self, tmp_path):
        import io

        from PIL import Image

        files = []
        for size in ((20, 10), (10, 10)):
            file = io.BytesIO()
            Image.new("RGB", size, (255, 0, 0)).save(file, "PNG")
            files.append(file.getvalue())
        path = tmp_path / "c.parquet"
        pyarrow.parquet.write_table(pa.table({"image": files}), path)
        options = {"workers": 0, "report": [].append}
        with pytest.raises(
            InputError, match=r"images have 2 sizes .*20 x 10.*Name one with --size"
        ):
            encode_images(str(path), tmp_path / "a", **options)
        store = encode_images(str(path), tmp_path / "a", size=8, **options)
        np.testing.assert_allclose(store.read([0])[0, :, 4, 4], [1, -1, -1])

    def test_broken_images_are_listed(self, tmp_path):
        path = tmp_path / "c.parquet"
        pyarrow.parquet.write_table(pa.table({"image": [b"no", b"image"]}), path)
        with pytest.raises(InputError, match=r"none of 2 images can be read:\n  row 0: "):
            encode_images(str(path), tmp_path / "a", workers=0, report=[].append)
