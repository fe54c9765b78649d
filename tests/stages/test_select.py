"""The program that selects: its tables, reasons, and what it refuses."""

import itertools
import json
import runpy
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from ppcl.pruning.units import Modulation
from ppcl.search import cka_draws, intervals, savings
from ppcl.search.intervals import Interval
from ppcl.search.savings import Weights
from ppcl.storage import schemas, tables
from ppcl.storage.schemas import Verdict
from ppcl.transformer import block_facts
from ppcl.transformer.block_facts import BlockFacts
from support import SCRIPTS

# How the sentence begins that goes with a verdict.
SENTENCES = {
    Verdict.REQUIRED: "required by ",
    Verdict.CHEAPEST: "in the cheapest set that saves ",
    Verdict.FORBIDDEN: "forbidden by ",
    Verdict.PROTECTED: "holds protected block ",
    Verdict.LOW_CKA: ("cka ", "text cka "),
    Verdict.UNMEASURED: "has no measured cost",
    Verdict.COSTLIER: ("costs more at this budget than ", "rank "),
    Verdict.CONFLICT: ("would cut ", "would be cut "),
    Verdict.GONE: ("gone: ", "goes with ", "inside the selected interval "),
    Verdict.NOT_NEEDED: "not needed for the budget",
}


def random_cka(seed, depth):
    """[first, last]: falls with every added block, unevenly; NaN below the diagonal."""
    generator = np.random.default_rng(seed)
    falls = generator.exponential(0.05, size=(depth, depth))
    falls[np.tril_indices(depth, -1)] = 0
    cka = 1 - np.cumsum(falls, axis=1)
    cka[np.tril_indices(depth, -1)] = np.nan
    return cka


def judged(path, schema):
    """A table of selection, of which each verdict agrees with the sentence and the choice."""
    table = tables.read(path, schema).to_pandas()
    for row in table.itertuples():
        assert row.reason.startswith(SENTENCES[Verdict(row.verdict)]), row
        assert row.selected == (row.verdict in (Verdict.REQUIRED, Verdict.CHEAPEST)), row
    return table


def write_cka(path, cka, seams=(0,), untouchable=(), **facts):
    """The tables of `similarity` and, beside it, of a teacher with as many like blocks."""
    first, last = np.nonzero(np.isfinite(cka))
    delta = cka_draws.differences(cka)[first, last]
    values = {"cka": cka[first, last], "delta": delta}
    for name in ("cka", "delta"):
        values |= {f"{name}_low": values[name], f"{name}_high": values[name]}
    table = pd.DataFrame({"stream": "mean", "start": first - 1, "end": last, **values})
    depth = len(cka)
    facts = {"delta_noise": {"mean": 0.0}, "bootstrap": 2, **facts}
    reasons = dict.fromkeys(untouchable, "the test says so")
    blocks = BlockFacts(["b"] * depth, list(seams), reasons, [100] * depth, 100 * depth + 50)
    block_facts.write(path.with_name("block-facts.parquet"), blocks, {})
    tables.write(path, table, schemas.CKA, {key: json.dumps(value) for key, value in facts.items()})


def write_costs(path, costs):
    """The table of `sensitivity` from costs [first, last]; NaN is not measured."""
    first, last = np.nonzero(np.isfinite(costs))
    table = {"first": first, "last": last, "velocity_error": costs[first, last], "rows": 8}
    tables.write(path, pd.DataFrame(table), schemas.SENSITIVITY, {})


def write_widths(path, depth, saved=30, output=6):
    """The table of `width` for a model whose last block's text nobody reads; cost grows with b."""
    rows = [
        {"kind": "text", "first": a, "last": b, "stream": "text", "cka": 0.99 - 0.05 * (b - a)}
        | {"parameters_saved": saved * (b - a) - output * (b < depth - 1)}
        | {"velocity_error": 0.01 * (b - a) + a / 10_000}
        for a, b in itertools.combinations(range(depth), 2)
        if b - a < 4
    ]
    rows += [
        {"kind": "ffn", "first": b, "last": b, "stream": stream, "cka": float("nan")}
        | {"parameters_saved": 20, "velocity_error": 0.006 + b / 5000}
        for b in range(depth)
        for stream in ("image", "text")
    ]
    matrices = modulations(depth)
    rows += [
        {"kind": "modulation", "first": m.block, "last": m.block, "stream": "", "path": m.path}
        | {"rank": rank, "cka": float("nan"), "parameters_saved": m.saved(rank)}
        | {"velocity_error": (0.001 + m.block / 10_000) / rank}
        for m in matrices
        for rank in (1, 2)
    ]
    table = pd.DataFrame(rows).assign(fit_error_heldout=0.1, rows=8)
    table = table.fillna({"path": "", "rank": 0})
    facts = {
        "text_saved": [saved] * depth,
        "text_output": [output] * (depth - 1) + [0],
        "text_lent": [25] * (depth - 1) + [0],
        "unread": depth - 1,
        "modulations": [asdict(matrix) for matrix in matrices],
    }
    facts = {name: json.dumps(value) for name, value in facts.items()}
    tables.write(path, table[schemas.WIDTH_MEASURED.names], schemas.WIDTH_MEASURED, facts)


