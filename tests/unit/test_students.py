"""Students: their start weights and their files."""

import copy

import pytest
import torch

from ppcl.errors import UserError
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import NewBlock
from ppcl.storage import tensors, texts

FIRST, SECOND = NewBlock(0, 1), NewBlock(3, 4)


# ---- start weights


@pytest.mark.parametrize(
    ("count", "average"),
    [(2, [1 / 2, 1 / 2]), (3, [1 / 4, 1 / 2, 1 / 4]), (4, [1 / 6, 1 / 3, 1 / 3, 1 / 6])],
)
def test_start_weights_in_closed_form(teacher, count, average):
    modules = list(teacher.transformer_blocks[1 : 1 + count])
    states = [module.state_dict() for module in modules]
    for how, weights in (
        ("first", [1, 0, 0, 0]),
        ("middle", {2: [1, 0], 3: [0, 1, 0], 4: [0, 1, 0, 0]}[count]),
        ("average", average),
    ):
        made = students.start_weights(modules, how)
        assert made.keys() == states[0].keys()
        for key, value in made.items():
            expected = sum(w * s[key].double() for w, s in zip(weights, states, strict=False))
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_students_are_copies_in_float32(teacher):
    low = copy.deepcopy(teacher).to(torch.bfloat16)
    made = students.start(low, [FIRST, NewBlock(2, 5)], "first")
    assert [interval.name for interval in made] == ["00-01", "02-05"]
    for interval, student in made.items():
        block = low.transformer_blocks[interval.first]
        assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())
        assert torch.equal(student.img_mod[1].weight.bfloat16(), block.img_mod[1].weight)
        with torch.no_grad():
            student.img_mod[1].weight.add_(1)
        assert not torch.equal(student.img_mod[1].weight.bfloat16(), block.img_mod[1].weight)
        assert not any(p.requires_grad for p in block.parameters())


# ---- files


def test_students_survive_their_file(teacher, tmp_path):
    path = tmp_path / "students.safetensors"
    made = students.start(teacher, [FIRST, SECOND], "average")
    students.save(path, made, {"by": "test"})
    back = students.load(path, teacher, [SECOND, FIRST])
    assert list(back) == [SECOND, FIRST]
    for interval, student in back.items():
        saved = made[interval].state_dict()
        assert all(torch.equal(v, saved[k]) for k, v in student.state_dict().items())
    assert tensors.read(path)[1] == {"by": "test"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_that_do_not_fit_are_refused(teacher, tmp_path):
    path = tmp_path / "students.safetensors"
    made = students.start(teacher, [FIRST], "first")
    students.save(path, made, {})
    with pytest.raises(UserError, match="students.safetensors does not fit block 03-04"):
        students.load(path, teacher, [SECOND])
    state, _ = tensors.read(path)
    name = "00-01/img_mod.1.bias"
    tensors.write(path, state | {name: state[name][:-1]}, {})
    with pytest.raises(UserError, match="does not fit block 00-01"):
        students.load(path, teacher, [FIRST])
    tensors.write(path, state | {name: state[name] * torch.nan}, {})
    with pytest.raises(UserError, match=f"'{name}' holds NaN"):
        students.load(path, teacher, [FIRST])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="students.safetensors is not a whole safetensors file"):
        students.load(path, teacher, [FIRST])


@pytest.mark.parametrize("content", [{}, {"units": [{"name": "00-01"}]}, {"blocks": 3}])
def test_a_broken_plan_is_named(tmp_path, content):
    path = tmp_path / "selection.json"
    with pytest.raises(
        UserError, match=r"selection\.json can't be read.*run the stage that writes it"
    ):
        selection_file.read(path)
    texts.write_sealed(path, content)
    with pytest.raises(UserError, match=r"selection\.json is not a whole selection"):
        selection_file.read(path)
    path.write_text("[]")
    with pytest.raises(
        UserError, match=r"selection\.json is not what was written; delete it and rerun"
    ):
        selection_file.read(path)
