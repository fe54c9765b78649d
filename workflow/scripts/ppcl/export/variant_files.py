"""The files of earlier stages that variants are made from."""

import argparse
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ppcl.closed_forms import linear_map_refits
from ppcl.closed_forms.linear_map_refits import Refits
from ppcl.errors import UserError
from ppcl.search.offers import PriceFiles
from ppcl.search.sets import REFIT, START, TRAINED, Set

# Names, in program.FILES, of what models are made from, and of what sets are chosen by.
MODEL_FILES = ("maps", "conditioning", START, *TRAINED)
PRICE_FILES = (
    "selection",
    "width",
    "latency",
    "sizes",
    *(f"{stage}_unit_costs" for stage in TRAINED),
)


@dataclass(frozen=True)
class Files:
    """What sets are made from, as far as the config asks for it.

    Attributes:
        width, maps: prices of closed forms, and their least-squares maps.
        conditioning: what modulations get.
        latency: measured times.
        refits: maps that were fitted once more in variants' sets.
        students: of `start` and of each stage that trains, by its name.
        errors: unit_costs.parquet of each stage that trains, by its name.
        sizes: bytes of the teacher's parts.
    """

    width: Path | None = None
    maps: Path | None = None
    conditioning: Path | None = None
    latency: Path | None = None
    refits: Path | None = None
    students: Mapping[str, Path] = field(default_factory=dict)
    errors: Mapping[str, Path] = field(default_factory=dict)
    sizes: Path | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Files":
        """The files that a command line names."""
        given = {name: path for name, path in vars(args).items() if path is not None}
        return cls(
            width=given.get("width"),
            maps=given.get("maps"),
            conditioning=given.get("conditioning"),
            latency=given.get("latency"),
            sizes=given.get("sizes"),
            refits=given.get("refits"),
            students={source: given[source] for source in (START, *TRAINED) if source in given},
            errors={
                stage: given[f"{stage}_unit_costs"]
                for stage in TRAINED
                if f"{stage}_unit_costs" in given
            },
        )

    @property
    def prices(self) -> PriceFiles:
        """The tables that sets are chosen by."""
        return PriceFiles(self.width, self.latency, self.errors, self.sizes)

    @property
    def every(self) -> list[Path]:
        """All files but the refitted maps, of which each set has its own (`refits_digest`)."""
        single = (self.width, self.maps, self.conditioning, self.latency, self.sizes)
        return [path for path in (*single, *self.students.values(), *self.errors.values()) if path]

    @functools.cached_property
    def refitted(self) -> Refits:
        """The refitted maps, read once for the digest and the models; none without a file."""
        return linear_map_refits.read(self.refits) if self.refits else {}

    def refits_digest(self, chosen: Set, expected: str | None = None) -> str:
        """Digest of the refitted maps that a set uses.

        Args:
            expected: the digest that was noted when the set was chosen; None: any will do.

        Raises:
            UserError: the digest is another, or the set uses refitted maps and no file has any.
        """
        if self.refits is None and any(s.startswith(REFIT) for s in chosen.sources.values()):
            raise UserError("the set has refitted maps: name variants/maps.safetensors, --refits")
        digest = linear_map_refits.digest(self.refitted, chosen)
        if expected not in (None, digest):
            raise UserError(
                f"{self.refits} has other maps than the set was made with; delete the run's folder "
                "variants and rerun"
            )
        return digest
