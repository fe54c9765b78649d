"""What the stages that teach students share: their command line, and what they leave behind."""

import argparse
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa
from accelerate import Accelerator
from torch import nn

from ppcl import program, provenance
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit
from ppcl.runtime import processes, stopping
from ppcl.settings import DistillSettings, Settings, SubsetsSettings
from ppcl.storage import schemas, tables, whole
from ppcl.training import distillation
from ppcl.transformer import calls


def parser(description: str | None, students: str) -> argparse.ArgumentParser:
    """The command line; students: the file, in the run's folder, of those that it begins with."""
    return program.parser(
        description,
        "config",
        "state",
        reads=("calls", "plan", "students"),
        writes=("output", "log_table", "errors"),
        students=students,
        output="students.safetensors",
        log_table="log.parquet",
        errors="errors.parquet",
    )


def finish(
    args: argparse.Namespace,
    settings: Settings,
    options: DistillSettings | SubsetsSettings,
    transformer: nn.Module,
    units: Sequence[Unit],
    entries: Sequence[dict],
    taught: Students,
    log: pd.DataFrame,
    schema: pa.Schema,
    reader: calls.Reader,
    accelerator: Accelerator,
    identity: str,
) -> None:
    """Measures what the trained units cost; writes students, log and errors; ends the processes.

    Args:
        options: the stage's. units, entries: as of `distillation.cost_table`. schema: of the log.
        identity: of the stage's training, by which finished errors outlive a killed run.
    """
    costs = distillation.cost_table(
        transformer,
        units,
        taught,
        entries,
        reader,
        options,
        settings.seed,
        accelerator,
        args.state / "errors",
        identity,
    )
    stopping.ignore()
    if accelerator.is_main_process:
        stamp = provenance.stamp(settings.given, rows=len(reader))
        students.save(args.output, taught, stamp)
        tables.write(args.log_table, log, schema, stamp)
        tables.write(args.errors, costs, schemas.UNIT_ERRORS, stamp)
    processes.finish(accelerator)
    if accelerator.is_main_process:
        # What may take most of a disk, and a finished training does not read.
        whole.forget(args.state / "inputs")
