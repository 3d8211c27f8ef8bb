import ast
import importlib.util
import inspect
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semroute.pipeline.text.captions import StoredRows, build_captions
from semroute.pipeline.text.cleaning import cleaner
from semroute.pipeline.text.presets import PRESETS, check_base, preset_of, read_template
from semroute.pipeline.text.tokenization import RaggedTokens, added_tokens
from semroute.schemas import InputError

OF_PIPELINES = [name for name, preset in PRESETS.items() if preset.pipelines]


def make_tokenizer(bos=True, eos=False, padding_side="right"):
    """A token for each byte, but for one for ``end of text``; it adds BOS and EOS itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | {b: i + 3 for i, b in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> " * bos + "$A" + " </s>" * eos, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
    )


def build(name, tokenizer, texts, *, causal=True, keep_prefix=None, max_length=None):
    preset = PRESETS[name]
    return build_captions(
        pa.array([[text] for text in texts], pa.list_(pa.string())),
        tokenizer,
        template=preset.text,
        max_length=max_length or preset.max_length(tokenizer, causal=causal),
        processing=preset.processing(name, tokenizer, causal=causal, keep_prefix=keep_prefix),
        causal=causal,
    )


def stored(tokenizer, captions, text):
    """Words of the stored rows of a caption."""
    entry = captions.texts.to_pylist().index(text)
    (rows,) = captions.rows.of([entry])
    tokens = captions.sequences[entry][rows]
    assert captions.num_tokens[entry] == len(rows)
    part = slice(entry, entry + 1)
    assert captions.rows[part].tokens(captions.sequences[part])[0].tolist() == tokens.tolist()
    return tokenizer.decode(tokens.tolist())


class TestRows:
    """Rows that each pipeline reads, by hand, for a tokenizer that adds BOS."""

    def test_sana_keeps_bos_and_rows_from_the_last_token_of_its_instruction(self):
        tokenizer, instruction = make_tokenizer(), PRESETS["sana"].drops
        captions = build("sana", tokenizer, ["A Red CUP "])
        assert stored(tokenizer, captions, "A Red CUP ") == "<s>" + " " + "a red cup"
        assert stored(tokenizer, captions, "") == "<s>"
        number = len(tokenizer.encode(instruction))
        assert captions.template.processing.dropped_rows == (1, number - 1)
        (rows,) = captions.rows.of([1])
        assert rows[:2].tolist() == [0, number - 1]
        long = build("sana", tokenizer, ["b" * 400])
        assert long.num_tokens.tolist() == [1, 300]
        assert long.sequence_lengths[1] == number + 300 - 2

    def test_qwen_image_counts_rows_and_cuts_its_suffix(self):
        tokenizer = make_tokenizer(bos=False)
        suffix = "<|im_end|>\n<|im_start|>assistant\n"
        captions = build("qwen-image", tokenizer, ["a cup", "b" * 600])
        assert stored(tokenizer, captions, "a cup") == "a cup" + suffix
        assert stored(tokenizer, captions, "") == suffix
        assert stored(tokenizer, captions, "b" * 600) == "b" * 512
        assert captions.num_cut.max() == 600 + len(suffix) - 512

    def test_krea2_keeps_its_suffix_when_it_cuts(self):
        tokenizer = make_tokenizer(bos=False)
        suffix = "<|im_end|>\n<|im_start|>assistant\n"
        captions = build("krea2", tokenizer, ["b" * 600])
        assert stored(tokenizer, captions, "b" * 600) == "b" * (512 - len(suffix)) + suffix
        assert stored(tokenizer, captions, "") == suffix

    @pytest.mark.parametrize("name", ["lumina2", "z-image", "flux2", "flux2-klein", "cosmos"])
    def test_these_read_their_prefix(self, name):
        bos = name == "lumina2"
        tokenizer = make_tokenizer(bos=bos)
        captions = build(name, tokenizer, ["a cup"])
        text = PRESETS[name].text.replace("{bos}", "<s>")
        assert stored(tokenizer, captions, "a cup") == text.replace("{caption}", "a cup")
        null = "<s>" if bos else text.replace("{caption}", "")
        assert stored(tokenizer, captions, "") == null

    def test_qwen_image_2_1_drops_its_system_message_and_reads_a_blank_for_no_prompt(self):
        tokenizer = make_tokenizer(bos=False)
        captions = build("qwen-image-2.1", tokenizer, ["a cup"])
        user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        assert stored(tokenizer, captions, "a cup") == user.format("a cup")
        assert stored(tokenizer, captions, "") == user.format(" ")

    @pytest.mark.parametrize(
        ("name", "length"), [("pixart", 300), ("wan", 512), ("auraflow", 256), ("sd3", 256)]
    )
    def test_t5_has_eos_behind_and_keeps_it(self, name, length):
        tokenizer = make_tokenizer(bos=False, eos=True)
        captions = build(name, tokenizer, ["a cup", "b" * 600], causal=False)
        assert stored(tokenizer, captions, "a cup") == "a cup</s>"
        assert stored(tokenizer, captions, "") == "</s>"
        assert stored(tokenizer, captions, "b" * 600) == "b" * (length - 1) + "</s>"

    def test_what_the_tokenizer_adds_counts_more_than_the_template(self):
        tokenizer = make_tokenizer(bos=True, eos=True)
        assert added_tokens(tokenizer) == ([0], [1])
        captions = build("auraflow", tokenizer, ["a cup"], causal=False)
        assert stored(tokenizer, captions, "a cup") == "<s>a cup</s>"

    def test_fibo_has_a_null_caption_of_one_fixed_token(self):
        tokenizer = make_tokenizer(bos=False)
        with pytest.raises(
            InputError, match=r"fibo is the tokens \[128000\], .* not have: the preset"
        ):
            build("fibo", tokenizer, ["a cup"])
        tokenizer.add_tokens([f"<extra {number}>" for number in range(128_001 - len(tokenizer))])
        captions = build("fibo", tokenizer, ["a cup"])
        assert captions.sequences[0].tolist() == [128_000]
        assert stored(tokenizer, captions, "a cup") == "a cup"


class TestPadding:
    """SD3 runs T5 on padded prompts without a mask; so does Cosmos its LLM."""

    def test_t5_sees_padding_that_is_not_stored(self):
        tokenizer = make_tokenizer(bos=False, eos=True)
        captions = build("sd3", tokenizer, ["a cup"], causal=False)
        assert captions.sequence_lengths.tolist() == [256, 256]
        assert captions.num_tokens.tolist() == [1, len("a cup") + 1]
        assert (captions.sequences[1][6:] == tokenizer.pad_token_id).all()

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_a_causal_llm_is_spared_padding_that_it_cannot_see(self, side):
        tokenizer = make_tokenizer(bos=False, padding_side=side)
        captions = build("cosmos", tokenizer, ["a cup"])
        text = PRESETS["cosmos"].text.replace("{caption}", "a cup")
        assert stored(tokenizer, captions, "a cup") == text
        expected = len(text) if side == "right" else 512
        assert captions.sequence_lengths[1] == expected
        (rows,) = captions.rows.of([1])
        assert rows[0] == expected - len(text)


class TestOptions:
    def test_a_prefix_that_the_pipeline_drops_can_be_kept(self):
        tokenizer = make_tokenizer(bos=False)
        captions = build("qwen-image", tokenizer, ["a cup"], keep_prefix=True)
        text = PRESETS["qwen-image"].text.replace("{caption}", "a cup")
        assert stored(tokenizer, captions, "a cup") == text

    def test_a_prefix_that_the_pipeline_reads_can_be_dropped(self):
        tokenizer = make_tokenizer()
        captions = build("lumina2", tokenizer, ["a cup"], keep_prefix=False)
        assert stored(tokenizer, captions, "a cup") == "a cup"
        assert stored(tokenizer, captions, "") == "<s>"

    @pytest.mark.parametrize("keep_prefix", [True, False])
    def test_without_a_prefix_there_is_nothing_to_decide(self, keep_prefix):
        with pytest.raises(InputError, match="pixart has no prefix: leave out --keep-prefix"):
            build("pixart", make_tokenizer(False, True), ["a"], keep_prefix=keep_prefix)

    def test_a_length_without_room_for_the_caption_is_refused(self):
        with pytest.raises(InputError, match="--max-length 20 leaves no token"):
            build("z-image", make_tokenizer(False), ["a"], max_length=20)


@pytest.mark.parametrize(
    ("cleaning", "text", "expected"),
    [
        ("none", " A  cup\n", " A  cup\n"),
        ("strip", " A  cup\n", "A  cup"),
        ("lower_strip", " A  Cup\n", "a  cup"),
        ("no_images", "a [IMG]cup", "a cup"),
        ("clean_caption", " A red_Cup!! see www.cups.com x.png", "a red_cup!! see"),
        ("clean_caption", "cup.png", ""),
        ("fix_text", " a  cup &amp;amp; caf\u00c3\u00a9 \n", "a cup & caf\u00e9"),
    ],
)
def test_texts_are_cleaned(cleaning, text, expected):
    assert cleaner(cleaning)(text) == expected


@settings(max_examples=100)
@given(text=st.text(max_size=40))
def test_texts_are_cleaned_as_the_pipelines_do(text):
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert cleaner("fix_text")(text) == prompt_clean(text)
    pixart = object.__new__(PixArtSigmaPipeline)
    assert [cleaner("lower_strip")(text)] == pixart._text_preprocessing(text)
    call = inspect.signature(PixArtSigmaPipeline.__call__)
    assert call.parameters["clean_caption"].default is True


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    lead=st.integers(0, 2),
)
def test_stored_rows_are_those_of_their_definition(lengths, seed, lead):
    rng = np.random.default_rng(seed)
    ends = np.cumsum([0, *lengths])
    sequences = RaggedTokens(np.arange(ends[-1], dtype=np.int32), ends)
    kept = np.array([rng.integers(0, n + 1) for n in lengths])
    stops = np.array([rng.integers(k, n + 1) for k, n in zip(kept, lengths, strict=True)])
    rows = StoredRows(kept, stops, lead)
    tokens = rows.tokens(sequences)
    for entry in range(len(lengths)):
        numbers = [*range(min(lead, kept[entry])), *range(kept[entry], stops[entry])]
        assert rows.of([entry])[0].tolist() == numbers
        assert tokens[entry].tolist() == [ends[entry] + number for number in numbers]
        assert rows.counts[entry] == len(numbers)
    for side in ("left", "right"):
        padded = sequences.padded(5, -1, side)
        for entry, length in enumerate(lengths):
            fill = [-1] * max(0, 5 - length)
            whole = sequences[entry].tolist()
            expected = fill + whole if side == "left" else whole + fill
            assert padded[entry].tolist() == expected


class TestBase:
    @pytest.mark.parametrize(
        ("name", "num_layers", "expected"),
        [
            ("bos", 12, ()),
            ("pixart", 24, (24,)),
            ("z-image", 36, (35,)),
            ("flux2", 40, (10, 20, 30)),
            ("flux2", 12, ()),
            ("krea2", 36, (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)),
            ("ideogram4", 36, (1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37)),
            ("ideogram4", 40, (1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36)),
            ("qwen-image-2.1", 36, (37,)),
            ("ltx2", 3, (0, 1, 2, 3)),
            ("cosmos", 3, (1, 2, 3)),
        ],
    )
    def test_layers_by_number(self, name, num_layers, expected):
        assert PRESETS[name].base_layers(num_layers) == expected

    def test_layers_that_are_missing_are_named(self):
        assert check_base("flux2", 12, range(1, 13)) == (
            "the pipeline of preset flux2 reads layers 10, 20, 30 of its LLM; this one has 12"
        )
        assert "reads layers 20 too" in check_base("flux2", 40, [10, 30, 40])
        assert check_base("flux2", 40, range(1, 41)) == ""
        assert check_base("bos", 40, [3]) == ""


def source(file):
    (root,) = importlib.util.find_spec("diffusers").submodule_search_locations
    return (Path(root) / "pipelines" / file).read_text("utf-8")


def constants(file):
    tree = ast.parse(source(file))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


class TestAgainstDiffusers:
    """Against the source; the chat templates come with the models."""

    def test_texts(self):
        texts = {name: preset.text for name, preset in PRESETS.items()}
        assert {texts["qwen-image"].replace("{caption}", "{}"), 34} <= constants(
            "qwenimage/pipeline_qwenimage.py"
        )
        prefix, suffix = texts["krea2"].split("{caption}")
        assert {prefix, suffix, 34, 5} <= constants("krea2/pipeline_krea2.py")
        system, marker = texts["lumina2"].removeprefix("{bos}").split(" <")
        assert {system, " <" + marker.removesuffix("{caption}")} <= constants(
            "lumina2/pipeline_lumina2.py"
        )
        message = texts["flux2"].split("[SYSTEM_PROMPT]")[1].split("[/SYSTEM_PROMPT]")[0]
        assert message in constants("flux2/system_messages.py")
        message = texts["cosmos"].split("system\n")[1].split("<|im_end|>")[0]
        assert message in constants("cosmos/pipeline_cosmos2_5_predict.py")
        assert message in constants("cosmos/pipeline_cosmos2_5_transfer.py")
        message = texts["qwen-image-2.1"].split("system\n")[1].split("<|im_end|>")[0]
        assert message in constants("qwenimage21/pipeline_qwenimage21.py")
        assert 128_000 in constants("bria_fibo/pipeline_bria_fibo.py")

    def test_the_instruction_of_sana(self):
        import diffusers

        call = inspect.signature(diffusers.SanaPipeline.__call__)
        lines = call.parameters["complex_human_instruction"].default
        assert "\n".join(lines) == PRESETS["sana"].drops
        assert call.parameters["clean_caption"].default is False

    @pytest.mark.parametrize("name", sorted({*OF_PIPELINES} - {"qwen-image-2.1"}))
    def test_lengths_are_those_of_a_call(self, name):
        import diffusers

        for pipeline in PRESETS[name].pipelines:
            call = inspect.signature(getattr(diffusers, pipeline).__call__)
            assert call.parameters["max_sequence_length"].default == PRESETS[name].length
            assert preset_of(pipeline) == name

    @pytest.mark.parametrize("name", ["flux2", "flux2-klein"])
    def test_taps_of_flux2(self, name):
        import diffusers

        (pipeline,) = PRESETS[name].pipelines
        call = inspect.signature(getattr(diffusers, pipeline).__call__)
        assert call.parameters["text_encoder_out_layers"].default == PRESETS[name].base

    def test_taps_of_ideogram_and_krea(self):
        from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

        blocks = [layer + 1 for layer in QWEN3_VL_ACTIVATION_LAYERS]  # outputs of blocks, from 0
        assert list(PRESETS["ideogram4"].base) == blocks
        assert str(PRESETS["krea2"].base) in source("krea2/pipeline_krea2.py")

    def test_presets_are_what_is_known_of_the_pipelines_elsewhere(self):
        """In the table by which their own ``encode_prompt`` is run."""
        from semroute.pipeline.models.text_recipes import RECIPES

        for pipeline, recipe in RECIPES.items():
            preset = PRESETS[preset_of(pipeline)]
            assert PRESETS[recipe.family] is preset
            assert recipe.encoder == preset.encoder
            assert recipe.reads_padding == preset.reads_padding
            assert recipe.final_norm == preset.final_norm
            layers = recipe.layers(36, {})
            if preset.final_norm == "raw":
                layers = [37 if layer == 36 else layer for layer in layers]
            assert tuple(layers) == preset.base_layers(36)

    def test_every_encoder_is_a_component(self):
        import diffusers

        for name in OF_PIPELINES:
            for pipeline in PRESETS[name].pipelines:
                kind = getattr(diffusers, pipeline)
                assert PRESETS[name].encoder in inspect.signature(kind.__init__).parameters


def test_templates_come_from_presets_or_files(tmp_path):
    assert read_template("bos") is PRESETS["bos"]
    (tmp_path / "mine.txt").write_text("{bos}An image of {caption}\n")
    mine = read_template(str(tmp_path / "mine.txt"))
    assert (mine.text, mine.pipelines) == ("{bos}An image of {caption}", ())
    message = r"neither a preset \(bos, eos, .*qwen-image-2\.1\) nor a readable"
    with pytest.raises(InputError, match=message):
        read_template("nonsense")
    (tmp_path / "bad.txt").write_text("no place")
    with pytest.raises(InputError, match="exactly once"):
        read_template(str(tmp_path / "bad.txt"))
    with pytest.raises(InputError, match="more than 100,000 characters"):
        read_template("/dev/zero")
    assert preset_of("NoSuchPipeline") is None
