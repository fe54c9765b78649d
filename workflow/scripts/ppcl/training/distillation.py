"""How students are trained, and what each unit costs once it is plugged in.

Three trainings, made of the steps of steps.py: `independent` is the paper's (Eq. 6, every student
from the teacher's activations); `output_distillation` trains a whole model on the teacher's
recorded answers, as fine-tuning does; `any_subset` is output distillation of the teacher with a
random set of students in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from accelerate import Accelerator
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.settings import DistillSettings, SubsetsSettings, TrainingSettings
from ppcl.storage import schemas
from ppcl.training import prices, steps
from ppcl.training.input_cache import InputCache
from ppcl.transformer import blocks, calls, diffusers_model
from ppcl.transformer.context import Context, State


def log_table(rows: list[dict]) -> pd.DataFrame:
    """The log of `independent` as one row per step, new block and stream."""
    stream_rows = [
        {
            "step": row["step"],
            "interval": row["name"],
            "stream": stream,
            "loss_normalised": row[f"{stream}/normalised"],
            "loss_relative": row[f"{stream}/relative"],
            "loss_linear": row.get("linear", math.nan),
            "lr": row["lr"],
            "seconds": row["seconds"],
            "loss": row["loss"],
        }
        for row in rows
        for stream in sorted(key.split("/")[0] for key in row if key.endswith("/normalised"))
    ]
    return pd.DataFrame(stream_rows, columns=schemas.DISTILL_LOG.names)


def lr_scales(new_blocks: Iterable[NewBlock], kept: float, name: str = "{}/") -> dict[str, float]:
    """Factors on the learning rate of new blocks that stand for one block, for `loop.train`.

    Such a new block starts from the teacher's block and least-squares maps, near its optimum; the
    learning rate that an interval's student needs would drive it away from there.

    Args:
        kept: the factor, the config's width.lr_scale.
        name: prefix of a new block's parameter names, with {} for the block's name.
    """
    return {
        name.format(new_block.name): kept
        for new_block in new_blocks
        if new_block.first == new_block.last
    }


def share(rows, accelerator: Accelerator):
    """This process's part of a global batch; the batch is the same for any process count.

    Raises:
        UserError: there are fewer rows than processes.
    """
    if len(rows) < accelerator.num_processes:
        raise UserError(
            f"batch_size {len(rows)} is less than the number of training processes, "
            f"{accelerator.num_processes}; raise it, or lower the config key 'processes'"
        )
    return rows[accelerator.process_index :: accelerator.num_processes]


def batches_of_steps(context: Context, options: TrainingSettings) -> Callable[[int], calls.Batch]:
    """A function: step -> this process's part of the step's batch, on its device. The next step's
    part is read in the background.

    Args:
        options: batch_size, that of all processes together.
    """
    reader, device = context.reader, context.device
    rows = reader.rows(heldout=False)

    def make(step: int) -> calls.Batch:
        drawn = reader.draw(rows, options.batch_size, (context.seed, step))
        return reader.batch(share(drawn, context.accelerator)).pinned(device)

    ahead = calls.Ahead(make)
    return lambda step: ahead(step).to(device)


def independent(
    context: Context,
    students: Students,
    options: DistillSettings,
    names: Mapping[NewBlock, str] | None = None,
    inputs: InputCache | None = None,
    uncut: Students | None = None,
):
    """The losses of a step (`loop.Losses`) for all students: Eq. 6, and L_linear of those with
    linear maps.

    mode `independent` (Eq. 6): a student gets the teacher's activation before its interval, and
    never another student's output. One exception: a student that borrows text gets z_a from the
    source that it will have in the model, a student too; the teacher need have no block with this
    z_a. mode `sequential`, the ablation baseline: a student gets what the students before it make
    of the model's input; gradients stay within each student.

    students: the source of a text run comes before those that borrow from it.
    names: new block -> its name in the log, if not its own; students of overlapping units need it.
    inputs: cached streams from which the teacher starts, in mode `independent` alone.
    uncut: see `teaching.teacher_states`.
    """
    transformer, accelerator = context.transformer, context.accelerator
    batch_of = batches_of_steps(context, options)
    names = names or {new_block: new_block.name for new_block in students}

    def losses_of_step(step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        batch, running = batch_of(step), None
        if inputs:
            with accelerator.autocast():
                running = inputs.model(batch.numbers, batch.arguments)
        lessons = steps.lessons_of(
            transformer, students, batch.arguments, options, accelerator, running, uncut
        )
        every = steps.student_losses(transformer, students, lessons, batch, options, accelerator)
        for new_block, loss, metrics in every:
            yield names[new_block], loss, metrics

    return losses_of_step


def output_distillation(
    context: Context,
    model_at: Callable[[int], nn.Module],
    name: str,
    options: TrainingSettings,
    in_float32: bool,
):
    """The loss of a step (`loop.Losses`): relative velocity error against the recorded teacher.

    The teacher does not run: its answer to every recorded call is part of the record.

    Args:
        model_at: step -> the model that runs in it.
        name: what the trained module is called in the log.
        in_float32: the model is float32, whatever dtype the teacher's calls were recorded in.
    """
    batch_of, accelerator = batches_of_steps(context, options), context.accelerator

    def losses_of_step(step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        batch = batch_of(step)
        with accelerator.autocast():
            model = model_at(step)
        error = steps.velocity_loss(model, batch, accelerator, in_float32)
        yield name, error, {"velocity_error": error}

    return losses_of_step


def any_subset(
    context: Context,
    units: Sequence[Unit],
    students: Students,
    options: TrainingSettings,
    draw: Callable[[tuple[int, ...]], Sequence[Unit]] | None = None,
):
    """The loss of a step of output distillation, with a random subset of the units plugged in.

    Students of Eq. 6 never see each other's errors. Here they do, and since every step plugs in
    another subset, they stay pluggable: one set of students serves every budget. The transformer's
    own weights must be frozen.

    Args:
        draw: (seed, step) -> the units to plug in; None for `random_subset`.
    """
    transformer, seed = context.transformer, context.seed
    if options.gradient_checkpointing:
        diffusers_model.of(transformer).enable_gradient_checkpointing()
    fitting = {new_block: steps.InFloat32(student) for new_block, student in students.items()}

    def model_at(step: int) -> nn.Module:
        chosen = draw((seed, step)) if draw else random_subset(units, (seed, step))
        modules = {
            new_block.ends: fitting[new_block] for unit in chosen for new_block in unit.new_blocks
        }
        return blocks.assembled(transformer, modules)[0]

    return output_distillation(context, model_at, "students", options, in_float32=False)


def random_subset(members: Sequence, seed: tuple[int, ...]) -> list:
    """At least one of the members; every size is equally likely, then every subset of that size."""
    # Batches are drawn from the same seed: the third number keeps the two draws apart.
    rng = np.random.default_rng((*seed, 1))
    size = rng.integers(1, len(members), endpoint=True)
    return [members[i] for i in sorted(rng.permutation(len(members))[:size])]


def cost_table(
    context: Context,
    units: Sequence[Unit],
    students: Students,
    entries: Sequence[dict],
    options: DistillSettings | SubsetsSettings,
    state: State | None = None,
) -> pd.DataFrame:
    """Rows of unit_costs.parquet: what every unit costs, plugged in alone, on held-out rows.

    Args:
        entries: the units' entries in selection.json, in the same order.
        options: the stage's, with heldout_rows and batch_size.
        state: see `prices.measure`.
    """
    count, key = options.heldout_rows, "heldout_rows"
    rows = context.reader.sample_heldout("select", count, context.seed, key)
    for student in students.values():
        student.eval()
    costs = prices.measure(
        prices.Judged(context, rows, options.batch_size),
        prices.of_units(context.transformer, units, students),
        state,
    )
    unit_costs = [
        {
            "unit": unit.name,
            "first": unit.first,
            "last": unit.last,
            "removed_blocks": unit.removed_blocks,
            "saved_parameters": entry["saved_parameters"],
            "saved_seconds": math.nan if entry["saved_seconds"] is None else entry["saved_seconds"],
            "velocity_error": cost,
            "rows": len(rows),
        }
        for unit, entry, cost in zip(units, entries, costs, strict=True)
    ]
    return pd.DataFrame(unit_costs, columns=schemas.UNIT_COSTS.names)
