"""What began with one teacher does not go on with another that was put in its place."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.errors import UserError
from ppcl.evaluation import model_folders
from ppcl.settings import TeacherSettings
from ppcl.teacher import pipelines, recording, teacher_identity
from ppcl.transformer import calls
from support import SCRIPTS, tiny
from support.hub_cache import NAME, put

CPU = torch.device("cpu")


@pytest.fixture
def teacher(tiny_teacher, tmp_path) -> TeacherSettings:
    """The `teacher` section for a folder whose transformer lies elsewhere, behind a link."""
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    shutil.move(tmp_path / "teacher/transformer", tmp_path / "elsewhere")
    (tmp_path / "teacher/transformer").symlink_to("../elsewhere")
    return tiny.source(tmp_path / "teacher")


def age(path: Path) -> None:
    """As if it had been written long before, and put here with its times kept."""
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns - 10**12))


def train(path: Path) -> None:
    """Other weights in a file of the same size and time."""
    seen, held = path.stat(), load_file(path)
    save_file({name: tensor + 1 for name, tensor in held.items()}, path, {"format": "pt"})
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert path.stat().st_size == seen.st_size


def folder(teacher: TeacherSettings) -> Path:
    return Path(teacher.path)


CHANGES = {
    "weights behind a link": lambda at: age(at.parent / "elsewhere" / WEIGHTS),
    "weights of the same size and time": lambda at: train(at / "vae" / WEIGHTS),
    "a file of another size": lambda at: (at / "vae/config.json").write_text("{}"),
    "a file more": lambda at: (at / "tokenizer/more.json").write_text("{}"),
    "a file less": lambda at: (at / "tokenizer/tokenizer_config.json").unlink(),
    "code": lambda at: (at / "pipeline.py").write_text(""),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_teacher_has_another_fingerprint(teacher, change):
    before = teacher_identity.fingerprint(teacher)
    assert teacher_identity.fingerprint(teacher) == before
    change(folder(teacher))
    assert teacher_identity.fingerprint(teacher) != before


def test_a_link_that_moves_is_another_teacher(teacher, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("teacher")
    by_link = teacher.replace(path=str(link))
    before = teacher_identity.fingerprint(by_link)
    assert before == teacher_identity.fingerprint(teacher)  # wherever it lies
    shutil.copytree(tmp_path / "teacher", tmp_path / "other")
    age(tmp_path / "other/transformer" / WEIGHTS)
    link.unlink()
    link.symlink_to("other")
    assert teacher_identity.fingerprint(by_link) != before


def test_what_is_no_part_of_a_teacher_does_not_count(teacher):
    before = teacher_identity.fingerprint(teacher)
    at = folder(teacher)
    for name in (".snakemake_timestamp", "vae/.cache", "notes.txt", "samples/0.png"):
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text("")
    (at / "vae/here").symlink_to(".")  # leads in a circle
    assert teacher_identity.fingerprint(teacher) == before


def test_later_stages_load_the_recorded_teacher_or_none(teacher, tmp_path):
    recorded = tiny.record(folder(teacher), tmp_path / "calls.parquet", tiny.CALIBRATION[:2])
    noted = calls.Reader(recorded).provenance
    source = teacher_identity.recorded(teacher, noted)
    pipelines.load_transformer(source, CPU)
    age(folder(teacher) / "vae" / WEIGHTS)
    with pytest.raises(UserError, match="teacher was changed since its calls were recorded"):
        teacher_identity.recorded(teacher, noted)
    # Changed only then, while it was read.
    for load in (pipelines.load_transformer, pipelines.load):
        with pytest.raises(UserError, match="was changed since its calls were recorded"):
            load(source, CPU)
    assert teacher_identity.recorded(teacher, {}) == teacher


def test_a_teacher_whose_scheduler_was_changed_by_the_config_is_refused(teacher):
    source = teacher.replace(scheduler={"shift": 3.0, "base_shift": 1})
    noted = teacher_identity.note(teacher_identity.resolved(source))
    same = teacher.replace(scheduler={"base_shift": 1, "shift": 3.0})
    assert teacher_identity.recorded(same, noted).scheduler == source.scheduler
    for other in ({}, {"shift": 3.0}, {"shift": 2.0, "base_shift": 1}):
        with pytest.raises(UserError, match=r"^teacher\.scheduler: it is .*\"shift\": 3\.0"):
            teacher_identity.recorded(teacher.replace(scheduler=other), noted)
    with pytest.raises(UserError, match=r"^teacher\.scheduler: .* was \{\} when"):
        teacher_identity.recorded(source, teacher_identity.note(teacher_identity.resolved(teacher)))


def test_a_variant_is_not_taken_for_the_teacher(teacher, tmp_path):
    """Evaluation loads both with one section's keys."""
    shutil.copytree(folder(teacher), tmp_path / "p50")
    source = teacher_identity.resolved(teacher)
    age(tmp_path / "p50/vae" / WEIGHTS)
    of_teacher, variant = model_folders.models(source, [tmp_path / "p50"])
    assert of_teacher.digest() != variant.digest()
    of_teacher.transformer(CPU), variant.transformer(CPU)


