"""Nonsense for every command and option: one message each, and no traceback."""

import errno
import os
from unittest import mock

import click
import pytest
import yaml
from click.testing import CliRunner
from tiny_stores import make_store

from semroute.cli import cli
from semroute.pipeline.executor.base import DISK_FULL
from semroute.pipeline.inspection import describe
from semroute.trainer.training.train import train

NAME_MAX = 300  # characters, more than file systems take
SOUND = {
    "shapes": "{out} --num 4",
    "extract": "{table} {out} --model {llm} --workers 0",
    "estimate": "{table} --model {llm}",
    "latents": "{table} {out} --workers 0",
    "conditioning": "{table} {out} --pipeline {llm} --workers 0",
    "status": "{features}",
    "inspect": "{features}",
    "probe": "{features} {table}",
    "verify": "{features}",
    "rewrite": "{features} {out} --workers 0 --codec bf16",
    "push": "{features} me/features --dry-run",
    "train": "{config}",
    "sample": "{run} --features {features}",
    "evaluate": "{run} --features {features} --samples {table}",
    "plot": "{run}",
    "compare": "{run} {run}",
    "export": "{run} {out}",
    "embed": "{run} {table} {out}.safetensors",
    "study": "{study}",
    "ablate": "{run} --features {features} --samples {table} --out {out}",
    "lag": "{run} --features {features}",
}
"""Command -> arguments that make sense."""
ANY_STORE = ("status", "inspect", "verify", "push")
INPUTS = ("table", "features", "run", "config", "study", "llm")
MISTAKEN = {
    "missing": "{here}/missing",
    "missing-url": "memory://missing/it",
    "unknown-protocol": "foo://bucket/it",
    "empty-folder": "{here}/empty",
    "empty-file": "{here}/empty.parquet",
    "noise": "{here}/noise.parquet",
    "noise-yaml": "{here}/noise.yaml",
    "through-a-file": "{here}/noise.yaml/it",
    "long": f"{{here}}/{'x' * NAME_MAX}",
    "latents": "{latents}",
    "device": "/dev/null",
}
"""What stands in the place of an input."""
UNWRITABLE = {
    "file": "{here}/noise.yaml",
    "through-a-file": "{here}/noise.yaml/it",
    "long": f"{{here}}/{'x' * NAME_MAX}",
    "no-such-system": "/proc/it",
    "foreign": "{here}/foreign",
    "unknown-protocol": "foo://bucket/it",
}
"""What stands in the place of an output."""


def mistakes(command):
    """The command with one argument that makes no sense."""
    sound = SOUND[command]
    for place, others in [*((name, MISTAKEN) for name in INPUTS), ("out", UNWRITABLE)]:
        for name, other in others.items():
            if f"{{{place}}}" in sound and not (name == "latents" and command in ANY_STORE):
                yield f"{command} {sound.replace(f'{{{place}}}', other)}"


@pytest.fixture(scope="module")
def places(tmp_path_factory, samples_file, tiny_llm, configure):
    here = tmp_path_factory.mktemp("nonsense")
    (here / "empty").mkdir()
    (here / "empty.parquet").touch()
    (here / "noise.parquet").write_bytes(os.urandom(500))
    (here / "noise.yaml").write_bytes(b"\xff\xfe: [")
    (here / "foreign").mkdir()
    (here / "foreign" / "thesis.txt").write_text("mine")
    config = configure(output=str(here / "run"), steps=1)
    document = config.model_dump(mode="json") | {"output": str(here / "another")}
    (here / "config.yaml").write_text(yaml.safe_dump(document))
    (here / "study.yaml").write_text("{name: s}")
    return {
        "here": str(here),
        "table": str(samples_file),
        "llm": str(tiny_llm),
        "features": config.features,
        "latents": str(make_store("latents", here / "latents")),
        "run": str(train(config, progress=False)),
        "config": str(here / "config.yaml"),
        "study": str(here / "study.yaml"),
        "out": str(here / "out"),
    }


def refused(arguments):
    """The message of a command that refuses its arguments."""
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (1, 2), (arguments, result.output)
    assert "Traceback" not in result.output
    *_, message = result.stderr.partition("Error: ")
    assert message.strip(), result.output
    assert all(sign.isprintable() or sign == "\n" for sign in message)
    return message


