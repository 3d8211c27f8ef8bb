"""``semroute.attach``: a pipeline of diffusers that reads what a run learned."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ...pipeline.models.llm import find_tower
from ...schemas import InputError
from ..adapters.arguments import ARGUMENTS
from ..adapters.captures import Captures
from ..adapters.lora import is_lora
from ..adapters.pipeline import Attachment, replace_weights, restore
from ..adapters.routed import Routed
from ..runs.adapter import load_adapter
from ..runs.record import adapt, refuse_other_weights
from .embed import read_embeds
from .fit import PLACE, check_embeds, check_encoder, check_files, check_network, check_unchanged

_NETWORK = "transformer."


def attach(
    pipe: Any,
    run: str | os.PathLike[str],
    weights: Literal["ema", "model"] | None = None,
    step: int | None = None,
    *,
    embeds: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> Any:
    """Let a pipeline of diffusers read what a run learned; it is called as before.

    Prompts, negative prompts, several images per prompt, offloading and other dtypes work as they
    do without. Attach before ``torch.compile``, and before loading LoRA of others if the run
    trained LoRA or weights of the network. Where it trained LoRA, diffusers switches that off when
    another is loaded: ``pipe.set_adapters(["default", NAME])`` has both.

    Args:
        pipe: a pipeline with the transformer that the run adapted.
        run: the run directory, or a folder that semroute export --as pipeline wrote.
        weights: the exponential moving average, which is the default, or the weights themselves.
        step: step of the checkpoint. Default: the newest.
        embeds: a file of semroute embed, whose prompts the pipeline is then given as embeddings;
            it needs no text encoder.
        check: compare the files that the transformer was loaded from with those of the run.

    Returns:
        The same pipeline.

    Raises:
        InputError: the run trained a network of its own; or the pipeline has another transformer,
            other weights, another text encoder, or is attached to a run already.
    """
    adapter = load_adapter(run, step, weights)
    path, record, values = adapter.path, adapter.record, adapter.trained
    changes = any(name.startswith(_NETWORK) for name in values)
    check_network(pipe, record, adapter.identity, path)
    if changes:
        check_unchanged(pipe.transformer)
    if check:
        check_files(pipe.transformer, adapter.identity, path)
    encoded = None if embeds is None else read_embeds(embeds)
    if encoded is not None:
        check_embeds(encoded.record, adapter, changes)
    elif not adapter.parts.isdisjoint({"gain", "router"}):
        check_encoder(pipe, record, path)
    transformer = pipe.transformer
    trained = frozenset(n for n, p in transformer.named_parameters() if p.requires_grad)
    with _weights_in_place(pipe, changes):
        routed = adapt(record, transformer, trainable=False)
        own = dict(routed.named_parameters())
        expected = {
            name: value
            for name, value in own.items()
            if name in values or is_lora(name) or not name.startswith(_NETWORK)
        }
        try:
            refuse_other_weights(values, expected)
        except InputError:
            restore(routed, {}, trained)
            raise
        replaced = replace_weights(routed, values)
    routed.requires_grad_(False)
    if encoded is None:
        captures = _watch(pipe, routed, record.features.model.num_layers)
    elif encoded.record.learned == "layers":
        captures = encoded.captures(ARGUMENTS[routed.family.name], transformer.config)
    else:
        captures = None  # the embeddings hold what was learned about text
    published = {
        name.removeprefix(_NETWORK): value
        for name, value in replaced.items()
        if name.startswith(_NETWORK) and not is_lora(name)
    }
    setattr(transformer, PLACE, Attachment(routed, captures, published, trained))
    return pipe


def detach(pipe: Any) -> Any:
    """Give a pipeline back as it was before :func:`attach`.

    Returns:
        The same pipeline.

    Raises:
        InputError: nothing is attached to it.
    """
    attachment = getattr(getattr(pipe, "transformer", None), PLACE, None)
    if attachment is None:
        raise InputError(f"no run is attached to this {type(pipe).__name__}")
    with _weights_in_place(pipe, attachment.changes_network):
        attachment.remove()
    delattr(attachment.routed.transformer, PLACE)
    return pipe


def _watch(pipe: Any, routed: Routed, num_layers: int) -> Captures | None:
    """What the text encoder gives from now on; None: nothing depends on it."""
    if not (routed.deviates or routed.fusion_gain is not None):
        return None
    captures = Captures(routed.router.layers_read, routed.base_layers)
    if routed.deviates:
        names = ARGUMENTS[routed.family.name]
        encoder = getattr(pipe, names.encoder)
        tower = find_tower(encoder, names.encoder)
        captures.watch(encoder, tower, num_layers, getattr(pipe, names.tokenizer).pad_token_id)
    return captures


@contextmanager
def _weights_in_place(pipe: Any, changes: bool) -> Iterator[None]:
    """A context in which weights can be changed: sequential offloading is off."""
    if not (changes and any(p.is_meta for p in pipe.transformer.parameters())):
        yield
        return
    device = getattr(pipe, "_offload_device", None)
    if device is None:
        raise InputError(
            "weights of the transformer are not in memory, and the run changes some of them: load "
            "the pipeline without a device_map that offloads, or use enable_model_cpu_offload"
        )
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        pipe.enable_sequential_cpu_offload(device=device)
