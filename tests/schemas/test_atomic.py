"""Folders that are there whole or not at all, whenever their writer is killed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from semroute.pipeline.style import Figure
from semroute.schemas import InputError, check_writable
from semroute.schemas.atomic import whole_folder

AS_USER = """
import os, sys
from pathlib import Path
from semroute.schemas import check_writable
os.setuid(int(sys.argv[1]))
check_writable(Path(sys.argv[2]))
"""
KILLED = """
import os, signal, sys
from pathlib import Path
from semroute.schemas import atomic

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

moment, out = sys.argv[1], Path(sys.argv[2])
renames = []
rename = Path.rename

def counted(path, target):
    renames.append(path)
    if moment == f"rename {len(renames)}":
        kill()
    return rename(path, target)

Path.rename = counted
with atomic.whole_folder(out, own=("a", "b")) as folder:
    (folder / "a").write_text("half of it")
    if moment == "filling":
        kill()
    (folder / "b").write_text("b")
"""


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("moment", ["filling", "rename 1", "rename 2"])
def test_a_folder_whose_writer_was_killed_is_written_by_the_same_command(moment, before, tmp_path):
    out = tmp_path / "out"
    if before:
        with whole_folder(out) as folder:
            (folder / "a").write_text("of before")
    command = [sys.executable, "-c", KILLED, moment, str(out)]
    done = subprocess.run(command, check=False, env={**os.environ})
    assert done.returncode in (-9, 0)  # without a folder there is no second rename
    if done.returncode == 0:
        assert (moment, before) == ("rename 2", False)
    elif not before:
        assert not out.exists()
    with whole_folder(out, own=("a", "b")) as folder:
        (folder / "a").write_text("new")
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("a", "new")]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_all_as_it_was(tmp_path):
    out = tmp_path / "deep" / "out"

    def fail(out: Path) -> None:
        with whole_folder(out, own=("a",)) as folder:
            (folder / "a").write_text("half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail(out)
    assert not [*out.parent.iterdir()]
    out.mkdir()
    with whole_folder(out) as folder:
        (folder / "a").write_text("whole")
    with pytest.raises(OSError, match="no space"):
        fail(out)
    assert (out / "a").read_text() == "whole"
    (out / "thesis").touch()
    for own in ((), ("a",)):
        with pytest.raises(InputError, match="is not empty: name a new folder"):
            whole_folder(out, own).__enter__()
    with pytest.raises(InputError, match="is a file: name a new folder"):
        whole_folder(out / "a").__enter__()


def test_a_figure_that_cannot_be_drawn_leaves_the_one_before(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.savefig(tmp_path / "figure.png")
    before = (tmp_path / "figure.png").read_bytes()
    figure.text(0, 0, "$\\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


class TestCheckWritable:
    def test_creates_nothing(self, tmp_path):
        check_writable(tmp_path / "deep" / "er" / "file")
        check_writable(tmp_path)
        assert not [*tmp_path.iterdir()]

    @pytest.mark.parametrize("name", ["file/x", "file/x/y", "link/x"])
    def test_refuses_what_is_below_a_file(self, tmp_path, name):
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to(tmp_path / "file")
        with pytest.raises(NotADirectoryError):
            check_writable(tmp_path / name)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
    @pytest.mark.parametrize("user", [0, 65534])
    def test_asks_for_the_rights_of_the_user(self, user):
        with tempfile.TemporaryDirectory() as folder:  # below /tmp, which all may enter
            os.chmod(folder, 0o755)
            run = subprocess.run(
                [sys.executable, "-c", AS_USER, str(user), f"{folder}/deep/file"],
                capture_output=True,
                text=True,
            )
        if user == 0:
            assert run.returncode == 0, run.stderr
        else:
            assert f"PermissionError: [Errno 13] Permission denied: '{folder}'" in run.stderr
