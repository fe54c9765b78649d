"""Makes one model's pictures for a benchmark of the field, where its own scorer reads them.

    python workflow/scripts/benchmark_pictures.py --config config/digits.yaml \
        --benchmark geneval --model results/digits/models/p50 \
        --pictures results/digits/evaluation/benchmarks/geneval/pictures \
        --manifest results/digits/evaluation/benchmarks/geneval/p50.json \
        --state results/digits/state/benchmarks/geneval/p50

The config's evaluate.benchmarks says which prompts, and how many pictures of each. Without --model
it is the teacher's turn. All models start from the same noise; a killed run goes on with the
batches that are missing. The manifest lists what was made. In the end the command is printed with
which the benchmark's own code scores the pictures; gather_metrics.py reads what that writes.
"""

import argparse
from pathlib import Path

from ppcl import program, provenance
from ppcl.benchmarks import benchmark, plans
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.evaluation import benchmark_pictures, films, making, model_folders, workers
from ppcl.runtime import devices, stopping
from ppcl.settings import BenchmarkSettings, Settings
from ppcl.teacher import hub, teacher_identity


def options_of(settings: Settings, label: str) -> BenchmarkSettings:
    """What the config says of a benchmark. Raises UserError if it says nothing."""
    for options in settings.evaluate.benchmarks:
        if options.label == label:
            return options
    known = ", ".join(options.label for options in settings.evaluate.benchmarks) or "empty"
    raise UserError(f"--benchmark: '{label}' is not in evaluate.benchmarks ({known})")


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(__doc__, "config", "state", writes=("manifest",))
    parser.add_argument(
        "--benchmark", required=True, help="name in evaluate.benchmarks, with -<part> if it has one"
    )
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="input: a variant's folder; default: teacher"
    )
    parser.add_argument(
        "--pictures", type=Path, required=True, help="output: folder of all models' pictures"
    )
    return parser.parse_args()


def main() -> None:
    args = command_line()
    settings = config.load(args.config)
    options = options_of(settings, args.benchmark)
    teacher = teacher_identity.resolved(settings.teacher)
    model = model_folders.models(teacher, [args.model] if args.model else [])[-1]
    plan, digest = plans.plan(options, model.name, str(args.pictures)), model.digest()
    device = devices.choose(settings.device)
    workers.prepare_workers()

    samples = plans.samples(plan)
    size = settings.evaluate.batch_size
    code = provenance.code_digest(Path(__file__))
    identity = provenance.digest([settings.pipeline, samples, size, device.type, code])
    state, key = args.state / identity[:16], f"evaluate.benchmarks: {plan.label}: prompts"
    parts = making.pictures(
        [model],
        samples,
        settings,
        device,
        state,
        key,
        lambda part: benchmark_pictures.refuse_unfit(plan, part),
    )
    model_folders.refuse_changed([model], [digest])
    folder = hub.folder(model.source, model.key)
    rate = films.frames_per_second(folder, settings.teacher.component, dict(settings.pipeline))
    files, sides = benchmark_pictures.lay_out(plan, parts[model.name], args.pictures, rate)
    stopping.ignore()
    benchmark.write_manifest(args.manifest, plan, files, sides)
    scores = args.pictures.with_name("scores")
    scores.mkdir(exist_ok=True)  # which not every scorer makes for itself
    command = plans.command(plan, options.prompts, str(scores), sides)
    print(f"{len(samples)} pictures of {model.name} for {plan.label}. To score them:\n{command}")


if __name__ == "__main__":
    program.run(main)
