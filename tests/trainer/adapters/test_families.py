"""Each family against its pipeline, whose own ``__call__`` gives the transformer its inputs."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import (  # noqa: E402
    _resolution_aware_mu,
)
from tiny_adapters import CONDITIONED, FAMILIES, bind, pack, spread, watch  # noqa: E402

from semroute.pipeline.inspection.pipelines import read_pipeline  # noqa: E402
from semroute.pipeline.models.text_pipelines import open_text_pipeline  # noqa: E402
from semroute.schemas import FlowConfig, LoraConfig, ModelConfig  # noqa: E402
from semroute.trainer.adapters.lora import add_lora  # noqa: E402
from semroute.trainer.adapters.paths import make_path, shift_of  # noqa: E402
from semroute.trainer.adapters.pretrained import find_pretrained, load_transformer  # noqa: E402

STRATEGIES = ("static", "time", "depth", "joint", "token")
PLACES = ("blocks", "input", "taps")
OTHER_LENGTH = 1e-6
"""Share of the largest output by which a network may differ where rows are laid out otherwise."""
REPLACE = ("pixart", "sana", "wan")
TOLD = {
    **dict.fromkeys(("sana", "wan", "sd3", "hidream", "fibo"), lambda told: told / 1000),
    **dict.fromkeys(("lumina2", "z-image", "ideogram4"), lambda told: 1 - told),
    **dict.fromkeys(("qwen-image", "auraflow", "flux2", "flux2-klein", "krea2"), lambda told: told),
}
"""Noise level of what each family's network is told."""
ENDS_EARLY = (
    *("sana", "wan", "hidream", "flux2", "flux2-klein", "lumina2", "z-image", "krea2"),
    *("qwen-image", "fibo"),
)
"""Pipelines whose last step of n begins at 1/n, before the shift; others end near 0."""
NEGATIVE = ("lumina2", "z-image", "ideogram4", "hidream")
"""Families that predict x0 - noise."""


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


class TestPipeline:
    @pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
    def test_gives_the_transformer_what_we_give_it(self, tiny: Any, guided: bool) -> None:
        """Text, mask, positions, packing, time and sign, from its first step to its last."""
        network = tiny.routed(strategy="depth")
        # Where padding is masked, with as much of it as we have, so that bits can be compared.
        length = {"max_sequence_length": tiny.num_rows(tiny.entry())}
        masked = tiny.name in ("pixart", "sana", "lumina2", "ideogram4")
        for step in tiny.record(guided=guided, **(length if masked else {})):
            for call in step.calls:
                num = len(call.entries)
                with torch.no_grad(), watch(network.transformer) as outputs:
                    prediction = network(
                        step.x_t.expand(num, -1, -1, -1),
                        step.t(tiny.name).expand(num),
                        **tiny.text(network, call.entries),
                    )
                # Krea 2 has its padding in the middle; Lumina 2 pads "" to the prompt's length.
                other = tiny.name == "krea2" or (tiny.name, call.entries) == ("lumina2", [0])
                limit = OTHER_LENGTH if other else 0.0
                assert difference(outputs[0], call.output) <= limit
                if not guided:
                    number = call.entries.index(tiny.entry())  # Z-Image runs "" even so
                    assert difference(prediction[number], step.model_output[0]) <= limit

    @only("pixart", "sana", "lumina2", "ideogram4")
    def test_pads_more_and_gets_the_same(self, tiny: Any) -> None:
        network = tiny.routed(strategy="depth")
        step = tiny.record(guided=False)[0]
        with torch.no_grad():
            found = network(step.x_t, step.t(tiny.name), **tiny.text(network, [tiny.entry()]))
        assert 0 < difference(found, step.model_output) <= OTHER_LENGTH

    @only(*CONDITIONED)
    def test_encodes_the_rows_that_are_stored(self, tiny: Any) -> None:
        """Base rows come from the conditioning, and what routing adds to them from the features:
        the same rows of the same captions."""
        network = tiny.routed(strategy="depth")
        for entry in range(len(tiny.texts)):
            text = network.encode_text(
                **{k: v for k, v in tiny.text(network, [entry]).items() if k != "x_t"}
            ).text
            torch.testing.assert_close(
                text.base[text.mask], tiny.base_rows(entry), rtol=2**-8, atol=1e-5
            )

    @only("pixart", "wan", "krea2", "ideogram4", "fibo")
    def test_base_rows_may_come_from_a_conditioning(self, tiny: Any) -> None:
        """The caption's own rows lie where its mask says; these networks count no positions."""
        network = tiny.routed(strategy="depth")
        entries = [0, tiny.entry()]
        mask = torch.zeros(2, 20, dtype=torch.bool)
        rows = [tiny.base_rows(entry) for entry in entries]
        embeds = torch.zeros(2, 20, *rows[0].shape[1:])
        for number, own in enumerate(rows):
            mask[number, [*range(1, len(own)), 19]] = True
            embeds[number, mask[number]] = own
        if tiny.name == "ideogram4":
            embeds = embeds.mT.flatten(2)
        elif tiny.name not in ("krea2", "fibo"):
            embeds = embeds[:, :, 0]
        given = {"prompt_embeds": embeds, "mask": mask}
        if tiny.name == "fibo":  # its blocks read all layers, and the last one again
            layers = embeds[:, :, : 1 + tiny.store.manifest.identity.model.num_layers]
            last = layers[:, :, [-1, -2]].flatten(2)
            given |= {"prompt_layers": layers, "prompt_embeds": last}
        inputs = tiny.inputs(network, entries)
        network.router.weight.data.normal_()
        with torch.no_grad():
            expected = network(**inputs)
            found = network(**{**inputs, "conditioning": given})
        assert difference(found, expected) <= 2 * OTHER_LENGTH


