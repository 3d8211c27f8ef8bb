"""Texts of strangers, made safe to show: in a terminal, in Markdown and HTML, and without
secrets."""

import html
import re

_CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what reverses or embeds text
    "\u2028\u2029\ufeff\ud800-\udfff"  # further line breaks, byte order marks, half surrogates
)
_CONTROL = re.compile(f"[{_CONTROLS}]")
_LINE_CONTROL = re.compile(f"[{_CONTROLS}\t\n]")
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>`]+?)(?=[]:,.;)]*(?:[\s'\"<>`]|$))")
_TOKEN = re.compile(r"\b(hf_)[A-Za-z0-9]{20,}|(?<=\bBearer )[\w.~+/=-]+", re.ASCII)
HIDDEN = "***"
NOT_UTF8 = re.compile("[\ud800-\udfff]")
"""Half surrogates, as which Python reads bytes of a name that are not UTF-8."""


def printable(text: str) -> str:
    """A text that cannot command a terminal: control characters become visible escapes, such as
    ``\\x1b``; lines and tabs stay."""
    return _CONTROL.sub(_escape, text)


def one_line(text: str) -> str:
    """A text as :func:`printable` gives it, in one line."""
    return _LINE_CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def without_secrets(text: str) -> str:
    """A text in which user names and passwords, queries and tokens of URLs are replaced by ``***``.

    The query of a signed URL is its signature; which part of another one is secret is not known.
    """
    return _TOKEN.sub(lambda token: (token[1] or "") + HIDDEN, _URL.sub(_hide, text))


def _hide(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    place, mark, query = rest.partition("?")
    if not mark:
        place, mark, query = rest.partition("#")
    if mark and ("=" in query or len(query) > 20):
        rest = f"{place}{mark}{HIDDEN}"
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    # hf://name@revision names no user.
    if at and user and scheme != "hf":
        rest = f"{HIDDEN}@{host}{slash}{path}"
    return f"{scheme}://{rest}"


def shown(text: object) -> str:
    """A text for a terminal: :func:`printable` and :func:`without_secrets`."""
    return printable(without_secrets(str(text)))


def in_html(text: str) -> str:
    """A text in HTML that shows as it is: markup is text, and control characters are as in a
    terminal, as those that reverse text do so in a page, too."""
    return html.escape(printable(text))


def in_markdown(text: str) -> str:
    """A text in Markdown that shows as it is, in one line."""
    flat = " ".join(one_line(" ".join(text.split())).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", flat)


def code(text: str) -> str:
    """A text as inline code of Markdown, in one line, whatever it holds."""
    flat = one_line(" ".join(text.split())) or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    space = " " if "`" in (flat[0], flat[-1]) else ""
    return f"{ticks}{space}{flat}{space}{ticks}"


def fenced(text: str, language: str) -> list[str]:
    """Lines of a block of code of Markdown, whatever it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, *printable(text).rstrip("\n").split("\n"), fence, ""]
