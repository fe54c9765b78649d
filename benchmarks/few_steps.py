"""Students for a pipeline of four steps: what to record, and whether to average their weights.

    python benchmarks/few_steps.py --seeds 3 --output few_steps.parquet

The embedded teacher runs in four steps. Students of four intervals (16 of its 24 blocks are left)
are distilled, trained in random subsets, and the model is fine-tuned, always with the same steps
and batches, on records of four steps or of twenty, with and without pictures that are noised again.
Each training also keeps averages of its weights at several decays, as the config's `ema` does; they
change nothing in it. Measured after each phase on held-out calls of the four-step pipeline, and at
the end on its pictures.
"""

# ruff: noqa: E402 (paths are searched when libraries are imported)

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow" / "scripts")]

import numpy as np
import pandas as pd
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ppcl import program
from ppcl.configuration import config
from ppcl.digits.judge import Judge
from ppcl.evaluation import generation, metrics, velocities
from ppcl.judges import JUDGES
from ppcl.pruning import students
from ppcl.pruning.students import Students
from ppcl.pruning.units import NewBlock, Unit
from ppcl.runtime import processes
from ppcl.settings import Settings, TrainingSettings
from ppcl.teacher import pipelines, prompts
from ppcl.training import distillation, loop
from ppcl.transformer import blocks, calls
from ppcl.transformer.context import Context

STEPS = 4
INTERVALS = ((1, 3), (5, 7), (9, 11), (17, 19))
DECAYS = (0.0, 0.9, 0.99, 0.999)
RECORDS = {"4 steps": 4, "20 steps": 20}  # steps of the pipeline that is recorded
RENOISED = 6  # states that are noised again, per picture
BOTH = ("pipeline", "renoised")
# What students are trained on: a record, and the kinds of its calls.
ARMS = {
    "4 steps": ("4 steps", ("pipeline",)),
    "4 steps, noised again": ("4 steps", BOTH),
    "20 steps, noised again": ("20 steps", BOTH),
}
PHASES = {"distill": 80, "subsets": 80, "finetune": 60}


@dataclass(frozen=True)
class Reported:
    """What models are measured on.

    rows: of `reader`, held-out calls of the four-step pipeline. pictures: the teacher's, in [0, 1]
    [n, height, width, 3], and `items`, what they are of.
    """

    reader: calls.Reader
    rows: np.ndarray
    pipe: nn.Module
    items: list[list[dict]]
    pictures: list[np.ndarray]


def settings_of(record: str, samples: int) -> Settings:
    """The main job's config with what one record changes."""
    plain = config.load(str(ROOT / "config" / "digits.yaml")).given
    changed = {
        "teacher": {**plain["teacher"], "path": str(ROOT / "resources" / "digits")},
        "pipeline": {**plain["pipeline"], "num_inference_steps": RECORDS[record]},
        "record": {
            **plain["record"],
            "prompts": str(ROOT / "resources" / "digits" / "calibration.csv"),
            "samples": samples,
            "renoised_per_sample": RENOISED,
        },
    }
    return Settings.of({**plain, **changed})


def record(name: str, settings: Settings, folder: Path) -> Path:
    """The calls of one record, by the stage's own program; kept if they are there."""
    calls_file = folder / f"{name.replace(' ', '-')}.parquet"
    if not calls_file.exists():
        wanted = ("seed", "device", "teacher", "pipeline", "record")
        command = [sys.executable, str(ROOT / "workflow" / "scripts" / "record.py")]
        command += ["--config", config.subset(dict(settings.given), *wanted)]
        command += ["--calls", str(calls_file), "--state", str(folder / "state")]
        command += ["--block-facts", str(folder / "blocks.parquet")]
        subprocess.run(command, check=True)
    return calls_file


class OfKinds(calls.Reader):
    """Recorded calls, of which some kinds alone are drawn for training."""

    def __init__(self, path: Path, kinds: tuple[str, ...]):
        super().__init__(path)
        self._drawn = kinds

    def rows(self, **wanted) -> np.ndarray:
        return super().rows(**{"kinds": self._drawn, **wanted})


