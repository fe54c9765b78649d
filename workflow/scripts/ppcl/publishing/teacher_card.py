"""What the teacher's own model card says that a variant's has to say too: its licence, above all.

A stranger wrote it. It is read up to a limit, and of its front matter only values that look like
what they should be are taken; anything else is left out, with a reason, and ends no run.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from ppcl.errors import UserError
from ppcl.settings import TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import hub

LIMIT = 1 << 20  # bytes of a card or a licence
FRONT_MATTER = 64 << 10  # characters
# Of the Hub's tasks, those of pipelines that have a transformer.
TASKS = (
    *("text-to-image", "image-to-image", "image-text-to-image"),
    *("text-to-video", "image-to-video", "image-text-to-video", "video-to-video"),
)
_LICENCE = r"[a-z0-9][a-z0-9.+-]{0,62}"
_LICENCE_NAME = r"[A-Za-z0-9][\w .+-]{0,98}"
_WEB = r"https://[\w.-]+(/[\w.~%+=&?#@:/-]*)?"
# Texts: a file that could be run, or taken for weights, must not reach a variant's folder.
_LICENCE_FILE = r"(?i)(licen[cs]e|copying|notice)([\w-]{0,60}|[\w.-]{0,56}\.(md|txt|rst|pdf))"


@dataclass(frozen=True)
class TeacherCard:
    """What was taken from a teacher's card; None or empty for what it lacks.

    Attributes:
        licence: names as the Hub knows them, such as `apache-2.0`; mostly one.
        licence_name, licence_link: of a licence that is `other` to the Hub. The link is one of the
            web, or the name of `licence_file`.
        task: one of TASKS.
        licence_file: a file beside the card, which a variant should bring along.
        refused: why something was not taken, in words.
    """

    licence: tuple[str, ...] = ()
    licence_name: str | None = None
    licence_link: str | None = None
    task: str | None = None
    licence_file: Path | None = None
    refused: str = ""


class _Loader(yaml.SafeLoader):
    """Without anchors, by which a small text can stand for an endless one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def find(teacher: TeacherSettings) -> Path | None:
    """A teacher's card, in its folder or in the Hub's cache; None if there is none. Asks nobody."""
    if hub.is_name(teacher.path):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(teacher.path, hub.CARD, revision=teacher.revision)
        return Path(cached) if isinstance(cached, str) else None
    inside = Path(teacher.path, teacher.subfolder or "", hub.CARD)
    places = [inside, Path(teacher.path, hub.CARD)]
    return next((path for path in places if path.is_file()), None)


def read(path: Path | None, repository: str | None, revision: str | None) -> TeacherCard:
    """What a teacher's card says, as far as it can be taken over.

    Args:
        path: as of `find`.
        repository, revision: of a teacher on the Hub, to which a relative link leads.
    """
    if path is None:
        return TeacherCard(refused="the teacher has no card here")
    try:
        said = _front_matter(untrusted.text(path, LIMIT))
    except Exception as error:  # YAML's constructors raise many kinds, such as KeyError
        reason = "larger or not text" if isinstance(error, UserError) else type(error).__name__
        return TeacherCard(refused=f"the teacher's card can't be read ({reason})")
    given = said.get("license")
    every = given if isinstance(given, list) else [given]
    licence = tuple(one for one in every if _looks(one, _LICENCE))[:5]
    refused = "" if licence else "the teacher's card names no licence of the Hub's"
    task = said.get("pipeline_tag")
    link, file = said.get("license_link"), None
    if _looks(link, _LICENCE_FILE):
        if repository:
            link = f"https://huggingface.co/{repository}/blob/{revision or 'main'}/{link}"
        else:
            file = _beside(path, link)
            link = link if file else None
    elif not _looks(link, _WEB) or len(link) > 300:
        link = None
    name = said.get("license_name")
    return TeacherCard(
        licence,
        name if _looks(name, _LICENCE_NAME) else None,
        link,
        task if isinstance(task, str) and task in TASKS else None,
        file,
        refused,
    )


def _front_matter(text: str) -> Mapping[str, Any]:
    """The YAML between two lines `---` at a card's beginning; empty if there is none.

    Raises ValueError or yaml.YAMLError if it is too long or something else."""
    start = re.match(r"\ufeff?\s*---[ \t]*\r?\n", text)
    if start is None:
        return {}
    end = re.compile(r"^---[ \t]*\r?$", re.M).search(text, start.end())
    if end is None or end.start() - start.end() > FRONT_MATTER:
        raise ValueError("front matter that does not end, or is too long")
    said = yaml.load(text[start.end() : end.start()], _Loader)  # noqa: S506  # a SafeLoader
    return said if isinstance(said, dict) else {}


def _looks(value: Any, pattern: str) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _beside(card: Path, name: str) -> Path | None:
    """A licence's file in the card's folder, if it is a plain one of a bearable size."""
    path = card.with_name(name)
    plain = path.is_file() and not hub.leaves(card.parent, path)
    return path if plain and path.stat().st_size <= LIMIT else None
