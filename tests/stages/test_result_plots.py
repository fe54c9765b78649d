"""Figures of the results: training, quality and pictures."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from ppcl.figures import quality, sample_images, style, variant_composition
from ppcl.figures.candidates import selected_spans
from ppcl.figures.price_calibration import price_calibration, rank_correlation
from ppcl.figures.training_curves import velocity_errors
from ppcl.storage import schemas
from support.plotting import (
    block_facts,
    calibration_table,
    draw,
    search_tables,
    svg_text,
    variant_units,
    write,
)

TRAINING_CONFIG = json.dumps(
    {
        "distill": {"loss": "normalised"},
        "variants": [{"name": n, "budget": b} for n, b in (("p55", 0.55), ("p70", 0.7))],
    }
)


def distill_log(intervals: pd.DataFrame, steps: int = 400) -> pd.DataFrame:
    """Loss curves of the selected intervals, both streams, as noisy power laws."""
    rng = np.random.default_rng(1)
    rows = []
    for first, last in selected_spans(intervals):
        for stream in ("image", "text"):
            level = rng.uniform(0.03, 0.4)
            for step in range(1, steps + 1, 2):
                loss = level * (1 + step / 8) ** -0.6 * rng.lognormal(0, 0.25)
                name = f"{first:02d}-{last:02d}"
                rows.append([step, name, stream, loss, 1.4 * loss, np.nan, 1e-3, step * 0.3, loss])
    return pd.DataFrame(rows, columns=schemas.DISTILL_LOG.names)


def test_an_interval_that_does_not_exist_reaches_nowhere():
    points = pd.DataFrame({"x": [3.0, 4.0], "x_low": [np.nan, 3.5], "x_high": [np.nan, 5.0]})
    np.testing.assert_array_equal(quality._reach(points, "x"), [[0, 0.5], [0, 1]])


def velocity_log(level: float, steps: int = 600) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    step = np.arange(1, steps + 1)
    error = level * (1 + step / 20) ** -0.7 * rng.lognormal(0, 0.3, steps)
    lr = 1e-3 * np.minimum(step / 50, 0.5 + 0.5 * np.cos(np.pi * step / steps))
    columns = [step, error * 1.3, error, lr, step * 0.4]
    return pd.DataFrame(dict(zip(schemas.VELOCITY_LOG.names, columns, strict=True)))


def finetune_log(level: float, steps: int = 600) -> pd.DataFrame:
    """Of a variant that learns pictures, too, with one's own held out at every hundredth step."""
    log = velocity_log(level, steps)
    loss = 0.5 + level / (1 + log["step"])
    heldout = loss.where(log["step"] % 100 == 0)
    return log.assign(picture_loss=loss, heldout_picture_loss=heldout)[schemas.FINETUNE_LOG.names]


VARIANTS = {"teacher": (1.0, 1.0, 0.0), "p85": (0.85, 0.86, 0.004), "p70": (0.7, 0.72, 0.02)}
VARIANTS["p55"] = (0.54, 0.57, 0.035)


def metrics_table(judged: bool = True, variants: dict = VARIANTS) -> pd.DataFrame:
    rows = []
    for name, (size, latency, loss) in variants.items():
        values = {"parameter_fraction": (size, np.nan), "latency_ratio": (latency, 0.01)}
        values |= {"velocity_error": (loss, 0.1 * loss), "ssim": (1 - 3 * loss, 0.01)}
        values["parameter_fraction_without_modulation"] = (0.1 + 0.9 * size, np.nan)
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


