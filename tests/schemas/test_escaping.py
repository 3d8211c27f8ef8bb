import re

import pytest

from semroute.schemas import InputError, Summary
from semroute.schemas.display import Table
from semroute.schemas.escaping import (
    code,
    fenced,
    in_html,
    in_markdown,
    one_line,
    printable,
    shown,
    without_secrets,
)

COMMANDS = [
    "\x1b[2J\x1b[31mred",  # clears the screen, and colours it
    "\x1b]0;title\x07",
    "\x9b31m",  # the same as ESC [, in one character
    "back\x08\x08\x08",
    "over\rwritten",
    "\u202egnp.exe",  # shown from right to left
    "\u2066hidden\u2069",
    "two\u2028lines",
    "\x00\x7f",
    "half \ud83d",
]


@pytest.mark.parametrize("text", COMMANDS)
def test_what_commands_a_terminal_is_shown_as_an_escape(text):
    for show in (printable, one_line, shown, in_markdown, code):
        safe = show(text)
        assert all(sign.isprintable() for sign in safe)
        safe.encode()
    assert printable(text) != text


def test_words_of_any_script_stay_as_they_are():
    text = "Ein Kätzchen, 一只猫, قطة, 👩‍🚀\tand\nmore"
    assert printable(text) == text
    assert one_line(text) == text.replace("\t", r"\t").replace("\n", r"\n")


def test_lines_cannot_be_forged():
    assert "\n" not in one_line("a\nstate  complete")
    assert "\n" not in in_markdown("a\n\n# heading")
    assert "\n" not in code("a\n```\n")


def test_markdown_shows_text_as_it_is():
    for sign in "\\`*_{}[]<>#|~&$":
        assert in_markdown(f"a{sign}b") == f"a\\{sign}b"
    assert in_markdown("<script>") == r"\<script\>"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a") == "`` `a ``"
    assert fenced("```\nout", "text") == ["````text", "```", "out", "````", ""]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:secret@bucket/a.csv", "s3://***@bucket/a.csv"),
        ("https://me@host/a", "https://***@host/a"),
        ("https://h/a.csv?X-Amz-Signature=abc&b=c", "https://h/a.csv?***"),
        ("https://h/a?" + "e" * 40, "https://h/a?***"),
        ("https://h/a#access_token=abc", "https://h/a#***"),
        ("simplecache::https://me:it@h/a.csv?sig=x", "simplecache::https://***@h/a.csv?***"),
        ("URL('https://h/a?sig=x') is 403", "URL('https://h/a?***') is 403"),
        ('{"features": "s3://k:s@b/f"}', '{"features": "s3://***@b/f"}'),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("token hf_" + "aB3" * 11, "token hf_***"),
    ],
)
def test_secrets_of_urls_are_hidden(text, expected):
    assert without_secrets(text) == expected
    assert str(InputError(f"{text}: no such file")) == f"{expected}: no such file"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/x-00?.tar",
        "hf://datasets/org/name@main/a.parquet",
        "https://host/@user/a.csv",
        "a question? yes=no",
        "tcp://127.0.0.1:8786",
        "hf_hub_download",
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


def test_errors_of_a_store_cannot_command_a_terminal():
    error = InputError("folder\x1b[2J is no store\nName another.")
    assert str(error) == "folder\\x1b[2J is no store\nName another."
    assert re.fullmatch("[ -~\n]+", str(error))


@pytest.mark.parametrize("sign", ["\x1b", "\u202e", "\u2066", "\x9b"])
def test_html_shows_markup_and_what_reverses_text(sign):
    table = Table([("a", "b"), (f"<b>{sign}", '"')]).to_html()
    for page in (in_html(f"<b>{sign}"), table, Summary(f"<b>{sign}", {"x": sign})._repr_html_()):
        assert "<b>" not in page
        assert sign not in page
        assert sign.encode("unicode_escape").decode() in page
