"""Teachers that start late: what they say, and the cache of what they start from."""

import errno
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from ppcl.errors import UserError
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock, new_blocks_of
from ppcl.runtime import stopping
from ppcl.storage import tensors
from ppcl.training import distillation, input_cache, loop, shards, tail, teaching
from ppcl.transformer import blocks
from ppcl.transformer.context import State
from support import tiny
from support.narrow_students import OPTIONS, UNITS

PART = NewBlock(3, 4)
HOW = OPTIONS.replace(cache_inputs="auto", steps=6, batch_size=3)
FREE = namedtuple("Usage", "total used free")


class Stop(Exception):
    """Ends a job from outside."""


@pytest.fixture
def job(teacher, reader, accelerator, tmp_path):
    """Trains a student from kept streams and gives its weights; `plain` from block 0."""

    def run(identity="one", plain=False, **options):
        chosen = HOW.replace(**options)
        taught = students.start(teacher, [PART], "first")
        given = None
        if not plain:
            given = input_cache.InputCache(
                tiny.context(teacher, reader, 0, accelerator),
                [PART],
                chosen,
                State(tmp_path / "inputs", identity),
            )
        losses = distillation.independent(
            tiny.context(teacher, reader, 0, accelerator), taught, chosen, inputs=given
        )
        how = loop.Optimisation(steps=6, lr=0.01, checkpoint_every=2)
        path = tmp_path / f"plain-{plain}" / "c.safetensors"
        loop.train({PART.name: taught[PART]}, losses, how, accelerator, path, identity)
        shutil.rmtree(path.parent)
        return taught[PART].state_dict()

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def files(tmp_path):
    return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "inputs").iterdir()}


# ---- a late start


def test_lessons_of_text_runs_are_the_same_to_the_bit(teacher):
    """A new block that borrows needs block a's attention input too, which may be before its own."""
    parts = [part for part in new_blocks_of(UNITS) if part.borrows]
    assert shards.first_needed(parts) == 0 < min(part.first for part in parts)
    parts = [NewBlock(4, 4, text="borrow", source=(2, 3)), NewBlock(5, 5)]
    call = tiny.arguments((5, 3))
    first = shards.first_needed(parts)
    assert first == 2
    ran = []
    handle = teacher.transformer_blocks[1].register_forward_hook(lambda *_: ran.append(1))
    whole = teaching.teacher_states(teacher, parts, call)
    assert ran == [1]
    streams = tail.streams_before(teacher, first, call)
    model = tail.Tail(teacher, first).model(streams)
    ran.clear()
    late = teaching.teacher_states(teacher, parts, call, model)
    handle.remove()
    assert not ran
    for part in parts:
        bounds = [
            {k: v for k, v in lessons[part].bound.items() if isinstance(v, torch.Tensor)}
            for lessons in (late, whole)
        ]
        assert bounds[0] and same(*bounds)
        assert same(late[part].target, whole[part].target)
    borrowed = late[parts[0]], whole[parts[0]]
    assert torch.equal(*(lesson.lent for lesson in borrowed))
    assert torch.equal(*(lesson.text_input for lesson in borrowed))


def test_streams_fit_a_batch_that_is_padded_otherwise():
    values, like = [torch.ones(3, 2), torch.ones(3, 2)], torch.zeros(2, 5, 2)
    longer = tail.fitted(values, like)
    assert longer[:, :3].eq(1).all() and longer[:, 3:].eq(0).all() and longer.shape == like.shape
    assert torch.equal(tail.fitted(values, like[:, :2]), torch.ones(2, 2, 2))


# ---- what is kept


