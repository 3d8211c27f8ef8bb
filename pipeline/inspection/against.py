"""Compares a store of captions with what a pipeline's own ``encode_prompt`` gives for them.

Shapes: T rows of a caption, K base layers (those that the pipeline's transformer reads), H width.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ...schemas import Against, differences
from ...schemas.columns import numbers
from ..codecs.error import codec_error
from ..models.text_pipelines import TextPipeline, find_text_pipeline
from ..store.captions import CaptionStore
from ..store.conditioning import ConditioningStore
from ..store.documents import StoreError, write_against
from ..store.features import NULL_CAPTION, FeatureStore
from ..store.latents import LatentStore
from ..store.open import open_store

ROUNDING = {"float32": 1e-3, "bfloat16": 6e-2}
"""Difference of a row that the LLM's dtype explains: batches of another shape are summed in another
order, which bfloat16 shows in its second digit after dozens of layers."""
BF16_ROUNDING = 2**-8
"""That of a row which is rounded to bfloat16 when it is stored."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Result of :func:`compare_with_pipeline`.

    Attributes:
        path: of the store.
        pipeline: hub id with commit, or folder.
        pipeline_class: its class in diffusers.
        captions: caption_id of each compared caption.
        layers: the base layers.
        problems: what is wrong; empty: the store is what the pipeline reads.
        max_difference: of the rows that could be compared.
        tolerance: largest difference that counts as equal.
    """

    path: Path
    pipeline: str
    pipeline_class: str
    captions: list[int]
    layers: list[int]
    problems: list[str]
    max_difference: float
    tolerance: float

    def __repr__(self) -> str:
        num = len(self.captions)
        if not self.problems:
            return (
                f"{self.path}: rows of {num} captions, the null caption among them, are those of "
                f"{self.pipeline_class} ({_listed(self.layers)}); largest difference "
                f"{self.max_difference:.1e}, allowed {self.tolerance:.1e}"
            )
        lines = [f"{self.path} is not what {self.pipeline_class} ({self.pipeline}) reads:"]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=1)


def compare_with_pipeline(
    path: str | os.PathLike[str], pipeline: str, num: int = 8, device: str = "cpu"
) -> Comparison:
    """Compare rows of some captions, and of the null caption, with those of a pipeline.

    If they agree, this is recorded in the store's folder (``against.json``). Of a feature store
    rows of the base layers are compared, of a conditioning store all tensors.

    Args:
        path: a finished feature or conditioning store.
        pipeline: folder or hub id of a pipeline of diffusers.
        num: number of captions: the longest, and the first ones in store order, which is random.
        device: for the pipeline's text encoders, which run in the store's dtype.

    Raises:
        StoreError: no such store there, an unfinished one, or one of mixes or shuffled layers.
        InputError: no such pipeline.
    """
    store = open_store(path)
    if isinstance(store, LatentStore):
        raise StoreError(f"{path} is a latent store; expected one of features or conditioning")
    store.check_complete()
    dtype = store.manifest.identity.dtype
    if isinstance(store, FeatureStore):
        _refuse_mixes(store)
    text = TextPipeline(find_text_pipeline(pipeline, "--against"), device, dtype)
    captions = _choose(store, num)
    comparison: _FeatureComparison | _ConditioningComparison
    if isinstance(store, FeatureStore):
        comparison = _FeatureComparison(store, text)
    else:
        comparison = _ConditioningComparison(store, text)
    found = Comparison(
        path=store.path,
        pipeline=text.source.name,
        pipeline_class=text.recipe.pipeline,
        captions=captions,
        layers=text.base_layers,
        problems=comparison.run(captions),
        max_difference=comparison.max_difference,
        tolerance=comparison.tolerance,
    )
    if not found.problems:
        write_against(
            store.path,
            Against(
                pipeline=found.pipeline,
                pipeline_class=found.pipeline_class,
                files=text.source.files,
                captions=captions,
                max_difference=found.max_difference,
                tolerance=found.tolerance,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )
    return found


def _refuse_mixes(store: FeatureStore) -> None:
    """Refuse a store whose rows are not those of LLM layers."""
    if store.mixes is not None or store.manifest.identity.shuffled is not None:
        kind = "shuffled layers" if store.mixes is None else "mixes of layers"
        raise StoreError(f"{store.path} holds {kind}, which no pipeline reads; compare its source")


def _choose(store: CaptionStore[Any], num: int) -> list[int]:
    """The null caption, the longest one, and the first ones."""
    longest = int(numbers(pc.list_value_length(store.captions["token_ids"])).argmax())
    others = [n for n in (longest, *range(1, len(store))) if n != NULL_CAPTION]
    return [NULL_CAPTION, *sorted([*dict.fromkeys(others)][:num])]


class _Comparison(ABC):
    """A store and a pipeline's text half, compared caption by caption.

    Attributes:
        tolerance: largest difference of a row that counts as equal.
        max_difference: found so far.
    """

    tolerance: float

    def __init__(self, store: CaptionStore[Any], text: TextPipeline) -> None:
        self.text, self.max_difference = text, 0.0
        self.captions = store.captions

    def run(self, captions: Sequence[int]) -> list[str]:
        """What is wrong, each problem once, with the first caption that shows it."""
        problems = self.whole_problems()
        if problems:
            return [*problems, *self.remedies()]
        found: dict[str, list[tuple[int, str]]] = {}
        for caption in captions:
            row = self.captions.slice(caption, 1).to_pylist()[0]
            kind, detail = self.compare(caption, row["text"], np.array(row["token_ids"]))
            if kind:
                detail += f", in {_quoted(row['text'])}"
                found.setdefault(kind, []).append((caption, detail))
        for kind, shown in found.items():
            caption, detail = shown[0]
            name = "the null caption" if caption == NULL_CAPTION else f"caption {caption}"
            problems.append(f"{len(shown)} of {len(captions)} captions: {kind}. {name}: {detail}")
        return [*problems, *self.remedies()] if problems else []

    @abstractmethod
    def whole_problems(self) -> list[str]:
        """What is wrong with the whole store, so that comparing rows is in vain."""

    @abstractmethod
    def compare(self, caption: int, text: str, tokens: np.ndarray) -> tuple[str, str]:
        """Kind of what is wrong with a caption, and details; twice "" if nothing is.

        Args:
            tokens: of the stored rows.
        """

    @abstractmethod
    def remedies(self) -> list[str]:
        """What to do, after the problems."""


class _FeatureComparison(_Comparison):
    """Rows of the base layers in a feature store."""

    def __init__(self, store: FeatureStore, text: TextPipeline) -> None:
        super().__init__(store, text)
        self.store = store
        identity, codec = store.manifest.identity, store.manifest.codec
        self.tolerance = ROUNDING[identity.dtype] + BF16_ROUNDING
        if codec.quality is not None:
            self.tolerance += codec_error([*store.receipts().values()])["max"]

    def whole_problems(self) -> list[str]:
        width, base = self.store.manifest.identity.model.width, self.text.base_layers
        if width != self.text.width:
            return [
                f"hidden states are {width} wide; those of the pipeline's LLM {self.text.width}: "
                "the store is of another LLM"
            ]
        missing = [layer for layer in base if layer not in self.store.layers]
        if missing:
            raw = f"; {max(missing)} is the last one before the final norm"
            return [
                f"the pipeline reads {_listed(base)}, but {_listed(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not stored"
                f"{raw * (max(missing) > self.text.num_layers)}"
            ]
        return []

    def compare(self, caption: int, text: str, tokens: np.ndarray) -> tuple[str, str]:
        own = self.text.tokens(text)
        if not np.array_equal(tokens, own):
            return self._explain_tokens(tokens, own)
        expected = self.text.rows(self.text.encode([text]), 0).float().cpu().numpy()
        found = self.store.read([caption], self.text.base_layers).numpy()
        errors = _differences(self._as_read(found), expected)
        self.max_difference = max(self.max_difference, float(errors.max()))
        if errors.max() <= self.tolerance:
            return "", ""
        return self._explain_rows(caption, text, expected, errors)

    def _as_read(self, rows: np.ndarray) -> np.ndarray:
        """Rows as the pipeline gives them to its transformer."""
        if not self.text.recipe.standardized:
            return rows
        deviation = rows.std(-1, ddof=1, keepdims=True)
        return (rows - rows.mean(-1, keepdims=True)) / (deviation + 1e-8)

    def _explain_tokens(self, stored: np.ndarray, expected: np.ndarray) -> tuple[str, str]:
        """What differs between the tokens of stored rows and those of the pipeline's rows."""
        ours, theirs = stored.tolist(), expected.tolist()
        first = _common(ours, theirs)
        last = _common(ours[first:][::-1], theirs[first:][::-1])
        missing, extra = theirs[first : len(theirs) - last], ours[first : len(ours) - last]
        where = "first" if not first else "last" if not last else "some"
        if missing and not extra:
            what = {
                "first": "the store lacks rows in front, such as those of the template's prefix",
                "last": "the store lacks rows at the end: it was cut shorter, or has no suffix",
                "some": "the store lacks rows in between: captions were cut shorter",
            }[where]
            return what, f"from row {first} on {self._shown(missing)} not stored"
        if extra and not missing:
            what = {
                "first": "the store has rows in front that the pipeline drops",
                "last": "the store has rows at the end that the pipeline does not have: padding, "
                f"or more than its {self.text.max_length} tokens",
                "some": "the store has rows in between that the pipeline drops or cuts",
            }[where]
            return what, f"from row {first} on {self._shown(extra)} not read"
        a, b = (self.text.tokenizer.decode(ids) for ids in (ours, theirs))
        detail = f"row {first} is of {self._shown(extra[:1])}; expected {self._shown(missing[:1])}"
        if a.lower() == b.lower():
            return "the pipeline has the caption in another case (it cleans captions)", detail
        if "".join(a.split()).lower() == "".join(b.split()).lower():
            return "the pipeline has other spaces in the caption (it cleans captions)", detail
        if first and last:
            return "the pipeline has other words in the caption (it cleans captions)", detail
        return "another template, another tokenizer, or captions cleaned in another way", detail

    def _explain_rows(
        self, caption: int, text: str, expected: np.ndarray, errors: np.ndarray
    ) -> tuple[str, str]:
        """Why rows of the same tokens differ."""
        row, tap = (int(n) for n in np.argwhere(errors > self.tolerance)[0])
        layer = self.text.base_layers[tap]
        detail = f"row {row} of layer {layer} differs by {errors[row, tap]:.1e}"
        detail += f" (allowed {self.tolerance:.1e})"
        whole = self.store.read([caption]).numpy()
        for other, name in zip(whole.swapaxes(0, 1), self.store.layers, strict=True):
            if name != layer and self._same(self._as_read(other), expected[:, tap]):
                return (
                    f"what the pipeline reads as layer {layer} is layer {name} of the store",
                    detail,
                )
        if layer >= self.text.num_layers:
            for rows, theirs, stored in (
                (whole[:, self.store.layers.index(layer)], expected[:, tap], "before"),
                (expected[:, tap], whole[:, self.store.layers.index(layer)], "after"),
            ):
                if self._same(self._normed(rows), theirs):
                    other = {"before": "after", "after": "before"}[stored]
                    return (
                        f"the last layer is stored {stored} the final norm, and the pipeline reads "
                        f"it {other}",
                        detail,
                    )
        if self._other_prefix(text):
            return "the rows that are dropped in front are of another template", detail
        if self.text.attends_padding:
            return "the pipeline's LLM attends to padding, and the store's did not", detail
        if self._other_files():
            return "the LLM is another one: its files are not the pipeline's", detail
        return "the same tokens and the same LLM give other rows", detail

    def _other_prefix(self, text: str) -> bool:
        """Whether tokens in front of a caption, whose rows are dropped, are not the pipeline's."""
        prefix = self.store.manifest.identity.template.prefix_tokens
        sequence = self.text.sequence(text).tolist()
        drops = len(sequence) > len(self.text.tokens(text))
        return drops and sequence[: len(prefix)] != prefix

    def _normed(self, rows: np.ndarray) -> np.ndarray:
        import torch

        return self.text.final_norm(torch.from_numpy(rows)).float().cpu().numpy()

    def _same(self, found: np.ndarray, expected: np.ndarray) -> bool:
        return float(_differences(found, expected).max()) <= self.tolerance

    def _other_files(self) -> bool:
        """Whether weights of the store's LLM and of the pipeline's have no file in common."""
        encoder = f"{self.text.recipe.encoder}/"
        theirs = {sha for n, sha in self.text.source.files.items() if n.startswith(encoder)}
        ours = self.store.manifest.identity.model.files.items()
        return not {sha for name, sha in ours if name.endswith(".safetensors")} & theirs

    def remedies(self) -> list[str]:
        recipe, source = self.text.recipe, self.text.source
        name, at, revision = source.name.partition("@")
        lines = [
            f"Extract the captions with --template {recipe.family} and the pipeline's own LLM, "
            f"--model {name}/{recipe.encoder}{at}{revision}."
        ]
        tokenizer = source.files.get(recipe.tokenizer)
        if self.store.manifest.identity.tokenizer != tokenizer:
            lines.insert(0, "The tokenizer of the store is not the pipeline's.")
        return lines

    def _shown(self, ids: Sequence[int]) -> str:
        """Tokens in words."""
        text = self.text.tokenizer.decode(list(ids))
        return f"{len(ids)} tokens ({_quoted(text)})" if len(ids) != 1 else f"token {text!r}"


