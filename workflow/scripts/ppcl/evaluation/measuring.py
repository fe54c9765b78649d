"""Running teacher and variants side by side: pictures in parallel processes, memory in fresh ones,
velocities and timing in one.

Every model is a complete pipeline folder and is loaded as stock diffusers loads it.
"""

import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ppcl import provenance
from ppcl.closed_forms import modulation
from ppcl.errors import UserError
from ppcl.evaluation import metrics
from ppcl.evaluation.metrics import TEACHER, Estimate
from ppcl.export import assembly
from ppcl.runtime import collector, cores, devices, stopping
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import schemas, tables
from ppcl.teacher import hub, pipelines, prompt_tokens, teacher_identity
from ppcl.transformer import blocks, calls

# Imported once by the fork server, so that no worker spends seconds on it: what this module and
# evaluate.py import (a worker imports the program that it belongs to). Nothing of this package: in
# Python 3.11 the fork server does not find it, and silently goes on without.
PRELOADED = [
    "diffusers.pipelines.pipeline_utils",
    "jsonschema",
    "pandas",
    "skimage.metrics._structural_similarity",
    "sklearn.datasets",
    "sklearn.svm",
]
FIRST_SEED = 1_000_000_000  # of pictures; far from record's, which count up from the config's
Found = dict[str, dict[str, Estimate]]  # model -> metric -> estimate


@dataclass(frozen=True)
class Model:
    """A pipeline under evaluation: its name in the tables, and how to load it."""

    name: str
    source: TeacherSettings

    @property
    def key(self) -> str:
        """What names the model's folder in messages."""
        return "teacher.path" if self.name == metrics.TEACHER else f"variant {self.name}"

    def digest(self) -> str:
        """Changes when a file of the model's folder does (by size and time; weights are large)."""
        return provenance.digest([vars(self.source), teacher_identity.fingerprint(self.source)])

    def pipeline(self, device: torch.device) -> DiffusionPipeline:
        """The whole pipeline. Raises UserError if it can't be loaded."""
        return pipelines.load(self.source, device, key=self.key)

    def transformer(self, device: torch.device) -> nn.Module:
        """The transformer alone. Raises UserError if it can't be loaded."""
        return pipelines.load_transformer(self.source, device, key=self.key)


def models(teacher: TeacherSettings, folders: list[Path]) -> list[Model]:
    """The teacher, then one model per folder, named after it.

    Raises:
        UserError: a folder is not a pipeline, or two have one name.
    """
    found = [Model(metrics.TEACHER, teacher)]
    for folder in folders:
        if not (folder / "model_index.json").is_file():
            raise UserError(f"--models: {folder} is not a pipeline folder; run assemble first")
        assembly.verify(folder)
        if folder.name in {model.name for model in found}:
            raise UserError(f"--models: two models are named '{folder.name}'; rename the folder")
        own_code = assembly.own_code(folder, hub.component(teacher))
        source = teacher.replace(
            path=str(folder),
            revision=None,
            variant=None,
            subfolder=None,
            trust_remote_code=own_code or teacher.trust_remote_code,
            fingerprint=None,  # which is the teacher's
        )
        found.append(Model(folder.name, source))
    return found


def refuse_changed(found: list[Model], digests: list[str]) -> None:
    """Raises UserError if a model's folder is not what it was when these digests were taken.

    Another run of the same config may take it away file by file, and a pipeline loads without some.
    """
    for model, digest in zip(found, digests, strict=True):
        if model.digest() != digest:
            raise UserError(
                f"{model.key}: {model.source.path} was changed while it was evaluated; see that "
                "nothing else works on these results, and rerun"
            )


def side_by_side(found: list[Model], device: torch.device) -> list[Model]:
    """The models, to be on the device at once: where teacher.offload is auto, all their
    transformers stay there or all are streamed, so that times compare."""
    if found[0].source.offload != "auto":
        return found
    sizes = {model.name: pipelines.transformer_size(model.source) for model in found}
    how = "none" if devices.offload("auto", sizes, device) == "none" else "stream"
    return [Model(model.name, model.source.replace(offload=how)) for model in found]


# ---- processes


