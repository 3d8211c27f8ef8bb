import json

import pytest

from semroute.pipeline.sources.prompts import read_prompts
from semroute.schemas import InputError, Prompt


def write(path, text):
    path.write_text(text, "utf-8", newline="")
    return str(path)


GENEVAL = [
    {
        "tag": "single_object",
        "include": [{"class": "cow", "count": 1}],
        "prompt": "a photo of a cow",
    },
    {"tag": "counting", "include": [], "exclude": [{"class": "cup"}], "prompt": "two cups"},
]


class TestReadPrompts:
    def test_lines_of_geneval_stay_as_they_are(self, tmp_path):
        lines = [json.dumps(line) for line in GENEVAL]
        found = read_prompts(write(tmp_path / "metadata.jsonl", "\n".join(lines) + "\n\n"))
        assert found == [
            Prompt("a photo of a cow", "00000", "single_object", lines[0]),
            Prompt("two cups", "00001", "counting", lines[1]),
        ]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("parti.tsv", "Prompt\tCategory\tNote\na cat\tAnimals\tx\na dog\tAnimals\ty\n"),
            ("drawbench.csv", "Prompts,Category\na cat,Animals\na dog,Animals\n"),
            ("compbench.tsv", "category\tprompt\r\nAnimals\ta cat\r\nAnimals\ta dog\r\n"),
        ],
    )
    def test_columns_are_found_whatever_their_case(self, tmp_path, name, text):
        found = read_prompts(write(tmp_path / name, text))
        assert found == [Prompt("a cat", "00000", "Animals"), Prompt("a dog", "00001", "Animals")]

    def test_a_prompt_a_line_whatever_ends_it(self, tmp_path):
        found = read_prompts(write(tmp_path / "color_val.txt", "a red cat\r\na blue dog\r\n"))
        assert [(p.text, p.name) for p in found] == [
            ("a red cat", "00000"),
            ("a blue dog", "00001"),
        ]

    def test_names_of_genai_bench_are_kept(self, tmp_path):
        document = {"00007": {"id": "00007", "prompt": "a cat", "models": {}}, "00009": "a dog"}
        found = read_prompts(write(tmp_path / "genai_image.json", json.dumps(document)))
        assert found == [Prompt("a cat", "00007"), Prompt("a dog", "00009")]

    def test_a_list_is_numbered(self, tmp_path):
        found = read_prompts(write(tmp_path / "drawbench.json", '["a cat", {"prompt": "a dog"}]'))
        assert found == [Prompt("a cat", "00000"), Prompt("a dog", "00001")]

    def test_another_column_may_be_named(self, tmp_path):
        file = write(tmp_path / "a.csv", "prompt,long\na cat,a very long cat\n")
        assert read_prompts(file, "long")[0].text == "a very long cat"

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.json", "[]", "has no prompts; expected a list"),
            ("a.json", "{", "is not a readable json file"),
            ("a.json", '{"1": {"models": 3}}', "entry 1 has no prompt"),
            ("a.json", '["a", " "]', "entry 00001 has no prompt"),
            ("a.csv", "words\nx\n", "has no column 'text' or 'prompt' or 'caption'"),
            ("a.txt", "a\n\nb\n", "1 of 3 rows have an empty caption"),
            ("a.jsonl", '{"prompt": ["a", "b"]}', "row 0 has 2 captions; expected one per prompt"),
        ],
    )
    def test_refuses_what_holds_no_prompts(self, tmp_path, name, text, message):
        with pytest.raises(InputError, match=message):
            read_prompts(write(tmp_path / name, text))

    def test_refuses_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match="no such file"):
            read_prompts(str(tmp_path / "none.json"))

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_records_have_no_byte_order_mark_and_no_line_ends(self, tmp_path, end):
        lines = [json.dumps(line) for line in GENEVAL]
        text = "\ufeff" + end.join([*lines, ""])
        found = read_prompts(write(tmp_path / "metadata.jsonl", text))
        assert [(p.record, p.group) for p in found] == [
            (lines[0], "single_object"),
            (lines[1], "counting"),
        ]

    def test_a_group_that_the_first_row_lacks(self, tmp_path):
        lines = '{"prompt": "a cat"}\n{"prompt": "a dog", "tag": "animals"}\n'
        found = read_prompts(write(tmp_path / "metadata.jsonl", lines))
        assert [p.group for p in found] == [None, "animals"]

    @pytest.mark.parametrize(
        "text", ['["a cat", "a \\ud83d"]', '[{"prompt": "a"}, {"prompt": "b", "tag": "\\ude00"}]']
    )
    def test_half_a_surrogate_pair_is_named(self, tmp_path, text):
        with pytest.raises(InputError, match=r"p\.json: entry '00001': .* half a surrogate pair"):
            read_prompts(write(tmp_path / "p.json", text))
