"""One run of the ablation: one method, one seed; trained, measured, fine-tuned, measured again.

    python workflow/scripts/ablate.py --config config/digits.yaml --method "$(...)" --number 0 \
        --calls results/digits/record/calls.parquet \
        --tokens results/digits/activations/tokens.parquet \
        --probes results/digits/probes/probes.safetensors \
        --cka results/digits/similarity/cka.parquet \
        --sensitivity results/digits/sensitivity/intervals.parquet \
        --width results/digits/width/measured.parquet \
        --state results/digits/state/ablation-joint-0 \
        --output results/digits/ablation/runs/joint-0.parquet

--method is the JSON of `methods.job`, so that a run depends on its own entry alone. Killed at any
point, the same command goes on from the last checkpoint in --state. Runs in one process.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from ppcl import (
    ablation,
    ablation_run,
    calls,
    config,
    devices,
    errors,
    pipelines,
    provenance,
    schemas,
    tables,
    teacher_identity,
    training,
)

SHARED = ("tokens", "probes", "cka", "sensitivity", "width")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config file, or inline JSON")
    parser.add_argument("--method", required=True, help="JSON of the method: name, select, train")
    parser.add_argument("--number", type=int, required=True, help="added to the config's seed")
    parser.add_argument("--calls", type=Path, required=True, help="calls.parquet")
    for name in SHARED:
        parser.add_argument(f"--{name}", type=Path, required=True, help="shared artifact")
    parser.add_argument("--state", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--output", type=Path, required=True, help="the run's rows to write")
    args = parser.parse_args()
    settings, job = config.load(args.config), json.loads(args.method)

    accelerator = devices.accelerator(settings["device"], settings["distill"]["mixed_precision"])
    # Everything is trained here, which needs the whole teacher on the device.
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings["teacher"], reader.provenance)
    teacher |= {"offload": "none"}
    pipe = pipelines.load(teacher, accelerator.device)
    shared = {name: getattr(args, name) for name in SHARED}
    identity = training.identity(Path(__file__), settings, [args.calls, *shared.values()])
    material = ablation_run.material_of(
        settings,
        pipe,
        job,
        reader=reader,
        accelerator=accelerator,
        paths=shared,
        seed=settings["seed"] + args.number,
        state=args.state,
        identity=provenance.digest([identity, job, args.number]),
    )
    rows = ablation_run.run(material, pipe, job, ablation.choose(material, job["select"]))
    stamp = provenance.stamp(settings) | {"method": args.method}
    table = pd.DataFrame(rows)[schemas.ABLATION_RUN.names]
    tables.write(args.output, table, schemas.ABLATION_RUN, stamp)
    training.forget(args.state)


if __name__ == "__main__":
    errors.run(main)
