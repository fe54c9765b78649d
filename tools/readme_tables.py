"""What is made from schemas, the registry and the pins; run as a program, it renews them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

from ppcl.configuration import config, schema_words  # noqa: E402  (the path has to be set first)
from ppcl.storage import schemas  # noqa: E402  (the path has to be set first)
from ppcl.transformer import family_table  # noqa: E402  (the path has to be set first)

MARKS = {".md": "<!-- made by: make tables -->\n", ".yml": "      # made by: make tables\n"}


def pins() -> str:
    """The packages of requirements.txt, for conda, which does not find that file from its own."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"      - {line}\n" for line in lines if not line.startswith("#"))


TABLES = {
    "config/README.md": lambda: schema_words.table(config.schema()),
    "results/README.md": schemas.table,
    "docs/families.md": family_table.table,
    "environment.yml": pins,
}


def renewed(name: str) -> str:
    """The text that a file should have: its own up to the mark, then the table."""
    mark = MARKS[Path(name).suffix]
    return (ROOT / name).read_text(encoding="utf-8").split(mark)[0] + f"{mark}\n{TABLES[name]()}"


if __name__ == "__main__":
    for name in TABLES:
        (ROOT / name).write_text(renewed(name), encoding="utf-8")
