"""Snakemake on this repository, and what its dry runs print."""

import json
import os
import re
import shlex
import subprocess
import sys

from support import ROOT, fresh

BIN = os.path.dirname(sys.executable)


def run(*command, code=0, **variables) -> str:
    """What a command prints, after it ended with the expected exit code."""
    words = [os.path.join(BIN, command[0]), *map(str, command[1:])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    if command[0] == "snakemake" and not variables:
        given = ["-m", *command]
        done = fresh.run(fresh.SNAKEMAKE, *given, cwd=ROOT, env=environment, merged=True)
    else:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(words, cwd=ROOT, env=environment, text=True, **both)
    assert done.returncode == code, done.stdout
    return done.stdout


def counts(printed: str) -> dict[str, int]:
    """Rule to number of jobs, from the statistics of a dry run."""
    statistics = printed.split("Job stats:")[1].split("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", statistics, re.M)}


def settings_of_jobs(printed: str) -> dict[str, dict]:
    """Program and variant to the config that its command carries, from a dry run with -p."""
    configs = {}
    for line in printed.splitlines():
        if "workflow/scripts/" in line and " --config '" in line:
            words = shlex.split(line.split(" 2>&1 |")[0])
            given = words[words.index("--config") + 1]
            helpers = ("launch.py", "forget.py")
            program = next(w for w in words if w.endswith(".py") and not w.endswith(helpers))
            name = os.path.basename(program).removesuffix(".py")
            if name == "plot":
                name += f"_{words[words.index(program) + 1]}"
            if "--variant" in words:
                name += f" {words[words.index('--variant') + 1]}"
            configs[name] = json.loads(given)
    return configs
