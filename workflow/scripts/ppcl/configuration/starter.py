"""A first config for a model of one's own, from the configs of its pipeline. No torch."""

import ast
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ppcl.configuration import config, preflight
from ppcl.errors import UserError
from ppcl.settings import Settings, TeacherSettings
from ppcl.storage import untrusted
from ppcl.teacher import arguments, hub, signatures
from ppcl.transformer.family import TEXT, Family
from ppcl.transformer.registry import family_of, fixed_states

PROMPTS = config.SCHEMA_PATH.parents[2] / "resources" / "prompts"
# Channels of a token from which on a model is trained as the presets are; those below SMALL as the
# embedded teacher is.
LARGE, SMALL = 1024, 128
LARGEST = 1 << 20  # channels, or pixels of a side; what a config holds beyond it is damage
# Budgets of variants, with training and without.
BUDGETS = {False: (0.7, 0.55), True: (0.75, 0.65)}
_CHOICE = {
    False: "Prompts, variants and steps are yours to choose.",
    True: "Nothing is trained, so no blocks go: closed forms alone.",
}
# Learning rates of distill, subsets and finetune.
RATES = {LARGE: ("1.0e-4", "5.0e-5", "1.0e-5"), SMALL: ("1.0e-3", "3.0e-4", "1.0e-4")}


