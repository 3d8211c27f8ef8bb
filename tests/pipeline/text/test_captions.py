import copy
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semroute.pipeline.text.captions import build_captions
from semroute.pipeline.text.presets import PRESETS
from semroute.pipeline.text.templates import foreign_markers
from semroute.schemas import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    from semroute.pipeline.models.hub import find_model
    from semroute.pipeline.models.llm import load_tokenizer

    return load_tokenizer(find_model(str(tiny_llm)))


def build(tokenizer, rows, template="{bos}{caption}", max_length=512, **options):
    texts = rows if isinstance(rows, pa.Array) else pa.array(rows, pa.list_(pa.string()))
    return build_captions(texts, tokenizer, template=template, max_length=max_length, **options)


def texts_of(captions):
    return captions.texts.to_pylist()


def kept_text(tokenizer, captions, entry):
    return tokenizer.decode(captions.sequences[entry][captions.rows.kept[entry] :].tolist())


def test_duplicates_are_stored_once_and_the_null_caption_comes_first(tokenizer):
    captions = build(tokenizer, [["a"], ["b", "a"], ["a"]])
    assert texts_of(captions)[0] == ""
    assert sorted(texts_of(captions)[1:]) == ["a", "b"]
    ids = captions.caption_ids.to_pylist()
    assert [[texts_of(captions)[i] for i in row] for row in ids] == [["a"], ["b", "a"], ["a"]]


def test_texts_stay_where_the_samples_have_them(tokenizer):
    texts = pa.array([["b"], ["", "a"], ["b"]], pa.list_(pa.large_string()))
    captions = build(tokenizer, texts)
    held = captions.texts.dictionary
    assert held.buffers()[2].address == texts.values.buffers()[2].address
    ids = captions.caption_ids.to_pylist()
    assert [[texts_of(captions)[i] for i in row] for row in ids] == texts.to_pylist()


def test_the_prefix_is_dropped_but_for_the_null_caption(tokenizer):
    captions = build(tokenizer, [["a cup"]], template="{bos}Look: {caption} !")
    assert kept_text(tokenizer, captions, 1) == "a cup !"
    assert captions.rows.kept[0] == 0
    assert captions.num_tokens[0] == 1 + len("Look:  !")
    kept = build(tokenizer, [["a cup"]], template="{bos}Look: {caption} !", keep_prefix=True)
    assert kept.rows.kept.tolist() == [0, 0]


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
    words = [
        tokenizer.words[token - 10] for token in captions.sequences[1][captions.rows.kept[1] :]
    ]
    assert words == ["image.A", "cat"]


def test_long_captions_lose_their_end_and_are_counted(tokenizer):
    captions = build(tokenizer, [["abcdefghij"], ["ab"]], template="{bos}{caption}!", max_length=6)
    long, short = texts_of(captions).index("abcdefghij"), texts_of(captions).index("ab")
    assert kept_text(tokenizer, captions, long) == "abcd!"
    assert captions.num_cut[long] == 6
    assert captions.num_cut[short] == 0
    assert max(captions.sequence_lengths) == 6


def test_the_order_is_seeded(tokenizer):
    rows = [[f"caption {number}"] for number in range(50)]
    first, again, other = (build(tokenizer, rows, seed=seed) for seed in (1, 1, 2))
    assert texts_of(first) == texts_of(again) != texts_of(other)
    assert first.identity == again.identity
    assert first.identity.fingerprint != other.identity.fingerprint


@settings(max_examples=30)
@given(
    rows=st.lists(st.lists(st.text("abc", min_size=1), min_size=1), min_size=3, max_size=20),
    cuts=st.tuples(st.integers(1, 19), st.integers(1, 19)),
)
def test_captions_of_earlier_generations_come_first_as_they_were(tokenizer, rows, cuts):
    earlier = sorted({cut for cut in cuts if cut < len(rows)})
    whole = build(tokenizer, rows, earlier=earlier, seed=3)
    assert len(whole.earlier) == len(earlier)
    for number, stop in enumerate(earlier):
        before = build(tokenizer, rows[:stop], earlier=earlier[:number], seed=3)
        assert texts_of(whole)[: len(before)] == texts_of(before)
        assert whole.earlier[number] == before.identity
    ids = whole.caption_ids.to_pylist()
    assert [[texts_of(whole)[i] for i in row] for row in ids] == rows
    assert sorted(texts_of(whole)) == sorted({"", *(text for row in rows for text in row)})


def test_each_generation_has_an_order_of_its_own(tokenizer):
    rows = [[f"{number:03d}"] for number in range(100)]
    whole = build(tokenizer, rows, earlier=[50])
    first = [int(text) for text in texts_of(whole)[1:51]]
    second = [int(text) - 50 for text in texts_of(whole)[51:]]
    assert sorted(first) == sorted(second)
    assert first != second != sorted(second)


@settings(max_examples=25)
@given(rows=st.lists(st.lists(st.text("abc ", min_size=1), min_size=1), min_size=1, max_size=20))
def test_every_sample_finds_its_captions_again(tokenizer, rows):
    captions = build(tokenizer, rows)
    found = [[texts_of(captions)[i] for i in row] for row in captions.caption_ids.to_pylist()]
    assert found == rows
    assert len(set(texts_of(captions))) == len(captions)
    assert (captions.num_tokens > 0).all()
    assert all(sequence.dtype == np.int32 for sequence in captions.sequences)


