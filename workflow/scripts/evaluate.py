"""Evaluates the teacher and its variants on the same held-out prompts and seeds.

    python workflow/scripts/evaluate.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet \
        --models results/digits/models/p50 results/digits/models/p70 \
        --metrics results/digits/evaluation/metrics.parquet \
        --images results/digits/evaluation/images.parquet --state results/digits/state/evaluate

Pictures are made in parallel processes, one batch at a time; a killed run goes on with the batches
that are missing. Metrics, with 95 % bootstrap intervals over prompts (latency: over rounds):

    digit_accuracy, digit_color_accuracy, background_color_accuracy, all_correct
                          share of pictures that show what the prompt states (judge: digits)
    judge_digit_accuracy  the judge's own, on real digits it was not fitted on (teacher's rows only)
    psnr (dB), ssim       to the teacher's picture of the same prompt and seed (variants alone);
                          of a video, SSIM is the mean over its frames
    velocity_error        ||v - v_t||^2 / ||v_t||^2 over held-out recorded calls, v_t the teacher's
                          recorded answer; velocity_error_sigma_0.00_0.25 ...: by noise level
    digit_accuracy_difference ...
                          the variant's less the teacher's, over the same prompts and seeds
    parameters, parameter_fraction
                          of the transformer, and over the teacher's
    modulation_parameters, parameter_fraction_without_modulation
                          of its modulation matrices, and of all else over the teacher's
    latency_seconds, latency_ratio
                          median of one batch through the transformer, and over the teacher's;
                          measured in rounds, all models in turn, in one process
    peak_memory_bytes     what loading the transformer and one batch add to a fresh process
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ppcl import program, provenance
from ppcl.configuration import config
from ppcl.digits.handwriting import COLORS, SIZE, digits
from ppcl.digits.judge import Judge
from ppcl.errors import UserError
from ppcl.evaluation import generation, measuring, metrics, model_folders, workers
from ppcl.evaluation.metrics import TEACHER, Estimate, Estimates
from ppcl.evaluation.model_folders import Model
from ppcl.runtime import devices, stopping
from ppcl.settings import Settings
from ppcl.storage import schemas, tables
from ppcl.teacher import arguments, pipelines, prompts, teacher_identity
from ppcl.transformer import calls


def choose_samples(rows: list[dict], count: int, reader: calls.Reader) -> list[dict]:
    """Pictures to make: none shares its prompt or its noise with a recorded calibration sample.

    Raises:
        UserError: an evaluation prompt was recorded for calibration.
    """
    first = max(generation.FIRST_SEED, int(reader.index["seed"].max()) + 1)
    recorded = set(reader.index["prompt"])
    samples = pipelines.samples(rows, count, first)
    for sample in samples:
        if sample["prompt"] in recorded:
            raise UserError(
                f"evaluate.prompts: '{sample['prompt']}' (prompt {sample['prompt_index']}) is also "
                "a calibration prompt (record.prompts), so results on it would flatter; remove it "
                "from one of the two files"
            )
    return samples


def refuse_unjudged(rows: list[dict], path: str) -> None:
    """Raises UserError if a prompt does not state a digit and colours that the judge knows."""
    for number, row in enumerate(rows):
        for name in prompts.JUDGE_COLUMNS:
            known = range(10) if name == "digit" else COLORS
            if row.get(name) not in [str(value) for value in known]:
                raise UserError(
                    f"evaluate.judge is digits, but prompt {number} of {path} has {name} "
                    f"'{row.get(name)}'; it must be one of {', '.join(map(str, known))} "
                    "(or set evaluate.judge: none)"
                )


def read_pictures(judge: Judge | None, part: Path) -> list[str]:
    """JSON of what the judge reads in each picture of a part; empty texts without a judge.

    Raises UserError if the pictures are not of the judge's size.
    """
    column = tables.read(part, schemas.IMAGES, columns=schemas.IMAGES.names).column("png")
    if judge is None:
        return [""] * len(column)
    pictures = [generation.from_png(data) for data in column.to_pylist()]
    if pictures[0].shape != (SIZE, SIZE, 3):
        height, width = pictures[0].shape[:2]
        raise UserError(
            f"evaluate.judge: digits reads pictures of {SIZE} x {SIZE} pixels, these "
            f"have {width} x {height}; set evaluate.judge: none, or pipeline.height and width"
        )
    return [json.dumps(read) for read in judge.read(np.stack(pictures) / metrics.LARGEST)]


def make_pictures(
    models: list[Model],
    samples: list[dict],
    settings: Settings,
    device: torch.device,
    state: Path,
    judge: Judge | None,
) -> tuple[dict[str, list[Path]], dict[Path, list[str]]]:
    """Every model's pictures: (model -> parts, in one order; part -> readings)."""
    options = settings.evaluate
    parts: dict[str, list[Path]] = {}
    readings: dict[Path, list[str]] = {}
    with workers.pool(workers.process_count(settings.processes, device)) as pool:
        batches = pool.submit(
            generation.plan_batches,
            models[0],
            device,
            settings.pipeline,
            samples,
            options.batch_size,
        ).result()
        tasks = {}
        for model in models:
            folder = state / f"{model.name}-{model.digest()[:16]}"
            parts[model.name] = [folder / f"{n:05d}.parquet" for n in range(len(batches))]
            for part, batch in zip(parts[model.name], batches, strict=True):
                task = pool.submit(
                    generation.generate, model, device, settings.pipeline, batch, part
                )
                tasks[task] = part
        bar = tqdm(as_completed(tasks), total=len(tasks), desc="generating", unit="batch")
        for task in bar:
            task.result()
            readings[tasks[task]] = read_pictures(judge, tasks[task])
    return parts, readings


