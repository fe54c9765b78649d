"""Files and folders that appear whole or not at all, and what a disk is to blame for."""

import contextlib
import errno
import multiprocessing
import os
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from ppcl import program
from ppcl.errors import UserError
from ppcl.storage import schemas, seals, tables, tensors, texts, whole


@pytest.fixture(autouse=True)
def waits_for_the_disk(fsync, monkeypatch):
    monkeypatch.setattr(os, "fsync", fsync)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


ELSEWHERE = "0" * 8  # another node


def left_by(path, process: int, machine: str = whole._MACHINE, locks: bool = True):
    """What a killed process leaves beside a file; locks: whether it could have one there."""
    left = path.with_name(f".{path.name}.{process}-{machine}-abcd.part")
    left.mkdir(parents=True)
    (left / path.name).write_text("half")
    (left / ".tmpq1w2e3").write_text("of a library")
    if locks:
        (left / whole._LOCK).touch()
    return left


HOLDS = """
import fcntl, os, sys
for path in sys.argv[1:]:
    fcntl.lockf(os.open(path, os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(*parts):
    """Another process holds their locks meanwhile."""
    command = [sys.executable, "-c", HOLDS, *(str(part / whole._LOCK) for part in parts)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def ended() -> int:
    """The number of a process that is no more."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_nothing_is_left_of_what_fails(tmp_path):
    path = tmp_path / "new" / "t"
    texts.write(path, "old")
    with pytest.raises(ZeroDivisionError), whole.writing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), whole.writing(tmp_path / "f", folder=True) as part:
        (part / "half").write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["new"] and names(path.parent) == ["t"]


@pytest.fixture
def shared_with_the_group():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_modes_are_those_of_new_files_whatever_wrote_them(tmp_path, shared_with_the_group):
    with whole.writing(tmp_path / "file") as part:
        part.chmod(0o400)
    with whole.writing(tmp_path / "folder", folder=True) as part:
        (part / "inner").mkdir()
        (part / "inner/copied").touch()
        (part / "inner/copied").chmod(0o444)
        (part / "inner").chmod(0o555)
    tensors.write(tmp_path / "t.safetensors", {"w": torch.ones(1)}, {})
    texts.write(tmp_path / "new/t", "text")
    files = ["file", "folder/inner/copied", "t.safetensors", "new/t"]
    assert {name: mode(tmp_path / name) for name in files} == dict.fromkeys(files, 0o640)
    folders = ["folder", "folder/inner", "new"]
    assert {name: mode(tmp_path / name) for name in folders} == dict.fromkeys(folders, 0o750)


def test_all_is_on_the_disk_before_it_gets_its_name_and_then_the_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace

    def note(file):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        sync(file)

    def put(source, target):
        done.append("named")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", put)
    with whole.writing(tmp_path / "f", folder=True) as part:
        (part / "inner").mkdir()
        (part / "inner/one").touch()
        (part / "two").touch()
        own = part.name
    assert done == ["one", "inner", "two", own, "named", tmp_path.name]
    done.clear()
    with whole.writing(tmp_path / "t") as part:
        own = part.name
    assert done == [own, "named", tmp_path.name]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "t"
    with whole.writing(path) as one:
        one.write_text("one")
        with whole.writing(path) as other:
            other.write_text("other")
            assert one != other and one.exists()
        assert path.read_text() == "other"
    assert path.read_text() == "one" and names(tmp_path) == ["t"]


def test_what_killed_processes_left_goes_and_what_is_written_stays(tmp_path):
    path = tmp_path / "a[1]"
    gone = [
        left_by(path, ended()),
        left_by(path, os.getpid(), locks=False),  # numbers come again
        left_by(path, os.getppid()),  # the same, to another process
        left_by(path, 1, ELSEWHERE),
    ]
    written = [left_by(path, ended(), "1" * 8), left_by(path, 2, ELSEWHERE)]
    unknown = [left_by(path, 3, ELSEWHERE, locks=False), left_by(tmp_path / "a1", ended())]
    with held(*written[:1]), held(*written[1:]):
        texts.write(path, "whole")
        assert not any(part.exists() for part in gone)
        assert all((part / path.name).read_text() == "half" for part in written)
    assert all(part.exists() for part in unknown)
    texts.write(path, "whole")
    assert not any(part.exists() for part in written)


def test_what_is_being_written_is_locked_whatever_a_library_does_to_the_file(tmp_path):
    with whole.writing(tmp_path / "t") as temporary:
        lock = temporary.with_name(whole._LOCK)
        inode = temporary.stat().st_ino
        tensors.safetensors.torch.save_file({"w": torch.ones(1)}, temporary)
        assert temporary.stat().st_ino != inode  # it writes another file, and puts it there
        asks = HOLDS.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB")
        asked = subprocess.run([sys.executable, "-c", asks, lock], capture_output=True, text=True)
        assert "BlockingIOError" in asked.stderr


def mounted(monkeypatch, folder, kind, options):
    """From now on the folder is one on such a mount, beside others."""
    place, real = str(folder).replace("m", r"\155"), open
    (folder / "mounts").write_text(
        f"1 0 0:1 / / rw - ext4 /dev/a rw\n3 1 0:3 / {place} rw shared:1 - {kind} s:/ {options}\n"
        f"2 1 0:2 / {folder}/other rw - 9p o rw\n"
    )

    def opened(path, *rest, **more):
        return real(folder / "mounts" if str(path).startswith("/proc") else path, *rest, **more)

    monkeypatch.setattr("builtins.open", opened)


