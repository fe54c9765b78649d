"""SIGTERM to real processes: a checkpoint, exit code 75, and the result of an uninterrupted run."""

import importlib
import os
import signal
import subprocess
import sys
import time

import launch
import pytest

from ppcl.evaluation import generation
from ppcl.runtime import stopping
from ppcl.storage import schemas, tables, tensors, texts
from ppcl.teacher import steps
from ppcl.transformer import calls
from support import SCRIPTS, fresh, tiny
from support.killing import TRAINING, assert_same_log, distill_paths, equal, finetune_paths

# Sends itself SIGTERM at the start of a step that is neither logged nor kept otherwise.
WARNED = """
import os, runpy, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from ppcl.training import loop
step = loop._one_step
def warned(number, *rest):
    if number == 2 and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    step(number, *rest)
loop._one_step = warned
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(program, settings, paths, processes=1, python=sys.executable):
    """Of a stage that several processes share."""
    words = [python, SCRIPTS / "launch.py", "--processes", processes, "--threads", "2"]
    words += ["--device", "cpu", SCRIPTS / f"{program}.py", *tiny.options(settings, paths)]
    return [str(word) for word in words]


def warn_and_resume(program, settings, paths):
    """Runs a program that is warned in its third step, and then to its end in this process."""
    script = str(SCRIPTS / f"{program}.py")
    done = fresh.run(fresh.MODELS, "-c", WARNED, script, *tiny.options(settings, paths))
    assert done.returncode == stopping.EXIT_CODE == 75, done.stderr
    assert "SIGTERM: stopped after step 3" in done.stderr and "Traceback" not in done.stderr
    assert [file.name for file in paths["state"].iterdir()] == ["checkpoint.safetensors"]
    about = tensors.read(paths["state"] / "checkpoint.safetensors")[1]
    assert (about["step"], about["unlogged"]) == ("3", "1")
    assert not paths["output"].exists()
    tiny.stage(program, settings, **paths)


@pytest.mark.parametrize("program", ["distill", "narrow", "subsets"])
def test_a_warned_training_ends_with_the_same_students(world, distilled, program):
    settings = world[1] | {"width": {"schedule": "staged", "steps": 6}}
    start = {} if program == "distill" else {"students": distilled["output"]}
    whole, paths = (
        distill_paths(world, f"{program}-{name}") | start for name in ("whole", "warned")
    )
    tiny.stage(program, settings, **whole)
    warn_and_resume(program, settings, paths)
    assert equal(paths["output"], whole["output"])
    schema = schemas.VELOCITY_LOG if program == "subsets" else schemas.DISTILL_LOG
    assert_same_log(paths["log_table"], whole["log_table"], schema)
    one, other = (tables.read(each["unit_costs"]).to_pandas() for each in (whole, paths))
    assert one.equals(other)


@pytest.mark.parametrize(
    ("moment", "step", "errors"),
    [
        ("training.checkpoints.Checkpoint.save", 3, 0),
        ("training.prices.Judged.error", 6, 1),
        ("loading", 0, 0),
    ],
)
def test_a_warning_at_any_other_moment_loses_nothing(
    world,
    distilled,
    monkeypatch,
    moment,
    step,
    errors,
):
    """While a checkpoint is written, between the errors at the end, and as nothing is there yet."""
    paths, calls = distill_paths(world, f"warned-{moment}"), []
    place = "teacher.pipelines.load_transformer" if moment == "loading" else moment
    package, module, *owners, name = place.split(".")
    owner = importlib.import_module(f"ppcl.{package}.{module}")
    for part in owners:
        owner = getattr(owner, part)
    own = getattr(owner, name)

    def warned(*given, **more):
        calls.append(1)
        if len(calls) == 1 + errors:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, warned)
        with pytest.raises(SystemExit) as stopped:
            tiny.stage("distill", world[1], **paths)
    assert stopped.value.code == stopping.EXIT_CODE and not paths["output"].exists()
    if step:
        about = tensors.read(paths["state"] / "checkpoint.safetensors")[1]
        assert about["step"] == str(step)
    kept = paths["state"] / "errors" / "0.json"
    assert (len(texts.read_sealed(kept)["errors"]) if kept.exists() else 0) == errors
    tiny.stage("distill", world[1], **paths)
    assert equal(paths["output"], distilled["output"])
    one, other = (tables.read(each["unit_costs"]).to_pandas() for each in (distilled, paths))
    assert one.equals(other)


def test_a_warned_finetune_ends_with_the_same_weights(world, distilled):
    whole, paths = (finetune_paths(world, distilled, name) for name in ("p70-whole", "p70-warned"))
    tiny.stage("finetune", world[1], **whole)
    warn_and_resume("finetune", world[1], paths)
    assert equal(paths["output"], whole["output"])
    assert_same_log(paths["log_table"], whole["log_table"], schemas.VELOCITY_LOG)


def test_several_processes_stop_at_one_step(world, tmp_path):
    """Only the second of two is warned; resumed, they end as an undisturbed two do."""
    wrapped = tmp_path / "warned.py"
    script = str(SCRIPTS / "distill.py")
    wrapped.write_text(WARNED.replace("sys.argv = sys.argv[1:]", f"sys.argv[0] = {script!r}"))
    whole, paths = (distill_paths(world, f"two-{name}") for name in ("whole", "warned"))
    python = fresh.python(fresh.MODELS)
    run = command("distill", world[1], paths, 2, python)
    warned = [str(wrapped) if word == script else word for word in run]
    assert subprocess.run(warned).returncode == stopping.EXIT_CODE
    about = tensors.read(paths["state"] / "checkpoint.safetensors")[1]
    assert (about["step"], about["unlogged"]) == ("3", "1")
    subprocess.run(run, check=True)
    subprocess.run(command("distill", world[1], whole, 2, python), check=True)
    assert equal(paths["output"], whole["output"])
    assert_same_log(paths["log_table"], whole["log_table"], schemas.DISTILL_LOG)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher_passes_on_signal_and_code(world, processes):
    many = TRAINING | {"steps": 100_000, "heldout_rows": 4, "checkpoint_every": 20}
    paths = distill_paths(world, f"launched-{processes}")
    python = fresh.python(fresh.MODELS)  # nothing here is about what happens during imports
    started = subprocess.Popen(
        command("distill", world[1] | {"distill": many}, paths, processes, python),
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = paths["state"] / "checkpoint.safetensors"
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        printed = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert time.monotonic() - began < 30
    assert started.returncode == stopping.EXIT_CODE, printed
    assert printed.count("SIGTERM: stopped after step ") == processes
    assert int(tensors.read(checkpoint)[1]["step"]) > 0


def test_a_warning_before_the_program_can_handle_it_is_not_lost(world):
    paths = distill_paths(world, "early")
    started = subprocess.Popen(command("distill", world[1], paths), stderr=subprocess.DEVNULL)
    with open(f"/proc/{started.pid}/cmdline", "rb") as file:
        # Until it has become the program itself; while it does it has no arguments at all.
        while b"launch.py" in (shown := file.read()) or not shown:
            time.sleep(0.01)
            file.seek(0)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == stopping.EXIT_CODE
    assert not paths["output"].exists()


def test_a_warned_record_keeps_finished_batches_and_ends_within_one(
    tiny_teacher, tmp_path, monkeypatch
):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(tiny.CALIBRATION[:2]))
    options = {"prompts": str(prompts), "samples": 2, "batch_size": 1, "renoised_per_sample": 0}
    settings = {"seed": 0, "device": "cpu", "teacher": {"path": str(tiny_teacher)}}
    settings |= {"pipeline": tiny.SETTINGS, "record": options | {"heldout_fraction": 0.5}}
    paths = {"calls": tmp_path / "calls.parquet", "state": tmp_path / "state"}
    paths["block_facts"] = tmp_path / "block-facts.parquet"
    taken, own = [], steps.taken

    def warned(*given):
        taken.append(1)
        if len(taken) == 1 + tiny.SETTINGS["num_inference_steps"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*given)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "taken", warned)
        with pytest.raises(SystemExit) as stopped:
            tiny.stage("record", settings, **paths)
    assert stopped.value.code == stopping.EXIT_CODE
    assert len(taken) == 1 + tiny.SETTINGS["num_inference_steps"]  # the first of the second batch
    assert [file.name for file in paths["state"].glob("*/*.parquet")] == ["00000.parquet"]
    assert not paths["calls"].exists()
    taken.clear()
    monkeypatch.setattr(steps, "taken", lambda *given: (taken.append(1), own(*given))[1])
    tiny.stage("record", settings, **paths)
    assert len(taken) == tiny.SETTINGS["num_inference_steps"]  # of the batch that was lost
    assert len(calls.Reader(paths["calls"])) == 12


def test_a_warned_worker_ends_while_it_makes_pictures(tmp_path, monkeypatch):
    def warned(*_given, **_more):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setattr(generation, "_pipeline", lambda *_: None)
    monkeypatch.setattr(generation.pipelines, "run", warned)
    item = {"prompt": "a", "seed": 0, "prompt_index": 0}
    with stopping.heeded(), pytest.raises(SystemExit):
        generation.generate(None, None, {}, [item], tmp_path / "part.parquet")
    assert not any(tmp_path.iterdir())


def test_a_part_is_finished_and_the_end_is_left_alone():
    done = []
    with stopping.heeded():
        with pytest.raises(SystemExit) as stopped, stopping.part():
            os.kill(os.getpid(), signal.SIGTERM)
            with stopping.part():
                done.append("inner")
            done.append("outer")
        assert stopped.value.code == stopping.EXIT_CODE and done == ["inner", "outer"]
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        stopping.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("state put away")
    assert len(done) == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


LATE = f"""
import atexit, os, signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from ppcl import program
from ppcl.runtime import stopping
def warned():
    os.kill(os.getpid(), signal.SIGTERM)
