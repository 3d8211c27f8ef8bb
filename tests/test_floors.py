"""Imports go down only. The floors are those of docs/architecture.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "schemas",
        "pipeline.kernels",
        "pipeline.planes",
        "pipeline.style",
        "pipeline.tokens",
        "trainer.claims",
        "trainer.delivery",
        "trainer.fusion",
        "trainer.gates",
        "trainer.scenes",
    },
    {
        *("pipeline." + name for name in ("tars", "captions", "encoder", "codecs")),
        *("pipeline." + name for name in ("layout", "shards", "cluster", "ledger", "lock")),
        *("trainer." + name for name in ("router", "flow", "shapes", "layouts")),
        *("trainer.order", "trainer.filters", "trainer.judgements"),
    },
    {
        "pipeline.latentstore",
        "pipeline.parameters",
        "pipeline.samples",
        "pipeline.trial",
        "trainer.baselines",
        "trainer.world",
    },
    {
        *("pipeline." + name for name in ("store", "distortion", "planning", "latents")),
        *("pipeline." + name for name in ("places", "progress", "labels", "prompts")),
        *("trainer.routing", "trainer.sampling"),
    },
    {
        *("pipeline." + name for name in ("filling", "fitting", "inspection", "verification")),
        *("pipeline." + name for name in ("statistics", "knowledge", "mixing", "status")),
        *("pipeline.autoencoder", "pipeline.growth"),
        *("trainer.selection", "trainer.dit", "trainer.clock", "trainer.options"),
    },
    {
        *(
            "pipeline." + name
            for name in ("encoding", "imaging", "rewriting", "probing", "figures", "hub")
        ),
        *("trainer.evaluation", "trainer.stream", "trainer.optimizers"),
    },
    {"pipeline.extraction", "pipeline.estimation", "pipeline.report"}
    | {"trainer.checkpoint", "trainer.plots", "trainer.validation"},
    {"trainer.run", "trainer.judging", "trainer.overlays"},
    {"trainer.setup", "trainer.lag", "trainer.export", "trainer.diffusion"},
    {"trainer.loop"},
    {"trainer.results", "trainer.study", "trainer.plan", "trainer.gallery"},
    {"trainer.panels", "trainer.ablation", "trainer.benchmarking", "trainer.comparison"},
    {"pipeline.commands", "trainer.commands", "trainer.experiments"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
GATES = {
    "pipeline.store",
    "pipeline.lock",
    "pipeline.inspection",
    "pipeline.style",
}  # all that the trainer may use of the pipeline

BOTH = {
    "pipeline.commands",
    "trainer.commands",
    "trainer.benchmarking",
    "trainer.experiments",
    "trainer.diffusion",
}  # the command line and a pipeline of diffusers, which use both halves


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "schemas" if parts[0] == "schemas" else ".".join(parts)


def source_files() -> list[Path]:
    files = [ROOT / "cli.py"]
    for folder in ("schemas", "pipeline", "trainer"):
        files += sorted(path for path in (ROOT / folder).glob("*.py"))
    return [path for path in files if path.name != "__init__.py" or path.parent.name == "schemas"]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "semroute" for alias in node.names)
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.module is None or node.module.split(".")[0] != "semroute", path
        if node.level == 0:
            continue
        base = package[: len(package) - node.level + 1]
        parts = (*base, *(node.module or "").split(".")) if node.module else base
        if parts and parts[0] == "schemas":
            found.add("schemas")
        elif len(parts) >= 2:
            found.add(".".join(parts[:2]))
        else:
            names = {alias.name for alias in node.names}
            found |= {".".join((*parts, name)) for name in names} if parts else set()
    return found - {"schemas"} if package == ("schemas",) else found


@pytest.mark.parametrize("path", source_files(), ids=room_of)
def test_imports_go_down_only(path):
    room = room_of(path)
    assert room in FLOOR, f"say on which floor {room} is"
    for other in imported_rooms(path):
        assert other in FLOOR, f"{room} imports {other}, which is on no floor"
        assert FLOOR[other] < FLOOR[room], f"{room} may not import {other}"
        if room in BOTH:
            continue
        if room.startswith("pipeline"):
            assert not other.startswith("trainer"), f"{room} imports {other}"
        if room.startswith("trainer") and other.startswith("pipeline"):
            assert other in GATES, f"{room} reaches {other} past the store"


def test_every_room_exists():
    assert set(FLOOR) == {room_of(path) for path in source_files()}


def test_files_stay_readable():
    """A file is one noun; one that grows past this wants to be two."""
    for path in source_files():
        assert len(path.read_text().splitlines()) <= 600, path
