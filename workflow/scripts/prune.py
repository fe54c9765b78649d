"""Makes the pruned model before training: units of the selection, and start weights of all.

    python workflow/scripts/prune.py --config config/digits.yaml \
        --intervals results/digits/intervals/intervals.parquet \
        --candidates results/digits/width/candidates.parquet \
        --calls results/digits/record/calls.parquet \
        --selection results/digits/prune/selection.json \
        --students results/digits/prune/students.safetensors

selection.json lists the units of the selection that are trained: all with intervals, and kept
blocks whose least-squares maps cost at least the share width.floor of what the whole selection
costs, or were not measured. The others are listed as closed: training could only harm them. It also
names the units that distill trains: with width.schedule: staged the depth students alone, as whole
blocks; else all that are trained. Narrow blocks start from least squares on recorded calls.
"""

from ppcl import program, provenance
from ppcl.closed_forms import linear_map_fits, linear_maps, solved, training_plan
from ppcl.configuration import config
from ppcl.pruning import students
from ppcl.pruning.units import new_blocks_of
from ppcl.runtime import stopping
from ppcl.storage import texts
from ppcl.teacher import opening
from ppcl.transformer import calls


def main() -> None:
    args = program.parser(
        __doc__,
        "config",
        reads=("intervals", "calls"),
        may_read=("candidates", "latency"),
        writes=("selection", "students"),
        students="prune/students.safetensors",
    ).parse_args()
    settings = config.load(args.config)
    options, start = settings.width, settings.prune.start
    context = opening.opened(settings, calls.Reader(args.calls))
    transformer = context.transformer

    unread_after = linear_maps.unread_after(transformer)
    selected = training_plan.selected(args.intervals, args.candidates, unread_after)
    selected.refuse_beyond(transformer, args.intervals)
    plan = training_plan.TrainingPlan.of(selected, options)
    made = solved.start(context, new_blocks_of(plan.distilled), start, options)
    made = linear_map_fits.start(context, made, options)
    stamp = provenance.stamp(settings.given, units=len(plan.units), closed=len(plan.closed))
    facts = plan.facts(transformer, settings, args.latency) | {"provenance": stamp}
    stopping.ignore()
    students.save(args.students, made, stamp)
    texts.write_sealed(args.selection, facts)


if __name__ == "__main__":
    program.run(main)
