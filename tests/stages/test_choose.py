"""The stage choose, and models of the sets that it writes."""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ppcl.closed_forms import linear_map_fits, linear_map_refits, linear_maps
from ppcl.closed_forms.linear_maps import Map
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.evaluation import measuring, velocities
from ppcl.export import variants
from ppcl.export.variant_files import Files
from ppcl.pruning import constraints, narrow, selection_file
from ppcl.pruning.units import NewBlock, Unit
from ppcl.search import offers, sets, sets_file
from ppcl.search.selection import Choices
from ppcl.search.sets import Member, Set
from ppcl.settings import Settings
from ppcl.storage import schemas, tables, tensors
from ppcl.teacher import pipelines
from ppcl.training import prices
from ppcl.transformer import blocks, calls
from support import SCRIPTS, fresh, tiny
from support.map_prices import measure

VARIANTS = [
    {"name": "tight", "budget": {"fraction": 0.5, "blocks": 4}, "finetune_steps": 2},
    {"name": "small", "budget": 0.6},
    {"name": "free", "budget": 0.7, "train": False},
]


@pytest.fixture(scope="module")
def world(tiny_teacher, tiny_calls, tmp_path_factory):
    """Settings, and what choose takes: prices of all closed forms, a selection of one interval and
    one block without FFNs, and students that two trainings might have left."""
    folder = tmp_path_factory.mktemp("choose")
    measure(tiny_teacher, tiny_calls, folder, ladder=[2, 4])
    settings, given = tiny.pruned(
        folder,
        tiny_teacher,
        tiny_calls,
        ffns=((3, "image"), (3, "text")),
        runs=((1, 2),),
        variants=VARIANTS,
        width={"rows": 3, "fit_rows": 8, "batch_size": 4, "longest": 3, "cka_floor": 0.0},
        finetune={"batch_size": 4, "warmup_steps": 1},
        pareto={"budgets": 3},
        evaluate={"batch_size": 2, "velocity_rows": 4, "bootstrap": 10, "latency_repeats": 1},
    )
    selection = selection_file.read(given["selection"])
    start, _ = tensors.read(given["students"])
    files = {"start": given["students"]}
    for stage, moved, error in (("distill", 1e-3, 3e-3), ("subsets", 1e-2, 2e-3)):
        torch.manual_seed(0)
        state = {name: value + moved * torch.randn_like(value) for name, value in start.items()}
        files[stage] = folder / f"{stage}.safetensors"
        tensors.write(files[stage], state, {})
        costs = pd.DataFrame({"unit": [u.name for u in selection.units], "velocity_error": error})
        costs = costs.assign(rows=4, removed_blocks=0, saved_seconds=float("nan"))
        costs = costs.assign(saved_parameters=1, first=0, last=0)[schemas.UNIT_COSTS.names]
        files[f"{stage}_unit_costs"] = folder / f"{stage}.parquet"
        tables.write(files[f"{stage}_unit_costs"], costs, schemas.UNIT_COSTS, {})
    files |= {"maps": folder / "w.safetensors", "conditioning": folder / "conditioning.safetensors"}
    return settings, files, {"selection": given["selection"], "width": folder / "w.parquet"}, folder


@pytest.fixture(scope="module")
def chosen(world, tiny_calls):
    """The stage's files, made by a run that was killed once."""
    settings, files, prices_, folder = world
    made = {name: folder / f"{name}.parquet" for name in ("units", "measured")}
    made |= {"refitted": folder / "refits.safetensors"}
    paths = {"calls": tiny_calls, "state": folder / "state-choose", "sets": folder / "sets.json"}
    paths |= files | prices_ | made
    asked, error = [], prices.Judged.error

    def stopping(self, model, first):
        if len(asked) == 3:
            raise SystemExit(1)
        asked.append(first)
        return error(self, model, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prices.Judged, "error", stopping)
        with pytest.raises(SystemExit):
            tiny.stage("choose", settings, **paths)
        assert not paths["sets"].exists()
        kept = json.loads((paths["state"] / "0.json").read_text())["errors"]
        seen = []
        patch.setattr(prices.Judged, "error", lambda *a: seen.append(1) or error(*a))
        tiny.stage("choose", settings, **paths)
    everything = json.loads((paths["state"] / "0.json").read_text())["errors"]
    assert len(seen) == len(everything) - len(kept)  # none of those that were kept
    return paths


