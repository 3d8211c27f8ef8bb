"""Estimates, compared with the stores that they predict."""

import json
import re

import pyarrow as pa
import pyarrow.parquet
import pytest

pytest.importorskip("torch")

from click.testing import CliRunner

from semroute.cli import cli
from semroute.pipeline.extraction.features import extract
from semroute.pipeline.inspection.estimate import format_seconds


def run(file, model, *options, code=0):
    arguments = ["estimate", str(file), "--model", str(model), *map(str, options)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def numbers(file, model, *options):
    return json.loads(run(file, model, "--json", *options))


def find(details, codec, num_layers=4):
    (found,) = (
        store
        for store in details["stores"]
        if store["codec"] == codec and len(store["layers"]) == num_layers
    )
    return found


@pytest.fixture(scope="module")
def probed(samples_file, tiny_llm):
    return numbers(samples_file, tiny_llm, "--probe")


class TestSizes:
    @pytest.mark.parametrize("codec", ["bf16", "lossless", "delta", "linear"])
    def test_sizes_are_those_of_the_store(self, codec, probed, samples_file, tiny_llm, tmp_path):
        store = extract(
            str(samples_file),
            tmp_path / "store",
            model=str(tiny_llm),
            codec=codec,
            workers=0,
            report=lambda line: None,
        )
        expected = find(probed, codec)
        assert expected["measured"]
        # An estimate counts shards only; a store this small also has other files.
        (array,) = [folder for folder in [tmp_path / "store" / "hidden.zarr"] if folder.is_dir()]
        stored = sum(file.stat().st_size for file in array.rglob("*") if file.is_file())
        assert expected["bytes"] == pytest.approx(stored, rel=0.12)
        assert probed["tokens"] == store.manifest.layout.num_rows
        assert probed["tokens_llm"] == probed["tokens"] + len(store) - 1  # BOS is dropped

    def test_without_a_probe_sizes_are_typical(self, samples_file, tiny_llm):
        details = numbers(samples_file, tiny_llm)
        raw = details["tokens"] * 4 * 32 * 2
        assert find(details, "bf16")["bytes"] == find(details, "bf16")["bytes_bf16"] == raw
        assert find(details, "lossless")["bytes"] == pytest.approx(raw * 10.5 / 16, rel=1e-3)
        assert details["probe"] is None
        assert not any(store["measured"] for store in details["stores"])
        text = run(samples_file, tiny_llm)
        assert re.search(r"1-4 \(4\) .* ~\d", text)
        assert "not known without --probe" in text

    def test_fewer_layers_and_other_qualities_take_less(self, samples_file, tiny_llm):
        details = numbers(samples_file, tiny_llm)
        for codec in ("bf16", "lossless", "delta"):
            sizes = [find(details, codec, num)["bytes"] for num in (4, 1)]
            assert sizes == sorted(sizes, reverse=True)
        one = numbers(samples_file, tiny_llm, "--layers", "3")
        assert {tuple(store["layers"]) for store in one["stores"]} == {(3,)}
        coarse = numbers(samples_file, tiny_llm, "--codec", "delta", "--quality", "3")
        assert {store["codec"] for store in coarse["stores"]} == {"delta"}
        assert find(coarse, "delta")["bytes"] < find(details, "delta")["bytes"]


class TestBreakEven:
    def test_a_pass_costs_more_to_extract_than_online(self, samples_file, tiny_llm):
        text = run(samples_file, tiny_llm, "--probe", "--codec", "delta", "--passes", "0.01")
        assert "Caching does NOT pay for 0.01 passes" in text

    def test_many_passes_pay(self, samples_file, tiny_llm):
        text = run(samples_file, tiny_llm, "--probe", "--codec", "bf16", "--passes", "1e9")
        assert re.search(r"caching pays from pass \d+ on; 1e\+09 passes save .* days", text)

    def test_what_training_reads_follows_from_its_speed(self, probed, samples_file, tiny_llm):
        twice = numbers(samples_file, tiny_llm, "--samples-per-second", "200")
        one, two = find(probed, "bf16"), find(twice, "bf16")
        assert two["disk_bytes_per_second"] == pytest.approx(2 * one["disk_bytes_per_second"])
        expected = 100 * probed["tokens_a_sample"] * 4 * 32 * 2
        assert one["disk_bytes_per_second"] == pytest.approx(expected)
        assert probed["online_share"] > 0
        assert one["break_even_passes"] == pytest.approx(
            one["extraction_seconds"] / probed["online_seconds_a_pass"]
        )

    def test_a_sample_of_several_captions_reads_one_of_them(self, tiny_llm, tmp_path):
        table = pa.table({"text": [["a", "a long caption"], ["four"]]})
        pyarrow.parquet.write_table(table, tmp_path / "captions.parquet")
        details = numbers(tmp_path / "captions.parquet", tiny_llm)
        assert details["tokens_a_sample"] == pytest.approx(((1 + 14) / 2 + 4) / 2)


class TestInput:
    def test_a_quality_needs_a_codec_that_has_one(self, samples_file, tiny_llm):
        for options in (["--quality", 3], ["--quality", 3, "--codec", "bf16"]):
            assert "--quality 3" in run(samples_file, tiny_llm, *options, code=1)

    def test_nothing_is_written(self, samples_file, tiny_llm, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run(samples_file, tiny_llm)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_file_is_named(self, tiny_llm, tmp_path):
        assert "nothing.parquet" in run(tmp_path / "nothing.parquet", tiny_llm, code=1)


def test_seconds_are_put_in_their_unit():
    spans = [1.0, 90.0, 7200.0, 172_800.0]
    assert [format_seconds(s) for s in spans] == ["1.0 s", "1.5 min", "2.0 h", "2.0 days"]


class TestBudget:
    def test_what_extraction_must_deliver(self, samples_file, tiny_llm):
        raw = find(numbers(samples_file, tiny_llm), "bf16")["bytes"]
        options = ("--budget", raw // 8, "--samples-per-second", 50, "--passes", 4)
        details = numbers(samples_file, tiny_llm, *options)
        bf16, delta = (details["budget"]["codecs"][name] for name in ("bf16", "delta"))
        assert bf16["share"] == pytest.approx(1 / 8, rel=1e-3)
        assert bf16["again"] == pytest.approx(1 - 1 / 128, rel=1e-3)
        assert delta["share"] > bf16["share"]
        passes_per_second = 50 / details["samples"]
        assert bf16["tokens_per_second"] == pytest.approx(
            passes_per_second * details["tokens_llm"], rel=1e-6
        )
        assert bf16["seconds"] is None
        text = run(samples_file, tiny_llm, *options)
        assert "with a disk budget of" in text
        assert "12.5%" in text
        assert "must fit" in text

    def test_what_it_costs(self, samples_file, tiny_llm, probed):
        raw = find(probed, "bf16")["bytes"]
        details = numbers(
            samples_file,
            tiny_llm,
            "--probe",
            "--codec",
            "bf16",
            "--budget",
            raw // 8,
            "--passes",
            4,
        )
        cost, store = details["budget"]["codecs"]["bf16"], find(details, "bf16")
        load = details["probe"]["load_seconds"]
        each = store["extraction_seconds"] - load
        expected = store["extraction_seconds"] + 3 * cost["again"] * each
        assert cost["seconds"] == pytest.approx(expected, rel=1e-6)
        assert 1 < cost["of_full_cache"] <= 4
        assert cost["of_online"] == pytest.approx(
            cost["seconds"] / (4 * details["online_seconds_a_pass"]), rel=1e-6
        )
        large = numbers(samples_file, tiny_llm, "--budget", 2 * raw)["budget"]["codecs"]["bf16"]
        assert (large["share"], large["again"]) == (1.0, 0.0)
