"""A judge with random weights: its answers mean nothing; that it is asked correctly matters."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from damaged_tables import DAMAGES
from PIL import Image

from semroute.cli import cli
from semroute.schemas import InputError
from semroute.trainer.evaluation.vqascore import (
    ANSWERS_SCHEMA,
    SCORES_SCHEMA,
    VQAScorer,
    VQAScores,
    summarise,
)

torch = pytest.importorskip("torch")
CAPTIONS = ["a red cup", "two green trees", "a blue car", "a small dog on a long table"]
# An answer of one token and one of three.
MERGES = [("Y", "e"), ("Ye", "s")]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ANSWER:{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """A LLaVA of 2 + 2 layers and width 32 whose tokens are bytes, but for Yes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<s>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape["num_attention_heads"] = 2
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(**shape, vocab_size=len(words), bos_token_id=0, eos_token_id=1),
        image_token_index=2,
        vision_feature_layer=-1,
        initializer_range=0.3,
    )
    model = LlavaForConditionalGeneration(config)
    # Settings of its own for generating, which a judge must not follow.
    model.generation_config.update(do_sample=True, temperature=0.3, repetition_penalty=1.5)
    folder = tmp_path_factory.mktemp("vlm") / "tiny-llava"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tiny_vlm):
    return VQAScorer(tiny_vlm, "tiny", "float32", "cpu")


def make_images(num=4, size=12):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(num)]


