"""How the processes of a stage share out their work."""

import threading
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcl import processes


def in_threads(count, work, folder):
    """Numbers that each of `count` processes, played by threads, was given; in the order of turns.

    work: called with process and number.
    """
    barrier = threading.Barrier(count)
    taken = [[] for _ in range(count)]
    failed = []

    def run(index, length):
        accelerator = types.SimpleNamespace(
            num_processes=count, is_main_process=index == 0, wait_for_everyone=barrier.wait
        )
        try:
            for number in processes.in_turns(accelerator, length, folder):
                taken[index].append(number)
                work(index, number)
        except BaseException as error:
            barrier.abort()
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
