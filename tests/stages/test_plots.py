"""Figures of the search: from parquet alone, quick, the same every time, and right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.figures import catalogue, labelling, seams, style
from ppcl.figures.block_measures import block_similarity, probe_quality
from ppcl.figures.candidates import selected_spans
from ppcl.figures.interval_search import interval_search
from ppcl.figures.linear_maps import linear_map_costs
from ppcl.figures.modulation import modulation_costs
from ppcl.figures.run_tables import TABLES
from ppcl.figures.variant_composition import taken_by_smallest, variant_composition
from ppcl.pruning import constraints
from ppcl.search.candidates import Limits, closed_form_obstacle
from ppcl.search.measured import ClosedForm
from ppcl.storage import schemas, tables
from ppcl.storage.schemas import Verdict
from ppcl.transformer import block_facts as recorded
from ppcl.transformer import blocks
from support import ROOT, SCRIPTS, zoo_images
from support.plotting import (
    block_facts,
    draw,
    search_tables,
    svg_text,
    variant_units,
    width_table,
    write,
)

INTERVALS_CONFIG = json.dumps(
    {"similarity": {"streams": "mean"}, "width": {}, "modulation": {"enabled": True}}
)


def run(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "plot.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    return done


def interval_arguments(
    folder: Path, data: dict[str, pd.DataFrame], output: Path, seam: int | None = None
) -> list:
    inputs = [x for name, table in data.items() for x in (f"--{name}", write(folder, name, table))]
    blocks = len(data["probes"]["block"].unique())
    width = write(folder, "width-candidates", width_table(data["intervals"], blocks), blocks)
    inputs += ["--candidates", width]
    inputs += ["--block-facts", write(folder, "block-facts", block_facts(blocks, seam), blocks)]
    return ["intervals", "--config", INTERVALS_CONFIG, *inputs, "--output", output]


@pytest.mark.parametrize(("blocks", "searches"), [(24, 10), (60, 15)])
def test_interval_plots_are_quick_and_repeatable(tmp_path, blocks, searches):
    arguments = interval_arguments(tmp_path, search_tables(blocks, searches), tmp_path / "a")
    begin = sum(os.times()[2:4])
    run(*arguments)
    seconds = sum(os.times()[2:4]) - begin
    # Processor time: the limit is 10 seconds of an idle machine, and this one may be busy.
    assert seconds < 10
    figures_made = ("search", "heatmap", "probes", "width", "modulation")
    names = {f"{n}.{s}" for n in figures_made for s in ("svg", "png")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names

    run(*arguments[:-1], tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    drawn = (tmp_path / "a" / "search.svg").read_text()
    assert "0123abc" in drawn and "2026-01-01" not in drawn, "provenance but for the time"


def trend_intervals(data: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return data["intervals"].query("source == 'trend'")


def test_search_names_every_search_and_the_selection(tmp_path):
    data = search_tables(24, 6)
    draw(*interval_arguments(tmp_path, data, tmp_path))
    text = svg_text(tmp_path / "search.svg")
    for number, row in enumerate(trend_intervals(data).itertuples(), 1):
        assert f"{number}:  blocks {style.span_name(row.first, row.last)}" in text
    chosen = data["intervals"].query("selected")
    for row in chosen.itertuples():
        assert style.span_name(row.first, row.last) in text.split("\n")
    assert f"removing {chosen['removed_blocks'].sum()} of 24 blocks" in text


def test_search_marks_the_detected_end_and_the_first_rise():
    data = search_tables(24, 6)
    figure = interval_search(data["cka"], data["intervals"], "mean")
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes}
    for number, row in enumerate(trend_intervals(data).itertuples(), 1):
        upper = panels[f"{number}:  blocks {style.span_name(row.first, row.last)}"]
        lower = figure.axes[figure.axes.index(upper) + 1]
        ends = {line.get_xdata()[0] for line in upper.lines if line.get_linestyle() == "--"}
        assert ends == {row.last}
        rings = [line for line in lower.lines if line.get_markersize() == 7.5]
        assert [ring.get_xdata()[0] for ring in rings] == [row.last + 1] * (row.last < 23)
        table = data["cka"].query("stream == 'mean' and start == @row.first - 1")
        curve = next(line for line in lower.lines if line.get_marker() == "D")
        seen = table[table["end"] <= row.last + 1]
        np.testing.assert_array_equal(curve.get_xdata(), seen["end"])
        np.testing.assert_array_equal(curve.get_ydata(), seen["delta"])


def test_a_search_that_meets_no_rise_has_no_ring():
    data = search_tables(24, 6)
    data["intervals"]["tolerance"] = 10.0
    figure = interval_search(data["cka"], data["intervals"], "mean")
    assert not [n for ax in figure.axes for n in ax.lines if n.get_markersize() == 7.5]


def test_search_without_bootstrap_of_one_stream_and_of_nothing(tmp_path):
    data = search_tables(24, 6)
    data["intervals"]["tolerance"] = np.nan
    data["cka"] = data["cka"].query("stream == 'image'").copy()
    data["cka"][["cka_low", "cka_high", "delta_low", "delta_high"]] = np.nan
    draw(*interval_arguments(tmp_path, data, tmp_path))
    text = svg_text(tmp_path / "search.svg")
    assert "bootstrap" not in text and "image stream" in text
    figure = interval_search(data["cka"], data["intervals"].iloc[:0], "mean")
    assert "found no interval" in "".join(text.get_text() for text in figure.texts)


def test_probes_of_a_stream_that_ends_early_and_of_a_useless_one():
    data = search_tables(24, 6)
    table = data["probes"].query("stream == 'image' or block < 9").reset_index(drop=True)
    table.loc[3, "r2_heldout"], table.loc[4, "condition_number"] = -40.0, np.nan
    figure = probe_quality(table, data["intervals"])
    assert figure.axes[0].get_ylim()[0] > -1
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    assert set(texts) == {"image", "text", "-40.0 ↓"}
    assert texts["image"].xy[0] == 1 and texts["text"].xy[0] < 0.5, "named where the curve ends"


def width_panels(table: pd.DataFrame, intervals: pd.DataFrame, blocks: int) -> dict:
    """Panels of the width figure by the first words of their titles."""
    figure = linear_map_costs(table, intervals, blocks)
    panels = {ax.get_title(loc="left").split(":")[0].split(" of ")[0]: ax for ax in figure.axes}
    return panels | {"figure": figure}


def test_width_shows_every_candidate_where_it_is_and_full_if_selected():
    intervals = search_tables(24, 6)["intervals"]
    table = width_table(intervals, 24)
    panels = width_panels(table, intervals, 24)
    for stream in ("image", "text"):
        rows = table.query("kind == 'ffn' and stream == @stream")
        ax = panels[f"{stream} FFNs"]
        assert f"{rows['selected'].sum()} of 24 selected" in ax.get_title(loc="left")
        points = {int(line.get_xdata()[0]): line for line in ax.lines}
        assert set(points) == set(range(24))
        for row in rows.itertuples():
            point = points[row.first]
            lowest = table["velocity_error"].max() * 1e-5
            np.testing.assert_allclose(point.get_ydata()[0], max(row.velocity_error, lowest))
            assert point.get_marker() == "x" or (
                (point.get_markerfacecolor() != "white") == row.selected
                and (point.get_marker() == "v") == (row.velocity_error < lowest)
            )
    runs = table.query("kind == 'text'")
    for title, column in (("text runs", "velocity_error"), ("Fit", "fit_error_heldout")):
        drawn = [line for line in panels[title].lines if np.ptp(line.get_xdata()) > 1]
        spans = sorted((line.get_ydata()[0], line.get_xdata()[0] + 0.3) for line in drawn)
        expected = sorted(zip(runs[column], runs["first"], strict=True))
        if title == "Fit":
            spans = [span for span in spans if span[0] != 1]  # the line of no map at all
        np.testing.assert_allclose(spans, expected, atol=1e-9)
    thick = [line for line in panels["text runs"].lines if line.get_linewidth() > 2]
    (run,) = runs[runs["selected"]].itertuples()
    assert [(n.get_xdata()[0], n.get_xdata()[1]) for n in thick] == [
        (run.first - 0.3, run.last + 0.3)
    ]


def test_width_crosses_what_selection_could_not_take():
    fields = {"stream": "image", "fit_error": 0.1, "saved": 1, "cost": 0.01}
    ffns = [ClosedForm("ffn", q, q, cka=np.nan, **fields) for q in range(3)]
    run = ClosedForm("text", 4, 5, cka=0.2, **fields | {"stream": "text"})
    forbidden = constraints.Named(set(), set(), {(1, "image")})
    limits = Limits(forbidden, {0}, 0.5)
    obstacles = [closed_form_obstacle(one, limits) for one in [*ffns, run]]
    table = width_table(search_tables(24, 6)["intervals"], 24).query("not selected").iloc[:4].copy()
    table["kind"], table["stream"] = ["ffn"] * 3 + ["text"], ["image"] * 3 + ["text"]
    table["first"], table["last"] = [0, 1, 2, 4], [0, 1, 2, 5]
    table["verdict"] = [one.verdict if one else Verdict.NOT_NEEDED for one in obstacles]
    table["reason"] = "nobody reads this"
    panels = width_panels(table, search_tables(24, 6)["intervals"].iloc[:0], 24)
    assert [line.get_marker() for line in panels["image FFNs"].lines] == ["x", "x", "o"]
    assert [line.get_linestyle() for line in panels["text runs"].lines] == [":"]
    legend = [text.get_text() for text in panels["figure"].legends[0].get_texts()]
    assert "ruled out (dotted: run)" in legend and "selected depth interval" not in legend


def test_width_strip_shows_the_pruned_model():
    intervals = search_tables(24, 6)["intervals"]
    table = width_table(intervals, 24)
    strip = width_panels(table, intervals, 24)["figure"].axes[-1]
    rows = [label.get_text() for label in strip.get_yticklabels()]
    assert rows == ["text runs", "linear text FFNs", "linear image FFNs", "depth intervals"]
    # Filled bars follow the empty cells of their row, from top to bottom.
    bars = [bar for bar in strip.collections if len(bar.get_paths()) == 1]
    drawn = {row: [] for row in rows}
    for bar in bars:
        corners = bar.get_paths()[0].get_extents()
        row = rows[round((corners.y0 + corners.y1) / 2)]
        drawn[row].append((round(corners.x0 + 0.45), round(corners.x1 - 0.45)))
    spans = dict(selected_spans(intervals))
    assert drawn["depth intervals"] == sorted(spans.items())
    for stream in ("image", "text"):
        chosen = table.query("kind == 'ffn' and stream == @stream and selected")["first"]
        assert drawn[f"linear {stream} FFNs"] == [(q, spans.get(q, q)) for q in sorted(chosen)]
    assert drawn["text runs"] == [(12, 15)]


def test_width_of_one_stream_of_free_ffns_and_of_nothing():
    intervals = search_tables(24, 6)["intervals"]
    table = width_table(intervals, 24).query("stream == 'image'").copy()
    table["velocity_error"] = 0.0
    panels = width_panels(table, intervals, 24)
    assert "text FFNs" not in panels and "text runs" not in panels
    table.loc[table.index[:2], ["velocity_error", "fit_error_heldout"]] = np.nan
    notes = "".join(text.get_text() for text in linear_map_costs(table, intervals, 24).texts)
    assert "not drawn: 2" in notes
    nothing = linear_map_costs(table.iloc[:0], intervals, 24)
    assert "no FFN or text stream" in "".join(text.get_text() for text in nothing.texts)


def test_modulation_shows_every_price_and_fills_what_was_taken():
    table = width_table(search_tables(24, 6)["intervals"], 24)
    figure = modulation_costs(table, 24)
    rows = table.query("kind == 'modulation'")
    image, text, strip = figure.axes
    assert image.get_title(loc="left") == "img_mod.1 and norm_out.linear"
    least = rows["velocity_error"].max() / 1e6
    for ax, paths in ((image, ["img_mod.1", "norm_out.linear"]), (text, ["txt_mod.1"])):
        points = [line for line in ax.lines if line.get_marker() == "o"]
        of = rows[rows["path"].isin(paths)]
        drawn = sorted(
            (n.get_xdata()[0], n.get_ydata()[0], n.get_markerfacecolor() != "white") for n in points
        )
        shown = of["velocity_error"].clip(lower=least)
        wanted = sorted(zip(of["first"], shown, of["selected"], strict=True))
        np.testing.assert_allclose(np.array(drawn, float), np.array(wanted, float))
    picked = rows[rows["selected"]]
    assert len(picked) and sorted(text.get_text() for text in strip.texts) == sorted(
        picked["rank"].astype(str)
    )
    assert [tick.get_text() for tick in strip.get_xticklabels()][-1] == "last"
    assert f"{len(picked)} of 49 modulation" in figure.texts[0].get_text()
    none = modulation_costs(table.query("kind == 'ffn'"), 24)
    assert "no modulation matrices" in "".join(text.get_text() for text in none.texts)


def test_without_intervals_the_smallest_variant_tells_what_was_taken():
    table = width_table(search_tables(24, 6)["intervals"], 24)
    table = table.drop(columns=["selected", "verdict", "reason"])
    units = variant_units()
    marked = taken_by_smallest(table, units)
    own = units[units["variant"] == "p70"]  # saves most, and takes neither runs nor intervals
    keys = ["kind", "first", "last", "stream", "path", "rank"]
    taken = set(own[keys].itertuples(index=False, name=None))
    priced = set(table[keys].itertuples(index=False, name=None))
    chosen = marked[marked["selected"]]
    assert set(chosen[keys].itertuples(index=False, name=None)) == taken & priced != set()
    assert {"ffn", "modulation"} <= set(chosen["kind"])
    assert not taken_by_smallest(table, units.iloc[:0])["selected"].any()


def test_a_run_without_depth_pruning_has_figures_of_its_closed_forms(tmp_path):
    table = width_table(search_tables(24, 6)["intervals"], 24)
    width = write(tmp_path, "width-candidates", table)
    inputs = [
        "--candidates",
        width,
        "--block-facts",
        write(tmp_path, "block-facts", block_facts(24)),
    ]
    draw("intervals", "--config", INTERVALS_CONFIG, *inputs, "--output", tmp_path / "a")
    assert {path.stem for path in (tmp_path / "a").iterdir()} == {"width", "modulation"}
    depth = svg_text(tmp_path / "a/width.svg").split("\n")
    assert "selected depth interval" not in depth


def test_where_another_kind_of_blocks_begins_is_marked_and_named_in_every_figure(tmp_path):
    draw(*interval_arguments(tmp_path, search_tables(57, 8), tmp_path, seam=19))
    two = ["transformer_blocks", "single_transformer_blocks"]
    for name in ("search", "heatmap", "probes", "width", "modulation"):
        lines = svg_text(tmp_path / f"{name}.svg").split("\n")
        for kind in two:
            assert any(re.search(rf"\b{kind}$", line) for line in lines), (name, kind)
    draw(*interval_arguments(tmp_path, search_tables(24, 6), tmp_path / "one"))
    for name in ("search", "heatmap", "probes", "width", "modulation"):
        assert "transformer_blocks" not in svg_text(tmp_path / f"one/{name}.svg")


def seam_lines(ax, axis: str = "x") -> list[float]:
    """Where lines of seams cross an axis."""
    data = [np.asarray(getattr(line, f"get_{axis}data")()) for line in ax.lines]
    return [values[0] for values in data if len(values) == 2 and values[0] == values[1] == 18.5]


def test_a_seam_lies_between_the_kinds_on_all_axes_that_reach_over_it():
    kinds = seams.runs(block_facts(57, 19))
    assert kinds == [
        seams.Run(0, 18, "transformer_blocks"),
        seams.Run(19, 56, "single_transformer_blocks"),
    ]
    assert seams.runs(block_facts(24)) == [seams.Run(0, 23, "transformer_blocks")]
    data, units = search_tables(57, 8), variant_units()
    width = width_table(data["intervals"], 57)
    probes = probe_quality(data["probes"], data["intervals"], kinds)
    heatmap = block_similarity(data["blocks"], data["intervals"], kinds)
    strips = variant_composition(units, ["p55", "p70"], 57, kinds)
    for figure in (
        probes,
        strips,
        linear_map_costs(width, data["intervals"], 57, kinds),
        modulation_costs(width, 57, kinds),
    ):
        assert all(seam_lines(ax) for ax in figure.axes)
    for ax in heatmap.axes[:-1]:
        assert seam_lines(ax) and seam_lines(ax, "y")
    search = interval_search(data["cka"], data["intervals"], "mean", kinds)
    for ax in search.axes:
        low, high = ax.get_xlim()
        assert bool(seam_lines(ax)) == (low < 18.5 < high)
    assert not any(seam_lines(ax) for ax in probe_quality(data["probes"], data["intervals"]).axes)


def test_fluxs_seam_comes_from_what_record_says_of_its_blocks(tmp_path):
    transformer = zoo_images.SPECIMENS["flux"].make(3).transformer
    recorded.write(tmp_path / "blocks.parquet", blocks.facts(transformer), {})
    table = tables.read(tmp_path / "blocks.parquet", schemas.BLOCK_FACTS).to_pandas()
    names = ("transformer_blocks", "single_transformer_blocks")
    ends = ((0, 2), (3, 5))
    assert seams.runs(table) == [seams.Run(*e, n) for e, n in zip(ends, names, strict=True)]


def test_axes_of_one_kind_alone_say_which_and_narrow_ones_leave_names_out():
    kinds = seams.runs(block_facts(57, 19))
    facts = block_facts(57, 19).assign(list="blocks")
    for limits, runs, words in (
        ((18.6, 56.5), kinds, ["block: single_transformer_blocks"]),
        ((-0.5, 56.5), kinds, ["transformer_blocks", "block: single_transformer_blocks"]),
        ((-0.5, 56.5), seams.runs(facts), ["blocks", "block: blocks, another kind"]),
        ((16.5, 56.5), kinds, ["block: single_transformer_blocks"]),
        ((-0.5, 56.5), [], ["block"]),
    ):
        ax = style.axes_at(style.new_figure("title", 3), 1, 1, 7, 1)
        ax.set_xlim(limits)
        seams.name_blocks(ax, runs)
        assert [t.get_text() for t in ax.texts] + [ax.get_xlabel()] * (not ax.texts) == words


def test_a_box_outside_a_stream_that_only_later_blocks_have_is_not_drawn():
    data = search_tables(24, 6)
    later = data["blocks"].query("block_a > 8 and block_b > 8")
    spans = selected_spans(data["intervals"])
    figure = block_similarity(later, data["intervals"])
    inside = [span for span in spans if span[0] > 8]
    assert len(figure.axes[0].patches) == len(inside) < len(spans)


def test_a_stream_that_the_table_lacks_and_a_missing_file_are_named(tmp_path):
    data = search_tables(24, 4)
    data["cka"] = data["cka"].query("stream != 'mean'")
    arguments = interval_arguments(tmp_path, data, tmp_path)
    with pytest.raises(UserError, match=r"similarity\.streams"):
        draw(*arguments)
    (tmp_path / "cka.parquet").unlink()
    error = run(*arguments, code=2).stderr
    assert "cka.parquet" in error and "Traceback" not in error


def test_every_figure_has_what_the_catalogue_says():
    names = [(entry.group, entry.name) for entry in catalogue.FIGURES]
    assert len(set(names)) == len(names)
    defaults = config.load(str(ROOT / "config/digits.yaml"))
    for entry in catalogue.FIGURES:
        assert (ROOT / f"workflow/report/{entry.name}.rst").read_text(encoding="utf-8").strip()
        assert f"`{entry.name}`" in schemas.ARTIFACTS[f"plots/{entry.group}/"]
        assert entry.tables and all(TABLES[name] in schemas.TABLES for name in entry.tables)
        config.subset(defaults.given, *entry.keys)  # which knows them
        assert entry.shown(defaults) in (True, False)
    assert set(catalogue.GROUPS) == {group for group, _ in names}


def test_a_wanted_figure_without_its_tables_is_refused(tmp_path):
    path = write(tmp_path, "metrics", pd.DataFrame(columns=schemas.METRICS.names))
    arguments = ["--config", "{}", "--metrics", path, "--output", tmp_path / "a"]
    with pytest.raises(UserError, match="figure images: name the tables --images"):
        draw("quality", *arguments, "--figures", "tradeoff", "images")
    assert not (tmp_path / "a").exists(), "all are drawn before one is written"


def test_tables_from_before_there_were_verdicts_are_refused_with_what_to_do(tmp_path):
    table = width_table(search_tables(24, 6)["intervals"], 24)
    path, fields = tmp_path / "candidates.parquet", list(schemas.WIDTH_CANDIDATES)
    older = pa.schema([field for field in fields if field.name != "verdict"])
    tables.write(path, table[older.names], older, {"blocks": "24"})
    facts = write(tmp_path, "block-facts", block_facts(24))
    arguments = ["--config", INTERVALS_CONFIG, "--candidates", path, "--output", tmp_path / "a"]
    arguments += ["--block-facts", facts]
    again = rf"{path}: column 'verdict' is missing; delete it and rerun: snakemake makes it again"
    with pytest.raises(UserError, match=again):
        draw("intervals", *arguments)


@pytest.mark.parametrize("seed", range(20))
def test_spread_labels_are_apart_in_order_and_as_near_as_can_be(seed):
    rng = np.random.default_rng(seed)
    wanted, gap = rng.uniform(0, 1, 8), 0.1
    placed = labelling.spread(wanted, gap)
    order = np.argsort(wanted)
    assert (np.diff(placed[order]) >= gap - 1e-12).all()
    # The projection on a convex set: no feasible point lies on the other side of its normal.
    for _ in range(200):
        other = np.sort(rng.uniform(-0.5, 1.5, 8)) + gap * np.arange(8)
        assert (wanted - placed)[order] @ (other - placed[order]) <= 1e-9


def test_log_average_is_a_geometric_mean():
    steps, means = style.log_average(np.arange(4), np.array([1.0, 4.0, 0.0, 9.0]), bins=2)
    np.testing.assert_allclose(steps, [0.5, 3])
    np.testing.assert_allclose(means, [2, 9])


def test_drawing_leaves_matplotlib_settings_alone():
    before = dict(matplotlib.rcParams)
    block_similarity(search_tables(8, 2)["blocks"], search_tables(8, 2)["intervals"])
    assert dict(matplotlib.rcParams) == before


def test_a_curve_is_named_at_the_height_of_its_end():
    data = search_tables(24, 6)
    image = data["probes"].query("stream == 'image'")
    figure = probe_quality(image, data["intervals"])
    for ax, column in zip(figure.axes, ("r2_heldout", "cosine_heldout"), strict=False):
        height = (ax.transData + ax.transAxes.inverted()).transform((0, image[column].iloc[-1]))[1]
        np.testing.assert_allclose(ax.texts[0].xy, (1, height))
