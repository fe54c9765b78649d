"""Students, the modules of a selection's new blocks: their start weights, dtypes and file."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.pruning import narrow
from ppcl.pruning.units import NewBlock
from ppcl.storage import tensors
from ppcl.transformer import blocks, diffusers_model

Students = dict[NewBlock, nn.Module]


def start_weights(modules: list[nn.Module], how: str) -> dict[str, Tensor]:
    """Start weights of the student of an interval, as a float32 state dict.

    Args:
        modules: the interval's teacher blocks, in order.
        how: `first` (block u, PPCL), `middle` (block floor((u+v)/2), PPCL's published script), or
            `average`: weights that fall linearly with the distance from the middle (Amber-Image,
            arXiv 2602.17047). `solved` begins as `first`; `solved.start` does the rest.
    """
    states = [m.state_dict() for m in modules]
    count = len(states)
    if how in ("first", "solved"):
        weights = [1.0] + [0.0] * (count - 1)
    elif how == "middle":
        weights = [float(i == (count - 1) // 2) for i in range(count)]
    else:
        raw = [1 - abs(i - (count - 1) / 2) / ((count + 1) / 2) for i in range(count)]
        weights = [w / sum(raw) for w in raw]
    return {
        key: sum(w * s[key].float() for w, s in zip(weights, states, strict=True) if w)
        for key in states[0]
    }


def start(transformer: nn.Module, new_blocks: Iterable[NewBlock], how: str) -> Students:
    """A student for each new block, with its start weights; float32, on the CPU.

    They are whole blocks, as the teacher's. `linear_map_fits.narrowed` makes narrow ones, whose
    linear maps are fitted to activations.

    Args:
        how: as in `start_weights`.
    """
    sequence = blocks.block_sequence(transformer)
    students = {}
    for new_block in new_blocks:
        modules = [sequence[i].module for i in range(new_block.first, new_block.last + 1)]
        student = copy.deepcopy(modules[0]).float().cpu().requires_grad_(True)
        student.load_state_dict(start_weights(modules, how))
        students[new_block] = student
    return students


def whole(transformer: nn.Module, new_blocks: Iterable[NewBlock], distilled: Students) -> Students:
    """A whole block for each new block: its distilled student, or else a float32 copy, on the CPU,
    of the teacher's block."""
    trained = {new_block.ends: student for new_block, student in distilled.items()}
    kept = start(
        transformer,
        [new_block for new_block in new_blocks if new_block.ends not in trained],
        "first",
    )
    return {
        new_block: trained[new_block.ends] if new_block.ends in trained else kept[new_block]
        for new_block in new_blocks
    }


def uncut(wholes: Students) -> Students:
    """Frozen copies of the whole students of intervals that will borrow their text. The text input
    of the attention in such a copy is what the student's linear map is fitted to (Eq. 8)."""
    return {
        new_block: copy.deepcopy(student).requires_grad_(False)
        for new_block, student in wholes.items()
        if new_block.borrows and new_block.last > new_block.first
    }


def shaped(transformer: nn.Module, new_block: NewBlock, student: nn.Module) -> nn.Module:
    """Makes a whole student as narrow as its new block; the new linear maps are zero. In place."""
    if new_block.narrow:
        layout = blocks.block_sequence(transformer)[new_block.first].list.layout()
        role = {} if new_block.text == "own" else {"text": new_block.text}
        narrow.narrow(student, layout, {"linear_ffn": list(new_block.linear_ffn)} | role)
    return student


def as_teacher(transformer: nn.Module, new_block: NewBlock, student: nn.Module) -> nn.Module:
    """Gives a student the dtypes that it has in an assembled model, in place: a weight gets the
    dtype of the teacher's weight of the same name, a new one the dtype in which diffusers loads it.
    Some classes keep norms or tables in float32."""
    cast(student, _types_in_model(transformer, new_block, student))
    return student


def plugged(
    transformer: nn.Module, students: Students
) -> tuple[nn.Module, Students, list[list[int]]]:
    """A variant's model, as its export holds it: the teacher with students in place of its blocks.

    Students that do not have the dtypes of `as_teacher` yet are copied, and not changed.

    Returns:
        The model, the students in it (copies where they were copied), and the block map of
        `blocks.assembled`.
    """
    held = {}
    for new_block, student in students.items():
        wanted = _types_in_model(transformer, new_block, student)
        fits = types(student) == wanted
        held[new_block] = student if fits else cast(copy.deepcopy(student), wanted)
    model, block_map = blocks.assembled(
        transformer, {new_block.ends: m for new_block, m in held.items()}
    )
    return model, held, block_map


def types(module: nn.Module) -> dict[str, torch.dtype]:
    """Name -> dtype, of a module's floating-point parameters and buffers."""
    return {name: tensor.dtype for name, tensor in _floats(module)}


def cast(module: nn.Module, wanted: Mapping[str, torch.dtype]) -> nn.Module:
    """Changes a module's dtypes, in place.

    Args:
        wanted: name -> dtype, for all that `types` names.
    """
    for name, tensor in _floats(module):
        tensor.data = tensor.data.to(wanted[name])
    return module


def _types_in_model(
    transformer: nn.Module, new_block: NewBlock, student: nn.Module
) -> dict[str, torch.dtype]:
    like = types(blocks.block_sequence(transformer)[new_block.first].module)
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    wanted: dict[str, torch.dtype] = {}
    own: torch.dtype | None = None
    for name in types(student):
        if name in like:
            wanted[name] = like[name]
        elif kept & set(name.split(".")):
            wanted[name] = torch.float32
        else:
            own = (
                own or diffusers_model.of(transformer).dtype
            )  # asked once, since `dtype` searches all modules
            wanted[name] = own
    return wanted


def _floats(module: nn.Module) -> list[tuple[str, Tensor]]:
    every = (*module.named_parameters(), *module.named_buffers())
    return [(name, tensor) for name, tensor in every if tensor.is_floating_point()]


def save(path: Path, students: Students, metadata: dict[str, str]) -> None:
    """Writes all students to one safetensors file, as `<new block>/<parameter>`, such as
    `03-05/attn.to_q.weight`."""
    state = {f"{p.name}/{k}": v for p, m in students.items() for k, v in m.state_dict().items()}
    tensors.write(path, state, metadata)


def load(path: Path, transformer: nn.Module, new_blocks: Iterable[NewBlock]) -> Students:
    """Reads students; float32, on the CPU, trainable, each as narrow as its new block.

    Raises:
        UserError: the file lacks a new block, or holds other shapes, NaN or infinity.
    """
    state, _ = tensors.read(path)
    sequence, students = blocks.block_sequence(transformer), {}
    for new_block in new_blocks:
        whole = copy.deepcopy(sequence[new_block.first].module).float().cpu()
        student = shaped(transformer, new_block, whole).requires_grad_(True)
        own = {
            k.split("/", 1)[1]: v for k, v in state.items() if k.startswith(new_block.name + "/")
        }
        try:
            student.load_state_dict(own)
        except RuntimeError as error:
            raise UserError(
                f"{path} does not fit block {new_block.name} of this selection and teacher; "
                f"delete it and rerun. {error}"
            ) from error
        for key, value in own.items():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{path}: '{new_block.name}/{key}' holds NaN or infinity; delete it"
                )
        students[new_block] = student
    return students
