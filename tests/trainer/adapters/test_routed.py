"""The network that is trained: what it reads, and what it refuses."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tiny_adapters import CONDITIONED, FAMILIES  # noqa: E402
from torch import nn  # noqa: E402

from semroute.schemas import InputError, OptimizerConfig  # noqa: E402
from semroute.trainer.adapters.families import find_family  # noqa: E402
from semroute.trainer.adapters.pretrained import find_pretrained  # noqa: E402
from semroute.trainer.runs.record import load_trained, trained_weights  # noqa: E402
from semroute.trainer.training.optimizers import make_optimizers  # noqa: E402

ROUNDING = 1e-6
"""Share of the largest output by which fp32 may differ in batches of another shape."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tiny_family: Callable[[str], Any]) -> Any:
    return tiny_family(request.param)


def only(*names: str) -> Any:
    return pytest.mark.parametrize("tiny", names, indirect=True)


def difference(found: Any, expected: Any) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def moved(network: Any) -> Any:
    """The same network, no longer at its start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in network.parameters() if p.requires_grad):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return network


class TestReading:
    def test_each_socket_reads_base_and_deviation(self, tiny: Any) -> None:
        """base + std(base) sum_l (alpha_l - 1/L) LN(h_l), written out for one caption."""
        network = moved(tiny.routed(strategy="depth"))
        entry = tiny.entry()
        inputs = tiny.inputs(network, [entry])
        source = network.encode_text(**{k: v for k, v in inputs.items() if k != "x_t"})
        hidden = inputs["hidden"].float()
        normed = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-5)
        z, num_layers = network.router.weight, hidden.shape[1]
        base = tiny.base_rows(entry)  # [T, K, H]
        std = (base.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        mixes = torch.einsum("sl,tlh->tsh", z / num_layers, normed)  # signed: (1 + z) / L
        for number in range(network.depth):
            if network.taps:
                tap = network.taps[number]
                expected = std[:, tap] * mixes[:, number]
                found = source.deviation_of(number)[source.text.mask][:, 0]
            else:
                first = number * base.shape[1]
                expected = std * mixes[:, first : first + base.shape[1]]
                found = source.deviation_of(number)[source.text.mask]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_what_is_learned_reaches_the_prediction_by_every_socket(self, tiny: Any) -> None:
        network = tiny.routed(strategy="depth")
        inputs = tiny.inputs(network, [tiny.entry()])
        with torch.no_grad():
            start = network(**inputs)
            for row in network.router.weight.data:
                row[0] = 3.0
                assert difference(network(**inputs), start) > 1e-4
                row[0] = 0.0
            assert torch.equal(network(**inputs), start)

    def test_padding_is_left_as_it_is(self, tiny: Any) -> None:
        network = moved(tiny.routed(strategy="depth"))
        inputs = tiny.inputs(network, [0, tiny.entry()])
        source = network.encode_text(**{k: v for k, v in inputs.items() if k != "x_t"})
        mask = source.text.mask
        assert not mask.all()
        for number in range(network.depth):
            assert source.deviation_of(number)[~mask].abs().max() == 0
            assert source.deviation_of(number)[mask].abs().amax(-1).min() > 0

    @pytest.mark.parametrize("strategy", ["depth", "joint", "token"])
    def test_a_batch_is_its_captions_one_by_one(self, tiny: Any, strategy: str) -> None:
        """Guidance runs the null caption beside the caption."""
        network = moved(tiny.routed(strategy=strategy))
        inputs = tiny.inputs(network, [0, tiny.entry()])
        with torch.no_grad():
            both = network(**inputs)
            for number, entry in enumerate((0, tiny.entry())):
                alone = {**inputs, **tiny.text(network, [entry])}
                alone |= {name: inputs[name][number : number + 1] for name in ("x_t", "t")}
                assert difference(both[number], network(**alone)[0]) <= 3 * ROUNDING

    @only("pixart", "sana", "wan")
    def test_one_row_of_logits_for_all_blocks_is_routing_at_the_input(self, tiny: Any) -> None:
        shared, blocks = moved(tiny.routed(where="input")), tiny.routed(where="blocks")
        assert shared.num_blocks == 1
        blocks.router.weight.data.copy_(shared.router.weight.expand(blocks.num_blocks, -1))
        inputs = tiny.inputs(shared, [0, tiny.entry()])
        with torch.no_grad():
            found, expected = blocks(**inputs), shared(**inputs)
        assert difference(found, expected) <= ROUNDING

    @only("krea2", "flux2", "hidream")
    def test_one_row_of_logits_for_all_taps_is_routing_at_the_input(self, tiny: Any) -> None:
        shared, taps = moved(tiny.routed(where="input")), tiny.routed(where="taps")
        assert (shared.num_blocks, taps.num_blocks) == (1, taps.depth if taps.taps else 3)
        taps.router.weight.data.copy_(shared.router.weight.expand(taps.num_blocks, -1))
        inputs = tiny.inputs(shared, [0, tiny.entry()])
        with torch.no_grad():
            assert difference(taps(**inputs), shared(**inputs)) <= ROUNDING

    @only("pixart", "qwen-image", "z-image", "wan", "krea2", "flux2")
    def test_images_need_not_be_square(self, tiny: Any) -> None:
        network = moved(tiny.routed(strategy="depth"))
        channels, height, width = tiny.latent_shape
        network.check_shape((channels, height, 2 * width))
        x_t = torch.randn(1, channels, height, 2 * width)
        inputs = {**tiny.inputs(network, [tiny.entry()]), "x_t": x_t}
        with torch.no_grad():
            prediction = network(**inputs)
            left = network(**{**inputs, "x_t": x_t.roll(width, -1)})
        assert prediction.shape == x_t.shape
        assert difference(prediction, left) > 0.1

    @only("krea2", "flux2")
    def test_fusion_changes_the_networks_own_weights(self, tiny: Any) -> None:
        network = tiny.routed(train="fusion")
        inputs = tiny.inputs(network, [tiny.entry()])
        network(**inputs).square().mean().backward()
        (weights,) = (p for p in network.parameters() if p.requires_grad)
        assert weights.numel() == len(network.base_layers) == 3
        assert weights.grad.abs().min() > 0
        if tiny.name == "krea2":
            assert weights is network.transformer.text_fusion.projector.weight
            return
        start = network(**inputs)
        weights.data.fill_(1.0)  # twice as loud
        given = inputs["conditioning"]
        given["prompt_embeds"] = given["prompt_embeds"] / 2
        assert difference(network(**inputs), start) <= ROUNDING


class TestTraining:
    @only("sana", "qwen-image", "hidream")
    def test_two_forward_passes_before_a_backward_pass(self, tiny: Any) -> None:
        """Under checkpointing the second would be recomputed with the text of the first."""
        for checkpointing in (False, True):
            network = moved(tiny.routed(strategy="depth")).train()
            network.gradient_checkpointing = checkpointing
            first = network(**tiny.inputs(network, [0], seed=0)).square().mean()
            second = network(**tiny.inputs(network, [tiny.entry()], seed=1)).square().mean()
            if checkpointing:
                with pytest.raises(RuntimeError, match="2 forward passes before a backward pass"):
                    (first + second).backward()
                continue
            (first + second).backward()
            together = network.router.weight.grad.clone()
        network = moved(tiny.routed(strategy="depth")).train()
        network.gradient_checkpointing = True
        for entry, seed in ((0, 0), (tiny.entry(), 1)):  # one after the other is as it should be
            network(**tiny.inputs(network, [entry], seed=seed)).square().mean().backward()
        assert difference(network.router.weight.grad, together) <= ROUNDING

    @only("sana", "krea2", "flux2")
    @pytest.mark.parametrize("train", ["router", "router+lora", "fusion", "router+projection"])
    def test_in_bfloat16_what_learns_is_in_float32(self, tiny: Any, train: str) -> None:
        if (train, tiny.name) == ("fusion", "sana"):
            pytest.skip("no weights of layers")
        network = tiny.routed(train=train, dtype="bfloat16").train()
        learning = {p.dtype for p in network.parameters() if p.requires_grad}
        assert (learning, network.dtype) == ({torch.float32}, torch.bfloat16)
        # FLUX.2 rounds a thousand times what it is told to the dtype of its weights.
        network.guidance = 0.5
        inputs = {**tiny.inputs(network, [0, tiny.entry()]), "t": torch.tensor([0.25, 0.5])}
        network(**inputs).square().mean().backward()
        assert all(p.grad.abs().max() > 0 for p in network.router_parameters())
        wide = tiny.routed(train=train)
        wide.guidance = 0.5
        with torch.no_grad():
            found, expected = network(**inputs), wide(**inputs)
        assert found.dtype == torch.float32
        assert difference(found, expected) < 0.05

    @pytest.mark.parametrize("train", ["router+lora", "router+projection"])
    def test_weights_that_learn_are_all_that_is_needed_to_have_it_again(
        self, tiny: Any, train: str
    ) -> None:
        network = moved(tiny.routed(train=train, strategy="joint"))
        weights = trained_weights(network)
        assert {*weights} == {n for n, p in network.named_parameters() if p.requires_grad}
        again = tiny.routed(train=train, strategy="joint")
        load_trained(again, weights)
        inputs = tiny.inputs(network, [0, tiny.entry()])
        with torch.no_grad():
            assert torch.equal(again(**inputs), network(**inputs))

    def test_a_network_that_learned_is_saved_as_any_other(self, tiny: Any, tmp_path: Path) -> None:
        network = moved(tiny.routed(train="full"))
        network.transformer.save_pretrained(tmp_path)
        plain = type(network.transformer).from_pretrained(tmp_path)
        inputs = tiny.inputs(network, [0, tiny.entry()])
        text = network.encode_text(**{k: v for k, v in inputs.items() if k != "x_t"}).text
        network.sockets.remove()
        with torch.no_grad():
            found, expected = (
                network.family.call(transformer, inputs["x_t"], inputs["t"], text)
                for transformer in (plain, network.transformer)
            )
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "train", ["fusion", "gain", "router+lora", "router+projection", "full"]
    )
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @only("krea2")
    def test_every_parameter_is_in_one_group(self, tiny: Any, name: str, train: str) -> None:
        network = tiny.routed(train=train)
        optimizers = make_optimizers(network, OptimizerConfig(name=name))
        groups = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        learning = [p for p in network.parameters() if p.requires_grad]
        assert sorted(map(id, groups)) == sorted(map(id, learning))

    @pytest.mark.slow
    @only("pixart", "wan", "flux2", "krea2")
    def test_blocks_compile_to_as_many_graphs_as_without_us(
        self, tiny: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graphs: list[Any] = []

        def backend(graph: Any, _inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        counts = []
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        for train in ("lora", "router+lora"):
            network = tiny.routed(train=train, strategy="depth")
            inputs = tiny.inputs(network, [0, tiny.entry()])
            with torch.no_grad():
                expected = network(**inputs)
                torch._dynamo.reset()
                graphs.clear()
                network.compile_blocks()
                assert difference(network(**inputs), expected) <= ROUNDING
            counts.append(len(graphs))
        torch._dynamo.reset()
        assert counts[0] == counts[1] > 0


class TestRefusals:
    """One message each: what was found, what was expected, what to do."""

    @only("pixart", "krea2")
    def test_a_strategy_without_logits(self, tiny: Any) -> None:
        for strategy in ("penultimate", "uniform", "one-per-block", "concat", "attention"):
            message = f"strategy {strategy} has no logits that start at zero.*choose static"
            with pytest.raises(InputError, match=message):
                tiny.routed(strategy=strategy, weights="softmax")

    @only("pixart", "hidream")
    def test_fusion_where_there_is_none(self, tiny: Any) -> None:
        with pytest.raises(InputError, match=f"{tiny.name} has no weights of layers of its own"):
            tiny.routed(train="fusion")

    @only("sana", "krea2", "flux2-klein")
    def test_a_base_layer_that_is_not_stored(self, tiny: Any) -> None:
        base = tiny.routed().base_layers
        message = (
            rf"does not hold layers \[{base[-1]}\]: extract them too, as --template {tiny.name} "
        )
        with pytest.raises(InputError, match=message):
            tiny.routed(layers=[layer for layer in tiny.store.layers if layer != base[-1]])

    @only("wan", "auraflow")
    def test_a_caption_that_is_too_long(self, tiny: Any) -> None:
        network = tiny.routed()
        longest = network.family.length
        for length in (longest, longest + 1):
            text = {
                "hidden": torch.randn(length, len(tiny.store.layers), 32),
                "offsets": torch.tensor([0, length]),
                "caption": torch.tensor([0]),
            }
            if length == longest:
                assert network.encode_text(**text).text.whole
                continue
            message = f"a caption has {length} rows, but {tiny.name} takes {longest}: extract the"
            with pytest.raises(InputError, match=message):
                network.encode_text(**text)

    @only("flux2", "hidream")
    def test_features_of_another_template(self, tiny: Any) -> None:
        network = tiny.routed()
        text = tiny.text(network, [tiny.entry()])
        text |= {"hidden": text["hidden"][1:], "offsets": text["offsets"] - text["offsets"][:1]}
        text["offsets"][1] -= 1
        num = tiny.num_rows(tiny.entry())
        message = (
            f"a caption has {num - 1} rows in the features, but {num} in the conditioning: extract "
            f"the features from the same captions with --template {tiny.name}"
        )
        with pytest.raises(InputError, match=message):
            network.encode_text(**text)

    @only(*CONDITIONED)
    def test_no_conditioning(self, tiny: Any) -> None:
        network = tiny.routed()
        text = {**tiny.text(network, [0]), "conditioning": None}
        with pytest.raises(InputError, match="which features do not hold: name a store that"):
            network.encode_text(**text)

    def test_latents_of_another_vae(self, tiny: Any) -> None:
        network = tiny.routed()
        channels, height, width = tiny.latent_shape
        network.check_shape(tiny.latent_shape)
        message = (
            f"latents have {channels + 1} channels, but .* takes {channels}: encode the images"
        )
        with pytest.raises(InputError, match=message):
            network.check_shape((channels + 1, height, width))
        if network.family.latents(network.transformer.config)[1] > 1:
            with pytest.raises(InputError, match=f"latents of {height + 1} x {width} are not div"):
                network.check_shape((channels, height + 1, width))

    def test_a_network_of_no_family(self) -> None:
        known = r"Expected one of PixArtTransformer2DModel \(pixart\), .*HiDreamImageTransformer2DM"
        with pytest.raises(InputError, match=f"X: UNet2DConditionModel cannot be adapted.*{known}"):
            find_family("UNet2DConditionModel", "X")
        with pytest.raises(InputError, match=f"ChromaTransformer2DModel .*issue 13619.*{known}"):
            find_family("ChromaTransformer2DModel", "X")

    @only("qwen-image")
    def test_a_pipeline_that_gives_its_network_something_else(
        self, tiny: Any, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(tiny.folder, tmp_path / "copy"))
        index = json.loads((copy / "model_index.json").read_text())
        changes = {
            "QwenImageEditPipeline cannot be adapted: .* Expected QwenImagePipeline": {
                "_class_name": "QwenImageEditPipeline"
            },
            "has two transformers": {"transformer_2": ["diffusers", "QwenImageTransformer2DModel"]},
        }
        for message, change in changes.items():
            (copy / "model_index.json").write_text(json.dumps(index | change))
            with pytest.raises(InputError, match=message):
                find_pretrained(str(copy))
        for name in ("", "transformer"):  # the pipeline, and the transformer alone
            found = find_pretrained(str(tiny.folder / name))
            assert (found.family.name, bool(found.index)) == ("qwen-image", not name)

    @only("sana")
    def test_all_weights_in_bfloat16(self, tiny: Any) -> None:
        with pytest.raises(InputError, match=r"trains all weights, in float32, but model\.dtype"):
            tiny.routed(train="full", dtype="bfloat16")
