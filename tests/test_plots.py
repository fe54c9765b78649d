"""Figures: from parquet alone, quick, the same every time, and right about what they point at."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import plot
import pytest
from matplotlib.text import Text
from PIL import Image

from ppcl import figure_labels, figure_style, figures, result_figures, schemas, tables
from ppcl.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[1] / "workflow" / "scripts"
INTERVALS_CONFIG = json.dumps({"similarity": {"streams": "mean"}})
TRAINING_CONFIG = json.dumps(
    {
        "distill": {"loss": "normalised"},
        "variants": [{"name": n, "budget": b} for n, b in (("p55", 0.55), ("p70", 0.7))],
    }
)


# Tables as a run could have written them.


def chain_of(blocks: int, searches: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Consecutive intervals of two blocks or more that cover the depth."""
    inner = np.arange(2, blocks - 1, 2)
    cuts = np.sort(rng.choice(inner, searches - 1, replace=False))
    edges = [0, *cuts.tolist(), blocks]
    return list(zip(edges[:-1], [edge - 1 for edge in edges[1:]], strict=True))


def search_tables(blocks: int, searches: int, seed: int = 0) -> dict[str, pd.DataFrame]:
    """cka, blocks, probes and intervals in which Delta falls inside an interval, then rises."""
    rng = np.random.default_rng(seed)
    chain = chain_of(blocks, searches, rng)
    ends = {first - 1: last for first, last in chain}
    rows = []
    for stream, scale in (("image", 1.0), ("text", 0.5), ("mean", 0.75)):
        for u in range(-1, blocks - 1):
            end = ends.get(u, u + 3)
            drop, cka = 0.02 * scale * rng.uniform(0.2, 3), 1.0
            for k in range(u + 1, blocks):
                drop *= rng.uniform(1.3, 1.8) if k > end else rng.uniform(0.6, 0.95)
                drop = min(drop, cka * 0.4)
                cka -= drop
                noise = 0.02 * drop + 2e-4
                rows.append(
                    [stream, u, k, cka, drop, cka - noise, cka + noise, drop - noise, drop + noise]
                )
    cka = pd.DataFrame(rows, columns=schemas.CKA.names)

    depth = np.arange(blocks)
    maps = []
    for stream, reach in (("image", blocks / 2), ("text", blocks / 5)):
        square = np.exp(-((np.abs(depth[:, None] - depth) / reach) ** 1.3))
        for a in depth:
            for b in depth:
                maps.append([stream, a, b, square[a, b]])

    linear = []
    for stream, offset in (("image", 0.0), ("text", 0.1)):
        for i in depth:
            r2 = np.clip(
                0.75 + offset - 0.4 * np.cos(9 * i / blocks) + rng.normal(0, 0.06), -1, 0.99
            )
            condition = 10 ** (3 + 5 * i / blocks + 2 * offset + rng.normal(0, 0.2))
            linear.append([i, stream, r2, 0.9 + 0.1 * r2, condition, 40000, r2 + 0.01, 9000, 0.3])

    chosen = set(rng.permutation(len(chain))[: max(1, len(chain) // 2)].tolist())
    table = cka[cka["stream"] == "mean"].set_index(["start", "end"])["cka"]
    intervals = pd.DataFrame(
        [
            [f, v, v - f, table[f - 1, v], n in chosen, "", "trend", 0.01, 5e-4]
            for n, (f, v) in enumerate(chain)
        ],
        columns=schemas.INTERVALS.names,
    )
    # Selection may also take a part of what the search found.
    longest = (intervals["last"] - intervals["first"]).idxmax()
    first, last = intervals.loc[longest, ["first", "last"]]
    if last - first > 2:
        intervals.loc[longest, "selected"] = False
        part = [first, first + 1, 1, table[first - 1, first + 1], True, "", "optimal", 0.01, 5e-4]
        intervals.loc[len(intervals)] = part
    return {
        "cka": cka,
        "blocks": pd.DataFrame(maps, columns=schemas.BLOCKS.names),
        "probes": pd.DataFrame(linear, columns=schemas.PROBES.names),
        "intervals": intervals,
    }


def distill_log(intervals: pd.DataFrame, steps: int = 400) -> pd.DataFrame:
    """Loss curves of the selected intervals, both streams, as noisy power laws."""
    rng = np.random.default_rng(1)
    rows = []
    for first, last in figures.selected_spans(intervals):
        for stream in ("image", "text"):
            level = rng.uniform(0.03, 0.4)
            for step in range(1, steps + 1, 2):
                loss = level * (1 + step / 8) ** -0.6 * rng.lognormal(0, 0.25)
                name = f"{first:02d}-{last:02d}"
                rows.append([step, name, stream, loss, 1.4 * loss, 1e-3, step * 0.3, loss])
    return pd.DataFrame(rows, columns=schemas.DISTILL_LOG.names)


def finetune_log(level: float, steps: int = 600) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    step = np.arange(1, steps + 1)
    error = level * (1 + step / 20) ** -0.7 * rng.lognormal(0, 0.3, steps)
    lr = 1e-3 * np.minimum(step / 50, 0.5 + 0.5 * np.cos(np.pi * step / steps))
    columns = [step, error * 1.3, error, lr, step * 0.4]
    return pd.DataFrame(dict(zip(schemas.FINETUNE_LOG.names, columns, strict=True)))


VARIANTS = {"teacher": (1.0, 1.0, 0.0), "p85": (0.85, 0.86, 0.004), "p70": (0.7, 0.72, 0.02)}
VARIANTS["p55"] = (0.54, 0.57, 0.035)


def metrics_table(judged: bool = True, variants: dict = VARIANTS) -> pd.DataFrame:
    rows = []
    for name, (size, latency, loss) in variants.items():
        values = {"parameter_fraction": (size, np.nan), "latency_ratio": (latency, 0.01)}
        values |= {"velocity_error": (loss, 0.1 * loss), "ssim": (1 - 3 * loss, 0.01)}
        if name != "teacher":
            values["psnr"] = (18 - 4 * np.log10(loss), 0.5)
        if judged:
            values |= {
                "digit_accuracy": (0.968 - loss, 0.011),
                "all_correct": (0.962 - loss, 0.012),
            }
            values |= {"digit_color_accuracy": (0.999 - loss / 9, 0.001)}
            values |= {"background_color_accuracy": (1 - loss / 9, 0.0005)}
        for metric, (value, half) in values.items():
            rows.append(
                [
                    name,
                    metric,
                    value,
                    1.0,
                    0.0,
                    True,
                    1000,
                    value - half,
                    min(value + half, max(value, 1.0)) if value < 1.01 else value + half,
                ]
            )
    return pd.DataFrame(rows, columns=schemas.METRICS.names)


COLOURS = {
    "red": (210, 40, 40),
    "blue": (40, 70, 200),
    "white": (245, 245, 245),
    "black": (0, 0, 0),
}


def images_table(judged: bool = True, prompts: int = 8, side: int = 32) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    rows = []
    for index in range(prompts):
        ink, paper = [("red", "white"), ("blue", "black"), ("white", "blue")][index % 3]
        text = [f"a {ink} handwritten {index} on a {paper} background", f"{index}, {ink}/{paper}"]
        for name in VARIANTS:
            pixels = np.empty((side, side, 3), np.uint8)
            pixels[:] = COLOURS[paper]
            pixels[side // 5 : -side // 5, side // 3 : side // 2] = COLOURS[ink]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            correct = name == "teacher" or bool(rng.random() > 0.15)
            read = {"digit": index if correct else 8, "digit_color": ink}
            read |= {"background_color": paper, "correct": correct}
            text_read = json.dumps(read) if judged else ""
            rows.append([name, text[index % 2], 7, buffer.getvalue(), text_read, index])
    return pd.DataFrame(rows, columns=schemas.IMAGES.names)


# Running the program.


def write(folder: Path, name: str, table: pd.DataFrame) -> Path:
    path = folder / f"{name}.parquet"
    schema = getattr(schemas, name.upper().replace("-", "_"), schemas.FINETUNE_LOG)
    tables.write(path, table, schema, {"commit": "0123abc", "created": "2026-01-01"})
    return path


def draw(*arguments) -> None:
    """Run the program in this process: most tests need no second start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        plot.main()


def run(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "plot.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    return done


def interval_arguments(folder: Path, data: dict[str, pd.DataFrame], output: Path) -> list:
    inputs = [x for name, table in data.items() for x in (f"--{name}", write(folder, name, table))]
    return ["intervals", "--config", INTERVALS_CONFIG, *inputs, "--output", output]


def svg_text(path: Path) -> str:
    """All text of an SVG file: labels are text, not outlines."""
    root = ElementTree.parse(path).getroot()
    return "\n".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text"))


@pytest.mark.parametrize(("blocks", "searches"), [(24, 10), (60, 15)])
def test_interval_plots_are_quick_and_repeatable(tmp_path, blocks, searches):
    arguments = interval_arguments(tmp_path, search_tables(blocks, searches), tmp_path / "a")
    begin = sum(os.times()[2:4])
    run(*arguments)
    seconds = sum(os.times()[2:4]) - begin
    # Processor time: the limit is 10 seconds of an idle machine, and this one may be busy.
    assert seconds < 10
    names = {f"{n}.{s}" for n in ("search", "heatmap", "probes") for s in ("svg", "png")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names

    run(*arguments[:-1], tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    drawn = (tmp_path / "a" / "search.svg").read_text()
    assert "0123abc" in drawn and "2026-01-01" not in drawn, "provenance but for the time"


def found(data: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return data["intervals"].query("source == 'trend'")


def test_search_names_every_search_and_the_selection(tmp_path):
    data = search_tables(24, 6)
    draw(*interval_arguments(tmp_path, data, tmp_path))
    text = svg_text(tmp_path / "search.svg")
    for number, row in enumerate(found(data).itertuples(), 1):
        assert f"{number}:  blocks {figure_style.span_name(row.first, row.last)}" in text
    chosen = data["intervals"].query("selected")
    for row in chosen.itertuples():
        assert figure_style.span_name(row.first, row.last) in text.split("\n")
    assert f"removing {chosen['removed_blocks'].sum()} of 24 blocks" in text


def test_search_marks_the_detected_end_and_the_first_rise():
    data = search_tables(24, 6)
    figure = figures.search(data["cka"], data["intervals"], "mean")
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes}
    for number, row in enumerate(found(data).itertuples(), 1):
        upper = panels[f"{number}:  blocks {figure_style.span_name(row.first, row.last)}"]
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
    figure = figures.search(data["cka"], data["intervals"], "mean")
    assert not [n for ax in figure.axes for n in ax.lines if n.get_markersize() == 7.5]


def test_search_without_bootstrap_of_one_stream_and_of_nothing(tmp_path):
    data = search_tables(24, 6)
    data["intervals"]["tolerance"] = np.nan
    data["cka"] = data["cka"].query("stream == 'image'").copy()
    data["cka"][["cka_low", "cka_high", "delta_low", "delta_high"]] = np.nan
    draw(*interval_arguments(tmp_path, data, tmp_path))
    text = svg_text(tmp_path / "search.svg")
    assert "bootstrap" not in text and "image stream" in text
    figure = figures.search(data["cka"], data["intervals"].iloc[:0], "mean")
    assert "found no interval" in "".join(text.get_text() for text in figure.texts)


def test_probes_of_a_stream_that_ends_early_and_of_a_useless_one():
    data = search_tables(24, 6)
    table = data["probes"].query("stream == 'image' or block < 9").reset_index(drop=True)
    table.loc[3, "r2_heldout"], table.loc[4, "condition_number"] = -40.0, np.nan
    figure = figures.probes(table, data["intervals"])
    assert figure.axes[0].get_ylim()[0] > -1
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    assert set(texts) == {"image", "text", "-40.0 ↓"}
    assert texts["image"].xy[0] == 1 and texts["text"].xy[0] < 0.5, "named where the curve ends"


def test_a_stream_that_the_table_lacks_and_a_missing_file_are_named(tmp_path):
    data = search_tables(24, 4)
    data["cka"] = data["cka"].query("stream != 'mean'")
    arguments = interval_arguments(tmp_path, data, tmp_path)
    with pytest.raises(UserError, match=r"similarity\.streams"):
        draw(*arguments)
    (tmp_path / "probes.parquet").unlink()
    error = run(*arguments, code=2).stderr
    assert "probes.parquet" in error and "Traceback" not in error


def test_training_plots(tmp_path):
    log = write(tmp_path, "distill-log", distill_log(search_tables(24, 8)["intervals"]))
    tuned = [write(tmp_path, name, finetune_log(e)) for name, e in (("p70", 0.05), ("p55", 0.2))]
    common = ["training", "--config", TRAINING_CONFIG, "--distill-log", log, "--output", tmp_path]
    draw(*common, "--finetune-logs", *tuned)
    assert "normalised loss" in svg_text(tmp_path / "distill.svg")
    assert {"p55", "p70"} <= set(svg_text(tmp_path / "finetune.svg").split("\n"))
    for arguments in (common, [*common, "--finetune-logs"]):
        draw(*arguments)
        assert "No variant was fine-tuned" in svg_text(tmp_path / "finetune.svg")


@pytest.mark.parametrize("judged", [True, False])
def test_quality_plots(tmp_path, judged):
    metrics = write(tmp_path, "metrics", metrics_table(judged))
    pictures = write(tmp_path, "images", images_table(judged))
    draw(
        "quality",
        "--config",
        "{}",
        "--metrics",
        metrics,
        "--images",
        pictures,
        "--output",
        tmp_path,
    )
    lines = svg_text(tmp_path / "tradeoff.svg").split("\n")
    panels = 8 if judged else 6
    assert lines.count("p55") == lines.count("p85") == panels
    # The teacher's own images have no PSNR to themselves, so those two panels go without it.
    assert lines.count("teacher") == panels - (0 if judged else 2)
    text = svg_text(tmp_path / "images.svg")
    wrong = sum('"correct": false' in read for read in images_table(judged)["read"])
    assert text.count("8 ") == wrong and ("Framed" in text) == (wrong > 0)


def test_figures_import_no_model_library():
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import plot; "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore:Glyph")  # where no font for the last character is installed
def test_prompts_are_drawn_as_written(tmp_path):
    table = images_table()
    table["prompt"] = "costs $5 & <b>$\\frac{</b> 猫"
    metrics = metrics_table(variants={"a_$b$": VARIANTS["p70"], "teacher": VARIANTS["teacher"]})
    figure_style.save(result_figures.images(table, metrics), tmp_path / "images")
    figure_style.save(result_figures.tradeoff(metrics), tmp_path / "tradeoff")
    assert "costs $5 & <b>$\\frac{</b>" in svg_text(tmp_path / "images.svg")
    assert "a_$b$" in svg_text(tmp_path / "tradeoff.svg")


def test_small_pictures_are_enlarged_by_repeating_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    enlarged = result_figures._pixels(buffer.getvalue())
    np.testing.assert_array_equal(enlarged, pixels.repeat(8, 0).repeat(8, 1))


@pytest.mark.parametrize("seed", range(20))
def test_spread_labels_are_apart_in_order_and_as_near_as_can_be(seed):
    rng = np.random.default_rng(seed)
    wanted, gap = rng.uniform(0, 1, 8), 0.1
    placed = figure_labels.spread(wanted, gap)
    order = np.argsort(wanted)
    assert (np.diff(placed[order]) >= gap - 1e-12).all()
    # The projection on a convex set: no feasible point lies on the other side of its normal.
    for _ in range(200):
        other = np.sort(rng.uniform(-0.5, 1.5, 8)) + gap * np.arange(8)
        assert (wanted - placed)[order] @ (other - placed[order]) <= 1e-9


def test_log_average_is_a_geometric_mean():
    steps, means = figure_style.log_average(np.arange(4), np.array([1.0, 4.0, 0.0, 9.0]), bins=2)
    np.testing.assert_allclose(steps, [0.5, 3])
    np.testing.assert_allclose(means, [2, 9])


def test_drawing_leaves_matplotlib_settings_alone():
    before = dict(matplotlib.rcParams)
    figures.heatmap(search_tables(8, 2)["blocks"], search_tables(8, 2)["intervals"])
    assert dict(matplotlib.rcParams) == before


def test_names_of_crowded_points_do_not_overlap():
    close = {f"variant-{n}": (0.85 + n / 99, 0.86 + n / 99, n / 999) for n in range(1, 6)}
    figure = result_figures.tradeoff(metrics_table(variants=VARIANTS | close))
    for ax in figure.axes:
        for name in ax.texts:
            name.update_positions(figure.canvas.get_renderer())
        boxes = [Text.get_window_extent(name) for name in ax.texts]
        assert len(boxes) == len(VARIANTS | close)
        for n, box in enumerate(boxes):
            assert not any(box.padded(-0.5).overlaps(other) for other in boxes[:n])


def test_a_curve_is_named_at_the_height_of_its_end():
    data = search_tables(24, 6)
    image = data["probes"].query("stream == 'image'")
    figure = figures.probes(image, data["intervals"])
    for ax, column in zip(figure.axes, ("r2_heldout", "cosine_heldout"), strict=False):
        height = (ax.transData + ax.transAxes.inverted()).transform((0, image[column].iloc[-1]))[1]
        np.testing.assert_allclose(ax.texts[0].xy, (1, height))


def test_a_variant_has_one_colour_in_all_figures():
    names = [name for name in VARIANTS if name != "teacher"]
    curves = result_figures.finetune({"p55": finetune_log(0.1)}, names).axes[0].texts
    points = result_figures.tradeoff(metrics_table()).axes[0].texts
    (colour,) = {text.get_color() for text in points if text.get_text() == "p55"}
    assert [text.get_color() for text in curves] == [colour]
