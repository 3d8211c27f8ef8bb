import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from semroute.cli import cli
from semroute.schemas import InputError
from semroute.trainer.evaluation.image_set import find_shard, noise_number
from semroute.trainer.training.train import train

TEXTS = ["a red cup", "two green trees", "a blue car", "a small dog", "a black box"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, configure):
    """A run of one step."""
    path = tmp_path_factory.mktemp("runs") / "depth"
    return train(configure(path, steps=1, model={"width": 32, "patch_size": 6}))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "metadata.jsonl"
    lines = [{"tag": "counting", "include": [], "prompt": text} for text in TEXTS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(run, prompts, out, *options):
    given = ["sample", run, "--prompts", prompts, "--layout", "geneval", "--out", out]
    given += ["--images-per-prompt", 3, "--num-steps", 2, "--cfg-scale", 2, "--batch-size", 4]
    return [str(part) for part in (*given, *options)]


def generate(*arguments, code=0, env=None):
    result = CliRunner().invoke(cli, command(*arguments), env=env)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(run, prompts, tmp_path_factory):
    """The whole in one go."""
    out = tmp_path_factory.mktemp("whole") / "pictures"
    output = generate(run, prompts, out)
    assert "15/15" in output  # the bar
    assert f"{out}: 15 images generated, 15 of 15 complete" in output
    return out


class TestSample:
    def test_the_folder_holds_the_benchmark_and_what_it_is(self, whole, prompts):
        found = contents(whole)
        pictures = {f"{i:05d}/samples/{k:05d}.png" for i in range(5) for k in range(3)}
        beside = {f"{i:05d}/metadata.jsonl" for i in range(5)}
        assert {*found} == pictures | beside | {"captions.jsonl", "pictures.json", "grid.png"}
        lines = prompts.read_text().splitlines()
        assert [found[f"{i:05d}/metadata.jsonl"].decode().strip() for i in range(5)] == lines
        listed = [json.loads(line) for line in found["captions.jsonl"].splitlines()]
        assert {line["image"] for line in listed} == pictures
        assert listed[4] == {
            "image": "00001/samples/00001.png",
            "caption": TEXTS[1],
            "number": 1,
            "group": "counting",
        }

    def test_images_of_a_prompt_differ(self, whole):
        files = [(whole / f"00000/samples/0000{k}.png").read_bytes() for k in range(3)]
        assert len({*files}) == 3

    def test_a_single_image_is_that_of_prompt(self, run, whole, tmp_path):
        options = ["--num-steps", "2", "--cfg-scale", "2", "--out", str(tmp_path)]
        given = [part for text in TEXTS for part in ("--prompt", text)]
        assert CliRunner().invoke(cli, ["sample", str(run), *given, *options]).exit_code == 0
        for number in range(5):
            one = np.asarray(Image.open(tmp_path / f"{number:06d}.png")).astype(int)
            other = np.asarray(Image.open(whole / f"{number:05d}/samples/00000.png")).astype(int)
            assert np.abs(one - other).max() <= 1

    def test_shards_generate_the_same_bytes(self, run, prompts, whole, tmp_path):
        for shard in ("1/3", "2/3"):
            assert "of 15 complete" in generate(run, prompts, tmp_path / "a", "--shard", shard)
        assert not (tmp_path / "a" / "grid.png").exists()
        generate(run, prompts, tmp_path / "a", "--shard", "0/3")
        assert contents(tmp_path / "a") == contents(whole)

    def test_processes_of_a_launcher_generate_a_shard_each(self, run, prompts, whole, tmp_path):
        for rank in "10":
            env = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
            output = generate(run, prompts, tmp_path / "a", env=env)
            assert f"shard {rank} of 2" in output
        assert contents(tmp_path / "a") == contents(whole)

    def test_another_batch_size_changes_rounding_only(self, run, prompts, whole, tmp_path):
        generate(run, prompts, tmp_path / "a", "--batch-size", 7)
        for file in whole.glob("*/samples/*.png"):
            one = np.asarray(Image.open(file)).astype(int)
            other = np.asarray(Image.open(tmp_path / "a" / file.relative_to(whole))).astype(int)
            assert np.abs(one - other).max() <= 1

    def test_missing_images_are_generated_and_the_rest_is_kept(self, run, prompts, whole, tmp_path):
        out = tmp_path / "a"
        generate(run, prompts, out)
        (out / "00002/samples/00001.png").unlink()
        kept = out / "00000/samples/00000.png"
        mine = (out / "00003/samples/00000.png").read_bytes()
        kept.write_bytes(mine)
        assert "1 images generated, 15 of 15 complete" in generate(run, prompts, out)
        assert kept.read_bytes() == mine
        kept.write_bytes(contents(whole)["00000/samples/00000.png"])
        assert contents(out) | {"grid.png": b""} == contents(whole) | {"grid.png": b""}

    @pytest.mark.slow
    def test_processes_side_by_side_of_which_one_is_killed(
        self, run, prompts, whole, tmp_path, start_command
    ):
        out = tmp_path / "a"
        shards = [command(run, prompts, out, "--shard", f"{i}/2") for i in range(2)]
        processes = [start_command(*shard) for shard in shards]
        processes[1].wait_until((out / "00001/samples/00001.png").exists)
        processes[1].kill()
        assert processes[0].wait() == 0, processes[0].output.read_text()
        for file in out.glob("*/samples/*"):
            assert file.read_bytes() == contents(whole)[file.relative_to(out).as_posix()]
        generate(run, prompts, out, "--shard", "1/2")
        assert contents(out) == contents(whole)

    def test_features_of_the_same_file_stand_in_for_the_llm(
        self, run, prompts, whole, tiny_llm, tmp_path, monkeypatch
    ):
        features = tmp_path / "features"
        extract = ["extract", prompts, features, "--model", tiny_llm, "--workers", 0]
        given = [str(part) for part in (*extract, "--codec", "bf16")]
        assert CliRunner().invoke(cli, given).exit_code == 0
        monkeypatch.setattr(
            "semroute.trainer.evaluation.generate.open_encoder",
            lambda *_: pytest.fail("the LLM is opened"),
        )
        generate(run, prompts, tmp_path / "a", "--features", features)
        record = json.loads((tmp_path / "a" / "pictures.json").read_text())
        assert record["codec"] == "bf16"
        for file in whole.glob("*/samples/*.png"):
            one = np.asarray(Image.open(file)).astype(int)
            other = np.asarray(Image.open(tmp_path / "a" / file.relative_to(whole))).astype(int)
            assert np.abs(one - other).max() <= 2
        other = tmp_path / "other.jsonl"
        other.write_text(prompts.read_text().replace("dog", "cat"))
        output = generate(run, other, tmp_path / "b", "--features", features, code=1)
        assert "was not extracted from" in output
        assert "the captions differ. Run semroute extract" in output

    @pytest.mark.parametrize(
        ("layout", "file"),
        [
            ("plain", "00004/00000.png"),
            ("genai-bench", "0/00004.jpeg"),
            ("drawbench", "samples/0/00004.jpg"),
            ("t2i-compbench", "counting/samples/a black box_000004.png"),
        ],
    )
    def test_other_layouts(self, run, prompts, tmp_path, layout, file):
        options = ["--layout", layout, "--images-per-prompt", 1]
        generate(run, prompts, tmp_path / "a", *options)
        with Image.open(tmp_path / "a" / file) as image:
            assert image.size == (12, 12)
            assert image.format == ("PNG" if file.endswith("png") else "JPEG")

    def test_num_takes_the_first(self, run, prompts, tmp_path):
        generate(run, prompts, tmp_path / "a", "--num", 2)
        assert len([*(tmp_path / "a").glob("*/samples/*.png")]) == 6


class TestRefusals:
    def test_images_generated_differently(self, run, prompts, whole):
        before = contents(whole)
        output = generate(run, prompts, whole, "--seed", 1, "--images-per-prompt", 2, code=1)
        assert "num_images: 2 instead of 3" in output
        assert "sampling.seed: 1 instead of 0" in output
        assert contents(whole) == before

    def test_a_folder_of_something_else(self, run, prompts, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        output = generate(run, prompts, tmp_path, code=1)
        assert "it holds mine.txt. Name a new folder" in output
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_a_damaged_record(self, run, prompts, tmp_path):
        (tmp_path / "pictures.json").write_text("{")
        assert "pictures.json is damaged" in generate(run, prompts, tmp_path, code=1)

    @pytest.mark.parametrize("option", ["--layout=plain", "--shard=0/2", "--images-per-prompt=2"])
    def test_options_of_files_of_prompts_alone(self, run, option):
        result = CliRunner().invoke(cli, ["sample", str(run), "--prompt", "a", option])
        assert result.exit_code == 1
        assert f"{option.split('=')[0]} needs --prompts FILE" in result.output

    def test_prompts_and_a_prompt(self, run, prompts, tmp_path):
        output = generate(run, prompts, tmp_path, "--prompt", "a cat", code=1)
        assert "give either --features, --prompt or --prompts" in output

    @pytest.mark.parametrize("shard", ["3/3", "1", "a/2", "-1/2", "1/0"])
    def test_shards_that_do_not_exist(self, shard):
        with pytest.raises(InputError, match="expected I/N, from 0/N to N-1/N"):
            find_shard(shard)


def test_images_have_noise_of_their_own():
    numbers = {noise_number(prompt, image) for prompt in range(50) for image in range(20)}
    assert len(numbers) == 1000
    assert [noise_number(prompt, 0) for prompt in range(3)] == [0, 1, 2]


def test_without_a_launcher_there_is_one_shard(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for rank in (None, "3"):  # which some schedulers set for reasons of their own
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert find_shard(None) == (0, 1)
    assert find_shard("1/4") == (1, 4)
