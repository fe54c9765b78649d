# The commands of jobs: how programs are started, what is handed to them, what goes before.

import contextlib

from ppcl.storage import whole

# Inputs of stages that make models from sets, and of those that search for sets (optional).
MODELS = ["maps", "conditioning", "start", "distill", "narrow", "subsets"]
PRICES = [
    "selection",
    "width",
    "latency",
    "sizes",
    "distill_unit_costs",
    "narrow_unit_costs",
    "subsets_unit_costs",
]
# What is given to, and written by, the stages that train students.
TRAINS_STUDENTS = [
    "input.calls",
    "input.selection",
    "input.students",
    "params.state",
    "output=output.students",
    "log_table=output.log",
    "output.unit_costs",
]


def command(*options, group="", launched=False, taken=False, first=True):
    """The shell command that runs the program `input.script` with the keys `params.config`.

    Each option names the place of its value in the rule: "input.calls" is `--calls {input.calls}`, and
    "output=output.students" is `--output {output.students}`. What holds braces goes as it is.

    group: the program's subcommand. launched: it is started in several processes, by
    `input.launcher`. taken: the command `params.taken` comes before it (see `taken`). first:
    whether it begins the log; else it adds to it.
    """
    words = ["{params.taken}python"] if taken else ["python"]
    if launched:
        words += ["{input.launcher} --processes {resources.processes} --threads {threads}"]
        words += ["--device {resources.device}"]
    words += ["{input.script}", *([group] if group else []), "--config {params.config:q}"]
    for option in options:
        name, _, value = option.rpartition("=")
        name = (name or value.split(".")[-1]).replace("_", "-")
        words.append(option if "{" in option else f"--{name} {{{value}}}")
    return " ".join([*words, "2>&1 | tee {log}" if first else "2>&1 | tee -a {log}"])


def launched(name):
    """For inputs of a stage of several processes: its program, and what starts it in them."""
    return {"script": program(name), "launcher": program("launch.py")}


def taken(*stages):
    """The first command of a job that reads outputs of stages: it deletes what they kept to resume
    from.

    No stage whose outputs the job does without belongs here: it may be at work, or half done."""
    states = " ".join(result(f"state/{stage}") for stage in stages)
    return f"python {program('forget.py')} {states}; " if states else ""


def forget_taken(jobs):
    """Deletes what these jobs kept to resume from, at the end of a run that succeeded, when all
    outputs are recorded.

    Not with --touch, which succeeds even if outputs are missing."""
    for job in () if workflow.touch else jobs:
        if job.params.get("state"):
            whole.forget(Path(job.params.state))
    with contextlib.suppress(OSError):
        os.rmdir(result("state"))


def optional(*names):
    """For params: the options that hand over inputs which a run may do without."""
    return lambda wildcards, input: " ".join(
        f"--{name.replace('_', '-')} {path}"
        for name in names
        for path in ([input.get(name)] if input.get(name) else [])
    )
