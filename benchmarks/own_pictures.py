"""Pictures of a style for `finetune.data`, and how much of a model's pictures has it, by the judge.

The style: digits in yellow ink, whatever colour the caption says.

    python benchmarks/own_pictures.py make --output /tmp/yellow
    python benchmarks/own_pictures.py judge results/digits/models/p50 results/digits/models/own
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow/scripts"))

from ppcl import judges
from ppcl.digits import handwriting
from ppcl.digits.captions import captions

COUNT = 400


def make(folder: Path) -> None:
    """Pictures with their captions beside them."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images, labels = handwriting.digits("train")
    every = [c for c in captions("train") if c.background_color != "yellow"]
    for number in range(COUNT):
        caption = every[rng.integers(len(every))]
        image = images[rng.choice(np.flatnonzero(labels == caption.digit))]
        ink = handwriting.paint(handwriting.stroke(image, rng), "yellow", caption.background_color)
        Image.fromarray((ink * 255).round().astype(np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption.prompt)


def judge(models: list[str], count: int = 200) -> None:
    """Prints how many of `count` pictures are yellow, and of the digit asked for."""
    import torch
    from diffusers import DiffusionPipeline

    reader = judges.JUDGES["digits"].load()
    rng = np.random.default_rng(1)
    every = [c for c in captions("evaluation") if c.background_color != "yellow"]
    asked = [every[i] for i in rng.permutation(len(every))[:count]]
    for model in models:
        pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        shown = []
        for number, caption in enumerate(asked):
            seed = torch.Generator().manual_seed(number)
            shown.append(
                pipe(
                    caption.prompt,
                    height=32,
                    width=32,
                    num_inference_steps=10,
                    generator=seed,
                    output_type="np",
                ).images[0]
            )
        read = reader.read(np.stack(shown))
        yellow = np.mean([one["digit_color"] == "yellow" for one in read])
        right = np.mean(
            [str(one["digit"]) == str(c.digit) for one, c in zip(read, asked, strict=True)]
        )
        print(f"{model}: yellow ink {yellow:.3f}, digit right {right:.3f}, of {count}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("make").add_argument("--output", type=Path, required=True)
    parts.add_parser("judge").add_argument("models", nargs="+")
    given = parser.parse_args()
    make(given.output) if given.part == "make" else judge(given.models)
