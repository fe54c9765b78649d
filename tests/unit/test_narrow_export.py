"""Folders of models with narrow blocks: with their own code, they load in diffusers alone."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel

from ppcl.errors import UserError
from ppcl.export import assembly
from ppcl.pruning import narrow, pruned_class
from ppcl.teacher import pipelines
from ppcl.transformer import blocks, registry
from support import fresh, tiny

SPECS = {
    0: {"linear_ffn": ["image", "text"]},
    1: {"text": "source"},
    2: {"text": "borrow", "linear_ffn": ["image"]},
    3: {"text": "close"},
}
CLASS = QwenImageTransformer2DModel
MODULE = pruned_class.module_name(CLASS, registry.family_of(CLASS.__name__).layouts())
CODE = f"transformer/{MODULE}.py"


def narrowed(transformer):
    """With a text run in blocks 1-3, and with all new maps drawn at random."""
    made = {}
    for index, spec in SPECS.items():
        block = blocks.block_sequence(transformer)[index]
        made[index, index] = narrow.narrow(copy.deepcopy(block.module), block.list.layout(), spec)
        for linear in narrow.maps(made[index, index]).values():
            torch.nn.init.normal_(linear.weight, std=0.2)
    return blocks.assembled(transformer, made)


@pytest.fixture(scope="module")
def call():
    return tiny.arguments((5, 3))


@pytest.fixture(autouse=True, scope="module")
def forks():
    """The reload gate runs in forks: a process that imports everything anew takes seconds, and
    test_assembly.py has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", fresh.python(fresh.MODELS))
        yield


@pytest.fixture(scope="module")
def exported(tiny_teacher, call, tmp_path_factory):
    """A folder that went through the reload gate in a fresh process, and the model in memory."""
    pipe = tiny.load(tiny_teacher)
    torch.manual_seed(0)
    model, block_map = narrowed(pipe.transformer)
    model.requires_grad_(False).eval()
    folder = tmp_path_factory.mktemp("narrow") / "p50"
    assembly.export(
        assembly.TeacherPipeline(pipe), model, block_map, folder, {"variant": "p50"}, call
    )
    return folder, model


pytestmark = pytest.mark.usefixtures("modules")


@torch.no_grad()
def answer(transformer, call):
    return transformer(**call)[0]


def trusting(folder):
    return tiny.source(folder).replace(trust_remote_code=True)


def test_the_folder_has_its_code_and_nothing_else_changed(exported, tiny_teacher):
    folder, _ = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == [MODULE, "PrunedQwenImageTransformer2DModel"]
    before = json.loads((tiny_teacher / "model_index.json").read_text())
    assert {k: v for k, v in index.items() if k != "transformer" and k[0] != "_"} == {
        k: v for k, v in before.items() if k != "transformer" and k[0] != "_"
    }
    assert json.loads((folder / "transformer" / "block_map.json").read_text()) == [
        [0],
        [1],
        [2],
        [3],
        [4],
    ]
    assert "ppcl." not in (folder / CODE).read_text().replace("ppcl.pruning.narrow", "")
    assert "import ppcl" not in (folder / CODE).read_text()
    assert not list(folder.rglob(".*"))


def test_it_loads_with_trust_and_answers_to_the_bit(exported, call):
    folder, model = exported
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(answer(pipe.transformer, call), answer(model, call))
    assert {type(b).__name__ for b in pipe.transformer.transformer_blocks} == {
        "QwenImageTransformerBlock"
    }
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red 1", **tiny.SETTINGS).images[0].size == (32, 32)
    compiled = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(answer(compiled, call), answer(model, call), atol=1e-5)


