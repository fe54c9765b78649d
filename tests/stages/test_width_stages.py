"""The programs of stage 2, from measured prices to a folder that meets a latency budget."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from ppcl.ablation import trial
from ppcl.ablation.material import Material
from ppcl.closed_forms import linear_map_fits, linear_maps
from ppcl.closed_forms.linear_maps import Map
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.evaluation import measuring
from ppcl.export import assembly
from ppcl.pruning import selection_file, students
from ppcl.pruning.units import Modulation, NewBlock, new_blocks_of, units_of
from ppcl.runtime import processes
from ppcl.settings import Settings
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines
from ppcl.training import prices
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import State
from support import tiny
from support.killing import assert_same_log, equal, kill_and_resume
from support.map_prices import measure, settings_of, similar


def refused(capsys, name, settings, **paths):
    """The one message that a program ends with."""
    with pytest.raises(SystemExit) as stopped:
        tiny.stage(name, settings, **paths)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in printed
    return printed


# ---- prices


def test_every_candidate_has_its_price(tiny_teacher, tiny_calls, tmp_path):
    candidates = measure(tiny_teacher, tiny_calls, tmp_path)
    modulations = candidates[candidates["kind"] == "modulation"]
    candidates = candidates[candidates["kind"] != "modulation"]
    ffns, runs = candidates[candidates["kind"] == "ffn"], candidates[candidates["kind"] == "text"]
    both = [(block, stream) for block in range(5) for stream in ("image", "text")]
    assert list(zip(ffns["first"], ffns["stream"], strict=True)) == both
    assert (ffns["first"] == ffns["last"]).all() and ffns["cka"].isna().all()
    ends = [tuple(pair) for pair in runs[["first", "last"]].to_numpy().tolist()]
    # Up to three blocks; none holds both 1, as its first, and 3.
    assert ends == [(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4)]
    assert runs["cka"].tolist() == [0.9] * 6
    # A random teacher's text after the last block is not read: its FFN is free.
    free = (candidates["first"] == 4) & (candidates["stream"] == "text")
    assert candidates.loc[free, "velocity_error"].max() < 1e-9
    assert candidates.loc[~free, "velocity_error"].min() > 1e-9 and (candidates["rows"] == 3).all()
    assert (candidates["parameters_saved"] > 0).all()
    sizes = tables.provenance(tmp_path / "w.parquet")
    assert json.loads(sizes["text_output"]) == [32 * 32 + 32] * 4 + [0]
    assert (candidates["path"] == "").all() and (candidates["rank"] == 0).all()
    # Each matrix of every block and the last one's, at 2, 4 and 8: what gets silu(temb) of six
    # timesteps and no more has five directions.
    every = [Modulation(**entry) for entry in json.loads(sizes["modulations"])]
    assert [one.key for one in every] == [
        *((block, f"{name}_mod.1") for block in range(5) for name in ("img", "txt")),
        (5, "norm_out.linear"),
    ]
    ranks = sorted(set(modulations["rank"]))
    assert len(modulations) == len(every) * len(ranks) and ranks[:2] == [2, 3]
    saved = modulations.set_index(["first", "path", "rank"])["parameters_saved"]
    assert saved[0, "img_mod.1", 2] == 32 * 6 * 32 - 2 * (32 + 6 * 32)
    assert saved[5, "norm_out.linear", 4] == 32 * 2 * 32 - 4 * (32 + 2 * 32)
    costs = modulations.pivot_table(
        index=["first", "path"], columns="rank", values=["velocity_error", "fit_error_heldout"]
    )
    for column in ("velocity_error", "fit_error_heldout"):
        assert (costs[column][2] >= costs[column][4]).all() and costs[column].min().min() >= 0
    assert costs["velocity_error"][2].max() > 1e-9


def test_either_kind_of_closed_form_may_be_off(tiny_teacher, tiny_calls, tmp_path):
    """And each costs what it does beside the other."""
    whole = measure(tiny_teacher, tiny_calls, tmp_path, rank=3)
    is_modulation = whole["kind"] == "modulation"
    for name, without in (("narrow", "conditioning"), ("lower", "blocks")):
        alone = measure(tiny_teacher, tiny_calls, tmp_path, name, (without,), rank=3)
        wanted = whole[is_modulation if name == "lower" else ~is_modulation]
        pd.testing.assert_frame_equal(alone, wanted.reset_index(drop=True))
        maps = linear_maps.stored(tmp_path / f"{name}.safetensors")
        assert bool(len(maps)) == (name == "narrow")
    assert set(whole["rank"]) == {0, 3}


def test_maps_in_the_file_are_those_that_were_priced(tiny_teacher, tiny_calls, tmp_path):
    candidates = measure(tiny_teacher, tiny_calls, tmp_path, without=("conditioning",))
    transformer = tiny.load(tiny_teacher).transformer
    maps = linear_maps.stored(tmp_path / "w.safetensors")
    last = linear_maps.unread_after(transformer)
    reader = calls.Reader(tiny_calls)
    rows = reader.sample_heldout("select", 3, 0)
    for row in (
        candidates[candidates["kind"] == "ffn"].iloc[2],
        candidates[candidates["kind"] == "text"].iloc[1],
    ):
        if row["kind"] == "ffn":
            units = units_of([], [], [(row["first"], row["stream"])], last)
        else:
            units = units_of([], [(row["first"], row["last"])], (), last)
        made = linear_maps.closed(transformer, units[0].new_blocks, maps)
        cost = prices.error(tiny.context(transformer, reader), made, rows, 4)
        assert cost == pytest.approx(row["velocity_error"], rel=1e-5)
        with pytest.raises(ValueError, match="no kept block"):
            linear_maps.closed(transformer, [NewBlock(1, 2)], maps)
    with pytest.raises(UserError, match=r"w\.safetensors has no map ffn/image\.07"):
        maps[Map("ffn/image", (7, 7), (7, 7))]


def test_stopped_prices_go_on_where_they_were(tiny_teacher, tiny_calls, tmp_path, monkeypatch):
    pieces, fitted = [], []  # of work: changes alone, and those that are measured together
    stops = [None, 5, None]
    fit, own = (
        linear_map_fits._fit,
        {name: getattr(prices.Judged, name) for name in ("error", "errors")},
    )

    def stopping(name, *given):
        pieces.append(name)
        if len(pieces) == stops[0]:
            raise KeyboardInterrupt
        return own[name](*given)

    for name in own:
        monkeypatch.setattr(prices.Judged, name, lambda *given, name=name: stopping(name, *given))
    whole = measure(tiny_teacher, tiny_calls, tmp_path, "whole")
    assert set(pieces) == set(own) and len(pieces) < len(whole)
    shutil.rmtree(tmp_path / "state")
    once = len(pieces)
    pieces.clear()
    stops.pop(0)
    monkeypatch.setattr(linear_map_fits, "_fit", lambda *a: fitted.append(1) or fit(*a))
    with pytest.raises(KeyboardInterrupt):
        measure(tiny_teacher, tiny_calls, tmp_path, "stopped")
    assert not (tmp_path / "stopped.parquet").exists()
    stops.pop(0)
    resumed = measure(tiny_teacher, tiny_calls, tmp_path, "stopped")
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert len(pieces) == once + 1  # only the piece that was stopped is measured twice
    assert len(fitted) == 1  # and nothing is fitted twice
    assert equal(tmp_path / "stopped.safetensors", tmp_path / "whole.safetensors")


# ---- from block times to a folder


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls, tmp_path_factory):
    """Paths of a staged run: times, selection, distilled and narrow students; and its settings."""
    folder = tmp_path_factory.mktemp("stages")
    settings = settings_of(tiny_teacher)
    tiny.stage("latency", settings, calls=tiny_calls, table=folder / "latency.parquet")
    tiny.stage(
        "prune",
        settings,
        intervals=tiny.intervals(folder / "i.parquet", [(0, 1)]),
        candidates=tiny.candidates(folder / "c.parquet", [(2, 3)], [(0, "image"), (4, "text")]),
        latency=folder / "latency.parquet",
        calls=tiny_calls,
        selection=folder / "selection.json",
        students=folder / "start.safetensors",
    )
    common = {"calls": tiny_calls, "selection": folder / "selection.json"}
    tiny.stage("distill", settings, **common, **outputs(folder, "distill", "start"))
    tiny.stage("narrow", settings, **common, **outputs(folder, "narrow", "distill"))
    return folder, settings, common


def outputs(folder, name, students_of):
    return {
        "students": folder / f"{students_of}.safetensors",
        "state": folder / name / "state",
        "output": folder / f"{name}.safetensors",
        "log_table": folder / f"{name}-log.parquet",
        "unit_costs": folder / f"{name}-unit_costs.parquet",
    }


def test_times_are_of_every_part(world):
    folder, _, _ = world
    table = tables.read(folder / "latency.parquet", schemas.LATENCY).to_pandas()
    parts = ["block", "ffn_image", "ffn_text", "text"]
    assert sorted(zip(table["block"], table["part"], strict=True)) == [
        (block, part) for block in range(5) for part in parts
    ]
    assert (table.groupby("part")["seconds"].nunique() == 1).all()  # all blocks are alike
    seconds = table[table["block"] == 0].set_index("part")["seconds"]
    whole = float(tables.provenance(folder / "latency.parquet")["transformer_seconds"])
    assert 0 < 3 * seconds["block"] < whole * 2 and seconds.min() >= 0


def test_a_staged_plan_trains_depth_first(world):
    folder, _, _ = world
    selection = selection_file.read(folder / "selection.json")
    assert [unit.name for unit in selection.units] == ["00-01", "02-03", "04-04"]
    assert [unit.name for unit in selection.distilled] == ["00-01"]
    assert (
        not selection.distilled[0].new_blocks[0].narrow and selection.units[0].new_blocks[0].narrow
    )
    seconds = tables.read(folder / "latency.parquet", schemas.LATENCY).to_pandas()
    seconds = seconds[seconds["block"] == 0].set_index("part")["seconds"]
    saved = [entry["saved_seconds"] for entry in selection.facts["units"]]
    expected = [seconds["block"] + seconds["ffn_image"], seconds["text"], seconds["ffn_text"]]
    assert saved == pytest.approx(expected)
    distilled, narrow = (
        tensors.read(folder / f"{n}.safetensors")[0] for n in ("distill", "narrow")
    )
    assert {key.split("/")[0] for key in distilled} == {"00-01"}
    assert {key.split("/")[0] for key in narrow} == {"00-01", "02-02", "03-03", "04-04"}
    log = tables.read(folder / "narrow-log.parquet", schemas.DISTILL_LOG).to_pandas()
    linear = log.groupby("interval")["loss_linear"].min()
    assert np.isnan(linear["02-02"]) and (linear[["00-01", "03-03"]] > 0).all()


def test_a_killed_narrowing_ends_with_the_same_students(world):
    folder, settings, common = world
    (folder / "killed").mkdir()
    paths = common | outputs(folder / "killed", "narrow", "distill")
    paths["students"] = folder / "distill.safetensors"
    kill_and_resume("narrow", settings, paths)
    assert equal(paths["output"], folder / "narrow.safetensors")
    assert_same_log(paths["log_table"], folder / "narrow-log.parquet", schemas.DISTILL_LOG)


def narrow_sets(folder, name="all"):
    """What models and searches are made from, of narrow students alone."""
    return {
        "sets": tiny.chosen(folder / "sets.json", folder / "selection.json", "narrow", name),
        "narrow": folder / "narrow.safetensors",
        "narrow_unit_costs": folder / "narrow-unit_costs.parquet",
    }


def test_pareto_is_of_all_budgets(world, tiny_teacher, tiny_calls):
    folder, settings, common = world
    made = narrow_sets(folder)
    points = folder / "points.parquet"
    tiny.stage("pareto", settings, **common, **made, points=points)
    table = tables.read(points, schemas.POINTS).to_pandas()
    assert len(table) == 4 and table["budget"].is_monotonic_increasing
    assert table["parameters"].is_monotonic_increasing
    assert (table["parameter_fraction"] <= table["budget"] + 1e-4).all()
    # Of one prompt to report on there is no interval.
    assert not (table["velocity_error_low"] > table["velocity_error"]).any()

    selection, reader = selection_file.read(folder / "selection.json"), calls.Reader(tiny_calls)
    errors = (
        tables.read(made["narrow_unit_costs"], schemas.UNIT_COSTS).to_pandas().set_index("unit")
    )
    named = [[unit["name"] for unit in json.loads(text)["units"]] for text in table["units"]]
    for names, predicted in zip(named, table["predicted_error"], strict=True):
        assert predicted == pytest.approx(errors.loc[names, "velocity_error"].sum())
    smallest = table.iloc[0]
    assert named[0] == [unit.name for unit in selection.units]
    teacher = tiny.load(tiny_teacher).transformer
    trained = students.load(made["narrow"], teacher, new_blocks_of(selection.units))
    model, _ = blocks.assembled(teacher, {part.ends: s for part, s in trained.items()})
    assert smallest["parameters"] == blocks.parameter_count(model)
    error = power = 0.0
    for row in reader.sample_heldout("report", 4, 0):
        one = reader.batch(np.array([row]))
        with torch.no_grad():
            answer = model(**one.arguments)[0].double()
        error += (answer - one.output.double()).square().sum().item()
        power += one.output.double().square().sum().item()
    assert smallest["velocity_error"] == pytest.approx(error / power, rel=1e-3)


def test_pareto_and_the_ablation_measure_what_is_exported(
    world, monkeypatch, accelerator, tmp_path
):
    """Of a teacher in bfloat16 whose class keeps some weights in float32, as Wan's does."""
    monkeypatch.setattr(QwenImageTransformer2DModel, "_keep_in_fp32_modules", ["img_mod"])
    folder, settings, common = world
    teacher = settings["teacher"] | {"dtype": "bfloat16"}
    selection = selection_file.read(folder / "selection.json")
    saved = sum(entry["saved_parameters"] for entry in selection.facts["units"])
    smallest = 1 - saved / selection.facts["transformer_parameters"]
    variants = [{"name": "all", "budget": smallest + 1e-9}]
    settings = settings | {"teacher": teacher, "variants": variants}
    made = narrow_sets(folder)
    seen = {}

    def measured(transformers, *_):
        seen["pareto"] = transformers["budget 0"]
        raise SystemExit(0)

    monkeypatch.setattr(measuring, "measure_transformers", measured)
    with pytest.raises(SystemExit):
        tiny.stage("pareto", settings, **common, **made, points=tmp_path / "points.parquet")
    monkeypatch.setattr(assembly, "export", lambda _pipe, model, *_: seen.update(exported=model))
    of_variant = {"calls": common["calls"], "sets": made["sets"], "narrow": made["narrow"]}
    tiny.stage("assemble", settings, **of_variant, variant="all", output=tmp_path / "all")

    source = tiny.source(teacher["path"]).replace(dtype="bfloat16")
    transformer = pipelines.load_transformer(source, torch.device("cpu"))
    trained = students.load(made["narrow"], transformer, new_blocks_of(selection.units))
    options = Settings.of(config.complete(settings, "test"))
    options = options.replace(ablation=options.ablation.replace(finetune_steps=0))
    alone, reader = processes.accelerator("cpu"), calls.Reader(common["calls"])
    material = Material(
        tiny.context(transformer, reader, 0, alone), options, {}, State(tmp_path, "i")
    )
    seen["ablation"] = trial.finetuned(material, trained, False)
    exported = seen.pop("exported").state_dict()
    for name, model in seen.items():
        state = model.state_dict()
        assert state.keys() == exported.keys(), name
        for key, value in exported.items():
            assert state[key].dtype == value.dtype and torch.equal(state[key], value), (name, key)
    own = trained[selection.units[0].new_blocks[0]].state_dict()
    for key in ("img_mod.1.weight", "attn.to_q.weight"):
        held = exported[f"transformer_blocks.0.{key}"]
        kept = key.startswith("img_mod")
        assert held.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(held.float(), own[key]) == kept


