"""A step of distillation against its floor, and against the loop that one would write first."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import material, measuring
from benchmarks.material import Size
from benchmarks.measuring import Ratio
from ppcl.digits import teacher as parts_of_pipelines
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock
from ppcl.settings import DistillSettings
from ppcl.training import distillation, loop, losses, optimizers, teaching
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context

NAME = "distill"
OPTIONS = DistillSettings.of(
    {
        "loss": "normalised",
        "relative_weight": 0.5,
        "outliers": 0.0,
        "mode": "independent",
        "gradient_checkpointing": False,
        "linear_weight": 1.0,
    }
)
HOW = loop.Optimisation(steps=1000, lr=1e-4, clip_norm=1.0)


def intervals(blocks_: int, count: int) -> list[NewBlock]:
    """`count` intervals of two blocks side by side, the last of which ends a block before the
    last: so there is something that the teacher need not run."""
    if 2 * count > blocks_ - 1:
        raise ValueError(f"{count} intervals need more than {blocks_} blocks")
    return [NewBlock(2 * i, 2 * i + 1) for i in range(count)]


class Steps:
    """Training steps of the library's loop, one at a time."""

    def __init__(self, teacher: nn.Module, taught: Students, reader: calls.Reader, batch: int):
        self.teacher, self.taught = teacher, taught
        self.accelerator = Accelerator(cpu=True)
        self.modules = {part.name: student for part, student in taught.items()}
        self.losses = distillation.independent(
            Context(teacher, reader, 0, self.accelerator), taught, OPTIONS.replace(batch_size=batch)
        )
        every = [p for m in taught.values() for p in m.parameters()]
        groups = [{"params": every, "scale": 1.0}]
        self.optimizer = optimizers.adamw("adamw", groups, HOW.lr, HOW.betas, HOW.weight_decay)
        self.number = 0

    def step(self) -> None:
        """The next one; all batches are of one shape."""
        loop._one_step(
            self.number, self.modules, self.losses, HOW, self.accelerator, self.optimizer, {}
        )
        self.number += 1


def teach(size: Size, path: Path, count: int) -> tuple[Steps, dict]:
    """The loop for `count` intervals, and the arguments of the batch that it draws first."""
    teacher, reader = material.transformer(size), calls.Reader(path)
    taught = students.start(teacher, intervals(size.blocks, count), "first")
    drawn = reader.draw(reader.rows(heldout=False), size.batch, (0, 0))
    return Steps(teacher, taught, reader, size.batch), reader.batch(drawn).arguments


# ---- the floor


def floor_pieces(steps: Steps, arguments: dict) -> dict:
    """What a step can't do without, each to be run alone: name -> function.

    The teacher up to the last block needed, and per student one forward and one backward, from a
    gradient that is there already. `optimizer` is no part of the issue's floor: it says how much
    of the distance the weights' update is.
    """
    teacher, taught = steps.teacher, steps.taught
    lessons = teaching.teacher_states(teacher, list(taught), arguments)
    last = blocks.block_sequence(teacher)[max(part.last for part in taught)]
    graphs: dict[NewBlock, tuple] = {}

    @torch.no_grad()
    def forward_teacher():
        with blocks.watch([last], stop_after=last.index) as run:
            run(teacher, arguments)

    def forward(part):
        graphs[part] = taught[part](**lessons[part].bound)

    def backward(part):
        outputs = graphs.pop(part)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    def update():
        steps.optimizer.step()
        steps.optimizer.zero_grad(set_to_none=True)

    found = {"teacher": forward_teacher}
    for part in taught:
        found[f"forward {part.name}"] = lambda part=part: forward(part)
        found[f"backward {part.name}"] = lambda part=part: backward(part)
    return found | {"optimizer": update}


def floor(size: Size, folder: Path) -> list[Ratio]:
    """Seconds of a step over the sum of its pieces'."""
    path = material.record(folder / "calls.parquet", size, size.rows)
    steps, arguments = teach(size, path, most(size))
    pieces = floor_pieces(steps, arguments)
    # In this order: a backward needs its forward's graph, the update the backwards' gradients.
    times = measuring.interleaved({"step": steps.step} | pieces, size.repeats)
    seconds = {name: measuring.least(values) for name, values in times.items()}
    step, update = seconds.pop("step"), seconds.pop("optimizer")
    spent = sum(seconds.values())
    note = f"{len(steps.taught)} students; the floor has no optimizer, which takes {update:.3g} s"
    return [
        Ratio(NAME, "seconds of a step / floor", step, spent, "s", 1.10, note=note),
        Ratio(NAME, "the same, optimizer in the floor", step, spent + update, "s", 1.10),
    ]


# ---- memory


def memory(size: Size, folder: Path) -> list[Ratio]:
    """Bytes of tensors of a step beside the teacher and all students' states."""
    path = material.record(folder / "calls.parquet", size, size.rows)
    many = most(size)
    found = {count: _step_bytes(size, path, count) for count in (1, many)}
    one, all_ = found[1], found[many]
    mib = 2**20
    held = (all_["teacher"] + all_["states"]) / mib
    whole, floor_ = held + all_["beside"] / mib, held + all_["graph"] / mib
    return [
        Ratio(
            NAME,
            "peak / teacher + one graph + states",
            whole,
            floor_,
            "MiB",
            1.10,
            note=f"{many} students",
        ),
        Ratio(
            NAME,
            f"activations and graphs alone, {many} / 1 students",
            all_["alone"] / mib,
            one["alone"] / mib,
            "MiB",
            note="gradients are dropped; the teacher's streams wait for each student's turn",
        ),
    ]


