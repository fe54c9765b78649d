"""The world of the embedded teacher: coloured digits, captions, and a judge that reads images.

Real handwriting (scikit-learn's copy of the UCI digits, 8x8 pixels, 43 writers) is drawn in one of
six colours on one of the five others. Everything is a pure function of its seed. The only consumers
are `train_teacher`, which learns from these pictures, and `evaluate` with `judge: digits`, which
reads generated pictures back.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import affine_transform
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

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
_RGB = np.array(list(PALETTE.values()), dtype=np.float32) / 255
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a {c} handwritten {d} on a {b} background",
    "the digit {d} in {c} over {b}",
    "a {c} {d} on {b}",
    "{c} {d} , {b} background",
    "handwritten {d} in {c} ink on {b} paper",
    "a photo of a {c} digit {d} on {b} paper",
    "on a {b} background , a {c} {d}",
    "{b} paper with a {c} {d} on it",
    "the number {d} , {c} on {b}",
    "a {b} image of the number {d} in {c}",
    "a {b} card showing a {c} {d}",
    "{d} written in {c} on {b}",
    "someone wrote {d} in {c} on a {b} wall",
    "a {c} number {d} over a {b} background",
)


@dataclass(frozen=True)
class Caption:
    """A caption and the three facts it states."""

    prompt: str
    digit: int
    digit_color: str
    background_color: str


@cache
def captions(split: str) -> tuple[Caption, ...]:
    """All captions of a split, in a fixed order.

    Args:
        split: `train` (four fifths of all captions) or `evaluation` (the rest). The digest of the
            caption's text decides, so a caption never changes sides when templates are added.
    """
    every = (
        Caption(template.format(d=form, c=color, b=background), digit, color, background)
        for template in TEMPLATES
        for digit in range(10)
        for form in (str(digit), WORDS[digit])
        for color in COLORS
        for background in COLORS
        if color != background
    )
    held_out = split == "evaluation"
    return tuple(
        c for c in every if (hashlib.sha256(c.prompt.encode()).digest()[0] < 51) == held_out
    )


@cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
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
    ink, paper = _RGB[COLORS.index(digit_color)], _RGB[COLORS.index(background_color)]
    return (paper + opacity[..., None] * (ink - paper)).astype(np.float32)


class Judge:
    """Reads digit, digit colour and background colour from a picture.

    The paper colour is the palette colour nearest to the border's median pixel; the ink is the
    palette colour nearest to the median of the pixels farthest from the paper; the digit is read by
    an RBF support vector machine on the ink's opacity map at 8x8. It is fitted on the train split
    of the real digits only (a few seconds), so its accuracy on the test split is an honest one.
    """

    def __init__(self, seed: int = 0, copies: int = 10):
        images, labels = handwriting("train")
        rng = np.random.default_rng(seed)
        features = [
            self._shrink(stroke(image, rng, jitter=1.2)) for _ in range(copies) for image in images
        ]
        self._svm = SVC(C=3, gamma="scale").fit(np.stack(features), np.tile(labels, copies))

    @staticmethod
    def _shrink(opacity: np.ndarray) -> np.ndarray:
        return opacity.reshape(8, SIZE // 8, 8, SIZE // 8).mean((1, 3)).ravel()

    def read(self, pictures: np.ndarray) -> list[dict]:
        """What the pictures show.

        Args:
            pictures: [n, SIZE, SIZE, 3], float 0..1.

        Returns:
            One dict per picture with `digit` (int), `digit_color` and `background_color` (str).
        """
        if pictures.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"pictures must be [n, {SIZE}, {SIZE}, 3], got {pictures.shape}")
        border = np.concatenate(
            [
                pictures[:, :2].reshape(len(pictures), -1, 3),
                pictures[:, -2:].reshape(len(pictures), -1, 3),
            ],
            1,
        )
        papers = self._nearest(np.median(border, 1))
        flat = pictures.reshape(len(pictures), -1, 3)
        distance = np.linalg.norm(flat - _RGB[papers][:, None], axis=-1)
        farthest = np.argsort(distance, 1)[:, -SIZE:]
        ink_pixels = np.take_along_axis(flat, farthest[..., None], 1)
        inks = self._nearest(np.median(ink_pixels, 1), forbidden=papers)
        direction = _RGB[inks] - _RGB[papers]
        opacity = ((flat - _RGB[papers][:, None]) * direction[:, None]).sum(-1)
        opacity = np.clip(opacity / (direction**2).sum(-1, keepdims=True), 0, 1)
        features = np.stack([self._shrink(o.reshape(SIZE, SIZE)) for o in opacity])
        return [
            {"digit": int(d), "digit_color": COLORS[i], "background_color": COLORS[p]}
            for d, i, p in zip(self._svm.predict(features), inks, papers, strict=True)
        ]

    def accuracy_on_real_digits(self, seed: int = 1) -> dict[str, float]:
        """Share of held-out real digits, drawn in random colours, that are read correctly."""
        images, labels = handwriting("test")
        rng = np.random.default_rng(seed)
        pairs = [rng.choice(len(COLORS), 2, replace=False) for _ in labels]
        pictures = np.stack(
            [
                paint(stroke(i, rng), COLORS[c], COLORS[b])
                for i, (c, b) in zip(images, pairs, strict=True)
            ]
        )
        read = self.read(pictures)
        return {
            "digit": float(np.mean([r["digit"] == y for r, y in zip(read, labels, strict=True)])),
            "digit_color": float(
                np.mean(
                    [r["digit_color"] == COLORS[c] for r, (c, _) in zip(read, pairs, strict=True)]
                )
            ),
            "background_color": float(
                np.mean(
                    [
                        r["background_color"] == COLORS[b]
                        for r, (_, b) in zip(read, pairs, strict=True)
                    ]
                )
            ),
        }

    @staticmethod
    def _nearest(rgb: np.ndarray, forbidden: np.ndarray | None = None) -> np.ndarray:
        distance = np.linalg.norm(rgb[:, None] - _RGB[None], axis=-1)
        if forbidden is not None:
            distance[np.arange(len(rgb)), forbidden] = np.inf
        return distance.argmin(1)