class Averaged:
    """Losses that also keep averages of the weights, step by step as `loop.train` does."""

    def __init__(self, modules: Mapping[str, nn.Module], losses: loop.Losses):
        self.losses = losses
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.averages = {decay: EMAModel(self.parameters, decay) for decay in DECAYS if decay}

    def __call__(self, step: int) -> Iterator:
        if step:
            self.update()
        yield from self.losses(step)

    def update(self) -> None:
        for average in self.averages.values():
            average.step(self.parameters)

    def at_each_decay(self) -> Iterator[float]:
        """Every decay in turn, while the modules hold that average; at the end, their own
        weights, which is decay 0."""
        own = [p.detach().clone() for p in self.parameters]
        for decay, average in self.averages.items():
            average.copy_to(self.parameters)
            yield decay
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, own, strict=True):
                parameter.copy_(kept)
        yield 0.0


def trained(
    context: Context, phase: str, modules: Mapping[str, nn.Module], losses, options, folder: Path
) -> Averaged:
    """Trains modules in place, for the steps of a phase."""
    averaged = Averaged(modules, losses)
    for module in modules.values():
        module.train()
    (folder / "checkpoint").unlink(missing_ok=True)
    how = loop.Optimisation.from_settings(options)
    loop.train(modules, averaged, how, context.accelerator, folder / "checkpoint", phase)
    averaged.update()
    for module in modules.values():
        module.eval()
    return averaged


