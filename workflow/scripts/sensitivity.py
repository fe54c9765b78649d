"""What every run of blocks costs: the velocity error with one untrained student in its place.

One process:       python workflow/scripts/sensitivity.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/sensitivity.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet \
    --state results/digits/state/sensitivity \
    --table results/digits/sensitivity/intervals.parquet

CKA of probes sees how linear a run is, not how much the output depends on it. A student that has
only its start weights does: the error it leaves ranks runs as the error after training does. Reads
of the config: seed, device, teacher, sensitivity, and prune for the start weights, with width's
calls to fit on if those are solved. A killed run goes on with the runs of blocks that are not
measured yet.
"""

from functools import partial
from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.closed_forms import solved
from ppcl.configuration import config
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import processes, stopping
from ppcl.search import intervals
from ppcl.settings import WidthSettings
from ppcl.storage import schemas, tables
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import loop, prices
from ppcl.transformer import blocks, calls


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        "state",
        reads=("calls",),
        writes=("table",),
        table="sensitivity/intervals.parquet",
    ).parse_args()
    settings = config.load(args.config)
    options, start = settings.sensitivity, settings.prune.start

    accelerator = processes.accelerator(settings.device)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    transformer = pipelines.load_transformer(teacher, accelerator.device, compiled=True)
    depth = len(blocks.block_sequence(transformer))
    runs = intervals.spans(depth, blocks.seams(transformer), blocks.untouchable(transformer))
    measured = [NewBlock(*ends) for ends in intervals.all_within(runs, options.longest)]
    key, seed = "sensitivity.rows", settings.seed
    rows = reader.sample_heldout("select", options.rows, seed, key)
    # Its rule hands over what fits depend on where there are fits alone.
    fits = settings.width if start == "solved" else WidthSettings.of({})

    def untrained(new_block: NewBlock) -> students.Students:
        # One at a time: at full size, a student of every run would not fit in memory.
        return solved.start(transformer, [new_block], start, reader, fits, seed, accelerator.device)

    plugged_in = {
        new_block.name: (new_block.first, new_block.last, partial(untrained, new_block))
        for new_block in measured
    }
    found = prices.measure(
        prices.Judged(transformer, reader, rows, options.batch_size, accelerator.device),
        prices.of_students(transformer, plugged_in),
        accelerator,
        args.state,
        loop.identity(Path(__file__), settings, [args.calls]),
    )
    stopping.ignore()
    if accelerator.is_main_process:
        table = pd.DataFrame(
            {
                "first": [new_block.first for new_block in measured],
                "last": [new_block.last for new_block in measured],
                "velocity_error": found,
                "rows": len(rows),
            }
        )
        stamp = provenance.stamp(settings.given, judged=len(rows))
        tables.write(args.table, table, schemas.SENSITIVITY, stamp)
    processes.finish(accelerator)


if __name__ == "__main__":
    program.run(main)
