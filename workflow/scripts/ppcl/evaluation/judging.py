"""What the config's judge reads in pictures, and whether that is what their prompts state."""

from pathlib import Path

import numpy as np

from ppcl import judges
from ppcl.evaluation import generation, metrics
from ppcl.evaluation.metrics import Estimate
from ppcl.storage import schemas, tables


class Judged:
    """Pictures as the config's judge reads them. Where it names none, nothing is read.

    Args:
        name: evaluate.judge.
        rows: of the prompts file, as `prompts.read` gives them.

    Attributes:
        readings: table of pictures -> JSON of what is read in each; empty texts without a judge.
    """

    def __init__(self, name: str, rows: list[dict]):
        self._name, self._rows, self._judge = name, rows, judges.named(name)
        self._reader = self._judge.load() if self._judge else None
        self.readings: dict[Path, list[str]] = {}

    def read(self, part: Path) -> None:
        """Reads the pictures of a table (schemas.IMAGES).

        Raises UserError if they are not of the judge's size.
        """
        table = tables.read(part, schemas.IMAGES, columns=schemas.IMAGES.names)
        if self._judge is None or self._reader is None:
            self.readings[part] = [""] * len(table)
            return
        pictures = [generation.from_png(data) for data in table["png"].to_pylist()]
        judges.refuse_sides(self._name, *pictures[0].shape[:2])
        shown = np.stack(pictures) / metrics.LARGEST
        stated = self._stated(table["prompt_index"].to_pylist())
        self.readings[part] = judges.readings(self._judge, self._reader, shown, stated)

    def scores(self, part: Path, prompts: list[int]) -> dict[str, np.ndarray]:
        """Metric -> 1 or 0 for each picture of a table, of these prompts; {} without a judge."""
        if self._judge is None:
            return {}
        return judges.scores(self._judge, self.readings[part], self._stated(prompts))

    def tested(self, resamples: int, seed: int) -> dict[str, Estimate]:
        """How often it is right itself, on pictures that it was not fitted on."""
        right = self._judge.tested(self._reader) if self._judge else {}
        return {
            metric: metrics.mean(values, np.arange(len(values)), resamples, seed)
            for metric, values in right.items()
        }

    def _stated(self, prompts: list[int]) -> list[dict]:
        return [self._rows[index] for index in prompts]