def compare_pictures(
    parts: dict[str, list[Path]], readings: dict[Path, list[str]], rows: list[dict], sink
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Writes all pictures to `sink`, and yields for each model its name and a row per picture:
    prompt_index; with a judge, 1 or 0 for each fact; for a variant, PICTURE_METRICS.

    Only one part, of the model and of the teacher, is in memory at a time.
    """
    for model, of_model in parts.items():
        scores = []
        for part, of_teacher in zip(of_model, parts[TEACHER], strict=True):
            table = tables.read(part, schemas.IMAGES).to_pandas()
            table["read"] = readings[part]
            sink.write(table)
            score = table[["prompt_index"]].copy()
            if table["read"].all():
                read = pd.DataFrame([json.loads(text) for text in table["read"]]).astype(str)
                for name in prompts.JUDGE_COLUMNS:
                    stated = [rows[index][name] for index in table["prompt_index"]]
                    score[f"{name}_accuracy"] = (read[name] == stated).astype(float)
                score["all_correct"] = score.drop(columns="prompt_index").min(axis=1)
            if model != TEACHER:
                reference = tables.read(of_teacher, schemas.IMAGES).column("png").to_pylist()
                likenesses = [
                    metrics.likeness(generation.from_png(mine), generation.from_png(theirs), frames)
                    for mine, theirs, frames in zip(
                        table["png"], reference, table["frames"].tolist(), strict=True
                    )
                ]
                for name in metrics.PICTURE_METRICS:
                    score[name] = [values[name] for values in likenesses]
            scores.append(score)
        yield model, pd.concat(scores)


def measure_memory(
    models: list[Model], device: torch.device, path: Path, rows: np.ndarray, processes: int
) -> Estimates:
    """Peak memory of every model, each in a fresh process."""
    with workers.pool(min(processes, len(models)), fresh=True) as pool:
        tasks = [pool.submit(measuring.peak_memory, m, device, path, rows) for m in models]
        return {
            model.name: {"peak_memory_bytes": Estimate(float(task.result()))}
            for model, task in zip(models, tasks, strict=True)
        }


def judge_accuracy(judge: Judge, resamples: int, seed: int) -> Estimate:
    """The judge's own accuracy on real digits that it was not fitted on."""
    count = len(digits("test")[1])
    right = round(judge.accuracy_on_real_digits()["digit"] * count)
    return metrics.mean(np.arange(count) < right, np.arange(count), resamples, seed)


def estimated(compared: Iterable[tuple[str, pd.DataFrame]], resamples: int, seed: int) -> Estimates:
    """Metrics of each model's pictures and, for a variant, their differences to the teacher's.

    compared: as of `compare_pictures`, the teacher first.
    """
    estimates: Estimates = {}
    of_teacher: dict[str, np.ndarray] = {}
    for name, scores in compared:
        by_prompt = scores.pop("prompt_index")
        estimates[name] = {
            metric: metrics.mean(values, by_prompt, resamples, seed)
            for metric, values in scores.items()
        }
        if name == TEACHER:
            of_teacher = {metric: values.to_numpy() for metric, values in scores.items()}
        else:
            estimates[name] |= metrics.differences(scores, of_teacher, by_prompt, resamples, seed)
    return estimates


def identity_of(
    settings: Settings, rows: list[dict], samples: list[dict], device: torch.device
) -> str:
    """Digest of what decides the pictures."""
    return provenance.digest(
        [
            vars(settings.teacher),
            settings.pipeline,
            [samples, settings.evaluate.batch_size, device.type],
            provenance.stamps(prompts.pictures(rows)),
            provenance.code_digest(Path(__file__)),
        ]
    )


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__, "config", "state", reads=("calls",), writes=("metrics", "images")
    )
    parser.add_argument(
        "--models", type=Path, nargs="+", required=True, help="input: the variants' folders"
    )
    return parser.parse_args()


def main() -> None:
    args = command_line()
    settings = config.load(args.config)
    options, seed = settings.evaluate, settings.seed

    rows = prompts.read(options.prompts, "evaluate.prompts")
    arguments.before_loading(settings.teacher, settings.pipeline, rows, "evaluate.prompts")
    if options.judge == "digits":
        refuse_unjudged(rows, options.prompts)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    models = model_folders.models(teacher, args.models)
    digests = [model.digest() for model in models]
    device = devices.choose(settings.device)
    workers.prepare_workers()
    samples = choose_samples(rows, options.samples, reader)
    timed = reader.draw(reader.heldout_rows("report"), options.batch_size, (seed,))

    judge = Judge() if options.judge == "digits" else None
    processes = workers.process_count(settings.processes, device)
    memory = measure_memory(models, device, args.calls, timed, processes)
    state = args.state / identity_of(settings, rows, samples, device)[:16]
    parts, readings = make_pictures(models, samples, settings, device, state, judge)
    together = model_folders.side_by_side(models, device)
    transformers = {model.name: model.transformer(device) for model in together}
    measured = measuring.measure_transformers(transformers, reader, timed, settings, device)

    stamp = provenance.stamp(settings.given, samples=len(samples), prompts=len(rows))
    with tables.writer(args.images, schemas.IMAGES, stamp) as sink:
        compared = compare_pictures(parts, readings, rows, sink)
        estimates = estimated(compared, options.bootstrap, seed)
        model_folders.refuse_changed(models, digests)
    for name, of_pictures in estimates.items():
        of_pictures |= measured[name] | memory[name]
    if judge is not None:
        accuracy = judge_accuracy(judge, options.bootstrap, seed)
        estimates[TEACHER]["judge_digit_accuracy"] = accuracy
    stopping.ignore()
    tables.write(args.metrics, pd.DataFrame(metrics.rows(estimates)), schemas.METRICS, stamp)


if __name__ == "__main__":
    program.run(main)
