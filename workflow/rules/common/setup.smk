# What all rules start from: the library, the shell of jobs, the completed config, paths of the run.

import functools
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

# Relative where possible: Snakemake remembers inputs by path, and a moved folder should not rerun.
SCRIPTS = Path(os.path.relpath(Path(workflow.current_basedir) / "../../scripts"))
# Paths of programs stand unquoted in every command.
if shlex.quote(str(SCRIPTS)) != str(SCRIPTS):
    sys.exit(
        f"error: the workflow's folder, {SCRIPTS.parents[1]}, has spaces or signs in its name that a "
        "shell would not take as they are; rename it, or start Snakemake inside it"
    )
sys.path.insert(0, str(SCRIPTS.resolve()))

from ppcl.configuration import config as configuration
from ppcl.configuration import preflight
from ppcl.errors import UserError, trouble
from ppcl.provenance import code_digest
from ppcl.runtime import collector
from ppcl.settings import Settings

collector.work()

# Jobs use the Python that runs Snakemake, activated or not, unless conda brings its own (--sdm
# conda); of progress bars, which go to the logs too, one line now and then is enough.
OWN_PYTHON = DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method
PATHS = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH" if OWN_PYTHON else ""
shell.prefix(
    f"set -euo pipefail; source {SCRIPTS}/job.sh; export TQDM_MININTERVAL=10 {PATHS}; ".replace(
        "{", "{{"
    ).replace("}", "}}")
)

ENVIRONMENT = "../../environment.yml"
# Targets as they were called before.
OLD_TARGETS = {"plan": "forecast", "allot": "assign_shards"}


def targets():
    """Which of the workflow's own targets the command line names; empty for the default one.

    Snakemake parses rules before it knows its targets (workflow.dag_settings is still None), so
    the arguments are all there is to look at.
    """
    return {"all", "interval_plots", "train_teacher", "ablation", "forecast"} & set(sys.argv[1:])


def refuse(problem):
    """Ends Snakemake with one line; a WorkflowError would begin with a line number of this file."""
    sys.exit(f"error: {problem}")


def validate():
    """Complete the config with its defaults; check it against schema, teacher and prompts."""
    source = ", ".join(map(os.path.relpath, workflow.configfiles)) or "--config"
    for old in OLD_TARGETS.keys() & set(sys.argv[1:]):
        refuse(f"the target {old} is called {OLD_TARGETS[old]} now")
    try:
        configuration.refuse_surprises(map(os.path.relpath, workflow.configfiles))
        config.update(configuration.complete(config, source))
        if workflow.is_main_process:
            preflight.check_results(config["run"], source)
        # The teacher may be missing where it is about to be made, or where only figures are drawn
        # or a forecast is made.
        if (
            workflow.is_main_process
            and targets() not in ({"train_teacher"}, {"forecast"})
            and not interval_plots_only()
        ):
            preflight.check(settings(), source)
        settings()  # now, as a report adds to the config what is no key of it
    except UserError as error:
        refuse(error)
    except OSError as error:  # such as a folder that you may not look into
        if (problem := trouble(error)) is None:
            raise
        refuse(f"{source}: {problem}")


@functools.cache
def settings():
    """The completed config as typed sections."""
    return Settings.of(config)


def result(path):
    """A path below the folder of this run."""
    return f"results/{config['run']}/{path}"


def program(name):
    """A program of workflow/scripts."""
    return str(SCRIPTS / name)


def code(name):
    """Digest of a program and of the modules that it uses, for params."""
    return code_digest(SCRIPTS / name)
