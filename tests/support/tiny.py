"""A tiny QwenImagePipeline folder with random weights, and recorded calls of it: wiring only."""

import contextlib
import json
import multiprocessing.spawn  # noqa: F401  (before a stage stands another program for Python)
import runpy
import signal
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from ppcl.digits import teacher
from ppcl.digits.recipe import TransformerRecipe
from ppcl.pruning import selection_file
from ppcl.search import sets
from ppcl.settings import TeacherSettings
from ppcl.storage import schemas, tables, texts
from ppcl.teacher import pipelines, recording, teacher_identity
from ppcl.transformer import call_tables
from ppcl.transformer.context import Context
from support import SCRIPTS, fresh

SETTINGS = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "true_cfg_scale": 2.0,
    "negative_prompt": " ",
}
CALIBRATION = ["a red 1 on blue", "a blue 2 on red", "a green two on red", "4 in red"]
Z_DIM, TEXT_WIDTH = 4, 32


def source(folder: Path | str) -> TeacherSettings:
    """The config's `teacher` section for a folder, in float32."""
    return TeacherSettings.of({"path": str(folder)})


def transformer(blocks: int = 3, seed: int = 0, scale: float = 0.05):
    """A stock QwenImageTransformer2DModel, width 32; `scale` is how far its weights are moved."""
    torch.manual_seed(seed)
    shape = {"blocks": blocks, "heads": 1, "head_dim": 32, "axes_dims_rope": [8, 12, 12]}
    made = teacher.make_transformer(TransformerRecipe.of(shape), Z_DIM, TEXT_WIDTH)
    with torch.no_grad():
        for parameter in made.parameters():  # zero modulations would make blocks identities
            parameter.add_(scale * torch.randn_like(parameter))
    return made.requires_grad_(False).eval()


def silence(block) -> None:
    """Closes the gates of a stock block, which makes it exactly the identity on both streams."""
    with torch.no_grad():
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            modulation.weight.zero_()
            modulation.bias.zero_()


def arguments(lengths: tuple[int, ...] = (5, 5), seed: int = 0) -> dict:
    """One call of `transformer`, 16 image tokens; samples with `lengths` text tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    given = {
        "hidden_states": torch.randn(batch, 16, 4 * Z_DIM, generator=generator),
        "encoder_hidden_states": torch.randn(batch, longest, TEXT_WIDTH, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [[(1, 4, 4)]] * batch,
        "return_dict": False,
    }
    if min(lengths) < longest:
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        given["encoder_hidden_states_mask"] = mask.long()
    return given


def pipeline(folder: Path, blocks: int = 3, seed: int = 0) -> Path:
    """Writes a complete pipeline; the same seed gives the same weights."""
    made = transformer(blocks, seed)
    tokenizer = teacher.make_tokenizer()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=teacher.make_vae(8, Z_DIM),
        text_encoder=teacher.make_text_encoder(tokenizer, TEXT_WIDTH, 1),
        tokenizer=tokenizer,
        transformer=made,
    ).save_pretrained(folder)
    return folder


def load(folder: Path):
    """The pipeline of a folder, as the stages load it."""
    return pipelines.load(source(folder), torch.device("cpu"))


def samples(prompts: list[str]) -> list[dict]:
    """Calibration samples of prompts; every other prompt is held out."""
    return [
        {
            "sample": number,
            "prompt_index": number,
            "prompt": prompt,
            "seed": number,
            "heldout": number % 2 == 1,
        }
        for number, prompt in enumerate(prompts)
    ]


def places(count: int, **same) -> dict[str, list]:
    """Where `count` recorded samples of one call happened: columns of calls.parquet."""
    rows = {
        "prompt": "p",
        "seed": 0,
        "kind": "pipeline",
        "step": 0,
        "branch": 0,
        "timestep": 1.0,
        "sigma": 0.5,
        "heldout": False,
    }
    numbers = {"sample": list(range(count)), "prompt_index": list(range(count))}
    return numbers | {name: [value] * count for name, value in (rows | same).items()}


def record(
    folder: Path, path: Path, prompts: list[str] = CALIBRATION, batch: int = 1, renoised: int = 1
) -> Path:
    """Records the pipeline's calls on prompts, `batch` at a time (unlike lengths are padded)."""
    pipe, tables = load(folder), []
    every = samples(prompts)
    for start in range(0, len(every), batch):
        part = every[start : start + batch]
        tables += recording.record_batch(pipe, pipe.transformer, part, SETTINGS, renoised, seed=0)
    note = teacher_identity.note(teacher_identity.resolved(source(folder)))
    call_tables.write(path, [table.schema for table in tables], tables, note)
    return path


def intervals(path: Path, chosen: list[tuple[int, int]]) -> Path:
    """Writes a table of selected intervals."""
    table = pd.DataFrame(chosen, columns=["first", "last"])
    table = table.assign(removed_blocks=table["last"] - table["first"], cka=0.9, selected=True)
    table = table.assign(verdict="cheapest", reason="test", source="trend", cost=0.1, tolerance=0.0)
    tables.write(path, table[schemas.INTERVALS.names], schemas.INTERVALS, {})
    return path


