"""The comparison: its table of methods, equal sizes, every method end to end, resume, figures."""

import copy
import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from ppcl import provenance
from ppcl.ablation import (
    calibration,
    chain,
    method_training,
    methods,
    own_selections,
    phases,
    report,
    schedules,
    selections,
    trial,
)
from ppcl.ablation.material import Chosen, Material
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.figures import method_statistics
from ppcl.figures.schedule_comparison import schedule_comparison
from ppcl.pruning import students
from ppcl.pruning.units import NewBlock
from ppcl.search import probes
from ppcl.settings import AblationSettings, DistillSettings, Settings
from ppcl.storage import schemas, tables, tensors
from ppcl.training import loop, prices
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import State
from support import SCRIPTS, comparison_tables, tiny

BLOCKS, REMOVED, RANK = 8, 4, 3
# Parameters that go, beside so many blocks, with two matrices [192, 32] of each other block and
# the last one, [64, 32], at that rank: 32 inputs, and a bias that stays.
_SAVED = {out: 32 * out - RANK * (32 + out) for out in (192, 64)}
LOWERED = (BLOCKS - REMOVED) * 2 * _SAVED[192] + _SAVED[64]
SHARED = {
    "tokens": "tokens.parquet",
    "conditioning": "conditioning.safetensors",
    "probes": "probes.safetensors",
    "cka": "cka.parquet",
    "sensitivity": "sensitivity.parquet",
    "width": "width.parquet",
    "latency": "latency.parquet",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings and shared artifacts of a tiny run, by the stages' own programs."""
    folder = tmp_path_factory.mktemp("ablation")
    teacher = tiny.pipeline(folder / "teacher", blocks=BLOCKS)
    tiny.record(teacher, folder / "calls.parquet")
    given_ = {
        "seed": 0,
        "device": "cpu",
        "teacher": {"path": str(teacher)},
        "pipeline": tiny.SETTINGS,
        "extract": {"rows": 24, "batch_size": 4},
        "similarity": {"bootstrap": 4},
        "sensitivity": {"rows": 2},
        "width": {"rows": 2, "fit_rows": 8, "longest": 3, "cka_floor": 0.0},
        "evaluate": {"judge": "none", "bootstrap": 4, "latency_repeats": 1, "batch_size": 2},
        "ablation": {
            "removed_fraction": 0.4,
            "distill_steps": 4,
            "subsets_steps": 2,
            "finetune_steps": 1,
            "batch_size": 2,
            "velocity_rows": 4,
            "rank": RANK,
        },
    }
    whole = config.complete(given_, "test")
    at = {name: folder / file for name, file in SHARED.items()} | {
        "calls": folder / "calls.parquet"
    }
    moments, map_ = folder / "moments.safetensors", folder / "blocks.parquet"
    state, quality = folder / "state", folder / "quality.parquet"
    stages = {
        "extract": {
            "calls": at["calls"],
            "state": state,
            "moments": moments,
            "tokens": at["tokens"],
            "conditioning": at["conditioning"],
        },
        "probe": {
            "moments": moments,
            "tokens": at["tokens"],
            "probes_table": quality,
            "probes": at["probes"],
        },
        "similarity": {
            "tokens": at["tokens"],
            "probes": at["probes"],
            "cka": at["cka"],
            "blocks": map_,
        },
        "sensitivity": {"calls": at["calls"], "state": state, "table": at["sensitivity"]},
        "width": {
            "calls": at["calls"],
            "blocks": map_,
            "state": state,
            "table": at["width"],
            "maps": folder / "maps.safetensors",
        },
        "latency": {"calls": at["calls"], "table": at["latency"]},
    }
    for name, paths in stages.items():
        tiny.stage(name, whole, **paths)
    return whole, at


@pytest.fixture(scope="module")
def pipe(run):
    return tiny.load(run[0]["teacher"]["path"])


def material(run, pipe, job, tmp_path, accelerator) -> Material:
    whole, at = run
    shared = {name: at[name] for name in SHARED}
    transformer = pipe.transformer.requires_grad_(False).eval()
    context = tiny.context(transformer, calls.Reader(at["calls"]), 0, accelerator)
    return trial.material_of(context, Settings.of(whole), job, shared, State(tmp_path, "x"))


def ablate(run, job: str, folder) -> pd.DataFrame:
    whole, at = run
    paths = {"state": folder / "state", "output": folder / "run.parquet", "number": 0}
    tiny.stage("ablate", whole, method=job, **at, **paths)
    return tables.read(folder / "run.parquet", schemas.ABLATION_RUN).to_pandas()


# ---- the table


def test_every_rung_choice_and_rival_of_the_comparison_is_there():
    ladder = methods.of_group("ladder")
    assert ladder[0] == "sensitivity" and ladder[-1] == "low-rank" and len(ladder) == 13
    assert len(methods.of_group("choice")) >= 13 and len(methods.of_group("rival")) >= 10
    assert {m.group for m in methods.METHODS.values()} == set(methods.GROUPS)
    for group in methods.GROUPS:
        names = methods.of_group(group)
        assert len({methods.METHODS[name].label for name in names}) == len(names)
    assert {m.select["by"] for m in methods.METHODS.values()} == set(selections.SELECTIONS)
    for name in methods.METHODS:
        assert set(json.loads(methods.job(name))) == {"name", "select", "train"}
    assert {m.repeated for m in methods.METHODS.values() if m.group == "ladder"} == {True}
    known = {"mode", "subsets", "schedule", "start", "loss", "share", "draw", "mixed", "budgets"}
    known |= {"low_rank", "outliers", "ema"}
    draws = {m.train.get("draw", "uniform") for m in methods.METHODS.values()}
    assert draws == set(schedules.DRAWS)
    assert all(set(m.train) <= known for m in methods.METHODS.values())


def test_a_part_of_the_comparison_has_the_methods_that_it_names():
    assert methods.wanted(AblationSettings.of({"methods": []})) == list(methods.METHODS)
    assert methods.wanted(AblationSettings.of({"methods": ["joint", "chain"]})) == [
        "chain",
        "joint",
    ]
    with pytest.raises(UserError, match="no method 'joined'; choose among teacher, sensitivity"):
        methods.wanted(AblationSettings.of({"methods": ["joint", "joined"]}))


@given(st.integers(4, 500), st.integers(2, 500))
def test_every_method_trains_for_the_same_number_of_steps(distill, subsets):
    options = AblationSettings.of({"distill_steps": distill, "subsets_steps": subsets})
    for method in methods.METHODS.values():
        steps = phases.steps_of(method.select, method.train, options)
        assert sum(steps.values()) - steps["masks"] == distill + subsets
        assert steps["distill"] > 0 or method.train.get("share") in (0.5, 0.7, 1.0)
        if "share" in method.train:
            assert steps["subsets"] == round(method.train["share"] * (distill + subsets))
        assert bool(steps["narrow"]) == (method.train.get("schedule") == "staged")
        assert bool(steps["masks"]) == (method.select["by"] == "learned_masks")


def test_a_staged_selection_without_intervals_gives_its_maps_all_steps(
    run, pipe, tmp_path, accelerator, monkeypatch
):
    held = material(run, pipe, json.loads(methods.job("ffn")), tmp_path, accelerator)
    given = []
    monkeypatch.setattr(
        phases, "train", lambda _m, name, _x, _l, how, *_: given.append((name, how.steps))
    )
    method_training.teach(held, Chosen({}, ffns=((1, "image"),)), {"schedule": "staged"})
    assert given == [("narrow", 4), ("subsets", 2)]


def test_width_keeps_half_of_the_depth_cuts_unless_told_otherwise(run, pipe, tmp_path, accelerator):
    held = material(run, pipe, json.loads(methods.job("joint")), tmp_path, accelerator)
    for share, least in ((1.0, 4), (0.5, 2), (0.0, 0)):
        chosen = own_selections.depth_and_width(held, 4, depth_share=share)
        assert sum(last - first for first, last in chosen.starts) >= least


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_exactly_is_the_cheapest_of_all_sets(depth, removed, seed):
    rng = np.random.default_rng(seed)
    every = list(itertools.combinations(range(depth), 2))
    costs = {ends: float(rng.random()) for ends in every if rng.random() < 0.7}
    best = math.inf
    for size in range(len(costs) + 1):
        for chosen in itertools.combinations(costs, size):
            blocks_ = [b for f, t in chosen for b in range(f, t + 1)]
            if len(blocks_) == len(set(blocks_)) and sum(t - f for f, t in chosen) == removed:
                best = min(best, sum(costs[ends] for ends in chosen))
        if size > depth // 2:
            break
    if math.isinf(best):
        with pytest.raises(UserError, match="ablation.removed_fraction"):
            own_selections.exactly(costs, removed, depth)
    else:
        cheapest = own_selections.exactly(costs, removed, depth)
        assert sum(costs[ends] for ends in cheapest) == pytest.approx(best)
        assert sum(t - f for f, t in cheapest) == removed


# ---- runs


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_runs_and_removes_the_same(run, pipe, name, tmp_path, accelerator):
    job = json.loads(methods.job(name))
    given_ = material(run, pipe, job, tmp_path, accelerator)
    rows = trial.run(given_, pipe, job, selections.choose(given_, job["select"]))
    rows = pd.DataFrame(rows)[schemas.ABLATION_RUN.names]
    if name == "teacher":
        assert rows["velocity_error"].max() < 1e-9 and rows["parameter_fraction"].item() == 1
        return
    parts = rows[rows["state"] == "part"]
    assert len(parts) == (7 if "budgets" in job["train"] else 0)
    rows = rows.drop(parts.index)
    plain, low = ["plugged", "finetuned"], ["low_rank", "low_rank_finetuned"]
    kind = job["train"].get("low_rank", "no")
    states = {"no": plain, "also": plain + low, "only": low}[kind]
    assert rows["state"].tolist() == states
    masks = 2 if name == "tinyfusion" else 0
    assert rows["steps"].tolist() == [6 + masks, 7 + masks] * (len(states) // 2)
    assert (rows["velocity_error"] > 0).all() and rows["all_correct"].isna().all()
    if len(parts):
        wanted = rows["removed_parameters"].iloc[0] * np.arange(1, 8) / 8
        assert (parts["removed_parameters"] >= wanted).all()
        assert (parts["velocity_error"] > 0).all() and (parts["steps"] == 6).all()
    whole = blocks.parameter_count(tiny.transformer(BLOCKS))
    np.testing.assert_allclose(rows["parameter_fraction"], 1 - rows["removed_parameters"] / whole)
    block = blocks.parameter_count(tiny.transformer(1).transformer_blocks[0])
    lowered = rows[rows["state"].isin(low)]["removed_parameters"]
    if kind == "also":
        assert (lowered == REMOVED * block + LOWERED).all()
    elif kind == "only":
        wanted = REMOVED * block + LOWERED
        assert wanted <= lowered.min() == lowered.max() < wanted + block
        return
    saved = rows["removed_parameters"].iloc[0]
    if name == "latency":
        assert (rows["removed_blocks"] >= REMOVED / 2).all()
    elif methods.METHODS[name].select["by"] == "depth_and_width":
        assert REMOVED * block <= saved < (REMOVED + 1) * block
    else:
        assert saved == REMOVED * block and (rows["removed_blocks"] == REMOVED).all()


@pytest.mark.parametrize("script", ["ablate.py", "calibrate.py"])
def test_a_run_does_not_depend_on_the_table_of_methods(tmp_path, script):
    # Else a new method, or a mended label, would redo all runs.
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    before = provenance.code_digest(tmp_path / "scripts" / script)
    for name, same in (("methods", True), ("phases", False)):
        with open(tmp_path / "scripts/ppcl/ablation" / f"{name}.py", "a") as file:
            file.write("# edited\n")
        assert (provenance.code_digest(tmp_path / "scripts" / script) == before) == same


def test_seconds_are_those_of_finished_trainings_of_this_run(tmp_path, run, pipe, accelerator):
    job = json.loads(methods.job("joint"))
    held = material(run, pipe, job, tmp_path, accelerator)
    for name, identity, seconds in (("distill", "x distill", 2.5), ("subsets", "x subsets", 4.0)):
        path = tmp_path / f"{name}.safetensors"
        metadata = {"identity": identity, "seconds": repr(seconds)}
        tensors.write(path, {"a": torch.zeros(1)}, metadata)
    tensors.write(tmp_path / "old.safetensors", {}, {"identity": "y z", "seconds": "9.0"})
    assert phases.seconds_of(held, "distill", "subsets", "old", "finetune") == 6.5
    assert phases.seconds_of(held, "distill", "finetune") == 2.5


def test_a_killed_run_goes_on_and_ends_the_same(run, tmp_path, monkeypatch):
    job = methods.job("ffn")
    straight = ablate(run, job, tmp_path / "straight")
    train, begun = loop.train, []

    def stops_in_finetune(modules, *args, **kwargs):
        begun.append(set(modules))
        if "transformer" in modules:
            raise KeyboardInterrupt
        return train(modules, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stops_in_finetune)
        with pytest.raises(KeyboardInterrupt):
            ablate(run, job, tmp_path / "killed")
    assert len(begun) == 4  # distill, narrow, subsets, finetune
    seen = []
    monkeypatch.setattr(
        loop, "train", lambda m, *a, **k: [seen.append(set(m)), train(m, *a, **k)][1]
    )
    again = ablate(run, job, tmp_path / "killed")
    left = [path.name for path in (tmp_path / "killed/state").iterdir()]
    assert left == ["rows.parquet"]
    assert seen == [{"transformer"}]
    timed = ["seconds", "latency_ratio"]
    pd.testing.assert_frame_equal(straight.drop(columns=timed), again.drop(columns=timed))


# ---- schedules


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_every_draw_is_a_set_of_the_units_in_order(count, seed, step):
    rng = np.random.default_rng(seed)
    members = list(range(count))
    prices = rng.random(count).tolist(), rng.integers(1, 9, count).tolist()
    for draw in schedules.DRAWS.values():
        drawn = draw(members, prices)((seed, step))
        assert drawn and drawn == sorted(set(drawn)) and set(drawn) <= set(members)
        assert drawn == draw(members, prices)((seed, step))
    assert schedules.everything(members, prices)((seed, step)) == members


def test_large_sets_are_drawn_as_often_as_they_are_large():
    draw = schedules.large(list("abcd"), ([], []))
    sizes = np.bincount([len(draw((0, step))) for step in range(4000)], minlength=5)
    np.testing.assert_allclose(sizes / 4000, np.array([0, 1, 2, 3, 4]) / 10, atol=0.03)


def test_half_of_the_budget_draws_are_the_cheapest_of_their_size():
    costs, savings = [4.0, 1.0, 3.0, 2.0], [1, 1, 1, 1]
    draw = schedules.budgets(list("abcd"), (costs, savings))
    draws = ["".join(draw((1, step))) for step in range(4000)]
    # A budget asks for one to four units with equal chance; so do the uniform draws.
    for size, (cheapest, sets) in enumerate([("b", 4), ("bd", 6), ("bcd", 4), ("abcd", 1)], 1):
        expected = 0.125 + 0.125 / sets
        assert draws.count(cheapest) / 4000 == pytest.approx(expected, abs=0.025), size


def test_a_mixture_has_the_gradient_of_the_weighted_sum():
    weight = torch.tensor(2.0, requires_grad=True)
    first = lambda step: iter([("students", weight * step, {"velocity_error": weight})])  # noqa: E731
    second = lambda step: iter([("a", weight**2, {}), ("b", 3 * weight, {})])  # noqa: E731
    yielded = list(schedules.mixed(first, second, "students", 0.5)(4))
    assert [name for name, _, _ in yielded] == ["students"] * 3
    sum(loss for _, loss, _ in yielded).backward()
    assert weight.grad == 4 + 0.5 * (2 * 2 + 3)


# ---- gradients through the chain


def test_chain_losses_and_gradients_are_those_of_the_literal_chain(teacher, reader, accelerator):
    parts = [NewBlock(1, 2), NewBlock(4, 5)]
    made = students.start(teacher, parts, "first")
    for student in made.values():
        for parameter in student.parameters():
            parameter.data += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0)
            )
    options = DistillSettings.of(
        {
            "batch_size": 3,
            "loss": "normalised",
            "outliers": 0.0,
            "gradient_checkpointing": False,
        }
    )
    step = chain.through_chain(tiny.context(teacher, reader, 5, accelerator), made, options)
    ((name, loss, _),) = step(7)
    assert name == "students"
    loss.backward()
    gradients = {p: [x.grad for x in made[p].parameters()] for p in parts}

    literal = copy.deepcopy(teacher)
    twins = {p: copy.deepcopy(made[p]) for p in parts}
    for twin in twins.values():
        twin.zero_grad()
    own = teacher.transformer_blocks
    literal.transformer_blocks = nn.ModuleList([own[0], twins[parts[0]], own[3], twins[parts[1]]])
    batch = reader.batch(reader.draw(reader.rows(heldout=False), 3, (5, 7)))
    seen, wanted = {}, {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, at=at, kept=kept: kept.update({at: out}))
        for module, at, kept in (
            (twins[parts[0]], 0, seen),
            (twins[parts[1]], 1, seen),
            (own[2], 0, wanted),
            (own[5], 1, wanted),
        )
    ]
    literal(**batch.arguments)
    with torch.no_grad():
        teacher(**batch.arguments)
    for handle in handles:
        handle.remove()
    mask = batch.arguments["encoder_hidden_states_mask"].bool()
    total = 0.0
    for at, keep in itertools.product((0, 1), (mask, None)):  # text, then image
        position = 0 if keep is not None else 1
        if at == 1 and position == 0:
            continue  # nothing reads the last block's text
        unit = [
            side[at][position] / side[at][position].norm(dim=-1, keepdim=True)
            for side in (seen, wanted)
        ]
        each = (unit[0] - unit[1]).square().sum(-1)
        total = total + (each[keep].mean() if keep is not None else each.mean())
    torch.testing.assert_close(loss, total)
    total.backward()
    for part in parts:
        for mine, twin in zip(gradients[part], twins[part].parameters(), strict=True):
            if mine is None:
                assert twin.grad is None or not twin.grad.any()
            else:
                torch.testing.assert_close(mine, twin.grad, rtol=1e-3, atol=1e-6)


