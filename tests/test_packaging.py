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


class TestImage:
    """docs/container/Dockerfile, as far as no daemon is needed."""

    @pytest.fixture
    def instructions(self):
        text = (ROOT / "docs" / "container" / "Dockerfile").read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return [tuple(line.split(maxsplit=1)) for line in lines]

    def test_it_installs_as_the_readme_says(self, instructions, setup):
        defaults = dict(
            text.split("=", 1) for name, text in instructions if name == "ARG" and "=" in text
        )
        makefile = (ROOT / "Makefile").read_text()
        assert f"TORCH ?= {defaults['TORCH']}\n" in makefile
        assert set(defaults["EXTRAS"].split(",")) < set(setup["options.extras_require"])
        found = [text for name, text in instructions if name == "RUN" and "pip install" in text]
        torch, package = (text.replace(" --no-cache-dir", "") for text in found)
        # As the Makefile installs torch, and the README the package.
        assert torch.replace('"$TORCH"', "'$(TORCH)'") in makefile.replace("--quiet ", "")
        readme = (ROOT / "README.md").read_text()
        assert package.replace('".[$EXTRAS]"', "'.[gguf]'") in readme

    def test_it_has_a_python_that_the_package_names(self, instructions, setup):
        ((_, image),) = [found for found in instructions if found[0] == "FROM"]
        version = image.removeprefix("python:").removesuffix("-slim")
        assert f"Programming Language :: Python :: {version}" in setup["metadata"]["classifiers"]

    def test_all_that_the_package_is_built_from_is_sent(self, setup):
        lines = (ROOT / "docs" / "container" / "Dockerfile.dockerignore").read_text().splitlines()
        sent = {line[1:] for line in lines if line.startswith("!")}
        assert lines.index("*") < min(lines.index(f"!{name}") for name in sent)
        packages = {
            name.split(".")[1] for name in setup["options"]["packages"].split() if "." in name
        }
        modules = {path.name for path in ROOT.glob("*.py")}
        assert sent >= packages | modules | {
            "py.typed",
            "setup.cfg",
            "pyproject.toml",
            "README.md",
            "LICENSE",
        }
        assert all((ROOT / name).exists() for name in sent)


def test_the_job_script_starts_one_launcher_per_task(tmp_path):
    """With commands in place of Slurm's; benchmarks/slurm.sh submits it to a real one."""
    commands = {
        "scontrol": "echo node7; echo node8",
        "srun": 'for SLURM_PROCID in 0 1; do export SLURM_PROCID; "${@:2}"; done',
        "accelerate": 'echo "$OMP_NUM_THREADS" "$@"',
    }
    for name, lines in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NTASKS": 2, "GPUS_ON_NODE": 4, "JOB_NODELIST": "node[7-8]", "JOB_ID": 41}
    slurm |= {"CPUS_PER_TASK": 32}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    script = ROOT / "docs" / "accelerate" / "train.sbatch"
    command = ["bash", str(script), "run.yaml", "output=my runs/x"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    options = "8 launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank {}"
    options += " --main_process_ip node7 --main_process_port 20041"
    options += " --mixed_precision no --dynamo_backend no --module semroute.cli train"
    expected = [f"{options.format(rank)} run.yaml output=my runs/x" for rank in (0, 1)]
    assert run.stdout.splitlines() == expected


def test_public_names_resolve():
    for name in semroute.__all__:
        assert getattr(semroute, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = semroute.nonsense