@pytest.fixture
def folder(tmp_path):
    """As semroute sample --prompts leaves it: two images of each caption."""
    lines = []
    for number, image in enumerate(make_images(8)):
        name = f"{number // 2:05d}/{number % 2:05d}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
        group = "long" if number // 2 == 3 else "short"
        caption = CAPTIONS[number // 2]
        lines.append({"image": name, "caption": caption, "number": number // 2, "group": group})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def evaluate(*arguments, code=0):
    result = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


class TestJudge:
    def test_yes_has_the_probability_that_the_model_gives_it_next(self, judge):
        """By the forward pass of transformers alone, one image at a time."""
        questions = [f'Does this figure show "{text}"?' for text in CAPTIONS]
        found = judge.ask(make_images(), questions)
        assert found.shape == (4, 2)
        processor, model = judge.processor, judge.model
        for image, question, (yes, no) in zip(make_images(), questions, found, strict=True):
            text = f"<s><image>{question} ANSWER:"
            inputs = processor(text=text, images=image, add_special_tokens=False)
            tensors = {k: torch.as_tensor(np.array(v)) for k, v in inputs.items()}
            with torch.no_grad():
                logits = model(**tensors).logits[0, -1]
            probabilities = logits.softmax(-1)
            (token,) = processor.tokenizer.encode("Yes")
            assert yes == pytest.approx(float(probabilities[token]), rel=1e-4)
            n, o = processor.tokenizer.encode("No")
            with_n = torch.cat([tensors["input_ids"], torch.tensor([[n]])], 1)
            mask = torch.ones_like(with_n)
            given = tensors | {"input_ids": with_n, "attention_mask": mask}
            with torch.no_grad():
                second = model(**given).logits[0, -1].softmax(-1)[o]
            assert no == pytest.approx(float((probabilities[n] * second).sqrt()), rel=1e-4)

    def test_question_and_image_count(self, judge):
        one, two = make_images(2)
        answers = judge.ask([one, two, one], ["a?", "a?", "b?"])[:, 0]
        assert len({f"{answer:.6g}" for answer in answers}) == 3

    def test_refuses_a_model_of_text(self, tiny_llm):
        with pytest.raises(InputError, match="cannot load it as a model of images and text"):
            VQAScorer(tiny_llm, "llama", "float32")

    def test_refuses_a_model_that_is_not_for_chats(self, tiny_vlm, tmp_path):
        for file in tiny_vlm.iterdir():
            if file.name != "chat_template.jinja":
                (tmp_path / file.name).symlink_to(file)
        with pytest.raises(InputError, match="has no chat template; expected a model made for"):
            VQAScorer(tmp_path, "tiny", "float32")

    def test_runs_no_code_of_the_model_unless_told(self, tiny_vlm, tmp_path):
        marker = tmp_path / "ran"
        folder = tmp_path / "remote"
        folder.mkdir()
        for file in tiny_vlm.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "mine"
        config["auto_map"] = {"AutoConfig": "mine.Config"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text(
            "from pathlib import Path\n"
            "from transformers import PretrainedConfig\n"
            f"Path({str(marker)!r}).touch()\n"
            "class Config(PretrainedConfig):\n    model_type = 'mine'\n"
        )
        with pytest.raises(InputError, match="needs --trust-remote-code") as error:
            VQAScorer(folder, "remote", "float32")
        last = str(error.value).splitlines()[-1]
        assert last.startswith("A model with its own code needs --trust-remote-code; most image")
        assert not marker.exists()
        with pytest.raises(InputError, match="cannot load it"):  # it is no model still
            VQAScorer(folder, "remote", "float32", trust_remote_code=True)
        assert marker.exists()


class TestSummarise:
    def table(self, yes, captions, asked=None, groups=None):
        rows = [
            {
                "sample": number,
                "sha256": str(number),
                "group": (groups or {}).get(caption),
                "caption": caption,
                "asked": asked[number] if asked else caption,
                "yes": score,
                "no": 0.0,
            }
            for number, (score, caption) in enumerate(zip(yes, captions, strict=True))
        ]
        return pa.Table.from_pylist(rows, schema=ANSWERS_SCHEMA)

    def test_scores_groups_and_all(self):
        captions = ["a", "a", "b", "c"]
        table = summarise(self.table([1, 0, 0.5, 0.25], captions, groups={"a": "x", "b": "y"}))
        assert table.schema == SCORES_SCHEMA
        rows = {row["group"]: row for row in table.to_pylist()}
        assert rows["all"]["score"] == pytest.approx(0.4375)
        assert (rows["all"]["num_images"], rows["all"]["num_prompts"]) == (4, 3)
        assert rows["x"]["score"] == rows["x"]["low"] == rows["x"]["high"] == 0.5
        assert rows["all"]["low"] < 0.4375 < rows["all"]["high"]
        assert rows["all"]["chance"] is None

    def test_more_images_of_the_same_prompts_do_not_narrow_the_interval(self):
        scores = np.random.default_rng(0).uniform(size=100).tolist()
        captions = [str(number) for number in range(100)]
        (once,) = summarise(self.table(scores, captions)).to_pylist()
        (four,) = summarise(self.table(scores * 4, captions * 4)).to_pylist()
        assert (four["num_images"], four["num_prompts"]) == (400, 100)
        assert once["high"] - once["low"] == pytest.approx(1.96 * 2 * 0.29 / 10, rel=0.15)
        assert four["high"] - four["low"] == pytest.approx(once["high"] - once["low"], rel=0.1)

    def test_chance_is_of_questions_about_another_caption(self):
        table = self.table([0.9, 0.1, 0.7, 0.3], ["a", "a", "b", "b"], ["a", "b", "b", "a"])
        (row,) = summarise(table).to_pylist()
        assert (row["score"], row["chance"]) == (pytest.approx(0.8), pytest.approx(0.2))
        assert row["num_images"] == 2


class TestEvaluate:
    def test_scores_a_folder_of_images(self, folder, tiny_vlm, judge):
        output = evaluate(folder, "--judge", tiny_vlm)
        out = folder / "judged" / "tiny-llava"
        assert "8/8" in output
        assert "group  P(Yes)" in output
        assert {*output.split()} >= {"all", "short", "long"}
        assert "says Yes or No with a probability of 0.0" in output  # it knows no words
        table = pyarrow.parquet.read_table(out / "judgements.parquet")
        assert table.schema == ANSWERS_SCHEMA
        assert table["caption"].to_pylist() == [text for text in CAPTIONS for _ in range(2)]
        image = Image.open(folder / "00003" / "00001.png")
        question = f'Does this figure show "{CAPTIONS[3]}"? Please answer Yes or No.'
        ((yes, no),) = judge.ask([image], [question])
        last = table.slice(7).to_pylist()[0]
        assert (last["yes"], last["no"]) == (
            pytest.approx(yes, rel=1e-4),
            pytest.approx(no, rel=1e-4),
        )
        scores = pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()
        assert [row["group"] for row in scores] == ["all", "short", "long"]
        assert scores[0]["score"] == pytest.approx(np.mean(table["yes"].to_numpy()))
        with Image.open(out / "judged.png") as figure:
            assert figure.width > 500

    def test_scores_the_samples_of_a_run_and_tables(self, folder, tiny_vlm, tmp_path):
        (folder / "run.json").write_text("{}")
        samples = folder / "samples"
        samples.mkdir()
        make_images(1)[0].save(samples / "0.png")
        line = json.dumps({"image": "0.png", "caption": "a cat"})
        (samples / "captions.jsonl").write_text(line + "\n")
        assert str(samples / "judged") in evaluate(folder, "--judge", tiny_vlm)
        file = io.BytesIO()
        make_images(1)[0].save(file, "PNG")
        table = pyarrow.table(
            {"text": ["a cat"], "image": [{"bytes": file.getvalue(), "path": None}]}
        )
        pyarrow.parquet.write_table(table, folder / "table.parquet")
        out = folder / "results"
        evaluate(folder / "table.parquet", "--judge", tiny_vlm, "--out", out)
        one, other = (
            pyarrow.parquet.read_table(place / "judgements.parquet")["yes"].to_pylist()
            for place in (samples / "judged" / "tiny-llava", out)
        )
        assert one == other

    def test_chance_asks_about_each_image_with_another_caption(self, folder, tiny_vlm):
        evaluate(folder, "--judge", tiny_vlm)
        output = evaluate(folder, "--judge", tiny_vlm, "--chance")
        assert "16/16" in output
        out = folder / "judged" / "tiny-llava"
        rows = pyarrow.parquet.read_table(out / "judgements.parquet").to_pylist()
        assert sum(row["asked"] == row["caption"] for row in rows) == 8
        others = [row for row in rows if row["asked"] != row["caption"]]
        assert {row["asked"] for row in others} == {*CAPTIONS}
        scores = pyarrow.parquet.read_table(out / "scores.parquet").to_pylist()
        assert scores[0]["chance"] == pytest.approx(np.mean([row["yes"] for row in others]))
        evaluate(folder, "--judge", tiny_vlm)
        assert pyarrow.parquet.read_table(out / "judgements.parquet").num_rows == 16

    def test_stored_answers_are_reused(self, folder, tiny_vlm):
        out = folder / "judged" / "tiny-llava"
        evaluate(folder, "--judge", tiny_vlm)
        table = pyarrow.parquet.read_table(out / "judgements.parquet")
        marked = table.set_column(5, ANSWERS_SCHEMA.field("yes"), [np.full(8, 0.5, np.float32)])
        pyarrow.parquet.write_table(marked, out / "judgements.parquet")
        other = Image.fromarray(np.zeros((12, 12, 3), np.uint8))
        other.save(folder / "00001" / "00000.png")  # generated again
        evaluate(folder, "--judge", tiny_vlm)
        yes = pyarrow.parquet.read_table(out / "judgements.parquet")["yes"].to_pylist()
        assert [score == 0.5 for score in yes] == [True] * 2 + [False] + [True] * 5

    def test_stopped_and_resumed_it_is_the_same(self, folder, tiny_vlm, monkeypatch):
        whole = folder / "whole"
        evaluate(folder, "--judge", tiny_vlm, "--batch-size", 2, "--out", whole)
        asked = []
        ask = VQAScorer.ask

        def stop(self, images, questions):
            if len(asked) == 4:
                raise KeyboardInterrupt
            asked.extend(questions)
            return ask(self, images, questions)

        out = folder / "stopped"
        options = [folder, "--judge", tiny_vlm, "--batch-size", 2, "--out", out]
        monkeypatch.setattr(VQAScorer, "ask", stop)
        assert "Rerun the same command to resume" in evaluate(*options, code=130)
        assert pyarrow.parquet.read_table(out / "judgements.parquet").num_rows == 4
        monkeypatch.setattr(VQAScorer, "ask", ask)
        evaluate(*options)
        for name in ("judgements.parquet", "scores.parquet"):
            assert pyarrow.parquet.read_table(out / name).equals(
                pyarrow.parquet.read_table(whole / name)
            )

    def test_images_that_cannot_be_read_fail_the_command(self, folder, tiny_vlm):
        (folder / "00000" / "00001.png").unlink()
        (folder / "00002" / "00000.png").write_bytes(b"no picture")
        output = evaluate(folder, "--judge", tiny_vlm, code=1)
        assert "2 of 8 images could not be scored" in output
        assert "1 ('a red cup'): no such file" in output
        assert "4 ('a blue car'): UnidentifiedImageError" in output
        table = pyarrow.parquet.read_table(folder / "judged" / "tiny-llava" / "judgements.parquet")
        assert table["sample"].to_pylist() == [0, 2, 3, 5, 6, 7]


def test_scores_are_the_same_in_html(folder, tiny_vlm):
    evaluate(folder, "--judge", tiny_vlm)
    table = pyarrow.parquet.read_table(folder / "judged" / "tiny-llava" / "judgements.parquet")
    scores = VQAScores(table, [])
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", scores._repr_html_())
    assert "".join("".join(cells).split()) == "".join(scores.to_text().split())


class TestRefusals:
    def test_another_question_or_judge(self, folder, tiny_vlm, tmp_path):
        evaluate(folder, "--judge", tiny_vlm)
        question = ["--question", 'Is this "{}"?']
        output = evaluate(folder, "--judge", tiny_vlm, *question, code=1)
        assert "question: 'Is this" in output
        assert "Name another folder with --out" in output
        evaluate(folder, "--judge", tiny_vlm, *question, "--out", folder / "other")

    def test_several_processes(self, folder, tiny_vlm, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        output = evaluate(folder, "--judge", tiny_vlm, code=1)
        assert "evaluate --judge runs in one process" in output

    def test_a_damaged_record(self, folder, tiny_vlm):
        out = folder / "out"
        out.mkdir()
        (out / "judge.json").write_text("{")
        output = evaluate(folder, "--judge", tiny_vlm, "--out", out, code=1)
        assert "judge.json is damaged" in output

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_answers(self, folder, tiny_vlm, damage, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        row = {"sample": 0, "sha256": "0", "group": "a", "caption": "a", "asked": "a"}
        table = pa.Table.from_pylist([row | {"yes": 0.5, "no": 0.5}], schema=ANSWERS_SCHEMA)
        DAMAGES[damage](out / "judgements.parquet", table)
        output = evaluate(folder, "--judge", tiny_vlm, "--out", out, code=1)
        assert "judgements.parquet does not hold answers of a judge" in output

    def test_a_question_without_a_caption(self, folder, tiny_vlm):
        output = evaluate(folder, "--judge", tiny_vlm, "--question", "Is this good?", code=1)
        assert "must contain {} once, in place of the caption" in output

    def test_a_folder_without_captions(self, tiny_vlm, tmp_path):
        output = evaluate(tmp_path, "--judge", tiny_vlm, code=1)
        assert "captions.jsonl: no such file" in output

    @pytest.mark.parametrize(
        "options", [["--features", "x"], ["--cfg-scale", "2"], ["--num-steps", "5"]]
    )
    def test_options_of_the_world_of_shapes(self, folder, tiny_vlm, options):
        output = evaluate(folder, "--judge", tiny_vlm, *options, code=1)
        assert f"{options[0]} cannot be combined with --judge" in output

    @pytest.mark.parametrize("options", [["--chance"], ["--question", "{}?"]])
    def test_options_of_judges(self, folder, options):
        output = evaluate(folder, "--features", "x", "--samples", "y", *options, code=1)
        assert f"{options[0]} needs --judge" in output

    def test_neither_judge_nor_world(self, folder):
        output = evaluate(folder, code=1)
        assert "give --judge, or --features and --samples" in output