# ---- calibration


def test_composed_probes_do_what_the_probes_do_in_a_row():
    rng = np.random.default_rng(0)
    every = [probes.Probe(rng.normal(size=(5, 5)), rng.normal(size=5)) for _ in range(3)]
    x = rng.normal(size=(7, 5))
    expected = x
    for probe in every:
        expected = probe(expected)
    np.testing.assert_allclose(calibration.composed(every)(x), expected)


def test_calibration_measures_what_plugging_by_hand_gives(run, pipe, tmp_path):
    whole, at = run
    paths = {name: at[name] for name in ("calls", "probes", "cka", "sensitivity", "width")}
    output = tmp_path / "calibration.parquet"
    tiny.stage("calibrate", whole, **paths, state=tmp_path / "state", table=output)
    table = tables.read(output, schemas.CALIBRATION).to_pandas()
    assert set(table["kind"]) == {"depth", "text", "ffn_image", "ffn_text"}
    depth = table[table["kind"] == "depth"]
    assert set(depth["last"] - depth["first"] + 1) == set(calibration.LENGTHS)
    assert not table.duplicated(["kind", "first", "last"]).any()
    assert table.loc[table["kind"] != "depth", "cost_probe"].isna().all()
    assert table.loc[table["kind"].str.startswith("ffn"), "cost_cka"].isna().all()

    accelerator = Accelerator(cpu=True)  # the stage's own is gone
    held = material(run, pipe, json.loads(methods.job("joint")), tmp_path, accelerator)
    cka = pd.read_parquet(at["cka"]).set_index(["stream", "start", "end"])["cka"]
    weights, _ = own_selections.tensors.read(at["probes"])
    row = depth.iloc[-1]
    first, last = int(row["first"]), int(row["last"])
    assert row["cost_cka"] == pytest.approx(1 - cka["image", first - 1, last])
    made = students.start(pipe.transformer, [NewBlock(first, last)], "first")
    untrained = prices.error(held.context, made, held.judged, 2)
    assert row["cost_untrained"] == pytest.approx(untrained, rel=1e-4)

    literal = copy.deepcopy(pipe.transformer)  # every block of the interval, one probe each
    for index in range(first, last + 1):
        by_stream = {
            stream: [
                torch.from_numpy(weights[f"{stream}.{index}.{k}"].numpy()).float()
                for k in ("weight", "bias")
            ]
            for stream in ("text", "image")
            if f"{stream}.{index}.weight" in weights
        }

        def forward(hidden_states, encoder_hidden_states, *_a, maps=by_stream, **_k):
            given_ = {"text": encoder_hidden_states, "image": hidden_states}
            for stream, (w, b) in maps.items():
                given_[stream] = given_[stream] + given_[stream] @ w.T + b
            return given_["text"], given_["image"]

        literal.transformer_blocks[index].forward = forward
    error = power = 0.0
    for batch in held.context.reader.batches(held.judged, 2):
        error += float((literal(**batch.arguments)[0] - batch.output).double().square().sum())
        power += float(batch.output.double().square().sum())
    assert row["cost_probe"] == pytest.approx(error / power, rel=1e-3)


