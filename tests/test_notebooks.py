"""Notebooks run from top to bottom, and hold what they showed when they last did.

nbformat and nbclient take seconds to import: tests do it, not all processes that collect this file.
"""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, feature_store):
    """A folder with the stores that notebooks name."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "demo").mkdir()
    (folder / "demo" / "features").symlink_to(feature_store)
    return folder


def shown(notebook):
    """Of every code cell the kinds of what is below it."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[sorted(out.get("data", [out.get("name")])) for out in cell.outputs] for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebooks:
    def test_it_shows_the_same_kinds_of_things_on_another_store(self, path, place, monkeypatch):
        monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        nbformat = pytest.importorskip("nbformat")
        from nbclient import NotebookClient

        notebook = nbformat.read(path, as_version=4)
        expected = shown(notebook)
        options = {"timeout": 120, "kernel_name": "python3"}
        NotebookClient(notebook, resources={"metadata": {"path": str(place)}}, **options).execute()
        assert shown(notebook) == expected
        assert sum("image/png" in kinds for cell in expected for kinds in cell) >= 5

    def test_what_it_holds_was_made_by_one_run(self, path):
        nbformat = pytest.importorskip("nbformat")
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert "widgets" not in notebook.metadata  # pages would load their script from a network
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [out for cell in cells for out in cell.outputs]
        assert {out.output_type for out in outputs} <= {"execute_result", "display_data", "stream"}
        assert "stderr" not in [out.get("name") for out in outputs]
        assert not any(place in str(outputs) for place in ("/home/", "/tmp/", "site-packages"))