def modulations(depth):
    """Of every block its text's, 42 parameters of which a borrower has none; and the last one."""
    of_blocks = [Modulation(b, "txt", 2, 14, ffn="text", text=True) for b in range(depth)]
    return [*of_blocks, Modulation(depth, "last", 2, 14)]


def run_stage(
    monkeypatch,
    folder,
    stream="mean",
    width=None,
    variants=None,
    latency=False,
    modulation=None,
    **chosen,
):
    """The stage's program in this process; the rows that it wrote."""
    choices = {
        "seed": 0,
        "similarity": {"streams": stream},
        "intervals": {"segmentation": "trend", "cost": "cka", "training_leaves": 1, **chosen},
        "width": {"enabled": False} if width is None else width,
        "modulation": {"enabled": False} if modulation is None else modulation,
        "variants": variants
        or [{"name": "small", "budget": 0.6}, {"name": "large", "budget": 0.9}],
    }
    script = SCRIPTS / "intervals.py"
    arguments = ["--config", json.dumps(choices)]
    used = ["block-facts", "cka", "sensitivity", "intervals"]
    used += ["probes"] if chosen.get("cost") == "influence" else []
    used += ["width", "candidates"] if width is not None or modulation is not None else []
    for table in used + ["latency"] * latency:
        arguments += [f"--{table}", str(folder / f"{table}.parquet")]
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    return judged(folder / "intervals.parquet", schemas.INTERVALS)


def subsets_without_overlap(choices, after=-1):
    """Every set of disjoint intervals, as tuples in order of depth."""
    yield ()
    for it in choices:
        if it.first > after:
            for rest in subsets_without_overlap(choices, it.last):
                yield (it, *rest)


def test_by_influence_the_blocks_of_least_influence_go(tmp_path, monkeypatch):
    """As ShortGPT removes them, whichever intervals that makes; the first has none before it."""
    depth, generator = 10, np.random.default_rng(5)
    influences = {stream: generator.exponential(size=depth) for stream in ("image", "text")}
    influences["image"][0] = influences["text"][0] = 0.0
    names = schemas.PROBES.names
    rows = [
        {"block": block, "stream": stream, "influence": value} | dict.fromkeys(names[2:-1], 1)
        for stream, values in influences.items()
        for block, value in enumerate(values)
    ]
    tables.write(tmp_path / "probes.parquet", pd.DataFrame(rows)[names], schemas.PROBES, {})
    write_cka(tmp_path / "cka.parquet", random_cka(3, depth))
    # 1050 parameters, at most 630 stay: 420 go.
    table = run_stage(monkeypatch, tmp_path, cost="influence", segmentation="optimal")
    selected = table[table["selected"]]
    gone = {b for row in selected.itertuples() for b in range(row.first + 1, row.last + 1)}
    mean = (influences["image"] + influences["text"]) / 2
    assert gone == {1 + b for b in np.argsort(mean[1:])[:5]}
    assert selected["cost"].sum() == pytest.approx(mean[sorted(gone)].sum())
    costs = intervals.by_influence(np.array([1.0, 2.0, np.nan, 4.0]))
    assert costs[0, 1] == 2 and costs[2, 3] == 4 and np.isnan([costs[0, 2], costs[1, 3]]).all()


