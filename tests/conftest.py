"""A tiny LLM with random weights, a table of captioned images, and stores made from both."""

import fcntl
import functools
import gc
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import runpy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import settings

# Before any test imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

gc.disable()  # until all is collected

# How long an example takes says nothing on a machine that does other work.
settings.register_profile("semroute", deadline=None)
settings.load_profile("semroute")

NUM_LAYERS, WIDTH = 4, 32
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("cup", "tree", "car", "bird", "chair", "box", "clock", "small dog")
PLACES = ("", " on a table", " in the snow", " at night, seen from very far above")

LONGEST = (
    "trainer/evaluation/test_attach.py",
    "trainer/studies/test_runner.py",
    "trainer/training/test_trainer.py",
    "pipeline/extraction/test_features.py",
    "trainer/adapters/test_families.py",
    "trainer/evaluation/test_embed.py",
    "pipeline/executor/test_connect.py",
    "test_benchmarks.py",
    "test_docs.py",
    "pipeline/store/test_remote.py",
    "test_cli.py",
    "schemas/test_files.py",
)
"""Files that take longest. They come first: one that came last would run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What libraries made when they were imported stays: looking through it for garbage again and
    # again takes a tenth of the time.
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 10, 10)
    folder = Path(__file__).parent
    ranks = {folder / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


IMPORTS_TORCH = re.compile(
    r"^(?:import|from) (?:torch|accelerate|safetensors\.torch|semroute\.trainer)\b", re.MULTILINE
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without torch, files that import it, or what needs it, are left out."""
    if collection_path.suffix != ".py" or importlib.util.find_spec("torch"):
        return None
    return bool(IMPORTS_TORCH.search(collection_path.read_text("utf-8"))) or None


@pytest.fixture(scope="session", autouse=True)
def no_teams() -> Iterator[None]:
    """By default torch has one thread: tests run side by side on all cores, and a thread that waits
    for its team keeps its core busy."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("base", "workers"):
            patch.setattr(f"semroute.pipeline.executor.{module}.num_cpus", lambda: 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def titles_of_axes() -> Iterator[None]:
    """Every figure that is written in this process has titles on its axes and colour bars."""
    if importlib.util.find_spec("matplotlib") is None:
        yield
        return
    from figure_checks import untitled

    from semroute.pipeline.style import Figure

    write = Figure.savefig

    def checked(figure: Figure, *arguments: Any, **options: Any) -> None:
        write(figure, *arguments, **options)
        assert untitled(figure) == []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", checked)
        yield


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Processes of ``forkserver``, Dask's workers among them, are forked from one that has imported
    what they need. Each that is started anew takes six seconds of a core to import torch and
    transformers."""
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")  # sets its defaults, which must not come later
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        # A fork server is not told where its parent finds modules.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})


class Command:
    """``python -m MODULE ARGUMENTS`` in a process of its own, and in a session of its own.

    Attributes:
        output: file of what it prints.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[object],
        output: Path,
        environment: dict[str, str],
        max_file_bytes: int | None,
    ):
        self.output = output
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "folder": os.getcwd(),
            "environment": {**os.environ, **environment},
            "output": str(output),
            "max_file_bytes": max_file_bytes,
        }
        script = str(Path(__file__).with_name("run_command.py"))
        self.process = multiprocessing.get_context("forkserver").Process(
            target=runpy.run_path, args=(script,), kwargs={"init_globals": {"request": request}}
        )
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, timeout: float = 120) -> int:
        """Its exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def wait_until(self, ready: Callable[[], object], timeout: float = 120) -> None:
        """While it runs."""
        deadline = time.monotonic() + timeout
        while not ready():
            assert self.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.fixture
