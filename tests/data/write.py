"""Writes ``tests/data/VERSION``: stores, a run and exports, made by the version that is installed.

``tests/data/0.1.0`` was written by this script at commit 41125c2 (version 0.1.0), and
``tests/test_compatibility.py`` shows that every later version opens, verifies, reads, grows and
continues it. So a folder that is committed stays as it is to the byte and is never written again.
A version whose files differ from those before gets a folder of its own::

    python tests/data/write.py

``made.json`` in that folder holds the commit, the commands that made it, and digests of what its
files hold.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 24
"""Rows of the table that stores are made of; they grow by the others."""
NUM_SAMPLES = 32
BROKEN = 9
"""Row whose image is none."""
CODECS = ("bf16", "lossless", "delta", "linear")
FEATURES = (*CODECS, "mixes")
LATENTS = ("latents", "buckets")
STEPS = (2, 4)
"""Checkpoints of the run."""
PROMPTS = ("a red cup", "two green trees")
_LIBRARIES = ("numpy", "numcodecs", "pyarrow", "torch", "transformers", "zarr", "zstandard")

_WORK = ["--shard-size", "72KB", "--workers", "0", "--limit", str(LIMIT)]
_LLM = ["--model", "llm", "--threads", "1"]
_LATENT = [*_WORK, "--drop-broken", "--size", "32"]
_DRAWN = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
_DRAWN += ["--model", "llm", "--vae", "vae", "--num-steps", "4", "--cfg-scale", "3", "--seed", "7"]
_MIXED = ["--rank", "2", "--codec", "bf16", "--shard-size", "36KB", "--workers", "0"]
COMMANDS = {
    **{
        codec: ["extract", "samples.parquet", codec, *_LLM, *_WORK, "--codec", codec]
        for codec in CODECS
    },
    "latents": ["latents", "samples.parquet", "latents", "--vae", "vae", *_LATENT],
    "buckets": ["latents", "samples.parquet", "buckets", "--buckets", "16", *_LATENT],
    "run": ["train", "run.yaml"],
    "mixes": ["rewrite", "delta", "mixes", "--routing", "run", *_MIXED],
    "drawn": ["sample", "run", *_DRAWN, "--out", "drawn"],
    "pipeline": ["export", "run", "pipeline"],
    "router": ["export", "run", "router", "--router"],
    "study": ["study", "study.yaml", "--jobs", "1"],
}
"""What made each folder, run inside ``tests/data/VERSION``."""

_MODEL = {"size": "nano", "depth": 2, "width": 16, "num_heads": 2, "num_kv_heads": 1}
_MODEL |= {"head_dim": 8, "mlp_width": 32, "patch_size": 4}
RUN = {
    "features": "delta",
    "latents": "latents",
    "output": "run",
    "steps": STEPS[1],
    "checkpoint_every": STEPS[0],
    "log_every": 1,
    "mixed_precision": "no",
    "routing": {"strategy": "depth"},
    "model": _MODEL,
    "optimizer": {"name": "muon", "lr": 1e-2, "muon_lr": 0.05, "router_lr": 0.1},
    "data": {"batch_size": 4, "noise_draws": 2},
    "ema": {"decay": 0.5, "every": 1},
    "validation": {"share": 0.2, "every": 2, "num_samples": 4, "num_bins": 2},
}


def _scoring(name: str) -> dict[str, Any]:
    samples = f"shapes/{name}.parquet"
    return {"features": name, "samples": samples, "cfg_scales": [1.0, 3.0], "num_steps": 8}


STUDY = {
    "output": "study",
    "train": {
        "features": "train",
        "latents": "pixels",
        "steps": 300,
        "mixed_precision": "no",
        "model": {"size": "nano", "depth": 2, "patch_size": 6},
        "flow": {"prediction": "x0", "shift": 1.0},
        "optimizer": {"name": "muon"},
        "data": {"batch_size": 16, "noise_draws": 2},
        "ema": {"decay": 0.9, "every": 1},
    },
    "arms": {"uniform": {"routing.strategy": "uniform"}, "depth": {"routing.strategy": "depth"}},
    "reference": "uniform",
    "seeds": [0, 1],
    "scoring": _scoring("test"),
    "tuning": {
        "values": [0.001, 0.1],
        "steps": 200,
        "seeds": [7],
        "skill": "shape",
        "scoring": _scoring("dev"),
    },
}


# --------------------------------------------------------------------------------- what is there


def digest(array: np.ndarray) -> str:
    """sha256 of an array: its type, its shape and every byte."""
    about = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(about + np.ascontiguousarray(array).tobytes()).hexdigest()


def digest_tensors(tensors: dict[str, Any]) -> str:
    """sha256 of tensors by name."""
    named = {name: digest(tensor.detach().numpy()) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def digest_rows(*columns: Any) -> str:
    """sha256 of columns of a table."""
    return hashlib.sha256(json.dumps([c.to_pylist() for c in columns]).encode()).hexdigest()


def some_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that every version of numpy makes alike."""
    return ((np.arange(np.prod(shape)) * 7 % 33 - 16) / 8).astype(np.float32).reshape(shape)


