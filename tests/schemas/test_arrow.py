"""What Python holds is read in the calling thread: a thread of Arrow's that still held it would
keep a process that ends from ending."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

READ = """
import os, sys
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from semroute.pipeline.sources.embedded import EmbeddedReader
from semroute.pipeline.sources.formats import read_columns, string_columns
from semroute.pipeline.store.checks.parquet import read_parquet, read_table
from semroute.schemas.arrow import ascending, grouped, passing

def threads():
    return len(os.listdir("/proc/self/task"))

folder, names = Path(sys.argv[1]), [f"c{n}" for n in range(8)]
schema = pa.schema([(name, pa.string()) for name in names])
before = threads()
for path in (f"{folder}/t.parquet", *(f"file://{folder}/{name}.arrow" for name in "ts")):
    assert string_columns(path) == names
    assert read_columns(path, names).num_rows == 6000
with EmbeddedReader([str(folder / "t.parquet")], "c1") as reader:
    assert reader.read(0, 5000) == "5000"
assert read_table(folder / "t.parquet", schema).num_rows == 6000
content = pa.py_buffer((folder / "t.parquet").read_bytes())
assert read_parquet(content, schema, 6000).num_rows == 6000
table = pa.table({name: np.arange(200_000)[::-1] // n for n, name in enumerate("abc", 1)})
assert passing(table, pc.field("a") > 199_000).num_rows == 999
assert grouped(table, ["c"]).aggregate([("a", "mean")]).num_rows == 66_667
assert ascending(table, ["c", "b"])["a"][0].as_py() == 1  # 0 came after it, and is no less
print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux")
def test_no_thread_of_arrow_is_started(tmp_path: Path) -> None:
    table = pa.table({f"c{n}": [str(row) for row in range(6000)] for n in range(8)})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=2000)
    pa.feather.write_feather(table, tmp_path / "t.arrow", compression="zstd", chunksize=1000)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(tmp_path / "s.arrow"), table.schema, options=options) as stream:
        stream.write_table(table, 1000)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_nothing_else_reads_or_groups_tables() -> None:
    root, found = Path(__file__).parents[2], []
    for path in (
        path for folder in ("pipeline", "trainer") for path in (root / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and THREADED.search(ast.unparse(node.func)):
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []


THREADED = re.compile(
    r"\b(pq|parquet)\.(read_table|read_schema|ParquetFile)$|\.(group_by|sort_by)$"
)
