"""Prices before training against errors after it, for a sample of intervals, FFNs and text runs.

    python workflow/scripts/calibrate.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet \
        --probes results/digits/probes/probes.safetensors \
        --cka results/digits/similarity/cka.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --width results/digits/width/measured.parquet --state results/digits/state/calibrate \
        --table results/digits/ablation/calibration.parquet

All are trained at once, each alone (Eq. 6), for as many steps as the methods of the ablation. A
killed run goes on from the last checkpoint in --state. Runs in one process.
"""

from pathlib import Path

from ppcl import program, provenance
from ppcl.ablation import calibration
from ppcl.ablation.material import Material
from ppcl.configuration import config
from ppcl.runtime import stopping
from ppcl.search import measured
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import opening
from ppcl.training import loop
from ppcl.transformer import calls
from ppcl.transformer.context import State

SHARED = ("probes", "cka", "sensitivity", "width")


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        "state",
        reads=("calls", *SHARED),
        writes=("table",),
        table="ablation/calibration.parquet",
    ).parse_args()
    settings = config.load(args.config)
    mixed_precision = settings.distill.mixed_precision
    context = opening.opened(settings, calls.Reader(args.calls), mixed_precision, compiled=True)
    shared = {name: getattr(args, name) for name in SHARED}
    identity = loop.identity(Path(__file__), settings, [args.calls, *shared.values()])
    material = Material(context, settings, shared, State(args.state, identity))

    depth = material.depth
    cka = measured.cka(args.cka, settings.similarity.streams, depth)
    probes, _ = tensors.read(args.probes)
    closed_forms = measured.closed_forms(args.width, depth)
    table = calibration.table(material, cka, probes, closed_forms)
    judged, steps = len(calibration.reported(material)), calibration.steps(settings)
    stamp = provenance.stamp(settings.given, judged=judged, steps=steps)
    stopping.ignore()
    tables.write(args.table, table, schemas.CALIBRATION, stamp)


if __name__ == "__main__":
    program.run(main)