def describe_features(path: Path, num: int | None = None) -> dict[str, str]:
    """Digests of what a feature store holds.

    Args:
        num: of its captions, the first ones. Default: all, and the samples too.
    """
    import semroute

    store = semroute.open_features(path)
    captions = store.captions.slice(0, num)
    names = ("text", "token_ids", "num_tokens", "num_cut_tokens")
    found = {
        "hidden": digest(store.read(range(captions.num_rows)).bits),
        "captions": digest_rows(*(captions[name] for name in names)),
    }
    if num is None:
        found["samples"] = digest_rows(store.samples["caption_ids"], store.samples["image"])
    return found


def hidden_by_text(path: Path) -> dict[str, np.ndarray]:
    """Bits of bfloat16, uint16 [T, L, H] each."""
    import semroute

    store = semroute.open_features(path)
    rows = store.read(range(len(store)))
    each = np.split(rows.bits, rows.offsets[1:-1])
    return dict(zip(store.captions["text"].to_pylist(), each, strict=True))


def read_latents(path: Path, first: int, stop: int) -> dict[str, np.ndarray]:
    """Latents of some samples by bucket, their means and draws from their posteriors."""
    import semroute

    store = semroute.open_latents(path)
    found = {}
    ids = store.ids[(store.ids >= first) & (store.ids < stop)]
    for bucket in np.unique(store.buckets[ids]).tolist():
        own = ids[store.buckets[ids] == bucket]
        found[f"mean {bucket}"] = store.read(own)
        shape = found[f"mean {bucket}"].shape
        found[f"draw {bucket}"] = store.read(own, some_noise(shape))
    return found


def describe_run(path: Path) -> dict[str, dict[str, str]]:
    """Digests of the weights at each checkpoint."""
    import semroute

    return {
        str(step): {
            weights: digest_tensors(semroute.load_run(path, step, weights).model.state_dict())
            for weights in ("ema", "model")
        }
        for step in STEPS
    }