def candidates(path: Path, runs: list[tuple[int, int]], ffns: list[tuple[int, str]]) -> Path:
    """Writes a table of selected text runs, and FFNs that become linear."""
    rows = [["text", first, last, "text"] for first, last in runs]
    rows += [["ffn", block, block, stream] for block, stream in ffns]
    table = pd.DataFrame(rows, columns=["kind", "first", "last", "stream"])
    table = table.assign(fit_error_heldout=0.1, cka=0.9, parameters_saved=1, velocity_error=0.1)
    table = table.assign(path="", rank=0)
    table = table.assign(selected=True, verdict="cheapest", reason="test")
    tables.write(path, table[schemas.WIDTH_CANDIDATES.names], schemas.WIDTH_CANDIDATES, {})
    return path


def options(settings: dict | None, paths: dict) -> list[str]:
    """Command line of a stage: a config, if there is one, and a path, or a text, per option."""
    given = ["--config", json.dumps(settings)] if settings else []
    for name, value in paths.items():
        given += [f"--{name.replace('_', '-')}", str(value)]
    return given


def stage(name: str, settings: dict | None, *group: str, **paths) -> None:
    """Runs a stage's program, or one part of it, in this process; it may end with SystemExit.

    accelerate keeps one setting of precision per process, and every stage is a process of its own.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [name, *group, *options(settings, paths)])
            # What is exported is loaded again in a fresh process.
            patch.setattr("sys.executable", fresh.python(fresh.MODELS))
            by_row_group(patch)
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        signal.signal(signal.SIGTERM, before)


def pruned(
    folder: Path,
    teacher: Path | dict,
    recorded: Path,
    ffns: tuple[tuple[int, str], ...] = (),
    runs: tuple[tuple[int, int], ...] = ((0, 1), (3, 4)),
    **more,
) -> tuple[dict, dict]:
    """A config with intervals (and linear FFNs, and `more` keys), and what `distill` takes: paths
    of the calls, the selection and the start weights, made in `folder`."""
    settings = {
        "seed": 0,
        "device": "cpu",
        "teacher": teacher if isinstance(teacher, dict) else {"path": str(teacher)},
        "pipeline": {},
        "intervals": {},
        "prune": {"start": "first"},
        "width": {},
        "modulation": {},
        "choose": {"rows": 4, "batch_size": 4},
        "variants": [{"name": "p70", "budget": 0.7, "finetune_steps": 6}],
        **more,
    }
    given = {"calls": recorded, "selection": folder / "selection.json"}
    given |= {"students": folder / "start.safetensors"}
    chosen = {"intervals": intervals(folder / "intervals.parquet", list(runs))}
    if ffns:
        chosen["candidates"] = candidates(folder / "candidates.parquet", [], list(ffns))
    stage("prune", settings, **chosen, **given)
    return settings, given


def chosen(path: Path, plan: Path, source: str, variant: str = "p70") -> Path:
    """Writes sets.json: the variant is all units of a selection, from one source."""
    selection = selection_file.read(plan)
    members = tuple(sets.Member(unit, source) for unit in selection.units)
    saved = sum(entry["saved_parameters"] for entry in selection.facts["units"])
    facts = {"parameters": selection.facts["transformer_parameters"] - saved}
    content = {variant: sets.entry(sets.Set(members)) | facts}
    texts.write_sealed(path, {"variants": content, "alone": {}})
    return path


def by_row_group(patch: pytest.MonkeyPatch) -> None:
    """From now on nobody may read all tensors or pictures of a table at once: recorded calls,
    tokens and images of a large model are more than memory holds."""
    plain = tables.File.read

    def read(self, columns=None):
        for name in columns or self.schema.names:
            kind = self.schema.field(name).type
            large = isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_binary(kind)
            assert not large or len(self) == 1, f"column {name} is read whole"
        return plain(self, columns)

    patch.setattr(tables.File, "read", read)


class NoBar:
    """A progress bar that shows nothing."""

    def update(self, _count: int) -> None:
        pass


def in_processes(count: int, run) -> list:
    """What `run` returns for each of several processes, each of which reduces what is its own."""
    values = [[] for _ in range(count)]
    for process in range(count):
        run(Process(process, count, lambda index, value: values[index].append(value) or value))
    means = [sum(every) / count for every in zip(*values, strict=True)]
    played = [iter(means) for _ in range(count)]
    return [run(Process(p, count, lambda index, _v: next(played[index]))) for p in range(count)]


class Process:
    """One of several processes, played by this one; `held` knows what `reduce` returns in each."""

    def __init__(self, index, count, held, reduction="mean"):
        self.process_index, self.num_processes = index, count
        self.device, self.autocast = torch.device("cpu"), contextlib.nullcontext
        self._held, self._reduction = held, reduction

    def reduce(self, value, reduction):
        assert reduction == self._reduction
        return self._held(self.process_index, value)


def context(transformer, reader, seed: int = 0, accelerator=None) -> Context:
    """What a stage works with; in one process on the CPU unless told."""
    return Context(transformer, reader, seed, accelerator or Process(0, 1, None))
