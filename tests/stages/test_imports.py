"""What a program imports costs its job seconds before it begins: none imports more than it uses."""

import os
import subprocess
import sys

import pytest

from support import SCRIPTS

FIGURES = {"matplotlib", "skimage"}
JUDGE = {"sklearn"}  # of digits alone
MODELS = {"accelerate", "diffusers", "peft", "transformers"}
TORCH = MODELS | {"torch"}
COMPILER = {"torch._inductor.compile_fx"}  # of its package, diffusers imports another part
DISTRIBUTIONS = {"scipy.stats._stats_py"}  # of scipy.stats, which is put off
OTHER = {"matplotlib", *JUDGE, *COMPILER, *DISTRIBUTIONS}

# By program: modules that it does without. Those of OTHER go with all that load a transformer.
WITHOUT = {
    "ablate": COMPILER | {"matplotlib"},
    "assign_shards": MODELS - {"accelerate"} | OTHER,
    "benchmark_pictures": COMPILER | JUDGE | {"matplotlib"},
    "assemble": OTHER | {"skimage"},
    "calibrate": COMPILER | {"matplotlib"},
    "choose": OTHER | {"skimage"},
    "describe": TORCH | JUDGE | {"skimage"},
    "distill": OTHER | {"skimage"},
    "encode": OTHER | {"skimage"},
    "evaluate": COMPILER | JUDGE | {"matplotlib"},
    "extract": OTHER | {"skimage"},
    "finetune": OTHER | {"skimage"},
    "forget": TORCH | FIGURES | {"numpy", "pandas", "pyarrow"},
    "gather_ablation": TORCH | JUDGE | {"skimage"},
    "gather_metrics": TORCH | JUDGE | {"matplotlib"},
    "init": TORCH | FIGURES | {"pandas", "scipy"},
    "intervals": TORCH | OTHER | {"skimage"},
    "join_shards": MODELS | OTHER | {"skimage", "scipy"},
    "latency": OTHER,
    "launch": TORCH | FIGURES | {"numpy", "pandas", "pyarrow"},
    "narrow": OTHER | {"skimage"},
    "pareto": OTHER,
    "forecast": OTHER | {"skimage"},
    "plot": TORCH | JUDGE | {"skimage"},
    "probe": MODELS | OTHER | {"skimage", "scipy"},
    "prune": OTHER | {"skimage"},
    "quantise": OTHER,
    "record": OTHER | {"skimage"},
    "remap_controlnet": OTHER | {"skimage"},
    "remap_ip_adapter": OTHER | {"skimage"},
    "remap_lora": OTHER | {"skimage"},
    "sensitivity": OTHER | {"skimage"},
    "similarity": MODELS | OTHER | {"skimage", "scipy"},
    "subsets": OTHER | {"skimage"},
    "to_single_file": OTHER | {"skimage"},
    "train_teacher": COMPILER | {"matplotlib", "skimage"},
    "width": OTHER | {"skimage"},
}


def imported(program: str) -> set[str]:
    """What is imported when a program has read its arguments, by Python's own account."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPTS / f"{program}.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def test_every_program_is_in_the_table():
    assert WITHOUT.keys() == {path.stem for path in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("program", WITHOUT)
def test_a_program_imports_no_more_than_it_uses(program):
    modules = imported(program)
    assert "argparse" in modules  # Python did write the account
    assert sorted(WITHOUT[program] & modules) == []


def test_the_collector_rests_while_libraries_are_imported_and_then_works_as_ever():
    program = """
import gc
usual = gc.get_threshold()
from ppcl import program
from ppcl.runtime import collector
assert gc.get_threshold() == (collector.STARTING, 1, 1)
def main():
    assert gc.get_threshold() == usual and gc.isenabled() and gc.get_freeze_count() > 1000
    kept = gc.get_freeze_count()
    program.run(lambda: None)
    assert gc.get_freeze_count() <= kept  # made since is no start-up's
program.run(main)
"""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


LIBRARIES = "from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline"
USES = [
    "import scipy.stats; assert scipy.stats.norm.cdf(0) == 0.5",
    "import scipy.stats as stats; assert stats.norm.cdf(0) == 0.5",
    "from scipy import stats; assert stats.norm.cdf(0) == 0.5",
    "from scipy.stats import norm; assert norm.cdf(0) == 0.5",
    "import scipy.stats.qmc; assert scipy.stats.qmc.Sobol and scipy.stats.norm.cdf(0) == 0.5",
    "import pickle, scipy.stats as s; assert pickle.loads(pickle.dumps(s.norm.cdf))(0) == 0.5",
    "import scipy.stats\ntry: scipy.stats.nothing\nexcept AttributeError: pass\nelse: assert False",
]


@pytest.mark.parametrize("use", USES)
def test_what_is_put_off_is_there_when_it_is_used(use):
    program = f"""
import sys
import ppcl
{LIBRARIES}
import inspect
inspect.getmodule(sys._getframe())  # looks at the file of every module
assert "scipy.stats" in sys.modules and "scipy.stats._stats_py" not in sys.modules
{use}
assert "scipy.stats._stats_py" in sys.modules
import scipy.stats
assert type(scipy.stats).__name__ == "module" and sys.modules["scipy.stats"] is scipy.stats
"""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_what_is_not_installed_is_not_put_off():
    program = """
import sys
import ppcl
sys.path = []
try:
    import scipy.stats
except ModuleNotFoundError as error:
    assert error.name == "scipy"
else:
    raise AssertionError
"""
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
