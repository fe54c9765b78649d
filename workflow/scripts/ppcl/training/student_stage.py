"""What the stages that teach students share: their command line, their opening and their end."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
from torch import nn

from ppcl import program, provenance
from ppcl.pruning import selection_file, students
from ppcl.pruning.selection_file import SelectionFile
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit
from ppcl.runtime import processes, stopping
from ppcl.settings import DistillSettings, Settings, SubsetsSettings
from ppcl.storage import schemas, tables, whole
from ppcl.teacher import opening
from ppcl.training import distillation, loop, shards
from ppcl.transformer import calls
from ppcl.transformer.context import Context, State


def parser(description: str | None, students: str) -> argparse.ArgumentParser:
    """The command line.

    students: for the help, path in the run's folder of the students that training starts from.
    """
    return program.parser(
        description,
        "config",
        "state",
        reads=("calls", "selection", "students"),
        writes=("output", "log_table", "unit_costs"),
        students=students,
        output="students.safetensors",
        log_table="log.parquet",
        unit_costs="unit_costs.parquet",
    )


@dataclass(frozen=True)
class StudentStage:
    """A stage that teaches students, from its command line to its files.

    Attributes:
        args: arguments of the command line (`parser`).
        options: of the stage's training.
        selection: the whole selection.
        units, entries: the units that the stage, or its shard, trains, and their entries in
            selection.json.
        script, inputs: the files that decide what is trained.
    """

    args: argparse.Namespace
    settings: Settings
    options: DistillSettings | SubsetsSettings
    context: Context
    selection: SelectionFile
    units: Sequence[Unit]
    entries: Sequence[dict]
    script: Path
    inputs: Sequence[Path]

    @classmethod
    def opened(
        cls,
        args: argparse.Namespace,
        settings: Settings,
        options: DistillSettings | SubsetsSettings,
        script: str,
        teaches: Literal["units", "distilled"] = "units",
    ) -> "StudentStage":
        """Reads the selection and loads the teacher.

        Args:
            script: the stage's file, whose code decides the result too.
            teaches: which units of the selection: all that are trained, or those for `distill`.
        """
        reader = calls.Reader(args.calls)
        through_teacher = isinstance(options, SubsetsSettings)
        context = opening.opened(
            settings, reader, options.mixed_precision, gradients=through_teacher, compiled=True
        )
        selection = selection_file.read(args.selection)
        pairs = list(zip(getattr(selection, teaches), selection.facts[teaches], strict=True))
        inputs = [args.calls, args.selection, args.students]
        if shared_out := getattr(args, "shards", None):
            mine = shards.read(shared_out)[args.shard]
            pairs = [(unit, entry) for unit, entry in pairs if unit.name in mine]
            inputs.append(shared_out)
        units, entries = [unit for unit, _ in pairs], [entry for _, entry in pairs]
        own = units, entries, Path(script), inputs
        return cls(args, settings, options, context, selection, *own)

    @functools.cached_property
    def state(self) -> State:
        """Where the training goes on from. To be asked for after all inputs were read: reading
        them tells more clearly what is wrong with one than hashing it here would."""
        identity = loop.identity(self.script, self.settings, self.inputs)
        return State(self.args.state, identity)

    def train(
        self,
        modules: Mapping[str, nn.Module],
        losses: loop.Losses,
        taught: Students,
        name: str = "{}/",
    ) -> list[dict]:
        """Runs `loop.train` with the stage's settings; returns its log.

        Args:
            modules: by the names that `losses` gives them.
            taught: the students in these modules. name: see `distillation.lr_scales`.
        """
        return loop.train(
            modules,
            losses,
            dataclasses.replace(
                loop.Optimisation.from_settings(self.options),
                lr_scales=distillation.lr_scales(taught, self.settings.width.lr_scale, name),
            ),
            self.context.accelerator,
            self.state.folder / "checkpoint.safetensors",
            self.state.identity,
        )

    def finish(self, taught: Students, log: pd.DataFrame, schema: pa.Schema) -> None:
        """Measures what the trained units cost; writes students, log and unit costs; ends the
        processes.

        Args:
            schema: of the log.
        """
        costs = distillation.cost_table(
            self.context,
            self.units,
            taught,
            self.entries,
            self.options,
            self.state.within("errors"),
        )
        stopping.ignore()
        args, accelerator = self.args, self.context.accelerator
        if accelerator.is_main_process:
            stamp = provenance.stamp(self.settings.given, rows=len(self.context.reader))
            students.save(args.output, taught, stamp)
            tables.write(args.log_table, log, schema, stamp)
            tables.write(args.unit_costs, costs, schemas.UNIT_COSTS, stamp)
        processes.finish(accelerator)
        if accelerator.is_main_process:
            # Cached streams may take most of a disk; a finished training does not read them.
            whole.forget(args.state / "inputs")