def test_stage_lists_the_chain_and_the_selection_with_reasons(tmp_path, monkeypatch):
    cka = random_cka(3, 12)
    write_cka(tmp_path / "cka.parquet", cka)
    table = run_stage(monkeypatch, tmp_path, cka_floor=0.2, protect_first=1)
    chain = intervals.trend_chain(cka, [range(12)])
    trend = table[table["source"] == "trend"]
    assert list(zip(trend["first"], trend["last"], strict=True)) == chain
    assert table["cost"].tolist() == pytest.approx(1 - table["cka"])
    selected = table[table["selected"]]
    assert selected["removed_blocks"].sum() == 5  # 1250 parameters, at most 750 stay: 500 go
    blocks = [b for row in selected.itertuples() for b in range(row.first, row.last + 1)]
    assert len(set(blocks)) == len(blocks)
    assert 0 not in blocks
    assert (selected["cka"] >= 0.2).all()
    assert table["reason"].str.len().min() > 10
    assert "protected block 0" in table["reason"][0]
    assert not any(table.duplicated(["first", "last"]))


def test_stage_keeps_untouchable_blocks_and_blocks_without_cka(tmp_path, monkeypatch):
    cka = random_cka(4, 12)
    cka[5, :] = cka[:5, 5:] = np.nan
    write_cka(tmp_path / "cka.parquet", cka, untouchable=[9], seams=[0, 3])
    table = run_stage(monkeypatch, tmp_path, segmentation="optimal")
    for row in table.itertuples():
        assert not {5, 9} & set(range(row.first, row.last + 1))
        assert not row.first < 3 <= row.last
    assert table.loc[table["selected"], "removed_blocks"].sum() == 5


@pytest.mark.parametrize(("tolerance", "used"), [("bootstrap", 0.037), (0.5, 0.5)])
def test_stage_tolerance(tmp_path, monkeypatch, tolerance, used):
    cka = random_cka(5, 12)
    write_cka(tmp_path / "cka.parquet", cka, delta_noise={"mean": 0.037})
    table = run_stage(monkeypatch, tmp_path, tolerance=tolerance)
    assert (table["tolerance"] == used).all()
    chain = intervals.trend_chain(cka, [range(12)], used)
    assert len(chain) == (table["source"] == "trend").sum()
    assert len(chain) < len(intervals.trend_chain(cka, [range(12)]))


def test_stage_takes_no_noise_from_a_table_without_resamples(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(0, 6), bootstrap=0)
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, tmp_path, tolerance="bootstrap")
    assert "cka.parquet was made without; set a number" in capsys.readouterr().err


def test_stage_names_the_streams_that_there_are(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 4))
    with pytest.raises(SystemExit) as stopped:
        run_stage(monkeypatch, tmp_path, stream="text")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "similarity.streams 'text'; set it to one of mean" in message


def test_stage_refuses_a_table_without_its_own_facts(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 4))
    table = tables.read(tmp_path / "cka.parquet", schemas.CKA)
    tables.write(tmp_path / "cka.parquet", table, schemas.CKA, {"seed": "0"})
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, tmp_path)
    assert "cka.parquet: its provenance lacks 'delta_noise'" in capsys.readouterr().err


def test_stage_refuses_tables_of_another_teacher(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 4))
    fewer = BlockFacts(["b"] * 3, [0], {}, [100] * 3, 350)
    block_facts.write(tmp_path / "block-facts.parquet", fewer, {})
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, tmp_path)
    assert "cka.parquet names blocks that this teacher lacks" in capsys.readouterr().err


def test_stage_takes_what_was_measured_to_cost_least(tmp_path, monkeypatch):
    depth, longest = 9, 4
    cka, costs = random_cka(7, depth), np.random.default_rng(8).exponential(size=(depth, depth))
    costs[np.tril_indices(depth)] = costs[np.triu_indices(depth, longest)] = np.nan
    write_cka(tmp_path / "cka.parquet", cka)
    write_costs(tmp_path / "sensitivity.parquet", costs)
    chosen = {"segmentation": "optimal", "cost": "velocity", "tolerance": 0.2}
    table = run_stage(monkeypatch, tmp_path, **chosen)
    selected = table[table["selected"]]
    assert selected["removed_blocks"].sum() == 4  # 950 parameters, at most 570 stay: 380 go
    measured = [
        Interval(first, last, 1.0, costs[first, last])
        for first, last in itertools.combinations(range(depth), 2)
        if last - first < longest
    ]
    best = min(
        sum(it.cost for it in subset)
        for subset in subsets_without_overlap(measured)
        if sum(it.removed for it in subset) == 4
    )
    assert selected["cost"].sum() == pytest.approx(best)
    np.testing.assert_array_equal(table["cost"], costs[table["first"], table["last"]])
    # What training is expected to leave of them is the same for all of these: the same choice.
    scaled = run_stage(monkeypatch, tmp_path, **chosen, training_leaves=0.1)
    np.testing.assert_array_equal(scaled["selected"], table["selected"])
    np.testing.assert_allclose(scaled["cost"], 0.1 * table["cost"])
    # Eq. 5's runs that are longer than what was measured have no cost, and say so.
    without = table[table["removed_blocks"] >= longest]
    assert len(without) and without["cost"].isna().all() and not without["selected"].any()
    assert (without["reason"] == "has no measured cost: longer than sensitivity.longest").all()
    assert len(without) == table["cost"].isna().sum()

    cheapest = selected[["first", "last"]].to_numpy().tolist()
    by_cka = run_stage(monkeypatch, tmp_path, segmentation="optimal")
    assert by_cka.query("selected")[["first", "last"]].to_numpy().tolist() != cheapest


