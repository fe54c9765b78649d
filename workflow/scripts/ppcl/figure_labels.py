"""Names written beside curves and points in place of a legend, so that none overlap.

Belongs to `ppcl.figure_style`; it knows as little of what a figure shows. No torch.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from ppcl.figure_style import freeze

# Directions from a point in steps of six points of type: around it first, then further up and down.
_PLACES = [(1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 2), (0, -2)]
_PLACES += [(dx, dy) for dy in (3, -3, 5, -5, 7, -7, 9, -9) for dx in (0, 1, -1)]
_ALIGN = {1: "left", -1: "right", 0: "center"}


def label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name curves at the right edge of `ax`, moved apart vertically so that none overlap.

    ends: (x, y of the curve's last point, text, colour). A curve that ends well before the edge,
    such as a stream that only the first blocks have, is named beside its last point.
    """
    right = ax.transData + ax.transAxes.inverted()
    places = right.transform([(x, y) for x, y, _, _ in ends]) if ends else np.empty((0, 2))
    at_edge = places[:, 0] > 0.9
    height = ax.get_position().height * ax.figure.get_figheight() * 72
    places[at_edge] = np.stack(
        [np.ones(at_edge.sum()), spread(places[at_edge, 1], 10.5 / height)], axis=1
    )
    for (_, _, text, colour), place in zip(ends, places, strict=True):
        # Beside the edge; inside the axes above the point, as other curves go on to the right.
        offset = (5, 0) if place[0] == 1 else (2, 8)
        _write(ax, text, place, offset, color=colour, xycoords="axes fraction")


def _write(ax: Axes, text: str, place: tuple, offset: tuple, **options) -> Annotation:
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
    placed = np.concatenate([total / n + gap * np.arange(n) for total, n in groups] or [[]])
    result = np.empty(len(order))
    result[order] = placed
    return result


def label_points(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name points (x, y, text, colour) beside them, off each other, off markers, bars and frame.

    Tries places around each point, nearest first, and keeps the one that covers least; a name
    that ends up far away gets a line. The figure's layout must not change afterwards, so it is
    frozen here.
    """
    freeze(ax.figure)
    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    centres = ax.transData.transform([(x, y) for x, y, _, _ in points])
    margin = 4 * ax.figure.dpi / 72
    taken = [Bbox([centre - margin, centre + margin]) for centre in centres]
    # Error bars are collections, the teacher's level is a line.
    taken += [line.get_window_extent(renderer).padded(1) for line in ax.lines]
    for bars in ax.collections:
        paths = map(bars.get_transform().transform_path, bars.get_paths())
        taken += [path.get_extents().padded(1) for path in paths]

    def covers(box: Bbox) -> float:
        return 2 * (_area(box) - _common(box, frame)) + sum(_common(box, other) for other in taken)

    for x, y, text, colour in points:
        look = {"color": colour}
        names = [
            _write(ax, text, (x, y), (6 * dx, 6 * dy), ha=_ALIGN[dx], **look) for dx, dy in _PLACES
        ]
        boxes = [name.get_window_extent(renderer) for name in names]
        best = min(range(len(_PLACES)), key=lambda place: round(covers(boxes[place]), 3))
        taken.append(boxes[best])
        for name in names:
            name.remove()
        dx, dy = _PLACES[best]
        if abs(dy) > 2:
            look["arrowprops"] = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkB": 3}
        _write(ax, text, (x, y), (6 * dx, 6 * dy), ha=_ALIGN[dx], **look)


def _area(box: Bbox) -> float:
    return max(0.0, box.x1 - box.x0) * max(0.0, box.y1 - box.y0)


def _common(a: Bbox, b: Bbox) -> float:
    low, high = np.maximum(a.min, b.min), np.minimum(a.max, b.max)
    return float(np.prod(np.maximum(high - low, 0)))
