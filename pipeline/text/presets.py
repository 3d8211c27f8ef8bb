"""Presets: named templates, and all that a pipeline of diffusers does to the text of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...schemas import Cleaning, InputError, TextProcessing
from .templates import special_tokens, split_template
from .tokenization import tokenize

MAX_CHARACTERS = 100_000
"""Longest template that is read from a file."""
DEFAULT_LENGTH = 512
"""Tokens of the longest sequence where no pipeline says otherwise."""
_EVERY_THIRD = tuple(range(2, 36, 3))


@dataclass(frozen=True)
class OtherRows:
    """Rows of text that a network reads besides those of its LLM's layers.

    Attributes:
        encoder: the component of the pipeline as wide as whose hidden states they are.
        rows: how many.
        pooled: one vector per caption, as wide as the encoder's projection.
    """

    encoder: str
    rows: int = 1
    pooled: bool = False


_CLIP = (OtherRows("text_encoder", pooled=True), OtherRows("text_encoder_2", pooled=True))


@dataclass(frozen=True)
class Preset:
    """A named template; for a pipeline, also what else it does to a text, and what it reads.

    The pipelines are those of diffusers 0.42. Positions are counted in the tokens of the LLM's own
    tokenizer wherever it is known; nothing here is an offset.

    Attributes:
        text: the template.
        pipelines: classes of diffusers that put prompts to their LLM this way. Empty: a plain
            template, for which nothing else here applies.
        encoder: the component of the pipeline that is the LLM.
        cleaning: of a caption, see :class:`semroute.schemas.TextProcessing`.
        null: template of the null caption, where it is another one.
        null_tokens: token ids of the null caption, where the pipeline fixes them.
        drops: the part of the text, from its start, whose rows the pipeline drops.
        keeps_first, keeps_last: rows of this part that are read all the same, at its start and at
            its end; a tokenizer that adds BOS has it in front.
        length: rows of the longest caption; rows that are dropped come on top.
        cut: what a caption that is too long loses.
        suffix_apart: whether the suffix is tokenized by itself.
        attends_padding: whether the LLM runs on padded sequences without a mask.
        reads_padding: whether the network reads rows of padding tokens too.
        base: layers that the network reads, in its order: outputs of blocks, 0 for the embedding;
            negative numbers count from the last, -1. Empty: see ``reads_all``.
        reads_all: the network reads all layers; from 0: with the embedding.
        final_norm: how it reads the last layer.
        others: rows of other encoders, and of other layers, that it reads too.
    """

    text: str
    pipelines: tuple[str, ...] = ()
    encoder: str = "text_encoder"
    cleaning: Cleaning = "none"
    null: str | None = None
    null_tokens: tuple[int, ...] = ()
    drops: str = ""
    keeps_first: int = 0
    keeps_last: int = 0
    length: int = DEFAULT_LENGTH
    cut: Literal["caption", "sequence"] = "sequence"
    suffix_apart: bool = False
    attends_padding: bool = False
    reads_padding: bool = False
    base: tuple[int, ...] = ()
    reads_all: Literal["no", "from 0", "from 1"] = "no"
    final_norm: Literal["normed", "raw"] = "normed"
    others: tuple[OtherRows, ...] = ()

    @property
    def needs_conditioning(self) -> bool:
        """Whether its network reads what a store of features does not hold."""
        return self.reads_padding or bool(self.others)

    def base_layers(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of the layers that the network reads, in its order.

        Args:
            num_layers: L, of the LLM. Layer L is taken after the final norm, and L + 1 before it.

        Returns:
            Empty for a plain template, and for an LLM that does not have all of them.
        """
        if self.reads_all != "no":
            layers = [*range(0 if self.reads_all == "from 0" else 1, num_layers + 1)]
        else:
            layers = [layer if layer >= 0 else num_layers + 1 + layer for layer in self.base]
        if any(not 0 <= layer <= num_layers for layer in layers):
            return ()
        raw = self.final_norm == "raw"
        return tuple(num_layers + 1 if raw and layer == num_layers else layer for layer in layers)

    def dropped_rows(self, tokenizer: Any, *, causal: bool) -> tuple[int, int]:
        """First row that the pipeline drops, and the row after the last one.

        BOS (b), three tokens of a part that is dropped (d) and two of a caption (c)::

            row                               0 1 2 3 4 5
            tokens                            b d d d c c
            dropped                           0 to 4
            keeps_first = keeps_last = 1      1 to 3
        """
        if not self.drops:
            return 0, 0
        stop = self._count(tokenizer, self.drops, causal) - self.keeps_last
        return min(self.keeps_first, stop), stop

    def max_length(self, tokenizer: Any, *, causal: bool) -> int:
        """Tokens of the longest sequence, template included."""
        start, stop = self.dropped_rows(tokenizer, causal=causal)
        return self.length + stop - start

    def processing(
        self, name: str, tokenizer: Any, *, causal: bool, keep_prefix: bool | None = None
    ) -> TextProcessing:
        """What is done to captions, for the manifest.

        Args:
            name: of the preset.
            causal: whether a token of the LLM sees only those before it.
            keep_prefix: None: keep the rows that the pipeline keeps. True: keep all. False: drop
                those of the prefix where the pipeline drops none.

        Raises:
            InputError: there is no prefix to keep or to drop.
        """
        _, prefix, _, _ = split_template(self.text)
        null = self.text if self.null is None else self.null
        dropped, dropped_text = self.dropped_rows(tokenizer, causal=causal), self.drops
        if keep_prefix is not None and not prefix:
            raise InputError(
                f"preset {name} has no prefix: leave out --keep-prefix and --drop-prefix"
            )
        if keep_prefix:
            dropped, dropped_text = (0, 0), ""
        elif keep_prefix is False and not self.drops:
            dropped, dropped_text = (0, self._count(tokenizer, prefix, causal)), prefix
        # A null caption without the part that is dropped keeps all of its rows.
        same = not self.null_tokens and null.removeprefix("{bos}").startswith(dropped_text)
        # Padding behind a token changes nothing for it if it cannot see it.
        side = getattr(tokenizer, "padding_side", "right")
        matters = self.attends_padding and not (causal and side == "right")
        return TextProcessing(
            preset=name,
            cleaning=self.cleaning,
            null_text=null,
            null_tokens=list(self.null_tokens),
            dropped_rows=dropped,
            null_dropped_rows=dropped if same else (0, 0),
            cut=self.cut,
            suffix_apart=self.suffix_apart,
            padding=side if matters else None,
        )

    def _count(self, tokenizer: Any, prefix: str, causal: bool) -> int:
        """Tokens of the beginning of a prompt, with what is in front of it."""
        lead, _ = special_tokens(self.text, tokenizer, causal=causal, own=True)
        return len(lead) + len(tokenize(tokenizer, [prefix])[0])


