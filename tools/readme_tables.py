"""What is made from schemas, the registry and the pins; run as a program, it renews them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow" / "scripts"), str(ROOT / "tests")]

from ppcl.configuration import config, schema_words  # noqa: E402  (the path has to be set first)
from ppcl.storage import schemas  # noqa: E402  (the path has to be set first)
from ppcl.transformer import family_table  # noqa: E402  (the path has to be set first)
from support import stock_features  # noqa: E402  (the path has to be set first)

MARKS = {".md": "<!-- made by: make tables -->\n", ".yml": "      # made by: make tables\n"}
END = "<!-- the end of what make tables made -->\n"  # where something follows


def pins() -> str:
    """The packages of requirements.txt, for conda, which does not find that file from its own."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"      - {line}\n" for line in lines if not line.startswith("#"))


TABLES = {
    "config/README.md": lambda: schema_words.table(config.schema()),
    "results/README.md": schemas.table,
    "docs/families.md": family_table.table,
    "docs/after-pruning.md": stock_features.table,
    "environment.yml": pins,
}


def renewed(name: str) -> str:
    """The text that a file should have: its own up to the mark, the table, and what follows END."""
    mark = MARKS[Path(name).suffix]
    before, _, after = (ROOT / name).read_text(encoding="utf-8").partition(mark)
    _, end, rest = after.partition(END)
    return f"{before}{mark}\n{TABLES[name]()}" + (f"\n{end}{rest}" if end else "")


if __name__ == "__main__":
    for name in TABLES:
        (ROOT / name).write_text(renewed(name), encoding="utf-8")
