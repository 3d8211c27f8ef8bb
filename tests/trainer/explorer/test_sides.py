import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_stores

import semroute
from semroute.schemas import InputError
from semroute.trainer.explorer.sides import explore
from semroute.trainer.explorer.widget import pack_answer
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.train import train

FOLDER = Path(semroute.__file__).parent / "trainer" / "explorer"


@pytest.fixture(scope="module")
def make_run(configure, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")

    def make(strategy):
        path = folder / strategy
        return path if path.exists() else train(configure(path, routing={"strategy": strategy}))

    return make


def ask(explorer, question, side=0, **arguments):
    return explorer.sides[side].answer(question, arguments)


class TestSources:
    def test_stores_and_runs_by_path_and_opened(self, feature_store, make_run):
        store, run = semroute.open_features(feature_store), load_run(make_run("depth"))
        for source in (feature_store, str(feature_store), store):
            (facts,) = explore(source).facts
            assert facts["run"] is None
            assert facts["features"]["layers"] == [1, 2, 3, 4]
        for source in (run.path, run):
            (facts,) = explore(source).facts
            assert (facts["run"]["block"], facts["run"]["blocks"]) == ("block", 2)
            assert facts["features"]["captions"] == 193
        pair = explore(store, run)
        assert repr(pair) == f"Explorer of {feature_store} and {run.path}: Jupyter shows it"

    def test_what_cannot_be_explored_is_refused(self, latent_store, tmp_path, feature_store):
        with pytest.raises(InputError, match="found LatentStore; expected a feature store"):
            explore(semroute.open_latents(latent_store))
        with pytest.raises(InputError, match="it has no manifest"):
            explore(tmp_path)
        with pytest.raises(InputError, match="sample is 0; expected at least 1"):
            explore(feature_store, sample=0)

    def test_without_anywidget_it_says_what_to_install(self, feature_store, monkeypatch):
        monkeypatch.delitem(sys.modules, "semroute.trainer.explorer.widget", raising=False)
        monkeypatch.setitem(sys.modules, "anywidget", None)
        with pytest.raises(InputError, match=r"pip install 'semroute\[notebook\]'"):
            explore(feature_store)

    def test_a_run_whose_features_are_gone_shows_its_weights(
        self, make_run, feature_store, tmp_path
    ):
        run = shutil.copytree(make_run("depth"), tmp_path / "run")
        record = (run / "run.json").read_text()
        (run / "run.json").write_text(record.replace(str(feature_store), "gone"))
        alone = explore(run)
        assert alone.facts[0]["features"] is None
        assert ask(alone, "weights")["alpha"].shape == (1, 2, 4)
        with pytest.raises(InputError, match="nothing here answers 'search'"):
            ask(alone, "search", words="")
        with pytest.raises(InputError, match="gone, are not here: name a store with features="):
            ask(alone, "reads", caption=1, block=0, t=1.0)
        again = explore(run, features=feature_store)
        assert ask(again, "reads", caption=1, block=0, t=1.0)["share"].shape[1] == 4


class TestRuns:
    @pytest.mark.parametrize("strategy", ["depth", "joint", "token", "penultimate"])
    def test_shares_are_those_of_the_mix_that_a_block_reads(self, make_run, strategy):
        torch = pytest.importorskip("torch")
        run = load_run(make_run(strategy))
        for parameter in run.router.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        explorer = explore(run)
        answer = ask(explorer, "reads", caption=7, block=1, t=0.5)
        share, layers = answer["share"], answer["layers"]
        np.testing.assert_allclose(share.sum(1), 1, rtol=1e-4)
        store = explorer.sides[0].features.store
        hidden = store.read([7], layers).tensor().float()
        num = len(hidden)
        owners = {"rows": torch.arange(num), "owners": torch.zeros(num, dtype=torch.int64)}
        extra = owners if run.router.depends_on_t else {}
        t = torch.tensor([0.5]) if run.router.depends_on_t else None
        mix = run.router(hidden, t, **extra)
        mix = mix[:, -1 if mix.shape[1] == 1 else 1].numpy()  # [T, H]
        normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-5).numpy()
        # Layers work along the mix in these shares of it.
        along = np.einsum("tlh,th->tl", normed, mix) / np.square(mix).sum(1, keepdims=True)
        if strategy in ("depth", "joint"):
            alpha = run.weights([0.5])[0, 1]
            np.testing.assert_allclose(share, along * alpha, rtol=1e-3, atol=1e-4)
        if strategy == "penultimate":
            assert share.shape[1] == 1

    def test_weights_by_level_block_and_layer(self, make_run):
        answer = ask(explore(make_run("joint")), "weights")
        assert answer["t"][::10] == [0.0, 0.5, 1.0]
        assert answer["alpha"].shape == (21, 2, 4)
        assert ask(explore(make_run("token")), "weights")["alpha"].shape == (1, 2, 4)

    def test_images_of_the_caption_come_first(self, make_run, tmp_path):
        from semroute.trainer.plots.images import sample_grid, save_images

        path = shutil.copytree(make_run("depth"), tmp_path / "run")
        assert not explore(path).facts[0]["run"]["samples"]
        pixels = np.zeros((3, 8, 8, 3), np.uint8)
        texts = ["<b>one</b>", "two", "one"]
        save_images(path / "samples", pixels, texts, sample_grid(pixels, texts))
        explorer = explore(path)
        assert explorer.facts[0]["run"]["samples"]
        answer = ask(explorer, "samples", text="one")
        assert (answer["captions"], answer["own"]) == (["one", "<b>one</b>", "two"], 1)
        assert answer["image2"].startswith(b"\x89PNG")
        listed = path / "samples" / "captions.jsonl"
        listed.write_text('{"image": "../../run.json", "caption": "x"}\n')
        with pytest.raises(InputError, match="is damaged at"):
            ask(explorer, "samples", text=None)