def write(
    teacher: dict,
    output: Path,
    run: str | None = None,
    calibration: str | None = None,
    evaluation: str | None = None,
    free: bool = False,
) -> None:
    """Writes a config for a teacher, which has passed the checks made before a run.

    Args:
        teacher: as the config's `teacher`, without dtype and offload.
        run: its name; None takes the file's.
        calibration, evaluation: prompts files; None takes those of the repository.
        free: nothing is trained: closed forms alone.

    Raises:
        UserError: there is such a file; the teacher is none, or can't be pruned; its pipeline needs
            pictures, and no prompts with pictures are given.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output: {output} is to be a config file; let it end in .yaml")
    if output.exists():
        raise UserError(f"--output: {output} is there already; name another file, or remove it")
    path = os.path.expanduser(teacher["path"])
    teacher = teacher | {"path": path.rstrip("/") if hub.is_name(path.rstrip("/")) else path}
    given = teacher, run or output.stem, calibration, evaluation, free
    config.complete({"run": given[1], "teacher": teacher}, str(output))  # names that can't be
    text = made(*given)
    settings = Settings.of(config.complete(yaml.safe_load(text), str(output)))
    least = preflight.least_fraction(settings, str(output))
    if least > BUDGETS[free][-1] - 0.05:  # most of this model is in nothing that can go
        text = made(*given, budgets=[round(least + (1 - least) * part, 3) for part in (0.6, 0.3)])
        settings = Settings.of(config.complete(yaml.safe_load(text), str(output)))
    preflight.check(settings, str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"--output: {output} was written just now by another") from error


def made(
    teacher: dict,
    run: str,
    calibration: str | None = None,
    evaluation: str | None = None,
    free: bool = False,
    budgets: Sequence[float] | None = None,
) -> str:
    """The text of a config for a teacher. Raises UserError as `write` does.

    Args:
        budgets: of a variant that is not fine-tuned, and of one that is; without training, of two.
    """
    budgets = budgets or BUDGETS[free]
    source = TeacherSettings.of(teacher)
    folder, part = _folder(source), hub.component(source)
    index = hub.read_index(folder)
    pipeline = str(index.get("_class_name"))
    transformer = str((index.get(part) or [None])[-1])
    if "Transformer" not in transformer:
        known = [name for name, kind in index.items() if "Transformer" in str(kind)]
        raise UserError(
            f"--component: {teacher['path']}, a {pipeline}, has no {part} that is a transformer; "
            f"transformers in it: {', '.join(known) or 'none, so that it cannot be pruned'}"
        )
    family, shape = family_of(transformer), _read(folder / part / "config.json")
    signature = signatures.of(pipeline)
    if signature is None:
        raise UserError(
            f"--teacher: {teacher['path']} is a {pipeline}, which is no pipeline of diffusers' "
            "own: write its config by hand, as config/README.md tells"
        )
    if not (calibration and evaluation):
        arguments.refuse_pictures(pipeline, signature, False, "--calibration and --evaluation")
    narrow, low_rank = _closed_forms(family)
    if free and not (narrow or low_rank):
        raise UserError(
            f"--free: of a {transformer} nothing has a closed form (docs/families.md); leave "
            "--free out, so that blocks go and students are trained"
        )
    video = "num_frames" in signature.parameters
    kind, samples, evaluated = ("video_", 83, 20) if video else ("", 200, 80)
    samples, evaluated = (24, 8) if free else (samples, evaluated)
    width, depth = channels(shape), sum(_depths(family, shape))
    large = width >= LARGE
    size = "bfloat16" if width >= SMALL else "float32"
    renoised = 0 if free or fixed_states(transformer, pipeline) else 4 if video else 8
    rows = 64 if free else 512 if video else 1024
    lines: list[tuple[str, str]] = [
        (f"# Prunes a {pipeline}: {transformer},", ""),
        (f"# {depth} blocks of {width} channels. Written by workflow/scripts/init.py.", ""),
        (f"# {_CHOICE[free]} Every key that is left out has a", ""),
        ("# default; config/README.md has them all.", ""),
        ("", ""),
        (f"run: {_scalar(run)}", "everything is written to results/<run>/"),
        ("teacher:", ""),
        (f"  path: {_scalar(teacher['path'])}", ""),
    ]
    lines += [
        (f"  {name}: {_scalar(teacher[name])}", "")
        for name in ("revision", "variant", "subfolder")
        if teacher.get(name)
    ]
    if teacher.get("trust_remote_code"):
        lines += [("  trust_remote_code: true", "its code is run")]
    if part != "transformer":
        lines += [(f"  component: {part}", "the part that is pruned")]
    lines += [(f"  dtype: {size}", "type that the model runs in")]
    if large:
        lines += [("  offload: auto", "what does not fit on the GPU waits in main memory")]
    lines += _call_lines(pipeline, signature, folder)
    ready = not calibration or not evaluation
    lines += [
        ("", ""),
        ("record:", "calibration: the model runs on these prompts"),
        (f"  prompts: {_scalar(calibration or _own(f'{kind}calibration.csv'))}", ""),
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
    lines += _search_lines(family, width, rows, free)
    lines += [] if free else _training_lines(width)
    lines += [("variants:", "budget: share of the transformer's parameters that stays")]
    if free:
        lines += [
            (f"  - {{name: {name}, budget: {budget}, train: false}}", words)
            for name, budget, words in zip(("large", "small"), budgets, ("", ""), strict=True)
        ]
    else:
        if narrow or low_rank:
            share = round((1 + budgets[0]) / 2, 3)
            what = "closed forms alone, nothing trained"
            lines += [(f"  - {{name: free, budget: {share}, train: false}}", what)]
        lines += [
            (f"  - {{name: plugged, budget: {budgets[0]}}}", "the new blocks as they are"),
            (
                f"  - {{name: tuned, budget: {budgets[1]}, finetune_steps: 1000}}",
                "trained as a whole",
            ),
        ]
    lines += [
        ("", ""),
        ("evaluate:", "teacher and variants, side by side"),
        (f"  prompts: {_scalar(evaluation or _own(f'{kind}evaluation.csv'))}", ""),
        *([("  # Others than those of record; your own are better.", "")] if ready else []),
        (f"  samples: {evaluated}", "pictures or videos of each"),
        ("  batch_size: 1", ""),
        ("  judge: none", "the other one reads handwritten digits"),
        (f"  velocity_rows: {32 if free else 256}", "recorded calls behind velocity errors"),
    ]
    return "".join(f"{left:<32} # {right}\n" if right else f"{left}\n" for left, right in lines)


def _closed_forms(family: Family | None) -> tuple[bool, bool]:
    """Whether text streams or FFNs can be narrow, and modulation matrices of low rank."""
    if family is None:
        return False, False
    ranks = any(listed.modulations for listed in family.lists) or bool(family.last_modulation)
    return any(listed.width for listed in family.lists), ranks


def _search_lines(
    family: Family | None, width: int, rows: int, free: bool
) -> list[tuple[str, str]]:
    """The sections of what is looked for and measured before anything is trained."""
    narrow, low_rank = _closed_forms(family)
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
            *([("  streams: mean", "of picture and text")] if _texts(family) else []),
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


def channels(shape: Mapping) -> int:
    """Channels of a token, from the config of a transformer of any class."""

    def held(*names: str) -> int | None:
        counts = (shape[name] for name in names if type(shape.get(name)) is int)
        return next((count for count in counts if 0 < count <= LARGEST), None)

    heads, size = held("num_attention_heads", "num_heads"), held("attention_head_dim")
    found = held("hidden_size", "inner_dim", "dim") or (heads or 1) * (size or 64)
    return min(found, LARGEST)


def _depths(family: Family | None, shape: Mapping) -> list[int]:
    keys = [listed.depth_key for listed in family.lists] if family else ["num_layers"]
    return [shape[key] for key in keys if isinstance(shape.get(key), int)]


def _texts(family: Family | None) -> bool:
    return bool(family) and any(TEXT in listed.inputs for listed in family.lists)


def _per_call(each: int, width: int, rows: int) -> int:
    """Tokens per call, so that there are so many per channel."""
    return max(4, math.ceil(each * width / rows))


def _call_lines(
    pipeline: str, signature: signatures.Signature, folder: Path
) -> list[tuple[str, str]]:
    """The section `pipeline`: what its call takes by default."""
    known = signature.parameters
    sizes = default_sizes(pipeline, folder)
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


def _training_lines(width: int) -> list[tuple[str, str]]:
    """The sections of what trains; those of a small model are the defaults."""
    if width < SMALL:
        return []
    rates = RATES[LARGE if width >= LARGE else SMALL]
    words = {
        "distill": ("each new block learns from the teacher's", 6000, 200),
        "subsets": ("then random sets of them, through the model", 500, 50),
        "finetune": ("then whole variants", None, 50),
    }
    lines = []
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
    found = []
    for left, right in lines:  # what has been said need not be said again
        found.append((left, "" if right in [said for _, said in found] else right))
    return [*found, ("", "")]


def _own(name: str) -> str:
    """A prompts file of the repository, as a path from here."""
    return os.path.relpath(PROMPTS / name)


def _scalar(value: Any) -> str:
    """A value as YAML writes it in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]