def workshop(tiny_teacher, world, refits=None, **options):
    files = world[1] | world[2]
    transformer = pipelines.load_transformer(tiny.source(tiny_teacher), torch.device("cpu"))
    sources = (sets.START, *sets.TRAINED)
    given = Files(
        files["width"],
        files["maps"],
        files["conditioning"],
        None,
        refits,
        {source: files[source] for source in sources if source in files},
    )
    return transformer, variants.Workshop(transformer, given, **options)


def test_sets_keep_their_budgets_and_models_have_what_was_foretold(
    chosen, world, tiny_teacher, tiny_calls
):
    transformer, shop = workshop(tiny_teacher, world, chosen["refitted"])
    written = sets_file.read(chosen["sets"])
    total, call = blocks.parameter_count(transformer), calls.Reader(tiny_calls)
    batch = call.batch(call.buckets[0][:2])
    units = tables.read(chosen["units"], schemas.VARIANT_UNITS).to_pandas()
    for variant in VARIANTS:
        name, budget = variant["name"], variant["budget"]
        model, block_map = shop.model(written.of(name))
        count = blocks.parameter_count(model)
        assert count == written.parameters[name]
        share = budget["fraction"] if isinstance(budget, dict) else budget
        assert count <= share * total
        assert units[units["variant"] == name]["saved_parameters"].sum() == total - count
        assert torch.isfinite(model(**batch.arguments)[0]).all()
        assert len(block_map) == (4 if name == "tight" else len(block_map))
    assert "01-02" in written.of("tight").sources
    free = set(written.of("free").sources.values())
    assert all(source in ("closed", "start") or "refit-" in source for source in free)
    assert {"modulation", "ffn"} <= set(units["kind"])


def test_every_set_that_was_tried_is_told_and_the_best_is_taken(chosen):
    tried = tables.read(chosen["measured"], schemas.VARIANT_SETS).to_pandas()
    written = sets_file.read(chosen["sets"])
    for name, rows in tried.groupby("variant"):
        least = rows["velocity_error"].min()
        assert (rows[rows["chosen"]]["velocity_error"] == least).all() and rows["chosen"].any()
        assert written.facts[name]["velocity_error"] == pytest.approx(least)
    assert set(written.alone["01-02"]) == {"start", "distill", "subsets"}
    assert set(written.alone["03-03"]) == {"closed", "distill", "subsets"}
    assert written.alone["01-02"]["distill"] == 3e-3


def test_a_workshop_uses_blocks_again_and_keeps_students_as_they_are(world, tiny_teacher):
    transformer, shop = workshop(tiny_teacher, world)
    here, last = Unit((NewBlock(1, 2),)), Unit((NewBlock(3, 3, ("image", "text")),))
    ranks = (((0, "img_mod.1"), 2), ((1, "img_mod.1"), 2), ((5, "norm_out.linear"), 2))
    one = Set((Member(here, "distill"), Member(last, "closed")), ranks)
    model, _ = shop.model(one)
    other, _ = shop.model(one.having({"01-02": "subsets"}))
    assert other.norm_out is model.norm_out is not transformer.norm_out
    shared = [a is b for a, b in zip(*(m.transformer_blocks for m in (model, other)), strict=True)]
    assert shared == [True, False, True, True]
    again, _ = shop.model(one)
    assert again.transformer_blocks[1] is not model.transformer_blocks[1]
    kept, _ = shop.model(one.having({"01-02": "subsets"}), keep=[one])
    assert shop.model(one)[0].transformer_blocks[1] is again.transformer_blocks[1]
    assert transformer.norm_out.linear.weight.shape[0] == 64  # the teacher stays
    # In float32, as they were trained, for a fine-tune.
    own, _ = workshop(tiny_teacher, world, as_teacher=False)[1].model(one)
    assert all(p.requires_grad for p in own.transformer_blocks[1].parameters())