def test_a_latency_budget_ends_in_a_folder(world, tmp_path, monkeypatch):
    folder, settings, common = world
    selection = selection_file.read(folder / "selection.json").facts
    saved = {entry["name"]: entry["saved_seconds"] for entry in selection["units"]}
    # What 00-01 saves and nothing else does.
    assert saved["00-01"] > saved["02-03"] + saved["04-04"]
    budget = 1 - 0.99 * saved["00-01"] / selection["transformer_seconds"]
    settings = settings | {"variants": [{"name": "fast", "budget": {"latency": budget}}]}
    made = {name: tmp_path / f"{name}.parquet" for name in ("units", "measured")}
    made |= {"sets": tmp_path / "sets.json", "state": tmp_path / "state"}
    made |= {"refitted": tmp_path / "refits.safetensors"}
    given = narrow_sets(folder) | {"latency": folder / "latency.parquet"}
    tiny.stage("choose", settings, **common, **given | made)
    paths = {"calls": common["calls"], "sets": made["sets"], "narrow": given["narrow"]}
    paths |= {"variant": "fast", "output": tmp_path / "fast"}
    monkeypatch.setattr("ppcl.export.assembly.prove", lambda *_: None)  # test_narrow_export has it
    tiny.stage("assemble", settings, **paths)
    card = json.loads((tmp_path / "fast" / "pruning.json").read_text())
    assert "00-01" in {unit["name"] for unit in card["units"]}
    source = tiny.source(tmp_path / "fast").replace(trust_remote_code=True)
    transformer = pipelines.load_transformer(source, torch.device("cpu"))
    assert blocks.parameter_count(transformer) == card["parameters"]
    assert len(transformer.transformer_blocks) == 4