def test_calibration_draws_no_part_twice():
    widths = [
        width_row("text", first, last) for first in range(8) for last in range(first + 1, first + 4)
    ]
    drawn = calibration.sample([range(12)], widths, None, 0)
    parts = [part for _, unit in drawn for part in unit.new_blocks]
    assert len(parts) == len(set(parts))


def width_row(kind, first, last):
    return calibration.ClosedForm(kind, first, last, "text", 0.1, 0.9, 1, 0.1)


# ---- gathering and the figure


def test_gathered_rows_carry_groups_and_order_and_the_best_rivals(tmp_path):
    import gather_ablation

    table = comparison_tables.table()
    runs = table[schemas.ABLATION_RUN.names].sample(frac=1, random_state=0)
    again = gather_ablation.labelled(runs)
    assert again["order"].is_monotonic_increasing
    assert again["method"].drop_duplicates().tolist() == list(methods.METHODS)
    rivals = runs[runs["method"].isin(methods.of_group("rival")) & (runs["state"] == "finetuned")]
    means = rivals.groupby("method")["velocity_error"].mean().sort_values()
    assert gather_ablation.best(runs[runs["method"].isin(means.index)]) == means.index[:2].tolist()


def test_tables_for_a_reader_have_each_method_where_it_is_compared(tmp_path):
    import gather_ablation

    table = comparison_tables.table()
    tables.write(tmp_path / "a.parquet", table, schemas.ABLATION, {})
    paths = ["--results", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "a.md")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gather_ablation.py", "words", *paths])
        gather_ablation.main()
    text = (tmp_path / "a.md").read_text()
    sections = {part.split("\n")[0]: part for part in text.split("## ")[1:]}
    assert list(sections) == [*report.SECTIONS, "What was chosen"]
    low = "As large: everything, rivals with the same low-rank modulation"
    for method in methods.METHODS.values():
        titles = {title for title, part in sections.items() if f"| {method.label} |" in part}
        if method.group in ("teacher", "schedule"):
            assert titles <= set(list(sections)[1:3])
        else:
            assert (low in titles) == ("low_rank" in method.train)
            assert titles - {low} or method.train["low_rank"] == "only"
    state = (table["method"] == "ema") & (table["state"] == "finetuned")
    mean = table[state]["velocity_error"].item()
    row = next(line for line in sections["Open choices"].split("\n") if "moving average" in line)
    assert f"{mean:.4f} (" in row and row.endswith("| 0.590 | 0.90 |")