def points_table(budgets: int = 10) -> pd.DataFrame:
    """Budgets from half of the teacher to nearly all of it; units cost more together than alone."""
    fraction = np.linspace(0.54, 0.96, budgets)
    predicted = 0.028 * ((1 - fraction) / 0.46) ** 1.7
    error = predicted * (1 + 1.2 * (1 - fraction))
    latency = 0.03 + 0.97 * fraction
    columns = [fraction, ["[]"] * budgets, predicted, 2e7 * fraction, fraction]
    columns += [0.1 + 0.9 * fraction, 0.4 * latency]
    columns += [error, 0.9 * error, 1.12 * error, latency, latency - 0.01, latency + 0.012]
    return pd.DataFrame(dict(zip(schemas.POINTS.names, columns, strict=True)))


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
            read |= {"background_color": paper, "text": f"{read['digit']} {ink} on {paper}"}
            read |= {"correct": correct}
            text_read = json.dumps(read) if judged else ""
            rows.append([name, text[index % 2], 7, buffer.getvalue(), text_read, index, 1, b""])
    return pd.DataFrame(rows, columns=schemas.IMAGES.names)


def test_training_plots(tmp_path):
    log = write(tmp_path, "distill-log", distill_log(search_tables(24, 8)["intervals"]))
    joint = write(tmp_path / "subsets", "log", velocity_log(0.1))
    plain = velocity_log(0.05).assign(picture_loss=np.nan, heldout_picture_loss=np.nan)
    logs = {"p70": plain[schemas.FINETUNE_LOG.names], "p55": finetune_log(0.2)}
    tuned = [write(tmp_path, name, log) for name, log in logs.items()]
    common = ["training", "--config", TRAINING_CONFIG, "--distill-log", log, "--output", tmp_path]
    draw(*common, "--subsets-log", joint, "--finetune-logs", *tuned)
    assert "normalised loss" in svg_text(tmp_path / "distill.svg")
    assert {"p55", "p70"} <= set(svg_text(tmp_path / "finetune.svg").split("\n"))
    text = svg_text(tmp_path / "subsets.svg")
    assert "subsets" in text.split("\n") and "Random subsets of students" in text
    assert "Not part of this run" not in text
    assert "0123abc" in (tmp_path / "subsets.svg").read_text()
    draw(*common[:-1], tmp_path / "alone")
    assert {path.stem for path in (tmp_path / "alone").iterdir()} == {"distill"}


def test_velocity_shows_every_logged_step_of_error_and_learning_rate():
    log = velocity_log(0.1).sample(frac=1, random_state=0)  # in any order
    error, rate = velocity_errors({"p70": log}, ["p70"], "title").axes
    log = log.sort_values("step")
    for ax, column in ((error, "velocity_error"), (rate, "lr")):
        np.testing.assert_array_equal(ax.lines[0].get_xdata(), log["step"])
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), log[column])


def test_pictures_of_ones_own_have_a_panel_and_those_held_out_dots():
    logs = {"p70": velocity_log(0.1), "p55": finetune_log(0.1).assign(velocity_error=np.nan)}
    error, _, own = velocity_errors(logs, list(logs), "title").axes
    assert len(error.lines) == 2  # of p70 alone: p55 is trained on pictures alone
    line, dots = own.lines
    np.testing.assert_array_equal(line.get_ydata(), logs["p55"]["picture_loss"])
    assert np.isfinite(dots.get_ydata()).sum() == 6