def probe(folder: Path) -> dict[str, str]:
    """What decides whether this machine computes what the writer's did to the bit: versions, and
    digests of what the libraries give without semroute, one thread each."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import AutoModel

    torch.set_num_threads(1)
    llm = AutoModel.from_pretrained(folder / "llm")
    out = llm(torch.arange(120).reshape(4, 30), output_hidden_states=True)
    out.last_hidden_state.square().sum().backward()
    gradients = [parameter.grad for parameter in llm.parameters()]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    images = torch.from_numpy(some_noise((3, 3, 32, 32)))
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
    numbers = [*out.hidden_states, *gradients, latents]
    named = {str(number): each for number, each in enumerate(numbers)}
    return {**{name: version(name) for name in _LIBRARIES}, "numbers": digest_tensors(named)}


def contents(store: Path) -> dict[str, str]:
    """sha256 of each file of a store that holds no time."""
    files = [*store.glob("*.parquet"), *store.glob("*.zarr/**/*")]
    return {
        file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.is_file()
    }


# ---------------------------------------------------------------------------------- what is made


def write_llm(folder: Path) -> None:
    """A Llama of 4 layers and width 32 whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {byte: i + 2 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaModel(config).save_pretrained(folder)


def write_vae(folder: Path) -> None:
    """An AutoencoderKL of 4 channels, 2 x 2 pixels a latent pixel."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.36,
        shift_factor=0.12,
    ).save_pretrained(folder)


def write_samples(path: Path) -> None:
    """Rows of one or two captions, some of them the same, and images of three shapes."""
    import pyarrow as pa
    import pyarrow.parquet
    from PIL import Image

    colours = ("red", "green", "blue", "white")
    things = ("cup", "tree", "car", "bird", "box", "small dog", "clock")
    rng = np.random.default_rng(0)
    texts, images = [], []
    for row in range(NUM_SAMPLES):
        text = f"a {colours[row % 4]} {things[row % 7]}"
        texts.append([text, f"{text} in the snow"] if row % 4 == 1 else [text])
        shape = ((8, 8), (6, 12), (12, 6))[row % 3]
        pixels = np.kron(rng.integers(0, 256, (*shape, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        content = b"no image" if row == BROKEN else file.getvalue()
        images.append({"bytes": content, "path": f"{row:02d}.png"})
    texts[7] = texts[2]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"text": texts, "image": pa.array(images, kind)})
    pyarrow.parquet.write_table(table, path)


def invoke(*command: str) -> None:
    """A command of semroute, in this process."""
    from semroute.cli import cli

    print("semroute", *command, file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        cli.main(command, standalone_mode=False)


def write_everything() -> None:
    """All of a version's folder, into the current one."""
    import yaml

    import semroute

    write_llm(Path("llm"))
    write_vae(Path("vae"))
    write_samples(Path("samples.parquet"))
    Path("run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    Path("study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    fewer = ["16" if part == str(LIMIT) else part for part in COMMANDS["lossless"]]
    invoke(*fewer)  # the command below grows it
    for name, command in COMMANDS.items():
        if name != "study":
            invoke(*command)

    # Half a store: one shard is marked as not written.
    shutil.copytree("bf16", "interrupted")
    for file in Path("interrupted").glob("hidden.zarr/*/c/1/0/0"):
        file.unlink()
    with contextlib.suppress(SystemExit):  # that there were problems
        invoke("verify", "interrupted", "--repair")

    # Of a study all but the runs, which may be deleted, and the pictures.
    invoke("shapes", "shapes", "--num", "400", "--num-test", "12", "--num-dev", "6")
    stores = {name: f"shapes/{name}.parquet" for name in ("train", "dev", "test")}
    for name, file in stores.items():
        invoke("extract", file, name, *_LLM, "--workers", "0")
    invoke("latents", "shapes/train.parquet", "pixels", "--workers", "0")
    invoke(*COMMANDS["study"])
    gone = [*stores, "pixels", "study/runs", "study/tuning", "study/figures"]
    gone += [str(path) for path in Path("shapes").iterdir() if path.suffix != ".parquet"]
    for name in (*gone, "shapes/train.parquet"):
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()

    # What stores hold once they have grown, as bits of bfloat16 and as latents.
    Path("expected").mkdir()
    grown: dict[str, dict[str, str]] = {}
    for name in (*CODECS, *LATENTS):
        kept = Path("kept")
        shutil.copytree(name, kept)
        command = COMMANDS[name]
        place = command.index("--limit")
        invoke(*command[:place], *command[place + 2 :])
        grown[name] = contents(Path(name))
        if name == "bf16":
            np.savez("expected/grown.npz", **hidden_by_text(Path(name)))
        if name == "latents":
            np.savez("expected/latents.npz", **read_latents(Path(name), LIMIT, NUM_SAMPLES))
        shutil.rmtree(name)
        kept.rename(name)
    linear = semroute.open_features("linear")
    np.save("expected/linear.npy", linear.read(range(len(linear))).bits)

    run = semroute.load_run("run")
    made = {
        "version": semroute.__version__,
        "commit": read_commit(),
        "python": sys.version.split()[0],
        "commands": COMMANDS,
        "features": {name: describe_features(Path(name)) for name in FEATURES},
        "latents": {
            name: {key: digest(each) for key, each in read_latents(Path(name), 0, LIMIT).items()}
            for name in LATENTS
        },
        "run": describe_run(Path("run")),
        "alpha": run.weights().tolist(),
        "grown": grown,
        "probe": probe(Path()),
    }
    Path("made.json").write_text(json.dumps(made, indent=1) + "\n")


def read_commit() -> str:
    """Of the checkout that this file is in."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    import semroute

    target = Path(__file__).parent / semroute.__version__
    if target.exists():
        sys.exit(f"{target} is there, and is never written again")
    # Manifests name the LLM by its whole path, which is to be nobody's and is soon gone.
    folder = Path(tempfile.gettempdir()) / f"semroute-{semroute.__version__}"
    folder.mkdir()
    os.chdir(folder)
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # layouts say with how many threads
    torch.set_num_threads(1)
    write_everything()
    shutil.move(folder, target)
    print(target)


if __name__ == "__main__":
    main()