def test_every_row_that_is_drawn_is_kept_once(reader, teacher, accelerator, tmp_path):
    options = HOW.replace(steps=3, batch_size=2)
    rows = reader.rows(heldout=False)
    wanted = {r for s in range(3) for r in reader.draw(rows, 2, (7, s)).tolist()}
    assert len(wanted) < len(rows)
    assert input_cache.drawn(reader, options, 7).tolist() == sorted(wanted)
    assert input_cache.caching(reader, options, 7) == shards.Caching("auto", len(wanted) / 6)
    assert input_cache.caching(reader, options.replace(mode="sequential"), 7) == shards.NEVER
    kept = input_cache.InputCache(
        tiny.context(teacher, reader, 7, accelerator), [PART], options, State(tmp_path, "")
    )
    first = reader.batch(sorted(wanted)[:2])
    with torch.no_grad():
        kept.model(first.numbers, first.arguments)
    streams = kept._streams(np.array(sorted(wanted)))
    for place, row in enumerate(sorted(wanted)):
        alone = reader.batch(np.array([row, row]))  # at the shape in which it was computed
        for stream, value in tail.streams_before(teacher, 3, alone.arguments).items():
            assert torch.equal(streams[stream][place], value[0]), (row, stream)


def test_students_end_the_same_with_and_without(job, tmp_path):
    kept = job()
    assert same(kept, job(plain=True))
    assert len(files(tmp_path)) == 3  # 8 padded rows, by 3
    before = files(tmp_path)
    assert same(kept, job()) and files(tmp_path) == before


@pytest.mark.parametrize("how", ["killed", "warned"])
def test_filling_that_is_ended_goes_on(job, tmp_path, monkeypatch, how):
    write = tensors.write

    def killed(path, *rest):
        if path.name == "1.safetensors":
            raise Stop
        write(path, *rest)

    with monkeypatch.context() as patch:
        if how == "killed":
            patch.setattr(tensors, "write", killed)
        else:
            patch.setattr(stopping, "warned", lambda: (tmp_path / "inputs").exists())
        with pytest.raises((Stop, SystemExit)) as ended:
            job()
    assert how == "killed" or ended.value.code == stopping.EXIT_CODE
    left = files(tmp_path)
    assert left.keys() == {"0.safetensors"}
    assert same(job(), job(plain=True))
    assert files(tmp_path)["0.safetensors"] == left["0.safetensors"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut, flip])
def test_a_damaged_file_is_made_again(job, tmp_path, spoil, caplog):
    whole = job()
    spoil(tmp_path / "inputs" / "2.safetensors")
    assert same(job(), whole)
    assert "2.safetensors is not" in caplog.text and "it is made again" in caplog.text


def test_a_file_that_is_damaged_by_another_process_is_refused(job, tmp_path, monkeypatch):
    """As one would be that another process wrote: this one has not read it yet."""
    fill = input_cache.InputCache._fill

    def spoilt(self):
        reason = fill(self)
        self._open.clear()
        self._checked.clear()
        flip(tmp_path / "inputs" / "1.safetensors")
        return reason

    monkeypatch.setattr(input_cache.InputCache, "_fill", spoilt)
    with pytest.raises(UserError, match=r"1.safetensors is not what was written; delete it and"):
        job()


def test_streams_of_another_job_are_not_used(job, tmp_path, caplog):
    job("other")
    before = files(tmp_path)
    assert same(job("mine"), job(plain=True))
    assert all(files(tmp_path)[name] != when for name, when in before.items())
    assert "files belong to other settings or inputs" in caplog.text


