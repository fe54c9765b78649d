"""How the processes of a stage share out their work."""

import threading
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.runtime import processes


def in_threads(count, work, *folders):
    """Numbers that each of `count` processes, played by threads, was given; in the order of turns.

    work: called with process and number.
    folders: of each process, or one that all share.
    """
    barrier = threading.Barrier(count, timeout=60)
    taken = [[] for _ in range(count)]
    own, failed = [None] * count, []

    def run(index, length):
        def reduce(tensor, reduction):
            assert reduction == "sum"
            own[index] = tensor
            barrier.wait()
            return sum(own)

        accelerator = types.SimpleNamespace(
            num_processes=count, device=torch.device("cpu"), reduce=reduce
        )
        folder = folders[index % len(folders)]
        try:
            for number in processes.in_turns(accelerator, length, folder):
                taken[index].append(number)
                work(index, number)
        except BaseException as error:
            failed.append(error)

    def go(length):
        threads = [threading.Thread(target=run, args=(i, length)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return taken

    return go


@pytest.fixture(autouse=True)
def one_name(monkeypatch):
    monkeypatch.setattr(processes, "broadcast_object_list", lambda _own: ["name"])


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 20))
def test_every_number_is_given_once(tmp_path_factory, count, length):
    folder = tmp_path_factory.mktemp("turns")
    taken = in_threads(count, lambda *_: None, folder)(length)
    assert sorted(number for numbers in taken for number in numbers) == list(range(length))
    assert all(numbers == sorted(numbers) for numbers in taken)
    assert not any(folder.iterdir())


def test_whoever_is_free_takes_the_next(tmp_path):
    others = threading.Event()

    def work(index, number):
        if number == 0:
            assert others.wait(60)  # until all the rest is done
        elif number == 9:
            others.set()

    taken = in_threads(2, work, tmp_path)(10)
    assert sorted(taken) == [[0], list(range(1, 10))]


def test_turns_of_a_killed_run_are_nobodys(tmp_path):
    (tmp_path / ".turn-killed-0").touch()
    assert in_threads(2, lambda *_: None, tmp_path)(1) in ([[0], []], [[], [0]])


def test_processes_that_share_no_disk_are_noticed(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(UserError, match="on a disk that all machines of a job share"):
        in_threads(2, lambda *_: None, *folders)(3)
    assert not any(any(folder.iterdir()) for folder in folders)
