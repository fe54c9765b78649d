"""Choosing students for a budget, and folders that stock diffusers must load."""

import copy
import json
import runpy
import subprocess

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import nn

from ppcl.errors import UserError
from ppcl.export import assembly, rehearsal
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.settings import Settings
from ppcl.storage import texts
from ppcl.transformer import blocks, calls
from support import tiny


def test_an_unknown_variant_is_named():
    settings = Settings.of({"variants": [{"name": "p55"}, {"name": "p70"}]})
    assert assembly.variant(settings, "p70") is settings.variants[1]
    with pytest.raises(UserError, match=r"--variant: .* no variant 'p7'; it has p55, p70"):
        assembly.variant(settings, "p7")


# ---- folders


@pytest.fixture(scope="module")
def call(tiny_calls):
    reader = calls.Reader(tiny_calls)
    return reader.batch(reader.buckets[0][:2]).arguments


@pytest.fixture
def pruned(tiny_teacher):
    """The pipeline, and its transformer with a student in place of blocks 1-3."""
    pipe = tiny.load(tiny_teacher)
    student = tiny.transformer(blocks=1, seed=5).transformer_blocks[0]
    model, block_map = blocks.assembled(pipe.transformer, {(1, 3): student})
    return pipe, model.eval(), block_map


@pytest.fixture
def gate_inside(monkeypatch):
    """Runs the reload gate in this process: a fresh one takes seconds, and one test has it."""

    def run(command, **_options):
        if command[0] == "git":  # provenance asks for the commit
            return subprocess.CompletedProcess(command, 1, "", "")
        _, isolated, gate, *arguments = command
        assert isolated == "-I"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [gate, *arguments])
            try:
                runpy.run_path(gate, run_name="__main__")
            except SystemExit as stopped:
                failed = stopped.code not in (None, 0)
                return subprocess.CompletedProcess(command, int(failed), "", str(stopped.code))
            except Exception as error:
                return subprocess.CompletedProcess(command, 1, "", repr(error))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assembly.subprocess, "run", run)


def test_export_loads_in_stock_diffusers(pruned, call, tmp_path):
    """With the reload gate in a process of its own."""
    pipe, model, block_map = pruned
    folder = tmp_path / "models" / "p70"
    assembly.export(
        assembly.TeacherPipeline(pipe), model, block_map, folder, {"variant": "p70"}, call
    )
    assert [f.name for f in folder.parent.iterdir()] == ["p70"]

    again = DiffusionPipeline.from_pretrained(folder)
    assert len(again.transformer.transformer_blocks) == again.transformer.config.num_layers == 3
    with torch.no_grad():
        assert torch.equal(again.transformer(**call)[0], model(**call)[0])
    again.set_progress_bar_config(disable=True)
    picture = again("red 1", **tiny.SETTINGS).images[0]
    assert picture.size == (32, 32)
    saved = json.loads((folder / "transformer" / "block_map.json").read_text())
    assert saved == [[0], [1, 2, 3], [4]]
    card = texts.read_sealed(folder / "pruning.json")
    assert card["variant"] == "p70" and "model_index.json" in card["files"]
    assert not list(folder.rglob(".*"))


def forget_depth(model):
    model.register_to_config(num_layers=5)


def too_shallow(model):
    model.register_to_config(num_layers=2)


def swap_a_module(model):
    block = model.transformer_blocks[1] = copy.deepcopy(model.transformer_blocks[1])
    block.img_mlp = nn.Linear(32, 32)


def lose_a_weight(model):
    block = model.transformer_blocks[0] = copy.deepcopy(model.transformer_blocks[0])
    block.attn.to_q.register_parameter("bias", None)


def change_what_no_weight_shows(model):
    model.pos_embed = QwenEmbedRope(theta=7, axes_dim=[8, 12, 12], scale_rope=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (forget_depth, "missing_keys|transformer_blocks.3"),
        (too_shallow, "unexpected_keys|transformer_blocks.2"),
        (swap_a_module, "img_mlp"),
        (lose_a_weight, "to_q.bias"),
        (change_what_no_weight_shows, "answers differ by"),
    ],
)
def test_the_gate_refuses_and_nothing_is_left(pruned, call, tmp_path, gate_inside, damage, message):
    pipe, model, block_map = pruned
    damage(model)
    with torch.no_grad():
        model(**call)  # in memory it runs
    folder = tmp_path / "models" / "p70"
    folder.mkdir(parents=True)
    (folder / "earlier").touch()
    with pytest.raises(
        UserError, match=rf"p70.* does not reload as it was written(.|\n)*({message})"
    ):
        assembly.export(assembly.TeacherPipeline(pipe), model, block_map, folder, {}, call)
    assert [f.name for f in folder.parent.iterdir()] == ["p70"]
    assert [f.name for f in folder.iterdir()] == ["earlier"]  # what was there stays


def test_the_gate_passes_a_right_model_in_bfloat16(pruned, call, tmp_path, gate_inside):
    pipe, model, block_map = pruned
    model = model.to(torch.bfloat16)
    low = {
        k: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }
    assembly.export(assembly.TeacherPipeline(pipe), model, block_map, tmp_path / "p70", {}, low)
    assert (tmp_path / "p70" / "model_index.json").exists()


