"""A cache of the Hub's client with a repository in it, made without any network."""

import shutil
from pathlib import Path

NAME = "some-owner/some-model"


def put(folder: Path, cache: Path, name: str = NAME, revision: str = "main") -> None:
    """Lays a folder into a cache as the Hub's client does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