def test_intervals_over_seeds_are_students_of_the_pooled_spread():
    table = comparison_tables.table()
    table = table[table["state"] != "part"]
    table.loc[(table["method"] == "amber") & (table["seed"] == 1), "intervals"] = "[[1, 2]]"
    summary = method_statistics.summary(table, "velocity_error")
    logs = np.log(table["velocity_error"].clip(1e-12)).groupby([table["method"], table["state"]])
    several = logs.var()[logs.count() > 1].drop("amber", level="method")
    several = several.xs("plugged", level="state")
    spread, freedom = several.mean() ** 0.5, 2 * len(several)  # three seeds each
    for method, seeds in (("joint", 3), ("loss-mixed", 1)):
        row = summary.loc[method, "plugged"]
        reach = stats.t.ppf(0.975, freedom) * spread / seeds**0.5
        reach = (reach**2 + math.log(1.1) ** 2) ** 0.5  # and what the table says of prompts
        mean = logs.mean()[method, "plugged"]
        assert row["seeds"] == seeds and row["mean"] == pytest.approx(np.exp(mean))
        assert row["high"] == pytest.approx(np.exp(mean + reach))
    chance = summary.loc["amber", "plugged"]  # its seeds chose different blocks
    own = 4.302653 * logs.std()["amber", "plugged"] / 3**0.5  # t with 2 degrees of freedom
    own = (own**2 + math.log(1.1) ** 2) ** 0.5
    assert chance["high"] == pytest.approx(chance["mean"] * np.exp(own))
    alone = method_statistics.summary(  # over one prompt there is no interval; over seeds there is
        table.assign(velocity_error_low=np.nan, velocity_error_high=np.nan), "velocity_error"
    )
    assert 1 < (alone["high"] / alone["mean"])["joint", "plugged"] < row["high"] / row["mean"]


