"""Makes a variant's folder ready to be published: model card, pictures, metrics in pruning.json.

    python workflow/scripts/describe.py --config config/digits.yaml --variant p50 \
        --model results/digits/models/p50 --units results/digits/variants/units.parquet \
        --metrics results/digits/evaluation/metrics.parquet \
        --images results/digits/evaluation/images.parquet --card results/digits/cards/p50

What is written to --card is also put into --model: README.md with pictures beside it and, of a
pipeline that makes videos, an mp4 for each of a few prompts (by imageio-ffmpeg, if it is there). A
README.md there that somebody has edited stays as it is. The licence is that of the teacher's card.
"""

import argparse
import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pandas as pd

from ppcl import program
from ppcl.configuration import config
from ppcl.evaluation import films
from ppcl.figures import sample_images, style
from ppcl.publishing import folder, measured, model_card, teacher_card
from ppcl.publishing.model_card import Described
from ppcl.settings import Settings
from ppcl.storage import schemas, tables, whole
from ppcl.teacher import hub

SHOWN = 6  # prompts, whose pictures are on the card


def of_both(path: Path, variant: str) -> tuple[pd.DataFrame, int]:
    """Pictures of a few prompts, by teacher and variant, and how many prompts there are."""
    every = sorted(set(tables.read(path, columns=["prompt_index"])["prompt_index"].to_pylist()))
    where = "prompt_index", every[:SHOWN]
    rows = tables.read(path, schemas.IMAGES, where=where).to_pandas()
    return rows[rows["variant"].isin([style.TEACHER, variant])], len(every)


def described(args: argparse.Namespace, settings: Settings) -> Described:
    """What the card tells of, from the variant's folder and the run's tables."""
    pruning = folder.pruning(args.model)
    repository, revision = (pruning["teacher"][key] for key in ("repository", "revision"))
    teacher = settings.teacher.replace(revision=revision or settings.teacher.revision)
    units = tables.read(args.units, schemas.VARIANT_UNITS).to_pandas()
    metrics = tables.read(args.metrics, schemas.METRICS).to_pandas()
    pictures, prompts = of_both(args.images, args.variant)
    return Described(
        args.variant,
        pruning,
        teacher_card.read(teacher_card.find(teacher), repository, revision),
        settings,
        units[units["variant"] == pruning.get("of", args.variant)],
        metrics,
        pictures,
        prompts,
        int(tables.provenance(args.units)["blocks"]),
        folder.code(args.model),
        films.frames_per_second(args.model, settings.teacher.component, dict(settings.pipeline)),
    )


def write(about: Described, output: Path) -> None:
    """Writes the card's folder."""
    figure = sample_images.sample_images(
        about.pictures, about.metrics[about.metrics["variant"].isin(about.pictures["variant"])]
    )
    with whole.writing(output, folder=True) as made:
        videos = films.write(about.pictures, about.variant, made, about.frames_per_second)
        about = dataclasses.replace(about, videos=videos)
        (made / hub.CARD).write_text(str(model_card.card(about)), encoding="utf-8")
        (made / model_card.PICTURES).write_bytes(style.as_bytes(figure, "png", about.name))
        if about.teacher.licence_file:
            licence = about.teacher.licence_file
            shutil.copyfile(licence, made / licence.name)


def main() -> None:
    parser = program.parser(
        __doc__,
        "config",
        "variant",
        reads=("model", "units", "metrics", "images"),
        writes=("card",),
    )
    args = parser.parse_args()
    about = described(args, config.load(args.config))
    write(about, args.card)
    facts = {"metrics": measured.figures(about.metrics, about.variant)}
    if not folder.complete(args.model, args.card, facts):
        print(f"{args.model / hub.CARD} was edited, so it stays; the new one is in {args.card}")
    if about.moving and not importlib.util.find_spec(films.ENCODER):
        print("no mp4 on the card, frames alone: pip install imageio-ffmpeg, delete --card, rerun")
    if about.teacher.refused:
        print(f"no licence on the card: {about.teacher.refused}")


if __name__ == "__main__":
    program.run(main)
