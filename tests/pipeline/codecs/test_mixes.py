import json

import numpy as np
import pytest
import torch

from semroute.pipeline.codecs.mixes import TOLERANCE, combine, find_mixes, mix
from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.extraction.rewrite import rewrite
from semroute.pipeline.store.open import open_features
from semroute.schemas import (
    ContractError,
    FeatureIdentity,
    InputError,
    Mixes,
    Routing,
    parse,
)
from semroute.trainer.diffusion.sampling import SamplingConfig
from semroute.trainer.evaluation.generate import generate
from semroute.trainer.model.fusion import layer_norm
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.train import train

L, H, D = 7, 48, 5


def correlated(rows=300, seed=0):
    """Layers that change little by little, as an LLM's do, one channel massive."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(rows, L, H, generator=generator) * 0.4
    hidden = torch.randn(rows, 1, H, generator=generator) + steps.cumsum(1)
    hidden[:, :, 3] += 40.0
    return hidden


def routing(weights, strategy="depth", layers=None):
    return Routing(
        strategy=strategy,
        step=3,
        source="ema",
        layers=layers or [*range(1, len(weights[0]) + 1)],
        weights=np.asarray(weights).tolist(),
    )


def softmax_weights(seed=0, num_blocks=D, spread=1.5):
    z = np.random.default_rng(seed).normal(size=(num_blocks, L)) * spread
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def errors_of(found, expected):
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item()


class TestFindMixes:
    def test_a_mix_is_of_normalised_layers(self):
        hidden, weights = correlated(9), softmax_weights()
        expected = torch.einsum("dl,rlh->rdh", torch.tensor(weights).float(), layer_norm(hidden))
        torch.testing.assert_close(mix(hidden, weights.tolist()), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("seed", range(4))
    def test_as_many_as_the_weights_are_independent_lose_nothing(self, seed):
        rng = np.random.default_rng(seed)
        few = softmax_weights(seed, num_blocks=2 + seed % 2)
        weights = rng.dirichlet(np.ones(len(few)), size=D) @ few  # [D, L] of rank 2 or 3
        found = find_mixes(routing(weights), correlated(seed=seed), len(few))
        assert found.error < 1e-5
        assert len(found.errors) == len(few)
        fresh = correlated(50, seed=99)  # of no part in it
        read = combine(mix(fresh, found.basis), found.coefficients)
        assert errors_of(read, mix(fresh, weights.tolist())) < 1e-5
        with pytest.raises(InputError, match=rf"are {len(few)} independent mixes; expected 1 to"):
            find_mixes(routing(weights), correlated(), len(few) + 1)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_the_error_is_what_blocks_read_and_falls_with_the_rank(self, rank):
        hidden, weights = correlated(), softmax_weights()
        found = find_mixes(routing(weights), hidden, rank)
        read = combine(mix(hidden, found.basis), found.coefficients)
        measured = errors_of(read, mix(hidden, weights.tolist()))
        assert found.error == pytest.approx(measured, rel=1e-3)
        assert found.errors == sorted(found.errors, reverse=True)
        assert found.tolerance is None

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_no_other_basis_is_better(self, rank):
        """Neither that of the weights alone nor one near to it, in least squares."""
        hidden, weights = correlated(), softmax_weights()
        expected = mix(hidden, weights.tolist())
        norms = expected.square().sum((0, 2), keepdim=True)

        def loss(approximate):
            return ((mix(hidden, approximate.tolist()) - expected).square() / norms).sum().item()

        found = find_mixes(routing(weights), hidden, rank)
        best = np.array(found.coefficients) @ np.array(found.basis)
        u, s, v = np.linalg.svd(weights)
        assert loss(best) < 0.98 * loss(u[:, :rank] * s[:rank] @ v[:rank])
        rng = np.random.default_rng(0)
        for _ in range(5):
            bent = np.array(found.basis) * (1 + 0.03 * rng.normal(size=(rank, L)))
            assert loss(best) <= loss(np.array(found.coefficients) @ bent)

    def test_the_rank_is_the_smallest_under_the_tolerance(self):
        found = find_mixes(routing(softmax_weights(spread=1.0)), correlated())
        assert found.tolerance == TOLERANCE
        assert found.error < TOLERANCE
        assert 1 < found.num_mixes < D
        assert found.errors[found.num_mixes - 2] >= TOLERANCE

    def test_mixes_have_a_mean_square_of_one(self):
        hidden = correlated()
        found = find_mixes(routing(softmax_weights()), hidden)
        squares = mix(hidden, found.basis).square().mean((0, 2))
        torch.testing.assert_close(squares, torch.ones(found.num_mixes), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("num_blocks", [1, D])
    def test_equal_weights_are_one_mix(self, num_blocks):
        found = find_mixes(routing(np.full((num_blocks, L), 1 / L)), correlated())
        assert found.num_mixes == len(found.errors) == 1
        assert found.error < 1e-6

    def test_a_sample_is_not_needed_in_one_piece_or_precision(self):
        hidden = correlated()
        whole, rounded = (
            find_mixes(routing(softmax_weights()), h, 2) for h in (hidden, hidden.bfloat16())
        )
        np.testing.assert_allclose(whole.basis, rounded.basis, rtol=0.05, atol=0.01)


class TestContract:
    @pytest.fixture
    def mixes(self):
        return find_mixes(routing(softmax_weights()), correlated(), 2)

    def test_json_brings_every_number_back(self, mixes):
        assert Mixes.model_validate_json(mixes.model_dump_json()) == mixes

    @pytest.mark.parametrize(
        ("key", "change", "message"),
        [
            (
                "weights",
                lambda m: [row[:-1] for row in m],
                r"rows of \[6\] numbers; expected rows of 7",
            ),
            ("basis", lambda m: [m[0], m[1][:3]], r"2 rows of \[3, 7\] numbers"),
            ("coefficients", lambda m: m[:-1], r"4 rows of \[2\] numbers; expected 5 of 2"),
            ("errors", lambda m: m[:1], "holds 1 ranks; expected 2"),
        ],
    )
    def test_matrices_that_do_not_fit_are_refused(self, mixes, key, change, message):
        document = mixes.model_dump()
        with pytest.raises(ContractError, match=message):
            parse(Mixes, document | {key: change(document[key])}, "manifest.json")

    def test_positions_are_numbers_of_mixes(self, mixes, feature_store):
        identity = open_features(feature_store).manifest.identity.model_dump()
        with pytest.raises(ContractError, match=r"layers is \[1, 2, 3, 4\]; expected 1 to 2"):
            parse(FeatureIdentity, identity | {"mixes": mixes.model_dump()}, "manifest.json")

    def test_weights_are_compared_block_by_block(self):
        weights = softmax_weights()
        own = routing(weights)
        assert own.distance(own.layers, (weights + 0.01).tolist()) == pytest.approx(0.01)
        assert own.distance([*range(2, L + 2)], own.weights) == np.inf
        assert own.distance(own.layers, own.weights[:2]) == np.inf
        same = routing(np.full((D, L), 1 / L))
        assert same.distance(same.layers, same.weights[:1]) == 0


@pytest.fixture(scope="module")
def configure(configure, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def changed(strategy, name=None, **changes):
        usual = {
            "steps": 6,
            "log_every": 3,
            "checkpoint_every": 3,
            "routing": {"strategy": strategy},
            "model": {"depth": 3, "width": 32, "patch_size": 6},
            "optimizer": {"lr": 1e-2, "router_lr": 0.3},
            "ema": {"every": 1},
        }
        return configure(folder / (name or strategy), **usual | changes)

    return changed


@pytest.fixture(scope="module")
def run_of(configure):
    """Strategy -> a trained run whose weights are far from uniform; read only."""
    found = {}

    def run_of(strategy):
        if strategy not in found:
            name, _, weights = strategy.partition(", ")
            options = {"strategy": name} | ({"weights": weights} if weights else {})
            found[strategy] = load_run(train(configure(strategy, routing=options)))
        return found[strategy]

    return run_of


@pytest.fixture(scope="module")
def mixed(run_of, feature_store, tmp_path_factory):
    """Strategy, and what else to ask for -> a store of its mixes; read only."""
    folder, found = tmp_path_factory.mktemp("mixed"), {}

    def mixed(strategy, **options):
        key = json.dumps([strategy, options])
        if key not in found:
            found[key] = rewrite(
                feature_store,
                folder / str(len(found)),
                routing=run_of(strategy).routing(open_features(feature_store).manifest.identity),
                shard_bytes=60_000,
                workers=0,
                report=[].append,
                **options,
            )
        return found[key]

    return mixed


def draw(run, features, ids=(1, 5, 9)):
    options = {"seed": 0, "batch_size": 2, "progress": False}
    return generate(run.model, run.flow, features, ids, SamplingConfig(3, 2.0), **options)


class TestRuns:
    @pytest.mark.parametrize(
        ("strategy", "rank"),
        [
            *(("penultimate", 1), ("uniform", 1), ("static", 1), ("depth", 3), ("depth", 1)),
            *(("one-per-block", 3), ("depth, signed", 3), ("depth, signed", 2)),
        ],
    )
    def test_blocks_read_the_same_within_the_stated_error(
        self, run_of, mixed, feature_store, strategy, rank
    ):
        run, features = run_of(strategy), open_features(feature_store)
        found = mixed(strategy, rank=rank)
        ids = range(len(features))
        router = run.model.router
        expected = router(features.read(ids, router.layers_read).tensor())
        with run.model.reading(found.mixes):
            read = run.model.router(found.read(ids, run.model.router.layers_read).tensor())
        assert run.model.router is router
        assert read.dtype == torch.float32
        assert read.shape == expected.shape
        receipts = [*found.receipts().values()]
        weights = [r.num_rows for r in receipts]
        stated = np.average([r.codec_error["mean"] for r in receipts], weights=weights)
        assert errors_of(read, expected) == pytest.approx(stated, rel=0.01)
        assert stated < (4e-3 if len(found.mixes.errors) == rank else 0.3)
        assert len(receipts[0].layer_error) == expected.shape[1]

    def test_a_store_has_so_many_vectors_a_token(self, mixed, feature_store):
        features = open_features(feature_store)
        found = mixed("depth", rank=1)
        assert found.read([3]).bits.shape[1:] == (1, 32)
        assert found.bytes_per_row() * 4 == features.bytes_per_row()
        assert found.layers == [1]
        assert "1 of these layers, for the blocks of a run with strategy depth" in str(found)

    @pytest.mark.parametrize("strategy", ["penultimate", "uniform", "static", "depth"])
    def test_pictures_are_the_same(self, run_of, mixed, feature_store, strategy):
        run, found = run_of(strategy), mixed(strategy)
        run.check_features(found.manifest.identity)
        expected = draw(run, open_features(feature_store))
        near = draw(run, found)
        assert np.abs(near - expected).max() < 0.03 * np.abs(expected).max()
        assert not np.array_equal(near, expected)  # it was read

    @pytest.mark.parametrize(
        ("strategy", "reason"),
        [
            ("time", "weighs layers differently at every noise level"),
            ("joint", "weighs layers differently at every noise level"),
            ("token", "weighs layers differently for every token"),
        ],
    )
    def test_weights_that_are_not_fixed_are_refused(self, run_of, strategy, reason):
        with pytest.raises(
            InputError, match=rf"strategy {strategy} {reason}, so its blocks do not read"
        ):
            run_of(strategy).routing()

    def test_features_of_another_llm_are_refused(self, run_of, feature_store):
        identity = open_features(feature_store).manifest.identity
        other = identity.model_copy(update={"tokenizer": "other"})
        with pytest.raises(InputError, match="tokenizer: 'other' instead of"):
            run_of("depth").routing(other)
        run_of("depth").routing(identity.model_copy(update={"layers": [1, 2, 3, 4, 5]}))

    def test_mixes_for_another_run_are_refused(self, run_of, mixed, feature_store):
        run, found = run_of("depth"), mixed("static")
        message = r"mixes.strategy: 'static' instead of 'depth'\n  mixes.weights: up to .* apart"
        with pytest.raises(InputError, match=message):
            run.check_features(found.manifest.identity)
        other = found.mixes.model_copy(update={"weights": run.routing().weights[:2]})
        with pytest.raises(InputError, match=r"2 blocks over 4 layers instead of 3 over 4"):
            run.check_features(found.manifest.identity.model_copy(update={"mixes": other}))
        with pytest.raises(InputError, match="with weights other than this network's"):
            draw(run, found)
        earlier = load_run(run.path, step=3, weights="model")
        with pytest.raises(
            InputError, match=r"mixes.source: 'ema' instead of 'model'\n  mixes.step: 6"
        ):
            earlier.check_features(mixed("depth").manifest.identity)
        with pytest.raises(InputError, match="weighs layers differently"):
            run_of("time").check_features(found.manifest.identity)

    def test_mixes_of_another_llm_are_refused(self, run_of, mixed):
        identity = mixed("depth").manifest.identity.model_copy(update={"tokenizer": "other"})
        with pytest.raises(InputError, match="tokenizer: 'other' instead of"):
            run_of("depth").check_features(identity)


@pytest.fixture(scope="module")
def run(configure, mixed):
    """Trained from the mixes of ``depth``, all its weights but these new."""
    features = str(mixed("depth", rank=2).path)
    return load_run(train(configure("mixes", features=features)))


class TestTraining:
    def test_nothing_is_learned_and_the_weights_stay(self, run, run_of):
        assert run.model.router_parameters() == []
        np.testing.assert_allclose(run.weights(), run_of("depth").weights(), atol=1e-6)
        assert run.layers == [1, 2, 3, 4]
        assert all(np.isfinite(line["loss"]) for line in run.metrics().to_pylist())
        assert "mixes, over layers 1 to 4" in repr(run)

    def test_it_begins_where_the_full_store_would(self, configure, mixed, feature_store, run_of):
        """One step on the same batch, from the same weights, under the same routing."""
        whole = configure("depth", "one-depth", steps=1, optimizer={"router_lr": 1e-9})
        start = load_run(train(whole))
        store = rewrite(
            feature_store,
            start.path.parent / "one-mixed",
            routing=start.routing(),
            workers=0,
            report=[].append,
        )
        less = load_run(train(configure("mixes", "one-mixes", steps=1, features=str(store.path))))
        (a,), (b,) = start.metrics().to_pylist(), less.metrics().to_pylist()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-2)

    def test_it_starts_from_the_weights_of_the_run(self, configure, mixed, run_of):
        origin = run_of("depth")
        features, frozen = str(mixed("depth").path), {"lr": 1e-9, "weight_decay": 0}
        config = configure(
            "mixes", "tuned", features=features, start=str(origin.path), optimizer=frozen, steps=1
        )
        tuned = load_run(train(config), weights="model").model.state_dict()
        expected = origin.model.state_dict()
        assert expected.keys() - tuned.keys() == {"router.weight"}
        for name, value in tuned.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)

    def test_a_start_from_another_network_is_refused(self, configure, mixed, run_of):
        features, start = str(mixed("depth").path), str(run_of("depth").path)
        changes = {"features": features, "start": start, "flow": {"prediction": "x0"}}
        message = r"is another network; .*\n  prediction: 'x0' instead of 'velocity'\nTrain with"
        with pytest.raises(InputError, match=message):
            train(configure("mixes", "refused", **changes))
        other = changes | {"start": str(run_of("static").path)}
        with pytest.raises(InputError, match=r"mixes.strategy: 'depth' instead of 'static'"):
            train(configure("mixes", "refused", **other))

    def test_it_continues_bit_for_bit(self, run, configure):
        features = run.record.config.features
        part = configure("mixes", "parted", features=features, steps=3)
        train(part)
        train(part.model_copy(update={"steps": 6}))
        again = load_run(part.output)
        for name, value in run.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value)

    def test_mixes_of_any_rank_can_be_read(self, run, mixed):
        exact = mixed("depth", rank=3)
        run.check_features(exact.manifest.identity)
        near, expected = draw(run, mixed("depth", rank=2)), draw(run, exact)
        assert np.abs(near - expected).max() < 0.2 * np.abs(expected).max()

    def test_new_prompts_are_mixed(self, run, tiny_llm):
        store = open_features(run.record.config.features)
        text = store.captions["text"][7].as_py()
        prompts = PromptEncoder(run.record.features, str(tiny_llm))([text])
        for entry, caption in ((0, 0), (1, 7)):
            a, b = prompts.read([entry]).tensor(), store.read([caption]).tensor()
            torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)
        draw(run, prompts, [1])

    def test_layers_cannot_be_read(self, run, feature_store):
        features = open_features(feature_store)
        with pytest.raises(InputError, match="mix them with semroute rewrite --routing"):
            run.check_features(features.manifest.identity)
        with pytest.raises(InputError, match="reads mixes of layers, but the features hold layers"):
            draw(run, features)

    def test_layers_are_mixed_by_it_as_by_its_origin(self, run, run_of):
        assert run.routing() == run_of("depth").routing()

    @pytest.mark.parametrize("strategy", ["penultimate", "uniform", "depth", "time"])
    def test_other_strategies_are_refused(self, configure, mixed, strategy):
        config = configure(strategy, f"refused-{strategy}", features=str(mixed("depth").path))
        with pytest.raises(InputError, match=rf"strategy {strategy} reads layers, but the store"):
            train(config)

    def test_a_store_of_layers_is_refused(self, configure):
        with pytest.raises(InputError, match=r"reads what semroute rewrite --routing RUN stored"):
            train(configure("mixes", "refused"))

    def test_another_number_of_blocks_is_refused(self, configure, mixed):
        model = {"size": "nano", "depth": 2, "width": 32, "patch_size": 6}
        features = str(mixed("depth").path)
        with pytest.raises(InputError, match=r"mixes for 3 blocks, but the model has 2: set"):
            train(configure("mixes", "refused", features=features, model=model))
        one = str(mixed("static").path)  # one mix for all blocks
        train(configure("mixes", "two-blocks", features=one, model=model, steps=1))
