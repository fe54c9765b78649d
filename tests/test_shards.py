"""Distillation in several jobs: fair shares, and the same files as one job leaves."""

import itertools
import json
import runpy

import pandas as pd
import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from killing import assert_same_log, equal, kill_and_resume

from ppcl import schemas, shards, tables
from ppcl.errors import UserError
from ppcl.plans import Part, Unit

# ---- shares


@st.composite
def selections(draw, largest=12):
    """Disjoint units in order of depth; some of them of several parts, as text runs are."""
    found, block = [], 0
    for _ in range(draw(st.integers(1, largest))):
        first = block + draw(st.integers(0, 3))
        parts = []
        for _ in range(draw(st.integers(1, 3))):
            last = first + draw(st.integers(0, 3))
            parts.append(Part(first, last))
            first = last + 1
        found.append(Unit(tuple(parts)))
        block = first
    return found


@given(selections(), st.one_of(st.just("auto"), st.integers(1, 20)))
@example([], "auto")
@example([], 3)
def test_every_unit_is_in_exactly_one_job_and_jobs_are_contiguous_in_depth(units, wanted):
    jobs = shards.allot(units, wanted)
    assert [unit for job in jobs for unit in job] == units
    assert all(jobs) or jobs == [[]]
    if wanted != "auto":
        assert len(jobs) <= wanted


@given(selections(largest=7), st.integers(1, 4))
def test_no_other_cut_makes_the_slowest_job_faster(units, wanted):
    slowest = max(map(shards.cost, shards.allot(units, wanted)))
    for count in range(1, min(wanted, len(units)) + 1):
        for cuts in itertools.combinations(range(1, len(units)), count - 1):
            ends = [0, *cuts, len(units)]
            parts = [units[a:b] for a, b in itertools.pairwise(ends)]
            assert slowest <= max(map(shards.cost, parts))


@given(selections())
def test_auto_is_near_the_fastest_with_no_job_too_many(units):
    jobs = shards.allot(units, "auto")
    bar = shards.SLACK * max(shards.cost([unit]) for unit in units)
    assert max(map(shards.cost, jobs)) <= bar
    if len(jobs) > 1:
        fewer = shards.allot(units, len(jobs) - 1)
        assert max(map(shards.cost, fewer)) > bar


def test_deep_jobs_own_fewer_students():
    """60 blocks and 13 students as published for Qwen-Image: the teacher dominates a deep job."""
    ends = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47)]
    ends += [(48, 49), (52, 53), (54, 55), (56, 57)]
    units = [Unit((Part(*pair),)) for pair in ends]
    assert shards.cost(units) == 58 + 3 * 13
    jobs = shards.allot(units, 3)
    assert [len(job) for job in jobs] == [7, 4, 2]
    assert [shards.cost(job) for job in jobs] == [31 + 21, 54 + 12, 58 + 6]
    assert shards.allot(units, "auto") == jobs  # 66 is within a tenth of 61, 73 of two jobs is not


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "shards.json"
    with pytest.raises(UserError, match="shards.json can't be read"):
        shards.read(path)
    for text in ("[", "3", "[3]"):
        path.write_text(text)
        with pytest.raises(UserError, match="shards.json is no table of shards"):
            shards.read(path)


# ---- jobs


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls, tmp_path_factory):
    """Settings, and the paths of one distillation in one job."""
    folder = tmp_path_factory.mktemp("shards")
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": {"path": str(tiny_teacher)},
        "intervals": {},
        "prune": {"start": "first"},
        "width": {"fit_rows": 8},
        "distill": {
            "steps": 6,
            "heldout_rows": 4,
            "batch_size": 5,
            "lr": 0.003,
            "warmup_steps": 1,
            "checkpoint_every": 2,
            "log_every": 2,
        },
        "variants": [{"name": "p70", "budget": 0.7}],
    }
    given = {"calls": tiny_calls, "plan": folder / "plan.json"}
    tiny.stage(
        "prune",
        settings,
        intervals=tiny.intervals(folder / "intervals.parquet", [(0, 1), (3, 4)]),
        candidates=tiny.candidates(folder / "candidates.parquet", [], [(2, "image")]),
        **given,
        students=folder / "start.safetensors",
    )
    given |= {"students": folder / "start.safetensors"}
    tiny.stage("distill", settings, **given, **outputs(folder / "one"))
    return folder, settings, given


def outputs(folder):
    return {
        "state": folder / "state",
        "output": folder / "students.safetensors",
        "log_table": folder / "log.parquet",
        "errors": folder / "errors.parquet",
    }


def test_shards_joined_are_one_job_to_the_bit(world):
    folder, settings, given = world
    sharded = settings | {"distill": settings["distill"] | {"shards": 3}}
    table = folder / "shards.json"
    tiny.stage("allot", sharded, calls=given["calls"], plan=given["plan"], shards=table)
    assert json.loads(table.read_text()) == [["00-01"], ["02-02"], ["03-04"]]
    parts = [outputs(folder / str(number)) for number in range(3)]
    for number, paths in enumerate(parts):
        shard = {"shards": table, "shard": number}
        if number == 1:  # one of them is killed, and goes on
            kill_and_resume("distill", settings, given | paths | shard)
        else:
            tiny.stage("distill", settings, **given, **paths, **shard)
    joined = outputs(folder / "joined")
    del joined["state"]
    files = {"students": "output", "logs": "log_table", "costs": "errors"}

    def join(order):
        shown = {k: [parts[n][v] for n in order] for k, v in files.items()}
        with pytest.MonkeyPatch.context() as patch:
            options = tiny.options(settings, {"plan": given["plan"]} | joined)
            for name, paths in shown.items():
                options += [f"--{name}", *map(str, paths)]
            patch.setattr("sys.argv", ["join", *options])
            runpy.run_path(str(tiny.SCRIPTS / "join.py"), run_name="__main__")

    with pytest.raises(SystemExit):
        join([0, 2])
    join([0, 1, 2])
    one = outputs(folder / "one")
    assert equal(joined["output"], one["output"])
    assert not equal(joined["output"], given["students"])
    assert_same_log(joined["log_table"], one["log_table"], schemas.DISTILL_LOG)
    costs = [
        tables.read(p["errors"], schemas.UNIT_ERRORS).to_pandas().drop(columns="saved_seconds")
        for p in (joined, one)
    ]
    pd.testing.assert_frame_equal(*costs, check_exact=True)
    metadata = [tables.provenance(p["log_table"]) for p in (joined, one)]
    assert metadata[0]["rows"] == metadata[1]["rows"]