class _ConditioningComparison(_Comparison):
    """All tensors of a conditioning store."""

    def __init__(self, store: ConditioningStore, text: TextPipeline) -> None:
        super().__init__(store, text)
        self.store = store
        self.tolerance = ROUNDING[store.manifest.identity.dtype]

    def whole_problems(self) -> list[str]:
        identity = self.store.manifest.identity
        if identity.pipeline != self.text.recipe.pipeline:
            return [f"the store is of {identity.pipeline}"]
        others = differences(self.text.source.files, identity.files, "files")
        return [f"the store is of other files ({other})" for other in others[:3]]

    def compare(self, caption: int, text: str, tokens: np.ndarray) -> tuple[str, str]:
        own = self.text.tokens(text)
        if not np.array_equal(tokens, own):
            detail = f"{len(tokens)} tokens; expected {len(own)}, or others"
            return "the pipeline reads other tokens (did it clean captions then?)", detail
        expected = self.text.encode_one(text)
        for name, stored in self.store.tensors([caption]).items():
            found = stored if self.store.manifest.identity.ragged else stored[0]
            pair = [each.float().cpu().numpy() for each in (found, expected[name])]
            if pair[0].shape != pair[1].shape:
                return f"{name} has another shape", f"{pair[0].shape}; expected {pair[1].shape}"
            error = float(_differences(*pair).max())
            self.max_difference = max(self.max_difference, error)
            if error > self.tolerance:
                detail = f"it differs by {error:.1e} (allowed {self.tolerance:.1e})"
                return f"{name} has other values", detail
        return "", ""

    def remedies(self) -> list[str]:
        return [
            "Make the store again with semroute conditioning, or compare it with its own pipeline, "
            f"{self.store.manifest.provenance.model}."
        ]


def _differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of each row from the expected one, relative to the deviation of the latter.

    Args:
        found, expected: float32 ``[..., H]``.
    """
    centred = expected - expected.mean(-1, keepdims=True)
    scale = np.linalg.norm(centred, axis=-1)
    return np.linalg.norm(found - expected, axis=-1) / np.maximum(scale, 1e-12)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of first elements that two sequences share."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:13]))
    more = f" and {len(layers) - 13} more" if len(layers) > 13 else ""
    return f"layer{'s' * (len(layers) > 1)} {shown}{more}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
