"""What people write into YAML files: every problem is refused with its line."""

import pytest

from semroute.schemas import (
    InputError,
    JobQueue,
    StudyConfig,
    TrainConfig,
    parse,
    read_config,
    read_yaml,
)

STORES = "features: f\nlatents: l\noutput: o\n"  # lines 1 to 3


@pytest.fixture
def refused(tmp_path):
    """The message with which a configuration of training is refused."""

    def read(text, *overrides):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            read_config(tmp_path / "run.yaml", overrides)
        return str(error.value).replace(f"{tmp_path}/", "")

    return read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsteps: 2\nseed: 3", "line 6: 'seed' is given again, first in line 4"),
        ("data: {prefetch: 1}\ndata: {window: 1}", "line 5: 'data' is given again"),
        ('seed: 1\n"seed": 1', "line 5: 'seed' is given again"),
        ("data:\n  window: 1\n  window: 1", "line 6: 'window' is given again, first in line 5"),
        ("data: {select: {filter: a, filter: b}}", "line 4: 'filter' is given again"),
        ("x: [{a: 1, a: 2}]", "line 4: 'a' is given again"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "line 5: '<<' is given again"),
        ("no: 1", "line 4: 'no' is a boolean in YAML; expected a name: quote it"),
        ("1: 1", "line 4: '1' is a number"),
        ("~: 1", "line 4: '~' is null"),
        ("? [a]\n: 1", "line 4: the key is a list"),
    ],
)
def test_keys(refused, text, message):
    assert f"run.yaml, {message}" in refused(STORES + text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("010", "010 is octal in YAML, 8; leave out the leading zero"),
        ("-017", "-017 is octal in YAML, -15"),
        ("08", "08 is not a number in YAML; leave out the leading zero"),
        ("1:30", "1:30 is a number of base 60 in YAML, 90; quote it"),
        ("12:00:00", "12:00:00 is a number of base 60 in YAML, 43200"),
        ("1:30.5", "1:30.5 is a number of base 60"),
        (".inf", ".inf is not finite; expected a finite number"),
        ("-.Inf", "-.Inf is not finite"),
        (".nan", ".nan is not finite"),
        ("1.0e+999", "1.0e+999 is not finite"),
    ],
)
def test_numbers_that_yaml_reads_otherwise(refused, value, message):
    for text in (f"seed: {value}", f"routing:\n  {{layers: [1, {value}]}}"):
        line = STORES.count("\n") + text.count("\n") + 1
        assert f"run.yaml, line {line}: {message}" in refused(STORES + text)
    assert f"'seed={value}': the value, line 1: {message}" in refused(STORES, f"seed={value}")


def test_text_in_quotes_is_text(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "features: '010'\nlatents: \"1:30\"\noutput: '.nan'\nmixed_precision: 'no'\n"
        "model: {patch_size: 0}\nseed: 0\noptimizer: {lr: 0.5, weight_decay: 1e-3}"
    )
    config = read_config(tmp_path / "run.yaml", ["model.patch_size=4", 'mixed_precision="no"'])
    assert (config.features, config.latents, config.output) == ("010", "1:30", ".nan")
    assert (config.model.patch_size, config.optimizer.weight_decay) == (4, 1e-3)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "Infinity", "1e999", "'nan'"])
def test_text_that_would_be_no_finite_number(refused, value):
    assert "line 4: optimizer.lr: " in refused(f"{STORES}optimizer: {{lr: {value}}}")
    assert "\n  optimizer.lr: " in refused(STORES, f"optimizer.lr={value}")
    weights = f"data: {{select: {{caption_weights: [1, {value}]}}}}"
    assert "caption_weights" in refused(STORES + weights)


@pytest.mark.parametrize(
    "text",
    [
        "steps: true",
        "seed: no",
        "model: {depth: yes}",
        "optimizer: {lr: on}",
        "flow: {t_mean: false}",
        "routing: {strategy: concat, layers: [1, true]}",
        "data: {select: {caption_weights: [1.0, yes]}}",
        "ema: {decay: true}",
        "validation: {share: false}",
    ],
)
def test_booleans_for_numbers(refused, text):
    message = refused(f"{STORES}\n{text}")
    assert "  line 5: " in message
    assert "expected a number, not a boolean" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixed_precision: no", 'quote the text, as in "no"'),
        ("mixed_precision: off", 'quote the text, as in "no"'),
        ("tracker: yes", 'quote the text, as in "yes"'),
        ("start: on", 'quote the text, as in "yes"'),
        ("start: 2024", 'quote it if it is text, as in "2024"'),
        ("start: 2024-01-31", 'quote it if it is text, as in "2024-01-31"'),
        ("start: 1.5", 'quote it if it is text, as in "1.5"'),
    ],
)
def test_text_without_quotes(refused, text, message):
    found = refused(STORES + text)
    assert f"line 4: {text.partition(':')[0]}: " in found
    assert message in found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"model.{name}", 10**30) for name in ("depth", "width", "head_dim", "patch_size")),
        *(("model.num_heads", 65_537), ("model.mlp_width", 2**31)),
        *((name, 2**31) for name in ("steps", "data.batch_size", "routing.rank", "ema.every")),
    ],
)
def test_sizes_that_nothing_can_have(refused, key, value):
    assert f"{key}: Input should be less than" in refused(STORES, f"{key}={value}")


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_seeds_out_of_range(refused, seed):
    assert "line 4: seed: " in refused(f"{STORES}seed: {seed}")
    assert "line 4: validation.seed: " in refused(f"{STORES}validation: {{seed: {seed}}}")
    assert parse(
        TrainConfig, {"features": "f", "latents": "l", "output": "o", "seed": 2**63 - 1}, ""
    )


