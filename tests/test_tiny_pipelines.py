"""The tiny pipelines behave like the real ones wherever other tests rely on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tiny_pipelines import FAMILIES, load_pipeline, make_pipeline, run_size  # noqa: E402

GUIDED = {"qwen-image": {"negative_prompt": "blurry"}}
"""What switches guidance on where it is not the default."""


@pytest.fixture
def load(tiny_pipeline: Callable[[str], Path]) -> Callable[[str], Any]:
    """Family -> its pipeline as it is when it is loaded."""
    return lambda family: load_pipeline(tiny_pipeline(family))


def sample(pipeline: Any, family: str, prompt: str, **arguments: Any) -> Any:
    """What two steps from seed 0 give: latents, or an image with ``output_type="pt"``."""
    output = pipeline(
        prompt=prompt,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
        **{"output_type": "latent"} | run_size(family) | arguments,
    )
    return output[0]


@pytest.mark.parametrize("family", FAMILIES)
class TestMakePipeline:
    def test_is_complete_and_safe(self, family: str, tiny_pipeline: Callable[[str], Path]) -> None:
        folder = tiny_pipeline(family)
        index = json.loads((folder / "model_index.json").read_text())
        parts = {part for part in index if (folder / part).is_dir()}
        assert parts >= {"tokenizer", "text_encoder", "transformer", "vae", "scheduler"}
        assert {path.name for path in folder.iterdir()} == {*parts, "model_index.json"}
        weights = {path.suffix for path in folder.rglob("*") if path.stat().st_size > 2**20}
        assert weights <= {".safetensors"}
        assert not list(folder.rglob("*.bin"))

    def test_is_the_same_every_time(
        self, family: str, tiny_pipeline: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder = tiny_pipeline(family)
        state = torch.random.get_rng_state()
        again = make_pipeline(family, tmp_path / "again")
        assert torch.equal(torch.random.get_rng_state(), state)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert len(files) > 8
        different = [
            path for path in files if (folder / path).read_bytes() != (again / path).read_bytes()
        ]
        assert not different

    def test_samples_and_reads_its_text(self, family: str, load: Callable[[str], Any]) -> None:
        pipeline = load(family)
        cup = sample(pipeline, family, "a red cup")
        assert torch.equal(sample(pipeline, family, "a red cup"), cup)
        assert cup.isfinite().all()
        tree = sample(pipeline, family, "a green tree")
        assert (cup - tree).abs().mean() > 0.005 * cup.std()

    def test_decodes_with_guidance(self, family: str, load: Callable[[str], Any]) -> None:
        size = run_size(family)
        guided = GUIDED.get(family, {})
        image = sample(load(family), family, "a red cup", output_type="pt", **guided)
        assert tuple(image.shape[-3:]) == (3, size["height"], size["width"])
        assert 0 <= image.min() < image.max() <= 1

    def test_layers_of_text_encoders_differ(self, family: str, load: Callable[[str], Any]) -> None:
        pipeline = load(family)
        encoders = {n: m for n, m in pipeline.components.items() if n.startswith("text_encoder")}
        for name, encoder in encoders.items():
            tokenizer = pipeline.components[name.replace("text_encoder", "tokenizer")]
            ids = tokenizer("a small dog, seen from above", return_tensors="pt").input_ids
            with torch.no_grad():
                output = encoder(input_ids=ids, output_hidden_states=True)
            layers = torch.stack(output.hidden_states)[:, 0].double()
            assert len(layers) >= 5
            directions = torch.nn.functional.normalize(layers, dim=-1)
            likeness = torch.einsum("itc,jtc->ijt", directions, directions).mean(-1)
            likeness.fill_diagonal_(0)
            assert likeness.max() < 0.999, name
            rows = layers - layers.mean(1, keepdim=True)
            assert (rows.std((1, 2)) > 0.1 * layers.std((1, 2))).all(), name


@pytest.mark.parametrize("family", ["qwen-image", "krea2"])
def test_prefix_has_as_many_tokens_as_are_dropped(family: str, load: Callable[[str], Any]) -> None:
    pipeline = load(family)
    template = getattr(pipeline, "prompt_template_encode", "")
    prefix = template.split("{}")[0] or pipeline.prompt_template_encode_prefix
    suffix = template.split("{}")[-1] or pipeline.prompt_template_encode_suffix
    tokens = pipeline.tokenizer([prefix, suffix, f"{prefix}a red cup{suffix}"]).input_ids
    assert len(tokens[0]) == pipeline.prompt_template_encode_start_idx == 34
    assert len(tokens[1]) == 5
    assert tokens[2] == [*tokens[0], *pipeline.tokenizer("a red cup").input_ids, *tokens[1]]
