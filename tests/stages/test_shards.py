"""Distillation in several jobs: fair shares, and the same files as one job leaves."""

import itertools
import runpy

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ppcl.errors import UserError
from ppcl.pruning.units import NewBlock, Unit
from ppcl.storage import schemas, tables, texts
from ppcl.training import shards
from support import SCRIPTS, tiny
from support.killing import assert_same_log, equal, kill_and_resume

# ---- shares


@st.composite
def selections(draw, largest=12, parts=3):
    """Disjoint units in order of depth; some of them of several new blocks, as text runs are."""
    units, block = [], 0
    for _ in range(draw(st.integers(1, largest))):
        first = block + draw(st.integers(0, 3))
        of_unit = []
        for _ in range(draw(st.integers(1, parts))):
            last = first + draw(st.integers(0, 3))
            of_unit.append(NewBlock(first, last))
            first = last + 1
        units.append(Unit(tuple(of_unit)))
        block = first
    return units


CACHINGS = st.one_of(
    st.just(shards.NEVER),
    st.builds(shards.Caching, st.sampled_from(["auto", "always"]), st.floats(0, 1)),
)


@given(selections(), st.one_of(st.just("auto"), st.integers(1, 20)), CACHINGS)
@example([], "auto", shards.NEVER)
@example([], 3, shards.NEVER)
def test_every_unit_is_in_exactly_one_job_and_jobs_are_contiguous_in_depth(units, wanted, caching):
    jobs = shards.assign(units, wanted, caching)
    assert [unit for job in jobs for unit in job] == units
    assert all(jobs) or jobs == [[]]
    if wanted != "auto":
        assert len(jobs) <= wanted


@given(selections(largest=7), st.integers(1, 4), CACHINGS)
def test_no_other_cut_makes_the_slowest_job_faster(units, wanted, caching):
    def slowest(jobs):
        return max(shards.cost(job, caching) for job in jobs)

    least = slowest(shards.assign(units, wanted, caching))
    for count in range(1, min(wanted, len(units)) + 1):
        for cuts in itertools.combinations(range(1, len(units)), count - 1):
            ends = [0, *cuts, len(units)]
            parts = [units[a:b] for a, b in itertools.pairwise(ends)]
            assert least <= slowest(parts)


def groupings(items, most):
    """Every way to put items into at most so many groups."""
    if not items:
        yield []
        return
    for groups in groupings(items[1:], most):
        yield from (
            [*groups[:i], [items[0], *groups[i]], *groups[i + 1 :]] for i in range(len(groups))
        )
        if len(groups) < most:
            yield [[items[0]], *groups]


@given(selections(largest=5, parts=1), st.integers(1, 3), CACHINGS)
def test_where_all_units_are_of_one_part_no_other_jobs_are_faster_at_all(units, wanted, caching):
    least = max(shards.cost(job, caching) for job in shards.assign(units, wanted, caching))
    every = groupings(units, wanted)
    best = min(max(shards.cost(job, caching) for job in jobs) for jobs in every)
    assert least == pytest.approx(best)


@settings(deadline=None)
@given(selections(), CACHINGS)
def test_auto_is_near_the_fastest_with_no_job_too_many(units, caching):
    def slowest(jobs):
        return max(shards.cost(job, caching) for job in jobs)

    jobs = shards.assign(units, "auto", caching)
    bar = shards.SLACK * max(shards.cost([unit], caching) for unit in units)
    assert slowest(jobs) <= bar
    if len(jobs) > 1:
        assert slowest(shards.assign(units, len(jobs) - 1, caching)) > bar


def passes(units, caching):
    """A step's block passes one by one: what runs, from where, and the filling's share."""
    first = min(
        first
        for unit in units
        for p in unit.new_blocks
        for first, _ in (p.ends, p.source or p.ends)
    )
    last = max(p.last for unit in units for p in unit.new_blocks)
    students = 3 * sum(len(unit.new_blocks) for unit in units)
    whole = len(range(last + 1)) + students
    late = len(range(first, last + 1)) + students + caching.fill * len(range(first))
    if caching.mode == "never":
        return whole
    return late if caching.mode == "always" or whole / late >= 1.1 else whole


@given(selections(), CACHINGS)
def test_a_job_costs_what_it_runs(units, caching):
    assert shards.cost(units, caching) == pytest.approx(passes(units, caching))
    kept = shards.cached(units, caching)
    assert not kept or shards.first_needed([p for u in units for p in u.new_blocks]) > 0
    line = shards.explain(units, caching)
    assert ("streams that are kept" in line) == kept


def test_streams_are_kept_only_where_that_pays():
    deep, shallow = [Unit((NewBlock(50, 51),))], [Unit((NewBlock(2, 51),))]
    often, once = shards.Caching("auto", 0.1), shards.Caching("auto", 1.0)
    assert shards.cached(deep, often) and not shards.cached(deep, once)
    assert not shards.cached(shallow, often)  # it saves 1.8 of 55 passes
    assert shards.cached(shallow, shards.Caching("always", 1.0))
    assert not shards.cached(deep, shards.NEVER)
    start = [Unit((NewBlock(0, 3),))]
    assert not shards.cached(start, shards.Caching("always", 0.0))
    lent = [Unit((NewBlock(4, 4, text="source"), NewBlock(6, 7, text="close", source=(4, 4))))]
    assert shards.cost(lent, shards.Caching("always", 0.0)) == 4 + 6