def test_stage_refuses_costs_of_a_deeper_model(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(6, 5))
    write_costs(tmp_path / "sensitivity.parquet", random_cka(6, 6))
    with pytest.raises(SystemExit) as stopped:
        run_stage(monkeypatch, tmp_path, cost="velocity")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "sensitivity.parquet names blocks that this teacher lacks" in message
    assert not (tmp_path / "intervals.parquet").exists()


# ---- width, latency, constraints


def candidates(folder):
    return judged(folder / "candidates.parquet", schemas.WIDTH_CANDIDATES)


def test_stage_chooses_depth_and_width_together(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(3, 8))
    write_widths(tmp_path / "width.parquet", 8)
    first, last = np.indices((8, 8))
    costs = np.where(last > first, 0.07 * (last - first) + first / 1000, np.nan)
    write_costs(tmp_path / "sensitivity.parquet", costs)
    table = run_stage(
        monkeypatch, tmp_path, width={}, segmentation="optimal", cost="velocity", protect_first=1
    )
    wide = candidates(tmp_path)
    assert len(wide) == sum(tables.read(tmp_path / "width.parquet").to_pandas()["rank"] == 0)
    assert wide["reason"].str.len().min() > 10
    taken, chosen = table[table["selected"]], wide[wide["selected"]]
    assert len(taken) and set(chosen["kind"]) == {"text", "ffn"}
    # 850 parameters, of which 510 may stay.
    pairs = [
        list(zip(t["first"], t["last"], strict=True))
        for t in (taken, chosen[chosen["kind"] == "text"])
    ]
    ffns = chosen[chosen["kind"] == "ffn"]
    ffns = list(zip(ffns["first"], ffns["stream"], strict=True))
    counted = Weights(
        [100] * 8,
        [30] * 8,
        [6] * 7 + [0],
        {(b, s): 20 for b in range(8) for s in ("image", "text")},
        source=dict.fromkeys(range(7), 25),
    )
    saved = savings.saved(*pairs, ffns, counted, unread=7)
    assert saved >= 340
    assert min(first for first, _ in [*pairs[0], *pairs[1], *ffns]) >= 1
    protected = wide[wide["first"] == 0]
    assert protected["reason"].str.contains("protected block 0").all()
    stamp = tables.provenance(tmp_path / "candidates.parquet")
    assert int(stamp["removed_parameters"]) == saved and stamp["blocks"] == "8"
    assert "no set that is enough costs less" in capsys.readouterr().out


def test_stage_says_why_a_width_is_not_used(tmp_path, monkeypatch):
    write_cka(tmp_path / "cka.parquet", random_cka(3, 8))
    write_widths(tmp_path / "width.parquet", 8)
    width = {
        "cka_floor": 0.9,
        "text": {"require": [[4, 6]], "forbid": [[0, 1]]},
        "ffn_image": {"require": [2], "forbid": [1]},
    }
    lists = {"require": [[2, 3], [5, 6]], "forbid": [[0, 1]]}
    variants = [{"name": "small", "budget": {"parameters": 850 - 200 - 24 - 20}}]
    table = run_stage(
        monkeypatch, tmp_path, width=width, variants=variants, segmentation="optimal", **lists
    )
    taken = table[table["selected"]]
    assert list(zip(taken["first"], taken["last"], strict=True)) == [(2, 3), (5, 6)]
    assert taken["reason"].str.startswith("required by intervals.require").all()
    why = {(r.kind, r.first, r.last, r.stream): r.reason for r in candidates(tmp_path).itertuples()}
    assert why["text", 4, 6, "text"] == "required by width.text.require"
    assert why["ffn", 2, 2, "image"] == "required by width.ffn_image.require"
    assert why["text", 0, 1, "text"] == "forbidden by width.text.forbid"
    assert why["ffn", 1, 1, "image"] == "forbidden by width.ffn_image.forbid"
    assert why["text", 0, 2, "text"] == "text cka 0.8900 is below width.cka_floor 0.9"
    assert why["text", 1, 2, "text"] == "would cut the selected interval [2,3]"
    assert why["text", 2, 3, "text"] == "inside the selected interval [2,3], it is one block"
    assert why["text", 6, 7, "text"] == "costs more at this budget than [4,6] on its blocks"
    assert why["ffn", 6, 6, "image"] == "goes with its block in the selected interval [5,6]"
    assert why["ffn", 5, 5, "text"].startswith("gone: its text stream is borrowed")
    assert why["ffn", 7, 7, "text"] == "not needed for the budget: other choices cost less"
    chosen = candidates(tmp_path).query("selected")
    assert len(chosen) == 2