def test_record_refuses_a_teacher_that_changes_meanwhile(teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a red 1 on blue\na blue 2 on red\n")
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": {"path": teacher.path},
        "pipeline": {"height": 32, "width": 32, "num_inference_steps": 1},
        "record": {"prompts": str(tmp_path / "p.txt"), "samples": 2, "renoised_per_sample": 0},
    }
    paths = {"calls": tmp_path / "calls.parquet", "state": tmp_path / "state"}
    paths["block_facts"] = tmp_path / "block-facts.parquet"
    plain = recording.record_batch
    monkeypatch.setattr("ppcl.export.assembly.prove", lambda *_: None)  # test_assembly has it

    def replaced(*arguments, **more):
        age(folder(teacher) / "text_encoder/model.safetensors")
        return plain(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(recording, "record_batch", replaced)
        with pytest.raises(SystemExit):
            tiny.stage("record", settings, **paths)
    assert "was changed since its calls were recorded, or began to" in capsys.readouterr().err
    assert not paths["calls"].exists()
    tiny.stage("record", settings, **paths)
    noted = calls.Reader(paths["calls"]).provenance
    assert noted["teacher_fingerprint"] == teacher_identity.fingerprint(teacher)


@pytest.mark.parametrize("name", sorted(SCRIPTS.glob("*.py")), ids=lambda p: p.stem)
def test_every_stage_after_record_loads_the_recorded_teacher(name):
    program = name.read_text()
    # remap_lora loads the pruned model that its user names; finetune refuses what another teacher
    # encoded (teacher_identity.refuse_other).
    others = ("record", "encode", "remap_lora")
    if re.search(r"pipelines\.load|evaluation\.models\(", program) and name.stem not in others:
        assert "teacher_identity.recorded(" in program
        assert not re.search(r"(load|load_transformer|models)\(\s*settings\.teacher\b", program)


# ---- names on the Hub


def test_a_branch_that_moves_leads_to_the_recorded_commit(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    put(tiny_teacher, tmp_path / "hub")
    first = teacher_identity.resolved(tiny.source(NAME))
    assert re.fullmatch("[0-9]{40}", first.revision)
    repository = tmp_path / f"hub/models--{NAME.replace('/', '--')}"
    other = tiny.pipeline(repository / "snapshots" / ("f" * 40), blocks=2)
    (repository / "refs/main").write_text(other.name)
    assert teacher_identity.resolved(tiny.source(NAME)).revision == other.name
    later = teacher_identity.recorded(tiny.source(NAME), teacher_identity.note(first))
    assert len(pipelines.load_transformer(later, CPU).transformer_blocks) == 5
    with pytest.raises(UserError, match="was changed"):  # a folder now, of the same name
        teacher_identity.recorded(tiny.source(tiny_teacher), teacher_identity.note(first))