@settings(max_examples=40)
@given(
    rows=st.lists(st.text("ab \u00e9", min_size=1, max_size=9), min_size=1, max_size=12),
    template=st.sampled_from(["{bos}{caption}", "a{caption}b", "{bos}ab{caption}ba{eos}"]),
    max_length=st.integers(7, 12),
)
def test_flat_arrays_hold_what_a_caption_alone_gives(tokenizer, rows, template, max_length):
    """Against the definition: the tokens of one text, its end cut off before the suffix."""
    captions = build(tokenizer, [[row] for row in rows], template, max_length)
    body = template.removeprefix("{bos}").removesuffix("{eos}")
    prefix, suffix = captions.template.prefix_tokens, captions.template.suffix_tokens
    for entry, text in enumerate(texts_of(captions)):
        inner = tokenizer(body.replace("{caption}", text), add_special_tokens=False)["input_ids"]
        whole = [0] * template.startswith("{bos}") + inner + [1] * template.endswith("{eos}")
        cut = max(0, len(whole) - max_length)
        expected = whole[: max_length - len(suffix)] + suffix if cut else whole
        assert captions.sequences[entry].tolist() == expected
        assert captions.num_cut[entry] == cut
        common = next(
            (i for i, (a, b) in enumerate(zip(prefix, expected, strict=False)) if a != b),
            min(len(prefix), len(expected)),
        )
        assert captions.rows.kept[entry] == (common if entry else 0)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no place for it", "exactly once"),
        ("{caption} and {caption}", "exactly once"),
        ("words {bos}{caption}", "only at its start"),
        ("{bos}{eos}{caption}", "only at its end"),
        ("{caption}", "nothing in front"),
        ("{caption}{eos}", "nothing in front"),
    ],
)
def test_templates_that_cannot_work_are_refused(tokenizer, template, message):
    with pytest.raises(InputError, match=message):
        build(tokenizer, [["a"]], template=template)


def test_an_encoder_needs_something_around_the_caption_and_no_sink(tokenizer):
    captions = build(tokenizer, [["a cup"]], template=PRESETS["eos"].text, causal=False)
    assert kept_text(tokenizer, captions, 0) == "</s>"
    assert kept_text(tokenizer, captions, 1) == "a cup</s>"
    assert captions.rows.kept.tolist() == [0, 0]
    assert captions.template.suffix_tokens == [tokenizer.eos_token_id]
    cut = build(tokenizer, [["a cup"]], template=PRESETS["eos"].text, causal=False, max_length=3)
    assert kept_text(tokenizer, cut, 1) == "a </s>"
    with pytest.raises(InputError, match=r"nothing around the caption.*--template eos"):
        build(tokenizer, [["a cup"]], template="{caption}", causal=False)


def test_eos_stands_where_the_tokenizer_of_t5_puts_it():
    tokenizer = t5_tokenizer()
    captions = build(tokenizer, [["a cup"]], template=PRESETS["eos"].text, causal=False)
    for text, sequence in zip(texts_of(captions), captions.sequences, strict=True):
        assert sequence.tolist() == tokenizer(text)["input_ids"]


def test_a_token_that_the_tokenizer_lacks_is_not_made_up():
    tokenizer = t5_tokenizer()
    with pytest.raises(InputError, match="encoder has no BOS token; use --template eos"):
        build(tokenizer, [["a"]], template="{bos}{caption}", causal=False)
    assert build(tokenizer, [["a"]], template="{bos}{caption}").template.prefix_tokens == [1]
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"ends with \{eos\}, but the tokenizer has no EOS"):
        build(tokenizer, [["a"]], template=PRESETS["eos"].text, causal=False)


def t5_tokenizer():
    """Words with a mark in front, and ``</s>`` after the last, as T5's; no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581cup"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


PIPELINES = ["qwen-image", "lumina2", "z-image", "flux2", "flux2-klein"]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_dropped_prefix_is_counted_in_the_tokens_of_the_tokenizer(tokenizer, name):
    """With a token a byte, and again where the markers of chats are tokens of their own."""
    text = PRESETS[name].text
    prefix, suffix = text.removeprefix("{bos}").split("{caption}")
    lead = text.startswith("{bos}")
    captions = build(tokenizer, [["a cup"]], template=text)
    assert captions.rows.kept.tolist() == [0, lead + len(prefix)]
    assert kept_text(tokenizer, captions, 1) == "a cup" + suffix
    assert captions.num_tokens[0] == lead + len(prefix + suffix)
    assert foreign_markers(PRESETS["lumina2"].text, tokenizer) == []
    markers = re.findall(r"<\|\w+\|>|\[/?[A-Z_]+\]", prefix)
    everywhere = foreign_markers(text, tokenizer)
    assert {*markers} <= {*everywhere}
    chat = copy.deepcopy(tokenizer)
    chat.add_special_tokens({"additional_special_tokens": everywhere})
    captions = build(chat, [["a cup"]], template=text)
    assert foreign_markers(text, chat) == []
    fewer = sum(len(marker) - 1 for marker in markers)
    assert captions.rows.kept[1] == lead + len(prefix) - fewer
    assert bool(fewer) == (name != "lumina2")


def test_a_max_length_without_room_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"--max-length 5 leaves no token.*takes 5"):
        build(tokenizer, [["a"]], template="{bos}1234{caption}", max_length=5)
