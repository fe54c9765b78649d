"""A stage's program: its command line, how it runs and ends."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ppcl import provenance
from ppcl.errors import UserError, trouble
from ppcl.runtime import collector, stopping

# Options of many programs: name -> type of the value, help text.
SHARED: dict[str, tuple[type, str]] = {
    "config": (str, "config file, or inline JSON"),
    "state": (Path, "folder that a killed run resumes from"),
    "variant": (str, "name of a variant in the config"),
    "number": (int, "number of the run, added to the config's seed"),
}

# Files that programs read and write: the option's name -> where they are in results/<run>/.
FILES = {
    "calls": "record/calls.parquet",
    "block_facts": "record/blocks.parquet",
    "sizes": "record/sizes.parquet; with a budget of gib",
    "encoded": "encode/<data>.parquet; with finetune.data",
    "tokens": "activations/tokens.parquet",
    "moments": "activations/moments.safetensors",
    "conditioning": "activations/conditioning.safetensors",
    "probes": "probes/probes.safetensors",
    "probes_table": "probes/probes.parquet",
    "cka": "similarity/cka.parquet",
    "blocks": "similarity/blocks.parquet",
    "sensitivity": "sensitivity/intervals.parquet; with intervals.cost: velocity",
    "width": "width/measured.parquet; with closed forms",
    "maps": "width/maps.safetensors; with closed forms",
    "candidates": "width/candidates.parquet; with closed forms",
    "latency": "latency/blocks.parquet; with a budget of latency",
    "intervals": "intervals/intervals.parquet",
    "selection": "prune/selection.json",
    "start": "prune/students.safetensors",
    "shards": "distill/shards/shards.json",
    "distill": "distill/students.safetensors",
    "distill_unit_costs": "distill/unit_costs.parquet",
    "distill_log": "distill/log.parquet",
    "narrow": "narrow/students.safetensors",
    "narrow_unit_costs": "narrow/unit_costs.parquet",
    "subsets": "subsets/students.safetensors",
    "subsets_unit_costs": "subsets/unit_costs.parquet",
    "subsets_log": "subsets/log.parquet",
    "sets": "variants/sets.json, or variants/sets/<variant>.json",
    "units": "variants/units.parquet",
    "measured": "variants/measured.parquet",
    "refits": "variants/maps.safetensors",
    "finetuned": "finetune/<variant>.safetensors",
    "points": "pareto/points.parquet",
    "metrics": "evaluation/metrics.parquet",
    "manifest": "evaluation/benchmarks/<benchmark>/<model>.json",
    "images": "evaluation/images.parquet",
    "model": "models/<variant>/, which gets the card, too",
    "card": "cards/<variant>/",
    "results": "ablation/results.parquet",
    "calibration": "ablation/calibration.parquet",
}


def parser(
    description: str | None,
    *shared: str,
    reads: Iterable[str] = (),
    may_read: Iterable[str] = (),
    writes: Iterable[str] = (),
    **files: str,
) -> argparse.ArgumentParser:
    """The command line of a program.

    Args:
        description: the program's docstring, which --help shows as it is.
        shared: names of options in SHARED, all required.
        reads, may_read, writes: names of its required inputs, its optional inputs and its outputs.
            Underscores are dashes on the command line.
        files: name -> help text, for files that are not in FILES or are described otherwise there.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(made, *shared, reads=reads, may_read=may_read, writes=writes, **files)
    return made


def add_options(
    made: argparse.ArgumentParser,
    *shared: str,
    reads: Iterable[str] = (),
    may_read: Iterable[str] = (),
    writes: Iterable[str] = (),
    **files: str,
) -> None:
    """Adds options to the parser `made`, perhaps a subcommand's; else arguments as in `parser`."""
    for name in shared:
        kind, text = SHARED[name]
        made.add_argument(_option(name), type=kind, required=True, help=text)
    places = FILES | files
    for name in reads:
        text = f"input: {places[name]}"
        made.add_argument(_option(name), type=Path, required=True, metavar="FILE", help=text)
    for name in may_read:
        text = f"input, optional: {places[name]}"
        made.add_argument(_option(name), type=Path, metavar="FILE", help=text)
    for name in writes:
        text = f"output: {places[name]}"
        made.add_argument(_option(name), type=Path, required=True, metavar="PATH", help=text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(main: Callable[[], None]) -> None:
    """Calls `main` as a program.

    A UserError, or an error that a disk or the system caused (`errors.trouble`), becomes one
    `error:` line and exit code 2; a program that SIGTERM ended has the exit code
    `stopping.EXIT_CODE`.
    """
    collector.work()
    provenance.commit()
    with stopping.heeded():
        try:
            main()
            stopping.done()
        except SystemExit:
            stopping.done()
            raise
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else trouble(error)
            if message is None:
                raise
            # An open progress bar has not ended its line, and would be drawn again at the end.
            bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
            for bar in list(getattr(bars, "_instances", ())):
                bar.close()
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(2)
