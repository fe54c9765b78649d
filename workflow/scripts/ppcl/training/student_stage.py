"""What the stages that teach students share: their command line, and what they leave behind."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
from accelerate import Accelerator
from torch import nn

from ppcl import provenance
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import Unit
from ppcl.runtime import processes, stopping
from ppcl.settings import DistillSettings, Settings, SubsetsSettings
from ppcl.storage import schemas, tables, whole
from ppcl.training import distillation
from ppcl.transformer import calls


def arguments(description: str, start: str, sharded: bool = False) -> argparse.Namespace:
    """The command line.

    Args:
        start: what the students are that the stage begins with.
        sharded: whether the stage can be one of several jobs, each with some of the units.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    parser.add_argument("--plan", type=Path, required=True, help="plan.json")
    parser.add_argument("--students", type=Path, required=True, help=start)
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--output", type=Path, required=True, help="trained students to write")
    parser.add_argument("--log-table", type=Path, required=True, help="log.parquet to write")
    parser.add_argument("--errors", type=Path, required=True, help="errors.parquet to write")
    if sharded:
        parser.add_argument("--shards", type=Path, help="shards.json, of a job that is a shard")
        parser.add_argument("--shard", type=int, default=0, help="and which of them it is")
    return parser.parse_args()


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
