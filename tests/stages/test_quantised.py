"""Quantised variants of stock classes, and their stage; on CUDA, bitsandbytes, too."""

import json
import subprocess
import sys

import pytest

from ppcl.storage import texts
from support import ROOT, SCRIPTS, pruned, quantised
from support.dry_runs import counts, settings_of_jobs


def needs(*packages):
    """Skips a test without packages that it needs."""
    missing = [name for name in packages if not (quantised.place() / name).is_dir()]
    return pytest.mark.skipif(bool(missing), reason=f"make test installs {', '.join(missing)}")


CUDA = "import sys, torch; sys.exit(not torch.cuda.is_available())"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    script = ROOT / "tests/support/quantised.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("quantised")],
        env=quantised.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs("torchao", "bitsandbytes")
@pytest.mark.parametrize("case", quantised.CASES)
def test_a_quantised_model_is_as_small_as_foretold_and_loads_to_the_bit(made, case):
    one, (specimen, _, method) = made[case], quantised.CASES[case]
    assert one["same"] and one["parameters"][0] == one["parameters"][1]
    assert "diffusion_pytorch_model.safetensors" in one["files"]
    assert all(name.endswith((".json", ".py", ".safetensors")) for name in one["files"])
    # The last projection of FLUX has the name of one in each block, which bitsandbytes can't tell.
    assert one["others"] == (["proj_out"] if case == "flux nf4" else [])
    if method == "nf4":  # with each matrix a text, at most as long as is counted for it
        assert one["inventory"] - 128 * one["matrices"] <= one["stored"] <= one["inventory"]
    else:
        assert one["stored"] == one["inventory"]
    assert one["stored"] < 0.65 * one["before"]
    if specimen is None:
        assert 0 < one["error"] < (0.06 if method == "nf4" else 0.01)


def stage(folder, teacher, calls, method="int8", device="cpu"):
    """Runs quantise.py on a pruned folder of a teacher."""
    if not (folder / "models/half").exists():
        pruned.folder(folder / "models/half", merged=[(1, 3)], teacher=teacher)
    variants = [{"name": "half", "budget": 0.5}, {"name": "less", "of": "half", "quantise": method}]
    settings = {"seed": 0, "device": device, "teacher": {"path": str(teacher)}}
    options = {
        "config": json.dumps(settings | {"variants": variants}),
        "variant": "less",
        "calls": calls,
        "model": folder / "models/half",
        "output": folder / "models/less",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return subprocess.run(
        [sys.executable, SCRIPTS / "quantise.py", *words],
        env=quantised.environment(),
        capture_output=True,
        text=True,
    )


@needs("torchao")
def test_the_stage_writes_a_folder_that_diffusers_alone_loads(tmp_path, tiny_teacher, tiny_calls):
    """With the reload gate: a process that knows nothing but diffusers and torchao."""
    done = stage(tmp_path, tiny_teacher, tiny_calls)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is an Enum" not in done.stderr and "Failed to load" not in done.stderr
    card = texts.read_sealed(tmp_path / "models/less/pruning.json")
    assert (card["quantised"], card["of"], card["package"]) == ("int8", "half", "torchao 0.18.0")
    config = json.loads((tmp_path / "models/less/transformer/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    before, after = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "models/half", tmp_path / "models/less")
    )
    assert {path.name for path in after - before} == {"pruning.json"} and before <= after
    assert [path.name for path in (tmp_path / "models").iterdir() if path.name[0] == "."] == []

    # The folder as it is now has a card, and is not what was written if a byte of it is another.
    weights = tmp_path / "models/less/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "models/half").rename(tmp_path / "models/first")
    (tmp_path / "models/less").rename(tmp_path / "models/half")
    done = stage(tmp_path, tiny_teacher, tiny_calls)
    assert done.returncode == 2 and "model.safetensors is not what was written" in done.stderr


@needs("bitsandbytes")
@pytest.mark.parametrize("method", ["nf4", "bnb-int8"])
def test_bitsandbytes_stage_runs_on_cuda_and_is_refused_elsewhere(
    tmp_path, tiny_teacher, tiny_calls, method
):
    there = subprocess.run([sys.executable, "-c", CUDA]).returncode == 0
    done = stage(tmp_path, tiny_teacher, tiny_calls, method, "cuda" if there else "auto")
    if there:
        assert done.returncode == 0, done.stderr[-3000:]
        card = texts.read_sealed(tmp_path / "models/less/pruning.json")
        assert card["quantised"] == method
    else:
        assert done.returncode == 2 and f"quantise: {method} needs CUDA" in done.stderr
        assert not (tmp_path / "models/less").exists()


@needs("torchao", "bitsandbytes")
def test_a_copy_is_a_job_of_its_own_and_changes_nothing_of_the_others(snakemake):
    variables = {"PYTHONPATH": str(quantised.place())}
    copy = {"name": "p70-int8", "of": "p70", "quantise": "int8"}
    own = [{"name": "p50", "budget": 0.5}, {"name": "p70", "budget": 0.7}]
    before = settings_of_jobs(snakemake("-n", "-F", "-p", variants=own))
    printed = snakemake("-n", "-F", "-p", variants=[*own, copy], variables=variables)
    after, jobs = settings_of_jobs(printed), counts(printed)
    assert (jobs["assemble"], jobs["quantise"]) == (2, 1)
    assert {name for name in before if before[name] != after[name]} <= {
        "plot_training",
        "plot_quality",
    }
    names = [variant["name"] for variant in after["quantise p70-int8"]["variants"]]
    assert names == ["p70", "p70-int8"]
    (line,) = [line for line in printed.splitlines() if "scripts/evaluate.py --" in line]
    assert "results/digits/models/p70-int8" in line
    # One with a budget is quantised as it is assembled.
    own[0]["quantise"] = "int8"
    jobs = counts(snakemake("-n", "-F", variants=own, variables=variables))
    assert jobs["assemble"] == 2 and "quantise" not in jobs
    own[0]["quantise"] = "nf4"
    said = snakemake("-n", "-F", variants=own, variables=variables, code=1)
    assert "'p50' is quantised by bitsandbytes, which diffusers runs on CUDA" in said
    assert "forecast" in counts(snakemake("-n", "-F", "forecast", variants=own))


@needs("bitsandbytes")
def test_what_runs_on_cuda_alone_is_refused_only_where_it_is_made(snakemake):
    """And a fine-tuned variant does not train again for another one that is quantised."""
    tuned = {"name": "p50", "budget": 0.5, "finetune_steps": 2}
    both = [tuned, {"name": "less", "of": "p50", "quantise": "nf4"}]
    weights = "results/digits/finetune/p50.safetensors"
    here = {"variables": {"PYTHONPATH": str(quantised.place())}}
    options = ("-n", "-F", "-p", weights)
    before = settings_of_jobs(snakemake(*options, variants=[tuned]))
    after = settings_of_jobs(
        snakemake(*options, "results/digits/models/p50", variants=both, **here)
    )
    assert before["finetune p50"] == after["finetune p50"] and "assemble p50" in after
    said = snakemake(*options, "results/digits/cards/p50", variants=both, code=1, **here)
    assert "'less' is quantised by bitsandbytes, which diffusers runs on CUDA" in said