def test_a_variant_is_trained_and_exported_as_its_set_says(
    chosen, world, tiny_calls, tmp_path, monkeypatch
):
    settings, files, _, _ = world
    paths = files | {"calls": tiny_calls, "sets": chosen["sets"], "refits": chosen["refitted"]}
    paths = {k: v for k, v in paths.items() if not k.endswith("_unit_costs")}
    tuned = tmp_path / "tight.safetensors"
    made = {"output": tuned, "log_table": tmp_path / "log.parquet", "state": tmp_path / "state"}
    tiny.stage("finetune", settings, **paths, variant="tight", **made)
    written = sets_file.read(chosen["sets"])
    assert tensors.metadata(tuned)["set"] == written.of("tight").key
    monkeypatch.setattr("ppcl.export.assembly.prove", lambda *_: None)  # test_narrow_export has it
    folder = tmp_path / "tight"
    tiny.stage("assemble", settings, **paths, variant="tight", finetuned=tuned, output=folder)
    card = json.loads((folder / "pruning.json").read_text())
    assert {unit["name"]: unit["source"] for unit in card["units"]} == written.of("tight").sources
    assert card["ranks"] and card["parameters"] == written.parameters["tight"]
    with pytest.raises(SystemExit):  # of another set
        tiny.stage(
            "assemble", settings, **paths, variant="small", finetuned=tuned, output=tmp_path / "s"
        )


def test_refitted_maps_are_those_that_the_set_was_made_with(chosen, tmp_path):
    written, files = sets_file.read(chosen["sets"]), Files(refits=chosen["refitted"])
    refitted = next(
        one for one in written.sets.values() if any("refit-" in s for s in one.sources.values())
    )
    digest = files.refits_digest(refitted)
    assert files.refits_digest(refitted, digest) == digest
    with pytest.raises(UserError, match="other maps than the set was made with; delete"):
        files.refits_digest(refitted, "another")
    with pytest.raises(UserError, match="name variants/maps.safetensors, --refits"):
        Files().refits_digest(refitted)
    maps = linear_map_refits.read(chosen["refitted"])
    linear_map_refits.write(tmp_path / "same.safetensors", maps, {"created": "later"})
    assert Files(refits=tmp_path / "same.safetensors").refits_digest(refitted) == digest
    for probes_ in maps.values():
        for probe in probes_.values():
            probe.bias[0] += 1
    linear_map_refits.write(tmp_path / "other.safetensors", maps, {})
    assert Files(refits=tmp_path / "other.safetensors").refits_digest(refitted) != digest
    nothing = Set()
    assert Files().refits_digest(nothing) == files.refits_digest(nothing)