def process_count(setting: str | int, device: torch.device) -> int:
    """Processes that make pictures: as configured or one per core on a CPU, up to cores.MOST; one
    on a GPU."""
    if device.type != "cpu":
        return 1
    return min(cores.available(), cores.MOST) if setting == "auto" else int(setting)


def _fork_server() -> multiprocessing.context.BaseContext:
    """It starts small and never computes, so its children inherit neither memory, nor threads, nor
    a CUDA context; and it imports once what takes seconds to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def prepare_workers() -> None:
    """Starts what `workers` come from, which imports for seconds, while the caller goes on.

    After the device is chosen: workers see the GPUs that this process sees now.
    """
    _fork_server()
    forkserver.ensure_running()


@contextmanager
def workers(count: int, fresh: bool = False) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that share this job's cores.

    Args:
        fresh: every task gets a process of its own, in which nothing has run before.

    Raises:
        UserError: a process was killed, most likely for lack of memory.
    """
    pool = ProcessPoolExecutor(
        count,
        mp_context=_fork_server(),
        initializer=_start_worker,
        initargs=(max(1, cores.available() // count),),
        max_tasks_per_child=1 if fresh else None,
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        if stopping.warned():  # and so were they
            stopping.end()
        raise UserError(
            "a process of the evaluation was killed, most likely for lack of memory; lower "
            "evaluate.batch_size or processes, and rerun: finished pictures are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    stopping.heed(worker=True)
    collector.work()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what models that are loaded here go by
    torch.set_num_threads(threads)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()  # also returns when the parent was killed, which nothing else would tell us
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ---- pictures

_loaded: dict[str, tuple[Model, DiffusionPipeline]] = {}


def _pipeline(model: Model, device: torch.device) -> DiffusionPipeline:
    """The model's pipeline; this process keeps the one that it used last."""
    if _loaded.get("last", (None, None))[0] != model:
        _loaded.clear()
        _loaded["last"] = (model, model.pipeline(device))
    return _loaded["last"][1]


def plan_batches(
    model: Model, device: torch.device, settings: dict, items: list[dict], size: int
) -> list[list[dict]]:
    """See pipelines.in_batches; a task, so that only a worker loads the pipeline. Warns of prompts
    that are cut."""
    pipe = _pipeline(model, device)
    texts = [item["prompt"] for item in items]
    prompt_tokens.warn_of_cut(pipe, texts, settings, "evaluate.prompts")
    return pipelines.in_batches(pipe, items, size)


def generate(
    model: Model, device: torch.device, settings: dict, batch: list[dict], part: Path
) -> None:
    """Makes one batch of pictures into a table (schemas.IMAGES), unless it is there already.

    Args:
        settings: the config's `pipeline` mapping.
        batch: per picture: prompt_index, prompt, seed.

    Raises:
        UserError: a picture holds NaN or infinity.
    """
    if part.exists():
        return
    pipe = _pipeline(model, device)
    prompts, seeds = [item["prompt"] for item in batch], [item["seed"] for item in batch]
    images = [item.get("image") for item in batch]
    made = pipelines.run(pipe, prompts, seeds, settings, images, output_type="np")
    images, frames = pictures(made)
    if not np.isfinite(images).all():
        raise _broken(model.name, "a picture")
    rounded = (images * 255).round().astype(np.uint8)
    columns = {
        "variant": [model.name] * len(batch),
        "prompt": prompts,
        "seed": seeds,
        "png": [to_png(picture) for picture in rounded],
        "read": [""] * len(batch),
        "prompt_index": [item["prompt_index"] for item in batch],
        "frames": [frames] * len(batch),
    }
    with stopping.part():
        tables.write(part, pa.table(columns), schemas.IMAGES, {})


def pictures(made) -> tuple[np.ndarray, int]:
    """What a pipeline made with output_type "np", float [batch, height, width, 3], and the number
    of frames of each: those of a video are one below the other."""
    if hasattr(made, "images"):
        return np.asarray(made.images), 1
    frames = np.asarray(made.frames)  # [batch, frames, height, width, 3]
    return frames.reshape(len(frames), -1, *frames.shape[3:]), frames.shape[1]


def to_png(picture: np.ndarray) -> bytes:
    """PNG bytes of a picture [height, width, 3], uint8."""
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "PNG")
    return sink.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """The picture [height, width, 3], uint8, of PNG bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _broken(name: str, what: str) -> UserError:
    return UserError(
        f"variant '{name}': {what} holds NaN or infinity; its weights are numerically broken "
        "in this dtype: try teacher.dtype float32, or a lower learning rate for its training"
    )


# ---- velocities, time and memory


@torch.no_grad()
def velocity_errors(
    name: str,
    transformer: nn.Module,
    reader: calls.Reader,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Replays recorded calls and compares with the teacher's recorded answers.

    Returns:
        Per row, in one order for all models: error and norm (metrics.squared_errors),
        prompt_index, sigma.

    Raises:
        UserError: the model answers with NaN or infinity, or a recorded answer is all zero.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for recorded in reader.batches(rows, batch_size, device):
        batch = recorded.to(device)
        output = blocks.answer(transformer, batch.arguments).cpu().double().numpy()
        if not np.isfinite(output).all():
            raise _broken(name, "the transformer's output")
        error, norm = metrics.squared_errors(output, recorded.output.double().numpy())
        calls.refuse_zeros(norm.min())
        found = {"error": error, "norm": norm}
        found |= {name: recorded.rows[name] for name in ("prompt_index", "sigma")}
        for column, values in found.items():
            columns.setdefault(column, []).append(values)
    return {name: np.concatenate(values) for name, values in columns.items()}


def measure_transformers(
    transformers: Mapping[str, nn.Module],
    reader: calls.Reader,
    timed: np.ndarray,
    settings: Settings,
    device: torch.device,
    accelerator: Accelerator | None = None,
) -> Found:
    """Size, velocity error and latency of every transformer.

    Args:
        transformers: by name; one is the teacher.
        timed: rows of the batch whose time is measured.
        accelerator: of several processes, all of which call this. They share out the velocities;
            the main process measures times, while the others have nothing to do, and they have
            no latencies in the end. None: this process does all.

    Returns:
        model -> metric -> estimate; those of latency in the main process alone.
    """
    options, seed = settings.evaluate, settings.seed
    resamples = options.bootstrap
    # The same for all, whichever was loaded last.
    devices.use_threads(transformers[TEACHER].parameters(), device)
    found: Found = {}
    for name, transformer in transformers.items():
        found[name] = sizes(transformer, transformers[TEACHER])

    rows = np.sort(reader.sample_heldout("report", options.velocity_rows, seed, "velocity_rows"))
    others = {name: module for name, module in transformers.items() if name != TEACHER}
    compared = _compared(others, reader, rows, options.batch_size, device, accelerator)
    # The teacher's answers are the recorded ones, so its error is zero by definition.
    one = next(iter(compared.values()))
    compared[TEACHER] = one | {"error": np.zeros(len(rows))}
    for name, columns in compared.items():
        buckets = metrics.sigma_buckets(columns["sigma"])
        masks = {"": np.ones(len(rows), bool)} | {f"_{key}": m for key, m in buckets.items()}
        for suffix, mask in masks.items():
            picked = [columns[key][mask] for key in ("error", "norm", "prompt_index")]
            found[name][f"velocity_error{suffix}"] = metrics.ratio(*picked, resamples, seed)

    if accelerator is None or accelerator.is_main_process:
        processes = accelerator.num_processes if accelerator else 1
        with _all_cores(transformers[TEACHER], device, processes):
            for name, times in latencies(transformers, reader, timed, settings, device).items():
                found[name] |= times
    return found


def _compared(
    transformers: Mapping[str, nn.Module],
    reader: calls.Reader,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device,
    accelerator: Accelerator | None,
) -> dict[str, dict[str, np.ndarray]]:
    """`velocity_errors` of every transformer: model -> `error`, `norm`, `prompt_index`, `sigma`,
    each [rows]. Of several processes each takes some batches, and all have all in the end."""
    named = tqdm(
        transformers.items(),
        desc="comparing velocities",
        unit="model",
        disable=accelerator is not None and not accelerator.is_main_process,
    )
    if accelerator is None or accelerator.num_processes == 1:
        return {
            name: velocity_errors(name, transformer, reader, rows, batch_size, device)
            for name, transformer in named
        }
    rank, count = accelerator.process_index, accelerator.num_processes
    batches = reader.in_batches(rows, batch_size)
    ends = np.cumsum([len(batch) for batch in batches])
    # A batch of each model is one process's, and its place in the sum is zero for the others.
    measured = torch.zeros(len(transformers), 2, len(rows), dtype=torch.float64)
    for model, (name, transformer) in enumerate(named):
        # With as many batches as processes or fewer, it should not always be the same ones.
        for number in range((rank + model) % count, len(batches), count):
            batch, end = batches[number], ends[number]
            one = velocity_errors(name, transformer, reader, batch, len(batch), device)
            place = measured[model, :, end - len(batch) : end]
            place.copy_(torch.from_numpy(np.stack([one["error"], one["norm"]])))
    whole = accelerator.reduce(measured.to(accelerator.device), reduction="sum").cpu().numpy()
    order = np.concatenate(batches)
    about = {name: reader.index[name][order] for name in ("prompt_index", "sigma")}
    return {
        name: {"error": error, "norm": norm} | about
        for name, (error, norm) in zip(transformers, whole, strict=True)
    }


@contextmanager
def _all_cores(transformer: nn.Module, device: torch.device, processes: int) -> Iterator[None]:
    """Within, a model computes as if this process were the job's only one: the others wait."""
    if processes == 1 or device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    if cores.worth_threads(weight.shape for weight in transformer.parameters()):
        torch.set_num_threads(processes * cores.available())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latencies(
    transformers: Mapping[str, nn.Module],
    reader: calls.Reader,
    timed: np.ndarray,
    settings: Settings,
    device: torch.device,
) -> Found:
    """The latency part of `measure_transformers`."""
    options, seed = settings.evaluate, settings.seed
    arguments = reader.batch(timed).to(device).arguments
    with torch.no_grad():
        runs = {n: lambda t=t: t(**arguments) for n, t in transformers.items()}
        times = interleaved_times(runs, options.latency_repeats, device)
    how = options.bootstrap, seed
    return {
        name: {
            "latency_seconds": metrics.median_ratio(seconds, np.ones_like(seconds), *how),
            "latency_ratio": metrics.median_ratio(seconds, times[TEACHER], *how),
        }
        for name, seconds in times.items()
    }


def sizes(transformer: nn.Module, teacher: nn.Module) -> dict[str, Estimate]:
    """Parameters, and their share of the teacher's; the same without modulation matrices, if there
    are any: making these small saves memory, not time."""
    count, whole = blocks.parameter_count(transformer), blocks.parameter_count(teacher)
    found = {"parameters": float(count), "parameter_fraction": count / whole}
    if of_whole := modulation.parameter_count(teacher):
        own = modulation.parameter_count(transformer)
        found["modulation_parameters"] = float(own)
        found["parameter_fraction_without_modulation"] = (count - own) / (whole - of_whole)
    return {name: Estimate(value) for name, value in found.items()}


def interleaved_times(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of every run [repeats], measured in rounds: each run once, in order, then again.

    So all share the machine's ups and downs. An unmeasured round comes first.
    """
    rounds = list(timed_rounds(runs, repeats, device))
    return {name: np.array([times[name] for times in rounds]) for name in runs}


def timed_rounds(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> Iterator[dict[str, float]]:
    """As `interleaved_times`, round by round: seconds by run."""
    for round_ in range(repeats + 1):
        times = {}
        for name, run in runs.items():
            devices.synchronise(device)
            start = time.perf_counter()
            run()
            devices.synchronise(device)
            times[name] = time.perf_counter() - start
        if round_:
            yield times


@torch.no_grad()
def peak_memory(model: Model, device: torch.device, path: Path, rows: np.ndarray) -> int:
    """Bytes that loading the transformer and running one batch of recorded calls take at most.

    To be called in a fresh process: on a CPU only the process's peak is known, which never falls;
    what Python, its libraries and the batch took before is subtracted.
    """
    reader = calls.Reader(path)
    batch = reader.batch(rows).to(device)
    devices.reset_peak_memory(device)
    before = devices.peak_memory(device)
    model.transformer(device)(**batch.arguments)
    return devices.peak_memory(device) - before