def test_stage_takes_pins_that_nobody_measured_as_free(tmp_path, monkeypatch):
    write_cka(tmp_path / "cka.parquet", random_cka(3, 12))
    write_widths(tmp_path / "width.parquet", 12)
    costs = random_cka(4, 12)
    costs[np.triu_indices(12, 3)] = np.nan
    write_costs(tmp_path / "sensitivity.parquet", costs)
    table = run_stage(
        monkeypatch,
        tmp_path,
        width={"text": {"require": [[0, 6]]}},
        variants=[{"name": "small", "budget": {"blocks": 9}}],
        cost="velocity",
        require=[[8, 11]],
    )
    taken = table[table["selected"]]
    assert list(zip(taken["first"], taken["last"], strict=True)) == [(8, 11)]
    assert taken["reason"].str.startswith("required by intervals.require; not measured").all()
    run = candidates(tmp_path).query("selected").iloc[0]
    assert (run["first"], run["last"], run["parameters_saved"]) == (0, 6, 6 * 30 - 6)
    assert np.isnan(run["velocity_error"]) and "it counts as free" in run["reason"]


def test_stage_gives_modulations_low_rank(tmp_path, monkeypatch):
    """Also without anything else that is narrow; and says why not."""
    depth = 8
    write_cka(tmp_path / "cka.parquet", random_cka(3, depth))
    write_widths(tmp_path / "width.parquet", depth)
    ranks = [m.saved(1) for m in modulations(depth)]
    budget = {"parameters": 850 - sum(ranks[:2]) - 2 * ranks[2]}
    run_stage(
        monkeypatch,
        tmp_path,
        modulation={"require": [3, 8], "forbid": [0]},
        variants=[{"name": "small", "budget": budget}],
        segmentation="optimal",
        cka_floor=1.0,
    )
    table = candidates(tmp_path).set_index(["first", "rank"])
    assert set(table["kind"]) == {"modulation"} and len(table) == 2 * (depth + 1)
    taken = table[table["selected"]]
    assert {3, 8} <= {block for block, _ in taken.index} and len(taken) > 3
    assert taken["parameters_saved"].sum() >= 850 - budget["parameters"]
    assert table.loc[0, "reason"].tolist() == ["forbidden by modulation.forbid"] * 2
    assert taken.loc[3, "reason"].tolist() == ["required by modulation.require"]
    block, rank = next(index for index in taken.index if index[0] not in (3, 8))
    other = table.loc[block, 3 - rank]
    assert other["reason"] == f"rank {rank} of it costs less at this budget"
    assert taken.loc[block, rank]["reason"].startswith("in the cheapest set that saves")


def test_stage_counts_what_a_text_run_leaves_of_modulations(tmp_path, monkeypatch):
    """To the unread end: of the source's matrix a third, of the borrower's nothing."""
    depth = 6
    write_cka(tmp_path / "cka.parquet", random_cka(3, depth))
    write_widths(tmp_path / "width.parquet", depth)
    table = run_stage(
        monkeypatch,
        tmp_path,
        width={"text": {"require": [[3, 5]]}, "ffn_text": {"require": [1]}},
        modulation={"require": [1, 3, 4, 6]},
        variants=[{"name": "small", "budget": 1.0}],
        segmentation="optimal",
    )
    assert not table["selected"].any()
    chosen = candidates(tmp_path).query("selected")
    assert chosen.groupby("kind")["first"].apply(list).to_dict() == {
        "text": [3],
        "ffn": [1],
        "modulation": [1, 3, 6],
    }
    assert (chosen["reason"].str.startswith("required by ")).all()
    half, third, whole = (
        one.saved(2, sixths) for one, sixths in zip(modulations(2), (3, 2, 6), strict=True)
    )
    expected = 2 * 30 + 25 + 20 + half + third + whole
    stamp = tables.provenance(tmp_path / "candidates.parquet")
    assert int(stamp["removed_parameters"]) == expected
    reasons = candidates(tmp_path).set_index(["kind", "first", "stream", "rank"])["reason"]
    lent = "gone: nothing reads its text after the selected run [3,5]"
    assert reasons["ffn", 3, "text", 0] == lent
    borrowed = "gone: its text stream is borrowed in the selected run [3,5]"
    assert reasons["modulation", 4, "", 1] == reasons["ffn", 4, "text", 0] == borrowed