class TestMessages:
    """Between JavaScript and Python."""

    @pytest.fixture
    def talk(self, feature_store, monkeypatch):
        explorer, sent = explore(feature_store), []
        monkeypatch.setattr(explorer, "send", lambda content, buffers=None: sent.append(content))

        def talk(question, **arguments):
            content = {"number": 3, "side": 0, "ask": question, "arguments": arguments}
            explorer._handle_custom_msg(content, [])
            return sent.pop()

        return talk

    def test_an_answer_has_the_number_of_its_question(self, talk):
        answer = talk("find", text="a red cup")
        assert answer["number"] == 3
        assert isinstance(answer["plain"]["caption"], int)

    def test_what_the_user_can_mend_is_a_message_and_what_we_must_is_traced(self, talk, capsys):
        assert "no caption 1000" in talk("caption", caption=1000)["error"]
        assert "nothing here answers" in talk("__class__")["error"]
        assert capsys.readouterr().err == ""
        assert talk("caption", wrong=1)["error"].startswith("TypeError")
        assert "Traceback" in capsys.readouterr().err

    def test_arrays_travel_as_float32_beside_json(self):
        message, buffers = pack_answer({"a": np.arange(4).reshape(2, 2), "b": b"png", "c": [1]})
        assert message["plain"] == {"c": [1]}
        assert message["binary"] == [{"name": "a", "shape": [2, 2]}, {"name": "b", "shape": None}]
        assert np.frombuffer(buffers[0], np.float32).tolist() == [0, 1, 2, 3]


def test_texts_are_short_and_hold_no_control_characters(feature_store, tmp_path):
    store = shutil.copytree(feature_store, tmp_path / "store")
    hostile = "\x1b[31m\u202eevil\n" + "x" * 5000

    def change(texts):
        texts[3] = hostile

    tiny_stores.column(store, "captions.parquet", "text", change)
    tiny_stores.seal(store)
    explorer = explore(store)
    listed = ask(explorer, "search", words="evil")["captions"][0][2]
    assert listed.startswith("\\x1b[31m\\u202eevil\\nxxx")
    assert len(listed) < 300
    answer = ask(explorer, "caption", caption=3)
    assert len(answer["text"]) < 4100
    assert ask(explorer, "find", text=answer["exact"]) == {"caption": 3}


def test_its_script_sets_text_only_and_loads_nothing():
    script = (FOLDER / "explorer.js").read_text("utf-8")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in script
    for file in ("explorer.js", "explorer.css"):
        assert not re.search(
            r"https?:|@import|url\(|\bimport\b", (FOLDER / file).read_text("utf-8")
        )