@pytest.mark.parametrize("judged", [True, False])
def test_quality_plots(tmp_path, judged):
    metrics = write(tmp_path, "metrics", metrics_table(judged))
    pictures = write(tmp_path, "images", images_table(judged))
    points = write(tmp_path, "points", points_table())
    units = write(tmp_path, "variant-units", variant_units())
    facts = write(tmp_path, "block-facts", block_facts(24))
    inputs = ["--metrics", metrics, "--images", pictures, "--points", points, "--units", units]
    inputs += ["--block-facts", facts]
    tuned = [{"name": "p55", "budget": 0.55, "finetune_steps": 5}, {"name": "p70", "budget": 0.7}]
    settings = json.dumps({"variants": tuned})
    draw("quality", "--config", settings, *inputs, "--output", tmp_path)
    pareto = svg_text(tmp_path / "pareto.svg").split("\n")
    assert pareto.count("p55") == pareto.count("p70") == pareto.count("teacher") == 3
    assert "Fine-tuned: p55." in "".join(pareto)
    lines = svg_text(tmp_path / "tradeoff.svg").split("\n")
    panels = 12 if judged else 9
    assert lines.count("p55") == lines.count("p85") == panels
    # The teacher's own images have no PSNR to themselves, so those panels go without it.
    assert lines.count("teacher") == panels - (0 if judged else 3)
    sets = svg_text(tmp_path / "sets.svg").split("\n")
    assert "p55: 3 intervals, 1 text run, 12 linear FFNs, 49 low-rank modulations" in sets
    text = svg_text(tmp_path / "images.svg")
    wrong = sum('"correct": false' in read for read in images_table(judged)["read"])
    assert text.count("8 ") == wrong and ("Framed" in text) == (wrong > 0)


@pytest.mark.filterwarnings("ignore:Glyph")  # where no font for the last character is installed
def test_prompts_are_drawn_as_written(tmp_path):
    table = images_table()
    table["prompt"] = "costs $5 & <b>$\\frac{</b> 猫\0\x1b[31m\v\ufffe"
    metrics = metrics_table(variants={"a_$b$": VARIANTS["p70"], "teacher": VARIANTS["teacher"]})
    style.save(sample_images.sample_images(table, metrics), tmp_path / "images")
    style.save(quality.quality_against_cost(metrics), tmp_path / "tradeoff")
    assert "costs $5 & <b>$\\frac{</b>" in svg_text(tmp_path / "images.svg")
    assert "a_$b$" in svg_text(tmp_path / "tradeoff.svg")


def test_small_pictures_are_enlarged_by_repeating_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    enlarged = sample_images._pixels(buffer.getvalue())
    np.testing.assert_array_equal(enlarged, pixels.repeat(8, 0).repeat(8, 1))


def film(frames: int = 9, side: int = 32) -> bytes:
    """A video whose frames, one below the other, grow brighter."""
    column = np.repeat(np.linspace(0, 255, frames).astype(np.uint8), side)
    buffer = io.BytesIO()
    Image.fromarray(np.tile(column[:, None, None], (1, side, 3))).save(buffer, "png")
    return buffer.getvalue()


def test_of_a_video_the_first_a_middle_and_the_last_frame_are_drawn_side_by_side():
    pixels = sample_images._pixels(film(), 9)
    gap = (pixels.shape[1] - 3 * 256) // 2
    assert pixels.shape[0] == 256 and gap >= 4
    for number, value in enumerate((0, 127, 255)):
        assert (pixels[:, number * (256 + gap) :][:, :256] == value).all()
    assert sample_images._pixels(film(2), 2).shape[1] == 2 * 256 + gap
    table = images_table(judged=False, prompts=2).assign(png=film(), frames=9)
    figure = sample_images.sample_images(table, metrics_table())
    assert any("3 frames, from first to last" in text.get_text() for text in figure.texts)
    box = figure.axes[1].get_position()
    width, height = figure.get_size_inches() * (box.width, box.height)
    assert width / height == pytest.approx(3, rel=0.02)


def test_pictures_that_prompts_name_stand_before_what_was_made_of_them():
    table = images_table(judged=False, prompts=2)
    table["source"] = [film(1) if name == "teacher" else b"" for name in table["variant"]]
    figure = sample_images.sample_images(table, metrics_table())
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles[0].strip() == "given" and titles[1].startswith("teacher")
    (given,) = figure.axes[1].get_images()
    np.testing.assert_array_equal(given.get_array(), sample_images._pixels(film(1)))
    plain = sample_images.sample_images(images_table(judged=False, prompts=2), metrics_table())
    assert len(figure.axes) - len(plain.axes) == 2


