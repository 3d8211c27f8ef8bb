import json
import shutil

import pytest
from click.testing import CliRunner

from semroute.cli import cli
from semroute.pipeline.inspection.status import status
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.lock import locked
from semroute.schemas import LOCK_FILE


def begun(store, folder, without=1):
    """A copy of a store, with one shard not written."""
    path = shutil.copytree(store, folder / "store")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
    (path / "receipts" / f"shard-{without:06d}.json").unlink()
    return path


def drive(path, **changes):
    document = {"host": "node7", "pid": 77, "begun": "1", "started": "2026-01-01", "token": "a"}
    (path / LOCK_FILE).write_text(json.dumps(document | changes))


def drive_here(path):
    """As a driver of this machine that has ended."""
    (path / LOCK_FILE).unlink(missing_ok=True)
    with locked(path, [].append):
        own = json.loads((path / LOCK_FILE).read_text())
    drive(path, **own | {"pid": 2**22 + 1, "started": "2026-01-01"})


def test_a_complete_store_is_reported_as_complete(feature_store, latent_store):
    for path, unit in ((feature_store, "captions"), (latent_store, "samples")):
        found = status(path).details
        assert found["state"] == "complete"
        assert found["shards"] == found["shards_total"] > 1
        assert found[unit] == found[f"{unit}_total"]
        assert found["rows"] == found["rows_total"]
        assert found["eta_seconds"] is None
        assert "state" in str(status(path))


def test_a_store_that_is_being_filled(feature_store, tmp_path):
    path = begun(feature_store, tmp_path)
    found = status(path).details
    assert found["shards"] == found["shards_total"] - 1
    assert 0 < found["rows"] < found["rows_total"]
    assert found["eta_seconds"] > 0
    assert found["driver"] is None
    assert "stopped" in str(status(path))
    drive(path)
    assert "being written by process 77 on node7" in str(status(path))
    assert status(path).details["driver_is_dead"] is None
    drive_here(path)
    assert "its driver died" in str(status(path))
    assert status(path).details["driver_is_dead"] is True


def test_a_store_that_is_being_planned(tmp_path):
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        status(tmp_path)
    drive(tmp_path)
    assert "being planned by process 77 on node7" in str(status(tmp_path))
    drive_here(tmp_path)
    found = status(tmp_path)
    assert "its driver died" in str(found)
    assert found.details["state"] == "planning"
    assert found.details["driver_is_dead"] is True
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="manifest"):
        status(tmp_path)


def test_failures_are_listed(feature_store, tmp_path):
    path = begun(feature_store, tmp_path)
    (path / "quarantine").mkdir(exist_ok=True)
    quarantine = {"shard": 1, "entries": [5, 6], "reason": "ValueError: bad", "traceback": "..."}
    (path / "quarantine" / "shard-000001.json").write_text(json.dumps(quarantine))
    assert status(path).details["quarantined"] == {1: "ValueError: bad"}
    assert "1 shards: shard 1: ValueError: bad" in str(status(path))


def test_the_command_speaks_text_and_json(feature_store, tmp_path):
    path = begun(feature_store, tmp_path)
    run = CliRunner().invoke
    assert "shards" in run(cli, ["status", str(path)]).output
    assert json.loads(run(cli, ["status", str(path), "--json"]).output)["shards"] > 0
    nowhere = run(cli, ["status", str(tmp_path / "nothing")])
    assert nowhere.exit_code == 1
    assert "no manifest" in nowhere.output