class TestBaseLayers:
    """Three tables name the layers that a network reads: of presets, of what pipelines do to text,
    and of families."""

    def test_tables_agree(self, tiny: Any) -> None:
        found = find_pretrained(str(tiny.folder))
        num_layers = tiny.store.manifest.identity.model.num_layers
        family = found.family.base_layers(num_layers, found.index, found.config)
        pipeline = open_text_pipeline(str(tiny.folder)).base_layers
        preset = read_pipeline(str(tiny.folder)).base_layers(num_layers)
        if tiny.name in ("hidream", "fibo"):  # the pipeline gives all layers, blocks read some
            assert {*family} <= {*pipeline}
        else:
            assert family == pipeline
        assert [*dict.fromkeys(family)] == [*preset]


class TestConvention:
    def test_the_true_target_has_no_loss(self, tiny: Any) -> None:
        """A transformer that answers what its family calls exact, from what it is told."""
        network = tiny.routed(strategy="depth")
        found = find_pretrained(str(tiny.folder))
        config = ModelConfig(kind="pretrained", pretrained=str(tiny.folder))
        path = make_path(FlowConfig(), found.identity(config, 36))
        x0, noise = torch.randn(
            2, 2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0)
        )
        t = torch.tensor([0.25, 0.812])
        answer = functools.partial(self.answer, tiny.name, x0, found.scheduler)
        network.transformer.register_forward_hook(answer, with_kwargs=True)
        text = tiny.text(network, [0, tiny.entry()])
        prediction = network(path.interpolate(x0, noise, t), t, **text)
        assert path.loss(prediction, x0, noise, t).max() < 1e-8
        assert path.loss(-prediction, x0, noise, t).min() > 1

    def answer(self, name: str, x0: Any, scheduler: Any, *call: Any) -> Any:
        module, args, kwargs, output = call
        given = bind(module, args, kwargs)
        told = next(given[key] for key in ("timestep", "timesteps", "t") if key in given)
        if name == "pixart":
            kept = diffusers.DDPMScheduler.from_config(dict(scheduler)).alphas_cumprod[told]
            kept = kept[:, None, None, None]
            eps = (given["hidden_states"] - kept.sqrt() * x0) / (1 - kept).sqrt()
            return (torch.cat([eps, torch.randn_like(eps)], dim=1),)
        sigma = TOLD[name](told)[:, None, None, None]
        if name == "z-image":
            return ([*(-(torch.stack(given["x"])[:, :, 0] - x0) / sigma)[:, :, None]],)
        image = given["hidden_states"]
        rows = output[0].shape[1] - x0[0, 0].numel() if name == "ideogram4" else 0  # of text
        velocity = (spread(name, image[:, rows:]) - x0) / sigma  # noise - x0
        truth = pack(name, -velocity if name in NEGATIVE else velocity)
        truth = torch.cat([output[0][:, :rows], truth], dim=1) if rows else truth
        assert truth.shape == output[0].shape
        return (truth,)

    def test_shift_is_that_of_the_pipeline(self, tiny: Any) -> None:
        """At the size of the image that it samples."""
        found = find_pretrained(str(tiny.folder))
        config = ModelConfig(kind="pretrained", pretrained=str(tiny.folder))
        shift = shift_of(found.identity(config, 36), tiny.record_shape)
        if tiny.name == "pixart":
            assert shift is None
            return
        if tiny.name == "ideogram4":  # at 16 pixels a latent pixel, as in the real one
            assert math.log(shift) == pytest.approx(_resolution_aware_mu(64, 64, 0.0))
            return
        # FLUX.2 shifts by the number of steps too, and Qwen-Image stretches what few steps leave.
        steps = 50 if tiny.name.startswith(("flux2", "qwen")) else 3
        told = torch.tensor([step.told for step in tiny.record(guided=False, steps=steps)]) / 1000
        unshifted = told / (shift - (shift - 1) * told)
        gaps = -unshifted.diff()
        assert gaps.max() - gaps.min() < 4e-3  # some are told whole numbers
        assert gaps.mean() == pytest.approx(1 / steps if tiny.name in ENDS_EARLY else 0.5, rel=0.02)


