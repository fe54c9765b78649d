"""Putting a card into a variant's folder, which is then ready to be uploaded.

The folder is another stage's output: what was measured of it is written into its pruning.json, and
the card beside. A card that somebody has edited since is left as it is.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.storage import seals, texts, whole
from ppcl.teacher import hub

PRUNING = "pruning.json"
_CODE = {".py"}


def pruning(model: Path) -> dict[str, Any]:
    """A variant's pruning.json.

    Raises:
        UserError: it is missing, damaged, or does not name the teacher.
    """
    path = model / PRUNING
    about = texts.read_sealed(path) if path.is_file() else {}
    if not {"name", "repository", "revision"} <= (about.get("teacher") or {}).keys():
        raise UserError(
            f"--model: {model} has no {PRUNING} that names its teacher; delete {model} and rerun: "
            "`assemble` writes it"
        )
    return about


def code(model: Path) -> tuple[str, ...]:
    """Files of code in a variant's folder, which loading it runs."""
    paths = (path.relative_to(model) for path in model.rglob("*") if path.suffix in _CODE)
    return tuple(sorted(path.as_posix() for path in paths if path.parts[0][0] != "."))


def complete(model: Path, card: Path, facts: Mapping[str, Any]) -> bool:
    """Puts the files of a card's folder into a variant's, and facts into its pruning.json.

    Returns:
        Whether the card was put there: not if the one there is no longer what was written.
    """
    about = pruning(model)
    before = about.get("card", {}).get(hub.CARD)
    # A run that was killed between its card and its digests left those that it was about to write.
    written = {before, about.pop("next_card", {}).get(hub.CARD)}
    there = model / hub.CARD
    edited = there.is_file() and seals.file_digest(there) not in written
    files = sorted(path for path in card.rglob("*") if path.is_file() and path.name[0] != ".")
    digests = {path.relative_to(card).as_posix(): seals.file_digest(path) for path in files}
    texts.write_sealed(model / PRUNING, about | {"next_card": digests})
    for path in files:
        name = path.relative_to(card)
        if not (edited and name.as_posix() == hub.CARD):
            with whole.writing(model / name) as temporary:
                shutil.copyfile(path, temporary)
    for old in about.get("card", {}).keys() - digests.keys():
        (model / old).unlink(missing_ok=True)
    if edited:
        digests[hub.CARD] = before or ""
    texts.write_sealed(model / PRUNING, about | dict(facts) | {"card": digests})
    return not edited