def test_a_required_run_that_nobody_measured_is_trained(tiny_teacher, tiny_calls, tmp_path):
    """Else nothing would have it: there are no maps of it among the closed forms."""
    settings = {"seed": 0, "device": "cpu", "teacher": {"path": str(tiny_teacher)}}
    settings |= {
        "width": {"fit_rows": 4, "text": {"require": [[2, 3]]}},
        "intervals": {},
        "prune": {},
    }
    paths = {"candidates": tiny.candidates(tmp_path / "c.parquet", [(2, 3)], [(4, "image")])}
    table = tables.read(paths["candidates"], schemas.WIDTH_CANDIDATES).to_pandas()
    table["velocity_error"] = [float("nan"), 1e-9]
    tables.write(paths["candidates"], table, schemas.WIDTH_CANDIDATES, {})
    paths |= {"intervals": tiny.intervals(tmp_path / "i.parquet", [(0, 1)]), "calls": tiny_calls}
    made = {"selection": tmp_path / "p.json", "students": tmp_path / "s.safetensors"}
    tiny.stage("prune", settings | {"modulation": {}}, **paths, **made)
    selection = selection_file.read(made["selection"])
    assert [unit.name for unit in selection.units] == ["00-01", "02-03"] and selection.required == {
        "02-03"
    }
    assert [unit.name for unit in selection.closed] == ["04-04"]


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"runs": (0, 3)}, "width.text: .0,3. is required, but was not measured: width.longest"),
        ({"ffns": (1, "image")}, "width.ffn_image or width.ffn_text: block 1 is required"),
        ({"ranks": 2}, "modulation: block 2 is required, but was not measured: it has no rank"),
    ],
)
def test_what_is_required_and_not_on_offer_is_named(named, words):
    required = constraints.Named(**{kind: frozenset([item]) for kind, item in named.items()})
    with pytest.raises(UserError, match=words):
        offers._refuse_unpriced(required, Choices(), [])
    units = [Unit((NewBlock(0, 0, text="source"), NewBlock(1, 3, ("image",), "close", (0, 0))))]
    if "ranks" not in named:
        offers._refuse_unpriced(required, Choices(), units)


def test_a_refit_is_least_squares_on_what_the_set_gives(world, tiny_teacher, tiny_calls):
    """Of the first FFN, which gets what the teacher's does, it is the map that there was."""
    transformer, shop = workshop(tiny_teacher, world)
    places = [(0, ("image",)), (3, ("image", "text"))]
    units = [Unit((NewBlock(block, block, streams),)) for block, streams in places]
    closed = Set(tuple(Member(unit, "closed") for unit in units), (((1, "img_mod.1"), 2),))
    again = sets.refitted(closed, "v")
    assert set(again.sources.values()) == {"refit-v"}
    before = narrow.maps(shop.model(closed)[0].transformer_blocks[3])["ffn/image"].weight.clone()
    model, block_map = shop.model(again)
    reader, options = calls.Reader(tiny_calls), config.load(json.dumps(world[0])).width
    rows, _ = linear_map_fits.fit_rows(reader, options, 0)
    parts = [part for unit in units for part in unit.new_blocks]
    maps = linear_map_refits.refit(
        tiny.context(transformer, reader), model, block_map, parts, rows, options
    )
    assert len(maps) == 3
    old = linear_maps.stored(world[1]["maps"])
    first = Map("ffn/image", (0, 0), (0, 0))
    assert np.allclose(maps[first].weight, old[first].weight, atol=1e-5)

    inputs, targets = [], []
    layer = narrow.maps(model.transformer_blocks[3])["ffn/image"]
    layer.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    last = blocks.block_sequence(transformer)[3]
    for batch in reader.batches(rows, 4):
        with blocks.watch([last], after=lambda _b, s: targets.append(s["image"])) as run:
            run(transformer, batch.arguments)
        model(**batch.arguments)
    x, y = (torch.cat([t.flatten(0, -2) for t in part]).double() for part in (inputs, targets))
    # The ridge, of channels of unit variance, as further rows.
    scale, rest = x.std(0, correction=0), (y - x) - (y - x).mean(0)
    ridge = (len(x) * options.ridge) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    unit = torch.cat([(x - x.mean(0)) / scale, ridge])
    best = torch.linalg.lstsq(unit, torch.cat([rest, torch.zeros_like(ridge)])).solution
    assert torch.allclose(layer.weight.double(), (best / scale[:, None]).T, atol=1e-3)
    assert not torch.allclose(layer.weight, before, atol=1e-4)
    shop.take({"refit-v": maps})
    made = narrow.maps(shop.model(again)[0].transformer_blocks[3])["ffn/image"]
    assert torch.equal(made.weight, layer.weight) and made is not layer
    kept = narrow.maps(shop.model(closed)[0].transformer_blocks[3])["ffn/image"]
    assert torch.equal(kept.weight, before)


