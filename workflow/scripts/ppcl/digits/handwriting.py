"""Pictures of coloured handwritten digits, which the embedded teacher learns from.

Real handwriting (scikit-learn's copy of the UCI digits, 8x8 pixels, 43 writers) is drawn in one of
six colours on one of the five others. Everything is a pure function of its seed.
"""

from functools import cache

import numpy as np
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE = 32  # pixels, both sides
PALETTE = {
    "red": (220, 30, 40),
    "green": (20, 160, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 40),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
COLORS = tuple(PALETTE)
RGB = np.array(list(PALETTE.values()), dtype=np.float32) / 255


@cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Real digits of a split: intensities [n, 8, 8] in 0..1 (float32) and labels [n].

    `train` holds three quarters of the 1,797 pictures, `test` the rest, stratified by digit.
    """
    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    parts = train_test_split(
        images, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    return (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])


def stroke(image: np.ndarray, rng: np.random.Generator, jitter: float = 1.0) -> np.ndarray:
    """Opacity map [SIZE, SIZE] in 0..1 of one 8x8 digit, slightly rotated, scaled and moved.

    Args:
        jitter: 0 draws the digit upright in the middle; 1 allows +-8 degrees, +-8 % and +-1.5 px.
    """
    angle = np.deg2rad(rng.uniform(-8, 8) * jitter)
    scale = 8 / 28 * (1 + rng.uniform(-0.08, 0.08) * jitter)
    shift = rng.uniform(-1.5, 1.5, 2) * jitter
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    padded = np.pad(image, 2)  # strokes reach the 8x8 frame's edge; without a margin they end flat
    offset = np.array([5.5, 5.5]) - matrix @ (np.array([SIZE / 2 - 0.5] * 2) + shift)
    smooth = affine_transform(padded, matrix, offset, output_shape=(SIZE, SIZE), order=3)
    # Cubic upsampling leaves soft grey edges; a steeper ramp gives a stroke of clear colour.
    return np.clip((smooth - 0.15) / 0.55, 0, 1)


def paint(opacity: np.ndarray, digit_color: str, background_color: str) -> np.ndarray:
    """RGB picture [SIZE, SIZE, 3] (float32, 0..1) of an opacity map in two palette colours."""
    ink, paper = RGB[COLORS.index(digit_color)], RGB[COLORS.index(background_color)]
    return (paper + opacity[..., None] * (ink - paper)).astype(np.float32)
