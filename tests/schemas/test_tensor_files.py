import os
import stat

import pytest
import torch

from semroute.schemas.atomic import make_folder, write_document
from semroute.schemas.tensor_files import make_readable, save_tensors
from semroute.trainer.runs.checkpoint import save_checkpoint
from semroute.trainer.shapes.dataset import write_world


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    """Permissions of all files, and of all folders."""
    found = {True: set(), False: set()}
    for path in (folder, *folder.rglob("*")):
        found[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
    return found[False], found[True]


def test_files_and_folders_have_the_permissions_of_the_umask(umask, tmp_path):
    tensors = {"a": torch.zeros(3)}
    folder = make_folder(tmp_path / "new", "it.")
    save_tensors(tensors, folder / "a.safetensors", {"format": "pt"})
    save_tensors(tensors, folder / "a.safetensors")  # in the place of the first
    write_document(folder / "a.json", "{}")
    parts = {"model": tensors, "ema": tensors, "optimizer": {}, "state": {}}
    save_checkpoint(folder, 1, keep=1, **parts)
    world = folder / "world"
    write_world(world, 4, 0, images_per_caption=1, num_test=2, num_dev=1)
    assert modes(folder) == ({0o666 & ~umask}, {0o777 & ~umask})


def test_files_of_other_libraries_become_readable(umask, tmp_path):
    folder = make_folder(tmp_path, "it")
    (folder / "inner").mkdir()
    for name in ("private.safetensors", "inner/config.json"):
        (folder / name).touch(0o600)
    make_readable(folder)
    assert modes(folder)[0] == {0o666 & ~umask}
    assert not (folder / ".mode").exists()


def test_a_place_that_cannot_be_written_to_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "file" / "a.safetensors")