class TestAtZeroLogits:
    """At zero logits nothing has changed."""

    @pytest.mark.parametrize("where", PLACES)
    def test_all_strategies_are_the_pretrained_network(self, tiny: Any, where: str) -> None:
        expected = None
        for strategy in STRATEGIES:
            network = tiny.routed(strategy=strategy, where=where)
            inputs = tiny.inputs(network, [0, tiny.entry(), tiny.entry()])
            if expected is None:
                text = {key: inputs[key] for key in inputs if key != "x_t"}
                plain = network.encode_text(**text).text
                with torch.no_grad():
                    expected = network.family.call(
                        network.transformer, inputs["x_t"], inputs["t"], plain
                    )
            with torch.no_grad():
                assert torch.equal(network(**inputs), expected), strategy
        assert expected.std() > 0.1

    def test_every_socket_learns_at_the_first_step(self, tiny: Any) -> None:
        """With checkpointing as without, to the bit."""
        for strategy in STRATEGIES:
            gradients = []
            for checkpointing in (False, True):
                network = tiny.routed(strategy=strategy).train()
                network.gradient_checkpointing = checkpointing
                assert network.gradient_checkpointing is checkpointing
                prediction = network(**tiny.inputs(network, [0, tiny.entry(), tiny.entry()]))
                prediction.square().mean().backward()
                assert all(p.grad is None for p in network.transformer.parameters())
                gradients.append({n: p.grad for n, p in network.router.named_parameters()})
            plain, recomputed = gradients
            for name, gradient in plain.items():
                assert torch.equal(recomputed[name], gradient), (strategy, name)
            name = {"time": "gates.bias_out", "joint": "gates.bias_out", "token": "bias"}
            logits = plain[name.get(strategy, "weight")]
            rows = 1 if strategy in ("static", "time") else network.depth * self.taps(network)
            assert logits.reshape(rows, -1).abs().amax(1).min() > 0, strategy

    def taps(self, network: Any) -> int:
        return 1 if network.taps else len(network.base_layers)

    def test_its_names_are_those_that_it_had(self, tiny: Any) -> None:
        config = ModelConfig(kind="pretrained", pretrained=str(tiny.folder))
        found = find_pretrained(str(tiny.folder))
        plain = copy.deepcopy(load_transformer(found, config))  # its memory is aligned as theirs
        network = tiny.routed(train="router+lora", strategy="depth")
        assert (
            tiny.routed(strategy="depth").transformer.state_dict().keys()
            == plain.state_dict().keys()
        )
        add_lora(plain, LoraConfig(rank=2), found.family)
        assert [*network.transformer.state_dict()] == [*plain.state_dict()]
        network.sockets.remove()
        inputs = tiny.inputs(network, [tiny.entry()])
        network.router.weight.data.normal_()
        text = network.encode_text(**{key: inputs[key] for key in inputs if key != "x_t"}).text
        with torch.no_grad():
            found, expected = (
                network.family.call(transformer, inputs["x_t"], inputs["t"], text)
                for transformer in (network.transformer, plain)
            )
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("train", ["gain", "lora", "router+projection", "full"])
    def test_all_that_learns_gets_a_gradient(self, tiny: Any, train: str) -> None:
        """Ranks wait for one another's gradients."""
        network = tiny.routed(train=train, strategy="depth").train()
        network(**tiny.inputs(network, [0, tiny.entry()])).square().mean().backward()
        learning = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
        missing = {name.split(".")[2] for name, grad in learning.items() if grad is None}
        # The last block of Qwen-Image computes text that nothing reads.
        assert missing == ({"3"} if (tiny.name, train) == ("qwen-image", "full") else set())
        parts = {name.split(".")[0] for name in learning}
        assert (
            parts
            == {
                "gain": {"gain"},
                "lora": {"transformer"},
                "router+projection": {"router", "transformer"},
                "full": {"router", "transformer"},
            }[train]
        )
