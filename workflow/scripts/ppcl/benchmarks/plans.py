"""From what the config says of a benchmark to the pictures that a model makes for it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl.benchmarks.benchmark import Benchmark, Plan
from ppcl.benchmarks.registry import BENCHMARKS
from ppcl.errors import UserError
from ppcl.settings import BenchmarkSettings

FIRST_SEED = 2_000_000_000  # of pictures; far from those of the recording and of the evaluation
SEEDS = 1000  # of a prompt: more than it has pictures


def of(options: BenchmarkSettings) -> Benchmark:
    """A benchmark's entry. Raises UserError if there is none, or its options do not suit it."""
    if options.name not in BENCHMARKS:
        raise UserError(
            f"evaluate.benchmarks: '{options.name}' is none of {', '.join(BENCHMARKS)}; correct it"
        )
    known, key = BENCHMARKS[options.name], f"evaluate.benchmarks: {options.name}"
    if known.parts and options.part not in known.parts:
        raise UserError(
            f"{key}: scores one part at a time, and part is {options.part}; set it to one of "
            f"{', '.join(known.parts)}"
        )
    if options.part and not known.parts:
        raise UserError(f"{key}: has no parts, but part is '{options.part}'; leave it out")
    if (options.images_per_prompt or 1) > known.most:
        raise UserError(
            f"{key}: images_per_prompt is {options.images_per_prompt}, and its scorer takes at "
            f"most {known.most}; lower it"
        )
    return known


def plan(options: BenchmarkSettings, model: str, folder: str) -> Plan:
    """The pictures that a model makes for a benchmark.

    Args:
        model: teacher, or a variant's name.
        folder: of the benchmark's pictures.

    Raises:
        UserError: the options do not suit the benchmark, or its prompts file can't be used.
    """
    known = of(options)
    key, part = f"evaluate.benchmarks: {options.label}: prompts", options.part or ""
    prompts = known.prompts(Path(options.prompts), key, part)
    count = options.images_per_prompt or known.count
    return Plan(options.name, options.label, model, part, count, folder, tuple(prompts))


def samples(plan: Plan) -> list[dict[str, Any]]:
    """All pictures of a plan, as `pipelines.samples` has them: a picture's seed depends on the
    numbers of its prompt and of itself alone, so all models start from the same noise."""
    return [
        {
            "sample": number * plan.count + picture,
            "prompt_index": number,
            "prompt": prompt.text,
            "seed": FIRST_SEED + number * SEEDS + picture,
        }
        for number, prompt in enumerate(plan.prompts)
        for picture in range(plan.count)
    ]


def refuse_sides(plan: Plan, pipeline: Mapping[str, Any]) -> None:
    """Raises UserError if the scorer can't read pictures of this height and width (if known)."""
    height, width = pipeline.get("height"), pipeline.get("width")
    if BENCHMARKS[plan.benchmark].square and None not in (height, width) and height != width:
        raise UserError(
            f"evaluate.benchmarks: {plan.label}: its scorer cuts grids into squares, but pictures "
            f"have {width} x {height} pixels; set pipeline.height and width to one number, or "
            "leave this benchmark out"
        )


def command(plan: Plan, prompts: str, scores: str, sides: tuple[int, int]) -> str:
    """How its scorer is started for the pictures of a plan, from the folder of its own code.

    Args:
        prompts: the prompts file.
        scores: the folder for scores.
        sides: height and width of a picture.
    """
    known = BENCHMARKS[plan.benchmark]
    columns = min(known.columns, plan.count) or 1
    return known.command.format(
        pictures=shlex.quote(str(Path(plan.folder).absolute())),
        scores=shlex.quote(str(Path(scores).absolute())),
        prompts=shlex.quote(str(Path(prompts).absolute())),
        model=plan.model,
        count=plan.count,
        side=sides[0],
        grid=f"{columns},{-(-plan.count // columns)}",
        part=plan.part,
    )