def test_deep_jobs_own_fewer_students():
    """60 blocks and 13 students as published for Qwen-Image: the teacher dominates a deep job."""
    ends = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47)]
    ends += [(48, 49), (52, 53), (54, 55), (56, 57)]
    units = [Unit((NewBlock(*pair),)) for pair in ends]
    assert shards.cost(units) == 58 + 3 * 13
    jobs = shards.assign(units, 3)
    assert [len(job) for job in jobs] == [7, 4, 2]
    assert [shards.cost(job) for job in jobs] == [31 + 21, 54 + 12, 58 + 6]
    # From kept streams, the jobs split where the gaps are, and the deepest owns most.
    often = shards.Caching("auto", 0.0)
    kept = shards.assign(units, 3, often)
    assert [len(job) for job in kept] == [4, 3, 6]
    assert [shards.cost(job, often) for job in kept] == [10 + 12, 16 + 9, 16 + 18]
    assert shards.assign(units, "auto") == jobs  # 66 is within a tenth of 61, 73 of two jobs is not


def test_a_damaged_table_is_named(tmp_path):
    path = tmp_path / "shards.json"
    with pytest.raises(UserError, match="shards.json can't be read"):
        shards.read(path)
    for content in ({}, {"jobs": 3}, {"jobs": [3]}):
        texts.write_sealed(path, content)
        with pytest.raises(UserError, match="shards.json is no table of shards"):
            shards.read(path)
    path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(UserError, match="shards.json is not what was written"):
        shards.read(path)


# ---- jobs


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls, tmp_path_factory):
    """Settings, and the paths of one distillation in one job."""
    folder = tmp_path_factory.mktemp("shards")
    distill = {
        "steps": 6,
        "heldout_rows": 4,
        "batch_size": 5,
        "lr": 0.003,
        "warmup_steps": 1,
        "checkpoint_every": 2,
        "log_every": 2,
    }
    settings, given = tiny.pruned(
        folder,
        tiny_teacher,
        tiny_calls,
        ffns=((2, "image"),),
        width={"fit_rows": 8},
        distill=distill,
        variants=[{"name": "p70", "budget": 0.7}],
    )
    tiny.stage("distill", settings, **given, **outputs(folder / "one"))
    return folder, settings, given


def outputs(folder):
    return {
        "state": folder / "state",
        "output": folder / "students.safetensors",
        "log_table": folder / "log.parquet",
        "unit_costs": folder / "unit_costs.parquet",
    }


def test_shards_joined_are_one_job_to_the_bit(world, capsys):
    folder, settings, given = world
    sharded = settings | {"distill": settings["distill"] | {"shards": 3}}
    table = folder / "shards.json"
    tiny.stage(
        "assign_shards", sharded, calls=given["calls"], selection=given["selection"], shards=table
    )
    assert shards.read(table) == [["00-01"], ["02-02"], ["03-04"]]
    parts = [outputs(folder / str(number)) for number in range(3)]
    for number, paths in enumerate(parts):
        shard = {"shards": table, "shard": number}
        if number == 1:  # one of them is killed, and goes on
            kill_and_resume("distill", settings, given | paths | shard)
        else:
            tiny.stage("distill", settings, **given, **paths, **shard)
    printed = capsys.readouterr().out
    assert printed.count("from streams that are kept") == 2  # shard 0 starts at block 0
    assert printed.count("equal to the bit") == 2
    joined = outputs(folder / "joined")
    del joined["state"]
    files = {"students": "output", "logs": "log_table", "costs": "unit_costs"}

    def join(order):
        shown = {k: [parts[n][v] for n in order] for k, v in files.items()}
        with pytest.MonkeyPatch.context() as patch:
            options = tiny.options(settings, {"selection": given["selection"]} | joined)
            for name, paths in shown.items():
                options += [f"--{name}", *map(str, paths)]
            patch.setattr("sys.argv", ["join_shards", *options])
            runpy.run_path(str(SCRIPTS / "join_shards.py"), run_name="__main__")

    with pytest.raises(SystemExit):
        join([0, 2])
    join([0, 1, 2])
    one = outputs(folder / "one")
    assert equal(joined["output"], one["output"])
    assert not equal(joined["output"], given["students"])
    assert_same_log(joined["log_table"], one["log_table"], schemas.DISTILL_LOG)
    costs = [
        tables.read(p["unit_costs"], schemas.UNIT_COSTS).to_pandas().drop(columns="saved_seconds")
        for p in (joined, one)
    ]
    pd.testing.assert_frame_equal(*costs, check_exact=True)
    metadata = [tables.provenance(p["log_table"]) for p in (joined, one)]
    assert metadata[0]["rows"] == metadata[1]["rows"]
