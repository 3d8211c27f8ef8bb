"""A run of our own network, made and not trained; and runs used as their readers do."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tiny_stores import make_store

from semroute.pipeline.store.open import open_features, open_latents
from semroute.schemas import RunRecord, TrainConfig
from semroute.trainer.runs.checkpoint import save_checkpoint
from semroute.trainer.runs.metrics import add_line
from semroute.trainer.runs.record import build_model, trained_weights, write_record


def make_run(path: Path) -> Path:
    """Two checkpoints, metrics and routing over time; its stores lie beside it."""
    features = make_store("bf16", path.with_name(f"{path.name}-features"))
    latents = make_store("latents", path.with_name(f"{path.name}-latents"))
    config = {
        **{"features": str(features), "latents": str(latents), "output": str(path), "steps": 2},
        "model": {"size": "nano", "depth": 1, "width": 8, "num_heads": 1, "num_kv_heads": 1}
        | {"head_dim": 8, "mlp_width": 8},
        "routing": {"strategy": "joint"},
    }
    identity = open_latents(latents).manifest.identity
    record = RunRecord(
        config=TrainConfig.model_validate(config),
        features=open_features(features).manifest.identity,
        codec=open_features(features).manifest.codec,
        latents=identity,
        model_source="llm",
        versions={"torch": "2"},
        created="2026-01-01T00:00:00+00:00",
    )
    path.mkdir(parents=True)
    write_record(path, record)
    weights = trained_weights(build_model(record))
    line = dict.fromkeys(
        ("loss", "grad_norm", "lr", "samples_per_second", "data_wait_share", "routing_entropy"), 0.5
    )
    for step in (1, 2):
        state = {"window": {"losses": [0.5], "norms": [0.1]}}
        more = {"optimizer": {}, "state": state, "keep": 2}
        save_checkpoint(path, step, model=weights, ema=weights, **more)
        add_line(path, "metrics.jsonl", {"step": step, **line})
    return path


def read_run(path: str) -> str:
    """sha256 of what a run gives its readers."""
    from semroute.trainer.runs.run import load_run

    run = load_run(Path(path))
    found = hashlib.sha256(run.weights().tobytes())
    for name, value in sorted(run.model.state_dict().items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def inspect_run(path: str) -> None:
    """Compare it, and make its figures."""
    from semroute.trainer.runs.figures import make_figures
    from semroute.trainer.runs.run import load_run
    from semroute.trainer.studies.compare import compare

    comparison: Any = compare([path])
    json.loads(comparison.to_json())
    str(comparison)
    make_figures(load_run(Path(path)))


def resume_run(path: str) -> str:
    """What a command that resumes it reads of it before it trains."""
    from semroute.trainer.runs.checkpoint import latest_checkpoint
    from semroute.trainer.runs.metrics import read_metrics
    from semroute.trainer.runs.record import find_run, read_record

    record = read_record(Path(path))
    find_run(Path(path), record)
    checkpoint = latest_checkpoint(Path(path))
    if checkpoint is not None:
        checkpoint.optimizer()
        checkpoint.state()
    read_metrics(Path(path))
    return ""
