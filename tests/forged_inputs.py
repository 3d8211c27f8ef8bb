"""Files that are no store: tables, tars and encoded prompts, to be forged and read."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from attacked import INPUTS

from semroute.schemas import InputError

TABLES, EMBEDS = INPUTS
NUM = 12


def make_inputs(kind: str, path: Path) -> Path:
    """A folder of small files of a kind."""
    path.mkdir(parents=True)
    (_make_tables if kind == TABLES else _make_embeds)(path)
    return path


def _make_tables(path: Path) -> None:
    texts = [f"caption {number} {'x' * number}" for number in range(NUM)]
    columns = {
        "text": texts,
        "lists": [[text, "other"] for text in texts],
        "parts": [{"t": text} for text in texts],
        "codes": pa.array(texts).dictionary_encode(),
        "image": [{"bytes": bytes([number] * 9), "path": f"{number}.png"} for number in range(NUM)],
    }
    table = pa.table(columns)
    pq.write_table(table, path / "a.parquet")
    with pa.ipc.new_file(path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = [json.dumps({"text": text, "parts": {"t": text}}) for text in texts]
    (path / "a.jsonl").write_text("\n".join(rows))
    (path / "a.csv").write_text("text,image\n" + "".join(f'"{text}",0.png\n' for text in texts))
    with tarfile.open(path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number, text in enumerate(texts[:4]):
            for name, content in (("txt", text.encode()), ("png", b"image"), ("json", b"{}")):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size, info.pax_headers = len(content), {"comment": "x"}
                archive.addfile(info, io.BytesIO(content))


def _make_embeds(path: Path) -> None:
    from safetensors.numpy import save

    record = {
        **{"pipeline": "KreaPipeline", "base_layers": [1], "prompts": ["a", "b"], "negative": None},
        **{"learned": "layers", "layers": [1], "network": False, "step": 1, "weights": "ema"},
        "model": {"architecture": "llama", "num_layers": 2, "width": 4, "files": {}},
    }
    tensors = {
        "prompt_embeds": np.ones((2, 3, 4), np.float32),
        "pooled.0": np.ones((2, 4), np.float32),
        "pooled.1": np.zeros((2, 4), np.float32),
        "semroute.hidden": np.ones((5, 1, 4), np.float32),
        "semroute.offsets": np.array([0, 2, 5]),
    }
    (path / "a.safetensors").write_bytes(save(tensors, {"semroute": json.dumps(record)}))


def read_inputs(kind: str, path: str) -> str:
    """sha256 of what the files of a folder give their readers; the first refusal is raised when all
    have been read."""
    found, refused = hashlib.sha256(), []
    for file in sorted(Path(path).iterdir()):
        try:
            found.update(_read_embeds(file) if kind == EMBEDS else _read_table(file))
        except InputError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return found.hexdigest()


def _read_embeds(file: Path) -> bytes:
    from semroute.trainer.evaluation.embed import read_embeds

    embeds = read_embeds(file)
    lists = [value if isinstance(value, list) else [value] for value in embeds.given.values()]
    every = [each for values in (*lists, embeds.hidden) for each in values]
    return b"".join(each.numpy().tobytes() for each in every)


def _read_table(file: Path) -> bytes:
    from semroute.pipeline.sources.table import read_samples

    columns = (
        ("text",) if file.suffix in (".csv", ".tar") else ("text", "parts.t", "lists", "codes")
    )
    columns = columns[:2] if file.suffix == ".jsonl" else columns
    found = []
    for column in columns:
        name = None if file.suffix == ".tar" else column
        table = read_samples(str(file), text_column=name, need="text", blank="skip")
        found.append(str(table.texts().to_pylist()))
    if file.suffix != ".jsonl":
        table = read_samples(str(file), need="image", blank="skip")
        found.append(str([*table.image_files()]))
    return "".join(found).encode("utf-8", "replace")
