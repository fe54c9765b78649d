"""Reads a user's own pictures and their captions (`finetune.data`). Imports no torch.

A folder is read as trainers in the field take it: pictures with their captions in `.txt` files of
the same name, or a `metadata` table as `imagefolder` of the library datasets has it. A table is
read as prompts files are. Files are untrusted: only plain formats are opened, with a limit on their
size in pixels.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ppcl.errors import UserError
from ppcl.storage import untrusted
from ppcl.teacher import prompts

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTIONS = ("text", "caption", "prompt")  # columns; the first is the library datasets'
PIXELS = 178_956_970  # of one picture: Pillow's own limit for what may be a decompression bomb
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # none that starts a program
_CAPTION_BYTES = 1 << 20


@dataclass(frozen=True)
class Picture:
    """A picture, a video, or a folder with a video's frames, and its caption."""

    path: Path
    caption: str


def listed(source: str | Path, key: str = "finetune.data") -> list[Picture]:
    """The pictures of a folder or table, in the order of the table or of their names.

    A folder with one of METADATA has a row per picture: file_name, relative to the folder, and a
    column of CAPTIONS. In any other folder each picture, at any depth, has its caption in a .txt
    file beside it with the same name; a subfolder with such a file is a video, as frames in the
    order of their names. Hidden files count for nothing. A table (.csv, .tsv, .jsonl, .parquet) has
    columns prompt and image, as prompts files have them (`prompts.read`).

    Args:
        key: begins messages.

    Raises:
        UserError: a picture without caption, a caption without picture, a name twice or outside the
            folder, or fewer than two pictures; names the file.
    """
    source = Path(source)
    if source.is_dir():
        tables = [source / name for name in METADATA if (source / name).exists()]
        if len(tables) > 1:
            raise UserError(f"{key}: {source} has {tables[0].name} and {tables[1].name}; keep one")
        pictures = list(_by_metadata(tables[0], key) if tables else _by_names(source, key))
    elif source.exists():
        rows = prompts.read(source, key)
        if "image" not in rows[0]:
            raise UserError(
                f"{key}: {source} has no column 'image', which names each caption's picture; add "
                "it, or give the folder of the pictures"
            )
        pictures = [Picture(Path(row["image"]), row["prompt"]) for row in rows]
    else:
        raise UserError(f"{key}: {source} does not exist; give a folder of pictures, or a table")
    if len(pictures) < 2:
        raise UserError(
            f"{key}: {source} has {len(pictures)} pictures with captions; give two or more, as one "
            "of them is held out"
        )
    return pictures


def files(pictures: list[Picture]) -> list[str]:
    """All files of pictures; of a folder of frames, each frame."""
    every: list[str] = []
    for picture in pictures:
        every += map(str, _frames(picture.path) if picture.path.is_dir() else [picture.path])
    return every


def opened(path: Path, size: tuple[int, int, int]) -> "np.ndarray":
    """A picture, or the first frames of a video, as the pipeline makes them.

    Scaled, at its own proportions, until it covers the size, and cut at its middle, as trainers do;
    turned as its EXIF says. Transparency becomes white, 16 bits become 8.

    Args:
        size: frames, height and width in pixels; a picture has 1 frame.

    Returns:
        uint8 [frames, height, width, 3].

    Raises:
        UserError: names the file: it is empty, damaged, too large, animated where a picture is
            wanted, of another format, or has too few frames.
    """
    import numpy as np
    from PIL import Image, ImageOps

    count, height, width = size
    frames: Iterator[Image.Image]
    if path.is_dir():
        frames = (_one(frame) for frame in _frames(path))
    elif count > 1 and path.suffix.lower() in VIDEOS:
        frames = _played(path)
    else:
        frames = iter([_one(path)])
    made = []
    for frame in frames:
        fitted = ImageOps.fit(frame, (width, height), method=Image.Resampling.LANCZOS)
        made.append(np.asarray(fitted, dtype=np.uint8))
        if len(made) == count:
            return np.stack(made)
    raise UserError(
        f"{path}: has {len(made)} frames, and the pipeline makes videos of {count}; take it out, "
        "or set the config's pipeline.num_frames to fewer"
    )


