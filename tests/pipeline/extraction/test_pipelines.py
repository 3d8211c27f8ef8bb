"""Stores made with presets hold the rows that pipelines of diffusers give their networks."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import tiny_tokenizers as tokenizers
import torch
import transformers
from tiny_pipelines import FAMILIES, load_pipeline
from tiny_text_encoders import WIDTH, llm, qwen_vl

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.plan import make_plan
from semroute.pipeline.extraction.requests import CaptionsRequest
from semroute.pipeline.models.llm import Encoder
from semroute.pipeline.text.presets import PRESETS

TEXTS = [
    "a red cup on a table",
    " A Green TREE &amp; a blue car, [IMG] two  zebras \n",
    "\n\na black chair",
    "a small dog, seen from very far above. " * 160,
]
"""Ordinary, in need of cleaning, merging with what is in front of it, and too long."""
TAPS = {"krea2": (1, 3, 5), "hidream": (1, 3, 5, 6)}
"""Layers that the tiny networks read, where these are not those of the real ones."""


@dataclass
class Reference:
    """A pipeline and what its ``encode_prompt`` gives.

    Attributes:
        encoder: its LLM.
        known: rows by text.
    """

    pipe: Any
    name: str
    encoder: Any
    tokenizer: Any
    known: dict[str, torch.Tensor] = field(default_factory=dict)

    def rows(self, text: str) -> torch.Tensor:
        """Rows of the caption that the network reads, base layers in order, ``[T, K, H]``."""
        if text not in self.known:
            self.known[text] = self._rows(text)
        return self.known[text]

    def _rows(self, text: str) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def record(module: Any, args: Any, kwargs: Any) -> None:
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            mask = given.get("attention_mask")
            ids = given["input_ids"]
            seen.append((ids != self.tokenizer.pad_token_id) if mask is None else mask.bool())

        handle = self.encoder.register_forward_pre_hook(record, with_kwargs=True)
        try:
            with torch.inference_mode():
                return getattr(self, "_" + self.name.replace("-", "_").replace(".", "_"))(
                    text, seen
                )
        finally:
            handle.remove()

    def _encode(self, text: str, **options: Any) -> Any:
        return self.pipe.encode_prompt(prompt=[text], device="cpu", **options)

    def _guided(self, text: str, **options: Any) -> Any:
        """Positive and negative outputs; "" is a negative prompt."""
        return self._encode(text or "a", negative_prompt="", **options)

    def _pixart(self, text: str, seen: Any) -> torch.Tensor:
        embeds, mask, negative, negative_mask = self._guided(text, clean_caption=True)
        embeds, mask = (embeds, mask) if text else (negative, negative_mask)
        return embeds[mask.bool()][:, None]

    def _sana(self, text: str, seen: Any) -> torch.Tensor:
        call = inspect.signature(type(self.pipe).__call__).parameters
        lines = call["complex_human_instruction"].default
        embeds, mask, negative, negative_mask = self._guided(text, complex_human_instruction=lines)
        embeds, mask = (embeds, mask) if text else (negative, negative_mask)
        return embeds[mask.bool()][:, None]

    def _wan(self, text: str, seen: Any) -> torch.Tensor:
        embeds, negative = self._guided(text, max_sequence_length=512)
        embeds = embeds if text else negative
        return embeds[embeds.abs().sum(-1) > 0][:, None]

    def _qwen_image(self, text: str, seen: Any) -> torch.Tensor:
        embeds, mask = self._encode(text, max_sequence_length=512)
        return embeds[0][:, None] if mask is None else embeds[mask.bool()][:, None]

    def _lumina2(self, text: str, seen: Any) -> torch.Tensor:
        embeds, mask, negative, negative_mask = self._guided(text)
        embeds, mask = (embeds, mask) if text else (negative, negative_mask)
        return embeds[mask.bool()][:, None]

    def _z_image(self, text: str, seen: Any) -> torch.Tensor:
        return self._encode(text)[0][0][:, None]

    def _flux2(self, text: str, seen: Any) -> torch.Tensor:
        return self._encode(text)[0][seen[0]].unflatten(-1, (3, WIDTH))

    _flux2_klein = _flux2

    def _krea2(self, text: str, seen: Any) -> torch.Tensor:
        embeds, mask = self._encode(text)
        return embeds[mask]

    def _hidream(self, text: str, seen: Any) -> torch.Tensor:
        outputs = self._guided(text)[2 if text else 3]  # [L, B, T, H]
        chosen = outputs[[layer - 1 for layer in TAPS["hidream"]], 0]
        return chosen[:, seen[0 if text else 1][0]].transpose(0, 1)

    def _auraflow(self, text: str, seen: Any) -> torch.Tensor:
        embeds, _, negative, _ = self._guided(text)
        return (embeds if text else negative)[seen[0 if text else 1]][:, None]

    def _sd3(self, text: str, seen: Any) -> torch.Tensor:
        embeds, negative, *_ = self._guided(text, prompt_2=None, prompt_3=None)
        own = (embeds if text else negative)[:, -256:]  # behind those of CLIP
        return own[seen[0 if text else 1]][:, None]

    def _ideogram4(self, text: str, seen: Any) -> torch.Tensor:
        length = 2048 if len(text) > 500 else 64  # the rest is padding, which nobody reads
        embeds, _, _, indicator = self._encode(text, grid_h=1, grid_w=1, max_sequence_length=length)
        from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR

        own = embeds[indicator == LLM_TOKEN_INDICATOR]
        return own.unflatten(-1, (WIDTH, 13)).transpose(1, 2)

    def _fibo(self, text: str, seen: Any) -> torch.Tensor:
        layers = self._encode(text, guidance_scale=1.0)[5]
        return torch.stack([layer[seen[0]] for layer in layers], 1)

    def _ltx2(self, text: str, seen: Any) -> torch.Tensor:
        embeds, mask, negative, negative_mask = self._guided(text)
        embeds, mask = (embeds, mask) if text else (negative, negative_mask)
        return embeds[mask.bool()].unflatten(-1, (WIDTH, -1)).transpose(1, 2)

    def _cosmos(self, text: str, seen: Any) -> torch.Tensor:
        embeds, _ = self._encode(text, do_classifier_free_guidance=False)
        return embeds[seen[0]].unflatten(-1, (-1, WIDTH))

    def _qwen_image_2_1(self, text: str, seen: Any) -> torch.Tensor:
        embeds, mask, _ = self._encode(text)
        return embeds[0][:, None] if mask is None else embeds[mask.bool()][:, None]


def bare(kind: type, **parts: Any) -> Any:
    """A pipeline of which only the text half is there."""
    pipe = object.__new__(kind)
    pipe.__dict__.update(parts)
    return pipe


def ltx2() -> Reference:
    tokenizer = tokenizers.gemma_tokenizer()
    config = llm(tokenizer) | {"sliding_window": 16, "query_pre_attn_scalar": 8}
    model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**config))
    pipe = bare(diffusers.LTX2Pipeline, tokenizer=tokenizer, text_encoder=model)
    return Reference(pipe, "ltx2", model, tokenizer)


def cosmos() -> Reference:
    tokenizer = tokenizers.qwen_tokenizer()
    model = qwen_vl("Qwen2_5_VLForConditionalGeneration", tokenizer)
    kind = diffusers.Cosmos2_5_PredictBasePipeline
    pipe = bare(kind, tokenizer=tokenizer, text_encoder=model)
    return Reference(pipe, "cosmos", model, tokenizer)


def qwen_image_2_1() -> Reference:
    tokenizer = tokenizers.qwen_tokenizer()
    model = qwen_vl("Qwen3VLForConditionalGeneration", tokenizer)
    system, user = PRESETS["qwen-image-2.1"].text.split("{caption}")[0].split("<|im_start|>user")
    pipe = bare(
        diffusers.QwenImage21Pipeline,
        text_encoder=model,
        processor=lambda text, padding, padding_side, return_tensors: tokenizer(
            text, padding=padding, padding_side=padding_side, return_tensors=return_tensors
        ),
        prompt_template_t2i=PRESETS["qwen-image-2.1"].text.replace("{caption}", "{}"),
        _drop_idx=len(tokenizer(system)["input_ids"]),
        _img_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    assert user == "\n"
    return Reference(pipe, "qwen-image-2.1", model, tokenizer)


WITHOUT_NETWORK = {"ltx2": ltx2, "cosmos": cosmos, "qwen-image-2.1": qwen_image_2_1}
"""Pipelines whose networks are not among the tiny ones."""


@pytest.fixture(scope="module", params=[*FAMILIES, *WITHOUT_NETWORK])
def case(request, tiny_pipeline, tmp_path_factory):
    """The pipeline, and where extraction finds its text encoder."""
    name = request.param
    if name in WITHOUT_NETWORK:
        torch.manual_seed(0)
        reference = WITHOUT_NETWORK[name]()
        reference.encoder.eval()
        folder = tmp_path_factory.mktemp(name)
        reference.encoder.save_pretrained(folder)
        reference.tokenizer.save_pretrained(folder)
        return reference, folder
    folder = tiny_pipeline(name)
    pipe = load_pipeline(folder)
    part = PRESETS[name].encoder
    tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
    return Reference(pipe, name, getattr(pipe, part), tokenizer), folder / part


def test_every_pipeline_is_tried():
    named = {name for name, preset in PRESETS.items() if preset.pipelines}
    assert {*FAMILIES, *WITHOUT_NETWORK} == named


def test_rows_are_those_of_the_pipeline(case, tmp_path):
    reference, model = case
    name, preset = reference.name, PRESETS[reference.name]
    file = tmp_path / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    request = CaptionsRequest(source=str(file), model=str(model), template=name)
    plan = make_plan(request)
    num_layers, stored = plan.identity.model.num_layers, plan.identity.layers
    base = TAPS.get(name) or preset.base_layers(num_layers)
    assert {*base} <= {*stored}
    encoder = Encoder(plan.model, stored, "float32", "cpu")
    expected = {text: reference.rows(text) for text in ["", *TEXTS]}
    for entry, text in enumerate(plan.captions.texts.to_pylist()):
        found: list[torch.Tensor] = []
        encoder.encode(
            [plan.captions.sequences[entry]],
            plan.captions.rows.of([entry]),
            lambda _, rows, found=found: found.append(rows),
        )
        rows = torch.stack(found, 1)[:, [stored.index(layer) for layer in base]]
        wanted = expected[text]
        if name == "cosmos":  # which normalises its layers after the LLM
            rows = (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, keepdim=True)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-5 * scale)
        assert 0 < len(rows) == plan.captions.num_tokens[entry]
        assert (plan.captions.num_cut[entry] > 0) == (len(text) > 500 and preset.length <= 1024)


def test_base_layers_are_stored_as_the_pipeline_gives_them(case, tmp_path):
    """But for rounding to bfloat16, whatever the codec loses of the other layers."""
    reference, model = case
    name, preset = reference.name, PRESETS[reference.name]
    file = tmp_path / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[:3]}), file)
    options: dict[str, Any] = (
        {"exact_layers": ",".join(map(str, TAPS[name]))} if name in TAPS else {}
    )
    if preset.reads_all != "no" and name not in TAPS:
        options["codec"] = "bf16"
    store = extract(
        str(file), tmp_path / "store", model=str(model), template=name, workers=0, threads=1,
        report=str, **options,
    )  # fmt: skip
    base = TAPS.get(name) or preset.base_layers(store.manifest.identity.model.num_layers)
    assert options.get("codec") or sorted(base) == [*store.manifest.codec.exact_layers]
    for caption in store:
        wanted = reference.rows(caption.text).numpy()
        found = store.read([caption.caption_id], base).numpy()
        if name == "cosmos":
            found = (found - found.mean(-1, keepdims=True)) / found.std(-1, keepdims=True, ddof=1)
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=2**-8 * scale)
