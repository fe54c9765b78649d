"""Draw the figures of a run from its parquet files (no model, no torch).

    plot.py intervals    search, heatmap, probes, width, modulation: what went, and why
    plot.py training     distill, subsets, finetune: loss curves
    plot.py quality      sets, pareto, tradeoff, images: what variants are, reach and cost; width
                         and modulation, in runs that search no intervals
    plot.py ablation     ablation: the method against its alternatives
    plot.py calibration  calibration: which price foretells the error after training

Each figure is written as SVG and PNG to --output; the same tables give the same files.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from ppcl import program
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.figures import ablations, comparison, composition, results, search, style
from ppcl.settings import Settings
from ppcl.storage import schemas, tables


def read(path: Path, schema) -> pd.DataFrame:
    """A table of the contract as a DataFrame."""
    return tables.read(path, schema).to_pandas()


def first_pictures(path: Path) -> pd.DataFrame:
    """Those that are drawn: all of them may be more than memory holds."""
    prompts = set(tables.read(path, columns=["prompt_index"])["prompt_index"].to_pylist())
    first = sorted(prompts)[: results.PROMPTS]
    return tables.read(path, schemas.IMAGES, where=("prompt_index", first)).to_pandas()


def origin(path: Path) -> str:
    """Where a figure comes from, for its metadata: its table's provenance but for the time."""
    stamps = tables.provenance(path)
    return json.dumps({k: v for k, v in sorted(stamps.items()) if k != "created"})


def depth(path: Path) -> int:
    """Number of the teacher's blocks, which a table's provenance tells."""
    stamps = tables.provenance(path)
    if "blocks" not in stamps:
        raise UserError(f"{path}: does not tell the number of blocks; delete it and rerun")
    return int(stamps["blocks"])


def intervals(options: argparse.Namespace, settings: Settings) -> None:
    """Figures of the search, as far as the run has what they show."""
    drawn = {}
    chosen = pd.DataFrame(columns=schemas.INTERVALS.names)
    if options.intervals:
        chosen, cka = read(options.intervals, schemas.INTERVALS), read(options.cka, schemas.CKA)
        stream = settings.similarity.streams
        drawn["search"] = search.search(cka, chosen, stream), options.cka
    chosen = chosen.astype({"selected": bool})
    if options.blocks:
        table = read(options.blocks, schemas.BLOCKS)
        drawn["heatmap"] = search.heatmap(table, chosen), options.blocks
    if options.probes:
        table = read(options.probes, schemas.PROBES)
        drawn["probes"] = search.probes(table, chosen), options.probes
    if options.width:
        table = read(options.width, schemas.WIDTH_CANDIDATES)
        drawn |= closed_forms(table, chosen, options.width, settings)
    save(drawn, options.output)


def closed_forms(table: pd.DataFrame, chosen: pd.DataFrame, path: Path, settings: Settings) -> dict:
    """Figures of what closed forms cost, and of which were taken.

    table: as schemas.WIDTH_CANDIDATES. chosen: intervals. path: whose provenance counts.
    """
    drawn, blocks = {}, depth(path)
    if settings.width.enabled:
        drawn["width"] = search.width(table, chosen, blocks), path
    if settings.modulation.enabled:
        drawn["modulation"] = composition.modulation(table, blocks), path
    return drawn


def training(options: argparse.Namespace, settings: Settings) -> None:
    """Loss curves, of what was trained."""
    drawn = {}
    if options.distill_log:
        log = read(options.distill_log, schemas.DISTILL_LOG)
        figure = results.distill(log, settings.distill.loss)
        drawn["distill"] = figure, options.distill_log
    if options.subsets_log:
        joint = {"subsets": read(options.subsets_log, schemas.VELOCITY_LOG)}
        title = "Random subsets of students against the teacher's output"
        drawn["subsets"] = results.velocity(joint, ["subsets"], title), options.subsets_log
    if options.finetune_logs:
        # Colours follow the config's order of variants, whatever the order of the files.
        names = [variant.name for variant in settings.variants]
        paths = {path.stem: path for path in options.finetune_logs}
        order = sorted(paths, key=lambda n: (names.index(n) if n in names else len(names), n))
        tuned = {name: read(paths[name], schemas.VELOCITY_LOG) for name in order}
        title = "Fine-tuning of the assembled variants against the teacher's output"
        drawn["finetune"] = results.velocity(tuned, names, title), paths[order[0]]
    save(drawn, options.output)


def quality(options: argparse.Namespace, settings: Settings) -> None:
    """Quality against cost, and pictures."""
    metrics, pictures = read(options.metrics, schemas.METRICS), first_pictures(options.images)
    points = read(options.points, schemas.POINTS)
    names = [variant.name for variant in settings.variants]
    tuned = [variant.name for variant in settings.variants if variant.finetune_steps]
    units = read(options.units, schemas.VARIANT_UNITS)
    drawn = {
        "sets": (composition.sets(units, names, depth(options.units)), options.units),
        "pareto": (results.pareto(points, metrics, tuned), options.points),
        "tradeoff": (results.tradeoff(metrics), options.metrics),
        "images": (results.images(pictures, metrics), options.images),
    }
    if options.width:
        taken = composition.taken(read(options.width, schemas.WIDTH_MEASURED), units)
        none = pd.DataFrame(columns=schemas.INTERVALS.names).astype({"selected": bool})
        drawn |= closed_forms(taken, none, options.units, settings)
    save(drawn, options.output)


def ablation(options: argparse.Namespace, settings: Settings) -> None:
    """Every method at the same size."""
    table = read(options.results, schemas.ABLATION)
    drawn = {
        "ablation": (comparison.comparison(table), options.results),
        "low_rank": (comparison.low_rank(table), options.results),
        "schedules": (ablations.schedules(table), options.results),
    }
    save(drawn, options.output)


def calibration(options: argparse.Namespace, settings: Settings) -> None:
    """Prices before training against errors after it."""
    table = read(options.calibration, schemas.CALIBRATION)
    drawn = {"calibration": (ablations.calibration(table), options.calibration)}
    save(drawn, options.output)


def save(drawn: dict, output: Path) -> None:
    """Write name -> (figure, the table that it shows) to the folder `output`."""
    for name, (figure, source) in drawn.items():
        style.save(figure, output / name, origin(source) if source else "")


def main() -> None:
    parser = program.parser(__doc__)
    groups = parser.add_subparsers(required=True, metavar="GROUP")
    of_group = {
        intervals: ((), ("cka", "blocks", "probes", "intervals", "width")),
        training: ((), ("distill_log", "subsets_log")),
        quality: (("metrics", "images", "points", "units"), ("width",)),
        ablation: (("results",), ()),
        calibration: (("calibration",), ()),
    }
    for draw, (reads, may_read) in of_group.items():
        group = groups.add_parser(draw.__name__, help=draw.__doc__, description=draw.__doc__)
        group.set_defaults(draw=draw)
        program.add_options(
            group,
            "config",
            reads=reads,
            may_read=may_read,
            writes=("output",),
            probes="probes/probes.parquet",
            width="width/candidates.parquet; of the group quality, width/measured.parquet",
            output="folder of the figures",
        )
        if draw is training:
            logs = "input: one of each fine-tuned variant, named after it; may be none"
            group.add_argument("--finetune-logs", type=Path, nargs="*", default=[], help=logs)
    options = parser.parse_args()
    options.draw(options, config.load(options.config))


if __name__ == "__main__":
    program.run(main)
