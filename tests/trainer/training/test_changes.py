"""Stores and directories that change or go while they are used end in one message."""

import os
import shutil
import time

import pytest
from tiny_stores import shards

from semroute.pipeline.extraction.features import extract
from semroute.schemas import InputError
from semroute.trainer.training.train import train
from semroute.trainer.training.trainer import Trainer


def overwrite(file):
    file.write_bytes(file.read_bytes()[::-1])


def truncate(file):
    os.truncate(file, 4096)


def replace(file):
    other = file.with_name("other")
    shutil.copy(file, other)
    other.rename(file)


@pytest.fixture
def after_a_step(monkeypatch):
    """Do something once the first step of a run is logged."""

    def arrange(change):
        log, done = Trainer.log, []

        def logged(self, *arguments):
            log(self, *arguments)
            if not done:
                time.sleep(0.01)
                done.append(change())

        monkeypatch.setattr(Trainer, "log", logged)

    return arrange


@pytest.mark.parametrize("change", [overwrite, truncate, replace])
@pytest.mark.parametrize("kind", ["features", "latents"])
def test_a_store_that_changes_ends_the_run(
    kind, change, after_a_step, configure, feature_store, latent_store, tmp_path
):
    made = feature_store if kind == "features" else latent_store
    store = shutil.copytree(made, tmp_path / "store")
    for file in shards(store):
        os.utime(file, (0, 0))
    after_a_step(lambda: [change(file) for file in shards(store)])
    config = configure(tmp_path / "run", steps=40, log_every=1, **{kind: str(store)})
    with pytest.raises(InputError, match=r"/c/\d/.* has changed since it was opened") as raised:
        train(config, progress=False)
    assert str(store) in str(raised.value)


def test_a_run_directory_that_goes_ends_the_run_and_is_not_made_anew(
    after_a_step, configure, tmp_path
):
    after_a_step(lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    config = configure(tmp_path / "run", log_every=2, checkpoint_every=1)
    with pytest.raises(InputError, match="run is gone: the run's directory was moved or removed"):
        train(config, progress=False)
    assert not (tmp_path / "run").exists()
    (tmp_path / "moved").rename(tmp_path / "run")
    (tmp_path / "run" / "driver.json").unlink()  # of this process, which is alive
    assert train(config, progress=False) == tmp_path / "run"


@pytest.mark.parametrize("lost", ["store", "manifest.json"])
def test_a_store_that_goes_while_it_is_written_is_not_in_quarantine(
    lost, samples_file, tiny_llm, tmp_path
):
    path = tmp_path / "store"

    def lose(line):
        if "to do" in line:
            (path if lost == "store" else path / lost).rename(tmp_path / "moved")

    with pytest.raises(InputError, match=r"no store any more: its manifest\.json was moved or re"):
        extract(
            str(samples_file),
            path,
            model=str(tiny_llm),
            workers=0,
            codec="bf16",
            report=lose,
        )
    assert not (path / "quarantine").exists()
    assert path.exists() == (lost != "store")
