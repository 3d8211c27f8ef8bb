"""New texts encoded as the captions of a store were."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ...schemas import FeatureIdentity, InputError, differences, refuse_differences
from ..codecs.bf16 import Bf16
from ..codecs.mixes import mix
from ..models.limits import refuse_beyond
from ..store.features import Rows
from ..text.captions import Captions, build_captions

if TYPE_CHECKING:
    import torch

    from ..models.llm import Encoder


class EncodedPrompts:
    """Hidden states of texts, read as a feature store is; see :class:`PromptEncoder`.

    The LLM is loaded when the first text is read, and runs when one is. What the last reading asked
    for is kept, and the null caption.

    Attributes:
        layers: LLM layers that can be read, ascending; of mixes their numbers, from 1.
        mixes: what these are where they are mixes of layers.
    """

    def __init__(
        self, captions: Captions, load: Callable[[], "Encoder"], identity: FeatureIdentity
    ) -> None:
        self.layers = identity.layers
        self.mixes = identity.mixes
        self._captions = captions
        self._load = load
        self._width = identity.model.width
        self._entries = [0, *(ids[0] for ids in captions.caption_ids.to_pylist())]
        self._kept: dict[int, np.ndarray] = {}

    @property
    def ids(self) -> list[int]:
        """The entry of each text: 0 where it is the null caption, whose text is empty."""
        return [number if entry else 0 for number, entry in enumerate(self._entries[1:], start=1)]

    def read(self, ids: Sequence[int] | np.ndarray, layers: Sequence[int] | None = None) -> Rows:
        """As :meth:`semroute.pipeline.store.features.FeatureStore.read`; 0 is the null caption,
        text i is i + 1."""
        wanted = [self.layers.index(layer) for layer in (layers or self.layers)]
        entries = [self._entries[i] for i in ids]
        encoded = {
            entry: self._kept[entry] if entry in self._kept else self._encode(entry)
            for entry in dict.fromkeys(entries)
        }
        null = {0: self._kept[0]} if 0 in self._kept else {}
        self._kept = null | encoded
        parts = [encoded[entry][:, wanted] for entry in entries]
        ends = np.cumsum([0, *map(len, parts)])
        return Rows(np.concatenate(parts), ends.astype(np.int64))

    @cached_property
    def _encoder(self) -> "Encoder":
        return self._load()

    def _encode(self, entry: int) -> np.ndarray:
        """Hidden states of one text, encoded as its own batch: bfloat16 bits, [T, L, H]."""
        import torch

        captions = self._captions
        shape = (len(self._encoder.layers), self._width)
        codec = Bf16(*shape)
        rows = np.empty((int(captions.num_tokens[entry]), *shape), np.uint16)

        def sink(index: int, hidden: "torch.Tensor") -> None:
            rows[:, index] = codec.encode(index, hidden, None).codes["hidden"].cpu().numpy()

        self._encoder.encode([captions.sequences[entry]], captions.rows.of([entry]), sink)
        if self.mixes is None:
            return rows
        mixed = mix(torch.from_numpy(rows).view(torch.bfloat16), self.mixes.basis).bfloat16()
        return mixed.view(torch.uint16).numpy()


class PromptEncoder:
    """The LLM of a store, kept to encode new texts as its captions were: same template, layers and
    dtype.

    Each text is a batch of its own and kept in bfloat16, so it equals a stored caption but for
    rounding and for the error of the store's codec, and does not depend on the other texts.

    Args:
        identity: of the store whose features the reader was made for.
        model: where the LLM is, see :func:`semroute.pipeline.models.hub.find_model`.
        device: where it runs; default: the first GPU, or the CPU.

    Raises:
        InputError: no model there, or not the one of the identity; or its layers are shuffled.
    """

    def __init__(self, identity: FeatureIdentity, model: str, device: str | None = None) -> None:
        from ..models.hub import find_model
        from ..models.llm import describe_model, load_tokenizer, model_limits, tokenizer_digest

        if identity.shuffled is not None:
            raise InputError(
                "the reader was made for layers in random order, a control, which new texts are "
                "not encoded for: give it stored captions"
            )
        located = find_model(model)
        self._tokenizer = load_tokenizer(located)
        found = {"model": describe_model(located), "tokenizer": tokenizer_digest(self._tokenizer)}
        refuse_differences(
            differences(found, {key: getattr(identity, key) for key in found}),
            f"--model {model} is not the LLM of the features",
            "Name that one.",
        )
        self._limits = model_limits(located)
        self._identity, self._located, self._device = identity, located, device
        self._encoder: Encoder | None = None

    def __call__(self, texts: Sequence[str]) -> EncodedPrompts:
        """Entry i of the result is ``texts[i - 1]``; 0 is the null caption.

        Raises:
            InputError: a text with tokens or positions that the LLM does not have.
        """
        identity = self._identity
        captions = build_captions(
            pa.array([[text] for text in texts], pa.list_(pa.string())),
            self._tokenizer,
            template=identity.template.text,
            max_length=identity.max_length,
            keep_prefix=identity.template.keep_prefix,
            processing=identity.template.processing,
            causal=identity.model.causal,
        )
        refuse_beyond(
            self._located.name, self._limits, captions.sequences, captions.texts, self._tokenizer
        )
        return EncodedPrompts(captions, self._load, identity)

    def _load(self) -> "Encoder":
        """The LLM, loaded when the first text is read."""
        from ..models.llm import Encoder

        if self._encoder is None:
            identity = self._identity
            self._encoder = Encoder(
                self._located, identity.llm_layers, identity.dtype, self._device
            )
        return self._encoder