def test_without_trust_diffusers_refuses(exported):
    with pytest.raises(ValueError, match=rf"{MODULE}\.py(.|\n)*trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(exported[0])


def test_the_workflow_loads_it_when_the_caller_trusts_it(exported, call, tmp_path):
    folder, model = exported
    device = torch.device("cpu")
    pipe = pipelines.load(trusting(folder), device)
    assert torch.equal(answer(pipe.transformer, call), answer(model, call))
    alone = tmp_path / "alone"  # nothing but the transformer is there to be loaded
    alone.mkdir()
    shutil.copy(folder / "model_index.json", alone)
    shutil.copytree(folder / "transformer", alone / "transformer")
    transformer = pipelines.load_transformer(trusting(alone), device)
    assert torch.equal(answer(transformer, call), answer(model, call))
    assert not transformer.training
    assert not any(p.requires_grad for p in transformer.parameters())
    with pytest.raises(UserError, match=r"p50 can't be loaded(.|\n)*trust_remote_code=True"):
        pipelines.load(tiny.source(folder), device)
    with pytest.raises(UserError, match="alone: .* set trust_remote_code: true"):
        pipelines.load_transformer(tiny.source(alone), device)
    (alone / CODE).unlink()
    with pytest.raises(UserError, match="alone/transformer can't be loaded"):
        pipelines.load_transformer(trusting(alone), device)


def test_saving_what_was_loaded_gives_the_same_folder(exported, call, tmp_path):
    """Loaded in a process without this package, saved there, then through the gate again."""
    folder, model = exported
    program = (
        "import sys, diffusers\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "pipe.save_pretrained(sys.argv[2])\n"
    )
    again = tmp_path / "again"
    fresh.run(fresh.MODELS, "-I", "-c", program, folder, again).check_returncode()
    assert (again / CODE).read_text() == (folder / CODE).read_text()
    for name in ("model_index.json", "transformer/config.json"):
        first, second = (json.loads((f / name).read_text()) for f in (folder, again))
        assert {k: v for k, v in first.items() if k != "_name_or_path"} == {
            k: v for k, v in second.items() if k != "_name_or_path"
        }
    assembly.prove(again, model, call)


def test_a_loaded_transformer_can_be_handed_on(exported, call):
    folder, model = exported
    transformer = pipelines.load_transformer(trusting(folder), torch.device("cpu"))
    pipe = DiffusionPipeline.from_pretrained(
        folder, transformer=transformer, trust_remote_code=True
    )
    assert pipe.transformer is transformer
    assert pipe.config.transformer[0] == MODULE
    assert torch.equal(answer(copy.deepcopy(transformer), call), answer(model, call))
    assert pickle.loads(pickle.dumps(type(transformer))) is type(transformer)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_mathematics(folder):
    edit(folder / CODE, "return x + self.linear(x)", "return x - self.linear(x)")


def no_code(folder):
    (folder / CODE).unlink()


def a_block_that_is_stock(folder):
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    del config["narrow_blocks"]["transformer_blocks.0"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_mathematics, rf"custom code in {MODULE}\.py"),  # which the gate does not run
        (no_code, MODULE),
        (a_block_that_is_stock, "transformer_blocks.0"),
    ],
)
def test_the_gate_refuses_a_tampered_export(exported, call, tmp_path, damage, message):
    folder, model = exported
    copied = tmp_path / "p50"
    shutil.copytree(folder, copied)
    damage(copied)
    with pytest.raises(UserError, match=rf"p50.* does not reload as it was(.|\n)*({message})"):
        assembly.prove(copied, model, call)


def test_a_model_without_narrow_blocks_stays_stock(tiny_teacher, call, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "prove", lambda *_: None)  # test_assembly has it
    pipe = tiny.load(tiny_teacher)
    model, block_map = blocks.assembled(
        pipe.transformer, {(1, 3): pipe.transformer.transformer_blocks[1]}
    )
    assembly.export(assembly.TeacherPipeline(pipe), model, block_map, tmp_path / "p70", {}, call)
    index = json.loads((tmp_path / "p70" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert not list((tmp_path / "p70").rglob("*.py"))
