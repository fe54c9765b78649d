"""Evaluates the teacher and its variants on the same held-out prompts and seeds.

    python workflow/scripts/evaluate.py --config config/digits.yaml \
        --calls results/digits/record/calls.parquet \
        --models results/digits/models/p50 results/digits/models/p70 \
        --metrics results/digits/evaluation/measured.parquet \
        --images results/digits/evaluation/images.parquet --state results/digits/state/evaluate

Pictures are made in parallel processes, one batch at a time; a killed run goes on with the batches
that are missing. Metrics, with 95 % bootstrap intervals over prompts (latency: over rounds):

    <fact>_accuracy, all_correct
                          share of pictures in which evaluate.judge reads what the prompt states
                          (digits: digit_accuracy, digit_color_accuracy, background_color_accuracy)
    judge_..._accuracy    the judge's own, on pictures it was not fitted on (teacher's rows only)
    psnr (dB), ssim       to the teacher's picture of the same prompt and seed (variants alone);
                          of a video, SSIM is the mean over its frames
    velocity_error        ||v - v_t||^2 / ||v_t||^2 over held-out recorded calls, v_t the teacher's
                          recorded answer; velocity_error_sigma_0.00_0.25 ...: by noise level
    <fact>_accuracy_difference ...
                          the variant's less the teacher's, over the same prompts and seeds
    parameters, parameter_fraction
                          of the transformer, and over the teacher's
    stored_bytes, stored_fraction
                          of the transformer's weights as stored, quantised ones too, and over the
                          teacher's as they run
    modulation_parameters, parameter_fraction_without_modulation
                          of its modulation matrices, and of all else over the teacher's
    latency_seconds, latency_ratio
                          median of one batch through the transformer, and over the teacher's;
                          measured in rounds, all models in turn, in one process
    peak_memory_bytes     what loading the transformer and one batch add to a fresh process
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ppcl import judges, program, provenance
from ppcl.configuration import config
from ppcl.errors import UserError
from ppcl.evaluation import generation, judging, making, measuring, metrics, model_folders, workers
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


def compare_pictures(
    parts: dict[str, list[Path]], judged: judging.Judged, sink
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Writes all pictures to `sink`, and yields for each model its name and a row per picture:
    prompt_index; with a judge, 1 or 0 for each fact; for a variant, PICTURE_METRICS.

    Only one part, of the model and of the teacher, is in memory at a time.
    """
    for model, of_model in parts.items():
        scores = []
        for part, of_teacher in zip(of_model, parts[TEACHER], strict=True):
            table = tables.read(part, schemas.IMAGES).to_pandas()
            table["read"] = judged.readings[part]
            sink.write(table)
            score = table[["prompt_index"]].copy()
            score = score.assign(**judged.scores(part, table["prompt_index"].tolist()))
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
            dataclasses.asdict(settings.teacher),
            settings.pipeline,
            [samples, settings.evaluate.batch_size, device.type],
            provenance.stamps(prompts.pictures(rows)),
            provenance.code_digest(Path(__file__)),
        ]
    )


def command_line() -> argparse.Namespace:
    """The options."""
    parser = program.parser(
        __doc__,
        "config",
        "state",
        reads=("calls",),
        writes=("metrics", "images"),
        metrics="evaluation/measured.parquet",
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
    judges.refuse_unknown_facts(options.judge, rows, options.prompts)
    reader = calls.Reader(args.calls)
    teacher = teacher_identity.recorded(settings.teacher, reader.provenance)
    models = model_folders.models(teacher, args.models)
    digests = [model.digest() for model in models]
    device = devices.choose(settings.device)
    workers.prepare_workers()
    samples = choose_samples(rows, options.samples, reader)
    timed = reader.draw(reader.heldout_rows("report"), options.batch_size, (seed,))

    judged = judging.Judged(options.judge, rows)
    processes = workers.process_count(settings.processes, device)
    memory = measure_memory(models, device, args.calls, timed, processes)
    state = args.state / identity_of(settings, rows, samples, device)[:16]
    key = "evaluate.prompts"
    parts = making.pictures(models, samples, settings, device, state, key, judged.read)
    together = model_folders.side_by_side(models, device)
    transformers = {model.name: model.transformer(device) for model in together}
    measured = measuring.measure_transformers(transformers, reader, timed, settings, device)

    stamp = provenance.stamp(settings.given, samples=len(samples), prompts=len(rows))
    with tables.writer(args.images, schemas.IMAGES, stamp) as sink:
        compared = compare_pictures(parts, judged, sink)
        estimates = estimated(compared, options.bootstrap, seed)
        model_folders.refuse_changed(models, digests)
    for name, of_pictures in estimates.items():
        of_pictures |= measured[name] | memory[name]
    estimates[TEACHER] |= judged.tested(options.bootstrap, seed)
    stopping.ignore()
    tables.write(args.metrics, pd.DataFrame(metrics.rows(estimates)), schemas.METRICS, stamp)


if __name__ == "__main__":
    program.run(main)
