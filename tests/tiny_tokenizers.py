"""Tokenizers of the classes that diffusers pipelines load, trained on the words below.

A word of ``CORPUS`` is one token, so that a template has the number of tokens that its pipeline
counts on (Qwen-Image and Krea 2 drop 34); other words fall apart into letters or bytes.
"""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import diffusers
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
)

SANA_INSTRUCTION: list[str] = (
    inspect.signature(diffusers.SanaPipeline.__call__)
    .parameters["complex_human_instruction"]
    .default
)
CORPUS = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n\n",
    "\n".join(SANA_INSTRUCTION),
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start> a",
    SYSTEM_MESSAGE,
    "a red cup, a green tree. a blue car on a table, the white bird in the snow, a black chair at "
    "night, a yellow box, a clock, a small dog, seen from very far above",
)
_GPT2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{ message.content }}"
    "{%- else %}{%- for part in message.content %}{{ part.text }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
_MISTRAL_CHAT = (
    "{{ bos_token }}{%- for message in messages %}"
    "{%- set open, close = ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]') if message.role == 'system' "
    "else ('[INST]', '[/INST]') %}"
    "{{ open }}{%- for part in message.content %}{{ part.text }}{%- endfor %}{{ close }}"
    "{%- endfor %}"
)


def qwen_tokenizer() -> Any:
    """Byte-level BPE with the ChatML markers of Qwen; no BOS, padded on the right."""
    vocabulary, merges = _train(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, padding_side="right", chat_template=_QWEN_CHAT
    )
    vision = ("vision_start", "vision_end", "image_pad", "video_pad")
    marks = [f"<|{word}|>" for word in ("im_start", "im_end", *vision)]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    return tokenizer


def llama3_tokenizer() -> Any:
    """Byte-level BPE of Llama 3; <|begin_of_text|> comes first."""
    tokenizer = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
    )


def smollm3_tokenizer() -> Any:
    """The words of Llama 3, without BOS; its two special tokens have their real numbers, of which
    the pipeline of FIBO writes the first, 128000, by itself."""
    special = {"<|begin_of_text|>": 128_000, "<|end_of_text|>": 128_001}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level([], special),
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
    )


def mistral_tokenizer() -> Any:
    """Byte-level BPE with the markers of Mistral Small 3, padded on the left."""
    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer = _byte_level(
        ["<unk>", "<s>", "</s>", "<pad>", *marks, "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=_MISTRAL_CHAT,
    )


def gemma_tokenizer() -> Any:
    """BPE on text with ▁ for spaces and bytes for what it does not know; <bos> comes first."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary, merges = _sentence_pieces(special)
    return GemmaTokenizer(vocab=vocabulary, merges=merges, padding_side="right", add_bos_token=True)


def pile_t5_tokenizer() -> Any:
    """The tokenizer of Llama 2, with </s> at the end and nothing in front, as Pile-T5 has it."""
    vocabulary, merges = _sentence_pieces(["<unk>", "<pad>", "</s>", "<s>"])
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token="<pad>",
        padding_side="right",
        add_bos_token=False,
        add_eos_token=True,
    )


def t5_tokenizer(max_length: int = 512) -> Any:
    """Unigram pieces with </s> at the end: words, else letters."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0}
    scores |= dict.fromkeys(map(chr, range(33, 127)), -8.0)
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    texts = [text for line in CORPUS for text in (line, line.lower())]
    for word in sorted(_words(pre_tokenizers.Sequence(split), texts)):
        scores.setdefault(word, -4.0)
        scores.setdefault(f"▁{word}", -3.0)
    return T5Tokenizer(vocab=list(scores.items()), extra_ids=0, model_max_length=max_length)


def clip_tokenizer(max_length: int = 77) -> Any:
    """Byte-level BPE on lower-case words."""
    ends = [f"{byte}</w>" for byte in sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary, merges = _train(
        CLIPTokenizer().backend_tokenizer.pre_tokenizer,
        texts=map(str.lower, CORPUS),
        special=[*ends, "<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
    )
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def _byte_level(special: list[str], numbered: Mapping[str, int] | None = None) -> Tokenizer:
    """``special`` tokens come first; ``numbered`` ones have the numbers given."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GPT2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary, merges = _train(split, special=special)
    tokenizer = Tokenizer(models.BPE(vocabulary | (numbered or {}), merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special, *(numbered or {})])
    return tokenizer


def _sentence_pieces(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE in which no merge crosses a space or a punctuation mark."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split(Regex(r"[^\p{L}▁]"), "isolated"),
        ]
    )
    return _train(
        split,
        texts=[text.replace(" ", "▁") for line in CORPUS for text in (line, line.lower())],
        special=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁", *map(chr, range(33, 127))],
    )


def _words(split: Any, texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word, _ in split.pre_tokenize_str(text)}


def _train(
    split: Any, texts: Iterable[str] = CORPUS, special: Sequence[str] = (), **options: Any
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that make one token of every word that ``split`` finds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    options.setdefault("initial_alphabet", sorted(pre_tokenizers.ByteLevel.alphabet()))
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, show_progress=False, special_tokens=list(special), **options
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
