"""``semroute train`` on pretrained networks: killed and resumed, on two ranks, sharded."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from conftest import write_samples  # noqa: E402

from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.extraction.latents import encode_images  # noqa: E402
from semroute.schemas import TrainConfig  # noqa: E402
from semroute.trainer.runs.checkpoint import KINDS, latest_checkpoint  # noqa: E402
from semroute.trainer.runs.metrics import read_metrics  # noqa: E402
from semroute.trainer.training.train import train  # noqa: E402

TESTS = str(Path(__file__).parents[2])
NUMBERS = ("step", "loss", "grad_norm", "lr", "routing_entropy")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stores(
    tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Callable[[str], Path]
) -> Callable[[str], dict[str, Path]]:
    """Family -> its pipeline, and features and latents of 20 samples made with it."""

    @functools.cache
    def make(family: str) -> dict[str, Path]:
        folder, pipeline = tmp_path_factory.mktemp(family), tiny_pipeline(family)
        texts = [f"a {colour} {thing}" for colour in COLOURS for thing in THINGS]
        samples = str(write_samples(folder / "samples.parquet", texts, size=16))
        quiet = {"workers": 0, "report": lambda _line: None}
        llm = str(pipeline / "text_encoder")
        extract(
            samples,
            folder / "features",
            model=llm,
            template=family,
            codec="bf16",
            threads=1,
            **quiet,
        )
        encode_images(samples, folder / "latents", vae=str(pipeline), **quiet)
        return {"pretrained": pipeline, **{n: folder / n for n in ("features", "latents")}}

    return make


COLOURS = ("red", "green", "blue", "white")
THINGS = ("cup", "tree", "car", "bird", "box")


@pytest.fixture
def configure(stores: Callable[[str], dict[str, Path]], tmp_path: Path) -> Callable[..., Any]:
    """A run of a few steps; a mapping changes the keys that it names."""

    def configure(family: str, output: str, **changes: Any) -> TrainConfig:
        found = stores(family)
        document: dict[str, Any] = {
            "features": str(found["features"]),
            "latents": str(found["latents"]),
            "output": str(tmp_path / output),
            "steps": 6,
            "mixed_precision": "no",
            "log_every": 1,
            "checkpoint_every": 2,
            "model": {"kind": "pretrained", "pretrained": str(found["pretrained"])},
            "routing": {"strategy": "depth"},
            "optimizer": {"warmup_steps": 2, "lr": 1e-3, "router_lr": 1e-2},
            "data": {"batch_size": 4, "noise_draws": 2, "prefetch": 2, "unverified": True},
            "ema": {"every": 2},
        }
        for key, value in changes.items():
            document[key] = document[key] | value if isinstance(value, dict) else value
        return TrainConfig.model_validate(document)

    return configure


def tensors(path: Path | str) -> dict[str, Any]:
    checkpoint = latest_checkpoint(Path(path))
    return {
        f"{kind}/{name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in getattr(checkpoint, kind)().items()
    }


def assert_same_run(first: Path | str, second: Path | str) -> None:
    """To the bit."""
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    lines, others = (
        [[line[name] for name in NUMBERS] for line in read_metrics(Path(path))]
        for path in (first, second)
    )
    assert lines == others


def assert_close_run(
    found: Path | str, expected: Path | str, tolerance: float, kinds: tuple[str, ...] = KINDS
) -> None:
    """But for the order of sums: Adam divides a gradient near zero by its own size, so that a few
    weights may move elsewhere."""
    losses = [[line["loss"] for line in read_metrics(Path(path))] for path in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance / 50)
    one, two = tensors(found), tensors(expected)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.partition("/")[0] not in kinds:
            continue
        error = (tensor - two[name]).abs() / two[name].abs().max().clamp(min=1e-12)
        assert error.flatten().sort().values[int(0.9 * (error.numel() - 1))] < tolerance, name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sana, router+lora": (
        "sana",
        {"model": {"train": "router+lora"}, "routing": {"strategy": "joint"}},
    ),
    "sana, gain": ("sana", {"model": {"train": "gain"}}),
    "qwen-image, full": (
        "qwen-image",
        {"model": {"train": "full"}, "gradient_checkpointing": True},
    ),
    "qwen-image, muon": (
        "qwen-image",
        {"model": {"train": "router+projection"}, "optimizer": {"name": "muon"}},
    ),
    "pixart, bf16": ("pixart", {"mixed_precision": "bf16", "routing": {"strategy": "token"}}),
    "krea2, fusion": ("krea2", {"model": {"train": "fusion"}}),
}


class TestResume:
    @pytest.mark.parametrize("case", CASES)
    def test_continues_bit_for_bit(self, configure: Callable[..., Any], case: str) -> None:
        family, changes = CASES[case]
        whole = train(configure(family, "whole", **changes), progress=False)
        config = configure(family, "parts", **changes)
        train(config.model_copy(update={"steps": 3}), progress=False)
        train(config, progress=False)
        assert_same_run(whole, config.output)
        first, *_, last = read_metrics(whole)
        assert first["step"] == 1
        assert last["routing_entropy"] != first["routing_entropy"] or "train" in changes["model"]

    @pytest.mark.slow
    def test_after_a_kill(
        self, configure: Callable[..., Any], start_command: Callable[..., Any], tmp_path: Path
    ) -> None:
        changes = {"model": {"train": "router+lora"}, "steps": 24, "checkpoint_every": 4}
        config = configure("sana", "killed", **changes)
        (tmp_path / "run.json").write_text(config.model_dump_json(exclude_unset=True))
        process = start_command("train", tmp_path / "run.json")
        # A checkpoint is written while training goes on.
        process.wait_until(lambda: latest_checkpoint(Path(config.output)) is not None)
        process.kill()
        assert 4 <= latest_checkpoint(Path(config.output)).step < 24
        train(config, progress=False)
        assert_same_run(train(configure("sana", "whole", **changes), progress=False), config.output)


@pytest.mark.slow
class TestRanks:
    """Two processes on a CPU."""

    def test_two_do_what_one_does(
        self, configure: Callable[..., Any], launch: Callable[..., Any]
    ) -> None:
        changes = {"model": {"train": "router+lora"}, "gradient_checkpointing": True}
        config = configure("sana", "two", **changes)
        wait_for_all(launch(config, words=["train"]))
        one = train(configure("sana", "one", **changes), progress=False)
        assert_close_run(config.output, one, 1e-3)

    def test_fsdp2_in_bfloat16(
        self, configure: Callable[..., Any], launch: Callable[..., Any]
    ) -> None:
        """Begun by one process, sharded in the middle, and finished by one. Gates read t, of which
        bfloat16 would leave two digits."""
        changes = {"mixed_precision": "bf16", "routing": {"strategy": "joint"}}
        families: dict[str, dict[str, Any]] = {
            "qwen-image": {"model": {"train": "full"}},
            "krea2": {"model": {"train": "router+projection"}, "gradient_checkpointing": True},
        }
        configs = {
            family: configure(family, f"sharded-{family}", **changes, **own)
            for family, own in families.items()
        }
        for config in configs.values():
            train(config.model_copy(update={"steps": 2}), progress=False)
        halfway = [config.model_copy(update={"steps": 4}) for config in configs.values()]
        wait_for_all(launch(*halfway, module="run_sharded", PYTHONPATH=TESTS))
        for family, config in configs.items():
            train(config, progress=False)
            same = configure(family, f"one-{family}", **changes, **families[family])
            one = train(same, progress=False)
            # Of moments, those of gradients that bfloat16 mostly rounds are elsewhere.
            assert_close_run(config.output, one, 0.15, ("model", "ema"))


def wait_for_all(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.output.read_text()