def _by_names(folder: Path, key: str) -> Iterator[Picture]:
    """Pictures of a folder without a table."""
    captions, pictures = {}, {}
    # Links to folders are not followed: they may go in a circle, and out of the folder.
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = set(names)
        for name in sorted(folders):
            if f"{name}.txt" in here:
                pictures[Path(place, name)] = Path(place, name)
        folders[:] = [name for name in folders if Path(place, name) not in pictures]
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() == ".txt":
                captions[path.with_suffix("")] = path
            elif path.suffix.lower() in PICTURES + VIDEOS:
                if other := pictures.get(path.with_suffix("")):
                    raise UserError(
                        f"{key}: {other} and {path} would have one caption; rename one, with its "
                        "caption"
                    )
                pictures[path.with_suffix("")] = path
    for stem, path in sorted(pictures.items()):
        if stem not in captions:
            raise UserError(
                f"{key}: {path} has no caption; write it to {stem.name}.txt beside it, or take the "
                "picture out"
            )
        caption = untrusted.text(captions.pop(stem), _CAPTION_BYTES).removeprefix("\ufeff")
        yield Picture(path, _caption(caption.strip(), f"{key}: {stem}.txt"))
    if captions:
        raise UserError(
            f"{key}: {next(iter(captions.values()))} is a caption without a picture; add the "
            f"picture ({', '.join(PICTURES + VIDEOS)}), or remove the file"
        )


def _by_metadata(table: Path, key: str) -> Iterator[Picture]:
    """Pictures of a folder that a table lists."""
    seen: set[str] = set()
    for place, row in prompts.table_rows(table, key, "file_name"):
        where = f"{key}: {table}: {place}"
        column = next((name for name in CAPTIONS if name in row), None)
        name = row.get("file_name")
        if column is None:
            raise UserError(
                f"{where}: has no caption; name its column one of {', '.join(CAPTIONS)}"
            )
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise UserError(f"{where}: file_name is {prompts.shown(name)}; name a picture's file")
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or inside.split(os.sep)[0] in ("..", "."):
            raise UserError(f"{where}: {prompts.shown(name)} is not inside {table.parent}; move it")
        if inside in seen:
            raise UserError(f"{where}: {prompts.shown(name)} is there twice; remove one row")
        seen.add(inside)
        if not os.path.exists(table.parent / inside):
            raise UserError(
                f"{where}: there is no {table.parent / inside}; add it, or remove the row"
            )
        yield Picture(table.parent / inside, _caption(row[column], where))


def _caption(text: object, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the caption is {prompts.shown(text)}; write a text")
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise UserError(
            f"{where}: {prompts.shown(text)} holds NUL or half a character; write it anew"
        )
    return text


def _frames(folder: Path) -> list[Path]:
    """A video's frames in a folder, in the order of their names."""
    inside = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not inside:
        raise UserError(f"{folder}: holds no frames ({', '.join(PICTURES)}); add them")
    return inside


def _one(path: Path) -> "Image.Image":
    """A picture of 8 bits in RGB, upright."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        if not path.is_file():
            raise UserError(f"{path}: is no file; put the picture itself there")
        if not path.stat().st_size:
            raise UserError(f"{path}: is empty; restore the picture, or take it out")
        Image.MAX_IMAGE_PIXELS = PIXELS
        with Image.open(path, formats=_FORMATS) as stored:
            if stored.width * stored.height > PIXELS:
                raise UserError(f"{path}: has more than {PIXELS:,} pixels; make it smaller")
            count = getattr(stored, "n_frames", 1)
            if count > 1 and stored.format in ("GIF", "WEBP", "PNG"):
                raise UserError(f"{path}: is animated ({count} frames); give a still picture")
            picture: Image.Image = ImageOps.exif_transpose(stored)
            if picture.mode.startswith("I") or picture.mode == "F":
                values = np.asarray(picture, dtype=np.float64)
                if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise UserError(f"{path}: has neither 8 nor 16 bits a colour; save it as PNG")
                picture = Image.fromarray((values / 257).round().astype(np.uint8))
            if picture.has_transparency_data:
                seen = picture.convert("RGBA")
                white = Image.new("RGBA", seen.size, "white")
                return Image.alpha_composite(white, seen).convert("RGB")
            return picture.convert("RGB")
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: has more than {PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(
            f"{path}: can't be read as a picture ({error}); restore it, or take it out"
        ) from error


def _played(path: Path) -> "Iterator[Image.Image]":
    """The frames of a video, at its own rate."""
    from PIL import Image

    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise UserError(
            f"{path}: videos are read by imageio; install it (pip install imageio imageio-ffmpeg), "
            "or give folders of frames"
        ) from error
    try:
        if not path.is_file() or not path.stat().st_size:
            raise UserError(f"{path}: is empty, or no file; restore the video, or take it out")
        plugin = "pillow" if path.suffix.lower() == ".gif" else "FFMPEG"
        for frame in imageio.imiter(path, plugin=plugin):
            yield Image.fromarray(frame).convert("RGB")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: can't be read as a video ({error}); restore it, or take it out"
        ) from error