@pytest.mark.parametrize(
    ("kind", "options", "seen"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,vers=3,local_lock=all", False),
        ("nfs", "rw,vers=3,nolock,local_lock=none", False),
        ("lustre", "rw,flock,lazystatfs", True),
        ("lustre", "rw,lazystatfs", False),
        ("lustre", "rw,localflock", False),
        ("fuse.sshfs", "rw", False),
        ("xfs", "rw", True),
    ],
)
def test_a_lock_that_other_nodes_do_not_see_tells_nothing(
    tmp_path, monkeypatch, kind, options, seen
):
    theirs, ours = left_by(tmp_path / "t", 1, ELSEWHERE), left_by(tmp_path / "t", ended())
    mounted(monkeypatch, tmp_path, kind, options)
    texts.write(tmp_path / "t", "whole")
    assert theirs.exists() != seen and not ours.exists()


def test_without_locks_all_is_as_it_is_on_one_machine(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(whole.fcntl, "lockf", refused)
    gone, kept = left_by(tmp_path / "t", ended()), left_by(tmp_path / "t", os.getppid())
    with whole.writing(tmp_path / "t") as temporary:
        temporary.write_text("whole")
        assert names(temporary.parent) == ["t"]
    assert not gone.exists() and kept.exists() and (tmp_path / "t").read_text() == "whole"


def test_a_folder_takes_the_place_of_another(tmp_path):
    for content in ("one", "two"):
        with whole.writing(tmp_path / "f", folder=True) as part:
            (part / content).write_text(content)
        assert names(tmp_path) == ["f"] and names(tmp_path / "f") == [content]


def test_a_folder_that_another_run_puts_in_place_meanwhile_is_replaced(tmp_path, monkeypatch):
    replace, folder = os.replace, tmp_path / "f"

    def late(source, target):
        if target == folder:
            monkeypatch.setattr(os, "replace", replace)
            folder.mkdir()
            (folder / "theirs").write_text("theirs")
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    with whole.writing(folder, folder=True) as part:
        (part / "ours").write_text("ours")
    assert names(folder) == ["ours"] and names(tmp_path) == ["f"]


def test_a_forgotten_folder_keeps_what_another_run_is_writing(tmp_path):
    state = tmp_path / "state"
    texts.write(state / "errors" / "0.json", "{}")
    left_by(state / "checkpoint", ended())
    theirs = left_by(state / "checkpoint", 1, ELSEWHERE)
    left_by(state / "errors" / "checkpoint", 1, ELSEWHERE)
    with held(theirs):
        whole.forget(state)
    assert names(state) == [theirs.name] and (theirs / "checkpoint").exists()
    whole.forget(state)
    assert not state.exists()
    whole.forget(state)


def forget_often(state, stop):
    while not stop.is_set():
        whole.forget(state)


def test_a_writer_outlives_another_runs_forgetting(tmp_path):
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    other = context.Process(target=forget_often, args=(tmp_path / "state", stop))
    other.start()
    try:
        for number in range(300):
            texts.write(tmp_path / "state" / "errors" / "0.json", str(number))
    finally:
        stop.set()
        other.join()
    assert other.exitcode == 0


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room on this disk and rerun"),
        (errno.EDQUOT, "make room on this disk and rerun"),
        (errno.EIO, "this disk or the way to it fails"),
        (errno.EROFS, "use a disk that can be written to"),
        (errno.EACCES, "give yourself the right to it"),
    ],
)
def test_every_writer_names_the_file_and_the_fix(tmp_path, monkeypatch, number, fix):
    """Whoever raises it: Python without a file's name, safetensors and shutil in words alone."""
    reason = os.strerror(number)
    schema = pa.schema([schemas.column("a", pa.int32(), "a")])
    writers = {
        "t.parquet": lambda path: tables.write(path, pa.table({"a": [1]}), schema, {}),
        "t.safetensors": lambda path: tensors.write(path, {"w": torch.ones(1)}, {}),
        "t.json": lambda path: texts.write_sealed(path, {}),
    }
    for name, write in writers.items():
        for error in (OSError(number, reason), ValueError(f"I/O error (os error {number})")):

            def fail(*_, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                with pytest.raises(UserError) as told:
                    write(tmp_path / name)
            assert str(told.value).startswith(f"{tmp_path / name}: {reason}; {fix}")
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path}/file.*a file is where a folder should be"):
        texts.write(tmp_path / "file" / "t", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/folder: .*a folder is where a file should"):
        texts.write(tmp_path / "folder", "")


def test_a_program_tells_what_a_disk_is_to_blame_for_and_nothing_else_so(tmp_path, capsys):
    def fails(error):
        def main():
            raise error

        return main

    def behind():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("can't save") from error

    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", "calls.parquet")
    for main, message in (
        (fails(gone), "error: calls.parquet: No such file or directory; it was removed"),
        (fails(OSError(errno.EIO, "bad", "/x")), "error: /x: Input/output error; this disk"),
        (behind, f"error: {os.getcwd()}: [Errno 28] No space left on device; make room"),
    ):
        with pytest.raises(SystemExit) as stopped:
            program.run(main)
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith(message)
    for bug in (ValueError("no"), FileNotFoundError(errno.ENOENT, "no name"), KeyError(28)):
        with pytest.raises(type(bug)):
            program.run(fails(bug))


def test_what_can_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    schema = pa.schema([schemas.column("a", pa.int32(), "a")])
    tables.write(tmp_path / "t.parquet", pa.table({"a": [1]}), schema, {})
    tensors.write(tmp_path / "t.safetensors", {"w": torch.ones(1)}, {})

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    for name, read in (("t.parquet", tables.read), ("t.safetensors", tensors.read)):
        with pytest.raises(UserError, match=f"{name}: Input/output error; this disk") as told:
            read(tmp_path / name)
        assert seals.DAMAGED not in str(told.value) and "delete" not in str(told.value)