# ---- no room


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("how", ["little free", "full meanwhile"])
def test_without_room_the_teacher_runs_from_its_first_block(job, tmp_path, monkeypatch, how):
    with monkeypatch.context() as patch:
        if how == "little free":
            patch.setattr(shutil, "disk_usage", lambda _: FREE(9, 9, 999))
        else:
            write = tensors.write

            def second(path, *rest):
                full() if path.name == "1.safetensors" else write(path, *rest)

            patch.setattr(tensors, "write", second)
        with pytest.raises(UserError, match="no room for the teacher's streams .*never"):
            job(cache_inputs="always")
        assert input_cache.CACHE_DISABLED not in files(tmp_path)  # it can go on when there is room
        assert same(job(), job(plain=True))
        assert files(tmp_path).keys() == {input_cache.CACHE_DISABLED}
    assert same(job(), job(plain=True))  # a resumed job does not decide again
    assert files(tmp_path).keys() == {input_cache.CACHE_DISABLED}
    job("another")
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("left", ["another run's", "one damaged"])
def test_what_is_there_needs_no_room_twice(job, tmp_path, monkeypatch, left):
    """A disk of half as much again as the files of a killed run take."""
    inputs = tmp_path / "inputs"
    job("before")
    size = sum(path.stat().st_size for path in inputs.iterdir())

    def usage(_):
        used = sum(path.stat().st_size for path in inputs.glob("*.safetensors"))
        return FREE(3 * size // 2, used, 3 * size // 2 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    if left == "one damaged":
        flip(inputs / "0.safetensors")
    job("before" if left == "one damaged" else "after")
    assert len(files(tmp_path)) == 3 and input_cache.CACHE_DISABLED not in files(tmp_path)


def test_a_write_that_fails_otherwise_is_no_lack_of_room(job, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensors, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        job()


def test_a_teacher_whose_samples_see_each_other_is_refused(reader, accelerator, tmp_path):
    """Nothing kept by row can be right for it."""
    teacher = tiny.transformer(blocks=6, scale=0.2)

    def mix(_module, _args, returned):
        text, image = returned
        return text, image + image.mean(0, keepdim=True)

    teacher.transformer_blocks[0].register_forward_hook(mix)
    taught = students.start(teacher, [PART], "first")
    kept = input_cache.InputCache(
        tiny.context(teacher, reader, 0, accelerator), [PART], HOW, State(tmp_path, "")
    )
    losses = distillation.independent(
        tiny.context(teacher, reader, 0, accelerator), taught, HOW, inputs=kept
    )
    with pytest.raises(UserError, match="the image stream before block 3 depends on what else"):
        next(losses(0))


def test_blocks_that_can_not_pass_streams_on_are_refused(
    teacher, reader, accelerator, tmp_path, monkeypatch
):
    """As of a family whose blocks return more than their streams."""
    pass_on = blocks.PassThroughBlock.forward
    monkeypatch.setattr(
        blocks.PassThroughBlock,
        "forward",
        lambda *a, **k: tuple(s[:, 1:] for s in pass_on(*a, **k)),
    )
    kept = input_cache.InputCache(
        tiny.context(teacher, reader, 0, accelerator), [PART], HOW, State(tmp_path, "")
    )
    batch = reader.batch(reader.rows(heldout=False)[:3])
    with pytest.raises(UserError, match="before block 3 are skipped.*of shape .*never"):
        kept.model(batch.numbers, batch.arguments)


def test_two_processes_share_the_filling(teacher, reader, tmp_path):
    """Each makes every other file, of batches as large as its share; both read all."""

    class Two(tiny.Process):
        is_main_process, mixed_precision = False, "no"

        def wait_for_everyone(self):
            pass

    def held(_rank, value):
        return value

    for rank, there in enumerate(("02", "0123")):
        process = Two(rank, 2, held, reduction="sum")
        kept = input_cache.InputCache(
            tiny.context(teacher, reader, 0, process), [PART], HOW, State(tmp_path, "")
        )
        assert {len(group) for group in kept._groups} == {2}
        assert kept._fill() == ""
        assert {path.stem for path in tmp_path.iterdir()} == set(there)
    rows = reader.rows(heldout=False)[[5, 0]]
    batch = reader.batch(rows)
    with torch.no_grad():
        late = kept.model(rows, batch.arguments)
        assert torch.equal(
            blocks.answer(late, batch.arguments), blocks.answer(teacher, batch.arguments)
        )
    # Another number of processes has batches of another size, and makes its own files.
    alone = input_cache.InputCache(
        tiny.context(teacher, reader, 0, Two(0, 1, held, reduction="sum")),
        [PART],
        HOW,
        State(tmp_path, ""),
    )
    assert alone._fill() == ""
    with pytest.raises(UserError, match="belongs to other settings"):
        kept._checked.clear()
        kept._open.clear()
        kept._opened(0)