# ---- bad input


def test_prune_refuses_what_is_not_a_selection(world, tiny_calls, tmp_path, capsys):
    folder, settings, _ = world
    paths = {
        "intervals": folder / "i.parquet",
        "candidates": folder / "c.parquet",
        "calls": tiny_calls,
        "selection": tmp_path / "selection.json",
        "students": tmp_path / "start.safetensors",
    }
    beyond = tiny.candidates(tmp_path / "beyond.parquet", [], [(7, "image")])
    for given, message in (
        ({"candidates": beyond}, "names blocks that this teacher lacks"),
        ({"candidates": tmp_path / "no.parquet"}, "no.parquet: no such file"),
        ({"candidates": folder / "i.parquet"}, "i.parquet"),
        ({"latency": tmp_path / "no.parquet"}, "no.parquet: no such file"),
    ):
        assert message in refused(capsys, "prune", settings, **paths | given)
        assert not paths["selection"].exists()


def test_width_and_latency_refuse_what_they_cannot_read(world, tiny_calls, tmp_path, capsys):
    _, settings, _ = world
    paths = {"calls": tiny_calls, "state": tmp_path / "state", "table": tmp_path / "w.parquet"}
    paths["maps"] = tmp_path / "maps.safetensors"
    missing = tmp_path / "no.parquet"
    assert "no.parquet: no such file" in refused(capsys, "width", settings, blocks=missing, **paths)
    deeper = similar(tmp_path / "deeper.parquet", depth=7)
    printed = refused(capsys, "width", settings, blocks=deeper, **paths)
    assert "deeper.parquet names blocks that this teacher lacks" in printed
    printed = refused(capsys, "latency", settings, calls=missing, table=paths["table"])
    assert "no.parquet: no such file" in printed


def test_narrow_refuses_students_that_do_not_fit(world, tmp_path, capsys):
    folder, settings, common = world
    paths = common | outputs(tmp_path, "narrow", "x")
    paths["students"] = folder / "narrow.safetensors"  # narrow already
    assert "does not fit block 00-01" in refused(capsys, "narrow", settings, **paths)


def test_a_staged_selection_without_depth_only_narrows(world, tiny_calls, tmp_path):
    _, settings, _ = world
    tiny.stage(
        "prune",
        settings,
        intervals=tiny.intervals(tmp_path / "i.parquet", []),
        candidates=tiny.candidates(tmp_path / "c.parquet", [(2, 3)], []),
        calls=tiny_calls,
        selection=tmp_path / "selection.json",
        students=tmp_path / "start.safetensors",
    )
    common = {"calls": tiny_calls, "selection": tmp_path / "selection.json"}
    tiny.stage("distill", settings, **common, **outputs(tmp_path, "distill", "start"))
    tiny.stage("narrow", settings, **common, **outputs(tmp_path, "narrow", "distill"))
    made = tensors.read(tmp_path / "narrow.safetensors")[0]
    assert {key.split("/")[0] for key in made} == {"02-02", "03-03"}