def _folder(teacher: TeacherSettings) -> Path:
    """The pipeline's folder, of which its configs are here; on the Hub, they are fetched."""
    path, subfolder = teacher.path, teacher.subfolder or ""
    if not hub.is_name(path):
        return hub.folder(teacher, "--teacher")
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{name}".lstrip("/") for name in (hub.INDEX, "*/config.json")]
    try:
        root = snapshot_download(path, revision=teacher.revision, allow_patterns=wanted)
    except Exception as error:  # of many kinds: no network, no such repository, no token
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--teacher: {path} is no folder here, and the Hub does not give its configs "
            f"({reason}); check the name, accept its terms and set HF_TOKEN, or give a folder"
        ) from error
    return Path(root) / subfolder


def _read(path: Path) -> dict:
    """A config of a component; UserError if it is none."""
    try:
        return untrusted.json_object(path)
    except FileNotFoundError as error:
        raise UserError(f"--teacher: {path} is not there; restore it") from error


class _Part:
    """A component of a pipeline, as far as its config tells."""

    def __init__(self, shape: Mapping):
        self._shape = shape

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            return self
        try:
            return self._shape[name]
        except KeyError:
            raise AttributeError(name) from None


def default_sizes(pipeline: str, folder: Path) -> dict[str, int]:
    """Height, width and frames that a stock pipeline takes if its call gives none, as far as
    `height = height or <expression>` in its source and the configs of its parts tell.

    Args:
        pipeline: name of the class.
        folder: of the pipeline.
    """
    found = signatures.source(pipeline)
    if found is None:
        return {}
    functions = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    configs = {name: folder / name / "config.json" for name in hub.parts(folder)}
    here = {name: _Part(_read(path)) for name, path in configs.items() if path.exists()}
    itself = type("Pipeline", (), {})()
    vars(itself).update(here)
    names = {"self": itself, "len": len, "getattr": getattr, "hasattr": hasattr, "int": int}
    for node in ast.walk(functions.get("__init__", found)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            value = _worked_out(node.value, names)
            if value is not None:
                setattr(itself, node.targets[0].attr, value)
    sizes = {}
    for node in ast.walk(functions.get("__call__", found)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.BoolOp):
            continue
        name = ast.unparse(node.targets[0])
        first, *others = node.value.values
        if name in ("height", "width", "num_frames") and ast.unparse(first) == name:
            value = _worked_out(others[-1], names)
            if isinstance(value, int) and 0 < value <= LARGEST:
                sizes.setdefault(name, value)
    return sizes


def _worked_out(node: ast.expr, names: dict[str, Any]) -> Any:
    """An expression of diffusers' own source, in numbers and configs; None if it takes more."""
    plain = (ast.Lambda, ast.Await, ast.Yield, ast.NamedExpr)
    if any(isinstance(inner, plain) for inner in ast.walk(node)):
        return None
    called = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    if not called <= names.keys():
        return None
    try:
        return eval(  # noqa: S307  (the installed library's own text, which runs anyway)
            compile(ast.Expression(node), "<diffusers>", "eval"), {"__builtins__": {}}, names
        )
    except Exception:
        return None
