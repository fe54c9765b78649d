"""Which FFNs and runs of text streams may become linear maps, and the models that tell what each
costs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ppcl.closed_forms import linear_map_candidates, linear_maps
from ppcl.closed_forms.linear_maps import Map, Stored
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit
from ppcl.search import measured
from ppcl.settings import WidthSettings
from ppcl.storage import schemas, tables
from ppcl.training import prices
from ppcl.training.prices import Change
from ppcl.transformer import blocks
from ppcl.transformer.context import Context
from ppcl.transformer.family import TEXT


class LinearMapPrices:
    """The linear FFNs and text runs that one teacher may get.

    Args:
        options: enabled, longest, cka_floor.
        blocks_table: similarity/blocks.parquet; without it, there are no text runs.

    Attributes:
        units: name of a candidate -> its unit.
        maps: all linear maps that the candidates need.
    """

    def __init__(self, context: Context, options: WidthSettings, blocks_table: Path | None):
        self._transformer, self._device = context.transformer, context.device
        depth = len(blocks.block_sequence(self._transformer))
        self._cka = np.full((depth, depth), np.nan)
        if blocks_table:
            self._cka = text_cka(blocks_table, depth)
        self.units = self._candidates(options) if options.enabled else {}
        self.maps = [
            one
            for unit in self.units.values()
            for new_block in unit.new_blocks
            for one in linear_maps.maps_of(new_block)
        ]

    def _candidates(self, options: WidthSettings) -> dict[str, Unit]:
        units = {
            f"ffn {u.new_blocks[0].linear_ffn[0]} {u.name}": u
            for u in linear_map_candidates.ffn_candidates(self._transformer)
        }
        runs = linear_map_candidates.text_candidates(
            self._transformer, self._cka, options.longest, options.cka_floor
        )
        return units | {f"text {unit.name}": unit for unit in runs}

    def changes(self, maps: Stored) -> dict[str, Change]:
        """The teacher with each candidate in it, by name."""
        return prices.of_students(
            self._transformer,
            {
                name: (unit.first, unit.last, partial(self._made, unit, maps))
                for name, unit in self.units.items()
            },
        )

    def _made(self, unit: Unit, maps: Stored) -> Students:
        """Blocks for a unit, on the device, even if the teacher's come there only to run."""
        made = linear_maps.closed(self._transformer, unit.new_blocks, maps)
        return {new_block: block.to(self._device) for new_block, block in made.items()}

    def rows(self, fit_errors: Mapping[Map, float]) -> dict[str, dict]:
        """Name of a candidate -> its row of width/measured.parquet, without the velocity error.

        fit_errors: 1 - R^2 of every map on held-out tokens.
        """
        sizes = blocks.parameters_of_blocks(self._transformer)
        return {
            name: {
                "kind": name.split()[0],
                "first": unit.first,
                "last": unit.last,
                "stream": name.split()[1] if name.startswith("ffn") else TEXT,
                "path": "",
                "rank": 0,
                "fit_error_heldout": max(
                    fit_errors[one]
                    for new_block in unit.new_blocks
                    for one in linear_maps.maps_of(new_block)
                ),
                "cka": self._cka[unit.first, unit.first : unit.last + 1].min()
                if name.startswith("text")
                else np.nan,
                "parameters_saved": linear_map_candidates.saved_parameters(
                    self._transformer, unit, sizes
                ),
            }
            for name, unit in self.units.items()
        }


def text_cka(path: Path, depth: int) -> np.ndarray:
    """CKA [blocks, blocks] of text outputs (NaN where there is none)."""
    table = tables.read(path, schemas.BLOCKS).to_pandas()
    rows = table[table["stream"] == TEXT]
    measured.check_depth(path, rows["block_a"], depth)
    values = np.full((depth, depth), np.nan)
    values[rows["block_a"], rows["block_b"]] = rows["cka"]
    return values
