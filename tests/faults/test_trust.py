"""Folders of strangers: their code runs only where it is trusted, and links lead nowhere."""

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from diffusers.utils import dynamic_modules_utils

from ppcl.configuration import preflight
from ppcl.errors import UserError
from ppcl.export import assembly, reload_gate
from ppcl.pruning import pruned_class
from ppcl.teacher import hub, pipelines, trust
from ppcl.transformer import blocks, registry
from support import tiny

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("modules")


@pytest.fixture
def teacher(tiny_teacher, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_teacher, tmp_path / "teacher")


@pytest.fixture
def gate(monkeypatch):
    """The reload gate in this process: a fresh one takes seconds."""

    def run(command, **_options):
        try:
            problems = reload_gate.check(*map(Path, command[-2:]))
        except Exception as error:
            problems = [repr(error)]
        return subprocess.CompletedProcess(command, len(problems), "\n".join(problems), "")

    monkeypatch.setattr(assembly.subprocess, "run", run)


def name_in(path, **changed):
    """Changes keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def export(teacher, folder, trusting=False):
    """As `assemble` does it, with two blocks less."""
    source = tiny.source(teacher).replace(trust_remote_code=trusting)
    pipe = pipelines.load(source, CPU, without=assembly.copied(teacher))
    model, block_map = blocks.assembled(
        pipe.transformer, {(1, 3): pipe.transformer.transformer_blocks[1]}
    )
    assembly.export(
        assembly.TeacherPipeline(pipe, source=teacher),
        model,
        block_map,
        folder,
        {},
        tiny.arguments(),
    )
    return folder


# ---- code


def brings_a_pipeline(teacher):
    name_in(teacher / hub.INDEX, _class_name=["evil", "Evil"])
    return "evil.py"


def brings_a_pipeline_by_no_name(_teacher):
    return "None.py"  # which diffusers looks for where no other pipeline is asked for


def brings_an_encoder(teacher):
    name_in(teacher / hub.INDEX, text_encoder=["evil", "Evil"])
    return "text_encoder/evil.py"


def brings_a_scheduler(teacher):
    name_in(teacher / hub.INDEX, scheduler=["scheduler", "Evil"])
    return "scheduler/scheduler.py"


def is_named_as_a_library(_teacher):
    return "transformer/diffusers.py"


def is_what_transformers_would_look_for(teacher):
    mapped = {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    name_in(teacher / "tokenizer/tokenizer_config.json", auto_map=mapped)
    name_in(teacher / "text_encoder/config.json", auto_map=mapped)
    name_in(teacher / hub.INDEX, tokenizer=["transformers", "AutoTokenizer"])
    write(teacher / "tokenizer/evil.py", "raise SystemExit('it ran')")
    return "text_encoder/evil.py"


def lies_about(_teacher):
    return "text_encoder/sub/evil.py"


@pytest.mark.parametrize(
    "bring",
    [
        brings_a_pipeline,
        brings_a_pipeline_by_no_name,
        brings_an_encoder,
        brings_a_scheduler,
        is_named_as_a_library,
        is_what_transformers_would_look_for,
        lies_about,
    ],
)
def test_code_neither_runs_nor_is_copied_without_trust(bring, teacher, tmp_path, gate):
    write(teacher / bring(teacher), "raise SystemExit('it ran')")
    folder = tmp_path / "p70"
    for attempt in (
        lambda: pipelines.load_transformer(tiny.source(teacher), CPU),
        lambda: pipelines.load(tiny.source(teacher), CPU),
        lambda: export(teacher, folder),
    ):
        try:
            attempt()
        except UserError:
            pass
    assert not folder.exists() or not trust.code_in(folder)


def test_the_gate_runs_no_code_that_it_is_not_told_of(teacher, gate):
    pipe = tiny.load(teacher)
    write(teacher / brings_an_encoder(teacher), "raise SystemExit('it ran')")
    with pytest.raises(UserError, match=r"custom code in evil\.py"):
        assembly.prove(teacher, pipe.transformer, tiny.arguments())


def test_code_that_is_trusted_goes_along(teacher, tmp_path, gate):
    """A pipeline's and a component's, with what it imports from beside it."""
    name_in(teacher / hub.INDEX, _class_name=["mine", "Mine"], vae=["my_vae", "MyVAE"])
    code = {
        "mine.py": "from .base import Base\n\n\nclass Mine(Base):\n    pass\n",
        "base.py": "from diffusers import QwenImagePipeline as Base\n",
        "vae/my_vae.py": "from diffusers import AutoencoderKLQwenImage\n\n\n"
        "class MyVAE(AutoencoderKLQwenImage):\n    pass\n",
    }
    for name, text in code.items():
        write(teacher / name, text)
    write(teacher / "spare.py", "raise SystemExit('it ran')")
    folder = export(teacher, tmp_path / "p70", trusting=True)
    assert {name: (folder / name).read_text() for name in trust.code_in(folder)} == code
    before, after = hub.read_index(teacher), hub.read_index(folder)
    assert {k: v for k, v in after.items() if k != "_diffusers_version"} == {
        k: v for k, v in before.items() if k != "_diffusers_version"
    }
    again = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert [type(again).__name__, type(again.vae).__name__] == ["Mine", "MyVAE"]
    with pytest.raises(UserError, match=r"mine\.py"):
        pipelines.load(tiny.source(folder), CPU)


def test_code_is_named_before_a_run(teacher):
    given = tiny.source(teacher)
    write(teacher / brings_a_pipeline(teacher), "")
    with pytest.raises(UserError, match=r"code of its own \(evil\.py\).*trust_remote_code: true"):
        preflight._check_teacher(given, "c.yaml")
    preflight._check_teacher(given.replace(trust_remote_code=True), "c.yaml")


def test_a_module_has_a_name_for_every_content(monkeypatch):
    of = QwenImageTransformer2DModel, registry.family_of("QwenImageTransformer2DModel").layouts()
    name = pruned_class.module_name(*of)
    assert name.startswith(pruned_class.MODULE) and name == pruned_class.module_name(*of)
    monkeypatch.setattr(pruned_class, "_TEXT", pruned_class._TEXT + "# another version")
    assert pruned_class.module_name(*of) != name


def place_of_code(sender):
    trust.own_modules()
    Path(dynamic_modules_utils.HF_MODULES_CACHE, "code.py").touch()
    sender.send(dynamic_modules_utils.HF_MODULES_CACHE)


def test_a_process_has_a_place_for_code_of_its_own():
    trust.own_modules()
    mine = dynamic_modules_utils.HF_MODULES_CACHE
    receiver, sender = multiprocessing.Pipe(duplex=False)
    other = multiprocessing.get_context("fork").Process(target=place_of_code, args=(sender,))
    other.start()
    theirs = receiver.recv()
    other.join()
    assert theirs != mine and os.path.isdir(mine) and not os.path.exists(theirs)


# ---- links


def leads_out(teacher, outside):
    path = teacher / "tokenizer/merges.txt"
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "secret.txt")
    return path


def is_a_linked_folder(teacher, outside):
    path = teacher / "text_encoder/more"
    path.symlink_to(outside)
    return path


def is_a_loop(teacher, _outside):
    path = teacher / "vae/again"
    path.symlink_to(teacher)
    return path


def is_a_pipe(teacher, _outside):
    path = teacher / "scheduler/notes.txt"
    os.mkfifo(path)
    return path


@pytest.fixture
def outside(tmp_path):
    write(tmp_path / "outside/secret.txt", "secret")
    return tmp_path / "outside"


def is_too_large(teacher, outside):
    path = teacher / "tokenizer/merges.txt"
    path.touch()
    os.truncate(path, hub.TEXT_LIMIT + 1)  # sparse
    return path


@pytest.mark.parametrize(
    "strange", [leads_out, is_a_linked_folder, is_a_loop, is_a_pipe, is_too_large]
)
def test_what_no_component_should_hold_is_named(strange, teacher, outside):
    path = strange(teacher, outside)
    for attempt in (
        lambda: preflight._check_teacher(tiny.source(teacher), "c.yaml"),
        lambda: pipelines.load(tiny.source(teacher), CPU),
    ):
        with pytest.raises(UserError, match=rf"teacher\.path: {path} is .*replace it"):
            attempt()


def test_a_component_that_is_a_loop_or_a_pipeline_is_refused(teacher):
    """Of a pipeline in the pipeline diffusers would load whatever there is, pickles too."""
    for attempt in (
        lambda: preflight._check_teacher(tiny.source(teacher), "c.yaml"),
        lambda: pipelines.load(tiny.source(teacher), CPU),
    ):
        write(teacher / "vae/model_index.json", '{"_class_name": "DDPMPipeline"}')
        with pytest.raises(UserError, match="the vae is a pipeline in the pipeline"):
            attempt()
        shutil.rmtree(teacher / "vae")
        (teacher / "vae").symlink_to("vae")
        with pytest.raises(UserError, match="vae is not there; restore the vae's folder"):
            attempt()
        (teacher / "vae").unlink()


def test_links_that_are_common_do_no_harm(teacher, tmp_path):
    """The files of the Hub's cache, a component elsewhere, weights elsewhere."""
    store = tmp_path / "store"
    shutil.move(teacher / "vae", store / "vae")
    (teacher / "vae").symlink_to(store / "vae")
    weights = next((teacher / "transformer").glob("*.safetensors"))
    shutil.move(weights, store / "weights")
    weights.symlink_to(store / "weights")
    hub.refuse_strange(teacher)
    cached = tmp_path / "models--a--b"
    blob, link = cached / "blobs/1", cached / "snapshots/abc/tokenizer/vocab.txt"
    for path in (blob, link, link.parents[1] / hub.INDEX):
        write(path, json.dumps({"tokenizer": ["transformers", "X"]}))
    link.unlink()
    link.symlink_to("../../../blobs/1")
    hub.refuse_strange(link.parents[1])
    assert hub.files(link.parents[1], "tokenizer") == ["tokenizer/vocab.txt"]
    assert not hub.leaves(link.parents[1], link)


