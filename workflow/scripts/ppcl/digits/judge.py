"""The judge: reads digit and colours back from pictures (`evaluate` with `judge: digits`)."""

import numpy as np
from sklearn.svm import SVC

from ppcl.digits.handwriting import COLORS, RGB, SIZE, digits, paint, stroke


class Judge:
    """Reads digit, digit colour and background colour from a picture.

    The paper colour is the palette colour nearest to the border's median pixel; the ink is the
    palette colour nearest to the median of the pixels farthest from the paper; the digit is read by
    an RBF support vector machine on the ink's opacity map at 8x8. It is fitted on the train split
    of the real digits only (a few seconds), so its accuracy on the test split is an honest one.
    """

    def __init__(self, seed: int = 0, copies: int = 10):
        images, labels = digits("train")
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

        Raises:
            ValueError: pictures of another size.
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
        distance = np.linalg.norm(flat - RGB[papers][:, None], axis=-1)
        farthest = np.argsort(distance, 1)[:, -SIZE:]
        ink_pixels = np.take_along_axis(flat, farthest[..., None], 1)
        inks = self._nearest(np.median(ink_pixels, 1), forbidden=papers)
        direction = RGB[inks] - RGB[papers]
        opacity = ((flat - RGB[papers][:, None]) * direction[:, None]).sum(-1)
        opacity = np.clip(opacity / (direction**2).sum(-1, keepdims=True), 0, 1)
        features = np.stack([self._shrink(o.reshape(SIZE, SIZE)) for o in opacity])
        return [
            {"digit": int(d), "digit_color": COLORS[i], "background_color": COLORS[p]}
            for d, i, p in zip(self._svm.predict(features), inks, papers, strict=True)
        ]

    def accuracy_on_real_digits(self, seed: int = 1) -> dict[str, float]:
        """Shares of held-out real digits, drawn in random colours, that are read correctly, 0 to 1:
        `digit`, `digit_color` and `background_color`."""
        images, labels = digits("test")
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
        distance = np.linalg.norm(rgb[:, None] - RGB[None], axis=-1)
        if forbidden is not None:
            distance[np.arange(len(rgb)), forbidden] = np.inf
        return distance.argmin(1)
