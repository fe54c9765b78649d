"""The tables that are made from schemas and the registry; run as a program, it renews them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

from ppcl import config, families, schemas  # noqa: E402  (the path has to be set first)

MARK = "<!-- made by: make tables -->\n"
TABLES = {
    "config/README.md": config.table,
    "results/README.md": schemas.table,
    "docs/families.md": families.table,
}


def renewed(name: str) -> str:
    """The text that a README should have: its own up to the mark, then the table."""
    return (ROOT / name).read_text(encoding="utf-8").split(MARK)[0] + f"{MARK}\n{TABLES[name]()}"


if __name__ == "__main__":
    for name in TABLES:
        (ROOT / name).write_text(renewed(name), encoding="utf-8")
