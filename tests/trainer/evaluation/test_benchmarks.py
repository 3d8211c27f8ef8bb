"""Layouts, read back by the rules of each scorer."""

import json
import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semroute.schemas import BenchmarkName, InputError, Prompt
from semroute.trainer.evaluation.benchmarks import BENCHMARK_FORMATS, image_paths


def prompts(num=3, group=None):
    texts = ["a green bench and a blue bowl", "two boys", 'A "red" hat\'s on top.']
    return [
        Prompt(
            texts[i % 3],
            f"{i:05d}",
            group,
            json.dumps({"tag": "counting", "prompt": texts[i % 3], "include": []}),
        )
        for i in range(num)
    ]


def test_every_benchmark_has_a_format():
    assert tuple(BENCHMARK_FORMATS) == get_args(BenchmarkName)


@given(st.sampled_from(list(BENCHMARK_FORMATS)), st.integers(1, 12), st.integers(1, 5))
def test_every_image_has_a_path_of_its_own(layout, num, num_images):
    paths = image_paths(layout, prompts(num), num_images)
    assert [len(files) for files in paths.images] == [num_images] * num
    every = [file for files in paths.images for file in files] + [*paths.others]
    assert len({*every}) == len(every)
    assert not any(file.startswith(("/", ".")) for file in every)


class TestGenEval:
    def test_each_prompt_is_a_folder_with_its_line(self):
        paths = image_paths("geneval", prompts(), 4)
        folders = {file.split("/")[0] for file in paths.others}
        assert all(folder.isdigit() for folder in folders)
        for number, files in enumerate(paths.images):
            folder = f"{number:05d}"
            line = json.loads(paths.others[f"{folder}/metadata.jsonl"])
            assert line["prompt"] == prompts()[number].text
            for file in files:
                assert re.fullmatch(rf"{folder}/samples/\d+\.png", file)

    def test_refuses_prompts_without_their_lines(self):
        with pytest.raises(InputError, match="prompt 0 has no tag and no prompt, which GenEval's"):
            image_paths("geneval", [Prompt("a cat", "00000")], 1)


class TestGenAIBench:
    def test_a_set_of_images_is_a_model_of_the_scorer(self):
        paths = image_paths("genai-bench", prompts(), 2)
        assert paths.images[1] == ["0/00001.jpeg", "1/00001.jpeg"]

    @pytest.mark.parametrize("name", ["../00001", ".hidden"])
    def test_refuses_names_that_leave_the_folder(self, name):
        with pytest.raises(InputError, match="cannot name an image"):
            image_paths("genai-bench", [Prompt("a cat", name)], 1)

    def test_refuses_a_name_twice(self):
        same = [Prompt("a cat", "00000"), Prompt("a dog", "00000")]
        with pytest.raises(InputError, match=r"prompts 0 and 1 would share the file 0/00000\.jpeg"):
            image_paths("genai-bench", same, 1)


def test_drawbench_is_by_number():
    assert image_paths("drawbench", prompts(), 2).images[2] == [
        "samples/0/00002.jpg",
        "samples/1/00002.jpg",
    ]


class TestT2ICompBench:
    def test_names_hold_prompt_and_a_number_through_all_images(self):
        paths = image_paths("t2i-compbench", prompts(), 10)
        names = [file.removeprefix("samples/") for files in paths.images for file in files]
        numbers = [int(name.split("_")[-1].split(".")[0]) for name in names]
        assert numbers == list(range(30))
        texts = [name.split("_")[0] for name in names]
        assert texts == [prompt.text for prompt in prompts() for _ in range(10)]

    def test_categories_are_scored_apart(self):
        mixed = [*prompts(1, "color"), *prompts(1, "shape"), *prompts(1, "color")]
        files = [files for (files,) in image_paths("t2i-compbench", mixed, 1).images]
        bench = "a green bench and a blue bowl"
        assert files == [
            f"color/samples/{bench}_000000.png",
            f"shape/samples/{bench}_000000.png",
            f"color/samples/{bench}_000001.png",
        ]

    @pytest.mark.parametrize("sign", ["_", "/"])
    def test_refuses_what_a_name_cannot_hold(self, sign):
        with pytest.raises(InputError, match=f"prompt 0 has a '{sign}'"):
            image_paths("t2i-compbench", [Prompt(f"either{sign}or", "00000")], 1)

    def test_refuses_a_category_that_leaves_the_folder(self):
        with pytest.raises(InputError, match=r"category '\.\./x' cannot name a folder"):
            image_paths("t2i-compbench", [Prompt("a cat", "00000", "../x")], 1)

    def test_refuses_a_prompt_too_long_for_a_name(self):
        with pytest.raises(InputError, match=r"prompt 0 is too long .* 311 bytes of at most 255"):
            image_paths("t2i-compbench", [Prompt("é" * 150, "00000")], 1)