def test_ratios_are_of_the_same_prompts():
    rng = np.random.default_rng(0)
    every = comparison_tables.table()
    every = every[every["method"].isin(["joint", "shortgpt"]) & (every["state"] == "plugged")]
    errors, logs = rng.lognormal(size=(2, 3, 5)), {}  # of a method, seed and prompt
    rows = []
    for name, mine in zip(("joint", "shortgpt"), errors, strict=True):
        logs[name] = np.log(mine.sum(1) / 5)
        for row, sums in zip(every[every["method"] == name].to_dict("records"), mine, strict=True):
            text = json.dumps([sums.tolist(), [1.0] * 5])
            rows.append(row | {"velocity_error": sums.sum() / 5, "by_prompt": text})
    value, low, high = method_statistics.ratio(pd.DataFrame(rows), "joint", "shortgpt", "plugged")
    assert value == pytest.approx(np.exp(logs["joint"].mean() - logs["shortgpt"].mean()))
    # All draws of five prompts, each as likely as another.
    draws = np.array(list(itertools.product(range(5), repeat=5)))
    one, two = np.log(errors[..., draws].sum(-1)).mean(1)
    ends = np.percentile(one - two, [2.5, 97.5]) - np.log(value)
    spread = (logs["joint"].var(ddof=1) + logs["shortgpt"].var(ddof=1)) / 2
    reach = 2.776445 * (spread * 2 / 3) ** 0.5  # t with 4 degrees of freedom
    expected = np.exp(np.log(value) + np.array([-1, 1]) * np.hypot(reach, ends))
    np.testing.assert_allclose((low, high), expected, rtol=0.05)
    alike = [row | {"by_prompt": rows[0]["by_prompt"], "velocity_error": 0.5} for row in rows]
    assert method_statistics.ratio(pd.DataFrame(alike), "joint", "shortgpt", "plugged") == (1, 1, 1)


