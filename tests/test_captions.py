import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semroute.pipeline.captions import PRESETS, build_captions, read_template
from semroute.schemas import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    from semroute.pipeline.encoder import find_model, load_tokenizer

    return load_tokenizer(find_model(str(tiny_llm)))


def build(tokenizer, rows, template="{bos}{caption}", max_length=512, **options):
    texts = pa.array(rows, pa.list_(pa.string()))
    return build_captions(texts, tokenizer, template=template, max_length=max_length, **options)


def kept_text(tokenizer, captions, entry):
    return tokenizer.decode(captions.sequences[entry][captions.kept[entry] :].tolist())


def test_duplicates_are_stored_once_and_the_null_caption_comes_first(tokenizer):
    captions = build(tokenizer, [["a"], ["b", "a"], ["a"]])
    assert captions.texts[0] == ""
    assert sorted(captions.texts[1:]) == ["a", "b"]
    ids = captions.caption_ids.to_pylist()
    assert [[captions.texts[i] for i in row] for row in ids] == [["a"], ["b", "a"], ["a"]]


def test_the_prefix_is_dropped_but_for_the_null_caption(tokenizer):
    captions = build(tokenizer, [["a cup"]], template="{bos}Look: {caption} !")
    assert kept_text(tokenizer, captions, 1) == "a cup !"
    assert captions.kept[0] == 0
    assert captions.num_tokens[0] == 1 + len("Look:  !")
    kept = build(tokenizer, [["a cup"]], template="{bos}Look: {caption} !", keep_prefix=True)
    assert kept.kept.tolist() == [0, 0]


def test_a_token_merged_across_the_boundary_belongs_to_the_caption():
    class Merging:
        """Splits at blanks only, so that ``image.A`` is one token, as real tokenizers may."""

        bos_token_id, eos_token_id, pad_token_id = 1, 2, None
        words: list[str]

        def __init__(self):
            self.words = []

        def __call__(self, texts, **_options):
            rows = []
            for text in texts:
                for word in text.split():
                    if word not in self.words:
                        self.words.append(word)
                rows.append([10 + self.words.index(word) for word in text.split()])
            return {"input_ids": rows}

    tokenizer = Merging()
    captions = build(tokenizer, [["A cat"]], template="Describe this image.{caption}")
    words = [tokenizer.words[token - 10] for token in captions.sequences[1][captions.kept[1] :]]
    assert words == ["image.A", "cat"]


def test_long_captions_lose_their_end_and_are_counted(tokenizer):
    captions = build(tokenizer, [["abcdefghij"], ["ab"]], template="{bos}{caption}!", max_length=6)
    long, short = captions.texts.index("abcdefghij"), captions.texts.index("ab")
    assert kept_text(tokenizer, captions, long) == "abcd!"
    assert captions.num_cut[long] == 6
    assert captions.num_cut[short] == 0
    assert max(captions.sequence_lengths) == 6


def test_the_order_is_seeded(tokenizer):
    rows = [[f"caption {number}"] for number in range(50)]
    first, again, other = (build(tokenizer, rows, seed=seed) for seed in (1, 1, 2))
    assert first.texts == again.texts != other.texts
    assert first.identity == again.identity
    assert first.identity.fingerprint != other.identity.fingerprint


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(st.text("abc ", min_size=1), min_size=1), min_size=1, max_size=20))
def test_every_sample_finds_its_captions_again(tokenizer, rows):
    captions = build(tokenizer, rows)
    found = [[captions.texts[i] for i in row] for row in captions.caption_ids.to_pylist()]
    assert found == rows
    assert len(set(captions.texts)) == len(captions)
    assert (captions.num_tokens > 0).all()
    assert all(sequence.dtype == np.int32 for sequence in captions.sequences)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no place for it", "exactly once"),
        ("{caption} and {caption}", "exactly once"),
        ("words {bos}{caption}", "only at its start"),
        ("{caption}", "nothing in front"),
    ],
)
def test_templates_that_cannot_work_are_refused(tokenizer, template, message):
    with pytest.raises(InputError, match=message):
        build(tokenizer, [["a"]], template=template)


def test_a_max_length_without_room_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"--max-length 5 leaves no token.*takes 5"):
        build(tokenizer, [["a"]], template="{bos}1234{caption}", max_length=5)


def test_templates_come_from_presets_or_files(tmp_path):
    assert read_template("bos") == PRESETS["bos"]
    (tmp_path / "mine.txt").write_text("{bos}An image of {caption}\n")
    assert read_template(str(tmp_path / "mine.txt")) == "{bos}An image of {caption}"
    with pytest.raises(InputError, match=r"no preset \(bos, describe, paper\) and no readable"):
        read_template("nonsense")
