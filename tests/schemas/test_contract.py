import pytest

from semroute.schemas import (
    ContractError,
    InputError,
    TrainConfig,
    differences,
    parse,
    refuse_differences,
)

CONFIG = {"features": "f", "latents": "l", "output": "o"}


def test_the_defaults_are_the_papers_recipe():
    config = parse(TrainConfig, CONFIG, "run.yaml")
    assert (config.steps, config.mixed_precision) == (500_000, "bf16")
    assert (config.model.size, config.model.conditioning) == ("paper", "none")
    assert (config.flow.prediction, config.flow.shift) == ("velocity", 6.0)
    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 1e-4)
    assert (config.optimizer.weight_decay, config.optimizer.max_grad_norm) == (1e-4, 1.0)
    assert (config.ema.decay, config.ema.every) == (0.99, 100)
    assert (config.data.batch_size, config.data.caption_dropout) == (512, 0.1)
    assert config.routing.strategy == "depth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": {}}, "optimiser: unknown key; did you mean 'optimizer'?"),
        ({"routing": {"stratgy": "time"}}, "routing.stratgy: unknown key; did you mean 'strategy'"),
        ({"qqq": 1}, "qqq: unknown key; known keys: "),
        ({"routing": {"strategy": "deep"}}, "routing.strategy: Input should be 'penultimate'"),
        ({"steps": 0}, r"steps: .*greater than or equal to 1 \(found 0\)"),
        ({"data": {"batch_size": 10}, "grad_accum_steps": 3}, "10 is not a multiple of .* 3"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: .*valid number"),
    ],
)
def test_every_problem_is_named(change, message):
    with pytest.raises(ContractError, match=message):
        parse(TrainConfig, CONFIG | change, "run.yaml")


def test_several_problems_are_listed_together():
    with pytest.raises(ContractError) as error:
        parse(TrainConfig, {"features": "f", "stepps": 1}, "run.yaml")
    lines = str(error.value).splitlines()
    assert lines[0] == "run.yaml is not valid:"
    assert len(lines) == 4  # latents and output are missing, stepps is unknown


def test_differences_are_found_leaf_by_leaf():
    a = {"x": {"y": 1, "z": [1, 2]}, "w": 0}
    b = {"x": {"y": 2, "z": [1, 2]}, "v": "long" * 50}
    found = differences(a, b)
    assert [d.key for d in found] == ["v", "w", "x.y"]
    assert str(found[2]) == "x.y: 1 instead of 2"
    assert len(str(found[0])) < 100
    assert differences(a, a) == []


def test_differences_are_refused_key_by_key():
    refuse_differences([], "a is not b", "Choose one.")
    different = differences({"x": 1, "y": 2}, {"x": 1, "y": 3, "z": 0})
    with pytest.raises(ContractError) as error:
        refuse_differences(different, "a is not b", "Choose one.", ContractError)
    assert str(error.value) == (
        "a is not b:\n  y: 2 instead of 3\n  z: None instead of 0\nChoose one."
    )
    with pytest.raises(InputError, match=r"^a:\n  b\nc$"):
        refuse_differences(["b"], "a", "c")