def _step_bytes(size: Size, path: Path, count: int) -> dict[str, int]:
    """Of a step of `count` students: the teacher, the states, one student's graph alone, what the
    step needs beside teacher and states, and what it needs if no gradient is kept: at the peak not
    all gradients are there yet, and activations may take their place."""
    steps, arguments = teach(size, path, count)
    steps.step()  # makes the moments
    weights = sum(tensors_of(student) for student in steps.taught.values())
    beside = measuring.torch_peak(steps.step) - weights  # whose gradients are states
    part, student = next(iter(steps.taught.items()))
    lesson = teaching.teacher_states(steps.teacher, [part], arguments)[part]

    def one():
        outputs = student(**lesson.bound)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    every = [p for module in steps.taught.values() for p in module.parameters()]
    for parameter in every:
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    graph, alone = measuring.torch_peak(one), measuring.torch_peak(steps.step)
    return {
        "teacher": tensors_of(steps.teacher),
        "states": 4 * weights,  # weights, gradients, two moments
        "graph": graph,
        "beside": beside,
        "alone": alone,
    }


def tensors_of(module: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(p.nbytes for p in module.parameters())


def most(size: Size) -> int:
    """The greatest number of intervals that `intervals` makes of a depth."""
    return (size.blocks - 1) // 2


# ---- the naive loop


class Tokens:
    """As much of a tokenizer as a text encoder's config asks for."""

    eos_token_id, pad_token_id = 0, 1

    def __len__(self) -> int:
        return 600


class NaiveSteps:
    """Eq. 6 as one would write it first: from picture and prompt, through all of the teacher, to
    one sum of losses, and one backward through every student's graph."""

    def __init__(self, size: Size, steps: Steps, arguments: dict):
        self.steps, self.arguments = steps, arguments
        # Beside a transformer of `blocks` blocks, an encoder as Qwen2.5-VL is beside Qwen-Image.
        layers = max(1, size.blocks // 2)
        encoder = parts_of_pipelines.make_text_encoder(Tokens(), size.width, layers)
        vae = parts_of_pipelines.make_vae(32, material.Z_DIM)
        self.encoder, self.vae = encoder.eval(), vae.eval()
        batch = len(arguments["timestep"])
        self.ids = torch.randint(
            2, 600, (batch, parts_of_pipelines.PREFIX_TOKENS + size.text_tokens)
        )
        self.pictures = torch.rand(batch, 3, 1, 8 * size.side, 8 * size.side)

    def step(self) -> None:
        steps, kept = self.steps, {}
        with torch.no_grad():
            self.encoder(input_ids=self.ids, output_hidden_states=True)
            self.vae.encode(self.pictures)

            def keep(index):
                def hook(_module, args, kwargs, returned):
                    kept[index] = kwargs, returned

                return hook

            sequence = steps.teacher.transformer_blocks
            handles = [
                b.register_forward_hook(keep(i), with_kwargs=True) for i, b in enumerate(sequence)
            ]
            steps.teacher(**self.arguments)
            for handle in handles:
                handle.remove()
        mask = self.arguments["encoder_hidden_states_mask"].bool()
        total = 0
        for part, student in steps.taught.items():
            text, image = student(**kept[part.first][0])
            wanted_text, wanted_image = kept[part.last][1]
            total = total + losses.normalised_error(text, wanted_text, mask)
            total = total + losses.normalised_error(image, wanted_image)
        total.backward()
        for student in steps.taught.values():
            nn.utils.clip_grad_norm_(student.parameters(), HOW.clip_norm)
        steps.optimizer.step()
        steps.optimizer.zero_grad(set_to_none=True)


def naive(size: Size, folder: Path) -> list[Ratio]:
    """Seconds and memory of the naive loop's step over ours: both reported, no bar."""
    path = material.record(folder / "calls.parquet", size, size.rows)
    # Half of the depth: a job that needs the teacher only so far.
    steps, arguments = teach(size, path, max(1, most(size) // 2))
    other = NaiveSteps(size, steps, arguments)
    runs = {"ours": steps.step, "naive": other.step}
    times = measuring.interleaved(runs, size.repeats)
    seconds = {name: measuring.least(values) for name, values in times.items()}
    mib = {name: measuring.torch_peak(run) / 2**20 for name, run in runs.items()}
    frozen = (tensors_of(other.encoder) + tensors_of(other.vae)) / 2**20
    held = (tensors_of(steps.teacher) + 3 * sum(map(tensors_of, steps.taught.values()))) / 2**20
    note = f"{len(steps.taught)} students in the first half of the depth"
    return [
        Ratio(
            NAME, "naive loop / ours, seconds", seconds["naive"], seconds["ours"], "s", note=note
        ),
        Ratio(
            NAME,
            "naive loop / ours, tensors at the peak",
            held + frozen + mib["naive"],
            held + mib["ours"],
            "MiB",
            note="with all weights and states; " + note,
        ),
        Ratio(
            NAME,
            "naive loop / ours, activations and graphs",
            mib["naive"],
            mib["ours"],
            "MiB",
            note="gradients included; " + note,
        ),
    ]