def test_the_gate_compares_every_weight(pruned, call, tmp_path, gate_inside):
    """In bfloat16 answers tell little: here one weight is off by its last bit."""
    pipe, model, _ = pruned
    model = model.to(torch.bfloat16)
    low = {
        k: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }
    pipe.register_modules(transformer=model)
    pipe.save_pretrained(tmp_path / "p70")
    assembly.prove(tmp_path / "p70", model, low)
    weight = model.transformer_blocks[1].attn.to_q.weight
    weight.data[0, 0] += torch.finfo(torch.bfloat16).eps * weight.data[0, 0].abs()
    with pytest.raises(
        UserError, match=r"weights differ: transformer_blocks\.1\.attn\.to_q\.weight"
    ):
        assembly.prove(tmp_path / "p70", model, low)


# ---- the rehearsal


def rehearse(pipe, folder, call, done):
    rehearsal.rehearse(pipe, pipe.transformer, tiny.source(folder), call, done)


def test_a_teacher_is_exported_before_anything_is_trained(
    tiny_teacher, call, tmp_path, gate_inside, monkeypatch
):
    """Its first and last block, once; nothing is kept, and what was loaded stays as it was."""
    pipe, prove, seen = tiny.load(tiny_teacher), assembly.prove, []
    before = dict(pipe.components)

    def look(folder, model, *more):
        prove(folder, model, *more)
        kept = [b.attn.to_q.weight for b in model.transformer_blocks]
        every = pipe.transformer.transformer_blocks
        assert torch.equal(kept[0], every[0].attn.to_q.weight)
        assert torch.equal(kept[1], every[4].attn.to_q.weight) and len(kept) == 2
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        assert {path.parent.name for path in links} == {"text_encoder"}
        seen.append(json.loads((folder / "transformer/block_map.json").read_text()))

    monkeypatch.setattr(assembly, "prove", look)
    for _ in range(2):
        rehearse(pipe, tiny_teacher, call, tmp_path / "state" / "done")
    assert seen == [[[0, 1, 2, 3], [4]]]
    assert not list((tmp_path / "state" / "done").iterdir())
    assert pipe.components == before and pipe.config.text_encoder[0] == "transformers"
    assert len(pipe.transformer.transformer_blocks) == pipe.transformer.config.num_layers == 5


def test_a_teacher_that_would_not_load_again_is_refused_at_once(
    tiny_teacher, call, tmp_path, gate_inside
):
    pipe = tiny.load(tiny_teacher)
    change_what_no_weight_shows(pipe.transformer)
    with pytest.raises(UserError, match=r"teacher\.path: .* can't be exported(.|\n)*differ by"):
        rehearse(pipe, tiny_teacher, call, tmp_path / "done")

    class Unsaved:
        pass

    pipe = tiny.load(tiny_teacher)
    pipe.register_modules(scheduler=Unsaved())
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    with pytest.raises(UserError, match=r"teacher\.path: .* can't be exported"):
        rehearse(pipe, tmp_path, call, tmp_path / "done")
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]


def test_a_class_that_needs_more_than_two_blocks_is_rehearsed_whole(
    tiny_teacher, call, monkeypatch
):
    transformer, answer = tiny.load(tiny_teacher).transformer, blocks.answer

    def picky(model, given):
        if len(model.transformer_blocks) < 3:
            raise IndexError("no middle block")
        return answer(model, given)

    monkeypatch.setattr(blocks, "answer", picky)
    model, block_map = rehearsal._shortest(transformer, call)
    assert block_map == [[index] for index in range(5)]
    assert torch.equal(answer(model, call), answer(transformer, call))


# ---- the program


def test_assemble_counts_and_maps(tiny_teacher, tiny_calls, tmp_path, gate_inside):
    """The program, from a hand-made student."""
    teacher = tiny.load(tiny_teacher).transformer
    unit = Unit((NewBlock(3, 4),))
    made = students.start(teacher, unit.new_blocks, "first")
    students.save(tmp_path / "students.safetensors", made, {})
    size = blocks.parameter_count(teacher.transformer_blocks[0])
    total = blocks.parameter_count(teacher)
    entries = [selection_file.unit_entry(unit, size, float("nan"))]
    plan = {"transformer_parameters": total, "blocks": 5}
    plan |= {"units": entries, "distilled": entries, "closed": []}
    texts.write_sealed(tmp_path / "selection.json", plan)
    config = {
        "teacher": {"path": str(tiny_teacher)},
        "pipeline": {},
        "variants": [{"name": "p85", "budget": 1 - size / total}],
    }
    paths = {
        "variant": "p85",
        "calls": tiny_calls,
        "sets": tiny.chosen(tmp_path / "sets.json", tmp_path / "selection.json", "start", "p85"),
        "start": tmp_path / "students.safetensors",
        "output": tmp_path / "p85",
    }
    tiny.stage("assemble", config, **paths)
    card = json.loads((tmp_path / "p85" / "pruning.json").read_text())
    (entry,) = card["units"]
    assert entry["name"] == "03-04" and entry["source"] == "start" and card["ranks"] == []
    assert entry["new_blocks"] == json.loads(json.dumps(entries[0]["new_blocks"]))
    assert card["finetuned"] is False
    assert card["parameters"] == total - size
    assert card["parameter_fraction"] == pytest.approx(1 - size / total)
    made = DiffusionPipeline.from_pretrained(tmp_path / "p85").transformer
    assert blocks.parameter_count(made) == total - size
    stock = dict(teacher.named_parameters())
    for name, value in made.named_parameters():
        assert torch.equal(value, stock[name]), name  # a start of `first` is blocks 0-3
