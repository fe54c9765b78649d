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


@style.styled
def sample_images(table: pd.DataFrame, metrics: pd.DataFrame, rows: int = PROMPTS) -> Figure:
    """The first prompts' images: teacher and variants of one prompt share a seed.

    One row per prompt, one column per variant, with its parameters above it. A picture is framed if
    the judge reads something else than the prompt asks for; what it reads then stands below. Small
    images are enlarged without smoothing.

    Args:
        table: as schemas.IMAGES. Drawn of it: png (file contents), prompt, and read (JSON of what
            the judge read; empty where there was none).
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
    note = "Below each name: transformer parameters, of the teacher's."
    note += "\nFramed: read as something else than the prompt asks for." if framed else ""
    # Sizes in inches. Text at the left, then one column of pictures per variant.
    left, side, across, down = 2.0, 0.82, 0.97, 1.0
    top = 1.12 if framed else 0.93
    figure = style.new_figure(
        "Same prompt, same seed",
        top + down * len(prompts),
        left + across * len(variants),
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
        for column, variant in enumerate(variants):
            ax = style.axes_at(figure, left + column * across, top + line * down, side, side)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if line == 0:
                size = f"{100 * fractions[variant]:.0f} %" if variant in fractions else ""
                ax.set_title(f"{variant}\n{size}", loc="center", parse_math=False)
            if (prompt, variant) in cells.index:
                ax.imshow(_pixels(cells.loc[(prompt, variant), "png"]), interpolation="none")
            if (prompt, variant) in framed:
                ax.spines[:].set(visible=True, color=style.VERMILION, linewidth=2.2)
                reading = _reading(cells.loc[(prompt, variant), "read"])["text"]
                ax.set_xlabel(reading, color=style.VERMILION, fontsize=6, labelpad=2)
    return figure


def _pixels(png: bytes) -> np.ndarray:
    """Decode to uint8 [height, width, 3], at least 256 pixels (whole factors), at most 512."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    # Viewers smooth what they enlarge, so the enlarging is done here, pixel by pixel.
    factor = max(1, math.ceil(256 / max(picture.size)))
    return np.asarray(picture).repeat(factor, 0).repeat(factor, 1)


def _reading(read: str) -> dict:
    """What the judge read, as text, and whether it is correct (it is where nothing judged)."""
    return {"text": "", "correct": True} | (json.loads(read) if read else {})
