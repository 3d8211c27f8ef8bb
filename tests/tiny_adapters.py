"""What semroute and a pipeline of diffusers make of the same captions: features, what the pipeline
gives its transformer, and what its scheduler gets back.

Shapes: B batch, C channels, h x w latent, T text rows.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR
from tiny_pipelines import load_pipeline, run_size
from torch import Tensor

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.text.presets import PRESETS
from semroute.schemas import ModelConfig, RoutingConfig
from semroute.trainer.adapters.pretrained import Pretrained, find_pretrained, load_transformer
from semroute.trainer.adapters.routed import Routed

FAMILIES = (
    *("pixart", "sana", "wan", "sd3", "qwen-image", "auraflow", "flux2", "flux2-klein"),
    *("lumina2", "z-image", "krea2", "ideogram4", "hidream", "fibo"),
)
CONDITIONED = ("sd3", "flux2", "flux2-klein", "hidream")
"""Families whose base rows come from a conditioning store."""
CAPTIONS = ("a red cup", "a green tree, in the snow", "Two birds")
PROMPT = CAPTIONS[0]
_PLAIN: dict[str, dict[str, Any]] = {
    "qwen-image": {},
    "krea2": {"guidance_scale": 0.0},
    "z-image": {"guidance_scale": 0.0},
    "flux2": {"guidance_scale": 3.5},
}
"""Arguments without guidance, other than ``guidance_scale=1``."""
_GUIDED: dict[str, dict[str, Any]] = {
    "qwen-image": {"negative_prompt": ""},
    "flux2": {"guidance_scale": 3.5},
}
_PACKED = ("qwen-image", "krea2")
_ONE_PIXEL = ("flux2", "flux2-klein", "ideogram4")
"""Families whose VAE packs."""
_BY_TOKEN = (*_ONE_PIXEL, "fibo")
"""Families with a token per latent pixel."""
_CLIP_ROWS = 77


@dataclass(frozen=True)
class TinyFamily:
    """A tiny pipeline and the features of ``CAPTIONS``, extracted with the preset of its family."""

    name: str
    folder: Path
    store: FeatureStore

    @classmethod
    def make(cls, name: str, pipeline: Path, folder: Path) -> "TinyFamily":
        captions = folder / "captions.parquet"
        pyarrow.parquet.write_table(pa.table({"text": CAPTIONS}), captions)
        store = extract(
            str(captions),
            folder / "features",
            model=str(pipeline / PRESETS[name].encoder),
            template=name,
            codec="bf16",
            workers=0,
            threads=1,
            report=lambda _line: None,
        )
        return cls(name, pipeline, store)

    @property
    def texts(self) -> list[str]:
        """By entry of the store; the first is the null caption."""
        return self.store.captions["text"].to_pylist()

    def entry(self, text: str = PROMPT) -> int:
        return self.texts.index(text)

    def num_rows(self, entry: int) -> int:
        return self.store.captions["num_tokens"][entry].as_py()

    @cached_property
    def pretrained(self) -> Pretrained:
        return find_pretrained(str(self.folder))

    @cached_property
    def base_layers(self) -> Sequence[int]:
        """What its network reads."""
        num_layers = self.store.manifest.identity.model.num_layers
        found = self.pretrained
        return found.family.base_layers(num_layers, found.index, found.config)

    def routed(
        self,
        train: str = "router",
        dtype: str = "float32",
        layers: Sequence[int] | None = None,
        **routing: Any,
    ) -> Routed:
        """A new network on the weights as they were loaded.

        Args:
            layers: in the store; by default those that are.
        """
        config = ModelConfig(
            kind="pretrained",
            pretrained=str(self.folder),
            train=train,
            dtype=dtype,
            **({"lora": {"rank": 2}} if "lora" in train else {}),
        )
        found, llm = self.pretrained, self.store.manifest.identity.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Routed(
                copy.deepcopy(_transformer(found.name, dtype)),
                found.family,
                config,
                RoutingConfig(**{"weights": "signed"} | routing),
                layers=layers or self.store.layers,
                base_layers=[*self.base_layers],
                num_llm_layers=llm.num_layers,
                text_width=llm.width,
                latent_shape=self.latent_shape,
            )

    @property
    def record_shape(self) -> tuple[int, int, int]:
        """Latents of :meth:`record`."""
        return (4, 128, 128) if self.name == "hidream" else self.latent_shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        if self.name == "hidream":
            return 4, 16, 16
        return (16, 4, 4) if self.name in _ONE_PIXEL else (4, 8, 8)

    def text(self, network: Routed, entries: Sequence[int]) -> dict[str, Any]:
        """Arguments of ``Routed.forward`` for a batch of captions, each read once."""
        unique = sorted({*entries})
        rows = self.store.read(unique, network.router.layers_read)
        given = self.conditioning() if self.name in CONDITIONED else None
        return {
            "hidden": rows.tensor(),
            "offsets": torch.from_numpy(rows.offsets),
            "caption": torch.tensor([unique.index(entry) for entry in entries]),
            "conditioning": given and {name: value[unique] for name, value in given.items()},
        }

    def inputs(self, network: Routed, entries: Sequence[int], seed: int = 0) -> dict[str, Any]:
        """The same with random x_t, and t between 0 and 1."""
        generator = torch.Generator().manual_seed(seed)
        x_t = torch.randn((len(entries), *self.latent_shape), generator=generator)
        t = torch.rand(len(entries), generator=generator)
        return {"x_t": x_t, "t": t, **self.text(network, entries)}

    def conditioning(self) -> dict[str, Tensor]:
        """What the pipeline's own ``encode_prompt`` gives for all entries, by name, as a
        conditioning store has it: [entries, ...], and the mask of the captions' own rows."""
        if self.name not in _CONDITIONING:
            pipe = load_pipeline(self.folder)
            each = [_encode(self.name, pipe, text) for text in self.texts]
            _CONDITIONING[self.name] = {n: torch.cat([e[n] for e in each]) for n in each[0]}
        return _CONDITIONING[self.name]

    def record(self, *, guided: bool, steps: int = 3, **arguments: Any) -> "list[Step]":
        """Run the pipeline for ``PROMPT``, and watch its transformer and its scheduler.

        Rows of text that come from features are rounded as in the store: each is checked to be
        within that rounding, then replaced by it.
        """
        pipe = load_pipeline(self.folder)
        step = pipe.scheduler.step
        seen = [Step()]

        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            bound = _signature(pipe.transformer).bind(pipe.transformer, *args, **kwargs)
            seen[-1].calls.append(Call(self._snap(bound.arguments)))
            return bound.args[1:], bound.kwargs

        def after(_module: Any, _args: Any, output: Any) -> None:
            seen[-1].calls[-1].output = _stack(output[0])

        def watched(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kw: Any):
            seen[-1].told = float(timestep)
            seen[-1].x_t = spread(self.name, sample)
            seen[-1].model_output = spread(self.name, model_output)
            seen.append(Step())
            return step(model_output, timestep, sample, *args, **kw)

        pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
        pipe.transformer.register_forward_hook(after)
        pipe.scheduler.step = watched
        switch = _GUIDED if guided else _PLAIN
        arguments = {
            **(switch.get(self.name, {} if guided else {"guidance_scale": 1.0})),
            **arguments,
        }
        if self.name == "wan":
            arguments["num_frames"] = 1
        pipe(
            prompt=PROMPT,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **run_size(self.name) | arguments,
        )
        return seen[:-1]

    def _snap(self, given: dict[str, Any]) -> list[int]:
        """Entries of a batch, whose rows are replaced by those of the store."""
        if self.name in CONDITIONED:
            return [self._find(text) for text in _rows_of(self.name, given)]
        text, entries = given[_text_argument(self.name)], []
        for number, rows in enumerate(_rows_of(self.name, given)):
            entry = next(e for e in (0, self.entry()) if self.num_rows(e) == len(rows))
            stored = self.base_rows(entry)  # [T, K, H]
            if self.name == "fibo":
                self._snap_fibo(given, number, entry)
                entries.append(entry)
                continue
            stored = (stored.mT if self.name == "ideogram4" else stored).reshape(rows.shape)
            torch.testing.assert_close(rows, stored, rtol=2**-8, atol=1e-5)
            entries.append(entry)
            if isinstance(text, list):
                text[number] = stored
            else:
                text[number][_own_rows(given)[number]] = stored
        return entries

    def _snap_fibo(self, given: dict[str, Any], number: int, entry: int) -> None:
        """A list of layers, and the last two of them side by side."""
        own = _own_rows(given)[number]
        stored = self.base_rows(entry).unbind(1)
        for layer, rows in zip(given["text_encoder_layers"], stored, strict=True):
            torch.testing.assert_close(layer[number][own], rows, rtol=2**-8, atol=1e-5)
            layer[number][own] = rows
        num_layers = self.store.manifest.identity.model.num_layers
        last = self.store.read([entry], [num_layers - 1, num_layers]).tensor().float()
        rows = torch.cat([last[:, 1], last[:, 0]], dim=1)
        given["encoder_hidden_states"][number][own] = rows

    def base_rows(self, entry: int) -> Tensor:
        """fp32 [T, K, H] of the layers that the network reads."""
        layers = self.base_layers
        rows = self.store.read([entry], sorted({*layers})).tensor().float()
        return rows[:, [sorted({*layers}).index(layer) for layer in layers]]

    def _find(self, text: Tensor) -> int:
        name = "prompt_embeds_llama3" if self.name == "hidream" else "prompt_embeds"
        return next(
            entry for entry, rows in enumerate(self.conditioning()[name]) if torch.equal(rows, text)
        )


