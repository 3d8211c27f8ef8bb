"""Pages and widgets in a real browser."""

import io
import shutil

import numpy as np
import pytest
import tiny_stores
from browser import find_chromium, open_browser, open_page, run_cells, serve_lab, write_notebook
from PIL import Image

from semroute.pipeline.inspection.report import write_report
from semroute.trainer.plots.images import sample_grid, save_images
from semroute.trainer.training.train import train

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed"),
]
HOSTILE = "</script><img src=x onerror='document.title=`evil`'><b>bold</b> &amp; \u202ereversed"


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright")
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def hostile_store(feature_store, tmp_path_factory):
    """A store with a caption that is markup."""
    store = shutil.copytree(feature_store, tmp_path_factory.mktemp("hostile") / "<b>store")

    def change(texts):
        texts[3] = HOSTILE

    tiny_stores.column(store, "captions.parquet", "text", change)
    tiny_stores.seal(store)
    return store


def brightness(png):
    """Of every pixel, from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def refuse_network(page, address):
    """Fail at every request to another place."""

    def handle(route):
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            page.faults.append(f"requested {url}")
            route.abort()

    page.route("**/*", handle)


@pytest.fixture(scope="module")
def address(hostile_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "page.html"
    return write_report(hostile_store, out).as_uri()


class TestReport:
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_figures_stand_two_a_row_in_both_themes(self, browser, address, theme):
        page = open_page(browser, theme)
        refuse_network(page, address)
        page.goto(address)
        places = [
            page.locator(f"#{name}").bounding_box() for name in ("norms", "similarity-of-layers")
        ]
        assert places[0]["y"] == places[1]["y"]
        assert all(place["width"] > 500 for place in places)
        assert page.evaluate("document.documentElement.scrollWidth") == 1200
        loaded = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
        assert page.evaluate(loaded) == [True] * 6
        # The ground of a figure is that of the page, and its titles stand out against it.
        shot = page.locator("#norms img").screenshot()
        light = brightness(shot)
        assert (np.median(light) > 200) == (theme == "light")
        assert light.max() - light.min() > 150
        assert page.faults == []
        page.close()

    def test_search_is_done_by_keys_and_finds_every_caption(self, browser, address):
        page = open_page(browser)
        page.goto(address)
        rows, count = page.locator("#found tbody tr"), page.locator("#count")
        assert count.inner_text() == "193 captions, the first 50"
        page.keyboard.press("/")
        page.keyboard.type("Cup RED")
        assert count.inner_text() == "4 captions"
        assert rows.count() == 4
        page.keyboard.press("Escape")
        for _ in range(3):
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            page.keyboard.press("Shift+Tab")
        assert rows.count() == 193
        assert page.locator("#more").is_hidden()
        page.locator("#words").fill("onerror")
        assert rows.locator("td").nth(2).inner_text() == HOSTILE
        assert page.title().startswith("FeatureStore ")
        assert page.locator("b").count() == 0
        assert page.faults == []
        page.close()

    def test_contents_lead_to_their_sections(self, browser, address):
        page = open_page(browser)
        page.goto(address)
        for link in page.locator("nav a").all():
            link.click()
            assert page.locator(f"section{page.evaluate('location.hash')} h2").is_visible()
        page.close()


@pytest.fixture(scope="module")
def page(browser, configure, hostile_store, tmp_path_factory):
    """Explorers in JupyterLab: of a store, of that store beside a run, and the first again."""
    folder = tmp_path_factory.mktemp("lab")
    run = train(configure(folder / "run", routing={"strategy": "joint"}))
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    texts = [HOSTILE, "a red cup"]
    save_images(run / "samples", pixels, texts, sample_grid(pixels, texts))
    cells = [
        "import semroute",
        f"explorer = semroute.explore({str(hostile_store)!r})\nexplorer",
        f"semroute.explore({str(hostile_store)!r}, {str(run)!r})",
        "explorer",
    ]
    write_notebook(folder / "notebook.ipynb", cells)
    with serve_lab(folder) as address:
        page = open_page(browser, height=2400)
        refuse_network(page, address.partition("/doc")[0])
        run_cells(page, address.format("notebook.ipynb"), len(cells))
        page.locator(".semroute-explorer").nth(2).wait_for()
        yield page
        page.close()


class TestExplorer:
    def test_a_store(self, page):
        explorer = page.locator(".semroute-explorer").first
        canvas = explorer.locator(".cells canvas")
        canvas.wait_for()
        assert explorer.locator("p[aria-live]").inner_text() == "193 captions, the first 100"
        # Searched, chosen and read by keys alone.
        explorer.locator("input[type=search]").focus()
        page.keyboard.type("red cup")
        explorer.get_by_text("4 captions").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        chosen = explorer.locator(".list button").nth(1)
        page.wait_for_function(
            "button => button.getAttribute('aria-selected') === 'true'",
            arg=chosen.element_handle(),
        )
        text = chosen.locator("span").first.inner_text()
        assert {"red", "cup"} <= {*text.split()}
        assert explorer.locator(".chosen").inner_text() == text
        explorer.locator("select").select_option("similarity")
        canvas.focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        assert explorer.locator("output").inner_text().endswith("LLM layer 4: 1")

        explorer.get_by_role("tab", name="Nearest captions").click()
        nearest = explorer.get_by_role("listbox", name="nearest captions")
        nearest.wait_for()
        assert nearest.locator("button").count() == 12
        other = nearest.locator("button").first
        text = other.locator("span").first.inner_text()
        other.click()
        explorer.locator(".chosen").get_by_text(text, exact=True).wait_for()

        explorer.get_by_role("tab", name="Layers by layers").click()
        canvas.wait_for()
        assert canvas.evaluate("canvas => [canvas.width, canvas.height]") == [4, 4]
        assert page.faults == []

    def test_a_store_beside_a_run(self, page):
        explorer = page.locator(".semroute-explorer").nth(1)
        store, run = explorer.locator("section").all()
        run.locator(".cells canvas").wait_for()
        assert run.locator(".cells canvas").evaluate("c => [c.width, c.height]") == [4, 2]
        shown = run.locator(".choices span")
        assert shown.inner_text().startswith(" 0.00")
        run.locator("input[type=range]").fill("10")
        assert shown.inner_text().startswith(" 0.50")
        # What is chosen in one is chosen in the other.
        explorer.locator("input[type=search]").fill("blue clock at night")
        explorer.get_by_text("1 caption").wait_for()
        explorer.locator(".list button").first.click()
        for side in (store, run):
            side.locator(".chosen").get_by_text("blue clock at night", exact=False).wait_for()
        run.get_by_role("tab", name="What a block reads").click()
        run.locator("select").wait_for()
        run.locator("select").select_option(label="2")
        run.get_by_text("share of what block 2 reads").wait_for()
        run.get_by_role("tab", name="Images").click()
        run.locator("figure img").nth(1).wait_for()
        assert run.locator("figcaption").nth(1).inner_text() == "a red cup"
        assert page.faults == []

    def test_two_views_of_one_explorer_do_not_hear_each_others_answers(self, page):
        views = [page.locator(".semroute-explorer").nth(number) for number in (0, 2)]
        for view, words in zip(views, ("red cup", "onerror"), strict=True):
            view.locator("input[type=search]").fill(words)
        views[0].get_by_text("4 captions").wait_for()
        views[1].get_by_text("1 caption").wait_for()

    def test_no_text_is_markup(self, page):
        for number in range(2):
            explorer = page.locator(".semroute-explorer").nth(number)
            explorer.locator("input[type=search]").fill("onerror")
            # Not the one caption that was found before.
            explorer.locator(".list button").get_by_text("onerror").click()
            side = explorer.locator("section").last
            said = HOSTILE.replace("\u202e", "\\u202e")
            if number == 0:
                side.locator(".chosen").get_by_text(said, exact=True).wait_for()
            else:
                side.locator(".chosen").get_by_text("not in this store").wait_for()
                side.get_by_role("tab", name="Images").click()
                side.locator("figcaption").nth(1).wait_for()
                assert said in side.locator("figcaption").all_inner_texts()
            assert explorer.locator("h3").first.inner_text().endswith("<b>store")
            assert explorer.locator("b, img[src=x], script").count() == 0
        assert "evil" not in page.title()
        assert page.faults == []
