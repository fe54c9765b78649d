"""The tables of a run that figures are drawn from, by their names."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from ppcl.errors import UserError
from ppcl.settings import Settings
from ppcl.storage import schemas, tables

TABLES = {  # name, and option of plot.py -> file below results/<run>/, as in schemas.TABLES
    "block_facts": "record/blocks.parquet",
    "cka": "similarity/cka.parquet",
    "blocks": "similarity/blocks.parquet",
    "probes": "probes/probes.parquet",
    "intervals": "intervals/intervals.parquet",
    "candidates": "width/candidates.parquet",
    "measured": "width/measured.parquet",
    "distill_log": "distill/log.parquet",
    "subsets_log": "subsets/log.parquet",
    "finetune_logs": "finetune/<variant>.parquet",
    "metrics": "evaluation/metrics.parquet",
    "images": "evaluation/images.parquet",
    "points": "pareto/points.parquet",
    "units": "variants/units.parquet",
    "results": "ablation/results.parquet",
    "calibration": "ablation/calibration.parquet",
}


class RunTables:
    """Reads the tables of one run.

    Args:
        paths: name, of TABLES -> its files: one, or one for each variant, named after it.
        settings: so far as figures read them (`Entry.keys`).

    Raises:
        UserError: from all methods: a table is missing, damaged, or lacks a column.
    """

    def __init__(self, paths: Mapping[str, Sequence[Path]], settings: Settings):
        self._paths = {name: files for name, files in paths.items() if files}
        self.settings = settings

    def __contains__(self, name: str) -> bool:
        return name in self._paths

    def file(self, name: str) -> Path:
        """Where a table lies; the first one of several."""
        return self._paths[name][0]

    def table(self, name: str) -> pd.DataFrame:
        """A table that is one file, with the columns of its schema."""
        return self._read(name, self.file(name))

    def of_variants(self, name: str) -> dict[str, pd.DataFrame]:
        """Tables of which each variant has one, in the order of the config."""
        names = self.variants
        files = {path.stem: path for path in self._paths[name]}
        order = sorted(files, key=lambda n: (names.index(n) if n in names else len(names), n))
        return {variant: self._read(name, files[variant]) for variant in order}

    def first_prompts(self, name: str, count: int) -> pd.DataFrame:
        """Rows of the first prompts alone: all of them may be more than memory holds."""
        path = self.file(name)
        prompts = set(tables.read(path, columns=["prompt_index"])["prompt_index"].to_pylist())
        where = "prompt_index", sorted(prompts)[:count]
        return tables.read(path, schemas.TABLES[TABLES[name]], where=where).to_pandas()

    def depth(self, name: str) -> int:
        """Number of the teacher's blocks, which a table's provenance tells."""
        stamps = tables.provenance(self.file(name))
        if "blocks" not in stamps:
            raise UserError(
                f"{self.file(name)}: does not tell the number of blocks; delete it and rerun"
            )
        return int(stamps["blocks"])

    @cached_property
    def intervals(self) -> pd.DataFrame:
        """As schemas.INTERVALS; without rows where none were searched for."""
        if "intervals" in self:
            return self.table("intervals")
        return pd.DataFrame(columns=schemas.INTERVALS.names).astype({"selected": bool})

    @property
    def variants(self) -> list[str]:
        """Names of the config's variants, in its order."""
        return [variant.name for variant in self.settings.pruned]

    def _read(self, name: str, path: Path) -> pd.DataFrame:
        return tables.read(path, schemas.TABLES[TABLES[name]]).to_pandas()