def main():
    if "outputs" in sys.argv:
        stopping.ignore()
        warned()
    if "early" in sys.argv:
        warned()
atexit.register(warned)
program.run(main)
"""


@pytest.mark.parametrize(
    ("moment", "code"), [("outputs", 0), ("done", 0), ("early", stopping.EXIT_CODE)]
)
def test_a_warning_after_the_outputs_changes_no_exit_code(moment, code):
    """Nor does a second one, while the interpreter is on its way out."""
    assert subprocess.run([sys.executable, "-c", LATE, moment]).returncode == code


@pytest.mark.parametrize(
    ("ends", "warned", "code"),
    [
        ((0, 0), False, 0),
        ((0, 0), True, 0),
        ((0, stopping.EXIT_CODE), True, stopping.EXIT_CODE),
        ((0, 3), False, 3),
        ((0, -9), False, 1),
    ],
)
def test_the_launcher_ends_as_its_processes_do_whatever_came_meanwhile(ends, warned, code):
    with stopping.heeded():
        stopping.ignore()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the processes, as it does
        started = [
            subprocess.Popen(
                ["sh", "-c", f"exit {end}" if end >= 0 else f"kill {end} $$"], close_fds=True
            )
            for end in ends
        ]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if warned:
            os.kill(os.getpid(), signal.SIGTERM)
        assert launch._wait(started) == code


def test_the_launcher_heeds_a_warning_before_it_has_started_anything(tmp_path):
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 15)\n")
    # torch says how many GPUs there are, where there may be some.
    program = "import launch; launch.gpus.possible = lambda: True; launch.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--threads", "2", "--processes", "auto", "no.py"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SCRIPTS}"},
    )
    assert done.returncode == stopping.EXIT_CODE


def test_the_launcher_imports_no_torch_to_count_the_cores_of_a_machine_without_gpu(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    (tmp_path / "program.py").write_text("print('ran')")
    program = "import launch; launch.gpus.possible = lambda: False; launch.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "--threads", "1", tmp_path / "program.py"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SCRIPTS}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_processes_are_warned_when_their_launcher_is_killed(tmp_path):
    """Or they would train on beside those of the next run."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "if os.environ['RANK'] == '1':\n"  # the last to be started
        "    os.kill(os.getppid(), signal.SIGKILL)\n"
        "came = bool(signal.sigtimedwait([signal.SIGTERM], 60))\n"  # it is blocked until heeded
        "os.write(1, f'{came}\\n'.encode())\n"  # at once: unbuffered, print writes its line in two
    )
    given = ["--threads", "2", "--device", "cpu", "--processes", "2", program]
    command = [sys.executable, SCRIPTS / "launch.py", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "True\nTrue\n")


def test_a_warning_as_the_launcher_ends_changes_no_exit_code(monkeypatch):
    def together(*_) -> int:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return 0

    monkeypatch.setattr(launch, "together", together)
    given = ["--threads", "2", "--device", "cpu", "--processes", "2", "program.py"]
    monkeypatch.setattr(sys, "argv", ["launch.py", *given])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with stopping.heeded():
        with pytest.raises(SystemExit) as ended:
            launch.main()
        os.kill(os.getpid(), signal.SIGTERM)
        # Python takes its own handlers back before it is gone, and leaves this.
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert ended.value.code == 0