def test_names_of_crowded_points_do_not_overlap():
    close = {f"variant-{n}": (0.85 + n / 99, 0.86 + n / 99, n / 999) for n in range(1, 6)}
    figure = quality.quality_against_cost(metrics_table(variants=VARIANTS | close))
    for ax in figure.axes:
        for name in ax.texts:
            name.update_positions(figure.canvas.get_renderer())
        boxes = [Text.get_window_extent(name) for name in ax.texts]
        assert len(boxes) == len(VARIANTS | close)
        for n, box in enumerate(boxes):
            assert not any(box.padded(-0.5).overlaps(other) for other in boxes[:n])


def test_a_variant_has_one_colour_in_all_figures():
    names = [name for name in VARIANTS if name != "teacher"]
    curves = velocity_errors({"p55": velocity_log(0.1)}, names, "title").axes[0].texts
    points = quality.quality_against_cost(metrics_table()).axes[0].texts
    (colour,) = {text.get_color() for text in points if text.get_text() == "p55"}
    assert [text.get_color() for text in curves] == [colour]


def test_pareto_shows_every_budget_measured_and_predicted():
    table = points_table().sample(frac=1, random_state=0)  # in any order
    figure = quality.budget_errors(table, metrics_table(), [])
    table = table.sort_values("budget")
    costs = ("parameter_fraction", "parameter_fraction_without_modulation", "latency_ratio")
    for ax, cost in zip(figure.axes, costs, strict=True):
        curves = {line.get_linestyle(): line for line in ax.lines if len(line.get_xdata()) == 10}
        curves.pop("None")  # the caps of the bars
        for dashes, column in (("-", "velocity_error"), ("--", "predicted_error")):
            np.testing.assert_array_equal(curves[dashes].get_xdata(), table[cost])
            np.testing.assert_array_equal(curves[dashes].get_ydata(), table[column])
        bars = [c for c in ax.collections if np.ptp(c.get_segments()[0][:, 1]) > 0]
        ends = [segment[:, 1] for segment in bars[0].get_segments()]
        np.testing.assert_allclose(ends, table[["velocity_error_low", "velocity_error_high"]])
        assert [text.get_text() for text in ax.texts] == ["teacher", "p85", "p70", "p55"]
        # An error of 0 has no place on this axis: the lower edge stands for it.
        (star,) = (line for line in ax.lines if line.get_marker() == "*")
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (1, ax.get_ylim()[0])
        assert 0 < ax.get_ylim()[0] < table["velocity_error_low"].min() / 2
    assert "Fine-tuned" not in "".join(text.get_text() for text in figure.texts)
    whole = table.assign(parameter_fraction_without_modulation=np.nan)
    assert len(quality.budget_errors(whole, metrics_table(), []).axes) == 2


def test_variants_have_the_colours_of_other_figures():
    points = quality.quality_against_cost(metrics_table()).axes[0].texts
    ends = quality.budget_errors(points_table(), metrics_table(), ["p55"]).axes[0].texts
    colours = [{text.get_text(): text.get_color() for text in of} for of in (points, ends)]
    assert colours[0] == colours[1] and len(colours[0]) == 4


def test_sets_show_what_every_variant_is_made_of_and_from_where():
    units = variant_units()
    figure = variant_composition.variant_composition(units, ["p55", "p70", "p85", "whole"], 24)
    fills = {to_rgba(colour): source for source, (colour, _) in variant_composition.SOURCES.items()}
    words = {"interval": "depth intervals", "text": "text runs"}
    for ax, variant in zip(figure.axes, ["p55", "p70", "p85", "whole"], strict=True):
        rows = [label.get_text() for label in ax.get_yticklabels()]
        drawn = set()
        for bar in ax.collections:
            colour = tuple(bar.get_facecolor()[0])
            if colour not in fills:  # an empty cell
                continue
            box = bar.get_paths()[0].get_extents()
            row = rows[round((box.y0 + box.y1) / 2)]
            drawn.add((row, round(box.x0 + 0.45), round(box.x1 - 0.45), fills[colour]))
        wanted = set()
        for one in units[units["variant"] == variant].itertuples():
            row = words.get(one.kind, f"linear {one.stream} FFNs")
            if one.kind == "modulation":
                row = "txt_mod rank" if one.path == "txt_mod.1" else "img_mod rank"
            source = "refit" if one.source.startswith("refit-") else one.source  # in any set
            wanted.add((row, one.first, one.last, source))
        assert drawn == wanted
    assert "the teacher itself" in figure.axes[-1].get_title(loc="left")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    refitted = "closed form, refitted in its set"
    assert legend == ["closed form", refitted, "untrained", "distilled", "random subsets"]


