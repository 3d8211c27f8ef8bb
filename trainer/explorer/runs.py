"""What the explorer asks of a run.

Shapes: N noise levels, D blocks, L layers, T tokens of a caption, H width.
"""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ...pipeline.inspection.statistics import normed_layers
from ...pipeline.store.features import FeatureStore
from ...schemas import InputError
from ...schemas.escaping import one_line
from ..plots.images import list_images

if TYPE_CHECKING:
    from ..runs.run import Run
    from .features import FeaturesView

FOLDER = "samples"
"""Folder in a run that ``semroute sample`` writes."""
NUM_IMAGES = 24
"""Images that are shown."""
MAX_SIDE = 160
"""Pixels of their longer side."""


class RunView:
    """A run as the explorer shows it.

    Args:
        features: the captions that its blocks may read, if there is a store of them.
    """

    def __init__(self, run: "Run", features: "FeaturesView | None") -> None:
        self.run = run
        self.features = features

    def facts(self) -> dict[str, Any]:
        """Title and properties, and what reads the layers."""
        summary = self.run.facts()
        return {
            "title": one_line(str(self.run.path)),
            "facts": [[one_line(name), one_line(value)] for name, value in summary.items.items()],
            "layers": self.run.layers,
            "block": "block" if self.run.record.pretrained is None else "socket",
            "blocks": self.run.num_blocks,
            "samples": bool(list_images(self.run.path / FOLDER)),
        }

    def weights(self) -> dict[str, Any]:
        """Noise levels, and alpha float32 ``[N, D, L]``; means over tokens where each has its own.

        Raises:
            InputError: weights depend on tokens, and there is no store to read some from.
        """
        hidden = None
        if self.run.router.depends_on_content:
            store = self._checked_store()
            hidden = store.read(range(min(len(store), 64)), self.run.router.layers_read).tensor()
        levels = self._levels()
        return {"t": levels, "alpha": self.run.weights(levels, hidden)}

    def reads(self, caption: int, block: int, t: float) -> dict[str, Any]:
        """Share of each layer in what a block reads of each token, float32 ``[T, L]``.

        What a block reads of a token is a sum of one vector per layer, weight times LN(h); a
        layer's share is the product of its vector with that sum, over the squared length of the
        sum. Shares of a token sum to 1; one below 0 works against the others. Of a pretrained
        network, it is what routing adds to its own input, and shares are 0 where that is nothing.

        Args:
            block: from 0.
            t: noise level.

        Raises:
            InputError: there is no store, or not one that the run can read, or it holds mixes.
        """
        store = self._checked_store()
        if store.mixes is not None:
            raise InputError(
                f"{store.path} holds mixes: each block reads one of them as it is. To see layers, "
                "name a store of layers"
            )
        router = self.run.router
        assert self.features is not None
        chosen = self.features.read(caption)
        positions = store.layer_positions(router.layers_read)
        hidden = chosen.hidden[:, positions]
        places = [self.run.layers.index(layer) for layer in router.layers_read]
        rows: list[torch.Tensor | None] = [None]
        if router.depends_on_content:
            rows = [*torch.from_numpy(hidden)[:, None]]
        alpha = np.stack([self.run.weights([t], row)[0, block, places] for row in rows])
        if self.run.record.pretrained is not None:
            alpha = alpha - 1 / len(self.run.layers)
        normed = normed_layers(hidden)  # [T, L, H]
        mix = np.einsum("tl,tlh->th", np.broadcast_to(alpha, hidden.shape[:2]), normed)
        products = alpha * np.matmul(normed, mix[:, :, None])[:, :, 0]
        shares = products / np.maximum(np.square(mix).sum(1, keepdims=True), 1e-12)
        return {"share": shares.astype(np.float32), "layers": [*router.layers_read]}

    def samples(self, text: str | None) -> dict[str, Any]:
        """Generated images as PNG, those of a caption first.

        Args:
            text: of the caption.
        """
        listed = list_images(self.run.path / FOLDER)
        listed = sorted(listed, key=lambda image: image[0] != text)[:NUM_IMAGES]
        answer: dict[str, Any] = {
            "captions": [one_line(caption) for caption, _ in listed],
            "own": sum(caption == text for caption, _ in listed),
        }
        for number, (_, path) in enumerate(listed):
            with Image.open(path) as image:
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                file = io.BytesIO()
                image.convert("RGB").save(file, "PNG")
            answer[f"image{number}"] = file.getvalue()
        return answer

    def _levels(self) -> list[float]:
        depends = self.run.router.depends_on_t
        return [round(level / 20, 2) for level in range(21)] if depends else [1.0]

    def _checked_store(self) -> FeatureStore:
        if self.features is None:
            raise InputError(
                f"the features of this run, {self.run.record.config.features}, are not here: name "
                "a store with features="
            )
        store = self.features.store
        self.run.check_features(store.manifest.identity)
        return store
