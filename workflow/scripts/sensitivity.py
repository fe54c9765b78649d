"""What every run of blocks costs: the velocity error with one untrained student in its place.

One process:       python workflow/scripts/sensitivity.py --config config/digits.yaml ...
Several (torchrun): python -m torch.distributed.run --standalone --nproc_per_node 2 \
    workflow/scripts/sensitivity.py --config config/digits.yaml \
    --calls results/digits/record/calls.parquet \
    --state results/digits/state/sensitivity \
    --table results/digits/sensitivity/intervals.parquet

CKA of probes shows how linear a run is, not how much the output depends on it. The velocity error
with a student that has only its start weights shows both: it ranks runs as the error after training
does. Reads of the config: seed, device, teacher, sensitivity, prune for the start weights and, with
prune.start: solved, the keys of width that say how they are fitted. A killed run goes on with the
runs of blocks that are not measured yet.
"""

from pathlib import Path

from ppcl import program, provenance
from ppcl.closed_forms import sensitivity
from ppcl.configuration import config
from ppcl.runtime import processes, stopping
from ppcl.storage import schemas, tables
from ppcl.teacher import opening
from ppcl.training import loop
from ppcl.transformer import calls
from ppcl.transformer.context import State


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
    context = opening.opened(settings, calls.Reader(args.calls), compiled=True)
    state = State(args.state, loop.identity(Path(__file__), settings, [args.calls]))
    count, key = settings.sensitivity.rows, "sensitivity.rows"
    rows = context.reader.sample_heldout("select", count, settings.seed, key)

    table = sensitivity.interval_errors(context, settings, rows, state)
    stopping.ignore()
    if context.accelerator.is_main_process:
        stamp = provenance.stamp(settings.given, judged=len(rows))
        tables.write(args.table, table, schemas.SENSITIVITY, stamp)
    processes.finish(context.accelerator)


if __name__ == "__main__":
    program.run(main)
