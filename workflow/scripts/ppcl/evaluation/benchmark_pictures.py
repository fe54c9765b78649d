"""Puts a model's pictures for a benchmark where the benchmark's own scorer reads them."""

import importlib.util
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ppcl.benchmarks import plans
from ppcl.benchmarks.benchmark import File, Plan
from ppcl.benchmarks.registry import BENCHMARKS
from ppcl.errors import UserError
from ppcl.evaluation import films, generation
from ppcl.storage import schemas, tables, texts


def refuse_unfit(plan: Plan, part: Path) -> None:
    """Raises UserError if the pictures of a table (schemas.IMAGES) are not of the kind or shape
    that the benchmark scores, or are videos that can't be written."""
    table = tables.read(part, schemas.IMAGES)
    frames = table["frames"][0].as_py()
    if BENCHMARKS[plan.benchmark].videos != (frames > 1):
        made, scored = ("videos", "pictures") if frames > 1 else ("pictures", "videos")
        raise UserError(
            f"evaluate.benchmarks: {plan.label} scores {scored}, but this pipeline makes {made}; "
            "leave this benchmark out"
        )
    if frames > 1 and importlib.util.find_spec(films.ENCODER) is None:
        raise UserError(
            f"evaluate.benchmarks: {plan.label}: videos are written by imageio-ffmpeg, which is "
            "not installed; pip install it"
        )
    height, width = generation.from_png(table["png"][0].as_py()).shape[:2]
    plans.refuse_sides(plan, {"height": height // frames, "width": width})


def lay_out(
    plan: Plan, parts: list[Path], folder: Path, rate: int
) -> tuple[list[str], tuple[int, int]]:
    """Writes all files of a plan below `folder`, each whole or not at all.

    A file that is there with the same content stays as it is, so that scores which are newer than
    it still count. What is of a plan of before goes, since scorers read all that they see.

    Args:
        parts: tables of pictures (schemas.IMAGES).
        rate: frames per second of videos.

    Returns:
        The paths below `folder`, and height and width of a picture.
    """
    known, files = BENCHMARKS[plan.benchmark], BENCHMARKS[plan.benchmark].files(plan)
    sides = (0, 0)
    for file, pictures in _complete(files, parts):
        sides = pictures[0].shape[-3:-1]
        _write(folder / file.path, encoded(file.path, pictures, known.columns, rate))
    other = known.texts(plan)
    for path, content in other.items():
        _write(folder / path, content.encode())
    made = [*(file.path for file in files), *other]
    _remove_others(plan, made, folder)
    return made, (int(sides[0]), int(sides[1]))


def encoded(path: str, pictures: list[np.ndarray], columns: int, rate: int) -> bytes:
    """The bytes of a file of one picture, or of several as a grid with so many columns, whose empty
    places are black, or of a video; as its ending says, with the settings of the benchmarks' own
    code."""
    if path.endswith(".mp4"):
        with tempfile.TemporaryDirectory() as place:
            film = Path(place) / "film.mp4"
            films.encode([Image.fromarray(frame) for frame in pictures[0]], film, rate)
            return film.read_bytes()
    picture = grid(pictures, columns) if columns else pictures[0]
    sink = io.BytesIO()
    kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[Path(path).suffix]
    Image.fromarray(picture).save(sink, kind)
    return sink.getvalue()


def grid(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures [height, width, 3] of one size, row by row."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height, width, channels = pictures[0].shape
    whole = np.zeros((rows * height, columns * width, channels), np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        place = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
        whole[place] = picture
    return whole


def _complete(files: list[File], parts: list[Path]) -> Iterator[tuple[File, list[np.ndarray]]]:
    """Each file as soon as all of its pictures were read; a picture is [height, width, 3], a video
    [frames, height, width, 3]. Pictures of one prompt lie close together in the parts."""
    wanted = {(file.prompt, number): file for file in files for number in file.pictures}
    waiting: dict[str, dict[int, np.ndarray]] = {}
    for part in parts:
        table = tables.read(part, schemas.IMAGES).to_pandas()
        for row in table.itertuples():
            number = (row.seed - plans.FIRST_SEED) % plans.SEEDS
            file = wanted[row.prompt_index, number]
            picture = generation.from_png(row.png)
            if row.frames > 1:
                picture = np.stack(np.split(picture, row.frames))
            held = waiting.setdefault(file.path, {})
            held[number] = picture
            if len(held) == len(file.pictures):
                yield file, [held[each] for each in file.pictures]
                del waiting[file.path]


def _write(path: Path, content: bytes) -> None:
    try:
        if path.read_bytes() == content:
            return
    except OSError:
        pass
    texts.write(path, content)


def _remove_others(plan: Plan, made: list[str], folder: Path) -> None:
    """Removes what a plan of before made for this model and this one has not."""
    kept = {folder / path for path in made}
    for pattern in BENCHMARKS[plan.benchmark].patterns:
        for path in list(folder.glob(pattern.format(model=plan.model))):
            if path not in kept and path.is_file():
                path.unlink()
