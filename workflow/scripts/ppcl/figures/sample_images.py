"""Images of the teacher and the variants, of the same prompts and seeds."""

import io
import json
import math
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from ppcl.figures import style

PROMPTS = 8  # whose images are drawn
FRAMES = 3  # of a video: the first, one between, the last
_GIVEN = "given"  # column of the pictures that prompts name


@style.styled
def sample_images(table: pd.DataFrame, metrics: pd.DataFrame, rows: int = PROMPTS) -> Figure:
    """The first prompts' images: teacher and variants of one prompt share a seed.

    One row per prompt, one column per variant, with its parameters above it. Where prompts name a
    picture, a first column has it; of a video, a few frames stand side by side. A picture is framed
    if the judge reads something else than the prompt asks for; what it reads then stands below.
    Small images are enlarged without smoothing.

    Args:
        table: as schemas.IMAGES. Drawn of it: png (file contents), frames, prompt, source (of the
            teacher's rows), and read (JSON of what the judge read; empty where there was none).
        metrics: as schemas.METRICS, of which parameter_fraction (teacher = 1, shown in %) counts.
        rows: at most that many prompts are drawn.
    """
    order = style.by_size(metrics)
    shown = set(table["variant"])
    variants = [name for name in order if name in shown] + sorted(shown - set(order))
    prompts = sorted(table["prompt_index"].unique())[:rows]
    if not prompts:
        return style.message("Images", "The evaluation kept no images.")
    fractions = metrics[metrics["metric"] == "parameter_fraction"].set_index("variant")["value"]
    # One picture per prompt and variant; more seeds of a prompt would be more rows of the same.
    first = table.sort_values("seed").drop_duplicates(["variant", "prompt_index"])
    cells = first.set_index(["prompt_index", "variant"])

    framed = [
        (prompt, variant)
        for prompt, variant in cells.index
        if prompt in prompts and not _reading(cells.loc[(prompt, variant), "read"])["correct"]
    ]
    sources = first[first["source"].map(len) > 0].set_index("prompt_index")["source"]
    columns = [_GIVEN] * bool(len(sources)) + variants
    note = "Below each name: transformer parameters, of the teacher's."
    if (first["frames"] > 1).any():
        note += f" Of each video {FRAMES} frames, from first to last."
    note += "\nFramed: read as something else than the prompt asks for." if framed else ""
    # Sizes in inches. Text at the left, then one column of pictures per variant.
    left, side, down = 2.0, 0.82, 1.0
    wide = side * _ratio(first)
    across = wide + 0.15
    top = 1.12 if framed else 0.93
    figure = style.new_figure(
        "Same prompt, same seed",
        top + down * len(prompts),
        left + across * len(columns),
        note=note,
    )
    figure.set_layout_engine(None)
    for line, prompt in enumerate(prompts):
        text = first.loc[first["prompt_index"] == prompt, "prompt"].iloc[0]
        # SVG can't hold control characters and other unprintable ones.
        text = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)
        text = textwrap.fill(text, 27, max_lines=5, placeholder=" …")
        label = style.axes_at(figure, 0.1, top + line * down, left, side, frameon=False)
        label.set(xticks=[], yticks=[])
        label.text(0, 0.5, text, va="center", parse_math=False)
        for column, variant in enumerate(columns):
            ax = style.axes_at(figure, left + column * across, top + line * down, wide, side)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if line == 0:
                size = f"{100 * fractions[variant]:.0f} %" if variant in fractions else ""
                ax.set_title(f"{variant}\n{size}", loc="center", parse_math=False)
            if variant == _GIVEN and prompt in sources.index:
                ax.imshow(_pixels(sources[prompt]), interpolation="none")
            elif (prompt, variant) in cells.index:
                cell = cells.loc[(prompt, variant)]
                ax.imshow(_pixels(cell["png"], int(cell["frames"])), interpolation="none")
            if (prompt, variant) in framed:
                ax.spines[:].set(visible=True, color=style.VERMILION, linewidth=2.2)
                reading = _reading(cells.loc[(prompt, variant), "read"])["text"]
                ax.set_xlabel(reading, color=style.VERMILION, fontsize=6, labelpad=2)
    return figure


def _ratio(table: pd.DataFrame) -> float:
    """Width over height of a cell: 1, and of videos that of their frames side by side."""
    films = table[table["frames"] > 1]
    if not len(films):
        return 1.0
    width, height = Image.open(io.BytesIO(films["png"].iloc[0])).size
    frames = int(films["frames"].iloc[0])
    return float(np.clip(min(frames, FRAMES) * width / (height / frames), 1, 6))


def _pixels(png: bytes, frames: int = 1) -> np.ndarray:
    """Decode to uint8 [height, width, 3], at least 256 pixels (whole factors), at most 512; of a
    video, a few of its frames, each of that size, side by side."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    high = picture.height // frames
    shown = []
    for number in np.unique(np.linspace(0, frames - 1, FRAMES).round().astype(int)):
        frame = picture.crop((0, number * high, picture.width, (number + 1) * high))
        frame.thumbnail((512, 512), Image.Resampling.LANCZOS)
        # Viewers smooth what they enlarge, so the enlarging is done here, pixel by pixel.
        factor = max(1, math.ceil(256 / max(frame.size)))
        shown.append(np.asarray(frame).repeat(factor, 0).repeat(factor, 1))
    gap = np.full((len(shown[0]), max(4, shown[0].shape[1] // 40), 3), 255, np.uint8)
    strips = [part for frame in shown for part in (frame, gap)]
    return np.concatenate(strips[:-1], axis=1)


def _reading(read: str) -> dict:
    """What the judge read, as text, and whether it is correct (it is where nothing judged)."""
    return {"text": "", "correct": True} | (json.loads(read) if read else {})
