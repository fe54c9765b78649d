"""Names written beside curves and points in place of a legend, so that none overlap.

Like `ppcl.figures.style`, it does not know what a figure shows. No torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from ppcl.figures.style import figure_of, freeze

# Directions from a point in steps of six points of type: around it first, then further away.
_PLACES = np.array(
    [(1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 2), (0, -2)]
    + [(dx, dy) for dx in (0, 1, -1, 5, -5) for dy in (3, -3, 5, -5, 7, -7, 9, -9)]
)
_STEP = 6


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name curves at the right edge of `ax`, moved apart vertically so that none overlap.

    ends: (x, y of the curve's last point, text, colour). A curve that ends well before the edge,
    such as a stream that only the first blocks have, is named beside its last point.
    """
    ax.autoscale_view()  # limits that are still pending would misplace every name
    to_axes = ax.transData + ax.transAxes.inverted()
    places = to_axes.transform([(x, y) for x, y, _, _ in ends]) if ends else np.empty((0, 2))
    at_edge = places[:, 0] > 0.9
    height = ax.get_position().height * figure_of(ax).get_figheight() * 72
    places[at_edge] = np.stack(
        [np.ones(at_edge.sum()), spread(places[at_edge, 1], 10.5 / height)], axis=1
    )
    for (_, _, text, colour), place in zip(ends, places, strict=True):
        # Beside the edge; inside the axes above or below the point, as other curves go on.
        offset = (5, 0) if place[0] == 1 else (2, 8 if place[1] < 0.8 else -9)
        _write(ax, text, place, offset, color=colour, xycoords="axes fraction")


def _write(ax: Axes, text: str, place: tuple, offset: tuple, **options: Any) -> Annotation:
    """`text` as it is, without formulas, `offset` points from `place`."""
    options |= {"xytext": offset, "textcoords": "offset points"}
    return ax.annotate(text, place, va="center", parse_math=False, **options)


def spread(wanted: Sequence[float], gap: float) -> np.ndarray:
    """Positions nearest to `wanted` (least squares), in the same order, at least `gap` apart."""
    order = np.argsort(wanted, kind="stable")
    groups: list[list[float]] = []  # sum of (wanted - offset in the group), members
    for value in np.asarray(wanted, float)[order]:
        groups.append([value, 1])
        while len(groups) > 1:
            (low, n), (high, m) = groups[-2:]
            if high / m - low / n >= gap * n:
                break
            groups[-2:] = [[low + high - m * n * gap, n + m]]
    runs = [total / n + gap * np.arange(n) for total, n in groups]
    placed = np.concatenate(runs or [np.empty(0)])
    result = np.empty(len(order))
    result[order] = placed
    return result


def label_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name points (x, y, text, colour) beside them, off each other, off markers, bars and frame.

    Tries places around each point and keeps the one that covers least, the nearest of equals; a
    name that ends up far away gets a line. The figure's layout must not change afterwards, so it is
    frozen here.
    """
    figure = figure_of(ax)
    freeze(figure)
    # Agg's, as style.py sets it.
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # not of every backend
    scale = figure.dpi / 72  # pixels per point of type
    frame = np.asarray(ax.get_window_extent(renderer).extents)[None]
    centres = ax.transData.transform([(x, y) for x, y, _, _ in points])
    # Error bars are collections; curves and the teacher's level are lines. Lines are cut into short
    # pieces: the box of a whole curve does not tell where there is room beside it.
    drawn = []
    for line in ax.lines:
        path = line.get_transform().transform_path(line.get_path())
        corners = np.asarray(path.interpolated(8).vertices)
        ends = corners if line.get_linestyle() == "None" else corners[1:]
        drawn += [Bbox(np.sort(pair, axis=0)) for pair in zip(corners, ends, strict=False)]
    for bars in ax.collections:
        paths = map(bars.get_transform().transform_path, bars.get_paths())
        drawn += [path.get_extents() for path in paths]
    marks = np.array([box.padded(scale / 2).extents for box in drawn])
    marks = np.concatenate([marks, np.hstack([centres - 4 * scale, centres + 4 * scale])])
    named = np.empty((0, 4))
    # What distance from the point costs, in covered pixels: a touch is better than a long line.
    effort = 12 * np.maximum(0, np.abs(_PLACES).sum(1) - 2)
    for (x, y, text, colour), centre in zip(points, centres, strict=True):
        name = _write(ax, text, (x, y), (0, 0), color=colour)
        size = np.asarray(name.get_window_extent(renderer).size)
        name.remove()
        middle = centre + _PLACES * _STEP * scale + np.sign(_PLACES) * [0.5, 0] * size
        boxes = np.hstack([middle - size / 2, middle + size / 2])
        outside = size.prod() - _common(boxes, frame)
        cost = 10 * (outside + _common(boxes, named)) + _common(boxes, marks) + effort
        best = int(np.argmin(np.round(cost, 3)))
        named = np.concatenate([named, boxes[best : best + 1]])
        dx, dy = _PLACES[best]
        arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkB": 3}
        far = {"arrowprops": arrow} if abs(dy) > 2 else {}
        side = {1: "left", -1: "right", 0: "center"}[int(np.sign(dx))]
        _write(ax, text, (x, y), (_STEP * dx, _STEP * dy), color=colour, ha=side, **far)


def _common(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that each of `boxes` [n, 4] (x0, y0, x1, y1) shares with `others` [m, 4], summed."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.maximum(high - low, 0).prod(-1).sum(-1)