@cache
def _transformer(folder: str, dtype: str) -> Any:
    """Not to be changed."""
    config = ModelConfig(kind="pretrained", pretrained=folder, dtype=dtype)
    return load_transformer(find_pretrained(folder), config)


_CONDITIONING: dict[str, dict[str, Tensor]] = {}


@dataclass
class Call:
    """A call of the transformer: entries of its captions, and what it gave back."""

    entries: list[int]
    output: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Step:
    """A step of sampling.

    Attributes:
        calls: of the transformer.
        told: the scheduler's timestep.
        x_t, model_output: of the scheduler, [1, C, h, w].
    """

    calls: list[Call] = field(default_factory=list)
    told: float = 0.0
    x_t: Tensor = field(default_factory=lambda: torch.empty(0))
    model_output: Tensor = field(default_factory=lambda: torch.empty(0))

    def t(self, family: str) -> Tensor:
        """semroute's t, fp32 [1]."""
        return torch.tensor([(self.told + (family == "pixart")) / 1000])


@contextmanager
def watch(transformer: Any) -> Any:
    """Its outputs, in a list."""
    outputs: list[Tensor] = []
    handle = transformer.register_forward_hook(lambda _m, _a, out: outputs.append(_stack(out[0])))
    try:
        yield outputs
    finally:
        handle.remove()


