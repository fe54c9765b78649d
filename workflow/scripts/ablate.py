"""One run of the ablation: one method, one seed; trained, measured, fine-tuned, measured again.

    python workflow/scripts/ablate.py --config config/digits.yaml --method "$(...)" --number 0 \
        --calls results/digits/record/calls.parquet \
        --tokens results/digits/activations/tokens.parquet \
        --conditioning results/digits/activations/conditioning.safetensors \
        --probes results/digits/probes/probes.safetensors \
        --cka results/digits/similarity/cka.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --width results/digits/width/measured.parquet \
        --latency results/digits/latency/blocks.parquet \
        --state results/digits/state/ablation-joint-0 \
        --output results/digits/ablation/runs/joint-0.parquet

--method is the JSON of `methods.job`, so that a run depends on its own entry alone. Killed at any
point, the same command goes on from the last checkpoint in --state. A finished run keeps its rows
there and deletes its weights: there is a run for every method and seed. Runs in one process.
"""

import json
from pathlib import Path

import pandas as pd

from ppcl import program, provenance
from ppcl.ablation import selections, trial
from ppcl.configuration import config
from ppcl.runtime import processes, stopping
from ppcl.settings import Settings
from ppcl.storage import schemas, tables, whole
from ppcl.teacher import pipelines, teacher_identity
from ppcl.training import loop
from ppcl.transformer import calls
from ppcl.transformer.context import Context, State

WORK = "work"  # in --state, until the rows are there
SHARED = ("tokens", "conditioning", "probes", "cka", "sensitivity", "width", "latency")


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        "number",
        "state",
        reads=("calls", *SHARED),
        writes=("output",),
        output="the rows of the run",
    )
    parser.add_argument("--method", required=True, help="JSON of the method: name, select, train")
    args = parser.parse_args()
    settings, job = config.load(args.config), json.loads(args.method)

    shared = {name: getattr(args, name) for name in SHARED}
    inputs = loop.identity(Path(__file__), settings, [args.calls, *shared.values()])
    identity = provenance.digest([inputs, job, args.number])
    kept = args.state / "rows.parquet"
    if not kept.exists() or tables.provenance(kept).get("identity") != identity:
        rows = train_and_measure(args, settings, job, shared, identity)
        table = pd.DataFrame(rows)[schemas.ABLATION_RUN.names]
        tables.write(kept, table, schemas.ABLATION_RUN, {"identity": identity})
    table = tables.read(kept, schemas.ABLATION_RUN).to_pandas()
    stamp = provenance.stamp(settings.given) | {"method": args.method}
    stopping.ignore()
    tables.write(args.output, table, schemas.ABLATION_RUN, stamp)
    whole.forget(args.state / WORK)


def train_and_measure(
    args, settings: Settings, job: dict, shared: dict, identity: str
) -> list[dict]:
    """The rows of the run.

    Args:
        job: the method's entry (`methods.job`).
        shared: paths of the artifacts SHARED, by name.
        identity: of the run, for what a killed one has left.
    """
    accelerator = processes.accelerator(settings.device, settings.distill.mixed_precision)
    # Everything is trained here, which needs the whole teacher on the device.
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    teacher = teacher.replace(offload="none")
    pipe = pipelines.load(teacher, accelerator.device)
    transformer = pipelines.denoiser(pipe, settings.teacher).requires_grad_(False).eval()
    context = Context(transformer, reader, settings.seed + args.number, accelerator)
    state = State(args.state / WORK, identity)
    material = trial.material_of(context, settings, job, shared, state)
    return trial.run(material, pipe, job, selections.choose(material, job["select"]))


if __name__ == "__main__":
    program.run(main)
