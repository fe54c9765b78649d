"""Text that others wrote, as text: it forms no link, no HTML, no heading and no table of a card."""

import re
from collections.abc import Iterable, Sequence

_MOST = 300  # characters of a name or a prompt


def one_line(text: object) -> str:
    """On one line, cut, without signs that can't be printed."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= _MOST else f"{line[: _MOST - 2]} …"


def plain(text: object) -> str:
    """As `one_line`, with every sign that Markdown or HTML would read made harmless."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]()#+!|~$:@])", r"\\\1", line)
    return re.sub(r"(?i)(www)\.", r"\1\\.", line)


def code(text: object) -> str:
    """A span of code on one line, in more backticks than the text has in a row."""
    line = one_line(text).replace("|", "¦")
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if "`" in line else ""
    return f"{ticks}{room}{line}{room}{ticks}"


def block(text: str, language: str) -> str:
    """A block of code, in more backticks than the text has in a row."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