def test_stage_without_training_takes_costs_as_they_are(tmp_path, monkeypatch):
    write_cka(tmp_path / "cka.parquet", random_cka(3, 6))
    write_costs(tmp_path / "sensitivity.parquet", 1 - random_cka(4, 6))
    chosen = {"cost": "velocity", "training_leaves": 0.1, "tolerance": 0.2}
    trained, untrained = (
        run_stage(monkeypatch, tmp_path, **chosen, variants=[{"name": "v", "budget": 0.6} | train])
        for train in ({}, {"train": False})
    )
    np.testing.assert_allclose(trained["cost"], 0.1 * untrained["cost"])


def test_stage_meets_a_latency_budget(tmp_path, monkeypatch, capsys):
    write_cka(tmp_path / "cka.parquet", random_cka(3, 8))
    times = pd.DataFrame({"block": range(8), "part": "block", "seconds": [0.1] * 4 + [0.2] * 4})
    tables.write(
        tmp_path / "latency.parquet", times, schemas.LATENCY, {"transformer_seconds": "1.3"}
    )
    variants = [{"name": "fast", "budget": {"latency": 0.6}}, {"name": "p90", "budget": 0.9}]
    table = run_stage(
        monkeypatch, tmp_path, variants=variants, latency=True, segmentation="optimal"
    )
    gone = [
        b for r in table[table["selected"]].itertuples() for b in range(r.first + 1, r.last + 1)
    ]
    assert sum(times["seconds"][gone]) >= 0.4 * 1.3 and len(gone) >= 1
    assert "520 ms per call" in table.query("selected")["reason"].iloc[0]
    with pytest.raises(SystemExit):
        run_stage(monkeypatch, tmp_path, variants=variants)
    assert "name the block times, --latency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"require": [[2, 3]]},
            "intervals.require: [2,3] can't be had: the teacher's blocks are of anoth",
        ),
        (
            {"require": [[5, 6]]},
            "intervals.require: [5,6] can't be had: block 6 of this teacher can't be",
        ),
        ({"require": [[6, 8]]}, "intervals.require: [6,8] is beyond this teacher's blocks 0 to 7"),
        ({"width": {"text": {"require": [[0, 4]]}}}, "width.text.require: [0,4] can't be had"),
        ({"width": {"text": {"require": [[3, 5]]}}}, "not all of these blocks have a text stream"),
        (
            {"width": {"ffn_text": {"require": [4]}}},
            "width.ffn_text.require: block 4 can't be had: this",
        ),
        (
            {"modulation": {"require": [1]}},
            "modulation.require: block 1 can't be had: there is no modul",
        ),
    ],
)
def test_stage_refuses_pins_that_this_teacher_cannot_have(
    tmp_path, monkeypatch, capsys, chosen, message
):
    write_cka(tmp_path / "cka.parquet", random_cka(3, 8), seams=[0, 3], untouchable=[6])
    write_widths(tmp_path / "width.parquet", 8)
    measured = tables.read(tmp_path / "width.parquet").to_pandas()
    measured = measured[(measured["kind"] == "ffn") & (measured["first"] < 3)]
    facts = {"text_saved": [30] * 3 + [0] * 5, "text_output": [6] * 8, "text_lent": [0] * 8}
    facts |= {"unread": None, "modulations": []}
    facts = {name: json.dumps(value) for name, value in facts.items()}
    tables.write(tmp_path / "width.parquet", measured, schemas.WIDTH_MEASURED, facts)
    with pytest.raises(SystemExit) as stopped:
        run_stage(monkeypatch, tmp_path, **{"width": {}, **chosen})
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "intervals.parquet").exists()
