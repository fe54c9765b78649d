"""How every figure of this workflow looks and is written: colours, labels, SVG and PNG files.

Nothing here knows what a figure shows; the other modules do. No torch.
"""

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.typing import RcKeyType

from ppcl.storage import texts

# Okabe and Ito's palette (yellow left out: too pale for lines on white).
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

STREAMS = {  # stream -> colour, marker
    "image": (BLUE, "o"),
    "text": (VERMILION, "s"),
    "joint": (GREEN, "^"),
    "mean": (BLACK, "D"),
}
SERIES = [  # colour, marker and line style of the first, second, ... variant; the teacher is black
    (BLUE, "o", "-"),
    (VERMILION, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (ORANGE, "v", (0, (5, 1, 1, 1, 1, 1))),
    (SKY, "P", (0, (8, 2))),
]
SELECTED, CANDIDATE = "#F7DFB0", "#DCDCDC"  # fills of intervals: orange and grey, made pale
CLOSED_FORM = "#CFE6F5"  # fill of what was computed, not trained

TEACHER = "teacher"  # its name in tables, beside those of variants

WIDTH = 9.0  # inches; a README shows about 900 pixels, so a point of type stays over one pixel
TITLE_HEIGHT = 0.38  # inches above everything else

# Prompts may be Chinese, Japanese or Korean, which matplotlib's own font cannot write.
_CJK = {
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "PingFang SC",
}

RC: dict[RcKeyType, Any] = {
    "font.family": ["DejaVu Sans", *sorted(_CJK & {font.name for font in fontManager.ttflist})],
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "figure.titlesize": 10.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.4,
    "lines.markersize": 3.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    # Identifiers inside an SVG are random unless salted: the same table must give the same file.
    "svg.hashsalt": "ppcl",
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a drawing function under this module's settings, leaving the caller's untouched."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(title: str, height: float, width: float = WIDTH, note: str = "") -> Figure:
    """A figure of `width` x `height` inches with its title, and a smaller note below it.

    What is added lays itself out below the title; `axes_at` places by hand. Needs no display.
    """
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    top = TITLE_HEIGHT + (0.19 * (note.count("\n") + 1) if note else 0)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - top / height))
    left = 0.1 / width
    figure.text(left, 1 - 0.1 / height, title, va="top", fontsize=10.5, parse_math=False)
    figure.text(
        left, 1 - 0.36 / height, note, va="top", fontsize=8, color="#444444", linespacing=1.3
    )
    return figure


def axes_at(
    figure: Figure, left: float, top: float, width: float, height: float, **options: Any
) -> Axes:
    """Axes of a size and place in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    return figure.add_axes(box, **options)


def legend_at(figure: Figure, top: float, handles: Sequence[Artist], **options: Any) -> None:
    """A legend in one line, `top` inches below the figure's upper edge."""
    place = (0.1 / figure.get_figwidth(), 1 - top / figure.get_figheight())
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=place,
        ncols=len(handles),
        borderpad=0,
        borderaxespad=0,
        columnspacing=1.4,
        handletextpad=0.5,
        **options,
    )


def figure_of(ax: Axes) -> Figure:
    """The figure that axes are on.

    Raises:
        ValueError: they were removed from it.
    """
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("axes that were removed from their figure")
    return figure


def freeze(figure: Figure) -> None:
    """Lay out once and keep it: positions in points can be computed, and saving is faster."""
    if figure.get_layout_engine() is not None:
        # Twice: the first pass changes sizes, sizes change which ticks fit, and ticks need room.
        for _ in range(2):
            figure.draw_without_rendering()
        figure.set_layout_engine(None)


def save(figure: Figure, stem: Path, description: str = "") -> list[Path]:
    """Write `stem`.svg (text stays text) and `stem`.png (150 dpi), each in one step.

    The same figure gives the same bytes: no dates, fixed identifiers. `description` is stored in
    the metadata of both files. Returns the paths written.
    """
    written = []
    for suffix in ("svg", "png"):
        path = stem.with_name(f"{stem.name}.{suffix}")
        texts.write(path, as_bytes(figure, suffix, stem.name, description))
        written.append(path)
    return written


def as_bytes(figure: Figure, kind: str, title: str, description: str = "") -> bytes:
    """A figure as a file of a kind, `svg` or `png`, with its metadata; see `save`."""
    stamps = {"Title": title, "Description": description}
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        freeze(figure)
        undated = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=150, metadata=stamps | undated)
    return buffer.getvalue()


@styled
def message(title: str, text: str) -> Figure:
    """A figure that says in words why there is nothing to draw."""
    return new_figure(title, 0.8, note=text)