def spread(family: str, latents: Tensor) -> Tensor:
    """A pipeline's latents of a square image as [B, C, h, w]."""
    if family == "wan":
        return latents[:, :, 0]
    if latents.ndim == 4:
        return latents
    side = round(latents.shape[1] ** 0.5)
    if family not in _PACKED:
        return latents.mT.unflatten(2, (side, side))
    tokens = latents.unflatten(2, (-1, 2, 2)).unflatten(1, (side, side))  # [B, y, x, C, dy, dx]
    return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def pack(family: str, latents: Tensor) -> Tensor:
    """The inverse of :func:`spread`."""
    if family == "wan":
        return latents[:, :, None]
    if family in _BY_TOKEN:
        return latents.flatten(2).mT
    if family not in _PACKED:
        return latents
    patches = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [B, C, y, dy, x, dx]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


def _stack(output: Any) -> Tensor:
    return torch.stack(output) if isinstance(output, list) else output


def bind(transformer: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a call by name."""
    return _signature(transformer).bind(transformer, *args, **kwargs).arguments


def _signature(transformer: Any) -> inspect.Signature:
    return inspect.signature(inspect.unwrap(type(transformer).forward))


def _text_argument(family: str) -> str:
    return "cap_feats" if family == "z-image" else "encoder_hidden_states"


def _own_rows(given: dict[str, Any]) -> Tensor:
    """Rows of captions in what a transformer is given: bool [B, T]."""
    if "indicator" in given:
        return given["indicator"] == LLM_TOKEN_INDICATOR
    masks = [given.get(f"encoder_{name}") for name in ("attention_mask", "hidden_states_mask")]
    mask = next((mask for mask in masks if mask is not None), None)
    if mask is not None:
        return mask.bool()
    return given["encoder_hidden_states"].flatten(2).ne(0).any(-1)  # padded with zeros


def _rows_of(family: str, given: dict[str, Any]) -> list[Tensor]:
    """Text of each batch item: its own rows, or all rows where padding is read."""
    if family == "hidream":
        return [*given["encoder_hidden_states_llama3"].permute(1, 2, 0, 3)]
    text = given[_text_argument(family)]
    if family == "z-image" or family in CONDITIONED:
        return [*text]
    return [rows[own] for rows, own in zip(text, _own_rows(given), strict=True)]


@torch.no_grad()
def _encode(family: str, pipe: Any, text: str) -> dict[str, Tensor]:
    """Of one text, [1, ...]; of "" as the negative prompt."""
    encoder = PRESETS[family].encoder
    pad = getattr(pipe, encoder.replace("text_encoder", "tokenizer")).pad_token_id
    masks = []

    def watched(_module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        masks.append(ids != pad if mask is None else mask.bool())

    handle = getattr(pipe, encoder).register_forward_pre_hook(watched, with_kwargs=True)
    guided = {"negative_prompt": "", "do_classifier_free_guidance": not text}
    which = 0 if text else 1
    if family == "sd3":
        more = {"prompt_2": None, "prompt_3": None}
        found = pipe.encode_prompt(prompt=text or "a", **more, **guided)
        encoded = {"prompt_embeds": found[which], "pooled_prompt_embeds": found[2 + which]}
    elif family == "hidream":
        t5, no_t5, llama, no_llama, pooled, no_pooled = pipe.encode_prompt(
            prompt=text or "a", **guided
        )
        encoded = {
            "prompt_embeds_t5": t5 if text else no_t5,
            "prompt_embeds_llama3": (llama if text else no_llama).permute(1, 2, 0, 3),
            "pooled_prompt_embeds": pooled if text else no_pooled,
        }
    else:
        encoded = {"prompt_embeds": pipe.encode_prompt(prompt=text)[0]}
    handle.remove()
    mask = masks[-1]  # the negative prompt comes last
    if family == "sd3":
        mask = torch.nn.functional.pad(mask, (_CLIP_ROWS, 0))
    return {**encoded, "mask": mask}
