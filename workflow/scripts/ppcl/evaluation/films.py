"""Videos as mp4 files, by diffusers' own exporter: alone, or teacher and variant side by side."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ppcl.teacher import hub
from ppcl.transformer import registry
from ppcl.transformer.family import Family

FOLDER = "videos"
ENCODER = "imageio_ffmpeg"  # which diffusers' exporter writes with
_GAP = 16  # pixels between the two, as players want sides in multiples of 16
_TEACHER = "teacher"


def frames_per_second(model: Path, component: str, call: dict) -> int:
    """How fast a pipeline's videos are shown: as fast as its call asks for (LTX), or as its
    authors show them.

    Args:
        model: the pipeline's folder.
        component: its transformer.
        call: the config's `pipeline`.
    """
    asked = call.get("frame_rate")
    if isinstance(asked, (int, float)) and 1 <= asked <= 240:
        return round(asked)
    name = hub.read_index(model)[component][1].removeprefix("Pruned")
    known = registry.family_of(name)
    return known.frames_per_second if known else Family(()).frames_per_second


def write(pictures: pd.DataFrame, variant: str, folder: Path, rate: int) -> tuple[str, ...]:
    """Writes a video per prompt, the teacher's on the left.

    Args:
        pictures: as schemas.IMAGES.
        folder: the card's; its folder FOLDER is made.
        rate: frames per second.

    Returns:
        The videos' paths in `folder`. None without videos, or without ENCODER.
    """
    films = pictures[pictures["frames"] > 1].sort_values("seed")
    if not len(films) or importlib.util.find_spec(ENCODER) is None:
        return ()
    first = films.drop_duplicates(["variant", "prompt_index"]).set_index("variant")
    names = []
    for number in sorted(set(films["prompt_index"])):
        of_prompt = first[first["prompt_index"] == number]
        if {_TEACHER, variant} <= set(of_prompt.index):
            both = [_frames(of_prompt.loc[name]) for name in (_TEACHER, variant)]
            names.append(f"{FOLDER}/{number}.mp4")
            path = folder / names[-1]
            path.parent.mkdir(exist_ok=True)
            encode([_beside(*pair) for pair in zip(*both, strict=False)], path, rate)
    return tuple(names)


def encode(frames: list[Image.Image], path: Path, rate: int) -> None:
    """Writes a video; needs ENCODER. Sides that are odd lose a row or column of pixels.

    Args:
        rate: frames per second.
    """
    from diffusers.utils import export_to_video

    # Its default would blow frames up to sides in multiples of 16.
    width, height = (side - side % 2 for side in frames[0].size)
    even = [frame.crop((0, 0, width, height)) for frame in frames]
    export_to_video(even, str(path), rate, macro_block_size=2)


def _frames(row: pd.Series) -> list[np.ndarray]:
    """The frames of a video, [height, width, 3] each."""
    column = np.asarray(Image.open(io.BytesIO(row["png"])).convert("RGB"))
    return np.split(column, int(row["frames"]))


def _beside(left: np.ndarray, right: np.ndarray) -> Image.Image:
    gap = np.full((len(left), _GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([left, gap, right], axis=1))