def read_template(name: str) -> Preset:
    """A preset by its name, or the plain template in a file.

    Raises:
        InputError: neither a preset nor a readable file, or not exactly one ``{caption}``.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        with Path(name).open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1).removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--template {name!r} is neither a preset ({', '.join(PRESETS)}) nor a readable text "
            f"file: {error}"
        ) from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"--template {name!r} has more than {MAX_CHARACTERS:,} characters; expected a template"
        )
    split_template(text)
    return Preset(text)


def preset_of(pipeline: str) -> str | None:
    """Name of the preset of a pipeline class; None where there is none."""
    found = [name for name, preset in PRESETS.items() if pipeline in preset.pipelines]
    return found[0] if found else None


def check_base(preset: str, num_layers: int, layers: Sequence[int]) -> str:
    """A warning if an LLM lacks layers that a preset's network reads, or "".

    Args:
        num_layers: of the LLM.
        layers: those to be stored.
    """
    base = PRESETS[preset].base_layers(num_layers)
    if not base and PRESETS[preset].pipelines:
        return (
            f"the pipeline of preset {preset} reads layers "
            f"{', '.join(map(str, PRESETS[preset].base))} of its LLM; this one has {num_layers}"
        )
    missing = sorted({*base} - {*layers})
    if missing:
        return (
            f"the pipeline of preset {preset} reads layers {', '.join(map(str, missing))} too, "
            "which are not to be stored"
        )
    return ""


_QWEN_IMAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
_QWEN_IMAGE_2 = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
_SANA = "\n".join(
    [
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
        "descriptions suitable for image generation. Evaluate the level of detail in the user "
        "prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
        "textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly "
        "without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
        "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
        "flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
        "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
        "double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including "
        "any additional commentary or evaluations:",
        "User Prompt: ",
    ]
)
_USER = "<|im_start|>user\n{caption}<|im_end|>\n"
_ASSISTANT = "<|im_start|>assistant\n"

PRESETS = {
    "bos": Preset("{bos}{caption}"),
    "eos": Preset("{caption}{eos}"),
    "describe": Preset("{bos}Describe this image. {caption}"),
    "paper": Preset("Describe this image.{caption}"),
    "qwen-image": Preset(
        f"{_QWEN_IMAGE}{{caption}}<|im_end|>\n{_ASSISTANT}",
        pipelines=("QwenImagePipeline",),
        drops=_QWEN_IMAGE,
        base=(-1,),
    ),
    "lumina2": Preset(
        "{bos}You are an assistant designed to generate superior images with the superior degree "
        "of image-text alignment based on textual prompts or user prompts. <Prompt Start> "
        "{caption}",
        pipelines=("Lumina2Pipeline",),
        null="{bos}{caption}",
        length=256,
        base=(-2,),
    ),
    "z-image": Preset(f"{_USER}{_ASSISTANT}", pipelines=("ZImagePipeline",), base=(-2,)),
    "flux2": Preset(
        "{bos}[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give "
        "structured responses focusing on object relationships, object\nattribution and actions "
        "without speculation.[/SYSTEM_PROMPT][INST]{caption}[/INST]",
        pipelines=("Flux2Pipeline",),
        cleaning="no_images",
        reads_padding=True,
        base=(10, 20, 30),
    ),
    "flux2-klein": Preset(
        f"{_USER}{_ASSISTANT}<think>\n\n</think>\n\n",
        pipelines=("Flux2KleinPipeline",),
        reads_padding=True,
        base=(9, 18, 27),
    ),
    "pixart": Preset(
        "{caption}{eos}",
        pipelines=("PixArtSigmaPipeline",),
        cleaning="clean_caption",
        length=300,
        base=(-1,),
    ),
    "sana": Preset(
        f"{{bos}}{_SANA}{{caption}}",
        pipelines=("SanaPipeline",),
        cleaning="lower_strip",
        null="{bos}{caption}",
        drops=_SANA,
        keeps_first=1,
        keeps_last=1,
        length=300,
        base=(-1,),
    ),
    "wan": Preset("{caption}{eos}", pipelines=("WanPipeline",), cleaning="fix_text", base=(-1,)),
    "krea2": Preset(
        f"{_QWEN_IMAGE}{{caption}}<|im_end|>\n{_ASSISTANT}",
        pipelines=("Krea2Pipeline",),
        drops=_QWEN_IMAGE,
        cut="caption",
        suffix_apart=True,
        base=_EVERY_THIRD,
    ),
    "hidream": Preset(
        "{bos}{caption}",
        pipelines=("HiDreamImagePipeline",),
        encoder="text_encoder_4",
        length=128,
        reads_padding=True,
        reads_all="from 1",
        others=(OtherRows("text_encoder_3", rows=128), *_CLIP),
    ),
    "sd3": Preset(
        "{caption}{eos}",
        pipelines=("StableDiffusion3Pipeline",),
        encoder="text_encoder_3",
        length=256,
        attends_padding=True,
        reads_padding=True,
        base=(-1,),
        others=(OtherRows("text_encoder_3", rows=77), *_CLIP),  # CLIP's are padded to T5's width
    ),
    "auraflow": Preset("{caption}{eos}", pipelines=("AuraFlowPipeline",), length=256, base=(-1,)),
    "ideogram4": Preset(
        f"{_USER}{_ASSISTANT}",
        pipelines=("Ideogram4Pipeline",),
        length=2_048,
        base=(1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36),
        final_norm="raw",
    ),
    "ltx2": Preset(
        "{bos}{caption}",
        pipelines=("LTX2Pipeline",),
        cleaning="strip",
        length=1_024,
        reads_all="from 0",
    ),
    "cosmos": Preset(
        "<|im_start|>system\nYou are a helpful assistant who will provide prompts to an image "
        f"generator.<|im_end|>\n{_USER}",
        pipelines=("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"),
        attends_padding=True,
        reads_padding=True,
        reads_all="from 1",
    ),
    "fibo": Preset(
        "{caption}",
        pipelines=("BriaFiboPipeline",),
        null_tokens=(128_000,),
        length=3_000,
        reads_all="from 0",
    ),
    "qwen-image-2.1": Preset(
        f"{_QWEN_IMAGE_2}{_USER}{_ASSISTANT}",
        pipelines=("QwenImage21Pipeline",),
        null=f"{_QWEN_IMAGE_2}{_USER}{_ASSISTANT}".replace("{caption}", " {caption}"),
        drops=_QWEN_IMAGE_2,
        length=4_096,
        base=(-1,),
        final_norm="raw",
    ),
}
"""By name. ``eos``: as T5 was trained. ``paper``: as in the reference code of arXiv 2602.03510, no
space, no BOS. From ``qwen-image`` on: as the pipelines of diffusers put a prompt to their LLM, with
the chat template written out. ``{bos}`` and ``{eos}`` stand for what the LLM's tokenizer itself
adds in front and behind, where it adds anything.

Lengths are the defaults of a call of the pipeline. ``Ideogram4Pipeline`` refuses longer prompts,
and ``QwenImage21Pipeline`` cuts none."""