def span_name(first: int, last: int) -> str:
    """'3' or '3–4' for the blocks first..last."""
    return f"{first}" if first == last else f"{first}{DASH}{last}"


def blocks_name(first: int, last: int) -> str:
    """'block 3' or 'blocks 3–4'."""
    return f"{'block' if first == last else 'blocks'} {span_name(first, last)}"


def streams(table: pd.DataFrame) -> list[str]:
    """The streams named in a table's `stream` column, in the order in which figures show them."""
    present = set(table["stream"])
    return [s for s in STREAMS if s in present] + sorted(present - set(STREAMS))


def stream_look(stream: str) -> tuple[str, str]:
    """Colour and marker of a stream; black dots for a name that no family here uses."""
    return STREAMS.get(stream, (BLACK, "o"))


def series(count: int) -> list[tuple[str, str, Any]]:
    """Colour, marker and line style for `count` variants; the styles repeat after six."""
    return [SERIES[number % len(SERIES)] for number in range(count)]


def by_size(metrics: pd.DataFrame) -> list[str]:
    """Variants from the largest to the smallest transformer, the teacher first."""
    sizes = metrics[metrics["metric"] == "parameter_fraction"].set_index("variant")["value"]
    variants = list(dict.fromkeys(metrics["variant"]))
    return sorted(variants, key=lambda name: (name != TEACHER, -sizes.get(name, 0.0)))


def block_ticks(ax: Axes, blocks: int) -> None:
    """Block numbers on the x axis: every one that fits, multiples of 5 in deep models."""
    step = 1 if blocks <= 30 else 5
    ax.set_xticks(np.arange(0, blocks, step))
    ax.set_xlim(-0.7, blocks - 0.3)


def shade(ax: Axes, spans: Iterable[tuple[int, int]], colour: str = SELECTED) -> None:
    """Shade intervals of whole blocks (first, last) behind the data."""
    for first, last in spans:
        ax.axvspan(first - 0.45, last + 0.45, color=colour, lw=0, zorder=0)


def log_axis(ax: Axes, name: str = "y") -> None:
    """A logarithmic axis with a few plain labels: 0.02, 500, 10⁶. Call it when the data is drawn.

    Data without a positive value, such as errors that are all 0, keep a linear one.
    """
    axis = ax.xaxis if name == "x" else ax.yaxis
    if not axis.get_data_interval()[1] > 0:
        return
    ax.set(**{f"{name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.7 else (1,), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_power)


def _power(value: float, _: object = None) -> str:
    """A tick's label; far from 1 as digits times a power of ten."""
    if 1e-4 < value < 1e4:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"


def strip(ax: Axes, rows: dict[str, list[tuple]], blocks: int) -> None:
    """The depth from block 0 to blocks-1 as one bar per row, with intervals filled in.

    rows: label -> [(first, last, fill colour, text), ...], drawn from top to bottom. A text that
    is wider than its interval is broken at its dash, or left out.
    """
    inches = ax.get_position().width * figure_of(ax).get_figwidth() / blocks
    for height, spans in enumerate(reversed(rows.values())):
        bar = (height - 0.4, 0.8)
        cells = [(block - 0.45, 0.9) for block in range(blocks)]
        ax.broken_barh(cells, bar, fc="white", ec="#BBBBBB", lw=0.5)
        for first, last, colour, text in spans:
            size = last - first + 0.9
            ax.broken_barh([(first - 0.45, size)], bar, fc=colour, ec="#444444", lw=0.8)
            for words, points in ((text, 7.5), (text.replace(DASH, "\n"), 6.5)):
                letters = max(len(line) for line in words.split("\n"))
                if letters * points * 0.0088 + 0.03 < size * inches:
                    middle = ((first + last) / 2, height)
                    ax.text(*middle, words, ha="center", va="center", size=points, linespacing=0.9)
                    break
    ax.set_ylim(-0.45, len(rows) - 0.55)
    ax.set_yticks(range(len(rows)), list(reversed(rows)))
    block_ticks(ax, blocks)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def log_average(steps: np.ndarray, values: np.ndarray, bins: int = 40) -> tuple:
    """Geometric means of a noisy positive curve over at most `bins` equal stretches of steps.

    Values that are not positive (a loss may reach exactly 0) are left out. Returns (mean steps,
    means), both float64.
    """
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    good = values > 0
    steps, values = steps[good], values[good]
    if not len(steps):
        return steps, values
    edges = np.linspace(steps.min(), steps.max(), bins + 1)[1:-1]
    index = np.unique(np.digitize(steps, edges), return_inverse=True)[1]
    count = np.bincount(index)
    means = np.exp(np.bincount(index, np.log(values)) / count)
    return np.bincount(index, steps) / count, means