class TestLimits:
    def test_size(self, refused):
        assert "more than 1,000,000 characters" in refused(STORES + "#" * 1_000_000)

    @pytest.mark.parametrize(("start", "end"), [("[", "]"), ("{a: ", "}")])
    def test_depth(self, refused, start, end):
        for depth in (33, 20_000):
            text = f"{STORES}x: {start * depth}1{end * depth}"
            assert "line 4: nested more than 32 deep" in refused(text)

    def test_aliases_that_multiply(self, refused):
        lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
        for level in range(1, 12):
            again = ", ".join([f"*a{level - 1}"] * 10)
            lines.append(f"a{level}: &a{level} [{again}]")
        assert "more than 100,000 values, with aliases written out" in refused("\n".join(lines))

    def test_aliases_that_nest(self, refused):
        lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 40))]
        assert "nested more than 32 deep" in refused("\n".join(lines))

    def test_an_alias_of_what_holds_it(self, refused):
        assert "line 1: holds itself, through an alias" in refused("x: &x [1, *x]")
        assert "holds itself" in refused("x: &x {y: {z: *x}}")

    def test_a_few_aliases_are_read(self, tmp_path):
        (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]")
        found = read_yaml(tmp_path / "c.yaml")
        assert found["b"] == {"x": 1, "y": 3}
        assert found["c"] == [{"x": 1, "y": 2}] * 2


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "a: 1\n--- \nb: 2", "a: \x00", "a: !!python/name:os.system"]
)
def test_what_is_no_yaml(refused, text):
    assert "run.yaml is no YAML: " in refused(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2024-13-45", "'2024-13-45' is not a date; quote text"),
        ("!!bool maybe", "'maybe' is not a boolean; quote text"),
        ("!!timestamp soon", "'soon' is not a date"),
        ('!!int ""', "'' is not a number"),
        ('!!float "+"', "'+' is not a number"),
        ("0x_", "'0x_' is not a number"),
        ('!!int "017"', "017 is octal in YAML, 15"),
        (f"0x{'f' * 5000}", "0xffffffffff... has 5,002 digits"),
        ("9" * 200, "999999999999... has 200 digits"),
        (r'"\ud83d"', "'\\ud83d' holds half a surrogate pair or a zero character"),
        (r'"a\0b"', "'a\\x00b' holds half a surrogate pair or a zero character"),
    ],
)
def test_values_that_are_none_of_their_type(refused, value, message):
    assert f"run.yaml, line 5: {message}" in refused(f"{STORES}routing:\n  strategy: {value}")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="is no YAML"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InputError, match="holds NoneType; expected keys and values"):
        read_yaml(tmp_path / "empty.yaml")


def test_an_override_has_no_line(refused):
    assert "\n  steps: " in refused(f"{STORES}steps: 5", "steps=0")
    assert "\n  data.window: " in refused(f"{STORES}data: {{window: 2}}", "data={window: 0}")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            JobQueue,
            "kind: slurm\nmaximum_jobs: true\noptions: {}",
            "line 2: maximum_jobs: .*number",
        ),
        (JobQueue, "kind: slurm\nmaximum_jobs: 2\noptions: {}\nkind: pbs", "line 4: 'kind'"),
        (
            JobQueue,
            "kind: slurm\noptions:\n  walltime: 12:00:00",
            "line 3: 12:00:00 is a number of",
        ),
        (JobQueue, "kind: no\nmaximum_jobs: 2\noptions: {}", 'line 1: kind: .*as in "no"'),
        (StudyConfig, "seeds: [0, true]", "line 1: seeds: .*not a boolean"),
        (StudyConfig, f"seeds: [0, {2**63}]", "line 1: seeds.1: "),
        (StudyConfig, "arms:\n  a: {}\n  a: {}", "line 3: 'a' is given again"),
        (
            StudyConfig,
            "scoring: {features: f, samples: s,\n  cfg_scales: [1, nan]}",
            "line 2: scoring.cfg_scales.1: .*finite",
        ),
        (StudyConfig, "scoring:\n  seed: -1", "line 2: scoring.seed: "),
    ],
)
def test_every_document_that_people_write(kind, text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse(kind, read_yaml(tmp_path / "c.yaml"), "c.yaml")
