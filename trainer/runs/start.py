"""A new run that starts from the weights of another one."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...schemas import RunRecord, differences, refuse_differences
from ..model.dit import DiT
from .record import trained_weights
from .run import Run, load_run

if TYPE_CHECKING:
    from .record import Network


def open_start(model: "Network", record: RunRecord) -> Run | None:
    """The run that ``config.start`` names, with its averaged weights; None if it names none.

    Args:
        model: the network that is to start from it; only its sizes are used.

    Raises:
        InputError: no run with a checkpoint there, one that cannot read these features, or one of
            another architecture; with every key that differs.
    """
    if record.config.start is None:
        return None
    start = load_run(record.config.start)
    start.check_features(record.features)
    refuse_differences(
        differences(_architecture(record, model), _architecture(start.record, start.model)),
        f"start: {start.path} is another network; this one, against it",
        "Train with its values, or leave start out.",
    )
    return start


def start_from(model: "Network", record: RunRecord, start: Run) -> None:
    """Copy the weights of another run into a new network; the router's only if it is alike."""
    own, other = record.config.routing, start.record.config.routing
    same_router = all(
        getattr(own, key) == getattr(other, key) for key in ("strategy", "rank", "layers")
    )
    weights = start.model.state_dict()
    names = [n for n in trained_weights(model) if same_router or not n.startswith("router.")]
    model.load_state_dict({name: weights[name] for name in names}, strict=False)


def _architecture(record: RunRecord, model: "Network") -> dict[str, Any]:
    """What two networks must share for one to take the other's weights, except for the router."""
    common = {
        "prediction": record.config.flow.prediction,
        "latents": [*record.latents.shape],
    }
    if isinstance(model, DiT):
        return {
            **asdict(model.size),
            "deep_fusion": record.llm_attention is not None,
            "width_read": model.router.width_read(model.text_width),
            "patch_size": model.patch_size,
            "conditioning": record.config.model.conditioning,
            **common,
        }
    trained = record.config.model.model_dump(mode="json", include={"train", "lora"})
    assert record.pretrained is not None
    return {**record.pretrained.model_dump(mode="json"), **trained, **common}
