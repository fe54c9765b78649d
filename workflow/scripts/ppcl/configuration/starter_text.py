"""The lines of a first config, section by section: what is written and the comment beside it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ppcl.configuration import config, default_sizes
from ppcl.teacher import signatures
from ppcl.transformer.family import TEXT, Family
from ppcl.transformer.registry import fixed_states

# Text of a line, and the comment beside it.
Lines = list[tuple[str, str]]

PROMPTS = config.SCHEMA_PATH.parents[2] / "resources" / "prompts"
# Channels of a token. From LARGE on, a model is trained with the presets' learning rates; below
# SMALL, with the schema's defaults.
LARGE, SMALL = 1024, 128
_CHOICE = {
    False: "Prompts, variants and steps are yours to choose.",
    True: "Nothing is trained, so no blocks go: closed forms alone.",
}
# Learning rates of distill, subsets and finetune.
RATES = {LARGE: ("1.0e-4", "5.0e-5", "1.0e-5"), SMALL: ("1.0e-3", "3.0e-4", "1.0e-4")}


@dataclass(frozen=True)
class Model:
    """What a config is written for, as far as its configs tell.

    Attributes:
        pipeline, transformer: names of the classes.
        family: the transformer's entry in the registry, if it has one.
        signature: of the pipeline's call.
        folder: of the pipeline.
        component: name of the component that is pruned.
        width: channels of a token.
        depth: number of blocks.
    """

    pipeline: str
    transformer: str
    family: Family | None
    signature: signatures.Signature
    folder: Path
    component: str
    width: int
    depth: int

    @property
    def video(self) -> bool:
        """Whether it makes videos."""
        return "num_frames" in self.signature.parameters

    @property
    def closed_forms(self) -> tuple[bool, bool]:
        """Whether text streams or FFNs can be narrow, and modulation matrices of low rank."""
        if self.family is None:
            return False, False
        ranks = any(listed.modulations for listed in self.family.lists)
        ranks = ranks or bool(self.family.last_modulation)
        return any(listed.width for listed in self.family.lists), ranks

    @property
    def texts(self) -> bool:
        """Whether some blocks have a text stream."""
        lists = self.family.lists if self.family else ()
        return any(TEXT in listed.inputs for listed in lists)


def text(
    model: Model,
    teacher: dict,
    run: str,
    prompts: tuple[str | None, str | None],
    free: bool,
    budgets: Sequence[float],
) -> str:
    """The whole config.

    Args:
        teacher: as the config's `teacher`, without dtype and offload.
        run: name of the run.
        prompts: files for calibration and evaluation; None takes the repository's.
        free: nothing is trained: closed forms alone.
        budgets: of the variants `plugged` and `tuned`, or of `large` and `small` if `free`.
    """
    calibration, evaluation = prompts
    ready = not calibration or not evaluation
    size = f"{model.depth} blocks of {model.width} channels"
    lines = [
        (f"# Prunes a {model.pipeline}: {model.transformer},", ""),
        (f"# {size}. Written by workflow/scripts/init.py.", ""),
        (f"# {_CHOICE[free]} Every key that is left out has a", ""),
        ("# default; config/README.md has them all.", ""),
        ("", ""),
        (f"run: {_scalar(run)}", "everything is written to results/<run>/"),
        *_teacher(model, teacher),
        *_call(model),
        *_record(model, calibration, ready, free),
        *_search(model, free),
        *([] if free else _training(model.width)),
        *_variants(model, budgets, free),
        *_evaluate(model, evaluation, ready, free),
    ]
    return "".join(f"{left:<32} # {right}\n" if right else f"{left}\n" for left, right in lines)


def _teacher(model: Model, teacher: dict) -> Lines:
    lines = [("teacher:", ""), (f"  path: {_scalar(teacher['path'])}", "")]
    lines += [
        (f"  {name}: {_scalar(teacher[name])}", "")
        for name in ("revision", "variant", "subfolder")
        if teacher.get(name)
    ]
    if teacher.get("trust_remote_code"):
        lines += [("  trust_remote_code: true", "its code is run")]
    if model.component != "transformer":
        lines += [(f"  component: {model.component}", "the part that is pruned")]
    size = "bfloat16" if model.width >= SMALL else "float32"
    lines += [(f"  dtype: {size}", "type that the model runs in")]
    if model.width >= LARGE:
        lines += [("  offload: auto", "what does not fit on the GPU waits in main memory")]
    return lines


def _call(model: Model) -> Lines:
    """The section `pipeline`: what its call takes by default."""
    known = model.signature.parameters
    sizes = default_sizes.default_sizes(model.pipeline, model.folder)
    said = {
        "num_frames": "frames",
        "num_inference_steps": "steps; the model's card may say fewer",
        "guidance_scale": "the model's card may say another",
        "true_cfg_scale": "guidance by a second call, with negative_prompt",
    }
    lines = [("pipeline:", "how you call it; here are its defaults")]
    for name in ("height", "width", *said):
        if name not in known:
            continue
        value = sizes.get(name, known[name].default)
        if name == "true_cfg_scale" and (value or 0) <= 1:
            continue
        if value is not None:
            lines.append((f"  {name}: {_scalar(value)}", said.get(name, "")))
        elif name in ("height", "width"):
            lines.append((f"  # {name}:", "of the picture; without it the pipeline decides"))
        if name == "true_cfg_scale":
            lines.append(('  negative_prompt: " "', "without one there is no guidance"))
    return lines if len(lines) > 1 else []


def _record(model: Model, calibration: str | None, ready: bool, free: bool) -> Lines:
    """ready: whether prompts of the repository are taken."""
    steady = free or fixed_states(model.transformer, model.pipeline)
    renoised = 0 if steady else 4 if model.video else 8
    samples = 24 if free else 83 if model.video else 200
    return [
        ("", ""),
        ("record:", "calibration: the model runs on these prompts"),
        (f"  prompts: {_scalar(calibration or _own(model, 'calibration.csv'))}", ""),
        *([("  # Your own are better: such as the model will be asked.", "")] if ready else []),
        (f"  samples: {samples}", "runs of the pipeline, with the prompts in turn"),
        ("  batch_size: 1", "runs at a time; more are faster, if they fit"),
        (
            f"  renoised_per_sample: {renoised}",
            "more noise levels of each result"
            + ("" if renoised else "; not needed" if free else "; not for this pipeline"),
        ),
        ("  heldout_fraction: 0.2", "prompts that judge, and are not learned from"),
    ]


def _search(model: Model, free: bool) -> Lines:
    """The sections of the stages that search and measure, before anything is trained."""
    narrow, low_rank = model.closed_forms
    width, rows = model.width, 64 if free else 512 if model.video else 1024
    lines = [
        ("extract:", "looks into the blocks, on recorded calls"),
        (f"  rows: {rows}", "calls; half of them are held out"),
        ("  batch_size: 1", ""),
    ]
    if free:
        lines += [
            ("  moment_tokens: 1", "nothing reads them, without depth"),
            ("  sample_tokens: 1", ""),
            ("intervals:", ""),
            ("  enabled: false", "no blocks go, for which others would learn"),
        ]
    else:
        lines += [
            (f"  moment_tokens: {_per_call(20, width, rows // 2)}", "20 per channel, over half"),
            (f"  sample_tokens: {_per_call(10, width, rows)}", "10 per channel, over all"),
            ("similarity:", ""),
            ("  estimator: debiased", "right for few tokens too"),
            *([("  streams: mean", "of picture and text")] if model.texts else []),
            ("sensitivity:", "measures what each run of blocks is worth"),
            ("  batch_size: 1", ""),
        ]
    if narrow or not free:
        lines += [
            ("width:", "text streams and FFNs may become linear maps"),
            ("  enabled: true", "false, here and below: variants stay stock classes"),
            *([("  longest: 1", "no text runs: blocks are not compared")] if free else []),
            *([("  rows: 4", "held-out calls behind every price")] if free else []),
            ("  batch_size: 1", ""),
        ]
    if low_rank:
        lines += [
            ("modulation:", "AdaLN matrices of low rank: less memory, the same time"),
            ("  enabled: true", ""),
            *([("  ladder: [8, 16, 32]", "ranks on offer")] if width >= LARGE else []),
        ]
    if free:
        lines += [
            ("choose:", "measures what each variant is made of"),
            ("  rows: 8", "held-out calls"),
            ("  batch_size: 1", ""),
            ("pareto:", "sizes between"),
            ("  budgets: 3", ""),
        ]
    return [*lines, ("", "")]


def _training(width: int) -> Lines:
    """The sections of the stages that train; none for a small model, which takes the defaults."""
    if width < SMALL:
        return []
    rates = RATES[LARGE if width >= LARGE else SMALL]
    words = {
        "distill": ("each new block learns from the teacher's", 6000, 200),
        "subsets": ("then random sets of them, through the model", 500, 50),
        "finetune": ("then whole variants", None, 50),
    }
    lines: Lines = []
    for rate, (name, (what, steps, warmup)) in zip(rates, words.items(), strict=True):
        lines += [
            (f"{name}:", what),
            *([(f"  steps: {steps}", "fewer are faster, and cost quality")] if steps else []),
            ("  batch_size: 8", "of all GPUs together, one each at least"),
            (f"  lr: {rate}", "learning rate, for models of this width"),
            (f"  warmup_steps: {warmup}", "in which it rises"),
            ("  mixed_precision: bf16", ""),
            ("  gradient_checkpointing: true", "less memory, more time"),
            *([("  heldout_rows: 64", "calls that judge every new block")] if steps else []),
        ]
    once: Lines = []
    for left, right in lines:  # each comment once
        once.append((left, "" if right in [said for _, said in once] else right))
    return [*once, ("", "")]


def _variants(model: Model, budgets: Sequence[float], free: bool) -> Lines:
    lines = [("variants:", "budget: share of the transformer's parameters that stays")]
    if free:
        return lines + [
            (f"  - {{name: {name}, budget: {budget}, train: false}}", "")
            for name, budget in zip(("large", "small"), budgets, strict=True)
        ]
    if any(model.closed_forms):
        share = round((1 + budgets[0]) / 2, 3)
        what = "closed forms alone, nothing trained"
        lines += [(f"  - {{name: free, budget: {share}, train: false}}", what)]
    plugged = f"  - {{name: plugged, budget: {budgets[0]}}}"
    tuned = f"  - {{name: tuned, budget: {budgets[1]}, finetune_steps: 1000}}"
    return [*lines, (plugged, "the new blocks as they are"), (tuned, "trained as a whole")]


def _evaluate(model: Model, evaluation: str | None, ready: bool, free: bool) -> Lines:
    """ready: whether prompts of the repository are taken."""
    samples = 8 if free else 20 if model.video else 80
    return [
        ("", ""),
        ("evaluate:", "teacher and variants, side by side"),
        (f"  prompts: {_scalar(evaluation or _own(model, 'evaluation.csv'))}", ""),
        *([("  # Others than those of record; your own are better.", "")] if ready else []),
        (f"  samples: {samples}", "pictures or videos of each"),
        ("  batch_size: 1", ""),
        ("  judge: none", "the other one reads handwritten digits"),
        (f"  velocity_rows: {32 if free else 256}", "recorded calls behind velocity errors"),
    ]


def _per_call(each: int, width: int, rows: int) -> int:
    """Tokens per call, so that `rows` calls give `each` tokens per channel; at least 4."""
    return max(4, math.ceil(each * width / rows))


def _own(model: Model, name: str) -> str:
    """A prompts file of the repository, as a path from here."""
    return os.path.relpath(PROMPTS / f"{'video_' if model.video else ''}{name}")


def _scalar(value: Any) -> str:
    """A value as YAML writes it in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
