"""Lines of ``metrics.jsonl`` as a study counts them."""

import os

import pytest

from semroute.schemas import InputError
from semroute.trainer.runs.metrics import last_step


@pytest.mark.parametrize(
    "line", [b"\xff", b"[]", b"{}", b"3", b'{"step": "1"}', b'{"step": true}', b"{" * 9_000]
)
def test_a_study_counts_no_steps_of_damaged_metrics(tmp_path, line):
    assert last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3}\n{"step": 4}\n{"st')
    assert last_step(tmp_path) == 4
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl.* is damaged"):
        last_step(tmp_path)


def test_metrics_are_a_plain_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl is a named pipe"):
        last_step(tmp_path)