def test_pareto_goes_over_everything_that_is_priced(chosen, world, tiny_calls):
    settings, files, prices_, folder = world
    points = folder / "points.parquet"
    paths = files | prices_ | {"calls": tiny_calls, "sets": chosen["sets"]}
    tiny.stage("pareto", settings, **paths, points=points)
    table = tables.read(points, schemas.POINTS).to_pandas()
    assert len(table) == 3 and (table["parameter_fraction"] <= table["budget"] + 1e-6).all()
    assert table["predicted_error"].is_monotonic_decreasing
    assert any(json.loads(text)["ranks"] for text in table["units"])


def test_processes_share_out_pareto(chosen, world, tiny_calls, tmp_path):
    """They measure what one does; times are of one process, with the threads of all."""
    settings, files, prices_, _ = world
    # Several batches for each model, of which the processes take different ones.
    settings = settings | {"evaluate": settings["evaluate"] | {"velocity_rows": 5}}
    paths = files | prices_ | {"calls": tiny_calls, "sets": chosen["sets"]}
    tiny.stage("pareto", settings, **paths, points=tmp_path / "one.parquet")
    command = [fresh.python(fresh.MODELS), str(SCRIPTS / "launch.py"), "--processes", "2"]
    command += ["--threads", "2", "--device", "cpu", str(SCRIPTS / "pareto.py")]
    command += tiny.options(settings, paths | {"points": tmp_path / "two.parquet"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (tables.read(tmp_path / f"{n}.parquet").to_pandas() for n in ("one", "two"))
    timed = [name for name in one if name.startswith("latency")]
    assert len(timed) == 4 and (two[["latency_seconds", "latency_ratio"]] > 0).all(axis=None)
    pd.testing.assert_frame_equal(one.drop(columns=timed), two.drop(columns=timed), rtol=1e-5)


def test_velocities_of_several_processes_are_those_of_one(tiny_teacher, tiny_calls, monkeypatch):
    """Each measures its own batches alone, whose sum is the whole; one of them measures times."""
    reader, device = calls.Reader(tiny_calls), torch.device("cpu")
    teacher = tiny.load(tiny_teacher).transformer
    models = {"teacher": teacher, "a": teacher, "b": teacher}
    options = {"batch_size": 2, "velocity_rows": 5, "bootstrap": 10, "latency_repeats": 1}
    settings = Settings.of({"evaluate": options, "seed": 0})
    how = (models, reader, reader.heldout_rows("report")[:1], settings)
    of_one, plain = measuring.measure_transformers(*how, device), velocities.velocity_errors
    measured, summands = [], []

    def seen(name, transformer, reader_, rows, *more):
        measured.append((name, tuple(rows)))
        return plain(name, transformer, reader_, rows, *more)

    monkeypatch.setattr(velocities, "velocity_errors", seen)
    for index in (0, 1):
        several = SimpleNamespace(
            process_index=index, num_processes=2, is_main_process=index == 0, device=device
        )
        several.reduce = lambda x, reduction: summands.append(x.clone()) or x
        # Of its own batches alone no ratio is defined where one of them is all of the others'.
        with np.errstate(all="ignore"):
            estimates = measuring.measure_transformers(*how, device, several)
        assert all(("latency_seconds" in of) == (index == 0) for of in estimates.values())
    assert len(measured) == len(set(measured)) and len({rows for _, rows in measured}) > 1
    several.reduce = lambda x, reduction: sum(summands)
    assert {n: of["velocity_error"] for n, of in of_one.items()} == {
        n: of["velocity_error"]
        for n, of in measuring.measure_transformers(*how, device, several).items()
    }