def test_a_trained_block_with_two_linear_ffns_is_drawn_and_counted_in_both_rows():
    units = variant_units()
    one = units[(units["kind"] == "ffn") & (units["variant"] == "p55")].iloc[[0]]
    both = one.assign(first=5, last=5, stream="image text", source="subsets")
    figure = variant_composition.variant_composition(pd.concat([one, both]), ["p55"], 24)
    (ax,) = figure.axes
    trained = to_rgba(variant_composition.SOURCES["subsets"][0])
    cells = [bar for bar in ax.collections if tuple(bar.get_facecolor()[0]) == trained]
    assert len(cells) == 2
    assert ax.get_title(loc="left") == "p55: 3 linear FFNs"


def test_names_keep_off_curves():
    figure = quality.budget_errors(points_table(), metrics_table(), ["p55", "p70"])
    for ax in figure.axes:
        curve = next(n for n in ax.lines if n.get_linestyle() == "-" and len(n.get_xdata()) == 10)
        corners = curve.get_transform().transform_path(curve.get_path())
        for name in ax.texts:
            name.update_positions(figure.canvas.get_renderer())
            assert not corners.intersects_bbox(Text.get_window_extent(name), filled=False)


def test_calibration_plot(tmp_path):
    table = calibration_table()
    path = write(tmp_path, "calibration", table)
    draw("ablation", "--config", "{}", "--calibration", path, "--output", tmp_path)
    text = svg_text(tmp_path / "calibration.svg")
    assert "ranked best by velocity error before training" in text
    for column in ("cost_cka", "cost_probe", "cost_untrained"):
        for rows in (table, table.query("kind == 'depth'")):
            rows = rows[rows[column].notna()]
            # Spearman's own formula, which holds without ties.
            a, b = (rows[name].to_numpy().argsort().argsort() for name in (column, "trained"))
            n = len(rows)
            rho = 1 - 6 * ((a - b) ** 2).sum() / (n * (n**2 - 1))
            assert f"ρ = {rho:.2f} (n = {n})" in text
    assert {"depth interval", "image FFN", "text FFN", "text run"} <= set(text.split("\n"))


def test_rank_correlation_with_ties_and_gaps():
    a = pd.Series([1.0, 1.0, 2.0, np.nan, 5.0])
    b = pd.Series([3.0, 4.0, 4.0, 9.0, 7.0])
    ranks = [1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4]
    expected = np.corrcoef(*ranks)[0, 1]
    np.testing.assert_allclose(rank_correlation(a, b), expected)
    assert np.isnan(rank_correlation(a, b * 0))


def test_calibration_of_free_candidates_of_one_price_and_of_none():
    table = calibration_table().query("kind == 'ffn_text'").reset_index(drop=True)
    table["cost_probe"] = np.nan
    table.loc[0, ["cost_untrained", "trained"]] = 0.0
    (ax,) = price_calibration(table).axes
    x = ax.lines[["s" == line.get_marker() for line in ax.lines].index(True)].get_xdata()
    assert x[0] == table["cost_untrained"][1:].min() / 2
    table["cost_untrained"] = np.nan
    empty = price_calibration(table)
    assert "holds no prices" in "".join(text.get_text() for text in empty.texts)
