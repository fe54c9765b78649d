"""record/blocks.parquet: what stages that do not load the teacher need to know of its blocks.

Needs no torch. `blocks.facts` makes the facts from a transformer.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ppcl.errors import UserError
from ppcl.storage import schemas, seals, tables

TRANSFORMER_PARAMETERS = "transformer_parameters"


@dataclass(frozen=True)
class BlockFacts:
    """A teacher's blocks, in the order in which data flows.

    Attributes:
        lists: of each block, the transformer's attribute whose list it is in.
        seams: first block of each run of like blocks (`blocks.seams`); block 0 is always one.
        untouchable: number of a block that the family forbids to prune -> the reason.
        parameters: of each block, how many parameters go if it is removed
            (`blocks.parameters_of_blocks`).
        transformer_parameters: number of parameters of the whole transformer.
    """

    lists: list[str]
    seams: list[int]
    untouchable: dict[int, str]
    parameters: list[int]
    transformer_parameters: int

    def __len__(self) -> int:
        return len(self.parameters)


def write(path: Path, facts: BlockFacts, provenance: dict[str, str]) -> None:
    """Writes the table; the transformer's number of parameters goes into the file's provenance."""
    every = range(len(facts))
    table = pd.DataFrame(
        {
            "block": every,
            "list": facts.lists,
            "seam": [block in facts.seams for block in every],
            "untouchable": [facts.untouchable.get(block, "") for block in every],
            "parameters": facts.parameters,
        }
    )
    stamp = provenance | {TRANSFORMER_PARAMETERS: str(facts.transformer_parameters)}
    tables.write(path, table, schemas.BLOCK_FACTS, stamp)


def read(path: Path) -> BlockFacts:
    """Reads what `write` wrote.

    Raises:
        UserError: the file holds something else.
    """
    table = tables.read(path, schemas.BLOCK_FACTS).to_pandas()
    try:
        total = int(tables.provenance(path)[TRANSFORMER_PARAMETERS])
        if not len(table) or table["block"].tolist() != list(range(len(table))):
            raise ValueError(f"blocks {table['block'].tolist()}")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: holds no facts of blocks ({error!r}); {seals.REMAKE}") from error
    reasons = table["untouchable"]
    return BlockFacts(
        table["list"].tolist(),
        table.index[table["seam"]].tolist(),
        reasons[reasons != ""].to_dict(),
        table["parameters"].tolist(),
        total,
    )