@pytest.mark.parametrize("name", ["../pwn", "{}/pwn"])
def test_a_name_that_is_a_path_leads_nowhere(name, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "prove", lambda *_: None)
    name_in(teacher / hub.INDEX, **{name.format(tmp_path): ["transformers", "X"]})
    write(tmp_path / "pwn/config.json", "{}")
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(UserError):
        export(teacher, tmp_path / "a/b/p70")
    shutil.rmtree(tmp_path / "a/b/p70", ignore_errors=True)
    assert {*tmp_path.rglob("*")} - {*before} <= {tmp_path / "a", tmp_path / "a/b"}


def test_only_a_components_own_files_are_copied(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "prove", lambda *_: None)
    name_in(teacher / hub.INDEX, text_encoder_9=["transformers", "X"])
    write(teacher / "text_encoder_9/config.json", "{}")
    hidden = (".git/config.json", ".hidden.json", ".snakemake_timestamp", ".DS_Store")
    for odd in (*hidden, "evil.py", "x.bin", "x.so"):
        write(teacher / "text_encoder" / odd, "{}")
    before = sorted(tmp_path.iterdir())
    folder = export(teacher, tmp_path / "models/p70")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "models"])
    assert {path.name for path in folder.iterdir()} == {
        *("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
        *(hub.INDEX, assembly.CARD),
    }
    stock = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (folder / "text_encoder").iterdir()} <= stock
    (folder / ".snakemake_timestamp").touch()
    assert assembly._files(folder) == sorted(
        [*json.loads((folder / assembly.CARD).read_text())["files"], assembly.CARD]
    )
    assembly.verify(folder)


def test_an_encoder_that_is_elsewhere_is_saved_and_not_copied(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "prove", lambda *_: None)
    shutil.move(teacher / "text_encoder", tmp_path / "store")
    write(tmp_path / "store/private.json", "{}")
    (teacher / "text_encoder").symlink_to(tmp_path / "store")
    assert assembly.copied(teacher) == ()
    folder = export(teacher, tmp_path / "p70")
    assert (folder / "text_encoder/model.safetensors").is_file()
    assert not (folder / "text_encoder/private.json").exists()
    pipe = pipelines.load(tiny.source(teacher), CPU, without=("text_encoder",))
    pipe.save_pretrained(tmp_path / "less")
    with pytest.raises(UserError, match=r"text_encoder/\S+ leads to .* out of this folder"):
        assembly.copy_missing(teacher, tmp_path / "less", pipe)
