"""Checks, before anything runs, of the benchmarks that a configuration names. Needs no torch."""

from collections.abc import Set

from ppcl.benchmarks import plans
from ppcl.errors import UserError
from ppcl.settings import Settings
from ppcl.teacher.prompts import shown


def check(settings: Settings, recorded: Set[str], source: str) -> None:
    """Raises UserError if a benchmark is named twice, its prompts file can't be used or has a
    calibration prompt, or if its scorer can't read such pictures.

    recorded: calibration prompts, without blanks at their ends.
    """
    labels = [options.label for options in settings.evaluate.benchmarks]
    for options in settings.evaluate.benchmarks:
        if labels.count(options.label) > 1:
            raise UserError(
                f"{source}: evaluate.benchmarks: {options.label} is there twice; leave one out"
            )
        try:
            plan = plans.plan(options, "teacher", "pictures")
            plans.refuse_sides(plan, settings.pipeline)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if shared := sorted(recorded & {prompt.text.strip() for prompt in plan.prompts}):
            raise UserError(
                f"{source}: evaluate.benchmarks: {options.label}: {shown(shared[0])} is also a "
                "calibration prompt (record.prompts), so its scores would flatter; remove it there"
            )