@pytest.mark.parametrize("judged", [True, False])
def test_the_figure_names_every_method(tmp_path, judged):
    from support.plotting import draw, svg_text

    table = comparison_tables.table(judged)
    path = tmp_path / "results.parquet"
    tables.write(path, table, schemas.ABLATION, {"commit": "0", "created": "now"})
    draw("ablation", "--config", "{}", "--results", path, "--output", tmp_path)
    text = svg_text(tmp_path / "ablation.svg")
    schedules_, low = (svg_text(tmp_path / f"{name}.svg") for name in ("schedules", "low_rank"))
    for method in methods.METHODS.values():
        kind = method.train.get("low_rank", "no")
        if method.group == "schedule":
            assert method.label in schedules_
        elif method.group != "teacher":
            assert (method.label in text) == (kind != "only")
            assert (method.label in low) == (kind != "no")
    assert ("all three right" in text) == judged


def test_the_figure_of_schedules_divides_by_the_first(tmp_path):
    table = comparison_tables.table()
    ax = schedule_comparison(table).axes[0]
    mine = table[table["group"] == "schedule"].sort_values("removed_parameters")
    of = {name: rows for name, rows in mine.groupby("method")}
    first, third = of["schedule-default"], of["schedule-whole"]
    shown = [text.get_text() for text in ax.texts]
    columns = 9  # seven parts, plugged, fine-tuned
    assert len(shown) == columns * len(of)
    for state, place in (("plugged", 7), ("finetuned", 8)):
        ratio = [rows[rows["state"] == state]["velocity_error"].item() for rows in (third, first)]
        assert shown[2 * columns + place] == f"{ratio[0] / ratio[1]:.2f}"
    parts = [rows[rows["state"] == "part"]["velocity_error"].to_numpy() for rows in (third, first)]
    assert shown[2 * columns : 2 * columns + 7] == [f"{r:.2f}" for r in parts[0] / parts[1]]
