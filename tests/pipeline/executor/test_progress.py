import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from semroute.pipeline.executor import progress
from semroute.pipeline.executor.base import Interrupted, report_progress
from semroute.pipeline.executor.local import LocalExecutor
from semroute.pipeline.executor.progress import (
    EntriesDone,
    ShardFailed,
    ShardsEnded,
    ShardsStarted,
    ShardWritten,
    open_reporter,
)
from semroute.pipeline.extraction.driver import ExtractionError, run_shards
from semroute.pipeline.store.layout import pack
from semroute.schemas import Receipt
from semroute.schemas.verbosity import speaking

SHARDS = {0: (4, 40), 1: (4, 60), 2: (2, 20)}  # shard -> entries, rows
EVENTS = [
    (10.0, ShardsStarted(0, 0, "store", SHARDS, (1, 2), 8.0)),
    (12.0, EntriesDone(2, 0, 1, 2)),
    (13.0, ShardWritten(2, 0, 1, 5000)),
    (13.5, EntriesDone(2, 0, 1, 3)),  # comes late
    (48.0, ShardFailed(2, 2, 2, RuntimeError("no"))),
    (48.0, ShardsEnded(2, 2)),
]


@pytest.fixture
def show(monkeypatch):
    """Show events, each at its time."""

    def run(events=EVENTS, style="auto"):
        reporter = open_reporter(style, "captions")
        for now, event in events:
            monkeypatch.setattr(progress.time, "perf_counter", lambda now=now: now)
            reporter(event)

    return run


def test_json(show, capsys):
    show(style="json")
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    # The start, then a line per second at most, and the end.
    assert [line["seconds"] for line in lines] == [2, 4, 5, 40, 40]
    assert [line["captions"] for line in lines] == [4, 6, 8, 10, 10]
    assert [line["rows"] for line in lines] == [40, 70, 100, 120, 120]
    assert [line["shards"] for line in lines] == [1, 1, 2, 2, 2]
    assert lines[0]["eta_seconds"] is None
    assert lines[2] == {
        "store": "store",
        "shards": 2,
        "shards_total": 3,
        "captions": 8,
        "captions_total": 10,
        "rows": 100,
        "rows_total": 120,
        "captions_per_second": 0.8,
        "rows_per_second": 12.0,
        "bytes": 5000,
        "workers": 2,
        "errors": 0,
        "quarantined": 0,
        "seconds": 5.0,
        "eta_seconds": pytest.approx(20 / 12),
    }
    assert (lines[-1]["errors"], lines[-1]["quarantined"]) == (2, 1)


def test_a_log_has_a_line_now_and_then(show, capsys):
    show()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "store: 4/10 captions, 0.0 captions/s, 1/3 shards, 0 rows/s, 0 B",
        *2
        * [
            "store: 10/10 captions, 0.1 captions/s, 2/3 shards, 2 rows/s, 5.0 KB, 2 workers, "
            "2 errors, 1 quarantined, 0:00:00 left"
        ],
    ]


def test_a_terminal_has_a_bar(show, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    show()
    text = terminal.getvalue()
    assert text.endswith("\n")  # the bar is closed
    first, *_, last = text.strip().split("\r")
    # The line that a log has, behind the bar.
    assert first.startswith("40%|")
    assert first.rstrip().endswith(
        "| store: 4/10 captions, 0.0 captions/s, 1/3 shards, 0 rows/s, 0 B"
    )
    assert "| store: 10/10 captions, 0.1 captions/s, 2/3 shards, 2 rows/s, 5.0 KB, 2 work" in last
    assert last.rstrip().endswith("2 errors, 1 quarantined, 0:00:00 left")


def test_quiet_shows_nothing_and_verbose_more_often(show, capsys):
    with speaking("quiet"):
        show()
    assert capsys.readouterr() == ("", "")
    with speaking("verbose"):
        show()
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("style", ["auto", "json"])
def test_a_complete_store_has_nothing_to_show(show, capsys, style):
    show([(1.0, ShardsStarted(0, 0, "store", SHARDS, (), 0.5)), (2.0, ShardsEnded(0, 0))], style)
    assert capsys.readouterr() == ("", "")


class TestEvents:
    """Events that run_shards emits."""

    @staticmethod
    def run(function):
        """Write two shards of one entry each, and return the events after the first."""
        packing = pack(np.full(2, 5), bytes_per_row=1, shard_bytes=10, batch_tokens=10)
        store = SimpleNamespace(
            path=Path("store"),
            sweep=list,
            remaining=lambda: [0, 1],
            write_quarantine=lambda quarantine: None,
            is_complete=True,
            num_bytes=lambda: 10,
            has_budget=False,
            is_gone=lambda: False,
            manifest=SimpleNamespace(layout=SimpleNamespace(num_shards=2)),
        )
        events = []
        with pytest.raises((ExtractionError, Interrupted)):
            run_shards(
                store,
                [0, 1],
                function,
                lambda shard: (shard,),
                packing,
                executor=LocalExecutor(),
                report=[].append,
                listener=events.append,
            )
        started = events.pop(0)
        assert started == ShardsStarted(
            0, 0, "store", {0: (1, 5), 1: (1, 5)}, (0, 1), started.started
        )
        return events

    @staticmethod
    def write(shard):
        report_progress(shard, 1)
        return Receipt(
            shard=shard,
            num_rows=5,
            num_entries=1,
            files={},
            codec_error={},
            layer_error={},
            warnings=[],
            seconds={},
            worker="host:1",
        )

    def test_shards_that_are_written_and_that_fail(self):
        error = RuntimeError("no")

        def function(shard):
            if shard == 1:
                raise error
            return self.write(shard)

        assert self.run(function) == [
            EntriesDone(0, 0, 0, 1),
            ShardWritten(0, 0, 0, 0),
            ShardFailed(0, 2, 1, error),
            ShardsEnded(0, 2),
        ]

    def test_ctrl_c(self):
        def function(shard):
            os.kill(os.getpid(), signal.SIGINT)
            return self.write(shard)

        assert self.run(function) == [
            EntriesDone(0, 0, 0, 1),
            ShardWritten(0, 0, 0, 0),
            ShardsEnded(0, 0),
        ]