@pytest.mark.parametrize("command", SOUND)
def test_places(command, places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in mistakes(command):
        refused([word.format(**places) for word in words.split()])


@pytest.mark.parametrize("command", SOUND)
def test_a_bucket_without_credentials_is_named(command, places, monkeypatch, tmp_path):
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    words, bucket = f"{command} {SOUND[command]}".split(), "s3://bucket/it"
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        for place in (*INPUTS, "out"):
            if f"{{{place}}}" in words:
                there = {**places, place: bucket}
                message = refused([word.format(**there) for word in words])
                # Another input may be refused first.
                assert bucket in message or "credential" not in message.lower()
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_there_is_enough_nonsense():
    assert {*SOUND} == {*cli.commands}
    assert sum(1 for command in SOUND for _ in mistakes(command)) > 200
    assert sum(1 for command in SOUND for _ in wrong_values(command)) > 200


def wrong_values(name):
    """Options of a command with a value that is none of theirs; and words too many."""
    bad = {
        click.IntRange: ("0.5", "many", "-1", "9223372036854775808"),
        click.types.FloatParamType: ("much", "nan"),
        click.Choice: ("it", "''"),
    }
    command, sound = cli.commands[name], f"{name} {SOUND[name]}"
    yield f"{sound} --nonsense"
    if all(parameter.nargs == 1 for parameter in command.params):
        yield f"{sound} too many words"
    for option in command.params:
        values = next((v for kind, v in bad.items() if isinstance(option.type, kind)), ())
        if isinstance(option, click.Option) and not option.is_flag:
            for value in values:
                yield f"{sound} {option.opts[0]} {' '.join([value] * option.nargs)}"
            if not values:
                yield f"{sound} {option.opts[0]}"


def empty_texts(name):
    """Arguments and options of a command without text, as of variables that are not set."""
    for parameter in cli.commands[name].params:
        takes_text = isinstance(parameter.type, (click.types.StringParamType, click.Path))
        if takes_text and parameter.name not in ("prompt", "negative"):
            if isinstance(parameter, click.Option):
                yield f"{name} {SOUND[name]} {parameter.opts[0]} ''"
            else:
                yield f"{name} ''" + " ''" * (SOUND[name].split(" --")[0].count("{") - 1)


@pytest.mark.parametrize("command", SOUND)
def test_values(command):
    for words in [*wrong_values(command), *empty_texts(command)]:
        result = CliRunner().invoke(cli, [word.strip("'") for word in words.split()])
        assert result.exit_code == 2, words
        assert "Error: " in result.stderr
        assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "words",
    [
        "extract {table} {out} --model {llm} --codec bf16 --quality 4",
        "extract {table} {out} --model {llm} --codec lossless --exact-layers 1",
        "extract {table} {out} --model {llm} --workers 2 --cluster tcp://127.0.0.1:1",
        "extract {table} {out} --model {llm} --template nonsense",
        "extract {table} {out} --model {llm} --layers 3-1",
        "extract {table} {out} --model {llm} --layers every:0",
        "extract {table} {out} --model {llm} --max-length 1",
        "extract {table} {out} --model {llm} --text-column sample_id",
        "extract {table} {out} --model {llm} --cluster {here}/noise.yaml",
        "extract {table} {out} --model {llm} --cluster {here}/missing.json",
        "extract {table} {out} --model {llm} --cluster nonsense",
        "extract {table} memory://nonsense/force --model {llm} --workers 0 --force",
        "estimate {table}",
        "estimate {table} --model {llm} --quality 4",
        "estimate {table} --model {llm} --codec bf16 --quality 4",
        "estimate {table} --for {llm}",
        "latents {table} {out} --buckets 16",
        "latents {table} {out} --size 30 --buckets 64",
        "latents {table} {out} --image-column text",
        "latents {table} {out} --vae {llm}",
        "latents {table} {out} --cluster {here}/noise.yaml",
        "verify {features} --num 3",
        "verify {features} --repair --against {llm}",
        "verify {features} --against {here}/empty",
        "push {features} one/two/three",
        "push {here}/empty me/it --dry-run",
        "probe {features} {table} --label nonsense",
        "probe {features} {table} --figure {here}/figure.nonsense",
        "probe {features} {table} --routing {run}",
        "rewrite {features} {out} --codec bf16 --rank 2",
        "rewrite {features} {features} --workers 0",
        "rewrite {features} {out} --layers 99 --workers 0",
        "rewrite {features} {out} --codec bf16 --quality 4 --workers 0",
        "rewrite {features} {out} --codec delta --shuffle-layers 1 --workers 0",
        "rewrite {features} {out} --routing {run} --layers 1 --workers 0",
        "rewrite {features} {out} --text-column text",
        "train {config} --ranks 2",
        "train {config} --unverified",
        "train {config} --dry-run --measure 1 --step-seconds 1",
        "train {config} nonsense",
        "train {config} nonsense=1",
        "train {config} steps=-1",
        "train {config} steps=.inf",
        "train {config} seed=yes",
        "train {config} model.width=65536 model.depth=65536 output={out}",
        "train {config} model.mlp_width=65536 model.depth=65536 output={out}",
        "train {config} data.batch_size=2147483647 --dry-run",
        "train {config} data.noise_draws=2147483647 --dry-run",
        "train {config} sampling.cfg_scale=4",
        "train {config} timeout_minutes=1e308",
        "train {config} sampling.prompts=['a']",
        "train {config} sampling.every=2 sampling.prompts=[] --dry-run",
        "train {config} sampling.every=2 sampling.features={here}/empty output={out} --dry-run",
        "train {config} sampling.every=2 sampling.vae={here}/empty output={out} --dry-run",
        "train {config} compile={{}}",
        "train {config} data.select={{}}",
        "train {config} features=",
        "train {config} output=''",
        "train {config} validation.features=' '",
        'train {config} model.kind=pretrained model.pretrained=""',
        "train {config} model=1",
        "train {config} optimizer.muon_lr=0.1",
        "train {config} data.window=3",
        "train {config} validation.every=7",
        "train {config} data.select.filter='import'",
        "train {config} data.select.columns={here}/noise.parquet",
        "train {config} start={here}/empty",
        "train {config} features={latents} latents={features}",
        "train {config} model.kind=pretrained",
        "sample {run}",
        "sample {run} --prompt a --features {features}",
        "sample {run} --features {features} --layout geneval",
        "sample {run} --features {features} --model {llm}",
        "sample {run} --features {features} --vae {llm}",
        "sample {run} --features {features} --size 3",
        "sample {run} --features {features} --size 8x8x8",
        "sample {run} --features {features} --clock nonsense",
        "sample {run} --features {features} --clock shift:nan",
        "sample {run} --features {features} --cfg-scale 1e308 --num 2 --num-steps 2 --out {out}",
        "sample {run} --features {features} --step 99",
        "sample {run} --features {features} --cfg-scale 1 --cfg-interval 0.2 0.8",
        "sample {run} --features {features} --cfg-scale 3 --cfg-interval 0.8 0.2",
        "sample {run} --prompts {here}/missing.txt",
        "sample {run} --prompts {table} --shard 3/2",
        "sample {run} --prompts {table} --shard nonsense",
        "evaluate {run}",
        "evaluate {run} --features {features}",
        "evaluate {run} --features {features} --samples {table} --question x",
        "evaluate {run} --features {features} --samples {table} --judge {llm}",
        "evaluate {run} --features {features} --samples {table} --cfg-scale 1 --cfg-interval 0 0.5",
        "evaluate {run} --judge {here}/missing",
        "plot {run} --step 99",
        "plot {run} --out s3://bucket/figures",
        "compare {run}/..",
        "compare {run} --html {here}/noise.yaml/it",
        "export {run} {out} --as lora",
        "export {run} {out} --rank 2",
        "export {run} {out} --router --as pipeline",
        "export {run} {here}/foreign",
        "embed {run} {table} {out}.txt",
        "study {study} --report-only --jobs 2",
        "study {study} --arm nonsense",
        "ablate {run} --features {features} --samples {table} --out {out} --num-steps 0",
        "lag {run} --features {features} --num-steps 1",
        "shapes {out} --num 0",
        "shapes {out} --num 4 --images-per-caption 9",
    ],
)
def test_combinations(words, places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused([word.format(**places).strip("'") for word in words.split()])


@pytest.mark.parametrize(
    "number",
    [
        *("EACCES", "EPERM", "EROFS", "EMFILE", "ENFILE", "ENAMETOOLONG", "ENOTDIR", "EISDIR"),
        *("EIO", "ESTALE", "ELOOP", "ENOTCONN", "ETIMEDOUT", "ENOSPC", "EDQUOT", "EFBIG"),
    ],
)
def test_errors_of_the_operating_system_are_one_message(number):
    number = getattr(errno, number)
    error = OSError(number, os.strerror(number), "/some/\x1b[31mplace")
    with mock.patch.object(describe, "inspect", side_effect=error):
        message = refused(["inspect", "store"])
    assert "/some/\\x1b[31mplace" in message
    assert ("the disk is full" if number in DISK_FULL else os.strerror(number)) in message


def test_an_error_of_a_package_for_storage_is_one_message():
    class CredentialsError(Exception):
        __module__ = "botocore.exceptions"

    error = CredentialsError("no credentials for https://me:secret@host/it?X-Amz-Signature=abc")
    with mock.patch.object(describe, "inspect", side_effect=error):
        message = refused(["inspect", "store"])
    assert message == "CredentialsError: no credentials for https://***@host/it?***\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to\n#0"),
        RuntimeError("CUDA error: out of memory"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GB"),
        RuntimeError("Storage size calculation overflowed with sizes=[65536, 4611686018427387904]"),
    ],
)
def test_memory_that_does_not_suffice_is_one_message(error):
    with mock.patch.object(describe, "inspect", side_effect=error):
        message = refused(["inspect", "store"])
    assert "memory does not suffice: " in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["caf\udce9", "\udcff/it"])
def test_a_name_that_is_not_utf_8_is_one_message(name, places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = name.encode("unicode_escape").decode()
    for words in (["shapes", name, "--num", "4"], ["inspect", name]):
        assert shown in refused(words)
    for error in (UnicodeEncodeError("utf-8", name, 0, 1, "surrogates not allowed"), KeyError()):
        with mock.patch.object(describe, "inspect", side_effect=error):
            result = CliRunner().invoke(cli, ["inspect", "store"])
        assert type(result.exception) is type(error)  # no word of the command is to blame


@pytest.mark.parametrize("kind", [KeyError, ValueError, AssertionError, ZeroDivisionError])
def test_a_bug_of_ours_is_still_a_traceback(kind):
    with mock.patch.object(describe, "inspect", side_effect=kind("a bug")):
        result = CliRunner().invoke(cli, ["inspect", "store"])
    assert type(result.exception) is kind
