"""The documents: links and anchors resolve, pages form one reading order, keys are the config's."""

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from ppcl.configuration import config
from support import ROOT
from support.schema_keys import nodes

INDEX = ROOT / "docs" / "README.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def documents() -> list[Path]:
    """All markdown files but those of runs and of hidden folders (.github apart)."""
    paths = []
    for path in sorted(ROOT.rglob("*.md")):
        *folders, _ = path.relative_to(ROOT).parts
        hidden = any(name.startswith(".") and name != ".github" for name in folders)
        if not hidden and not (len(folders) > 1 and folders[0] == "results"):
            paths.append(path)
    return paths


def prose(path: Path) -> str:
    """The text of a document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(path: Path) -> list[str]:
    """Targets of a document's links, those to the web left out."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    return [target for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    made, seen = set(), Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(path), flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        made.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return made


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_resolve(path):
    broken = []
    for link in links(path):
        place, _, anchor = unquote(link).partition("#")
        target = (path.parent / place).resolve() if place else path
        there = target.exists() and target.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_each_page_ends_with_a_link_to_the_next():
    """In the order of the numbered list of docs/README.md, which has all pages below docs/."""
    listed = re.findall(r"^\d+\. \[.+?\]\((.+?)\)", INDEX.read_text(encoding="utf-8"), flags=re.M)
    pages = [(INDEX.parent / name).resolve() for name in listed]
    assert {path for path in documents() if INDEX.parent in path.parents} == {INDEX, *pages}
    for page, following in zip(pages, [*pages[1:], ROOT / "CONTRIBUTING.md"], strict=True):
        last = re.findall(r"Next: \[.+?\]\((.+?)\)", page.read_text(encoding="utf-8"))
        assert [(page.parent / name).resolve() for name in last] == [following], page


def test_keys_named_in_documents_are_the_configs():
    """`section.key` in backticks, also with a value. Elsewhere, and in the table of old and new
    names, such words are modules; keys of that table are tested in test_old_names.py."""
    keys = {name.replace("[]", "") for name, _ in nodes(config.schema())}
    sections = {name.partition(".")[0] for name in keys if "." in name}
    named = re.compile(rf"`((?:{'|'.join(sorted(sections))})\.[a-z_0-9.]+)(?=[`:])")
    unknown = [
        f"{path.relative_to(ROOT)}: {key}"
        for path in documents()
        if path != ROOT / "docs" / "renamed.md"
        and path.relative_to(ROOT).parts[0] in ("README.md", "docs", "config")
        for key in named.findall(path.read_text(encoding="utf-8"))
        if key not in keys
    ]
    assert not unknown


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
