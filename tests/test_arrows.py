"""Imports between packages: the table of docs/architecture.md, in six floors without a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "pipeline.sources",
        "pipeline.text",
        "pipeline.models",
        "pipeline.codecs",
        "pipeline.executor",
        "pipeline.style",
        "trainer.model",
        "trainer.diffusion",
        "trainer.shapes",
    },
    {"pipeline.store", "trainer.adapters", "trainer.plots"},
    {"pipeline.extraction", "trainer.data", "trainer.runs"},
    {"pipeline.inspection", "trainer.evaluation"},
    {"trainer.training", "trainer.explorer"},
    {"trainer.studies", "pipeline.commands", "trainer.commands", "cli"},
]
ARROWS = {
    "pipeline.store": {"pipeline.codecs"},
    "trainer.adapters": {"pipeline.models", "trainer.model", "trainer.diffusion"},
    "trainer.plots": {"pipeline.style"},
    "pipeline.extraction": {
        "pipeline.sources",
        "pipeline.text",
        "pipeline.models",
        "pipeline.codecs",
        "pipeline.executor",
        "pipeline.store",
    },
    "trainer.data": {"pipeline.store", "trainer.diffusion"},
    "trainer.runs": {
        "pipeline.executor",
        "pipeline.store",
        "pipeline.style",
        "trainer.model",
        "trainer.diffusion",
        "trainer.adapters",
        "trainer.plots",
    },
    "pipeline.inspection": {
        "pipeline.sources",
        "pipeline.text",
        "pipeline.models",
        "pipeline.codecs",
        "pipeline.executor",
        "pipeline.style",
        "pipeline.store",
        "pipeline.extraction",
    },
    "trainer.training": {
        "pipeline.extraction",
        "pipeline.models",
        "pipeline.store",
        "pipeline.style",
        "trainer.evaluation",
        "trainer.plots",
        "trainer.shapes",
        "trainer.adapters",
        "trainer.data",
        "trainer.model",
        "trainer.diffusion",
        "trainer.runs",
    },
    "trainer.evaluation": {
        "pipeline.sources",
        "pipeline.executor",
        "pipeline.models",
        "pipeline.store",
        "pipeline.extraction",
        "pipeline.style",
        "trainer.adapters",
        "trainer.diffusion",
        "trainer.shapes",
        "trainer.plots",
        "trainer.runs",
    },
    "trainer.explorer": {
        "pipeline.inspection",
        "pipeline.models",
        "pipeline.store",
        "pipeline.style",
        "trainer.plots",
        "trainer.runs",
    },
    "trainer.studies": {
        "pipeline.store",
        "pipeline.style",
        "trainer.model",
        "trainer.shapes",
        "trainer.plots",
        "trainer.runs",
        "trainer.training",
        "trainer.evaluation",
    },
}
"""What a package may import besides ``schemas``. The command line, ``pipeline.commands``,
``trainer.commands`` and ``cli``, may import anything on a lower floor, and each other in this
order."""
COMMANDS = ("pipeline.commands", "trainer.commands", "cli")
LONGEST_CHAIN = 10
"""Modules above ``schemas`` that may stand on one another."""
MAX_LINES = 600


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    name_of(path): path
    for path in (
        ROOT / "cli.py",
        *(
            p
            for folder in ("schemas", "pipeline", "trainer")
            for p in ROOT.glob(f"{folder}/**/*.py")
        ),
    )
}


def package_of(module: str) -> str:
    """``schemas``, ``cli``, or two words: ``pipeline.store``."""
    return ".".join(module.split(".")[: 1 if module.startswith(("schemas", "cli")) else 2])


def imports(module: str, *, at_once: bool = False) -> list[str]:
    """Modules of the package that a module imports, also those inside functions.

    Args:
        at_once: only those that are imported together with the module.
    """
    path = MODULES[module]
    tree = ast.parse(path.read_text("utf-8"))
    parts = name_of(path).split(".")
    if path.name == "__init__.py":
        parts = [*parts, "__init__"]
    found = []
    for node in tree.body if at_once else ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module.split(".") if node.module else []
        if node.level:
            base = parts[: -node.level] + base
        elif base[:1] == ["semroute"]:
            raise AssertionError(f"{path}:{node.lineno}: imports in the package are relative")
        else:
            continue
        for alias in node.names:
            name = ".".join([*base, alias.name])
            found.append(name if name in MODULES else ".".join(base))
    return [name for name in found if name]


def test_every_package_has_a_floor():
    known = set.union(*FLOORS)
    packages = {package_of(m) for m in MODULES} - {"schemas", "pipeline", "trainer"}
    assert packages == known
    assert {*ARROWS, *FLOORS[0], *COMMANDS} == known


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_are_in_the_table(module):
    own = package_of(module)
    allowed = {own, "schemas"} | ARROWS.get(own, set())
    if own in COMMANDS:
        allowed |= set.union(*FLOORS[:-1]) | {"trainer.studies"}
        allowed |= {*COMMANDS[: COMMANDS.index(own)]}
        if own == "pipeline.commands":
            allowed = {name for name in allowed if not name.startswith("trainer")}
    found = {package_of(name) for name in imports(module)} - {""}
    assert found - allowed == set()


def test_arrows_of_the_table_go_down():
    floor = {package: number for number, floor in enumerate(FLOORS) for package in floor}
    up = [(a, b) for a, below in ARROWS.items() for b in below if floor[b] >= floor[a]]
    assert up == []
    crossing = [(a, b) for a, below in ARROWS.items() for b in below if "pipeline" in a < b]
    assert [pair for pair in crossing if pair[1].startswith("trainer")] == []


def test_every_arrow_of_the_table_is_used():
    used = {(package_of(m), package_of(name)) for m in MODULES for name in imports(m)}
    assert [(a, b) for a, below in ARROWS.items() for b in below if (a, b) not in used] == []


def test_there_is_no_circle_and_no_long_chain():
    graph = {m: [n for n in imports(m, at_once=True) if n != "schemas"] for m in MODULES}
    depth: dict[str, int] = {}

    def measure(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a circle: {' > '.join([*above, module])}"
        if module not in depth:
            below = [measure(name, (*above, module)) for name in graph[module]]
            own = not module.startswith("schemas")
            depth[module] = own + max(below, default=0)
        return depth[module]

    longest = max(graph, key=measure)
    assert depth[longest] <= LONGEST_CHAIN, longest


def test_nothing_imports_the_command_line_but_its_door():
    importers = {m for m in MODULES for name in imports(m) if package_of(name) == "cli"}
    assert importers == set()


def test_stores_are_read_without_torch():
    light = (
        "pipeline.codecs",
        "pipeline.store",
        "pipeline.sources",
        "pipeline.executor",
        "schemas",
    )
    heavy = [
        module
        for module, path in MODULES.items()
        if module.startswith(light) and "\nimport torch\n" in path.read_text("utf-8")
    ]
    assert heavy == []


def test_no_file_outgrows_a_reader():
    long = {name: len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: num for name, num in long.items() if num > MAX_LINES} == {}


def test_no_folder_is_a_drawer():
    folders = {path.parent for path in MODULES.values() if path.parent != ROOT}
    for folder in folders - {ROOT / "schemas"}:
        modules = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= 14, folder
    loose = [p.name for f in ("pipeline", "trainer") for p in (ROOT / f).glob("*.py")]
    assert sorted(loose) == ["__init__.py", "__init__.py", "style.py"]


def test_tables_of_contents_hold():
    """Each public name of a package is there; commands are listed by ``cli`` alone."""
    for name, path in MODULES.items():
        if path.name != "__init__.py" or name.count(".") != 1 or name.endswith(".commands"):
            continue
        pytest.importorskip("torch")
        package = __import__(f"semroute.{name}", fromlist=["__all__"])
        assert package.__all__, name
        for public in package.__all__:
            assert getattr(package, public) is not None