def start_command(fork_server: None, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Arguments of ``semroute``, or of another module -> :class:`Command`. What still runs at the
    end of the test is killed."""
    started: list[Command] = []

    def start(
        *arguments: object,
        module: str = "semroute.cli",
        max_file_bytes: int | None = None,
        **environment: str,
    ) -> Command:
        output = tmp_path / f"output-{len(started)}.txt"
        started.append(Command(module, arguments, output, environment, max_file_bytes))
        return started[-1]

    yield start
    for command in started:
        command.kill()


@pytest.fixture
def launch(start_command: Callable[..., Command], tmp_path: Path) -> Callable[..., list[Command]]:
    """Configurations of runs -> ranks that train them, as torchrun starts them from its one process
    (accelerate's own launcher runs only one on a CPU). ``words`` go before the files of the
    configurations, ``each`` has the words of a rank after them."""
    import torch

    stores: list[Any] = []

    def launch(
        *configs: Any,
        words: Sequence[str] = (),
        module: str = "semroute.cli",
        num_ranks: int = 2,
        each: Sequence[str] | None = None,
        **environment: str,
    ) -> list[Command]:
        files = [tmp_path / f"config-{number}.json" for number in range(len(configs))]
        for file, config in zip(files, configs, strict=True):
            file.write_text(config.model_dump_json(exclude_unset=True))
        stores.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True))
        environment |= {
            "ACCELERATE_USE_CPU": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(stores[-1].port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(num_ranks),
        }
        return [
            start_command(
                *(*words, *files, *([own] if own else [])),
                module=module,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **environment,
            )
            for rank, own in enumerate(each or [""] * num_ranks)
        ]

    return launch


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 4 layers and width 32 whose tokens are bytes."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llm")
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
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


def write_samples(
    path: Path, texts: list[str], size: int = 12, ratios: Sequence[float] = (1.0,)
) -> Path:
    """A parquet of captions with small PNG images, as HF datasets writes them.

    Args:
        ratios: height over width, in turn.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    images = []
    for number in range(len(texts)):
        height = round(size * ratios[number % len(ratios)])
        pixels = rng.integers(0, 256, (height, size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{number:06d}.png"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"text": pa.array(texts), "image": pa.array(images, kind)})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """192 captions, and 8 of them a second time."""
    unique = [
        f"a {colour} {thing}{place}"
        for colour, thing, place in itertools.product(COLOURS, THINGS, PLACES)
    ]
    return unique + unique[:8]


@pytest.fixture(scope="session")
def samples_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples") / "samples.parquet", texts)


@pytest.fixture(scope="session")
def feature_store(
    tmp_path_factory: pytest.TempPathFactory, samples_file: Path, request: pytest.FixtureRequest
) -> Path:
    """A complete feature store of several shards; read only. Without torch its numbers are random,
    and everything else about it is the same."""
    path = tmp_path_factory.mktemp("features") / "store"
    if importlib.util.find_spec("torch") is None:
        write_random_store(path, samples_file)
        return path
    from semroute.pipeline.extraction.features import extract

    arguments = {"model": str(request.getfixturevalue("tiny_llm")), "codec": "bf16"}
    extract(str(samples_file), path, shard_bytes=300_000, workers=0, report=_silent, **arguments)
    return path


@pytest.fixture(scope="session")
def random_store(
    tmp_path_factory: pytest.TempPathFactory, samples_file: Path, texts: list[str]
) -> Callable[..., Path]:
    """Codec, and the number of samples if not all -> a complete store of random codes and
    parameters, written without torch."""

    @functools.cache
    def make(codec: str, num: int | None = None) -> Path:
        folder = tmp_path_factory.mktemp("random")
        samples = samples_file
        if num is not None:
            samples = write_samples(folder / "samples.parquet", texts[:num])
        write_random_store(folder / codec, samples, codec)
        return folder / codec

    return make


def write_random_store(
    path: Path,
    samples_file: Path,
    codec_name: str = "bf16",
    *,
    num_layers: int = 4,
    width: int = 32,
    shard_bytes: int = 300_000,
    num_shards: int | None = None,
) -> None:
    """A feature store written with numpy alone: a token a byte, and one for BOS.

    Args:
        num_layers, width: other than 4 and 32 only with codec bf16.
        num_shards: write only so many shards, and leave the store unfinished.
    """
    from semroute.pipeline.codecs.base import digest_parameters
    from semroute.pipeline.codecs.registry import CODECS, open_codec
    from semroute.pipeline.extraction.driver import provenance
    from semroute.pipeline.sources.table import read_samples
    from semroute.pipeline.store.features import FeatureStore
    from semroute.pipeline.store.layout import pack
    from semroute.schemas import (
        CAPTIONS_SCHEMA,
        SAMPLES_SCHEMA,
        CaptionsIdentity,
        Codec,
        FeatureIdentity,
        FeatureManifest,
        Fit,
        ModelIdentity,
        Receipt,
        Template,
        fingerprint,
    )

    samples = read_samples(str(samples_file), need="text")
    rows = [row[0] for row in samples.texts().to_pylist()]
    texts = ["", *dict.fromkeys(rows)]
    lengths = np.array([max(1, len(text)) for text in texts])
    packing = pack(
        lengths,
        bytes_per_row=2 * num_layers * width,
        shard_bytes=shard_bytes,
        batch_tokens=512,
        aligned=CODECS[codec_name].aligned,
    )
    rng = np.random.default_rng(0)
    parameters = random_parameters(codec_name, rng)
    spec = Codec(
        name=codec_name,
        quality=3.0 if codec_name in ("delta", "linear", "predictive") else None,
        rank=6 if codec_name == "predictive" else None,
        code_bits={"delta": 8, "linear": 4, "predictive": 4}.get(codec_name),
        fit=Fit(num_captions=1, num_rows=1, sha256=digest_parameters(parameters))
        if parameters
        else None,
    )
    layers = [*range(1, num_layers + 1)]
    codec = open_codec(spec, layers, width, parameters)
    manifest = FeatureManifest(
        status="extracting",
        identity=FeatureIdentity(
            model=ModelIdentity(architecture="llama", num_layers=num_layers, width=width, files={}),
            tokenizer="bytes",
            template=Template(
                text="{bos}{caption}", prefix_tokens=[0], suffix_tokens=[], keep_prefix=False
            ),
            layers=layers,
            final_norm="normed",
            dtype="float32",
            attention="sdpa",
            max_length=512,
            captions=CaptionsIdentity(
                num_captions=len(texts), fingerprint=fingerprint(texts), seed=0
            ),
            samples=samples.identity(),
        ),
        layout=packing.layout,
        codec=spec,
        provenance=provenance(str(samples_file), "random"),
    )
    columns = [
        range(len(texts)),
        texts,
        [[0] if not text else list(text.encode()) for text in texts],
        lengths,
        np.zeros(len(texts), int),
        packing.shard,
        packing.row_start,
        packing.row_start + lengths,
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, CAPTIONS_SCHEMA, strict=True)]
    numbers = {text: number for number, text in enumerate(texts)}
    ids = pa.array([[numbers[row]] for row in rows], pa.list_(pa.int64()))
    sample_columns = [pa.array(range(len(rows)), pa.int64()), ids, samples.image_names()]
    store = FeatureStore.create(
        path,
        manifest,
        pa.table(arrays, schema=CAPTIONS_SCHEMA),
        pa.table(sample_columns, schema=SAMPLES_SCHEMA),
        parameters,
    )
    error = {"mean": 1e-3, "max": 2e-3, "mean_without_top3": 1e-3, "max_without_top3": 2e-3}
    for shard in store.remaining()[:num_shards]:
        entries = packing.entries(shard)
        shard_rows = [
            np.arange(packing.row_start[i], packing.row_start[i] + lengths[i]) for i in entries
        ]
        used = np.concatenate(shard_rows) - shard * packing.layout.rows_per_shard
        arrays = {
            spec.name: np.zeros((packing.layout.rows_per_shard, num_layers, spec.size), spec.dtype)
            for spec in codec.arrays
        }
        for name, codes in arrays.items():
            largest = 0x3F80 if name == "hidden" else 256
            codes[used] = rng.integers(0, largest, codes[used].shape)
        if "scalar" in arrays:  # numbers of a sensible size: means and deviations about 1
            arrays["scalar"][used, :, 1:4:2] = 0x3F
            arrays["scalar"][used, :, 4] = rng.integers(150, 190, (len(used), 4))
        store.write_receipt(
            Receipt(
                shard=shard,
                num_rows=len(used),
                num_entries=len(entries),
                files=store.write_shard(shard, arrays),
                codec_error=error,
                warnings=[],
                seconds={},
                worker="none",
            )
        )
    if num_shards is None:
        store.finish()


def random_parameters(codec: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of 4 layers of width 32."""
    if codec == "lossless":
        base, follow = (rng.integers(0, 256, (4, n)).astype(np.uint8) for n in (32, 256))
        return {"base": base, "follow": follow}
    if codec == "bf16":
        return {}
    bias = rng.normal(size=(4, 32)).astype(np.float32)
    if codec != "linear":
        lines = {"slope": rng.uniform(0.5, 1, (4, 32)).astype(np.float32), "bias": bias}
        if codec == "delta":
            return lines
        down, up = rng.integers(-127, 128, (2, 4, 6, 32)).astype(np.int8)
        shrink, gain = (np.full((4, size), 1e-3, np.float32) for size in (6, 32))
        return lines | {"down": down, "up": up, "shrink": shrink, "gain": gain}
    values = (rng.normal(size=(2, 4, 32, 32)) / 8).astype(np.float32)
    matrix, rotation = (values.view(np.uint32) >> 16).astype(np.uint16)
    return {"matrix": matrix, "rotation": rotation, "bias": bias}


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a VAE of diffusers with random weights: 4 channels, 2 x 2 pixels a latent pixel."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")

    two = {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
    }
    film = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        "latents_mean": [0.1, -0.2, 0.3, -0.4],
        "latents_std": [2.0, 1.5, 2.5, 0.5],
    }
    known = {
        "kl": (
            diffusers.AutoencoderKL,
            {
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4,
                "norm_num_groups": 4,
                "layers_per_block": 1,
                "scaling_factor": 0.36,
                "shift_factor": 0.12,
            },
        ),
        "dc": (
            diffusers.AutoencoderDC,
            {
                **two,
                "attention_head_dim": 4,
                "encoder_layers_per_block": (1, 1),
                "decoder_layers_per_block": (1, 1),
                "encoder_qkv_multiscales": ((), ()),
                "decoder_qkv_multiscales": ((), ()),
                "scaling_factor": 0.41,
            },
        ),
        "tiny": (
            diffusers.AutoencoderTiny,
            {**two, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        ),
        "flux2": (
            diffusers.AutoencoderKLFlux2,
            {
                "block_out_channels": (8, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4,
                "norm_num_groups": 4,
                "layers_per_block": 1,
            },
        ),
        "qwen": (diffusers.AutoencoderKLQwenImage, film),
        "wan": (diffusers.AutoencoderKLWan, film),
    }

    @functools.cache
    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp("vae") / name
        kind, arguments = known[name]
        torch.manual_seed(0)
        vae = kind(**arguments)
        if name == "flux2":
            vae.bn.running_mean.normal_(std=0.3)
            vae.bn.running_var.uniform_(0.5, 2.0)
        vae.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A name, and what writes a folder -> that folder, written by the first process that asks for
    it: all of pytest-xdist have it; read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    @functools.cache
    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder = root / "made" / name
        folder.parent.mkdir(exist_ok=True)
        with folder.with_name(f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = folder.with_name(f"{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                write(partial)
                partial.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_pipeline(make_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Family of ``tiny_pipelines.FAMILIES`` -> the folder of a diffusers pipeline; read only."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tiny_pipelines import make_pipeline

    @functools.cache
    def make(family: str) -> Path:
        return make_once(family, functools.partial(make_pipeline, family))

    return make


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other load, and no word in the environment on how threads wait."""
    from semroute.pipeline.executor.threads import WAITING

    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))


@pytest.fixture(scope="module")
def short_padding() -> Iterator[Any]:
    """Captions for Ideogram 4 are padded to 64 tokens, not 2,048, which take its 36 blocks most of
    a second each. Gives the recipe that pads to 2,048."""
    from dataclasses import replace

    from semroute.pipeline.models.text_recipes import RECIPES

    recipe = RECIPES["Ideogram4Pipeline"]
    short = {**recipe.arguments, "max_sequence_length": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, recipe.pipeline, replace(recipe, arguments=short))
        yield recipe


@pytest.fixture(scope="session")
def latent_store(tmp_path_factory: pytest.TempPathFactory, samples_file: Path) -> Path:
    """A complete latent store of the same samples, 3 x 12 x 12 pixels; read only."""
    from semroute.pipeline.extraction.latents import encode_images

    path = tmp_path_factory.mktemp("latents") / "store"
    encode_images(str(samples_file), path, shard_bytes=30_000, workers=0, report=_silent)
    return path


@pytest.fixture(scope="session")
def bucket_store(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A complete latent store of the same samples in three shapes, of which 4/7, 2/7 and 1/7 are
    square, tall and wide: 3 x 16 x 16, 3 x 24 x 8 and 3 x 8 x 24 pixels; read only."""
    from semroute.pipeline.extraction.latents import encode_images

    folder = tmp_path_factory.mktemp("buckets")
    file = write_samples(folder / "samples.parquet", texts, 24, (1, 1, 1, 1, 3, 3, 1 / 3))
    path = folder / "store"
    encode_images(str(file), path, size=16, buckets=8, workers=0, report=_silent)
    return path


@pytest.fixture(scope="session")
def configure(feature_store: Path, latent_store: Path) -> Callable[..., Any]:
    """Output folder -> the configuration of a run that takes a fraction of a second.

    Changes replace keys; ``model`` and ``data`` are merged.
    """
    from semroute.schemas import TrainConfig

    def configure(output: Path, **changes: Any) -> TrainConfig:
        document: dict[str, Any] = {
            "features": str(feature_store),
            "latents": str(latent_store),
            "output": str(output),
            "steps": 4,
            "mixed_precision": "no",
            "model": {"size": "nano", "depth": 2, "patch_size": 4},
            "data": {"batch_size": 4},
        }
        for key, value in changes.items():
            document[key] = document[key] | value if key in ("model", "data") else value
        return TrainConfig.model_validate(document)

    return configure


def _silent(_line: str) -> None:
    pass