def phase_options(settings: Settings, phase: str) -> TrainingSettings:
    """The main job's, with the steps of this benchmark, and a warm-up of a sixth of them."""
    steps = PHASES[phase]
    chosen = {"steps": steps, "warmup_steps": steps // 6, "batch_size": 32, "checkpoint_every": 999}
    return getattr(settings, phase).replace(**chosen)


@torch.no_grad()
def measured(model: nn.Module, reported: Reported, pictures: bool) -> dict[str, metrics.Estimate]:
    """Velocity error on the four-step pipeline's held-out calls; PSNR and the judge's accuracy."""
    size = reported.reader
    compared = velocities.velocity_errors(
        "variant", model, size, reported.rows, 64, torch.device("cpu")
    )
    error, norm, of = (compared[key] for key in ("error", "norm", "prompt_index"))
    estimates = {"velocity_error": metrics.ratio(error, norm, of, 1000, 0)}
    if pictures:
        made = pictures_of(reported.pipe, model, reported.items)
        pairs = zip(made, reported.pictures, strict=True)
        likeness = [metrics.psnr(a, b) for a, b in pairs]
        numbers = [item["prompt_index"] for batch in reported.items for item in batch]
        estimates["psnr"] = metrics.mean(likeness, numbers, 1000, 0)
        estimates["accuracy"] = accuracy(made, reported.items)
    return estimates


def pictures_of(pipe, model: nn.Module, batches: list[list[dict]]) -> list[np.ndarray]:
    """8-bit pictures of a model in the teacher's four-step pipeline."""
    own, made = pipe.transformer, []
    pipe.register_modules(transformer=model)
    call = dict(settings_of("4 steps", 2).pipeline)
    for batch in batches:
        texts, seeds = [i["prompt"] for i in batch], [i["seed"] for i in batch]
        images = pipelines.run(pipe, texts, seeds, call, output_type="np").images
        made += list((np.asarray(images) * 255).round().astype(np.uint8))
    pipe.register_modules(transformer=own)
    return made


def accuracy(made: list[np.ndarray], batches: list[list[dict]]) -> metrics.Estimate:
    """Share of pictures that show all facts of their prompt."""
    stated = prompts.read(ROOT / "resources" / "digits" / "evaluation.csv")
    items = [item for batch in batches for item in batch]
    read = Judge().read(np.stack(made) / 255)
    right = [
        all(str(facts[key]) == stated[item["prompt_index"]][key] for key in JUDGES["digits"].facts)
        for item, facts in zip(items, read, strict=True)
    ]
    return metrics.mean(right, [item["prompt_index"] for item in items], 1000, 0)


def run(context: Context, settings: Settings, reported: Reported, folder: Path) -> list[dict]:
    """Rows of one training: phase, decay, metric, value, low, high."""
    units = [Unit((NewBlock(first, last),)) for first, last in INTERVALS]
    every = [new_block for unit in units for new_block in unit.new_blocks]
    taught: Students = students.start(context.transformer, every, "first")
    rows: list[dict] = []

    def measure(phase: str, averaged: Averaged, model_of) -> None:
        for decay in averaged.at_each_decay():
            found = measured(model_of(), reported, phase == "finetune")
            rows.extend(
                {"phase": phase, "ema": decay, "metric": name, **estimate._asdict()}
                for name, estimate in found.items()
            )

    def plugged() -> nn.Module:
        return students.plugged(context.transformer, taught)[0]

    options = phase_options(settings, "distill")
    modules = {new_block.name: student for new_block, student in taught.items()}
    losses = distillation.independent(context, taught, options)
    measure("distill", trained(context, "distill", modules, losses, options, folder), plugged)
    options = phase_options(settings, "subsets")
    together = nn.ModuleDict(modules)
    losses = distillation.any_subset(context, units, taught, options)
    averaged = trained(context, "subsets", {"students": together}, losses, options, folder)
    measure("subsets", averaged, plugged)
    modules_at = {new_block.ends: student for new_block, student in taught.items()}
    model = copy.deepcopy(blocks.assembled(context.transformer, modules_at)[0])
    model.float().requires_grad_(True)
    options = phase_options(settings, "finetune")
    losses = distillation.output_distillation(
        context, lambda _step: model, "transformer", options, in_float32=True
    )
    averaged = trained(context, "finetune", {"transformer": model}, losses, options, folder)
    measure("finetune", averaged, lambda: model)
    return rows


def shown(table: pd.DataFrame) -> str:
    """Means over seeds, with the least and the largest, as markdown: of the arms with their own
    weights, and of the averages, as a share of the error without them."""
    own = table[table["ema"] == 0]
    lines = [
        "| trained on | after | metric | mean (least to largest of the seeds) |",
        "|---|---|---|---|",
    ]
    for keys, rows in own.groupby(["record", "phase", "metric"], sort=False):
        lines.append(f"| {' | '.join(keys)} | {_range(rows['value'])} |")
    lines += ["", "| phase | metric | ema | against none |", "|---|---|---|---|"]
    names = ["record", "seed", "phase", "metric"]
    paired = table[table["ema"] > 0].merge(own, on=names, suffixes=("", "_none"))
    for (phase, metric, ema), rows in paired.groupby(["phase", "metric", "ema"], sort=False):
        ratio = metric == "velocity_error"
        change = rows["value"] / rows["value_none"] if ratio else rows["value"] - rows["value_none"]
        lines.append(f"| {phase} | {metric} | {ema:g} | {_range(change)} |")
    return "\n".join(lines)


def _range(values: pd.Series) -> str:
    return f"{values.mean():.4g} ({values.min():.4g} to {values.max():.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="0 shows --output again")
    parser.add_argument("--samples", type=int, default=160, help="recorded per record")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--work", type=Path, help="folder in which records are kept")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.seeds == 0:  # to show a table that is there
        print(shown(pd.read_parquet(args.output)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        every = {name: settings_of(name, args.samples) for name in RECORDS}
        files = {name: record(name, settings, folder) for name, settings in every.items()}
        settings, accelerator = every["4 steps"], processes.accelerator("cpu")
        pipe = pipelines.load(settings.teacher, torch.device("cpu"))
        teacher = pipe.transformer.requires_grad_(False).eval()
        stated = prompts.read(ROOT / "resources" / "digits" / "evaluation.csv")
        items = pipelines.samples(stated, args.pictures, generation.FIRST_SEED)
        batches = pipelines.in_batches(pipe, items, 100)
        reader = calls.Reader(files["4 steps"])
        rows = reader.rows(heldout=True, kinds=("pipeline",))
        reported = Reported(reader, rows, pipe, batches, pictures_of(pipe, teacher, batches))
        told = accuracy(reported.pictures, batches)
        print(f"teacher, {STEPS} steps: accuracy {told.value:.3f}", flush=True)
        table: list[dict] = []
        for seed in range(args.seeds):
            for arm, (name, kinds) in ARMS.items():
                context = Context(teacher, OfKinds(files[name], kinds), seed, accelerator)
                done = run(context, every[name], reported, folder)
                table += [{"record": arm, "seed": seed, **row} for row in done]
                pd.DataFrame(table).to_parquet(args.output)
                last = [r for r in done if r["phase"] == "finetune" and r["ema"] == 0]
                print(seed, arm, {r["metric"]: round(r["value"], 5) for r in last}, flush=True)
        print(shown(pd.DataFrame(table)))


if __name__ == "__main__":
    program.run(main)
