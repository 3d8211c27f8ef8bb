"""The documentation holds: its code runs, its commands parse, its tables are the contracts'."""

import json
import re
import runpy
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import UnionType
from typing import get_args

import pytest
import yaml
from click import Context
from conftest import Command
from pydantic import BaseModel

from semroute.cli import cli
from semroute.pipeline.extraction.requests import (
    ConditioningRequest,
    ExtractRequest,
    LatentsRequest,
)
from semroute.schemas import (
    CAPTIONS_SCHEMA,
    CONDITIONING_CAPTIONS_SCHEMA,
    LATENT_SAMPLES_SCHEMA,
    SAMPLES_EXTRA,
    SAMPLES_SCHEMA,
    Against,
    BenchmarkName,
    CodecName,
    ConditioningManifest,
    FeatureManifest,
    ImageSetRecord,
    JobQueue,
    JudgeRecord,
    LatentManifest,
    Quarantine,
    Receipt,
    RoutingConfig,
    RunRecord,
    StudyConfig,
    TrainConfig,
    parse,
    read_yaml,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PICTURE = "docs/images/demo.png"  # made by the demo
FENCE = re.compile(r"(?:^<!-- not run: (.+) -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)
SECTIONS = {
    name: field.annotation
    for name, field in TrainConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


class Page(HTMLParser):
    """What a browser loads for a page of HTML, and the text that it shows as prose."""

    def __init__(self, html):
        super().__init__()
        self.loaded, self.scripts, self.prose, self._open = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("pre", "code", "script", "style"):
            self._open.append(tag)
        if tag == "link" and attrs["rel"] in ("stylesheet", "preload", "icon", "manifest"):
            self.loaded.append(attrs["href"])
        self.loaded += [attrs[key] for key in ("src", "srcset", "data", "poster") if key in attrs]

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts.append(data)
        elif not self._open:
            self.prose.append(data)


def page(name):
    return (DOCS / name).read_text("utf-8")


def blocks(text, language):
    """Line, reason not to run it, and code of each fenced block."""
    return [
        (text[: match.start(3)].count("\n") + 1, match[1], match[3])
        for match in FENCE.finditer(text)
        if match[2] == language
    ]


def table_after(text, heading):
    """Cells of the first Markdown table after a line, without its head."""
    after = text[text.index(f"\n{heading}\n") :]
    rows = re.search(r"^\|.*?\n(?!\|)", after, re.M | re.S)[0].strip().split("\n")[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def command_lines(text):
    """Arguments of every ``semroute`` command in the shell blocks of a page."""
    for _, _, code in blocks(text, "bash"):
        for line in code.replace("\\\n", " ").split("\n"):
            words = shlex.split(line, comments=True) if re.search("semroute", line) else []
            for name in ("semroute", "semroute.cli"):
                if name in words and words[0] in ("semroute", "accelerate"):
                    yield words[words.index(name) + 1 :]


def leaf_keys(model, prefix=""):
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, UnionType):
            parts = [part for part in get_args(kind) if part is not type(None)]
            kind = parts[0] if len(parts) == 1 else kind
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaf_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.fixture(scope="module")
def place(tmp_path_factory, configure, feature_store, latent_store):
    """A folder with what the pages name: features, latents and runs/depth."""
    torch = pytest.importorskip("torch")
    from semroute.trainer.training.train import train

    place = tmp_path_factory.mktemp("place")
    (place / "features").symlink_to(feature_store)
    (place / "latents").symlink_to(latent_store)
    stores = {name: str(place / name) for name in ("features", "latents")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(configure(place / "runs" / "depth", steps=1, model={"patch_size": 6}, **stores))
    torch.set_num_threads(threads)
    return place


@pytest.fixture(scope="module")
def built(tmp_path_factory, fork_server):
    for name in ("sphinx", "myst_parser", "furo", "math_core", "sphinx_click", "torch"):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp("html")
    arguments = ["-W", "--keep-going", "-q", "-b", "html", DOCS, out]
    sphinx = Command("sphinx", arguments, out.with_name(f"{out.name}.txt"), {}, None)
    code = sphinx.wait(240)
    assert (code, sphinx.output.read_text()) == (0, "")
    return out


class TestPython:
    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_blocks_run_in_the_order_of_the_page(self, path, place, monkeypatch):
        found = blocks(path.read_text("utf-8"), "python")
        code = "".join(code for _, _, code in found)
        for name in re.findall(r"^import (tensorstore|xarray)$", code, re.M):
            pytest.importorskip(name)
        monkeypatch.chdir(place)
        namespace = {"__name__": path.stem}
        for line, reason, code in found:
            if reason is None:
                source = "\n" * (line - 1) + code  # so that a traceback names the page's line
                exec(compile(source, str(path), "exec"), namespace)

    def test_most_blocks_are_run(self):
        reasons = [b[1] for path in PAGES for b in blocks(path.read_text("utf-8"), "python")]
        assert len(reasons) > 10
        assert sum(reason is not None for reason in reasons) <= 4


class TestCommands:
    @pytest.mark.parametrize("name", sorted(cli.commands))
    def test_every_command_is_documented(self, name):
        command = cli.commands[name]
        assert command.help
        assert re.search(rf"Examples?:\n\s+semroute {name} ", command.help)
        assert command.get_short_help_str()
        assert f"semroute {name} " in page("quickstart.md")
        assert f"| `semroute {name}` |" in page("cli.md")

    def test_no_command_is_documented_that_is_not_there(self):
        listed = re.findall(r"^\| `semroute (\w+)`", page("cli.md"), re.M)
        assert sorted(listed) == sorted(cli.commands)

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_command_lines_parse(self, path):
        for name, *arguments in command_lines(path.read_text("utf-8")):
            assert name in cli.commands
            context = cli.commands[name].make_context(name, arguments)
            assert isinstance(context, Context)

    def test_command_lines_are_found(self):
        demo = (ROOT / "benchmarks" / "demo.sh").read_text("utf-8")
        num_commands = len(re.findall(r"^(?:\[.*\|\| )?run \w", demo, re.M))
        assert len(list(command_lines(page("quickstart.md")))) >= num_commands >= 12
        assert ["train", "run.yaml"] in list(command_lines(README))  # that of accelerate too

    def test_the_quickstart_is_the_demo(self):
        """Command by command, in order, with the folder ``demo``."""
        demo = (ROOT / "benchmarks" / "demo.sh").read_text("utf-8")
        lines = re.findall(r"^(?:\[.*\|\| )?run (\w.*)$", demo, re.M)
        # status is for another shell, push for the Hub, studies are hours of runs, the demo's run
        # has no clock, and conditioning and embed need a pretrained pipeline.
        assert {line.split()[0] for line in lines} == {*cli.commands} - {
            "push",
            "status",
            "conditioning",
            "embed",
            "study",
            "ablate",
            "lag",
            "compare",
            "export",
        }
        values = {"$out": "demo", "$here": "benchmarks", "$llm": "$LLM"}
        expected = []
        for line in lines:
            for variable, value in values.items():
                line = line.replace(variable, value)
            expected.append(shlex.split(line))
        documented = [words for words in command_lines(page("quickstart.md")) if words in expected]
        assert documented == expected

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_make_targets_exist(self, path):
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text("utf-8"), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), target


class TestContracts:
    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_configurations_are_valid(self, path):
        for _, _, code in blocks(path.read_text("utf-8"), "yaml"):
            document = yaml.safe_load(code)
            kind = {"kind": JobQueue, "arms": StudyConfig}
            model = next((kind[key] for key in kind if key in document), TrainConfig)
            model.model_validate(document)

    @pytest.mark.parametrize("path", sorted(ROOT.glob("studies/*.yaml")), ids=lambda p: p.stem)
    def test_studies_are_valid(self, path):
        study = parse(StudyConfig, read_yaml(path), str(path))
        for arm in study.arms:
            assert study.run(study.arm(arm).of or arm, 0, "out").routing
            assert study.scoring is None or study.scoring_of(arm)

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_keys_exist(self, path):
        pattern = rf"`({'|'.join(SECTIONS)})\.(?!png|jsonl)(\w+)(?:[:=][^`]*)?`"
        for section, key in re.findall(pattern, path.read_text("utf-8")):
            assert key in SECTIONS[section].model_fields, f"{section}.{key}"

    def test_strategies_are_those_of_the_schema(self):
        rows = table_after(page("routing.md"), "## The strategies")
        names = get_args(RoutingConfig.model_fields["strategy"].annotation)
        assert [row[0] for row in rows] == list(names)

    def test_codecs_are_those_of_the_schema(self):
        names = get_args(CodecName)
        rows = table_after(page("store-format.md"), "### Codecs")
        assert re.findall(r"\w+", " ".join(row[0] for row in rows)) == [*names]
        for command in ("extract", "estimate", "rewrite"):
            (option,) = [o for o in cli.commands[command].params if o.name == "codec"]
            assert tuple(option.type.choices) == names

    def test_benchmarks_are_those_of_the_schema(self):
        rows = table_after(page("evaluation.md"), "`--text-column` names.")
        assert {row[0] for row in rows} == {*get_args(BenchmarkName)}

    def test_formats_of_tables_are_those_that_are_read(self):
        from semroute.pipeline.sources.places import ALIASES, SUFFIXES, TAR

        kinds = page("data-model.md").split("## Your file")[1].split("| a folder")[0]
        assert {*re.findall(r"`(\.\w+)`", kinds)} == {*SUFFIXES, *ALIASES}
        named = cli.commands["extract"].help.split("CAPTIONS is a table (")[1].split(")")[0]
        assert {f".{name}" for name in re.split(r", | or ", named)} == {*SUFFIXES} - {TAR}

    def test_templates_are_the_presets(self):
        from semroute.pipeline.text.presets import PRESETS

        text = page("data-model.md")
        rows = table_after(text, "## Templates and attention sinks")
        ((_, _, code),) = blocks(text, "json")
        pipelines = json.loads(code)
        texts = {name: preset.text for name, preset in PRESETS.items()}
        assert {row[0].split("`")[0]: row[1] for row in rows} | pipelines == texts
        table = table_after(text, "### As diffusers puts prompts")
        assert [row[0] for row in table] == [*pipelines]
        for name, pipeline, *_, longest in table:
            assert tuple(pipeline.split("`, `")) == PRESETS[name].pipelines
            assert int(longest.replace(",", "")) == PRESETS[name].length
        (option,) = [o for o in cli.commands["extract"].params if o.name == "template"]
        assert option.help.startswith(f"Preset ({', '.join(PRESETS)}) or ")

    @pytest.mark.parametrize(
        ("heading", "schema"),
        [
            ("### captions.parquet", CAPTIONS_SCHEMA),
            ("### samples.parquet", [*SAMPLES_SCHEMA, *SAMPLES_EXTRA]),
            ("`captions.parquet`:", CONDITIONING_CAPTIONS_SCHEMA),
            ("`samples.parquet`:", LATENT_SAMPLES_SCHEMA),
            ("`metrics.jsonl`, a line after `step` steps:", "metrics"),
        ],
        ids=["captions", "samples", "conditioning captions", "latent samples", "metrics"],
    )
    def test_columns_are_those_of_the_arrow_schemas(self, heading, schema):
        if schema == "metrics":
            schema = pytest.importorskip("semroute.trainer.runs.metrics").METRICS_SCHEMA
        rows = table_after(page("store-format.md"), heading)
        assert [row[:2] for row in rows] == [[field.name, str(field.type)] for field in schema]


class TestFiles:
    def tree(self):
        """Path -> what README's tree says of it."""
        (code,) = [c for _, _, c in blocks(README, "text") if "cli.py" in c]
        folder, found = "", {}
        for line in code.rstrip("\n").split("\n"):
            name, text = re.fullmatch(r" *(\S+) +(\S.*)", line).groups()
            if not line.startswith(" "):
                folder = name if name.endswith("/") else ""
                found[name] = text
            else:
                found[folder + name] = text
        return found

    def test_what_the_tree_lists_exists(self):
        assert [name for name in self.tree() if not (ROOT / name).exists()] == []

    def test_the_tree_lists_every_package(self):
        packages = {
            path.parent.relative_to(ROOT).as_posix() + "/"
            for folder in ("schemas", "pipeline", "trainer")
            for path in ROOT.glob(f"{folder}/**/__init__.py")
        }
        folders = {name for name in self.tree() if name.endswith("/")}
        assert packages - folders == set()

    def test_links_of_the_readme_lead_somewhere(self):
        links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
        assert PICTURE in links
        missing = [link for link in links if not (ROOT / link).exists() and link != PICTURE]
        assert missing == []

    @pytest.mark.parametrize("path", [*PAGES, *DOCS.glob("benchmarks/*.md")], ids=lambda p: p.name)
    def test_files_that_pages_name_exist(self, path):
        folders = "schemas|pipeline|trainer|tests|benchmarks|studies|docs"
        named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", path.read_text("utf-8"))
        assert [name for name in named if not (ROOT / name).exists()] == []

    def test_names_of_code_are_where_pages_say(self):
        text = page("architecture.md") + page("contributing.md")
        named = re.findall(r"`([\w.]+)` in\s+`([\w/]+\.py)`", text)
        named += [(name, file) for file, name in re.findall(r"^\| `(\S+)` \| `(\w+)`", text, re.M)]
        assert len(named) > 60
        for name, file in named:
            last = name.rpartition(".")[2]
            defined = rf"^\s*(?:def|class) {last}\b|^\s*{last}\b(?:: [^=\n]+)?(?: =|$)"
            assert re.search(defined, (ROOT / file).read_text("utf-8"), re.M), f"{name} in {file}"

    def test_tests_that_fail_until_an_addition_is_complete_exist(self):
        sources = "".join(path.read_text("utf-8") for path in ROOT.glob("tests/**/test_*.py"))
        named = re.findall(r"`(test_\w+)`", page("contributing.md"))
        assert len(named) >= 8
        assert [name for name in named if f"def {name}(" not in sources] == []

    def test_the_drawing_shows_every_package(self):
        packages = {
            path.parent.relative_to(ROOT).as_posix()
            for folder in ("pipeline", "trainer")
            for path in ROOT.glob(f"{folder}/*/__init__.py")
        }
        drawing = page("images/architecture.svg")
        shown = re.findall(r">((?:pipeline|trainer)/\w+)<", drawing)
        assert sorted(shown) == sorted(packages - {"pipeline/commands", "trainer/commands"})

    def test_arrows_are_those_of_the_test(self):
        arrows = runpy.run_path(str(ROOT / "tests" / "test_arrows.py"))
        found = {}
        for number, package, below in table_after(page("architecture.md"), "## Arrows"):
            found[package] = int(number), {name.strip("`") for name in below.split(", ")}
        assert found.pop("schemas") == (0, {"-"})
        expected = {
            package: (
                number,
                {"anything below"}
                if package in arrows["COMMANDS"]
                else arrows["ARROWS"].get(package, {"-"}),
            )
            for number, floor in enumerate(arrows["FLOORS"], 1)
            for package in floor
        }
        assert found == expected

    def test_the_demos_output_is_in(self):
        marker = re.compile(r"<!-- (demo-results|output: \w+|picture: \w+) -->")
        assert [m for p in PAGES for m in marker.findall(p.read_text("utf-8"))] == []
        assert (ROOT / PICTURE).exists()


class TestBuild:
    def test_nothing_is_loaded_from_a_network(self, built):
        remote = re.compile(r"(https?:)?//")
        pages = {path: Page(path.read_text("utf-8")) for path in built.rglob("*.html")}
        assert all(parsed.loaded for parsed in pages.values())
        for path, parsed in pages.items():
            assert [link for link in parsed.loaded if remote.match(link)] == [], path
            assert [code for code in parsed.scripts if "http" in code] == [], path
        sheets = [path.read_text("utf-8") for path in built.rglob("*.css")]
        linked = r"""(?:url\(|@import)\s*["']?([^"')]+)"""
        loaded = [link for sheet in sheets for link in re.findall(linked, sheet)]
        assert "stix-two-math.woff2" in loaded
        assert [link for link in loaded if remote.match(link)] == []

    def test_formulas_are_mathml(self, built):
        for source in [*DOCS.glob("*.md"), *DOCS.glob("benchmarks/*.md")]:
            html = (built / source.relative_to(DOCS)).with_suffix(".html").read_text("utf-8")
            num_blocks = FENCE.sub("", source.read_text("utf-8")).count("\n$$\n") // 2
            assert html.count('<div class="math"><math') >= num_blocks, source
            assert html.count('class="math"') == html.count("<math"), source
            assert "\\" not in "".join(Page(html).prose), source  # no LaTeX is left
        assert (built / "routing.html").read_text("utf-8").count("<math") > 50

    def test_every_page_is_there_and_none_is_lost(self, built):
        contents = (built / "index.html").read_text("utf-8")
        for path in sorted(DOCS.glob("*.md")):
            assert (built / f"{path.stem}.html").exists()
            assert path.stem == "index" or f'href="{path.stem}.html"' in contents

    @pytest.mark.parametrize(
        ("name", "model"),
        [
            ("api", ExtractRequest),
            ("api", LatentsRequest),
            ("api", ConditioningRequest),
            ("training", TrainConfig),
            ("store-format", FeatureManifest),
            ("store-format", LatentManifest),
            ("store-format", ConditioningManifest),
            ("store-format", Against),
            ("store-format", Receipt),
            ("store-format", Quarantine),
            ("evaluation", ImageSetRecord),
            ("evaluation", JudgeRecord),
        ],
    )
    def test_every_key_is_listed(self, built, name, model):
        text = (built / f"{name}.html").read_text("utf-8")
        listed = set(re.findall(r'<span class="pre">([\w.]+)</span></code></p></td>', text))
        assert set(leaf_keys(model)) - listed == set()

    def test_schemas_can_be_downloaded(self, built):
        names = {path.name for path in built.glob("_downloads/*/*.json")}
        assert {"feature-manifest.json", "run.json", "train-config.json"} <= names
        assert "format_version" in RunRecord.model_fields

    def test_every_option_is_listed(self, built):
        text = (built / "cli.html").read_text("utf-8")
        for name, command in cli.commands.items():
            assert f"semroute-{name}" in text
            for parameter in command.params:
                shown = not getattr(parameter, "hidden", False)
                for option in parameter.opts if shown else []:
                    assert option.startswith("-") is False or option in text
