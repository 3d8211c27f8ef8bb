import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import semroute

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_packages_listed_are_the_folders_there_are(setup):
    folders = [
        p
        for name in ("schemas", "pipeline", "trainer")
        for p in ROOT.glob(f"{name}/**/__init__.py")
    ]
    listed = setup["options"]["packages"].split()
    names = {".".join(path.parent.relative_to(ROOT).parts) for path in folders}
    assert listed == sorted({"semroute", *(f"semroute.{name}" for name in names)})


def test_one_version(setup):
    assert setup["metadata"]["version"] == semroute.__version__
    assert f"## {semroute.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_root_holds_only_what_ships(setup):
    """Every Python file at the root would become part of the package."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_wheel_holds_exactly_the_package(tmp_path):
    tree = tmp_path / "tree"  # building writes metadata beside the sources, which others read
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "demo", "build", "dist")
    shutil.copytree(ROOT, tree, ignore=left_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    built = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = [ROOT / "__init__.py", ROOT / "cli.py"]
    for folder in ("schemas", "pipeline", "trainer"):
        for kind in ("py", "js", "css"):
            modules += (ROOT / folder).glob(f"**/*.{kind}")
    expected = {f"semroute/{path.relative_to(ROOT)}" for path in modules} | {"semroute/py.typed"}
    assert names == expected


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, semroute, semroute.cli; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "accelerate", "dask", "distributed", "matplotlib", "zarr"}
    assert heavy.isdisjoint(run.stdout.split())


def test_public_names_resolve():
    for name in semroute.__all__:
        assert getattr(semroute, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = semroute.nonsense
